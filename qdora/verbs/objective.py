"""From a recipe to the objective of its steps: weights of tasks in the loss, and gradients kept apart by task."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from qdora.config import Recipe
from qdora.data.loader import StepLoader
from qdora.train.distributed import Processes
from qdora.train.objective import Objective
from qdora.train.surgery import TaskGradients
from qdora.train.task_weights import TaskWeights

logger = logging.getLogger("qdora")


def objective_faults(recipe: Recipe, loader: StepLoader, evaluated: Sequence[str]) -> list[str]:
    """What the data says against the asked objective.

    Args:
        recipe: Of the run.
        loader: Of its training data.
        evaluated: Names of the sources that are evaluated while training.
    """
    faults = []
    if recipe.interference.gradients == "pcgrad" and len(loader.task_names) < 2:
        only = ", ".join(loader.task_names)
        faults.append(f"interference.gradients: pcgrad, but {only} is the only task, allowed: null.")
    if recipe.interference.loss_weights == "progress":
        faults += [
            f"interference.loss_weights: progress, but {source.label} is not evaluated, allowed: validation data for "
            "every source, all of them in eval.tasks."
            for source in recipe.data.mix
            if source.label not in evaluated
        ]
    weights: dict[str, tuple[float, str]] = {}
    for source, part in zip(recipe.data.mix, loader.tokenised, strict=True):
        for task in part.task_names:
            weight, first = weights.setdefault(task, (_loss_weight(source.loss_weight), source.label))
            if weight != _loss_weight(source.loss_weight):
                faults.append(
                    f"data.mix: task {task} is in {first} with loss_weight {weight:g} and in {source.label} with "
                    f"{_loss_weight(source.loss_weight):g}, allowed: one weight for a task, or another `name`."
                )
    return faults


def make_objective(recipe: Recipe, loader: StepLoader, parameters: Mapping[str, nn.Parameter]) -> Objective:
    """The objective of the recipe's steps; the loader makes its micro-batches for it from now on."""
    pairs = list(zip(recipe.data.mix, loader.tokenised, strict=True))
    weights = gradients = None
    if recipe.interference.loss_weights == "progress":
        sources = {source.label: part.task_names for source, part in pairs}
        weights = TaskWeights(dict.fromkeys(loader.task_names, 1.0), sources)
    elif any(source.loss_weight is not None for source in recipe.data.mix):
        weights = TaskWeights(
            {task: _loss_weight(source.loss_weight) for source, part in pairs for task in part.task_names}
        )
    if recipe.interference.gradients == "pcgrad":
        gradients = TaskGradients(parameters, loader.task_names, recipe.train.seed)
        loader.by_task = True
        logger.info("PCGrad keeps a gradient for each of %d tasks: %.1f MiB.", *_size(gradients, loader))
    return Objective(weights, gradients)


def weigh_by_progress(objective: Objective, metrics: Mapping[str, Any], processes: Processes) -> dict[str, Any]:
    """Take an evaluation's metrics (of the first process) into the weights; what the line of metrics says of them."""
    weights = objective.weights
    if weights is None or not weights.by_progress:
        return {}
    nll = {task: numbers["nll_per_token"] for task, numbers in metrics.items()}
    weights.evaluated(processes.gather(nll)[0])
    return {"loss_weights": dict(weights.weights)}


def _loss_weight(given: float | None) -> float:
    return 1.0 if given is None else given


def _size(gradients: TaskGradients, loader: StepLoader) -> tuple[int, float]:
    return len(loader.task_names), gradients.num_bytes / 2**20
