"""Which data sets pull the adapter in different directions: cosines between the gradients of tasks, with their noise.

A task's gradient is that of its mean NLL per answer token, for all adapter parameters, on a few fixed examples. The
difference between two halves of these examples shows how far chance alone moves a cosine.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qdora.data.batching import IGNORED, MicroBatch
from qdora.model.grouped_attention import fast_grouped_attention
from qdora.model.inject import adapted_layers, block_of
from qdora.train.checkpoint import random_state, set_random_state
from qdora.train.passes import batch_loss, prepare_model_gains

Array = NDArray[np.float64]

ALL = "all"
"""The group of all adapter parameters."""
MIN_EXAMPLES = 2
"""Fewest examples of a task: one for each half."""
CERTAIN = 2.0
"""Two tasks are in conflict if their cosine is more than so many times its noise below 0."""
# A task whose two halves have a lower cosine has too few examples: its cosines to other tasks are mostly noise.
_CLEAR = 0.3


@dataclass(frozen=True)
class GradientProbe:
    """The examples on which gradients are measured: task -> the micro-batches of each of its two halves."""

    halves: Mapping[str, tuple[Sequence[MicroBatch], Sequence[MicroBatch]]]


def measure(
    model: nn.Module,
    probe: GradientProbe,
    parameters: Mapping[str, nn.Parameter],
    *,
    device: torch.device,
    loss_chunk: int | None = None,
) -> dict[str, Any]:
    """Cosines between the tasks' gradients: over all adapter parameters, for A, B and m each, and for each block.

    Training is not affected: dropout is off during the measurement, and generators and gradients are restored. Two
    gradients a task are held on the host, in bf16, which moves a cosine by less than 1e-3.

    Args:
        model: In training mode, so that activations are recomputed as in training.
        probe: At least two tasks.
        parameters: Path -> adapter parameter.
        loss_chunk: As for `fit`.
    Returns:
        JSON values: `tasks`, `seconds`, `bytes` on the host, the fields of `Agreement` over all parameters, `groups`
        (A, B, magnitude -> cosines), `blocks` (number of a block -> cosines), and mean, lowest and conflicting cosines.
    """
    began = time.perf_counter()
    names = list(probe.halves)
    random = random_state()
    before = {key: parameter.grad for key, parameter in parameters.items()}
    halves = [half for name in names for half in probe.halves[name]]
    try:
        torch.manual_seed(0)  # a model may draw random numbers of its own: the same in each measurement
        with _without_dropout(model):
            prepare_model_gains(model)
            measured = [_gradient(model, half, parameters, device, loss_chunk) for half in halves]
    finally:
        for key, parameter in parameters.items():
            parameter.grad = before[key]
        set_random_state(random)
    grams = gram_matrices([gradient for gradient, _ in measured], list(parameters))
    share = np.array([count for _, count in measured], dtype=np.float64).reshape(len(names), 2)
    whole = agreement(grams.pop(ALL), share)
    parts = {name: _plain(agreement(gram, share).cosines) for name, gram in grams.items()}
    pairs = whole.cosines[np.triu_indices(len(names), 1)]
    report = {
        "tasks": names,
        "num_examples": {n: [sum(len(m.example_ids) for m in half) for half in probe.halves[n]] for n in names},
        "num_label_tokens": dict(zip(names, share.sum(axis=1).astype(int).tolist(), strict=True)),
        **{name: _plain(values) for name, values in vars(whole).items()},
        "groups": {name: cosines for name, cosines in parts.items() if not name.isdigit()},
        "blocks": {name: cosines for name, cosines in parts.items() if name.isdigit()},
        "bytes": len(halves) * 2 * sum(parameter.numel() for parameter in parameters.values()),
        "seconds": time.perf_counter() - began,
        "mean_cosine": _plain(pairs.mean()),
        "lowest_cosine": _plain(pairs.min()),
    }
    return {**report, "num_conflicts": len(conflicts(report))}


@dataclass(frozen=True)
class Agreement:
    """How far the gradients of tasks agree.

    Attributes:
        cosines, norms: (tasks, tasks) and (tasks,).
        noise: (tasks, tasks): standard error of each cosine from the choice of examples; nan on the diagonal.
        own_cosines: (tasks,): between the two halves of a task. Near 1 its examples agree; near 0 they are too few, and
            cosines to other tasks are drawn towards 0.
    """

    cosines: Array
    noise: Array
    own_cosines: Array
    norms: Array


def agreement(gram: Array, num_tokens: Array) -> Agreement:
    """Cosines and their noise, from the inner products of half gradients.

    With h1, h2 the gradients of a task's halves (means over n1 and n2 tokens) and w = n1 / (n1 + n2), the task's
    gradient is g = w h1 + (1 - w) h2, and e = sqrt(w (1 - w)) (h1 - h2) is a draw of its error: E |e|^2 is its
    variance. To first order, task i contributes the error <e, g_j / |g_j| - cos g_i / |g_i|> / |g_i| to cos(g_i, g_j).
    Its size is averaged over all other tasks j, since one draw says little. The errors of both tasks add in squares.

    `gram` holds the inner products of the halves, (2 tasks, 2 tasks): both of the first task, both of the second, and
    so on. `num_tokens`, (tasks, 2), are the answer tokens of each half.
    """
    num_tasks = len(num_tokens)
    weights = num_tokens / num_tokens.sum(axis=1, keepdims=True)
    mean, error = np.zeros((num_tasks, 2 * num_tasks)), np.zeros((num_tasks, 2 * num_tasks))
    for task in range(num_tasks):
        mean[task, 2 * task : 2 * task + 2] = weights[task]
        error[task, 2 * task : 2 * task + 2] = np.array([1.0, -1.0]) * np.sqrt(weights[task].prod())
    products = mean @ gram @ mean.T
    norms = np.sqrt(np.maximum(products.diagonal(), 0.0))
    scale = np.outer(norms, norms)
    with np.errstate(divide="ignore", invalid="ignore"):
        cosines = products / scale
        along = error @ gram @ mean.T / scale  # (tasks, tasks): row i is task i's error along each g_j
        errors = along - cosines * along.diagonal()[:, None]
        halves = gram.diagonal().reshape(num_tasks, 2)
        own = np.array([gram[2 * task, 2 * task + 1] for task in range(num_tasks)]) / np.sqrt(halves.prod(axis=1))
    np.fill_diagonal(errors, 0.0)
    # A task whose gradient is zero has no cosine with the others; it says nothing of their noise.
    num_others = (~np.isnan(errors)).sum(axis=1) - 1
    squares = np.nansum(errors**2, axis=1) / np.maximum(num_others, 1)
    noise = np.sqrt(squares[:, None] + squares[None, :])
    np.fill_diagonal(noise, np.nan)
    return Agreement(cosines, noise, own, norms)


def gram_matrices(gradients: Sequence[Mapping[str, Tensor]], keys: Sequence[str]) -> dict[str, Array]:
    """Group -> (gradients, gradients) inner products in float64.

    Groups are `ALL` parameters, each kind (the last part of a path) and each block (the first number in a path).
    `keys` are the paths of all parameters; a path that is missing in a gradient counts as zeros.
    """
    grams: dict[str, Array] = {}
    for key in keys:
        places = [number for number, each in enumerate(gradients) if key in each]
        if not places:
            continue  # parameters without any gradient have no row in the report
        stacked = torch.stack([gradients[place][key].flatten() for place in places]).double()
        product = np.zeros((len(gradients), len(gradients)))
        product[np.ix_(places, places)] = (stacked @ stacked.T).numpy()
        block = block_of(key)
        for group in (ALL, key.rpartition(".")[2], *([] if block is None else [str(block)])):
            grams[group] = grams.get(group, np.zeros_like(product)) + product
    return grams


def conflicts(report: Mapping[str, Any]) -> list[tuple[str, str, float, float]]:
    """(task, task, cosine, noise) of every pair in conflict (see `CERTAIN`), worst first."""
    found = [each for each in _pairs(report) if each[2] < -CERTAIN * each[3]]
    return sorted(found, key=lambda each: each[2])


def in_words(report: Mapping[str, Any], step: int) -> str:
    """A paragraph on `measure` after `step` steps: tasks in conflict, the two most alike, those with few examples."""
    found = [f"{first} and {second} ({cosine:.2f} ± {noise:.2f})" for first, second, cosine, noise in conflicts(report)]
    text = f"Cosines between the tasks' gradients on validation examples after step {step}, ± their noise. "
    text += f"In conflict: {', '.join(found)}." if found else "No two tasks are in conflict beyond noise."
    pairs = [(cosine, f"{first} and {second}") for first, second, cosine, _ in _pairs(report)]
    if pairs:
        text += " Most alike: {1} ({0:.2f}).".format(*max(pairs))
    own_cosines = zip(report["tasks"], report["own_cosines"], strict=True)
    unclear = [name for name, own in own_cosines if own is None or own < _CLEAR]
    if unclear:
        text += f" Too few examples to tell: {', '.join(unclear)} (the two halves of their examples disagree)."
    return text


def _pairs(report: Mapping[str, Any]) -> list[tuple[str, str, float, float]]:
    """(task, task, cosine, noise) of every pair of tasks with a known cosine."""
    names = report["tasks"]
    return [
        (names[i], names[j], report["cosines"][i][j], report["noise"][i][j])
        for i, j in itertools.combinations(range(len(names)), 2)
        if report["cosines"][i][j] is not None
    ]


def _gradient(
    model: nn.Module,
    batches: Sequence[MicroBatch],
    parameters: Mapping[str, nn.Parameter],
    device: torch.device,
    loss_chunk: int | None,
) -> tuple[dict[str, Tensor], int]:
    """Gradient of the mean NLL per answer token, bf16 on the host, and the number of answer tokens."""
    num_tokens = sum(int((micro.labels != IGNORED).sum()) for micro in batches)
    for parameter in parameters.values():
        parameter.grad = None
    # float16 would lose the gradients of a small share of the sum, so there the sum is divided afterwards.
    before, after = (1, num_tokens) if getattr(model, "dtype", None) == torch.float16 else (num_tokens, 1)
    with fast_grouped_attention():
        for micro in batches:
            input_ids, attention_mask = micro.input_ids.to(device), micro.attention_mask.to(device)
            loss = batch_loss(model, input_ids, attention_mask, micro.labels, chunk=loss_chunk, packing=micro.packing)
            (loss.nll_sum / before).backward()  # type: ignore[no-untyped-call]
    gradients = {key: parameter.grad for key, parameter in parameters.items() if parameter.grad is not None}
    if after != 1:
        for gradient in gradients.values():
            gradient.div_(after)
    found = {key: gradient.to("cpu", torch.bfloat16) for key, gradient in gradients.items()}
    return found, num_tokens


@contextmanager
def _without_dropout(model: nn.Module) -> Iterator[None]:
    """Turn off dropout only: checkpointing needs training mode, and a layer that changes its mode drops its norms."""
    layers = list(adapted_layers(model).values())
    shares = [layer.dropout for layer in layers]
    others = [module for module in model.modules() if isinstance(module, nn.Dropout) and module.training]
    try:
        for layer in layers:
            layer.dropout = 0.0
        for module in others:
            module.eval()
        yield
    finally:
        for layer, share in zip(layers, shares, strict=True):
            layer.dropout = share
        for module in others:
            module.train()


def _plain(values: Any) -> Any:
    """JSON values of an array or a number: nested lists with six digits, None for nan."""
    if np.ndim(values) > 0:
        return [_plain(each) for each in values]
    return None if np.isnan(values) else float(f"{values:.6g}")
