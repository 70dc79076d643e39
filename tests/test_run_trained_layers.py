"""trained.json: how far layers have moved, against dense float64 matrices."""

from __future__ import annotations

import pytest
import torch

from qdora.run.trained_layers import layer_facts
from tests import tiny


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
