"""Differences over the same examples and seeds, against sums written out, tables of t, and simulated truth."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from tests import reference

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

from paired import Paired, paired_difference


def random_tasks(num_tasks: int, num_seeds: int, seed: int = 0) -> list[Paired]:
    generator = np.random.default_rng(seed)
    tasks = []
    for number in range(num_tasks):
        shape = num_seeds, 5 + 7 * number
        first, second = generator.normal(size=(2, *shape))
        tasks.append(Paired(first, second + 0.3, generator.integers(1, 9, shape[1]).astype(np.float64)))
    return tasks


@pytest.mark.parametrize("num_seeds", [1, 2, 5])
@pytest.mark.parametrize("num_tasks", [1, 3])
def test_value_and_error_are_those_of_the_sums(num_tasks: int, num_seeds: int) -> None:
    tasks = random_tasks(num_tasks, num_seeds)
    found = paired_difference(tasks)
    plain = [(task.first.tolist(), task.second.tolist(), task.weights.tolist()) for task in tasks]
    value, stderr, half = reference.paired(plain)
    assert found.value == pytest.approx(value, rel=1e-12)
    assert found.stderr == pytest.approx(stderr, rel=1e-12)
    assert (found.lower, found.upper) == pytest.approx((value - half, value + half), rel=1e-9)
    assert found.num_seeds == num_seeds


@pytest.mark.parametrize("num_seeds", [1, 3])
@pytest.mark.parametrize("gap", [0.0, 0.1, 0.5, 3.0])
def test_the_p_value_is_the_level_at_which_the_interval_ends_at_zero(num_seeds: int, gap: float) -> None:
    generator = np.random.default_rng(3)
    shape = num_seeds, 25
    task = Paired(generator.normal(size=shape) + gap, generator.normal(size=shape), np.ones(25))
    found = paired_difference([task])
    assert 0 < found.p <= 1
    at_level = paired_difference([task], 1 - found.p)
    assert min(abs(at_level.lower), abs(at_level.upper)) < 1e-7
    if num_seeds == 1:
        assert found.p == pytest.approx(float(stats.ttest_rel(task.first[0], task.second[0]).pvalue), rel=1e-9)


def test_the_interval_takes_the_t_of_a_table() -> None:
    """Three seeds that differ, examples that do not: 2 degrees of freedom, t = 4.3027 at 95 % and 9.9248 at 99 %."""
    first = np.repeat(np.array([[1.0], [2.0], [3.0]]), 4, axis=1)
    task = Paired(first, np.zeros((3, 4)), np.ones(4))
    found = paired_difference([task])
    assert (found.value, found.stderr) == pytest.approx((2.0, 1 / math.sqrt(3)))
    assert found.upper - found.value == pytest.approx(4.302653 * found.stderr, rel=1e-6)
    assert found.value - found.lower == pytest.approx(4.302653 * found.stderr, rel=1e-6)
    assert paired_difference([task], 0.99).upper - 2.0 == pytest.approx(9.924843 * found.stderr, rel=1e-6)


def test_nothing_differs_and_nothing_is_known() -> None:
    same = Paired(np.ones((2, 3)), np.ones((2, 3)), np.ones(3))
    found = paired_difference([same])
    assert (found.value, found.stderr, found.lower, found.upper, found.p) == (0.0, 0.0, 0.0, 0.0, 1.0)
    single = Paired(np.ones((2, 1)), np.zeros((2, 1)), np.ones(1))
    found = paired_difference([single])
    assert found.value == 1.0
    assert math.isnan(found.stderr)
    assert math.isnan(found.lower)


@pytest.mark.parametrize("of_seed", [0.0, 0.3])
def test_the_interval_has_the_truth_in_it_as_often_as_it_says(of_seed: float) -> None:
    """Effects of examples (1.0), seeds and pairs (0.5): 95 % of 1,000 intervals, up to 3 standard errors; more is
    allowed, since what belongs to a pair counts twice."""
    generator = np.random.default_rng(1)
    hits, num = 0, 1000
    for _ in range(num):
        examples = generator.normal(size=(1, 30))
        scores = 0.7 + examples + of_seed * generator.normal(size=(3, 1)) + 0.5 * generator.normal(size=(3, 30))
        found = paired_difference([Paired(scores, np.zeros((3, 30)), np.ones(30))])
        hits += found.lower <= 0.7 <= found.upper
    assert hits / num > 0.95 - 3 * math.sqrt(0.95 * 0.05 / num)
    assert hits / num < 0.99


@pytest.mark.parametrize("of_example", [0.02, 0.5])
def test_a_family_without_differences_is_as_rarely_called_as_it_says(of_example: float) -> None:
    """Fifteen comparisons of three seeds, nothing but noise, the seeds' the larger or the smaller part: Holm's
    correction of the p-values calls one in no more than 5 % of 400 families, up to 3 standard errors."""
    generator = np.random.default_rng(5)
    called, num = 0, 400
    for _ in range(num):
        p_values = []
        for _ in range(15):
            noise = 0.1 * generator.normal(size=(3, 1)) + of_example * generator.normal(size=(1, 40))
            scores = noise + 0.02 * generator.normal(size=(3, 40))
            p_values.append(paired_difference([Paired(scores, np.zeros((3, 40)), np.ones(40))]).p)
        called += min(p_values) < 0.05 / 15  # Holm's first step
    assert called / num < 0.05 + 3 * math.sqrt(0.05 * 0.95 / num)
