"""Norms, gains and operands: made once for each state of the parameters, alone or for many layers, and never stale."""

from __future__ import annotations

import copy
import io
from typing import Any

import bitsandbytes as bnb
import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from qdora.adapter import norms
from qdora.adapter.layer import AdaptedLinear, FrozenLinear
from qdora.adapter.norms import norms_checked_later, refresh, settle_norms, unchecked
from qdora.plan.live_bytes import LiveBytes
from qdora.quant.kernels import planned_on
from qdora.quant.packed import empty_packed
from qdora.train.optimizer import AdapterOptimizer
from tests import reference
from tests.adapter_numbers import arrays, expected_norm, make, to_numpy

X = torch.randn(6, 64, generator=torch.Generator().manual_seed(9))


def layer_of(kind: str = "dora", dtype: torch.dtype = torch.float32, **options: Any) -> AdaptedLinear:
    return make(kind=kind, dtype=dtype, bias=False, **options)


def assert_fresh(layer: AdaptedLinear) -> None:
    """The output is that of the parameters as they are now, in training and in evaluation."""
    wanted = reference.forward(to_numpy(X), **arrays(layer))
    x, tolerance = X.to(layer.lora_A.dtype), 1e-6 if layer.lora_A.dtype == torch.float32 else 2e-2
    assert reference.relative_error(to_numpy(layer(x)), wanted) < tolerance
    with torch.no_grad():
        assert reference.relative_error(to_numpy(layer(x)), wanted) < tolerance


def in_place(layer: AdaptedLinear) -> None:
    layer.lora_B.detach().mul_(-1.5)


def the_gate(layer: AdaptedLinear) -> None:
    layer.add_gate()
    layer(X.to(layer.lora_A.dtype))
    layer.gate.detach().add_(torch.tensor([0.5, -2.0, 0.0]))


def another_base(layer: AdaptedLinear) -> None:
    """The base is in the state, what follows from it is not."""
    other = layer_of(layer.kind, layer.lora_A.dtype, seed=1)
    other.base.get_buffer("weight").mul_(3.0)
    layer.load_state_dict(other.state_dict())


def an_empty_layer(layer: AdaptedLinear) -> None:
    state = {name: value.clone() * 1.5 for name, value in layer.state_dict().items()}
    layer.to("meta").to_empty(device="cpu")
    layer.load_state_dict(state)


def another_rank(layer: AdaptedLinear) -> None:
    """As after pruning rank components: other parameters under the old names."""
    layer.lora_A = torch.nn.Parameter(layer.lora_A.detach()[:2] * 1.3)
    layer.lora_B = torch.nn.Parameter(layer.lora_B.detach()[:, :2] * 1.3)
    layer.rank, layer.alpha = 2, layer.alpha / 3 * 2


def stepped(layer: AdaptedLinear, step: Any) -> None:
    layer(X.to(layer.lora_A.dtype)).square().sum().backward()
    step()


def own_optimizer(layer: AdaptedLinear) -> None:
    optimizer = AdapterOptimizer(dict(layer.named_parameters()), name="paged_adamw_32bit")
    stepped(layer, lambda: optimizer.step(0.3))


