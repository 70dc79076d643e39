"""Which data set helps or hurts which: recipes of solo and leave-one-out runs beside a combined one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qdora.errors import UserError
from qdora.recipe.recipe_file import recipe_from, settings
from qdora.recipe.settings import Recipe
from qdora.recipe.train_settings import InterferenceConfig

# Shares and products of them are floats: 16 * 0.3 is 4.8 and 30 * 0.1 is 3.0000000000000004.
_ROUNDING = 1e-6


def solo_recipes(recipe: Recipe, shares: Sequence[float]) -> dict[str, Recipe]:
    """One recipe for each source alone, by the source's label.

    Every run takes as many optimizer steps as the combined one, each with the examples (or tokens) that the source has
    in a step of the combined run. So every adapter is updated equally often, each task gives as much to its solo run as
    to the combined one, and all solo runs together see what the combined one sees.

    Args:
        recipe: The combined run.
        shares: Of each source in a step, summing to 1: of its examples under train.batch (`Mix.shares`), of its tokens
            under train.tokens_per_step.
    Raises:
        UserError: If a source has no whole number of examples in a step, or the run has no fixed number of steps.
    """
    labels = _labels(recipe, shares)
    return {
        label: _part(recipe, [number], size)
        for number, (label, size) in enumerate(zip(labels, _sizes(recipe, shares), strict=True))
    }


def leave_one_out_recipes(recipe: Recipe, shares: Sequence[float]) -> dict[str, Recipe]:
    """One recipe without each source, by the label of the source that is left out.

    Steps and the other sources' examples (or tokens) in each of them are those of the combined run: what differs in the
    result is what the missing source did to the others. Arguments and errors as in `solo_recipes`.

    Raises:
        UserError: Also if there is only one source.
    """
    labels = _labels(recipe, shares)
    if len(labels) == 1:
        raise UserError(f"data.mix: nothing is left without {labels[0]}, allowed: two sources or more.")
    sizes = _sizes(recipe, shares)
    numbers = range(len(labels))
    return {
        label: _part(recipe, [n for n in numbers if n != left_out], sum(sizes) - sizes[left_out])
        for left_out, label in enumerate(labels)
    }


def _labels(recipe: Recipe, shares: Sequence[float]) -> list[str]:
    labels = [source.label for source in recipe.data.mix]
    assert len(labels) == len(shares), (labels, shares)
    return labels


def _sizes(recipe: Recipe, shares: Sequence[float]) -> list[int]:
    """Examples, or tokens, of each source in a step."""
    train = recipe.train
    if train.steps is None:
        what = "runs are compared at the same number of steps, got train.epochs, allowed: train.steps."
        raise UserError(f"train.steps: {what}")
    total = sum(shares)
    if train.tokens_per_step is not None:
        return [max(1, round(train.tokens_per_step * share / total)) for share in shares]
    assert train.batch is not None
    exact = [train.batch * share / total for share in shares]
    faults = [
        f"train.batch: {source.label} has {size:g} of {train.batch} examples in a step, allowed: a batch that gives "
        "every source a whole number."
        for source, size in zip(recipe.data.mix, exact, strict=True)
        if round(size) < 1 or abs(size - round(size)) > _ROUNDING
    ]
    if faults:
        raise UserError(*faults)
    return [round(size) for size in exact]


def _part(recipe: Recipe, numbers: Sequence[int], size: int) -> Recipe:
    """The recipe with only the sources `numbers`, and steps of `size` examples or tokens."""
    mix = tuple(recipe.data.mix[number] for number in numbers)
    interference = recipe.interference
    if len(mix) == 1:  # nothing to weigh against, and nothing to be in conflict with
        mix = (mix[0].model_copy(update={"loss_weight": None}),)
        interference = InterferenceConfig()
    kept = {source.label for source in mix}
    train: dict[str, Any] = {"batch" if recipe.train.batch is not None else "tokens_per_step": size}
    micro = recipe.train.micro_batch_tokens
    if recipe.train.tokens_per_step is not None and isinstance(micro, int) and micro > size:
        train["micro_batch_tokens"] = "auto"  # it may not be more than a step, and changes nothing of what is learnt
    asked = recipe.eval.tasks
    evaluation = {} if asked is None else {"tasks": tuple(task for task in asked if task in kept)}
    part = recipe.model_copy(
        update={
            "data": recipe.data.model_copy(update={"mix": mix}),
            "train": recipe.train.model_copy(update=train),
            "eval": recipe.eval.model_copy(update=evaluation),
            "interference": interference,
        }
    )
    return recipe_from(settings(part))  # checked anew, without the settings that mean nothing in it
