"""A trained adapter layer by layer: what it moved, how much of the compression error it takes back, where it acts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qdora.adapter.adapted_linear import AdaptedLinear
from qdora.data.build_data import run_examples
from qdora.data.example import Example
from qdora.evaluate.loglikelihood import score_examples
from qdora.evaluate.suite import evaluate, spread
from qdora.model.inject import adapted_layers, block_of, model_size
from qdora.rank.error_undone import error_undone
from qdora.rank.weight_changes import full_weight_changes, set_magnitude_back_, weight_changes
from qdora.recipe.settings import Recipe
from qdora.run.load_run import load_run
from qdora.study.base_damage import uncompressed_base

EXAMPLES_OF_TASK = 15
"""Examples of each evaluated task that the loss without a block's adapter is measured on."""


def measure_by_layer(trained: Path) -> dict[str, Any]:
    """Measure the layers and blocks of the run `trained`; without scores of single examples.

    changes: Path of a layer -> direction, magnitude (`WeightChange`) and, of a compressed base, error_undone,
    error_undone_best, error_cosine (`ErrorUndone`). blocks: of each block the rise of the NLL per answer token without
    its adapter, on a few examples of the run's evaluation; nll: with all adapters.
    """
    run = load_run(trained)
    layers = adapted_layers(run.model)
    changes: dict[str, dict[str, Any]] = {path: asdict(change) for path, change in weight_changes(layers).items()}
    for path, found in _errors_undone(run.recipe, layers):
        changes[path] |= found
    asked = run.recipe.eval
    examples = [
        replace(each, choices=(), gold=None)  # only the answer is scored
        for found in run_examples(run.recipe, "validation", asked.tasks).values()
        for each in spread(found, EXAMPLES_OF_TASK, asked.block)
    ]
    whole = _nll(run.model, run.tokenizer, examples)
    blocks = []
    for block, own in blocks_of(layers).items():
        with without_adapter(own):
            blocks.append({"block": block, "rise": _nll(run.model, run.tokenizer, examples) - whole})
    return {
        "size": asdict(model_size(run.model)),
        "changes": changes,
        "blocks": blocks,
        "nll": whole,
    }


def measure_checkpoints(trained: Path, steps: Sequence[int]) -> dict[str, Any]:
    """Measure checkpoints of the run `trained`, an adapter or full fine-tuning.

    checkpoints: Of each step the NLL per token of the run's own evaluation, and path of a layer -> `WeightChange`.
    """
    found: list[dict[str, Any]] = []
    for step in steps:
        run = load_run(trained, step=step)
        layers, asked = adapted_layers(run.model), run.recipe.eval
        changes = weight_changes(layers) or full_weight_changes(load_run(trained, base_only=True).model, run.model)
        examples = run_examples(run.recipe, "validation", asked.tasks)
        scored = evaluate(run.model, run.tokenizer, examples, limit=asked.limit, block=asked.block).per_example
        nll = sum(row["nll"] for row in scored) / sum(row["num_answer_tokens"] for row in scored)
        told = {path: asdict(change) for path, change in changes.items() if block_of(path) is not None}
        found.append({"step": step, "nll": nll, "changes": told})
    return {"size": asdict(model_size(run.model)), "checkpoints": found}


def blocks_of(layers: Mapping[str, AdaptedLinear]) -> dict[int, list[AdaptedLinear]]:
    """Number of a block -> its adapted layers."""
    blocks: dict[int, list[AdaptedLinear]] = {}
    for path, layer in layers.items():
        block = block_of(path)
        if block is not None:
            blocks.setdefault(block, []).append(layer)
    return dict(sorted(blocks.items()))


@contextmanager
@torch.no_grad()
def without_adapter(layers: Sequence[AdaptedLinear]) -> Iterator[None]:
    """While the block runs, these layers are their bases: B is zero, and magnitudes are the row norms of the base."""
    kept = []
    for layer in layers:
        kept.append((layer.lora_B.clone(), None if layer.magnitude is None else layer.magnitude.clone()))
        layer.lora_B.zero_()
        if layer.magnitude is not None:
            set_magnitude_back_(layer)
        layer.parameters_changed()
    try:
        yield
    finally:
        for layer, (lora_B, magnitude) in zip(layers, kept, strict=True):
            layer.lora_B.copy_(lora_B)
            if layer.magnitude is not None and magnitude is not None:
                layer.magnitude.copy_(magnitude)
            layer.parameters_changed()


def _nll(model: nn.Module, tokenizer: Any, examples: Sequence[Example]) -> float:
    """Nats per answer token."""
    scores = score_examples(model, tokenizer, examples)
    return sum(each.nll for each in scores) / sum(each.num_answer_tokens for each in scores)


@torch.no_grad()
def _errors_undone(recipe: Recipe, layers: Mapping[str, AdaptedLinear]) -> Iterator[tuple[str, dict[str, float]]]:
    """Path -> columns of `ErrorUndone`; nothing for an uncompressed base."""
    reference = uncompressed_base(recipe)
    if reference is None:
        return
    for path, layer in layers.items():
        base = layer.base.dequantized(torch.float32)
        error = base - reference.get_submodule(path).weight.float()
        update = layer.merged_weight(torch.float32) - base
        found = error_undone(_parts(layer, update), _parts(layer, error), layer.rank)
        if found is not None:
            yield path, {f"error_{name}": value for name, value in asdict(found).items()}


def _parts(layer: AdaptedLinear, matrix: Tensor) -> Tensor:
    """(parts, rows, columns): what a product of the rank approximates, such as each expert of a stack."""
    return torch.stack(layer.approximated_parts(matrix))
