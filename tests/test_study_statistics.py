"""Numbers of a study against scipy, plain loops and simulated truths: intervals, tests, Holm, the search for rates."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats

from qdora.evaluate.example_intervals import (
    SeedScores,
    Spread,
    TaskScores,
    Weighting,
    example_interval,
    example_spread,
    weighted_mean,
)
from qdora.study.grid import RatesConfig
from qdora.study.guesses import UNIFORM_SHARE, unigram_nll
from qdora.study.rates import RateRun, minimum, search
from qdora.study.statistics import holm, ratio_interval, seed_spread, t_interval


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def task(number: int, seed: int, *, first: int = 0, weighted: bool = True) -> TaskScores:
    """Skewed scores of the examples from number `first` on."""
    draw = rng(seed)
    weights = draw.integers(1, 5, number).astype(float) if weighted else np.ones(number)
    names = tuple(f"{first + index}#1" for index in range(number))
    return TaskScores(names, draw.exponential(size=number) * weights, weights)


@pytest.mark.parametrize("number, shift", [(2, 0.0), (3, 0.015), (8, -0.015), (6, 0.03)])
def test_intervals_and_p_values_over_seeds_are_students(number: int, shift: float) -> None:
    values = rng(number).normal(shift, 0.01, number)
    theirs = stats.ttest_1samp(values, 0.0)
    low, high = theirs.confidence_interval(0.95)
    found, spread = t_interval(values.tolist()), seed_spread(values.tolist())
    assert (found.value, found.lower, found.upper) == pytest.approx((values.mean(), low, high), rel=1e-12)
    assert (found.half_width, spread.half_width) == pytest.approx(((high - low) / 2,) * 2, rel=1e-12)
    assert spread.p(found.value) == pytest.approx(theirs.pvalue, rel=1e-12)
    below = stats.ttest_1samp(values, -0.02, alternative="greater").pvalue
    above = stats.ttest_1samp(values, 0.02, alternative="less").pvalue
    assert spread.p_equivalent(found.value, 0.02) == pytest.approx(max(below, above), rel=1e-9)


def test_a_single_seed_has_no_interval_and_without_spread_the_value_alone_decides() -> None:
    found = t_interval([1.5])
    assert found.value == 1.5
    assert all(map(math.isnan, (found.lower, found.upper, seed_spread([1.5]).p(1.5), ratio_interval([1], [2]).upper)))
    none = seed_spread([0.1, 0.1])
    assert (none.p(0.1), none.p(0.0), none.detectable(0.05, 0.8)) == (1e-15, 1.0, 0.0)
    assert (none.p_equivalent(0.1, 0.2), none.p_equivalent(0.1, 0.05)) == (1e-15, 1.0)
    assert seed_spread([1.0, 1.0, 1.0 + 1e-12]).p(1.0) == 1e-15  # smaller ones have lost their digits


def test_the_spread_of_the_first_seeds_keeps_what_an_interval_promises() -> None:
    """Three seeds, and three more where the half-width is above 1: the truth, 0, is in 95 % of the intervals by the
    spread of the first seeds (Stein, 1945), and in fewer by that of all seeds."""
    draws = rng().normal(size=(4000, 6)).tolist()
    kept = [values if t_interval(values[:3]).half_width > 1 else values[:3] for values in draws]
    stein, plain = (
        np.mean([found.lower < 0 < found.upper for values in kept for found in [t_interval(values, num_first=first)]])
        for first in (3, None)
    )
    assert abs(stein - 0.95) < 0.011  # three standard errors
    assert plain < 0.933
    assert seed_spread(draws[0], 3).free == 2
    assert seed_spread(draws[0], 3).stderr == pytest.approx(np.std(draws[0][:3], ddof=1) / math.sqrt(6), rel=1e-12)
    assert math.isnan(t_interval(draws[0], num_first=1).lower)


@pytest.mark.parametrize("free, alpha", [(1, 0.05), (2, 0.05), (5, 0.05 / 6), (7, 0.025)])
def test_the_smallest_detectable_difference_has_the_power(free: int, alpha: float) -> None:
    found = Spread(0.01, free).detectable(alpha, 0.8) / 0.01
    critical = stats.t.ppf(1 - alpha / 2, free)

    def missed(square: float) -> float:
        """Of a sum of squares: its density times the chance that the mean stays below the critical value."""
        edge = critical * math.sqrt(square / free)
        return float(stats.chi2.pdf(square, free) * (stats.norm.cdf(edge - found) - stats.norm.cdf(-edge - found)))

    power = 1 - integrate.quad(missed, 0, 1, limit=200)[0] - integrate.quad(missed, 1, math.inf, limit=200)[0]
    assert power == pytest.approx(0.8, abs=1e-5)


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
def test_means_and_spread_of_examples_against_plain_loops(weighting: Weighting) -> None:
    seeds: list[SeedScores] = [
        {"a": task(7, 1), "b": task(5, 2)},
        {"a": task(7, 3, first=4), "b": task(5, 4)},  # three examples of a in common, all of b
    ]
    found = example_spread(seeds, weighting)
    assert found.stderr**2 == pytest.approx(expected_example_variance(seeds, weighting), rel=1e-12)
    assert 4 < found.free <= 10 + 4
    sums = [(sum(each.values.tolist()), sum(each.weights.tolist())) for each in seeds[0].values()]
    by_tokens, by_task = sum(nll for nll, _ in sums) / sum(n for _, n in sums), sum(nll / n for nll, n in sums) / 2
    assert weighted_mean(seeds[0], weighting) == pytest.approx(by_tokens if weighting == "tokens" else by_task)
    one = task(30, 8, weighted=False)
    alone = example_interval({"a": one}, weighting)
    half = stats.t.ppf(0.975, 29) * stats.sem(one.values)
    assert (alone.value, alone.half_width) == pytest.approx((one.values.mean(), half), rel=1e-9)
    assert math.isnan(example_spread([{"a": task(1, 1)}], weighting).stderr)


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
    for ratio in (more.lower, more.upper):  # the t interval by the first three just holds 0
        half = stats.t.ppf(0.975, 2) * np.std(gained[:3] - ratio * lost[:3], ddof=1) / math.sqrt(len(gained))
        assert abs(float((gained - ratio * lost).mean())) == pytest.approx(half, rel=1e-9)
    assert math.isnan(ratio_interval(gained.tolist(), (lost - lost.mean() + 0.01).tolist()).lower)
    assert math.isnan(ratio_interval([1.0, 2.0], [-1.0, 1.0]).value)


def test_holm_of_a_worked_example() -> None:
    # By hand: 0.01 * 4; 0.02 * 3; 0.03 * 2 is 0.06, not below the one before; 0.2 * 1
    assert holm([0.2, 0.01, 0.03, 0.02], 4) == pytest.approx([0.2, 0.04, 0.06, 0.06])
    assert holm([0.9, 0.8], 2) == [1.0, 1.0]
    assert holm([0.02, 0.01], 4) == pytest.approx([0.06, 0.04])  # two others have no result


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.floats(0.01, 0.3))
def test_holm_rejects_what_its_definition_rejects(p_values: list[float], alpha: float) -> None:
    rejected, left = set(), sorted(range(len(p_values)), key=lambda i: p_values[i])
    while left and p_values[left[0]] * len(left) < alpha:
        rejected.add(left.pop(0))
    assert {i for i, value in enumerate(holm(p_values, len(p_values))) if value < alpha} == rejected


def test_simulated_studies_hold_the_truth_and_seldom_say_something_false(monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of benchmarks/study_nulls.py, within 3.5 standard errors of what its intervals promise."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    nulls, number = import_module("study_nulls"), 60
    found = nulls.shares(nulls.SCENARIOS["seeds and examples"], number, seed=5)
    off = 3.5 * math.sqrt(0.05 * 0.95 / number)
    assert {what: found[what] for what in nulls.INTERVALS} == pytest.approx(
        dict.fromkeys(nulls.INTERVALS, 0.95), abs=off
    )
    at_zone = nulls.Scenario(effect=nulls.ZONE, of_seed=0.005, of_example=0.02, of_run=0.01)
    said = nulls.shares(at_zone, number, seed=6, judged_alone=True)
    assert max(found["winner"], said["any_equivalent"]) <= 0.05 + off
    assert said["better"] > 0.5


VALUES = (1e-4, 3e-4, 1e-3, 3e-3)


def bowl(best: float) -> Callable[[RateRun], float]:
    return lambda run: math.log(run.rate / best) ** 2


def moved(run: RateRun) -> float:
    return bowl(1e-3 if run.length == "short" else 2e-4)(run)


def noisy(run: RateRun) -> float:
    return bowl(1e-3)(run) + (3 if run.seed == 7 else -3) * math.log(run.rate)


def diverging(run: RateRun) -> float:
    return math.inf if run.rate >= 3e-3 and run.seed == 8 and run.length == "full" else -run.rate


@pytest.mark.parametrize(
    "changes, truth, rate, is_interior, short, full",
    [
        # Short runs of all values with one seed, then full ones of the best three with both; a bowl is found exactly
        ({}, bowl(4e-4), 4e-4, True, [VALUES], [VALUES[:3]]),
        # A full run that moves the best value asks for its other neighbour
        ({}, moved, 2e-4, True, [VALUES], [VALUES[1:], VALUES[:1]]),
        # Beyond the ends the steps go on, at most twice
        ({}, bowl(1e-5), 1.11e-5, False, [VALUES, (3.33e-5,), (1.11e-5,)], [(1.11e-5, 3.33e-5)]),
        ({}, bowl(1.5e-2), 1.5e-2, True, [VALUES, (9e-3,), (2.7e-2,)], [(3e-3, 9e-3, 2.7e-2)]),
        ({"extend": 0}, bowl(1e-2), 3e-3, False, [VALUES], [VALUES[2:]]),
        # The mean over the seeds decides
        ({"steps": None}, noisy, 1e-3, True, [], [VALUES]),
        # A value that diverges with any seed is the worst and bounds the search; no parabola through infinity
        ({"steps": None}, diverging, 1e-3, True, [], [VALUES]),
        # Where everything diverges lower rates are tried, and then none is found
        ({}, lambda _: math.inf, None, False, [VALUES, (3.33e-5,), (1.11e-5,)], []),
    ],
)
def test_the_search_for_a_rate(
    changes: dict[str, Any],
    truth: Callable[[RateRun], float],
    rate: float | None,
    is_interior: bool,
    short: list[tuple[float, ...]],
    full: list[tuple[float, ...]],
) -> None:
    config = RatesConfig.model_validate({"values": VALUES, "steps": 48, "seeds": [7, 8], "extend": 2} | changes)
    done: dict[RateRun, float] = {}
    asked = []
    while not (found := search(config, done.get)).is_done:
        asked.append([run for run in found.runs if run not in done])
        assert asked[-1], "the search waits for nothing"
        done |= {run: truth(run) for run in asked[-1]}
    assert (found.rate, found.is_interior) == (rate and pytest.approx(rate, rel=1e-3), is_interior)
    expected = [[RateRun("short", rate, 7) for rate in rates] for rates in short]
    assert asked == expected + [[RateRun("full", rate, seed) for rate in rates for seed in (7, 8)] for rates in full]


def test_the_minimum_of_three_against_a_fit_of_numpy() -> None:
    rates, losses = [1e-4, 4e-4, 1e-3], [1.3, 1.0, 1.2]
    a, b, _ = np.polynomial.Polynomial.fit(np.log(rates), losses, 2).convert().coef[::-1]
    assert minimum(rates, losses) == pytest.approx(math.exp(-b / (2 * a)), rel=1e-9)
    assert minimum(rates, [1.0, 1.0, 1.0]) == 4e-4
    assert minimum([1e-4, 2e-4, 4e-4], [1.0, 1.0, 2.0]) == pytest.approx(1e-4 * math.sqrt(2))


def test_a_unigram_model_by_hand() -> None:
    counted, scored, size = [3, 3, 3, 5], [3, 5, 7, 3], 10
    counts = Counter(counted)
    nll = [-math.log((1 - UNIFORM_SHARE) * counts[token] / 4 + UNIFORM_SHARE / size) for token in scored]
    assert unigram_nll(counted, scored, size) == pytest.approx(sum(nll) / 4, rel=1e-12)
