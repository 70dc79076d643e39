"""Statistics of a study against scipy, plain loops and simulated truths."""

from __future__ import annotations

import math
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats

from qdora.evaluation.example_intervals import (
    SeedScores,
    Spread,
    TaskScores,
    Weighting,
    example_spread,
    weighted_mean,
)
from qdora.study.statistics import holm, ratio_interval, seed_spread, t_interval


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def task(number: int, seed: int, *, first: int = 0, weighted: bool = True) -> TaskScores:
    """Skewed scores of the examples from number `first` on."""
    draw = rng(seed)
    weights = draw.integers(1, 5, number).astype(float) if weighted else np.ones(number)
    names = tuple(f"{first + index}#1" for index in range(number))
    return TaskScores(names, draw.exponential(size=number) * weights, weights)


@pytest.mark.parametrize("number", [2, 3, 8])
def test_the_interval_and_the_p_value_over_seeds_are_students(number: int) -> None:
    values = rng(number).normal(0.3, 1.0, number)
    theirs = stats.ttest_1samp(values, 0.0)
    low, high = theirs.confidence_interval(0.95)
    found = t_interval(values.tolist())
    assert (found.value, found.lower, found.upper) == pytest.approx((values.mean(), low, high), rel=1e-12)
    assert found.half_width == pytest.approx((high - low) / 2, rel=1e-12)
    assert seed_spread(values.tolist()).p(found.value) == pytest.approx(theirs.pvalue, rel=1e-12)


def test_a_single_seed_has_no_interval() -> None:
    found = t_interval([1.5])
    assert found.value == 1.5
    assert math.isnan(found.lower)
    assert math.isnan(seed_spread([1.5]).p(1.5))


@pytest.mark.parametrize("shift", [0.0, 0.015, -0.015, 0.03])
def test_equivalence_is_scipys_two_one_sided_tests(shift: float) -> None:
    values = rng(5).normal(shift, 0.01, 6)
    below = stats.ttest_1samp(values, -0.02, alternative="greater").pvalue
    above = stats.ttest_1samp(values, 0.02, alternative="less").pvalue
    found = seed_spread(values.tolist()).p_equivalent(float(values.mean()), 0.02)
    assert found == pytest.approx(max(below, above), rel=1e-9)


def test_the_spread_of_the_first_seeds_keeps_what_an_interval_promises() -> None:
    """Three seeds, and three more where the half-width is above 1: the truth, 0, is in 95 % of the intervals by the
    spread of the first seeds (Stein, 1945), and in fewer by that of all seeds."""
    generator = np.random.default_rng(0)
    for sd in (0.4, 1.0, 1.5):
        draws = generator.normal(scale=sd, size=(4000, 6)).tolist()
        kept = [values if t_interval(values[:3]).half_width > 1 else values[:3] for values in draws]
        stein, plain = (
            np.mean(
                [found.lower < 0 < found.upper for values in kept for found in [t_interval(values, num_first=first)]]
            )
            for first in (3, None)
        )
        assert abs(stein - 0.95) < 0.011  # three standard errors
        if sd == 1.0:
            assert plain < 0.933
    assert seed_spread(draws[0], 3).free == 2
    assert seed_spread(draws[0], 3).stderr == pytest.approx(np.std(draws[0][:3], ddof=1) / math.sqrt(6), rel=1e-12)
    assert math.isnan(t_interval(draws[0], num_first=1).lower)


def test_without_spread_the_value_alone_decides() -> None:
    none = seed_spread([0.1, 0.1])
    assert (none.p(0.1), none.p(0.0)) == (1e-15, 1.0)
    assert (none.p_equivalent(0.1, 0.2), none.p_equivalent(0.1, 0.05)) == (1e-15, 1.0)


@pytest.mark.parametrize("free, alpha", [(1, 0.05), (2, 0.05), (5, 0.05), (5, 0.05 / 6), (7, 0.025)])
def test_the_smallest_detectable_difference_has_the_power(free: int, alpha: float) -> None:
    found = Spread(0.01, free).detectable(alpha, 0.8) / 0.01
    critical = stats.t.ppf(1 - alpha / 2, free)

    def missed(square: float) -> float:
        """Of a sum of squares: its density times the chance that the mean stays below the critical value."""
        edge = critical * math.sqrt(square / free)
        return float(stats.chi2.pdf(square, free) * (stats.norm.cdf(edge - found) - stats.norm.cdf(-edge - found)))

    power = 1 - integrate.quad(missed, 0, 1, limit=200)[0] - integrate.quad(missed, 1, math.inf, limit=200)[0]
    assert power == pytest.approx(0.8, abs=1e-5)


def test_the_power_of_the_smallest_detectable_difference_in_a_simulation() -> None:
    least = Spread(1 / math.sqrt(6), 5).detectable(0.05, 0.8)
    values = rng(9).normal(least, 1.0, (20_000, 6))
    found = np.abs(values.mean(axis=1)) / (values.std(axis=1, ddof=1) / math.sqrt(6)) > stats.t.ppf(0.975, 5)
    assert found.mean() == pytest.approx(0.8, abs=0.01)


def test_a_run_is_weighted_by_tokens_or_by_tasks() -> None:
    tasks = {"long": task(3, 1), "short": task(2, 2)}
    total = weights = 0.0
    ratios = []
    for each in tasks.values():
        nll, tokens = sum(each.values.tolist()), sum(each.weights.tolist())
        total, weights = total + nll, weights + tokens
        ratios.append(nll / tokens)
    assert weighted_mean(tasks, "tokens") == pytest.approx(total / weights, rel=1e-12)
    assert weighted_mean(tasks, "equal") == pytest.approx(sum(ratios) / 2, rel=1e-12)


