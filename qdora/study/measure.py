"""What cells measure besides scores: an adapter by layer, at checkpoints, or with other magnitudes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from qdora.adapter.layer import AdaptedLinear
from qdora.data.sources import run_examples
from qdora.evaluate.loglikelihood import score_examples
from qdora.evaluate.suite import EvaluationResult, evaluate, spread
from qdora.files.atomic import atomic_write_json
from qdora.model.build_model import choose_compute, find_model
from qdora.model.inject import adapted_layers, block_of, model_size
from qdora.rank.changes import error_undone, full_weight_changes, set_magnitude_back_, weight_changes
from qdora.recipe.settings import BaseWeightsConfig, Recipe
from qdora.run.base import load_base
from qdora.run.load_run import TrainedRun, load_run


def uncompressed_base(recipe: Recipe) -> PreTrainedModel | None:
    """The base of a recipe before it is quantised or pruned; None if the recipe does neither."""
    if recipe.base.quant == "none" and recipe.base.prune is None:
        return None
    dense = recipe.model_copy(update={"base": BaseWeightsConfig(quant="none")})
    return load_base(dense, find_model(dense)[0], choose_compute(dense.model.dtype))


def evaluate_magnitudes(source: Path, directory: Path, *, rescaled: bool) -> dict[str, Any]:
    """Evaluate the run `source` with its magnitudes `rescaled` or set back; the scores are written to `directory`."""
    run = load_run(source)
    layers = adapted_layers(run.model)
    if rescaled:
        rescale_(layers, run.recipe)
    else:
        for layer in layers.values():
            set_magnitude_back_(layer)
    (directory / "eval").mkdir(parents=True, exist_ok=True)
    atomic_write_json(directory / "eval/set-back.json", _own_evaluation(run).to_dict(per_example=True))
    return {"size": model_size(run.model), "files": {"scores": "eval/set-back.json"}}


def _own_evaluation(run: TrainedRun) -> EvaluationResult:
    asked = run.recipe.eval
    examples = run_examples(run.recipe, "validation", asked.tasks)
    return evaluate(run.model, run.tokenizer, examples, limit=asked.limit, block=asked.block)


@torch.no_grad()
def rescale_(layers: Mapping[str, AdaptedLinear], recipe: Recipe) -> None:
    """Multiply each magnitude by ||w|| / ||w'||, w a row of the compressed base and w' of the uncompressed one."""
    reference = uncompressed_base(recipe)
    assert reference is not None, "the base is not compressed"
    for path, layer in layers.items():
        assert layer.magnitude is not None, "only DoRA has magnitudes"
        before = reference.get_submodule(path).weight.float().norm(dim=-1)
        layer.magnitude.mul_((layer.base.squared_row_norm().sqrt() / before).view_as(layer.magnitude))


EXAMPLES_OF_TASK = 15
"""Examples of each evaluated task that the loss without a block's adapter is measured on."""


def measure_by_layer(trained: Path) -> dict[str, Any]:
    """changes: path of a layer -> columns of `WeightChange` and, of a compressed base, `ErrorUndone`.

    blocks: the rise of the NLL per answer token without the adapter of each; nll: with all adapters.
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

    def nll() -> float:
        scores = score_examples(run.model, run.tokenizer, examples)
        return sum(each.nll for each in scores) / sum(each.num_answer_tokens for each in scores)

    whole, blocks = nll(), []
    for block in sorted({block for path in layers if (block := block_of(path)) is not None}):
        with without_adapter([layer for path, layer in layers.items() if block_of(path) == block]):
            blocks.append({"block": block, "rise": nll() - whole})
    return {"size": model_size(run.model), "changes": changes, "blocks": blocks, "nll": whole}


def measure_checkpoints(trained: Path, steps: Sequence[int]) -> dict[str, Any]:
    """checkpoints: of each step the NLL per token of the run's own evaluation; path of a layer -> `WeightChange`."""
    found: list[dict[str, Any]] = []
    for step in steps:
        run = load_run(trained, step=step)
        changes = weight_changes(adapted_layers(run.model)) or full_weight_changes(
            load_run(trained, base_only=True).model, run.model
        )
        scored = _own_evaluation(run).per_example
        nll = sum(row["nll"] for row in scored) / sum(row["num_answer_tokens"] for row in scored)
        told = {path: asdict(change) for path, change in changes.items() if block_of(path) is not None}
        found.append({"step": step, "nll": nll, "changes": told})
    return {"size": model_size(run.model), "checkpoints": found}


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


@torch.no_grad()
def _errors_undone(recipe: Recipe, layers: Mapping[str, AdaptedLinear]) -> Iterator[tuple[str, dict[str, float]]]:
    reference = uncompressed_base(recipe)
    if reference is None:
        return
    for path, layer in layers.items():
        base = layer.base.dequantized(torch.float32)
        error = base - reference.get_submodule(path).weight.float()
        update = layer.merged_weight(torch.float32) - base
        # (parts, rows, columns): what a product of the rank approximates, such as each expert of a stack
        of_update, of_error = (torch.stack(layer.approximated_parts(each)) for each in (update, error))
        found = error_undone(of_update, of_error, layer.rank)
        if found is not None:
            yield path, {f"error_{name}": value for name, value in asdict(found).items()}
