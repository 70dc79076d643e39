"""Ranks under a budget, against all possible ones."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qdora.analysis.allocate import LayerSpectrum, allocate, effective_rank
from qdora.errors import UserError


def spectrum(energies: list[float], cost: int = 1, total: float | None = None) -> LayerSpectrum:
    return LayerSpectrum(np.array(energies), sum(energies) if total is None else total, cost)


def best_by_trying(layers: dict[str, LayerSpectrum], budget: int) -> float:
    choices = [range(1, len(each.energies) + 1) for each in layers.values()]
    best = -1.0
    for ranks in itertools.product(*choices):
        cost = sum(rank * each.cost for rank, each in zip(ranks, layers.values(), strict=True))
        if cost <= budget:
            best = max(best, sum(sum(each.energies[:rank]) for rank, each in zip(ranks, layers.values(), strict=True)))
    return best


LAYERS = st.lists(
    st.tuples(st.integers(1, 9), st.lists(st.one_of(st.integers(0, 6), st.floats(0, 9)), min_size=1, max_size=5)),
    min_size=1,
    max_size=5,
)


@settings(max_examples=150, deadline=None)
@given(LAYERS, st.integers(0, 60))
def test_no_other_ranks_hold_more(drawn: list[tuple[int, list[float]]], spare: int) -> None:
    layers = {
        str(place): spectrum(sorted(map(float, values), reverse=True), cost)
        for place, (cost, values) in enumerate(drawn)
    }
    budget = sum(each.cost for each in layers.values()) + spare
    ranks = allocate(layers, budget)
    assert list(ranks) == list(layers)
    assert sum(rank * layers[name].cost for name, rank in ranks.items()) <= budget
    assert all(1 <= rank <= len(layers[n].energies) for n, rank in ranks.items())
    held = sum(float(layers[name].energies[:rank].sum()) for name, rank in ranks.items())
    assert held == pytest.approx(best_by_trying(layers, budget), rel=1e-12, abs=1e-12)


def test_where_the_densest_components_are_not_the_best() -> None:
    layers = {"dense": spectrum([9.0, 7.0], 6), "wide": spectrum([9.0, 5.0, 5.0], 5)}
    assert allocate(layers, 6 + 5 + 10) == {"dense": 1, "wide": 3}


def test_a_model_of_many_layers_in_a_moment() -> None:
    generator = np.random.default_rng(0)
    costs = (8192, 5120, 8192 + 6816, 12289)
    layers = {
        str(place): spectrum(sorted(generator.exponential(size=64) ** 4, reverse=True), costs[place % 4])
        for place in range(224)
    }
    budget = sum(16 * each.cost for each in layers.values())
    ranks = allocate(layers, budget)
    used = sum(rank * layers[name].cost for name, rank in ranks.items())
    assert budget - min(costs) < used <= budget
    # What one budget level gives in every layer at once, and the level above it, enclose the result.
    densities = np.sort(np.concatenate([each.energies / each.cost for each in layers.values()]))
    held = sum(float(layers[name].energies[:rank].sum()) for name, rank in ranks.items())
    for level in densities[::64]:
        even = {name: max(1, int((each.energies / each.cost >= level).sum())) for name, each in layers.items()}
        if sum(rank * layers[name].cost for name, rank in even.items()) <= budget:
            assert held >= sum(float(layers[name].energies[:rank].sum()) for name, rank in even.items()) - 1e-9


def test_too_small_a_budget_names_the_least() -> None:
    with pytest.raises(UserError, match=r"must be at least 12 parameters for rank 1 everywhere, got 10\."):
        allocate({"a": spectrum([1.0], 5), "b": spectrum([1.0], 7)}, 10)


def test_effective_rank() -> None:
    assert effective_rank(spectrum([5.0, 3.0, 1.0, 1.0]), 0.8) == 2
    assert effective_rank(spectrum([5.0, 3.0, 1.0, 1.0]), 0.81) == 3
    assert effective_rank(spectrum([5.0, 3.0, 1.0, 1.0]), 1.0) == 4
    assert effective_rank(spectrum([5.0, 3.0], total=10.0), 0.9) is None
    assert effective_rank(spectrum([0.0, 0.0]), 0.9) == 1


@pytest.mark.parametrize("energies", [[], [1.0, 2.0], [1.0, -1.0], [float("nan")]])
def test_what_is_no_spectrum(energies: list[float]) -> None:
    with pytest.raises(ValueError, match="never rise"):
        LayerSpectrum(np.array(energies), 1.0, 1)
