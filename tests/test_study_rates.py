"""The search for learning rates: which runs it asks for, what it finds, and what it says of edges and divergence."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from qdora.study.grid import RatesConfig
from qdora.study.rates import RateRun, Search, minimum, search

VALUES = (1e-4, 3e-4, 1e-3, 3e-3)


def config(**changes: Any) -> RatesConfig:
    return RatesConfig.model_validate({"values": VALUES, "steps": 48, "seeds": [7, 8], "extend": 2} | changes)


def played(settings: RatesConfig, truth: Callable[[RateRun], float]) -> tuple[Search, list[list[RateRun]]]:
    """The search to its end, and the runs that each look at it asked for anew."""
    done: dict[RateRun, float] = {}
    asked = []
    while not (found := search(settings, done.get)).is_done:
        new = [run for run in found.runs if run not in done]
        assert new, "the search waits for nothing"
        asked.append(new)
        done |= {run: truth(run) for run in new}
    return found, asked


def bowl(best: float) -> Callable[[RateRun], float]:
    return lambda run: math.log(run.rate / best) ** 2


def test_short_runs_of_all_values_and_full_runs_of_the_best_three() -> None:
    found, asked = played(config(), bowl(4e-4))
    assert asked[0] == [RateRun("short", rate, 7) for rate in VALUES]
    assert asked[1] == [RateRun("full", rate, seed) for rate in VALUES[:3] for seed in (7, 8)]
    assert len(asked) == 2
    assert found.is_interior
    assert found.rate == pytest.approx(4e-4, rel=1e-3)  # a bowl in ln(rate) is found exactly


def test_a_full_run_that_moves_the_best_value_asks_for_its_other_neighbour() -> None:
    def truth(run: RateRun) -> float:
        return bowl(1e-3 if run.length == "short" else 2e-4)(run)

    found, asked = played(config(), truth)
    assert {run.rate for run in asked[1]} == set(VALUES[1:])
    assert {run.rate for run in asked[2]} == {VALUES[0]}
    assert (found.is_interior, found.rate) == (True, pytest.approx(2e-4, rel=1e-3))


@pytest.mark.parametrize("best, more", [(1e-5, [3.33e-5, 1.11e-5, 3.33e-5]), (1.5e-2, [9e-3, 2.7e-2])])
def test_beyond_the_ends_the_steps_go_on(best: float, more: list[float]) -> None:
    found, asked = played(config(), bowl(best))
    beyond = {run.rate for runs in asked for run in runs} - set(VALUES)
    assert beyond == set(more)
    if best < 1e-4:  # 1.11e-5 is the last one below, and the best
        assert not found.is_interior
        assert found.rate == pytest.approx(1.11e-5)
    else:
        assert found.is_interior
        assert found.rate == pytest.approx(best, rel=1e-3)


def test_without_more_values_an_edge_is_told() -> None:
    found, _ = played(config(extend=0), bowl(1e-2))
    assert (found.rate, found.is_interior) == (3e-3, False)


def test_the_mean_over_the_seeds_decides_and_noise_of_one_does_not() -> None:
    def truth(run: RateRun) -> float:
        return bowl(1e-3)(run) + (3 * math.log(run.rate) if run.seed == 7 else -3 * math.log(run.rate))

    found, _ = played(config(steps=None), truth)
    assert found.rate == pytest.approx(1e-3, rel=1e-3)


def test_a_value_that_diverges_with_any_seed_is_the_worst_and_bounds_the_search() -> None:
    def truth(run: RateRun) -> float:
        return math.inf if run.rate >= 3e-3 and run.seed == 8 and run.length == "full" else -run.rate

    found, _ = played(config(), truth)
    assert found.rate == 1e-3  # no parabola through infinity
    assert found.is_interior
    assert found.losses["full", 3e-3] == math.inf


def test_where_everything_diverges_lower_rates_are_tried_and_then_none_is_found() -> None:
    found, asked = played(config(), lambda _: math.inf)
    assert (found.rate, found.is_done, found.is_interior) == (None, True, False)
    assert [min(run.rate for run in runs) for runs in asked] == [1e-4, 3.33e-5, 1.11e-5]


def test_the_minimum_of_three_against_a_fit_of_numpy() -> None:
    rates, losses = [1e-4, 4e-4, 1e-3], [1.3, 1.0, 1.2]
    a, b, _ = np.polynomial.Polynomial.fit(np.log(rates), losses, 2).convert().coef[::-1]
    assert minimum(rates, losses) == pytest.approx(math.exp(-b / (2 * a)), rel=1e-9)
    assert minimum(rates, [1.0, 1.0, 1.0]) == 4e-4
    assert minimum([1e-4, 2e-4, 4e-4], [1.0, 1.0, 2.0]) == pytest.approx(1e-4 * math.sqrt(2))
