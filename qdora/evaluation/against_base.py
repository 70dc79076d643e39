"""Which tasks have become worse than the untrained base while the average over the tasks has become better."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from qdora.evaluation.paired import Paired, paired_difference
from qdora.evaluation.suite import EvaluationResult, TaskResult

Metric = Literal["nll_per_token", "acc"]

_NAMES: dict[Metric, str] = {"nll_per_token": "NLL per token", "acc": "accuracy"}
_WORSE: dict[Metric, float] = {"nll_per_token": 1.0, "acc": -1.0}
"""Metric -> the sign of a change for the worse."""
_NORMAL = 1.96
"""Half of a 95 % interval in standard errors, where single examples are not known."""


@dataclass(frozen=True)
class WorseTask:
    """A task that training has made worse, beyond the noise of its examples.

    Attributes:
        task, metric: Which; nll_per_token in nats, acc in 0..1.
        base, now: Values before training and now.
        lower: By how much it is worse at least: the end nearer to 0 of the 95 % interval of the difference.
        average_base, average_now: Of all tasks; the better one is the second.
    """

    task: str
    metric: Metric
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

    Where both evaluations hold single examples, the interval is that of the paired difference over the same examples
    (`paired_difference`); else it follows from both standard errors, as if the examples were others. Tasks that were
    measured on another number of examples, or on a single one, are left out.
    """
    found: list[WorseTask] = []
    singles = _by_task(base.per_example), _by_task(now.per_example)
    for metric, sign in _WORSE.items():
        before, after = getattr(base.average, metric), getattr(now.average, metric)
        if before is None or after is None or sign * (after - before) >= 0:
            continue
        for task, result in now.tasks.items():
            old = base.tasks.get(task)
            if old is None or old.num_examples != result.num_examples or getattr(result, metric) is None:
                continue
            pair = [each.get(task, []) for each in singles]
            lower = _paired_lower(pair, metric, sign) if all(pair) else _apart_lower(old, result, metric, sign)
            if lower > 0:
                values = getattr(old, metric), getattr(result, metric)
                found.append(WorseTask(task, metric, *values, lower, before, after))
    return found


def _by_task(records: Iterable[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    found: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        found.setdefault(record["task"], []).append(record)
    return found


def _paired_lower(pair: Sequence[Sequence[Mapping[str, Any]]], metric: Metric, sign: float) -> float:
    """Lower end of sign * (now - base) over the same examples; nan for a single one."""
    name = "nll" if metric == "nll_per_token" else "acc"
    old, new = ({each["id"]: each for each in records if name in each} for records in pair)
    ids = [each for each in old if each in new]
    scores = [np.array([[sign * each[key][name] for key in ids]], dtype=np.float64) for each in (new, old)]
    weights = np.ones(len(ids)) if name == "acc" else np.array([new[key]["num_answer_tokens"] for key in ids], float)
    return paired_difference([Paired(scores[0], scores[1], weights)]).lower if len(ids) > 1 else math.nan


def _apart_lower(old: TaskResult, new: TaskResult, metric: Metric, sign: float) -> float:
    """Lower end of sign * (now - base) by the standard errors of both; nan where one of them is not known."""
    errors = [getattr(each, f"{metric}_stderr") for each in (old, new)]
    if None in errors:
        return math.nan
    return float(sign * (getattr(new, metric) - getattr(old, metric)) - _NORMAL * math.hypot(*errors))
