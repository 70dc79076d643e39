"""What cells measure besides scores: an adapter by layer, at checkpoints, or with other magnitudes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qdora.adapter.layer import AdaptedLinear
from qdora.data.sources import run_examples
from qdora.evaluate.loglikelihood import score_examples
from qdora.evaluate.suite import EvaluationResult, evaluate, spread
from qdora.files.run_directory import RunDirectory
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


@torch.no_grad()
def evaluate_magnitudes(source: Path, directory: Path, *, rescaled: bool) -> dict[str, Any]:
    """Evaluate the run `source` with its magnitudes set back, or times ||w|| / ||w'||, w a row of the compressed base
    and w' of the uncompressed one; the scores are written to `directory`."""
    run = load_run(source)
    reference = uncompressed_base(run.recipe) if rescaled else None
    for path, layer in adapted_layers(run.model).items():
        if reference is None:
            set_magnitude_back_(layer)
        else:
            assert layer.magnitude is not None, "only DoRA has magnitudes"
            before = reference.get_submodule(path).weight.float().norm(dim=-1)
            layer.magnitude.mul_((layer.base.squared_row_norm().sqrt() / before).view_as(layer.magnitude))
    RunDirectory(directory).write_json("eval/set-back.json", _own_evaluation(run).to_dict(per_example=True))
    return {"size": model_size(run.model), "files": {"scores": "eval/set-back.json"}}


def _own_evaluation(run: TrainedRun) -> EvaluationResult:
    asked = run.recipe.eval
    examples = run_examples(run.recipe, "validation", asked.tasks)
    return evaluate(run.model, run.tokenizer, examples, limit=asked.limit, block=asked.block)


EXAMPLES_OF_TASK = 15
"""Examples of each evaluated task that the loss without a block's adapter is measured on."""


@torch.no_grad()
def measure_by_layer(trained: Path) -> dict[str, Any]:
    """changes: path of a layer -> `weight_change` and, of a compressed base, `error_undone`.

    blocks: the rise of the NLL per answer token without the adapter of each; nll: with all adapters.
    """
    run = load_run(trained)
    layers = adapted_layers(run.model)
    changes = weight_changes(layers)
    reference = uncompressed_base(run.recipe)
    if reference is not None:
        for path, layer in layers.items():
            base = layer.base.dequantized(torch.float32)
            update = layer.merged_weight(torch.float32) - base
            error = base - reference.get_submodule(path).weight.float()
            # (parts, rows, columns): what a product of the rank approximates, such as each expert of a stack
            of_update, of_error = (torch.stack(layer.approximated_parts(each)) for each in (update, error))
            changes[path] |= error_undone(of_update, of_error, layer.rank)
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
    """checkpoints: of each step the NLL per token of the run's own evaluation; path of a layer -> `weight_change`."""
    found: list[dict[str, Any]] = []
    for step in steps:
        run = load_run(trained, step=step)
        changes = weight_changes(adapted_layers(run.model)) or full_weight_changes(
            load_run(trained, base_only=True).model, run.model
        )
        scored = _own_evaluation(run).per_example
        nll = sum(row["nll"] for row in scored) / sum(row["num_answer_tokens"] for row in scored)
        told = {path: change for path, change in changes.items() if block_of(path) is not None}
        found.append({"step": step, "nll": nll, "changes": told})
    return {"size": model_size(run.model), "checkpoints": found}


@contextmanager
@torch.no_grad()
def without_adapter(layers: Sequence[AdaptedLinear]) -> Iterator[None]:
    """While the block runs, these layers are their bases: B is zero, and magnitudes are the row norms of the base."""
    changed: list[Tensor] = [
        each for layer in layers for each in (layer.lora_B, layer.magnitude) if each is not None
    ]
    before = [each.clone() for each in changed]
    for layer in layers:
        layer.lora_B.zero_()
        if layer.magnitude is not None:
            set_magnitude_back_(layer)
        layer.parameters_changed()
    try:
        yield
    finally:
        torch._foreach_copy_(changed, before)
        for layer in layers:
            layer.parameters_changed()
