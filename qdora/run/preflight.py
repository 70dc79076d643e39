"""What can be known to fail before a run writes or loads anything."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from qdora.data.loader import StepLoader
from qdora.errors import UserError
from qdora.evaluation.generation import generation_faults
from qdora.model.build_model import Compute
from qdora.recipe.settings import Recipe
from qdora.run.best_step import selection_faults
from qdora.run.experiment_trackers import is_installed
from qdora.run.load_base import NO_GPU
from qdora.run.task_conflicts import interference_faults
from qdora.train.task_weights import task_weight_faults


def evaluated_sources(recipe: Recipe, validation: dict[str, Any]) -> Sequence[str]:
    """Names of the sources that are evaluated: those asked for, perhaps none, or all that can be."""
    return list(validation) if recipe.eval.tasks is None else recipe.eval.tasks


def check_beforehand(
    recipe: Recipe, compute: Compute, validation: dict[str, Any], num_steps: int, loader: StepLoader
) -> None:
    """Check a recipe against the machine and its data.

    Args:
        recipe: Of the run.
        compute: Where it will run.
        validation: Name of a source -> its validation examples.
        num_steps: Of the run.
        loader: Of its training data.
    Raises:
        UserError: All faults at once.
    """
    faults = []
    if compute.dtype == torch.float16 and recipe.adapter.kind != "none":
        faults.append("model.dtype: float16 gradients underflow without loss scaling, allowed: bfloat16, float32.")
    if recipe.base.residency == "host" and compute.device.type != "cuda":
        faults.append(NO_GPU)
    if recipe.base.residency == "disk" and compute.device.type != "cpu":
        faults.append("base.residency: disk is for machines without a GPU, allowed: device, host.")
    if recipe.memory.offload_activations and compute.device.type != "cuda":
        faults.append("memory.offload_activations: is for a GPU, got true, allowed here: false.")
    if recipe.memory.host_embeddings and compute.device.type != "cuda":
        faults.append("memory.host_embeddings: is for a GPU, got true, allowed here: false.")
    asked = evaluated_sources(recipe, validation)
    evaluated = {name: validation[name] for name in asked if name in validation}
    if recipe.eval.method == "generate":
        faults += generation_faults(evaluated)
    faults += selection_faults(recipe, evaluated, num_steps)
    faults += interference_faults(recipe, validation)
    faults += task_weight_faults(recipe, loader)
    known = ", ".join(validation) or "none"
    faults += [
        f"eval.tasks: {name!r} has no validation data in this mix, allowed: {known}."
        for name in recipe.eval.tasks or ()
        if name not in validation
    ]
    faults += [
        f"trackers: {name} is not installed. Run: pip install 'qdora[{name}]'"
        for name in recipe.trackers
        if not is_installed(name)
    ]
    if faults:
        raise UserError(*faults)
