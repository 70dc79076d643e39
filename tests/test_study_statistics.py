"""Statistics of a study against scipy, plain loops and simulated truths."""

from __future__ import annotations

import itertools
import math
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from qdora.study.statistics import (
    TaskScores,
    holm,
    mean_interval,
    permutation_p,
    repaired,
    seed_permutation_p,
)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def task(num_series: int, num_seeds: int, num_examples: int, seed: int = 0, *, weighted: bool = False) -> TaskScores:
    """Skewed scores."""
    draw = rng(seed)
    weights = draw.integers(1, 5, num_examples).astype(float) if weighted else np.ones(num_examples)
    return TaskScores(draw.exponential(size=(num_series, num_seeds, num_examples)) * weights, weights)


def test_the_interval_of_a_mean_with_one_seed_and_one_task_is_students() -> None:
    one = task(1, 1, 30, 1)
    values = one.scores[0, 0]
    low, high = stats.t.interval(0.95, 29, loc=values.mean(), scale=values.std(ddof=1) / math.sqrt(30))
    found = mean_interval([one])
    assert (found.value, found.lower, found.upper) == pytest.approx((values.mean(), low, high), rel=1e-12)


def test_the_interval_of_a_mean_with_seeds_tasks_and_weights_against_plain_loops() -> None:
    tasks = [task(1, 3, 8, 6, weighted=True), task(1, 3, 5, 7, weighted=True)]
    by_seed, parts = [0.0] * 3, []
    for each in tasks:
        total, number = sum(each.weights), len(each.weights)
        ratios = [sum(each.scores[0, s]) / total for s in range(3)]
        by_seed = [old + ratio / 2 for old, ratio in zip(by_seed, ratios, strict=True)]
        ratio = sum(ratios) / 3
        residuals = [
            (sum(each.scores[0, s, e] for s in range(3)) / 3 - ratio * each.weights[e]) / (total / number)
            for e in range(number)
        ]
        mean = sum(residuals) / number
        parts.append((sum((r - mean) ** 2 for r in residuals) / (number - 1) / number / 4, number - 1))
    value = sum(by_seed) / 3
    parts.append((sum((r - value) ** 2 for r in by_seed) / 2 / 3, 2))
    variance = sum(part for part, _ in parts)
    quantile = sum(part * stats.t.ppf(0.975, free) for part, free in parts) / variance
    found = mean_interval(tasks)
    half = quantile * math.sqrt(variance)
    assert (found.value, found.lower, found.upper) == pytest.approx((value, value - half, value + half), rel=1e-12)


def test_an_interval_needs_two_examples_and_variation() -> None:
    single = mean_interval([task(1, 3, 1)])
    assert math.isnan(single.lower)
    assert math.isnan(single.upper)
    equal = TaskScores(np.full((1, 2, 9), 2.0), np.ones(9))
    same = mean_interval([equal])
    assert (same.value, same.lower, same.upper) == (2.0, 2.0, 2.0)


def test_the_permutation_test_is_scipys_where_all_swaps_are_counted() -> None:
    one = task(2, 1, 10, 11)
    a, b = one.scores[0, 0], one.scores[1, 0]
    theirs = stats.permutation_test(
        (a, b),
        lambda x, y, axis: (x - y).mean(axis=axis),
        permutation_type="samples",
        n_resamples=2000,
        vectorized=True,
    )
    ours = permutation_p([one], num_resamples=2000, generator=rng())
    assert ours == pytest.approx(min(1.0, theirs.pvalue), abs=1e-12)
    drawn = permutation_p([one], num_resamples=1000, generator=rng())  # fewer than 2^10: drawn at random
    assert drawn == pytest.approx(ours, abs=0.06)


def test_the_permutation_test_with_seeds_tasks_and_weights_against_loops() -> None:
    tasks = [task(2, 2, 4, 12, weighted=True), task(2, 2, 3, 13, weighted=True)]

    def statistic(swaps: tuple[int, ...]) -> float:
        left, total = list(swaps), 0.0
        for each in tasks:
            part = 0.0
            for e in range(len(each.weights)):
                sign = left.pop(0)
                part += sign * sum(each.scores[0, s, e] - each.scores[1, s, e] for s in range(2)) / 2
            total += part / each.weights.sum() / 2
        return abs(total)

    every = [statistic(swaps) for swaps in itertools.product((1, -1), repeat=7)]
    expected = sum(value >= every[0] - 1e-12 for value in every) / len(every)
    assert permutation_p(tasks, num_resamples=128, generator=rng()) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("num_examples", [4, 40])
def test_a_p_value_is_never_zero(num_examples: int) -> None:
    scores = np.stack([np.full((1, num_examples), 9.0), np.zeros((1, num_examples))])  # as different as can be
    found = permutation_p([TaskScores(scores, np.ones(num_examples))], num_resamples=99, generator=rng())
    assert found == pytest.approx(2 / 2**4 if num_examples == 4 else 1 / 100)  # exact, or 1 / (1 + number drawn)


