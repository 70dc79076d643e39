"""A finished or interrupted run, loaded again with its adapter."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qdora.config import Recipe
from qdora.errors import UserError
from qdora.model.inject import adapter_parameters
from qdora.model.load import load_config
from qdora.recipe_file import load_recipe, override
from qdora.record import RunDirectory, open_run
from qdora.train.checkpoint import PARAMETERS_FILE, copy_parameters
from qdora.verbs.assemble import Compute, choose_compute, find_model, load_base, put_adapters
from qdora.verbs.pruned_base import FOLDER, load_pruned_base
from qdora.verbs.residency import residency_here


@dataclass(frozen=True)
class TrainedRun:
    """A run and its model in memory."""

    run: RunDirectory
    recipe: Recipe
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    state: str
    """Which state was loaded: "final", "step-120" or "base"."""


def load_run(
    path: Path, *, step: int | None = None, base_only: bool = False, original: bool = False, widened: bool = False
) -> TrainedRun:
    """Load the base and the adapter of a run.

    Args:
        path: Run directory.
        step: Load this checkpoint; None takes the finished adapter, or the newest checkpoint of an unfinished run.
        base_only: Leave the adapter out.
        original: Put the adapter on the source's own weights, dense in the dtype that its config names.
        widened: Compute in float32 whatever the recipe says, with an attention that takes it, and on a GPU with the
            whole base there: graphs over graphs read any block at any time.
    Raises:
        UserError: No run, no such checkpoint, nothing trained yet.
    """
    run = open_run(path)
    recipe = load_recipe(run.recipe_file)
    if widened:
        recipe = override(recipe, ["model.dtype=float32", "model.attention=auto"])
    trained, state = trained_state(run, recipe, step)
    source, tokenizer = find_model(recipe)
    compute = choose_compute(recipe.model.dtype)
    if original:
        dense = recipe.base.model_copy(update={"quant": "none"})
        recipe = recipe.model_copy(update={"base": dense})
        dtype = load_config(source).dtype
        compute = Compute(compute.device, dtype if isinstance(dtype, torch.dtype) else torch.float32)
    loaded = residency_here(run, recipe, compute.device, differentiated=widened)
    if recipe.base.prune is None:
        model = load_base(loaded, source, compute)
    else:
        model = load_pruned_base(loaded, source, compute, run.inside(FOLDER))
    if base_only or recipe.adapter.kind == "none":
        state = "base"
    elif recipe.adapter.kind == "full":
        copy_parameters(load_file(trained / PARAMETERS_FILE), adapter_parameters(model), trained)
    else:
        put_adapters(model, recipe, trained if trained == run.adapter else trained / "adapter")
    return TrainedRun(run, recipe, model.eval(), tokenizer, state)


def trained_state(run: RunDirectory, recipe: Recipe, step: int | None) -> tuple[Path, str]:
    """Directory with the trained parameters, and its name; raises as `load_run`."""
    if recipe.adapter.kind == "none":
        return run.path, "base"
    if step is not None:
        path = run.inside("checkpoints", f"step-{step}")
        if not path.is_dir():
            steps = sorted(int(each.name.removeprefix("step-")) for each in run.checkpoints.glob("step-*"))
            raise UserError(
                f"{run.path}: no checkpoint of step {step}, allowed: {', '.join(map(str, steps)) or 'none'}."
            )
        return path, f"step-{step}"
    if run.adapter.is_dir():
        return run.adapter, "final"
    newest = run.newest_checkpoint()
    if newest is None:
        raise UserError(
            f"{run.path}: nothing is trained yet (no adapter, no checkpoint). Run: qdora train with --resume"
        )
    return newest.path, newest.path.name
