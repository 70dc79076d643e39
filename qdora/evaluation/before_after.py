"""Two evaluations of the same examples, before and after training: the difference by task, and tasks made worse."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from qdora.evaluation.example_intervals import TaskScores, example_interval
from qdora.evaluation.suite import FEWEST, EvaluationResult

LossOrAccuracy = Literal["nll_per_token", "acc"]

_NAMES: dict[LossOrAccuracy, str] = {"nll_per_token": "NLL per token", "acc": "accuracy"}
_WORSE: dict[LossOrAccuracy, float] = {"nll_per_token": 1.0, "acc": -1.0}
"""Metric -> the sign of a change for the worse."""


@dataclass(frozen=True)
class TaskChange:
    """A metric of one task before and after training; a value that was not measured is None.

    Attributes:
        task: "average" for the macro average over the tasks.
        difference: after - before over the examples that both have; None for fewer than two.
        lower, upper: Ends of its 95 % interval; None for fewer than `FEWEST` examples in any task.
    """

    task: str
    num_examples: int
    before: float | None
    after: float | None
    difference: float | None
    lower: float | None
    upper: float | None


def task_changes(before: Mapping[str, Any], after: Mapping[str, Any], metric: LossOrAccuracy) -> list[TaskChange]:
    """The change of each task that has the metric, and of their average.

    Args:
        before, after: As `EvaluationResult.to_dict` with single examples; empty if it was not measured.
    """
    old, new = before.get("tasks", {}), after.get("tasks", {})
    old_records, new_records = (by_task(each.get("per_example", [])) for each in (before, after))
    values = {name: (_value(old, name, metric), _value(new, name, metric)) for name in dict.fromkeys([*old, *new])}
    names = [name for name, both in values.items() if both != (None, None)]
    found: list[TaskChange] = []
    pairs: dict[str, TaskScores | None] = {}
    for name in names:
        pairs[name] = paired_scores(old_records.get(name, []), new_records.get(name, []), metric)
        number = (new.get(name) or old[name])["num_examples"]
        found.append(_change(name, number, values[name], {name: pairs[name]}))
    if len(names) > 1:
        total = sum(each.num_examples for each in found)
        average = _value(before, "average", metric), _value(after, "average", metric)
        found.append(_change("average", total, average, pairs))
    return found


def tasks_of_other_examples(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Tasks of both evaluations whose examples differ, so that only the change is over the same ones."""
    old, new = (
        {task: {each["id"] for each in records} for task, records in by_task(found.get("per_example", [])).items()}
        for found in (before, after)
    )
    return [task for task in old if task in new and old[task] != new[task]]


@dataclass(frozen=True)
class WorseTask:
    """A task that training has made worse, beyond the noise of its examples.

    Attributes:
        task, metric: The task and its worse metric: nll_per_token in nats, acc in 0..1.
        base, now: The metric before training and now.
        lower: The least loss: the end nearer to 0 of the 95 % interval of the difference.
        average_base, average_now: The metric averaged over all tasks, which has become better.
    """

    task: str
    metric: LossOrAccuracy
    base: float
    now: float
    lower: float
    average_base: float
    average_now: float

    def in_words(self) -> str:
        """'boolq is worse than the untrained base: NLL per token 1.2 against 0.9, ...'."""
        return (
            f"{self.task} is worse than the untrained base: {_NAMES[self.metric]} {self.now:.4g} against "
            f"{self.base:.4g} (by {self.lower:.2g} at least), while the average over the tasks went from "
            f"{self.average_base:.4g} to {self.average_now:.4g}"
        )


def worse_than_base(base: EvaluationResult, now: EvaluationResult) -> list[WorseTask]:
    """The tasks that are worse than before training, by a metric whose average over the tasks is better.

    The interval is that of the differences over the examples of both (`example_interval`). Tasks that were
    measured on different numbers of examples, or on a single one, are left out.
    """
    found: list[WorseTask] = []
    singles = by_task(base.per_example), by_task(now.per_example)
    for metric, sign in _WORSE.items():
        before, after = getattr(base.average, metric), getattr(now.average, metric)
        if before is None or after is None or sign * (after - before) >= 0:
            continue
        for task, result in now.tasks.items():
            old = base.tasks.get(task)
            if old is None or old.num_examples != result.num_examples or getattr(result, metric) is None:
                continue
            lower = _paired_lower([each.get(task, []) for each in singles], metric, sign)
            if lower > 0:
                old_value, value = getattr(old, metric), getattr(result, metric)
                found.append(WorseTask(task, metric, old_value, value, lower, average_base=before, average_now=after))
    return found


def by_task(records: Iterable[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Task -> its records, in their order."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        found.setdefault(record["task"], []).append(record)
    return found


def paired_scores(
    old: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]], metric: LossOrAccuracy
) -> TaskScores | None:
    """new - old of the examples that both evaluations of a task have; None for fewer than two."""
    name = "nll" if metric == "nll_per_token" else "acc"
    before, after = ({each["id"]: each for each in records if name in each} for records in (old, new))
    ids = [each for each in before if each in after]
    if len(ids) < 2:
        return None
    differences = np.array([after[key][name] - before[key][name] for key in ids], dtype=np.float64)
    weights = np.ones(len(ids)) if name == "acc" else np.array([after[key]["num_answer_tokens"] for key in ids], float)
    return TaskScores(tuple(ids), differences, weights)


def _paired_lower(pair: Sequence[Sequence[Mapping[str, Any]]], metric: LossOrAccuracy, sign: float) -> float:
    """Lower end of sign * (now - base) over the same examples; nan for a single one."""
    old, new = pair
    scores = paired_scores(old, new, metric)
    if scores is None:
        return math.nan
    found = example_interval({"": scores}, "equal")
    return found.lower if sign > 0 else -found.upper


def _change(
    task: str, num_examples: int, values: tuple[float | None, float | None], pairs: Mapping[str, TaskScores | None]
) -> TaskChange:
    before, after = values
    difference, lower, upper = _interval(pairs)
    return TaskChange(task, num_examples, before, after, difference, lower=lower, upper=upper)


def _value(tasks: Mapping[str, Any], name: str, metric: str) -> float | None:
    value: float | None = tasks.get(name, {}).get(metric)
    return value


def _interval(pairs: Mapping[str, TaskScores | None]) -> tuple[float | None, float | None, float | None]:
    """Difference and ends of its interval."""
    known = {task: pair for task, pair in pairs.items() if pair is not None}
    if len(known) < len(pairs):
        return None, None, None
    result = example_interval(known, "equal")
    if any(len(pair.examples) < FEWEST for pair in known.values()):
        return result.value, None, None
    return result.value, result.lower, result.upper
