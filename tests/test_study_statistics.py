"""Numbers of a study against scipy and simulated truths: intervals, tests, Holm, the search for rates.

Those of examples, and what can be detected, are computed anew in test_study_scores.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from qdora.study.grid import RateRun, RatesConfig, minimum, search
from qdora.study.statistics import holm, ratio_interval, seed_spread, t_interval


@pytest.mark.parametrize("number, shift", [(2, 0.0), (3, 0.015), (8, -0.015), (6, 0.03)])
def test_intervals_and_p_values_over_seeds_are_students(number: int, shift: float) -> None:
    values = np.random.default_rng(number).normal(shift, 0.01, number)
    theirs = stats.ttest_1samp(values, 0.0)
    low, high = theirs.confidence_interval(0.95)
    found, spread = t_interval(values.tolist()), seed_spread(values.tolist())
    assert (found.value, found.lower, found.upper) == pytest.approx((values.mean(), low, high), rel=1e-12)
    assert spread.half_width == pytest.approx((high - low) / 2, rel=1e-12)
    assert spread.p(found.value) == pytest.approx(theirs.pvalue, rel=1e-12)
    below = stats.ttest_1samp(values, -0.02, alternative="greater").pvalue
    above = stats.ttest_1samp(values, 0.02, alternative="less").pvalue
    assert spread.p_equivalent(found.value, 0.02) == pytest.approx(max(below, above), rel=1e-9)


def test_a_single_seed_has_no_interval_and_without_spread_the_value_alone_decides() -> None:
    found = t_interval([1.5])
    assert found.value == 1.5
    assert all(map(math.isnan, (found.lower, found.upper, seed_spread([1.5]).p(1.5), ratio_interval([1], [2]).upper)))
    none = seed_spread([0.1, 0.1])
    assert (none.p(0.1), none.p(0.0), none.detectable(0.05, 0.8)) == (0.0, 1.0, 0.0)
    assert (none.p_equivalent(0.1, 0.2), none.p_equivalent(0.1, 0.05)) == (0.0, 1.0)


def test_the_first_seeds_alone_may_tell_the_spread() -> None:
    """Stein's two-stage procedure (1945)."""
    values = np.random.default_rng(0).normal(size=6).tolist()
    spread = seed_spread(values, 3)
    assert (spread.stderr, spread.free) == (pytest.approx(np.std(values[:3], ddof=1) / math.sqrt(6), rel=1e-12), 2)
    half = stats.t.ppf(0.975, 2) * spread.stderr
    assert t_interval(values, num_first=3).upper == pytest.approx(np.mean(values) + half, rel=1e-12)
    assert math.isnan(t_interval(values, num_first=1).lower)


def test_the_interval_of_a_ratio_is_fiellers() -> None:
    draw = np.random.default_rng(15)
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
    assert holm([0.01, 0.01], 2) == pytest.approx([0.02, 0.02])


def test_simulated_studies_hold_the_truth_and_seldom_say_something_false(monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of benchmarks/study_nulls.py, within 3.5 standard errors of what its intervals promise."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    nulls, number = import_module("study_nulls"), 60
    found = nulls.shares(nulls.Scenario(), number, seed=5)
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
    return math.inf if run.rate >= 3e-3 and run.seed == 8 else -run.rate


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
