"""Tasks that got worse than the untrained base: by single examples, never by noise."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy import stats

from qdora.evaluation.before_after import worse_than_before
from qdora.evaluation.suite import EvaluationResult, TaskResult


def result(tasks: dict[str, tuple[list[float], list[float]]]) -> EvaluationResult:
    """An evaluation with these NLLs and credits of single examples, one answer token each."""
    found, records = {}, []
    for name, (nll, acc) in tasks.items():
        found[name] = task_result(nll, acc)
        records += [
            {"task": name, "id": str(index), "nll": one, "acc": other, "num_answer_tokens": 1}
            for index, (one, other) in enumerate(zip(nll, acc, strict=True))
        ]
    every = [np.mean([each[kind] for each in tasks.values()], axis=0).tolist() for kind in (0, 1)]
    return EvaluationResult(found, task_result(*every), {}, records)


def task_result(nll: list[float], acc: list[float]) -> TaskResult:
    numbers: dict[str, Any] = dict.fromkeys(TaskResult.__annotations__, 0)
    count = len(nll)
    numbers |= {"num_examples": count, "acc": float(np.mean(acc)), "nll_per_token": float(np.mean(nll))}
    errors = [float(np.std(values, ddof=1) / math.sqrt(count)) if count > 1 else None for values in (nll, acc)]
    return TaskResult(**numbers | {"nll_per_token_stderr": errors[0], "acc_stderr": errors[1]})


RANDOM = np.random.default_rng(0)
SPREAD = RANDOM.normal(3, 1, 40)  # of the examples: far wider than the change
CHANGE = RANDOM.normal(0.1, 0.05, 40)
FLAT = [0.5] * 40


def test_a_small_change_of_every_example_is_seen() -> None:
    before = {"worse": (SPREAD.tolist(), FLAT), "better": ((SPREAD + 2).tolist(), FLAT)}
    after = {"worse": ((SPREAD + CHANGE).tolist(), FLAT), "better": (SPREAD.tolist(), FLAT)}
    (found,) = worse_than_before(result(before), result(after))
    half = stats.t.ppf(0.975, 39) * CHANGE.std(ddof=1) / math.sqrt(40)
    assert (found.task, found.metric) == ("worse", "nll_per_token")
    assert found.lower == pytest.approx(CHANGE.mean() - half, rel=1e-9)
    assert (found.base, found.now) == pytest.approx((SPREAD.mean(), (SPREAD + CHANGE).mean()))
    assert found.average_now < found.average_base
    assert f"NLL per token {found.now:.4g} against {found.base:.4g}" in found.in_words()


def test_accuracy_counts_the_other_way() -> None:
    before = {"worse": (FLAT, [1.0] * 30 + [0.0] * 10), "better": (FLAT, [0.0] * 40)}
    after = {"worse": (FLAT, [1.0] * 10 + [0.0] * 30), "better": (FLAT, [1.0] * 39 + [0.0])}
    (found,) = worse_than_before(result(before), result(after))
    assert (found.task, found.metric, found.base, found.now) == ("worse", "acc", 0.75, 0.25)


def test_nothing_is_said_of_noise_or_of_a_worse_average() -> None:
    noise = RANDOM.normal(0, 1, 40)
    noise -= noise.mean() - 0.05
    before = {"one": (SPREAD.tolist(), FLAT), "other": (SPREAD.tolist(), FLAT)}
    assert worse_than_before(result(before), result(before)) == []
    after = {"one": ((SPREAD + noise).tolist(), FLAT), "other": ((SPREAD - 1).tolist(), FLAT)}
    assert worse_than_before(result(before), result(after)) == []
    worse = {"one": ((SPREAD + 1).tolist(), FLAT), "other": ((SPREAD - 0.5).tolist(), FLAT)}
    assert worse_than_before(result(before), result(worse)) == []


def test_two_examples_tell_no_spread() -> None:
    before = {"one": ([1.0, 1.0], [1.0, 1.0]), "other": ([5.0, 5.0], [0.0, 0.0])}
    after = {"one": ([1.001, 1.001], [1.0, 1.0]), "other": ([1.0, 1.0], [0.0, 0.0])}
    assert worse_than_before(result(before), result(after)) == []


def test_tasks_that_cannot_be_compared_are_left_out() -> None:
    before = {"one": ([1.0], [1.0]), "other": ([5.0], [0.0])}
    after = {"one": ([2.0], [1.0]), "other": ([1.0], [0.0])}
    assert worse_than_before(result(before), result(after)) == []
    long = {"one": (FLAT, FLAT), "other": ([9.0] * 40, FLAT)}
    short = {"one": ([2.0] * 39, FLAT[:39]), "other": ([1.0] * 39, FLAT[:39])}
    assert worse_than_before(result(long), result(short)) == []
