"""Statistics of a study against scipy, plain loops and simulated truths."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from qdora.study.statistics import (
    TaskScores,
    bca_interval,
    difference,
    first,
    holm,
    permutation_p,
    repaired,
    seed_permutation_p,
)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def task(num_series: int, num_seeds: int, num_examples: int, seed: int = 0, *, weighted: bool = False) -> TaskScores:
    """Skewed scores, so that a BCa interval is another than a percentile one."""
    draw = rng(seed)
    weights = draw.integers(1, 5, num_examples).astype(float) if weighted else np.ones(num_examples)
    return TaskScores(draw.exponential(size=(num_series, num_seeds, num_examples)) * weights, weights)


def test_the_interval_of_one_seed_is_scipys() -> None:
    one, two = task(2, 1, 30, 1), task(2, 1, 50, 2)
    first_task, second_task = (each.scores[0, 0] - each.scores[1, 0] for each in (one, two))

    def macro(a: np.ndarray, b: np.ndarray, axis: int = -1) -> np.ndarray:
        return (a.mean(axis=axis) + b.mean(axis=axis)) / 2

    theirs = stats.bootstrap(
        (first_task, second_task), macro, n_resamples=40_000, method="BCa", vectorized=True, rng=rng(3)
    ).confidence_interval
    ours = bca_interval([one, two], difference, num_resamples=40_000, generator=rng(4))
    assert ours.value == pytest.approx(macro(first_task, second_task), rel=1e-12)
    width = theirs.high - theirs.low
    assert abs(ours.lower - theirs.low) < 0.03 * width
    assert abs(ours.upper - theirs.high) < 0.03 * width


def test_a_skewed_mean_has_scipys_lopsided_interval() -> None:
    one = task(1, 1, 25, 5)
    theirs = stats.bootstrap((one.scores[0, 0],), np.mean, n_resamples=40_000, method="BCa", rng=rng(1))
    ours = bca_interval([one], first, num_resamples=40_000, generator=rng(2))
    low, high = theirs.confidence_interval
    assert (ours.lower, ours.upper) == pytest.approx((low, high), abs=0.03 * (high - low))
    assert ours.upper - ours.value > 1.1 * (ours.value - ours.lower)


def test_seeds_and_weights_against_plain_loops() -> None:
    tasks = [task(2, 3, 8, 6, weighted=True), task(2, 3, 5, 7, weighted=True)]

    def statistic(rows: list[int], columns: list[list[int]]) -> float:
        parts = []
        for each, chosen in zip(tasks, columns, strict=True):
            total = sum(each.scores[0, s, e] - each.scores[1, s, e] for s in rows for e in chosen)
            parts.append(total / (len(rows) * sum(each.weights[e] for e in chosen)))
        return sum(parts) / len(parts)

    draw, seeds, examples = rng(8), range(3), [range(8), range(5)]
    value = statistic(list(seeds), [list(part) for part in examples])
    drawn = sorted(
        statistic(list(draw.integers(0, 3, 3)), [list(draw.integers(0, len(p), len(p))) for p in examples])
        for _ in range(8000)
    )
    left_out = [[statistic([r for r in seeds if r != s], [list(p) for p in examples]) for s in seeds]]
    for number in range(2):
        columns = [
            [[e for e in p if n != number or e != out] for n, p in enumerate(examples)] for out in examples[number]
        ]
        left_out.append([statistic(list(seeds), each) for each in columns])
    cubes = squares = 0.0
    for values in left_out:
        mean, count = sum(values) / len(values), len(values)
        cubes += sum(((count - 1) * (mean - v)) ** 3 for v in values) / count**3
        squares += sum(((count - 1) * (mean - v)) ** 2 for v in values) / count**2
    acceleration = cubes / (6 * squares**1.5)
    bias = stats.norm.ppf(sum(v < value for v in drawn) / len(drawn))
    ends = []
    for quantile in (0.025, 0.975):
        z = bias + stats.norm.ppf(quantile)
        ends.append(drawn[int(stats.norm.cdf(bias + z / (1 - acceleration * z)) * len(drawn))])
    ours = bca_interval(tasks, difference, num_resamples=8000, generator=rng(9))
    assert ours.value == pytest.approx(value, rel=1e-12)
    assert (ours.lower, ours.upper) == pytest.approx(ends, abs=0.06 * (ends[1] - ends[0]))


def test_an_interval_needs_two_examples_and_variation() -> None:
    single = bca_interval([task(2, 3, 1)], difference, num_resamples=200, generator=rng())
    assert math.isnan(single.lower)
    assert not single.excludes_zero
    equal = TaskScores(np.stack([np.full((2, 9), 3.0), np.full((2, 9), 1.0)]), np.ones(9))
    same = bca_interval([equal], difference, num_resamples=200, generator=rng())
    assert (same.value, same.lower, same.upper) == (2.0, 2.0, 2.0)


def test_the_interval_covers_as_often_as_it_says() -> None:
    truth, covered, rounds = 0.0, 0, 300
    for number in range(rounds):
        draw = rng(1000 + number)
        one = TaskScores(draw.normal(size=(2, 1, 60)), np.ones(60))
        found = bca_interval([one], difference, num_resamples=400, generator=draw)
        covered += found.lower <= truth <= found.upper
    assert 0.89 < covered / rounds < 0.99  # 95 % +- 4 standard errors of the simulation, less its few resamples


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
    found = bca_interval([TaskScores(scores, np.ones(200))], repaired, num_resamples=500, generator=rng())
    assert found.value == pytest.approx(0.6 / 0.8, abs=0.01)
    assert found.lower <= found.value <= found.upper
    unharmed = np.stack([np.repeat(dense, 3, 0), adapter, np.repeat(dense, 3, 0)])
    nothing = bca_interval([TaskScores(unharmed, np.ones(200))], repaired, num_resamples=500, generator=rng())
    assert math.isnan(nothing.lower)  # nothing was lost, so there is no share of it
