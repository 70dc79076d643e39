"""How much a token of each task counts in the loss: the `loss_weight` of the sources in data.mix.

A step's loss is sum_t w_t NLL_t / sum_t w_t tokens_t, over the tasks t of its examples.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from qdora.data.batches import MicroBatch, StepLoader
from qdora.recipe.settings import Recipe

TaskWeights = Mapping[str, float]
"""Task -> weight of its tokens, above 0."""


def task_weights(recipe: Recipe, loader: StepLoader) -> TaskWeights | None:
    """The weight of every task of the training data, or None if no source has a `loss_weight`."""
    if all(source.loss_weight is None for source in recipe.data.mix):
        return None
    return {task: weight for task, weight, _ in _weights(recipe, loader)}


def task_weight_faults(recipe: Recipe, loader: StepLoader) -> list[str]:
    """One line for each source that gives a task another weight than an earlier source does."""
    faults, known = [], dict[str, tuple[float, str]]()
    for task, weight, label in _weights(recipe, loader):
        first_weight, first = known.setdefault(task, (weight, label))
        if weight != first_weight:
            faults.append(
                f"data.mix: task {task} is in {first} with loss_weight {first_weight:g} and in {label} with "
                f"{weight:g}, allowed: one weight for a task, or another `name`."
            )
    return faults


def example_weights(weights: TaskWeights, micro: MicroBatch) -> Tensor:
    """(examples,) float32: the weight of each example's tokens."""
    return torch.tensor([weights[name] for name in micro.task_names])[micro.task_ids]


def _weights(recipe: Recipe, loader: StepLoader) -> list[tuple[str, float, str]]:
    """(task, weight, label of the source) for each task of each source."""
    return [
        (task, 1.0 if source.loss_weight is None else source.loss_weight, source.label)
        for source, part in zip(recipe.data.mix, loader.tokenised, strict=True)
        for task in part.task_names
    ]