def test_p_values_without_a_difference_are_uniform() -> None:
    values = [
        permutation_p(
            [TaskScores(rng(number).normal(size=(2, 2, 40)), np.ones(40))], num_resamples=199, generator=rng()
        )
        for number in range(300)
    ]
    assert stats.kstest(values, "uniform").pvalue > 0.001
    same = np.ones((2, 2, 5))
    assert permutation_p([TaskScores(same, np.ones(5))], num_resamples=100, generator=rng()) == 1.0


def test_few_seeds_cannot_give_a_small_p() -> None:
    for num_seeds in (1, 2, 3, 6):
        scores = np.zeros((2, num_seeds, 4))
        scores[0] = 1.0 + rng(1).normal(scale=0.01, size=(num_seeds, 4))
        found = seed_permutation_p([TaskScores(scores, np.ones(4))])
        assert found == pytest.approx(2 / 2**num_seeds)


def test_holm_of_a_worked_example() -> None:
    # By hand: 0.01 * 4; 0.02 * 3; 0.03 * 2 is 0.06, not below the one before; 0.2 * 1
    assert holm([0.2, 0.01, 0.03, 0.02]) == pytest.approx([0.2, 0.04, 0.06, 0.06])
    assert holm([]) == []
    assert holm([0.9, 0.8]) == [1.0, 1.0]


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.floats(0.01, 0.3))
def test_holm_rejects_what_its_definition_rejects(p_values: list[float], alpha: float) -> None:
    rejected, left = set(), sorted(range(len(p_values)), key=lambda i: p_values[i])
    while left and p_values[left[0]] * len(left) < alpha:
        rejected.add(left.pop(0))
    adjusted = holm(p_values)
    assert {i for i, value in enumerate(adjusted) if value < alpha} == rejected
    assert all(after >= before for before, after in zip(p_values, adjusted, strict=True))


def test_repair_is_the_share_of_the_loss_made_good() -> None:
    draw = rng(14)
    dense = draw.exponential(size=(1, 200)) + 1
    base, adapter = dense + 0.8, dense + 0.2 + draw.normal(scale=0.01, size=(3, 200))
    scores = np.stack([np.repeat(base, 3, 0), adapter, np.repeat(dense, 3, 0)])
    found = repaired([TaskScores(scores, np.ones(200))])
    assert found.value == pytest.approx(0.6 / 0.8, abs=0.01)
    assert found.lower < found.value < found.upper
    unharmed = np.stack([np.repeat(dense, 3, 0), adapter, np.repeat(dense, 3, 0)])
    nothing = repaired([TaskScores(unharmed, np.ones(200))])
    assert math.isnan(nothing.lower)  # nothing was lost, so there is no share of it


def test_the_interval_of_the_repair_is_fiellers() -> None:
    draw = rng(15)
    dense = draw.exponential(size=40)
    base = dense + draw.normal(0.5, 0.6, size=40)
    adapter = base - draw.normal(0.3, 0.5, size=40)
    gained, lost = base - adapter, base - dense
    # (mean(gained) - r mean(lost))^2 = t^2 var(gained - r lost) / n is a quadratic equation in r
    factor = stats.t.ppf(0.975, 39) ** 2 / 40
    (a, c), (_, b) = np.cov(gained, lost)
    square = lost.mean() ** 2 - factor * b
    middle = gained.mean() * lost.mean() - factor * c
    root = math.sqrt(middle**2 - square * (gained.mean() ** 2 - factor * a))
    found = repaired([TaskScores(np.stack([base, adapter, dense])[:, None], np.ones(40))])
    ends = ((middle - root) / square, (middle + root) / square)
    assert (found.lower, found.upper) == pytest.approx(ends, rel=1e-9)
    assert found.upper - found.value > 1.1 * (found.value - found.lower)  # lopsided, as a ratio is
    unsure = repaired(
        [TaskScores(np.stack([base, adapter, base + 0.05 * (dense - dense.mean())])[:, None], np.ones(40))]
    )
    assert math.isnan(unsure.lower)
    assert math.isnan(unsure.upper)


@pytest.mark.parametrize("name", ["seeds alone", pytest.param("4 comparisons", marks=pytest.mark.slow)])
def test_a_study_without_a_difference_seldom_finds_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of benchmarks/study_nulls.py, which has more cases of 2,000 studies each."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    shares, scenarios = (getattr(import_module("study_nulls"), name) for name in ("shares", "SCENARIOS"))
    found = shares(scenarios[name], 150, seed=1)
    # 6 %, and 3 standard errors of 150 studies
    assert all(found[what] < 0.12 for what in ("difference", "winner", "repair")), found