CHANGES: dict[str, Any] = {
    "in place": in_place,
    "gate": the_gate,
    "another base": another_base,
    "an empty layer": an_empty_layer,
    "assigned": lambda layer: layer.load_state_dict({k: v * 1.5 for k, v in layer.state_dict().items()}, assign=True),
    "alpha": lambda layer: setattr(layer, "alpha", 4.0 * layer.alpha),
    "rank": another_rank,
    ".data assigned": lambda layer: setattr(layer.lora_B, "data", layer.lora_B.data * -2.0),
    ".data and mode": lambda layer: (layer.lora_B.data.mul_(-2.0), layer.train().eval()),
    ".data and a word": lambda layer: (layer.lora_B.data.mul_(-2.0), layer.parameters_changed()),
    # Its kernels write through raw pointers and raise no version counter.
    "bitsandbytes' AdamW": lambda layer: stepped(layer, bnb.optim.AdamW(layer.parameters(), lr=0.3).step),
    "qdora's own": own_optimizer,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(
    ("kind", "dtype"), [("dora", torch.float32), ("dora", torch.bfloat16), ("lora", torch.float32)]
)
def test_after_every_kind_of_change_norm_and_operands_are_the_new_ones(kind, dtype, change):
    layer = layer_of(kind, dtype).eval()
    before = to_numpy(layer(X.to(dtype)))
    CHANGES[change](layer)
    assert_fresh(layer)
    assert np.abs(to_numpy(layer(X.to(dtype))) - before).max() > 1e-2


def test_a_copy_a_pickle_and_a_cast_start_without_the_norm_of_the_original():
    layer = layer_of()
    layer(X)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(layer), torch.load(buffer, weights_only=False)):
        in_place(other)
        assert_fresh(other)
    assert_fresh(layer)
    layer.to(torch.bfloat16)
    assert_fresh(layer)


def test_one_norm_and_operands_serve_a_step_its_recomputes_and_evaluations():
    layer = layer_of().eval()
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.01)

    def made() -> tuple[Any, Any]:
        return layer.kept_norm.value, layer.kept_operands.value

    layer(X)
    before = made()
    for _ in range(2):
        for _ in range(2):
            checkpoint(layer, X.clone().requires_grad_(), use_reentrant=False).square().sum().backward()
            with torch.inference_mode():
                layer(X[:1])
            assert all(new is old for new, old in zip(made(), before, strict=True))
        optimizer.step()
        optimizer.zero_grad()
        assert_fresh(layer)
        assert all(new is not old for new, old in zip(made(), before, strict=True))
        before = made()
    layer.magnitude.detach().mul_(1.5)
    assert_fresh(layer)
    assert [new is old for new, old in zip(made(), before, strict=True)] == [True, False]
    layer(X.double())  # in another dtype
    assert made()[0].dtype == torch.float32
    assert made()[0] is not before[0]
    layer.train()
    assert layer.kept_norm.value is layer.kept_operands.value is None


def test_dropout_changes_the_factor_of_training_alone():
    """s / (1 - p) in training, s in evaluation, whichever comes first and however the mode is changed."""
    layer = layer_of("lora", dropout=0.5)
    for training in (False, True, False):
        layer.training = training  # no call of train(), which would forget everything
        operands = layer.operands(torch.float32)
        wanted = layer.lora_B.detach().double() * layer.alpha / layer.rank * (2.0 if training else 1.0)
        torch.testing.assert_close(operands.scaled_b.double(), wanted, rtol=1e-6, atol=0.0)


# Of three forms; the last one alone keeps float32 adapters.
LAYERS: list[dict[str, Any]] = [*({"in_": 64, "seed": seed} for seed in (1, 2, 3)), {"in_": 128, "seed": 4}]
LAYERS += [{"in_": 128, "seed": 5}, {"in_": 128, "seed": 6, "dtype": torch.float32}]


def layers_of(quant: str | None = "nf4", compute: torch.dtype = torch.bfloat16, **options: Any) -> list[AdaptedLinear]:
    """Layers that have run once and then have other parameters."""
    layers = [layer_of(**{"quant": quant, "dtype": torch.bfloat16} | each | options) for each in LAYERS]
    assert refresh(layers) == 0  # none has run: in which dtype is not known
    for layer in layers:
        layer = layer.double() if compute == torch.float64 else layer
        layer(torch.ones(2, layer.in_features, dtype=compute))
        assert refresh([layer]) == 0
        in_place(layer)
    return layers


def tensors(value: Any) -> list[Tensor]:
    """Those in nested tuples, in order."""
    if isinstance(value, tuple):
        return [tensor for each in value for tensor in tensors(each)]
    return [value] if isinstance(value, Tensor) else []


