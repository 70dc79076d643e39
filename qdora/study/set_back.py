"""A trained DoRA with other magnitudes: what the trained magnitudes contribute, and what those of another base cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from qdora.adapter.adapted_linear import AdaptedLinear
from qdora.data.build_data import run_examples
from qdora.evaluate.suite import evaluate
from qdora.files.atomic import atomic_write_json
from qdora.model.inject import adapted_layers, model_size
from qdora.rank.weight_changes import set_magnitude_back_
from qdora.recipe.settings import Recipe
from qdora.run.load_run import load_run
from qdora.study.base_damage import uncompressed_base

SCORES_FILE = "eval/set-back.json"


def evaluate_magnitudes(source: Path, directory: Path, *, rescaled: bool) -> dict[str, Any]:
    """Evaluate the run `source` with its magnitudes `rescaled` or set back, on the examples of its own evaluation.

    The scores are written to `directory`. Returns sizes and files.
    """
    run = load_run(source)
    layers = adapted_layers(run.model)
    if rescaled:
        rescale_(layers, run.recipe)
    else:
        for layer in layers.values():
            set_magnitude_back_(layer)
    asked = run.recipe.eval
    examples = run_examples(run.recipe, "validation", asked.tasks)
    scored = evaluate(run.model, run.tokenizer, examples, limit=asked.limit, block=asked.block)
    (directory / "eval").mkdir(parents=True, exist_ok=True)
    atomic_write_json(directory / SCORES_FILE, scored.to_dict(per_example=True))
    return {"size": asdict(model_size(run.model)), "files": {"scores": SCORES_FILE}}


@torch.no_grad()
def rescale_(layers: Mapping[str, AdaptedLinear], recipe: Recipe) -> None:
    """Multiply each magnitude by ||w|| / ||w'||, w a row of the compressed base and w' of the uncompressed one."""
    reference = uncompressed_base(recipe)
    assert reference is not None, "the base is not compressed"
    for path, layer in layers.items():
        assert layer.magnitude is not None, "only DoRA has magnitudes"
        before = reference.get_submodule(path).weight.float().norm(dim=-1)
        layer.magnitude.mul_((layer.base.squared_row_norm().sqrt() / before).view_as(layer.magnitude))
