"""Ranks under a budget, errors undone and changes of weights, against loops and against all possible choices."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qdora.errors import UserError
from qdora.model.inject import adapted_layers
from qdora.rank.allocate import LayerSpectrum, allocate, effective_rank
from qdora.rank.error_undone import error_undone
from qdora.rank.weight_changes import set_magnitude_back_, weight_changes
from tests import reference, support


def spectrum(energies, cost=1, total=None):
    return LayerSpectrum(np.array(energies), sum(energies) if total is None else total, cost)


def held(layers, ranks):
    return sum(float(layers[name].energies[:rank].sum()) for name, rank in ranks.items())


def best_by_trying(layers, budget):
    found = [-1.0]
    for ranks in itertools.product(*(range(1, len(each.energies) + 1) for each in layers.values())):
        named = dict(zip(layers, ranks, strict=True))
        if sum(rank * layers[name].cost for name, rank in named.items()) <= budget:
            found.append(held(layers, named))
    return max(found)


LAYERS = st.lists(
    st.tuples(st.integers(1, 9), st.lists(st.one_of(st.integers(0, 6), st.floats(0, 9)), min_size=1, max_size=5)),
    min_size=1,
    max_size=5,
)


@settings(max_examples=150, deadline=None)
@given(LAYERS, st.integers(0, 60))
def test_no_other_ranks_hold_more(drawn, spare):
    layers = {
        str(place): spectrum(sorted(map(float, values), reverse=True), cost)
        for place, (cost, values) in enumerate(drawn)
    }
    budget = sum(each.cost for each in layers.values()) + spare
    ranks = allocate(layers, budget)
    assert list(ranks) == list(layers)
    assert sum(rank * layers[name].cost for name, rank in ranks.items()) <= budget
    assert all(1 <= rank <= len(layers[n].energies) for n, rank in ranks.items())
    assert all(rank == 1 or layers[name].energies[rank - 1] > 0 for name, rank in ranks.items())
    assert held(layers, ranks) == pytest.approx(best_by_trying(layers, budget), rel=1e-12, abs=1e-12)


def test_a_model_of_many_layers_in_a_moment():
    generator = np.random.default_rng(0)
    costs = (8192, 5120, 8192 + 6816, 12289)
    layers = {
        str(place): spectrum(sorted(generator.exponential(size=64) ** 4, reverse=True), costs[place % 4])
        for place in range(224)
    }
    budget = sum(16 * each.cost for each in layers.values())
    ranks = allocate(layers, budget)
    assert budget - min(costs) < sum(rank * layers[name].cost for name, rank in ranks.items()) <= budget
    # What one budget level gives in every layer at once encloses the result.
    densities = np.sort(np.concatenate([each.energies / each.cost for each in layers.values()]))
    for level in densities[::64]:
        even = {name: max(1, int((each.energies / each.cost >= level).sum())) for name, each in layers.items()}
        if sum(rank * layers[name].cost for name, rank in even.items()) <= budget:
            assert held(layers, ranks) >= held(layers, even) - 1e-9


@pytest.mark.parametrize(
    ("energies", "total", "threshold", "rank"),
    [
        ([5.0, 3.0, 1.0, 1.0], None, 0.8, 2),
        ([5.0, 3.0, 1.0, 1.0], None, 0.81, 3),
        ([5.0, 3.0, 1.0, 1.0], None, 1.0, 4),
        ([5.0, 3.0], 10.0, 0.9, None),
        ([0.0, 0.0], None, 0.9, 1),
    ],
)
def test_effective_rank(energies, total, threshold, rank):
    assert effective_rank(spectrum(energies, total=total), threshold) == rank


def test_what_is_refused():
    with pytest.raises(UserError, match=r"12 parameters .* got 10\."):
        allocate({"a": spectrum([1.0], 5), "b": spectrum([1.0], 7)}, 10)
    for energies in ([], [1.0, 2.0], [1.0, -1.0], [float("nan")]):
        with pytest.raises(ValueError, match="never rise"):
            LayerSpectrum(np.array(energies), 1.0, 1)


# ------------------------------------------------------------------------------------------------ weights


def matrices(rows, columns):
    """Merged, base and dense weight, of which the update takes back a part of the error."""
    generator = torch.Generator().manual_seed(0)
    dense, error, noise = (torch.randn(rows, columns, generator=generator) for _ in range(3))
    return dense + 0.07 * error + 0.02 * noise, dense + 0.1 * error, dense


@pytest.mark.parametrize("rows, columns, rank", [(13, 7, 3), (5, 11, 1), (4, 4, 9)])
def test_the_error_that_an_update_undoes_against_loops(rows, columns, rank):
    merged, base, dense = matrices(rows, columns)
    found = error_undone(merged - base, base - dense, rank)
    wanted = reference.error_undone(*(each.double().numpy() for each in (merged, base, dense)), rank)
    assert found is not None
    assert (found.undone, found.undone_best, found.cosine) == pytest.approx(wanted, rel=1e-4)
    # Each expert of a stack has the rank.
    error = torch.stack([base - dense, 3 * (dense - base)])
    stacked = error_undone(torch.stack([merged - base, merged - base]), error, rank)
    assert stacked is not None
    assert stacked.undone_best == pytest.approx(wanted[1], rel=1e-4)


def test_the_best_matrix_of_a_rank_undoes_what_it_is_said_to():
    _, base, dense = matrices(9, 12)
    error = (base - dense).double()
    left, values, right = np.linalg.svd(error.numpy())
    found = error_undone(torch.tensor(-(left[:, :3] * values[:3]) @ right[:3]), error, 3)
    assert found is not None
    best = float((values[:3] ** 2).sum() / (values**2).sum())
    assert (found.undone, found.undone_best, found.cosine) == pytest.approx((best, best, math.sqrt(best)), rel=1e-6)
    whole, still = error_undone(-error, error, 9), error_undone(error * 0, error, 9)
    assert whole is not None
    assert (whole.undone, whole.undone_best, whole.cosine) == pytest.approx((1.0, 1.0, 1.0), rel=1e-5)
    assert still is not None
    assert (still.undone, still.cosine) == (0.0, 0.0)
    assert error_undone(base, torch.zeros(9, 12), 2) is None


@pytest.mark.parametrize("kind", ["dora", "lora"])
def test_changes_of_rows_against_loops_and_magnitudes_set_back(kind):
    layers = adapted_layers(support.adapted_model(quant="nf4", kind=kind))
    name = next(iter(layers))
    before = weight_changes(layers)
    assert set(before) == set(layers)
    directions, magnitudes, lengths = [], [], []
    base = layers[name].base.dequantized(torch.float64).tolist()
    for w, v in zip(base, support.expected_weight(layers[name]).tolist(), strict=True):
        norms = [math.sqrt(sum(value**2 for value in row)) for row in (w, v)]
        directions.append(1 - sum(a * b for a, b in zip(w, v, strict=True)) / norms[0] / norms[1])
        magnitudes.append(abs(norms[1] / norms[0] - 1))
        lengths.append(abs(norms[1] - norms[0]))
    found = before[name]
    wanted = [sum(each) / len(each) for each in (directions, magnitudes, lengths)]
    assert [found.direction, found.magnitude, found.length] == pytest.approx(wanted, rel=1e-3)
    assert min(found.direction, found.magnitude) > 1e-4
    if kind == "lora":
        return
    for layer in layers.values():
        layer.gain(torch.float32)  # which is kept until the parameters change
        set_magnitude_back_(layer)
    after = weight_changes(layers)
    for name, layer in layers.items():
        assert after[name].direction == pytest.approx(before[name].direction, rel=1e-3)
        assert after[name].magnitude < 1e-5 < before[name].magnitude
        rows, base_rows = layer.merged_weight().norm(dim=1), layer.base.dequantized().norm(dim=1)
        torch.testing.assert_close(rows, base_rows, rtol=1e-5, atol=1e-6)
