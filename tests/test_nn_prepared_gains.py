"""Norms, gains and operands of many layers at once are those that each layer makes for itself."""

from __future__ import annotations

from typing import Any

import bitsandbytes  # noqa: F401  (registers the kernels whose results a plan counts)
import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from qdora.nn import prepared_gains
from qdora.nn.adapted_linear import AdaptedLinear
from qdora.nn.frozen_linear import FrozenLinear
from qdora.nn.prepared_gains import prepare_gains
from qdora.ops import low_rank_factors
from qdora.ops.packed import empty_packed, quantize
from qdora.ops.planned_device import planned_on
from qdora.plan.live_bytes import LiveBytes
from tests import reference, tiny
from tests.test_ops_adapted_product import arrays, to_numpy

# Of three shapes; the last one alone keeps float32 adapters.
LAYERS: list[dict[str, Any]] = [
    {"in_": 64, "seed": 1},
    {"in_": 64, "seed": 2},
    {"in_": 64, "seed": 3},
    {"in_": 128, "seed": 4},
    {"in_": 128, "seed": 5},
    {"in_": 128, "seed": 6, "dtype": torch.float32},
]


def layers_of(quant: str, **options: Any) -> list[AdaptedLinear]:
    """Trained layers that have run once and then have other parameters."""
    layers = []
    for each in LAYERS:
        kind = quant.removesuffix(" nested") if quant != "none" else None
        layer = tiny.adapted_linear(**{"quant": kind, "dtype": torch.bfloat16} | each | options)
        if quant.endswith("nested"):
            weight = layer.base.dequantized(torch.float32)
            layer.base = FrozenLinear(quantize(weight, "nf4", 64, double_quant=True))
            layer.base_squared = layer.base.squared_row_norm()
        layer(torch.ones(2, layer.in_features, dtype=torch.bfloat16))
        tiny.move_all_parameters_(layer)
        layers.append(layer)
    return layers


def tensors(value: Any) -> list[Tensor]:
    """Those in nested tuples, in order."""
    if isinstance(value, tuple):
        return [tensor for each in value for tensor in tensors(each)]
    return [value] if isinstance(value, Tensor) else []


@pytest.mark.parametrize("quant", ["nf4", "nf4 nested", "int8", "none"])
@pytest.mark.parametrize("case", ["plain", "gated", "dropout", "one at a time", "float64"])
def test_they_are_those_of_each_layer(monkeypatch: pytest.MonkeyPatch, quant: str, case: str) -> None:
    layers = layers_of(quant, dropout=0.25 if case == "dropout" else 0.0)
    if case == "gated":
        for layer in layers:
            layer.add_gate()
            assert layer.gate is not None
            layer.gate.data.copy_(torch.linspace(0.3, 1.7, layer.rank))
    if case == "one at a time":
        monkeypatch.setattr(prepared_gains, "entries_at_a_time", lambda _: 1)
    dtype = torch.bfloat16
    if case == "float64":
        dtype = torch.float64
        for layer in layers:
            layer.double()(torch.ones(2, layer.in_features, dtype=dtype))
            tiny.move_all_parameters_(layer)
    assert prepare_gains(layers) == len(layers)
    for layer in layers:
        together = layer.operands(dtype)
        assert together is not None
        assert together.gain is layer.gain(dtype)
        layer.parameters_changed()
        alone = layer.operands(dtype)
        found, expected = tensors(together), tensors(alone)
        assert [each.shape for each in found] == [each.shape for each in expected]
        for one, other in zip(found, expected, strict=True):
            assert one.dtype == other.dtype
            np.testing.assert_allclose(to_numpy(one), to_numpy(other), rtol=1e-6 if one.dtype.itemsize > 2 else 1e-2)
        of_layer = arrays(layer)
        gate = 1.0 if layer.gate is None else to_numpy(layer.gate)
        weight, a, scaling = (of_layer[name] for name in ("weight", "lora_a", "scaling"))
        norms = reference.row_norm(weight, a, of_layer["lora_b"] * gate, scaling)
        assert layer.magnitude is not None
        np.testing.assert_allclose(to_numpy(together.gain.value) * norms, to_numpy(layer.magnitude), rtol=2e-2)


def test_factors_are_scaled_a_slice_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slice of 16 entries is five rows of rank 3, of one or of several layers."""
    entries, plain = [], low_rank_factors.scaled_rows

    def seen(values: Tensor, *given: Any) -> Tensor:
        entries.append(values.numel())
        return plain(values, *given)

    layers = layers_of("nf4")
    monkeypatch.setattr(low_rank_factors, "entries_at_a_time", lambda _: 16)
    monkeypatch.setattr(low_rank_factors, "scaled_rows", seen)
    assert prepare_gains(layers) == len(layers)
    assert max(entries) == 15


def test_what_is_made_takes_the_place_of_what_it_follows() -> None:
    """At most a tile of a weight, and the factors of a group, are there beside the values of one state."""
    size, rank = 2048, 1
    with planned_on("cuda"), FakeTensorMode(), LiveBytes() as live:
        bases = [FrozenLinear(empty_packed("nf4", (size, size), 64, double_quant=True)) for _ in range(64)]
        layers = [AdaptedLinear(base, rank=rank, dtype=torch.bfloat16) for base in bases]
        before = live.live_bytes
        for layer in layers:
            layer.operands(torch.bfloat16)
            torch.autograd.graph.increment_version(list(layer.parameters()))
        kept = live.live_bytes - before
        live.reset_peak()
        assert prepare_gains(layers) == len(layers)
        assert live.live_bytes == before + kept
        assert live.peak_bytes < before + kept + 1.5 * 2 * size * size


def test_layers_alike_are_computed_together(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    compute = prepared_gains.factored_norms

    def counting(weights: Any, *args: Any, **options: Any) -> Any:
        calls.append(len(weights))
        return compute(weights, *args, **options)

    monkeypatch.setattr(prepared_gains, "factored_norms", counting)
    prepare_gains(layers_of("nf4"))
    assert sorted(calls) == [1, 2, 3]
    calls.clear()
    first = LAYERS[0]["in_"] * tiny.adapted_linear(**LAYERS[0]).rank
    monkeypatch.setattr(prepared_gains, "entries_at_a_time", lambda _: 2 * first)
    prepare_gains(layers_of("nf4"))
    assert sorted(calls) == [1, 1, 1, 1, 2]  # 3 as 2 and 1, the larger ones one by one
