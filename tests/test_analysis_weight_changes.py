"""Changes of directions and magnitudes against plain loops in float64."""

from __future__ import annotations

import math

import pytest
import torch

from qdora.analysis.weight_changes import set_magnitude_back_, weight_changes
from qdora.model.inject import adapted_layers
from qdora.ops.tiles import dense_weight
from tests import tiny_adapted


@pytest.mark.parametrize("kind", ["dora", "lora"])
def test_changes_of_rows_against_loops(kind: str) -> None:
    layers = adapted_layers(tiny_adapted.adapted(quant="nf4", kind=kind))
    name = next(iter(layers))
    found = weight_changes(layers)
    assert set(found) == set(layers)
    base = dense_weight(layers[name].base.stored_weight, torch.float64).tolist()
    directions, magnitudes, lengths = [], [], []
    for w, v in zip(base, tiny_adapted.expected_weight(layers[name]).tolist(), strict=True):
        norms = [math.sqrt(sum(value**2 for value in row)) for row in (w, v)]
        directions.append(1 - sum(a * b for a, b in zip(w, v, strict=True)) / norms[0] / norms[1])
        magnitudes.append(abs(norms[1] / norms[0] - 1))
        lengths.append(abs(norms[1] - norms[0]))
    assert found[name].direction == pytest.approx(sum(directions) / len(directions), rel=1e-3)
    assert found[name].magnitude == pytest.approx(sum(magnitudes) / len(magnitudes), rel=1e-3)
    assert found[name].length == pytest.approx(sum(lengths) / len(lengths), rel=1e-3)
    assert min(found[name].direction, found[name].magnitude) > 1e-4


def test_magnitudes_set_back_leave_the_directions() -> None:
    layers = adapted_layers(tiny_adapted.adapted(quant="nf4"))
    before = weight_changes(layers)
    for layer in layers.values():
        layer.gain(torch.float32)  # which is kept until the parameters change
    for layer in layers.values():
        set_magnitude_back_(layer)
    after = weight_changes(layers)
    for name, layer in layers.items():
        assert after[name].direction == pytest.approx(before[name].direction, rel=1e-3)
        assert after[name].magnitude < 1e-5 < before[name].magnitude
        rows = layer.merged_weight(torch.float32).norm(dim=1)
        base = dense_weight(layer.base.stored_weight, torch.float32).norm(dim=1)
        torch.testing.assert_close(rows, base, rtol=1e-5, atol=1e-6)
