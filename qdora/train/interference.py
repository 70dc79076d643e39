"""Which data sets pull the adapter in different directions: cosines between the gradients of tasks, with their noise.

A task's gradient is that of its mean NLL per answer token, for all adapter parameters, on a few validation examples:
gradients on memorised training examples no longer show whether learning one task helps another. The difference between
two halves of the examples shows how far chance alone moves a cosine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from qdora.adapter.layer import evaluation_mode
from qdora.data.batches import IGNORED, Batching, MicroBatch, Step, micro_batches
from qdora.data.example import Example
from qdora.data.tokenize import TokenizedExample, tokenize_all
from qdora.errors import RunFailure, UserError
from qdora.evaluate.suite import spread
from qdora.recipe.settings import Recipe
from qdora.train.checkpoint import random_state, set_random_state
from qdora.train.passes import step_gradient
from qdora.train.policies import LossScale, OutOfMemory

Array = NDArray[np.float64]
MIN_EXAMPLES = 2
"""Fewest examples of a task: one for each half."""
_PIECE = 2**24  # entries of a gradient that exist in float64


def interference_faults(recipe: Recipe, validation: Mapping[str, Sequence[Example]]) -> list[str]:
    """What is missing for a measurement: two tasks with validation examples, and evaluations at its steps."""
    every, evaluated = recipe.interference.every, recipe.eval.every
    if every is None:
        return []
    faults = []
    if evaluated is None or every % evaluated:
        faults.append(f"interference.every: must be a multiple of eval.every ({evaluated}), got {every}.")
    if len(recipe.data.mix) < 2:
        faults.append("interference.every: needs at least two sources in data.mix, got 1.")
    counts = {source.label: len(validation.get(source.label, ())) for source in recipe.data.mix}
    return faults + _too_few(counts, "validation examples")


def _too_few(counts: Mapping[str, int], what: str) -> list[str]:
    few = [(name, count) for name, count in counts.items() if count < MIN_EXAMPLES]
    return [f"interference.every: {n} has {count} {what}, must be at least {MIN_EXAMPLES}." for n, count in few]


def probe_examples(
    recipe: Recipe, tokenizer: Any, validation: Mapping[str, Sequence[Example]]
) -> dict[str, list[TokenizedExample]]:
    """Validation examples of every task, evenly spread over its data, tokenised as in training; none without
    `interference.every`."""
    data = recipe.data
    options: dict[str, Any] = {"max_length": data.max_length, "loss_on": data.loss_on, "too_long": "truncate"}
    examples = {}
    for source in data.mix if recipe.interference.every is not None else ():
        chosen = spread(validation[source.label], recipe.interference.examples)
        examples[source.label] = list(tokenize_all(chosen, tokenizer, name=source.label, **options).examples)
    if faults := _too_few({name: len(found) for name, found in examples.items()}, "validation examples with labels"):
        raise UserError(*faults)
    return examples


def halves_of(
    probed: Mapping[str, Sequence[TokenizedExample]], batching: Batching
) -> dict[str, tuple[list[MicroBatch], list[MicroBatch]]]:
    """The micro-batches of the two halves of each task's examples."""

    def batches(examples: Sequence[TokenizedExample]) -> list[MicroBatch]:
        return micro_batches(examples, batching, list({example.task: None for example in examples}))

    return {name: (batches(examples[0::2]), batches(examples[1::2])) for name, examples in probed.items()}


