"""Hard-concrete gates, the budget, the proximal step and the projection, each against its definition."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize, minimize_scalar

from qdora.ops import gate as hard_concrete
from qdora.train import gates


def wide(values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def drawn(log_alpha: float, u: float) -> float:
    """arXiv 1712.01312, eq. 10 and 11, with numbers of its section 4."""
    s = 1 / (1 + math.exp(-(math.log(u) - math.log(1 - u) + log_alpha) / (2 / 3)))
    return min(1.0, max(0.0, s * 1.2 - 0.1))


def test_hard_concrete_values_slopes_and_probabilities() -> None:
    generator = np.random.default_rng(0)
    for log_alpha in (-5.0, -1.0, 0.0, 0.3, 2.5, 6.0):
        u = generator.uniform(1e-4, 1 - 1e-4, 400)
        values = [drawn(log_alpha, each) for each in u]
        la = torch.full((400,), log_alpha, dtype=torch.float64)
        got = hard_concrete.gate_value(la, torch.tensor(u))
        np.testing.assert_allclose(got.numpy(), values, rtol=1e-10, atol=1e-14)
        slopes = [(drawn(log_alpha + 1e-6, each) - drawn(log_alpha - 1e-6, each)) / 2e-6 for each in u]
        np.testing.assert_allclose(hard_concrete.gate_slope(la, torch.tensor(u)).numpy(), slopes, atol=1e-7)
        # z > 0 where u is above the one u at which s = 1 / 12
        edge = 1 / (1 + math.exp(log_alpha - (2 / 3) * math.log(1 / 11)))
        assert drawn(log_alpha, edge * (1 - 1e-6)) == 0.0 < drawn(log_alpha, edge * (1 + 1e-6))
        assert float(hard_concrete.probability_on(la)[0]) == pytest.approx(1 - edge, rel=1e-9)


def test_the_deterministic_gate_is_exactly_0_and_1_at_its_ends() -> None:
    on = math.log((1.0 - hard_concrete.GAMMA) / (hard_concrete.ZETA - 1.0))  # from here on the gate is exactly 1
    off = -on
    log_alpha = wide([off - 1e-6, off + 1e-3, 0.0, on - 1e-3, on + 1e-6])
    values = hard_concrete.gate_value(log_alpha).tolist()
    assert [values[0], values[2], values[4]] == [0.0, pytest.approx(0.5), 1.0]
    assert 0.0 < values[1] < 1e-3
    assert 1.0 - 1e-3 < values[3] < 1.0


def test_the_budget_is_full_in_warm_up_and_falls_to_its_end() -> None:
    found = [gates.allowed_cost(step, 100, 20, 4, 10) for step in range(20)]
    assert found[:5] == [100] * 5
    assert found[9] == 20 + 80 * 0.5**3
    assert found[14:] == [20] * 6
    assert found == sorted(found, reverse=True)


CASES = st.lists(
    st.tuples(st.integers(0, 3), st.floats(0, 1), st.booleans(), st.integers(1, 5)), min_size=1, max_size=14
)


@given(CASES, st.floats(0, 60))
@settings(max_examples=200, deadline=None)
def test_surplus_takes_the_lowest_until_the_rest_fits(
    components: list[tuple[int, float, bool, int]], allowed: float
) -> None:
    layer = torch.tensor([each[0] for each in components])
    order, cost = wide([each[1] for each in components]), wide([float(each[3]) for each in components])
    alive = torch.tensor([each[2] for each in components])
    going = gates.surplus(order, cost, layer, alive, allowed)
    assert not (going & ~alive).any()
    kept = alive & ~going
    for number in set(layer.tolist()):
        living = ((layer == number) & alive).nonzero().squeeze(1).tolist()
        if living:
            assert kept[max(living, key=lambda index: float(order[index]))], "the best of a layer stays"
    # One after the other, from the lowest of those that may go, as long as the rest is too much
    best = {
        max(((layer == n) & alive).nonzero().squeeze(1).tolist(), key=lambda index: float(order[index]))
        for n in set(layer[alive].tolist())
    }
    left, expected = float(cost[alive].sum()), set()
    for index in sorted(set(alive.nonzero().squeeze(1).tolist()) - best, key=lambda i: (float(order[i]), i)):
        if left <= allowed:
            break
        left -= float(cost[index])
        expected.add(index)
    assert set(going.nonzero().squeeze(1).tolist()) == expected


def test_the_proximal_step_is_the_minimum_in_adams_metric() -> None:
    generator = np.random.default_rng(1)
    values, sizes = generator.normal(size=30), generator.uniform(0.01, 2.0, 30)
    cost = generator.uniform(0.5, 3.0, 30)
    penalty = 0.4
    chosen = torch.arange(30) % 3 != 0
    got = gates.proximal_step(torch.tensor(values), torch.tensor(sizes), torch.tensor(cost), penalty, chosen)
    for index in range(30):
        c, p, w = values[index], sizes[index], cost[index]

        def objective(z: float, c: float = c, p: float = p, w: float = w) -> float:
            return penalty * w * abs(z) + (z - c) ** 2 / (2 * p)

        ends = sorted((0.0, c * 1.5))
        expected = minimize_scalar(objective, bounds=ends, method="bounded", options={"xatol": 1e-10}).x
        best = 0.0 if objective(0.0) <= objective(expected) else expected
        assert float(got[index]) == pytest.approx(best if chosen[index] else c, abs=1e-6)


def test_a_component_dies_at_its_penalty_and_no_earlier() -> None:
    values, sizes, cost = wide([0.5, -2.0, 1.0]), wide([0.1, 0.2, 3.0]), wide([1.0, 2.0, 1.0])
    deaths = gates.death_penalty(values, sizes, cost)
    everything = torch.ones(3, dtype=torch.bool)
    for index, penalty in enumerate(deaths.tolist()):
        above = gates.proximal_step(values, sizes, cost, penalty * (1 + 1e-9), everything)
        below = gates.proximal_step(values, sizes, cost, penalty * (1 - 1e-6), everything)
        assert above[index] == 0
        assert below[index] != 0


def test_the_worth_of_a_component_does_not_depend_on_how_gate_and_factors_share_its_size() -> None:
    """A gate divided by t has a gradient t times as large, so Adam's sqrt(v) is, too."""
    value, gradient = wide([0.8]), wide([0.03])
    found = [gates.death_penalty(value / t, 0.01 / (gradient * t).abs(), wide([1.0])) for t in (1.0, 10.0, 1e-3)]
    assert found[0].item() == pytest.approx(found[1].item())
    assert found[0].item() == pytest.approx(found[2].item())


