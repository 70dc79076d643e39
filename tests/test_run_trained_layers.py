"""trained.json: how far layers have moved, against dense float64 matrices; bytes, against a count by hand."""

from __future__ import annotations

import pytest
import torch

from qdora.model.inject import adapted_layers, adapter_parameters
from qdora.run.trained_layers import held_bytes, layer_facts
from qdora.train.optimizer import AdapterOptimizer
from tests import tiny, tiny_adapted


@pytest.mark.parametrize("gated", [False, True])
def test_moved_magnitudes_and_the_size_of_the_update(gated: bool) -> None:
    layer = tiny.adapted_linear(out=24, in_=64, quant="nf4", dtype=torch.float32, alpha=7.0)
    assert layer_facts(layer) == {"rank": 3, "magnitude_moved": 0.0, "magnitude_moved_most": 0.0, "update": 0.0}
    tiny.move_all_parameters_(layer)
    gate = torch.tensor([0.5, 2.0, 0.0]) if gated else torch.ones(3)
    if gated:
        layer.add_gate()
        assert layer.gate is not None
        layer.gate.data.copy_(gate)
    assert layer.magnitude is not None
    weight = layer.base.dequantized().double()
    moved = (layer.magnitude.detach().double() / weight.norm(dim=1) - 1).abs()
    update = 7 / 3 * layer.lora_B.detach().double() @ gate.double().diag() @ layer.lora_A.detach().double()
    found = layer_facts(layer)
    assert found["magnitude_moved"] == pytest.approx(moved.mean().item(), rel=1e-4)
    assert found["magnitude_moved_most"] == pytest.approx(moved.max().item(), rel=1e-4)
    assert found["update"] == pytest.approx((update.norm() / weight.norm()).item(), rel=1e-4)


def test_rows_of_zeros_and_lora_have_no_moved_magnitude() -> None:
    layer = tiny.adapted_linear(out=4, in_=64, dtype=torch.float32)
    with torch.no_grad():
        layer.base.get_buffer("weight")[1:] = 0
        assert layer.base_squared is not None
        layer.base_squared[1:] = 0
        assert layer.magnitude is not None
        layer.magnitude[0] *= 1.5
        layer.magnitude[1:] = 9.0
    assert layer_facts(layer)["magnitude_moved_most"] == pytest.approx(0.5, rel=1e-5)
    lora = tiny.adapted_linear(kind="lora", dtype=torch.float32)
    assert layer_facts(lora) == {"rank": 3, "magnitude_moved": None, "magnitude_moved_most": None, "update": None}


def test_bytes_by_component() -> None:
    model = tiny_adapted.adapted("qwen2", quant="nf4", rank=2)
    parameters = adapter_parameters(model)
    found = held_bytes(model, AdapterOptimizer(parameters, name="adamw"))
    hidden, inner, heads, narrow, vocabulary = 32, 48, 32, 16, 336
    shapes = [(heads, hidden), (narrow, hidden), (narrow, hidden), (hidden, heads)]
    shapes += [(inner, hidden), (inner, hidden), (hidden, inner)]
    assert len(adapted_layers(model)) == 2 * len(shapes)
    weights = 2 * sum(out * in_ for out, in_ in shapes)
    rows, columns = (2 * sum(shape[side] for shape in shapes) for side in (0, 1))
    factors = 2 * (rows + columns)  # rank 2
    assert found["packed base"] == weights / 2
    assert found["adapters"] == 2 * factors + 4 * rows + 4 * rows  # bf16 factors, magnitudes, ||w||^2
    assert found["gradients"] == 4 * (factors + rows)
    # Two float32 averages, a float32 count for each tensor, and the low 16 bits of bf16 factors
    assert found["optimizer state"] == 8 * (factors + rows) + 4 * len(parameters) + 2 * factors
    biases, norms, rotary = 2 * (heads + 2 * narrow), 5 * hidden, 4
    floats = 2 * vocabulary * hidden + biases + norms
    assert found["embeddings, head, norms"] - 4 * floats in (4 * rotary, 8 * rotary)  # older releases keep a copy
    # A byte for each block of 64; for each layer one scale of these, its offset, and a code book of 256 values
    assert found["block scales"] == weights / 64 + 14 * 4 * (1 + 1 + 256)
    assert set(found) == {"packed base", "block scales", "embeddings, head, norms", "adapters", "optimizer state"} | {
        "gradients"
    }