def expected_example_variance(seeds: list[SeedScores], weighting: str) -> float:
    """By the book: linearised ratios, one draw for each different example, tasks as strata."""
    parts: dict[tuple[str, str], float] = {}
    for tasks in seeds:
        tokens = sum(sum(each.weights) for each in tasks.values())
        pooled = sum(sum(each.values) for each in tasks.values()) / tokens
        for name, each in tasks.items():
            ratio = pooled if weighting == "tokens" else sum(each.values) / sum(each.weights)
            scale = tokens if weighting == "tokens" else len(tasks) * sum(each.weights)
            for example, value, weight in zip(each.examples, each.values, each.weights, strict=True):
                known = parts.get((name, example), 0.0)
                parts[name, example] = known + (value - ratio * weight) / scale / len(seeds)
    variance = 0.0
    for name in {name for name, _ in parts}:
        own = [value for (task_, _), value in parts.items() if task_ == name]
        mean = sum(own) / len(own)
        variance += len(own) / (len(own) - 1) * sum((value - mean) ** 2 for value in own)
    return variance


@pytest.mark.parametrize("weighting", ["tokens", "equal"])
def test_the_spread_of_examples_against_plain_loops(weighting: Weighting) -> None:
    seeds: list[SeedScores] = [
        {"a": task(7, 1), "b": task(5, 2)},
        {"a": task(7, 3, first=4), "b": task(5, 4)},  # three examples of a in common, all of b
    ]
    found = example_spread(seeds, weighting)
    assert found.stderr**2 == pytest.approx(expected_example_variance(seeds, weighting), rel=1e-12)
    assert 4 < found.free <= 10 + 4


def test_the_spread_of_examples_of_one_run_and_task_is_the_standard_error() -> None:
    one = task(30, 8, weighted=False)
    found = example_spread([{"a": one}], "equal")
    assert found.stderr == pytest.approx(stats.sem(one.values), rel=1e-12)
    assert found.free == pytest.approx(29)


def test_the_interval_of_a_ratio_is_fiellers() -> None:
    draw = rng(15)
    lost = draw.normal(0.5, 0.2, 6)
    gained = 0.6 * lost + draw.normal(0.0, 0.05, 6)
    found = ratio_interval(gained.tolist(), lost.tolist())
    assert found.value == pytest.approx(gained.mean() / lost.mean())
    for end in (found.lower, found.upper):  # just not rejected by the t test of its own ratio
        assert stats.ttest_1samp(gained - end * lost, 0.0).pvalue == pytest.approx(0.05, rel=1e-6)
    assert found.lower < found.value < found.upper
    more = ratio_interval(gained.tolist(), lost.tolist(), num_first=3)
    by_first = [gained[:3] - ratio * lost[:3] for ratio in (more.lower, more.upper)]
    at_ends = [float((gained - ratio * lost).mean()) for ratio in (more.lower, more.upper)]
    for mean, values in zip(at_ends, by_first, strict=True):
        half = stats.t.ppf(0.975, 2) * np.std(values, ddof=1) / math.sqrt(len(gained))
        assert abs(mean) == pytest.approx(half, rel=1e-9)  # the t interval by the first three just holds 0
    unsure = ratio_interval(gained.tolist(), (lost - lost.mean() + 0.01).tolist())
    assert math.isnan(unsure.lower)
    assert math.isnan(ratio_interval([1.0], [2.0]).upper)


def test_holm_of_a_worked_example() -> None:
    # By hand: 0.01 * 4; 0.02 * 3; 0.03 * 2 is 0.06, not below the one before; 0.2 * 1
    assert holm([0.2, 0.01, 0.03, 0.02], 4) == pytest.approx([0.2, 0.04, 0.06, 0.06])
    assert holm([], 0) == []
    assert holm([0.9, 0.8], 2) == [1.0, 1.0]
    assert holm([0.02, 0.01], 4) == pytest.approx([0.06, 0.04])


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.floats(0.01, 0.3))
def test_holm_rejects_what_its_definition_rejects(p_values: list[float], alpha: float) -> None:
    rejected, left = set(), sorted(range(len(p_values)), key=lambda i: p_values[i])
    while left and p_values[left[0]] * len(left) < alpha:
        rejected.add(left.pop(0))
    adjusted = holm(p_values, len(p_values))
    assert {i for i, value in enumerate(adjusted) if value < alpha} == rejected
    assert all(after >= before for before, after in zip(p_values, adjusted, strict=True))


@pytest.mark.parametrize("number", [60, pytest.param(500, marks=pytest.mark.slow)])
def test_simulated_studies_hold_the_truth_and_seldom_say_something_false(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part of benchmarks/study_nulls.py, within 3.5 standard errors of what its intervals promise."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    nulls = import_module("study_nulls")
    found = nulls.shares(nulls.SCENARIOS["seeds and examples"], number, seed=5)
    for what in nulls.INTERVALS:
        assert abs(found[what] - 0.95) < 3.5 * math.sqrt(0.05 * 0.95 / number), what
    assert found["winner"] <= 0.05 + 3.5 * math.sqrt(0.05 * 0.95 / number)
    at_zone = nulls.Scenario(effect=nulls.ZONE, of_seed=0.005, of_example=0.02, of_run=0.01)
    said = nulls.shares(at_zone, number, seed=6, judged_alone=True)
    assert said["any_equivalent"] <= 0.05 + 3.5 * math.sqrt(0.05 * 0.95 / number)
    assert said["better"] > 0.5