def measure(
    model: nn.Module,
    halves: Mapping[str, tuple[Sequence[MicroBatch], Sequence[MicroBatch]]],
    parameters: Mapping[str, nn.Parameter],
    *,
    device: torch.device,
    loss_chunk: int | None = None,
    loss_scale: LossScale | None = None,
) -> dict[str, Any]:
    """Cosines between the tasks' gradients by all adapter parameters, without dropout.

    Training is not affected: random generators are restored, and no gradients are left. Two gradients of each task, of
    the `halves` of its examples, are held on the host, in bf16, which moves a cosine by less than 1e-3.

    Returns JSON values: the sizes of the tasks, those of `agreement`, the mean and the lowest cosine of two tasks, and
    the number of cosines more than twice their noise below 0.
    """
    names, random = list(halves), random_state()
    batches = [half for name in names for half in halves[name]]
    num_tokens = [sum(int((micro.labels != IGNORED).sum()) for micro in half) for half in batches]
    num_examples = [sum(len(micro.example_ids) for micro in half) for half in batches]
    gradients = []
    model.train()
    try:
        torch.manual_seed(0)  # a model may draw random numbers of its own: the same in each measurement
        with evaluation_mode(model):
            for module in model.modules():  # blocks recompute their activations only in training mode
                module.training = bool(getattr(module, "gradient_checkpointing", False))
            for half, labels, count in zip(batches, num_tokens, num_examples, strict=True):
                step = Step([*half], labels, sum(int(micro.attention_mask.sum()) for micro in half), count)
                step_gradient(model, step, device=device, loss_chunk=loss_chunk, loss_scale=loss_scale)
                parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters.values()]
                gradients.append(torch.cat([part.flatten().to("cpu", torch.bfloat16) for part in parts]))
                model.zero_grad()
    except OutOfMemory as error:
        fix = "Fix: resume with --resume and interference.every: null, or a smaller train.micro_batch_tokens."
        raise RunFailure(f"interference: out of memory ({error.args[0].reason.rstrip('.')}). {fix}") from error
    finally:
        model.zero_grad()
        set_random_state(random)
    gram = np.zeros((len(gradients), len(gradients)))
    for start in range(0, len(gradients[0]), _PIECE):
        piece = torch.stack([gradient[start : start + _PIECE] for gradient in gradients]).double()
        gram += (piece @ piece.T).numpy()
    found = agreement(gram, np.array(num_tokens, dtype=np.float64).reshape(len(names), 2))
    pairs = np.triu_indices(len(names), 1)
    cosines = found["cosines"][pairs]
    return {
        "tasks": names,
        "num_examples": dict(zip(names, np.reshape(num_examples, (-1, 2)).tolist(), strict=True)),
        "num_label_tokens": dict(zip(names, np.reshape(num_tokens, (-1, 2)).sum(axis=1).tolist(), strict=True)),
        **{name: _plain(values) for name, values in found.items()},
        "mean_cosine": _plain(cosines.mean()),
        "lowest_cosine": _plain(cosines.min()),
        "num_conflicts": int((cosines < -2.0 * found["noise"][pairs]).sum()),
    }


def agreement(gram: Array, num_tokens: Array) -> dict[str, Array]:
    """Cosines and their noise, from the inner products of half gradients.

    With h1, h2 the gradients of a task's halves (means over n1 and n2 tokens) and w = n1 / (n1 + n2), the task's
    gradient is g = w h1 + (1 - w) h2, and e = sqrt(w (1 - w)) (h1 - h2) is a draw of its error: E |e|^2 is its
    variance. To first order, task i contributes the error <e, g_j / |g_j| - cos g_i / |g_i|> / |g_i| to cos(g_i, g_j).
    Its size is averaged over all other tasks j, since one draw says little. The errors of both tasks add in squares.

    Args:
        gram: Inner products of the halves, (2 tasks, 2 tasks): both of the first task, both of the second, and so on.
        num_tokens: (tasks, 2), answer tokens of each half.
    Returns: `cosines` (tasks, tasks); `noise`, the standard error of each from the choice of examples, nan on the
        diagonal; `own_cosines` (tasks,) between the halves of a task: near 0 its examples are too few, and its cosines
        to other tasks are drawn towards 0; `norms` (tasks,).
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
    return {"cosines": cosines, "noise": noise, "own_cosines": own, "norms": norms}


def _plain(values: Any) -> Any:
    """JSON values of an array or a number: nested lists with six digits, None for nan."""
    if np.ndim(values) > 0:
        return [_plain(each) for each in values]
    return None if np.isnan(values) else float(f"{values:.6g}")
