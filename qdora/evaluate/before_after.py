"""Two evaluations of the same examples, before and after training: the difference by task, and tasks made worse."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from qdora.evaluate.example_intervals import TaskScores, example_interval
from qdora.evaluate.suite import FEWEST, EvaluationResult

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
        pairs[name] = paired_scores(old_records.get(name, {}), new_records.get(name, {}), metric)
        number = (new.get(name) or old[name])["num_examples"]
        found.append(_change(name, number, values[name], {name: pairs[name]}))
    if len(names) > 1:
        total = sum(each.num_examples for each in found)
        average = _value(before, "average", metric), _value(after, "average", metric)
        found.append(_change("average", total, average, pairs))
    return found


def tasks_of_other_examples(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Tasks of both evaluations whose examples differ, so that only the change is over the same ones."""
    old, new = (by_task(found.get("per_example", [])) for found in (before, after))
    return [task for task in old if task in new and old[task].keys() != new[task].keys()]


@dataclass(frozen=True)
class WorseTask:
    """A task that training has made worse, beyond the noise of its examples, although the average became better.

    Attributes:
        metric: nll_per_token in nats, or acc in 0..1.
        base, now: Its values before training and now.
        lower: The least loss: the end nearer to 0 of the 95 % interval of the difference.
    """

    task: str
    metric: LossOrAccuracy
    base: float
    now: float
    lower: float
    average_base: float
    average_now: float

    def in_words(self) -> str:
        """'boolq is worse than before training: NLL per token 1.2 against 0.9, ...'."""
        return (
            f"{self.task} is worse than before training: {_NAMES[self.metric]} {self.now:.4g} against "
            f"{self.base:.4g} (by {self.lower:.2g} at least), while the average over the tasks went from "
            f"{self.average_base:.4g} to {self.average_now:.4g}"
        )


def worse_than_before(base: EvaluationResult, now: EvaluationResult) -> list[WorseTask]:
    """The tasks that are worse than before training, by a metric whose average over the tasks is better.

    Tasks that were measured on different numbers of examples, or on fewer than `FEWEST`, are left out.
    """
    found: list[WorseTask] = []
    before, after = (each.to_dict(per_example=True) for each in (base, now))
    for metric, sign in _WORSE.items():
        average = getattr(base.average, metric), getattr(now.average, metric)
        if None in average or sign * (average[1] - average[0]) >= 0:
            continue
        for change in task_changes(before, after, metric):
            sizes = {each.tasks[change.task].num_examples for each in (base, now) if change.task in each.tasks}
            if change.lower is None or change.upper is None or len(sizes) != 1:
                continue
            least = min(sign * change.lower, sign * change.upper)
            if least > 0 and change.before is not None and change.after is not None:
                found.append(WorseTask(change.task, metric, change.before, change.after, least, *average))
    return found


Records = Mapping[str, Mapping[str, Any]]
"""Name of an example -> its record."""


def by_task(records: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Mapping[str, Any]]]:
    """Task -> its records, in their order. An example's name is its id with a number: ids can repeat within a task."""
    found: dict[str, dict[str, Mapping[str, Any]]] = {}
    seen: Counter[tuple[str, str]] = Counter()
    for record in records:
        identity = (record["task"], str(record["id"]))
        seen[identity] += 1
        found.setdefault(record["task"], {})[f"{record['id']}#{seen[identity]}"] = record
    return found


def paired_scores(old: Records, new: Records, metric: LossOrAccuracy) -> TaskScores | None:
    """new - old of the examples that both evaluations of a task have; None for fewer than two."""
    name = "nll" if metric == "nll_per_token" else "acc"
    pairs = {key: (old[key], new[key]) for key in old if key in new and name in old[key] and name in new[key]}
    if len(pairs) < 2:
        return None
    differences = np.array([after[name] - before[name] for before, after in pairs.values()], dtype=np.float64)
    weights = [1.0 if name == "acc" else float(after["num_answer_tokens"]) for _, after in pairs.values()]
    return TaskScores(tuple(pairs), differences, np.array(weights))


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
