"""Two evaluations of the same examples, before and after training: the difference by task, with its interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qdora.evaluation.metrics import Paired, paired_difference
from qdora.evaluation.suite import FEWEST, LossOrAccuracy, by_task, paired_scores


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
    pairs: list[Paired | None] = []
    for name in names:
        pairs.append(paired_scores(old_records.get(name, []), new_records.get(name, []), metric))
        number = (new.get(name) or old[name])["num_examples"]
        found.append(_change(name, number, values[name], pairs[-1:]))
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


def _change(
    task: str, num_examples: int, values: tuple[float | None, float | None], pairs: Sequence[Paired | None]
) -> TaskChange:
    before, after = values
    difference, lower, upper = _interval(pairs)
    return TaskChange(task, num_examples, before, after, difference, lower=lower, upper=upper)


def _value(tasks: Mapping[str, Any], name: str, metric: str) -> float | None:
    value: float | None = tasks.get(name, {}).get(metric)
    return value


def _interval(pairs: Sequence[Paired | None]) -> tuple[float | None, float | None, float | None]:
    """Difference and ends of its interval."""
    known = [pair for pair in pairs if pair is not None]
    if len(known) < len(pairs):
        return None, None, None
    result = paired_difference(known)
    if any(len(pair.weights) < FEWEST for pair in known):
        return result.value, None, None
    return result.value, result.lower, result.upper