def test_the_shift_is_the_nearest_distribution_that_keeps_the_budget() -> None:
    """Against a constrained minimisation of the KL divergence between the on-probabilities."""
    log_alpha, cost = wide([-1.0, 0.5, 2.0, -0.2]), wide([1.0, 2.0, 1.5, 0.5])
    alive = torch.tensor([True, True, True, False])
    p = hard_concrete.probability_on(log_alpha)[:3].numpy()
    w = cost[:3].numpy()
    allowed = 1.7
    found = gates.shifted_to_budget(log_alpha, cost, alive, allowed)
    q = hard_concrete.probability_on(found)[:3].numpy()
    assert float((q * w).sum()) == pytest.approx(allowed, abs=1e-9)
    assert found[3] == log_alpha[3]

    def divergence(x: np.ndarray) -> float:
        return float((x * np.log(x / p) + (1 - x) * np.log((1 - x) / (1 - p))).sum())

    best = minimize(
        divergence, p, bounds=[(1e-6, 1 - 1e-6)] * 3, constraints={"type": "eq", "fun": lambda x: x @ w - allowed}
    )
    np.testing.assert_allclose(q, best.x, atol=1e-3)


@pytest.mark.parametrize("allowed", [0.0, 100.0])
def test_a_shift_that_cannot_reach_its_budget_ends_at_the_largest_logit(allowed: float) -> None:
    found = gates.shifted_to_budget(wide([0.3, -2.0]), wide([1.0, 1.0]), torch.tensor([True, True]), allowed)
    assert found.abs().tolist() == [gates.LARGEST_LOGIT] * 2
