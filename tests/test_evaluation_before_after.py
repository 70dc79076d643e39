"""Changes of tasks and of their average: each task counts once, and what was not measured stays unknown."""

from __future__ import annotations

import math
from typing import Any

import pytest
from scipy import stats

from qdora.evaluation.before_after import TaskChange, task_changes, tasks_of_other_examples


def document(**nlls: list[float]) -> dict[str, Any]:
    """An evaluation with two answer tokens an example."""
    records = [
        {"task": task, "id": str(number), "nll": nll, "num_answer_tokens": 2}
        for task, values in nlls.items()
        for number, nll in enumerate(values)
    ]
    means = {task: sum(values) / (2 * len(values)) for task, values in nlls.items()}
    tasks = {
        task: {"num_examples": len(values), "nll_per_token": means[task], "acc": None} for task, values in nlls.items()
    }
    average = {"nll_per_token": sum(means.values()) / len(means), "acc": None}
    return {"tasks": tasks, "average": average, "per_example": records}


FIRST = {"a": [float(n) for n in range(12)], "b": [5.0 + n % 3 for n in range(20)]}
SECOND = {"a": [n * 0.5 + (n % 2) for n in range(12)], "b": [4.0 + n % 4 for n in range(20)]}


def test_the_average_counts_each_task_once() -> None:
    a, b, average = task_changes(document(**FIRST), document(**SECOND), "nll_per_token")
    variance = squares = 0.0
    for found, task in ((a, "a"), (b, "b")):
        gaps = [(new - old) / 2 for old, new in zip(FIRST[task], SECOND[task], strict=True)]
        mean = sum(gaps) / len(gaps)
        part = sum((gap - mean) ** 2 for gap in gaps) / (len(gaps) - 1) / len(gaps)
        assert found.difference == pytest.approx(mean)
        width = stats.t.ppf(0.975, len(gaps) - 1) * math.sqrt(part)
        assert (found.lower, found.upper) == (pytest.approx(mean - width), pytest.approx(mean + width))
        variance += part / 4
        squares += (part / 4) ** 2 / (len(gaps) - 1)
    half = stats.t.ppf(0.975, variance**2 / squares) * math.sqrt(variance)  # Satterthwaite's degrees of freedom
    assert (average.task, average.num_examples) == ("average", 32)
    assert a.difference is not None
    assert b.difference is not None
    assert average.difference == pytest.approx((a.difference + b.difference) / 2)
    assert average.upper == pytest.approx(average.difference + half)


def test_what_was_not_measured_is_none() -> None:
    found = task_changes({}, document(a=[2.0] * 12), "nll_per_token")
    assert found == [TaskChange("a", 12, None, 1.0, None, None, None)]
    found = task_changes(document(a=[2.0] * 12), {}, "nll_per_token")
    assert found == [TaskChange("a", 12, 1.0, None, None, None, None)]
    assert task_changes(document(a=[2.0]), document(a=[1.0]), "acc") == []
    assert task_changes({}, {}, "acc") == []


def test_few_examples_have_a_difference_and_no_interval() -> None:
    (nine,) = task_changes(document(a=[2.0, 4.0] + [2.0] * 7), document(a=[1.0] * 9), "nll_per_token")
    assert nine.difference == pytest.approx(-11 / 18)
    assert nine.lower is None
    assert nine.upper is None
    (one,) = task_changes(document(a=[2.0]), document(a=[1.0]), "nll_per_token")
    assert one.difference is None


def test_ids_that_repeat_within_a_task_are_different_examples() -> None:
    before, after = document(a=[2.0] * 20), document(a=[4.0 + n % 3 for n in range(10)] + [2.0] * 10)
    (expected,) = task_changes(before, after, "nll_per_token")
    for record in before["per_example"] + after["per_example"]:
        record["id"] = str(int(record["id"]) % 10)  # two shards, each numbered from 0
    assert task_changes(before, after, "nll_per_token") == [expected]
    assert tasks_of_other_examples(before, after) == []
    del after["per_example"][-1]
    assert tasks_of_other_examples(before, after) == ["a"]


def test_only_common_examples_are_compared() -> None:
    before, after = document(a=[2.0] * 12), document(a=[4.0] * 14)
    (found,) = task_changes(before, after, "nll_per_token")
    assert (found.difference, found.num_examples) == (1.0, 14)
