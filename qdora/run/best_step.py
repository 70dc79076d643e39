"""The best step of a run: what a recipe chooses it by, what can be wrong with that, and which step adapter/ is of."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from qdora.data.example import Example
from qdora.errors import UserError, nearest
from qdora.evaluation.suite import EvaluationResult
from qdora.files.run_directory import RunDirectory
from qdora.recipe.settings import Recipe
from qdora.recipe.train_settings import MACRO
from qdora.train.best import BestSoFar

BEST_FILE = "best.json"
"""In adapter/, where it was chosen: the step that it is of, and by what."""


def best_so_far(recipe: Recipe, tasks: Sequence[str]) -> BestSoFar | None:
    """The judge that the recipe asks for, over the tasks that are evaluated; None where it asks for none."""
    asked = recipe.eval
    if asked.best_by is None:
        return None
    question = {
        "best_by": asked.best_by,
        "best_metric": asked.best_metric,
        "tasks": list(tasks) if asked.best_by == MACRO else [asked.best_by],
        "limit": asked.limit,
    }
    return BestSoFar(question, higher=asked.best_metric != "nll_per_token", patience=asked.patience)


def selection_value(recipe: Recipe, result: EvaluationResult) -> float:
    """What `best_so_far` compares, of one evaluation."""
    asked = recipe.eval
    assert asked.best_by is not None
    numbers = result.average if asked.best_by == MACRO else result.tasks[asked.best_by]
    value = getattr(numbers, asked.best_metric)
    assert value is not None, asked  # selection_faults has looked for choices
    return float(value)


def selection_faults(recipe: Recipe, evaluated: Mapping[str, Sequence[Example]], num_steps: int) -> list[str]:
    """Why no best step can be chosen, given the validation examples and the length of the run; none as a rule."""
    by, every, metric = recipe.eval.best_by, recipe.eval.every, recipe.eval.best_metric
    if by is None or every is None:
        return []
    faults = []
    known = (MACRO, *evaluated) if evaluated else ()
    if by not in known:
        allowed = ", ".join(known) or "none"
        faults.append(f"eval.best_by: {by!r} has no validation data, allowed: {allowed}.{nearest(by, known)}")
    elif metric != "nll_per_token":
        tasks = list(evaluated) if by == MACRO else [by]
        if not any(example.choices for task in tasks for example in evaluated[task]):
            faults.append(f"eval.best_metric: {metric} needs choices, {by} has none, allowed: nll_per_token.")
    if every >= num_steps:
        faults.append(
            f"eval.every: evaluated only at the end, so there is nothing to choose from by eval.best_by, got {every} "
            f"in a run of {num_steps} steps, allowed: fewer than these."
        )
    return faults


def best_in_words(state: Mapping[str, Any]) -> str:
    """'step 6, the best by macro nll_per_token (1.234)' of a judge's state."""
    question = state["question"]
    return f"step {state['step']}, the best by {question['best_by']} {question['best_metric']} ({state['value']:.4g})"


def adapter_in_words(run: RunDirectory) -> str:
    """Which step adapter/ is of: 'final' for the last one."""
    record = adapter_record(run)
    if record is None:
        return "final"
    stopped = ", stopped early" if record["num_done"] < record["num_steps"] else ""
    return f"{best_in_words(record)} of {record['num_done']} steps{stopped}"


def adapter_record(run: RunDirectory) -> dict[str, Any] | None:
    """What adapter/best.json says; None where adapter/ is of the last step.

    Raises:
        UserError: The file is damaged.
    """
    file = run.adapter / BEST_FILE
    try:
        found: dict[str, Any] = json.loads(file.read_bytes())
        return found | {"step": int(found["step"])}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: is damaged: {type(error).__name__}.") from None


def adapter_step(run: RunDirectory) -> int | None:
    """The step that adapter/ is of: the best one, or the last."""
    record = adapter_record(run)
    return run.last_step() if record is None else int(record["step"])