@pytest.mark.parametrize("quant", ["nf4", "nf4 nested", "int8", None])
@pytest.mark.parametrize("case", ["plain", "gated", "dropout", "one at a time", "float64"])
def test_what_is_prepared_is_what_each_layer_makes_and_no_layer_asks_again(monkeypatch, quant, case):
    if case == "one at a time":
        monkeypatch.setattr(norms, "_ENTRIES_PER_SLICE", 1)
    dtype = torch.float64 if case == "float64" else torch.bfloat16
    layers = layers_of(quant, dtype, gated=case == "gated", dropout=0.25 if case == "dropout" else 0.0)
    assert refresh(layers) == len(layers)
    together = [layer.kept_operands.value for layer in layers]
    assert all(layer.operands(dtype) is each for layer, each in zip(layers, together, strict=True))
    for layer, found in zip(layers, together, strict=True):
        assert found.gain is layer.gain(dtype)
        assert layer.kept_norm.value is not None
        layer.parameters_changed()
        alone = layer.operands(dtype)
        assert [each.shape for each in tensors(found)] == [each.shape for each in tensors(alone)]
        for one, other in zip(tensors(found), tensors(alone), strict=True):
            assert one.dtype == other.dtype
            np.testing.assert_allclose(to_numpy(one), to_numpy(other), rtol=1e-5 if one.dtype.itemsize > 2 else 1e-2)
        gains = to_numpy(found.gain.value) * expected_norm(layer)
        np.testing.assert_allclose(gains, to_numpy(layer.magnitude), rtol=2e-2)


def nearly_removed() -> tuple[list[AdaptedLinear], Any]:
    """Layers, and the gain that the second has for a row that its adapter nearly takes away: its sum cancels."""
    layers = layers_of()
    row = layers[1].base.dequantized()[3]
    with torch.no_grad():
        layers[1].lora_A[0] = row.bfloat16()
        layers[1].lora_B[3] = torch.tensor([-0.95 / layers[1].scaling, 0.0, 0.0])
    return layers, to_numpy(layers[1].magnitude) / expected_norm(layers[1])


def gain_of(layer: AdaptedLinear) -> Any:
    return to_numpy(layer.gain(torch.bfloat16).value)


def test_a_row_that_cancels_is_measured_again_at_once_or_forgotten_when_it_is_checked_later():
    layers, wanted = nearly_removed()
    assert refresh(layers) == len(layers)
    np.testing.assert_allclose(gain_of(layers[1]), wanted, rtol=2e-2)

    layers, wanted = nearly_removed()
    with norms_checked_later(True):
        assert refresh(layers) == len(layers)
    flags = unchecked(layers)
    assert list(flags) == layers
    assert [bool(flag) for flag in flags.values()] == [number == 1 for number in range(len(layers))]
    assert np.abs(gain_of(layers[1]) / wanted - 1).max() > 0.05
    assert settle_norms(flags, [float(flag) for flag in flags.values()])
    assert not unchecked(layers)
    with norms_checked_later(True):
        assert refresh(layers) == 1
        assert not unchecked(layers), "the layer that was wrong is asked at once"
    np.testing.assert_allclose(gain_of(layers[1]), wanted, rtol=2e-2)
    for layer in layers:
        in_place(layer)
    with norms_checked_later(True):
        refresh(layers)
    assert not settle_norms(layers[:1], [0.0])


def test_what_is_made_takes_the_place_of_what_it_follows():
    """At most a tile of a weight, and the factors of a group, are there beside the values of one state."""
    size = 2048
    with planned_on("cuda"), FakeTensorMode(), LiveBytes() as live:
        bases = [FrozenLinear(empty_packed("nf4", (size, size), 64, double_quant=True)) for _ in range(64)]
        layers = [AdaptedLinear(base, rank=1, dtype=torch.bfloat16) for base in bases]
        before = live.live_bytes
        for layer in layers:
            layer.operands(torch.bfloat16)
            torch.autograd.graph.increment_version(list(layer.parameters()))
        kept = live.live_bytes - before
        live.reset_peak()
        assert refresh(layers) == len(layers)
        assert live.live_bytes == before + kept
        assert live.peak_bytes < before + kept + 1.5 * 2 * size * size
