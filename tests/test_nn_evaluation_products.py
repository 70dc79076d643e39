"""The operands of products: made once for each state of the parameters, for training and evaluation, never stale."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from qdora.nn import adapted_linear as module
from qdora.nn.adapted_linear import AdaptedLinear
from qdora.nn.frozen_linear import FrozenLinear
from qdora.ops.packed import quantize
from tests import reference, tiny
from tests.test_nn_parameter_cache import CHANGES, X, in_place, load_another_base, only_the_magnitude
from tests.test_ops_adapted_product import arrays, to_numpy


def moved(kind: str, dtype: torch.dtype = torch.float32, **options: Any) -> AdaptedLinear:
    layer = tiny.adapted_linear(kind=kind, dtype=dtype, **options).eval()
    tiny.move_all_parameters_(layer)
    return layer


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry each time that operands are made."""
    calls: list[int] = []
    make = module.operands_of

    def counting(*args: Any, **options: Any) -> Any:
        calls.append(1)
        return make(*args, **options)

    monkeypatch.setattr(module, "operands_of", counting)
    return calls


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("options", [{}, {"bias": True}, {"quant": "nf4", "in_": 64}, {"dropout": 0.5}])
def test_bits_are_those_of_the_graph(kind: str, dtype: torch.dtype, options: dict[str, Any]) -> None:
    if "quant" in options and dtype == torch.float64:
        pytest.skip("packed bases are not of float64")
    layer = moved(kind, dtype, **options)
    layer.add_gate()
    with torch.no_grad():
        layer.gate.mul_(torch.tensor([0.5, -1.25, 2.0]))  # type: ignore[union-attr]
    x = torch.randn(2, 3, layer.in_features, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = layer(x).detach()
    for context in (torch.no_grad, torch.inference_mode):
        for _ in range(2):
            with context():
                assert torch.equal(layer(x), expected)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        cast = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(cast, layer(x).detach())


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("quant", ["nf4", "nf4, double", "int8", None])
def test_kept_scales_give_the_same_bits_and_follow_the_parameters(kind: str, quant: str | None) -> None:
    double = quant == "nf4, double"
    layer = moved(kind, torch.bfloat16, in_=128, quant="nf4" if double else quant, bias=True)
    if double:
        packed = quantize(layer.base.dequantized(), "nf4", 64, double_quant=True)
        layer = AdaptedLinear(FrozenLinear(packed, layer.base.bias), kind=kind, rank=3).eval()  # type: ignore[arg-type]
        tiny.move_all_parameters_(layer)
    x = torch.randn(2, 128, generator=torch.Generator().manual_seed(1)).bfloat16()
    for change in (lambda: None, lambda: in_place(layer), lambda: layer.train(), lambda: layer.eval()):
        change()
        found = {}
        for keeps in (False, True):
            layer.keeps_scales = keeps
            each = x.clone().requires_grad_()
            layer.zero_grad()
            out = layer(each)
            out.square().sum().backward()
            found[keeps] = [out, each.grad, *(parameter.grad for parameter in layer.parameters())]
            kept = layer.operands(torch.bfloat16)
            assert kept is not None
            assert (kept.scales is not None) == (keeps and quant is not None)
            with torch.inference_mode():
                assert torch.equal(layer(x), out)
        assert all(torch.equal(got, wanted) for got, wanted in zip(*found.values(), strict=True))


def test_scales_are_dropped_where_a_gpu_has_no_room_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = 24 * 128 // 64 * 4
    for free, dropped in ((None, False), (2 * taken, False), (2 * taken - 1, True)):
        layers = [moved("dora", torch.bfloat16, in_=128, quant="nf4"), moved("dora", torch.bfloat16)]
        monkeypatch.setattr(module, "_free_bytes", lambda _device, free=free: free)
        assert module.drop_scales_without_room(layers) is dropped
        assert [layer.keeps_scales for layer in layers] == [not dropped] * 2
    assert not module.drop_scales_without_room([])


def test_a_weight_that_comes_and_goes_is_not_kept() -> None:
    class Nowhere:
        def use(self, layer: Any) -> None:
            pass

    layer = moved("dora", torch.bfloat16, in_=128, quant="nf4")
    layer.base.residency = Nowhere()
    layer.keeps_scales = True
    kept = layer.operands(torch.bfloat16)
    assert kept is not None
    assert kept.scales is None


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_after_every_kind_of_change_the_factors_are_the_new_ones(
    change: Callable[[AdaptedLinear], None], kind: str
) -> None:
    if kind == "lora" and change in (only_the_magnitude, load_another_base):
        pytest.skip("it writes a magnitude, which LoRA has not")
    layer = moved(kind)
    with torch.no_grad():
        before = to_numpy(layer(X))
    change(layer)
    with torch.no_grad():
        found = to_numpy(layer(X))
    assert reference.relative_error(found, reference.forward(to_numpy(X), **arrays(layer))) < 1e-6
    assert np.abs(found - before).max() > 1e-2


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_training_and_evaluation_share_operands(kind: str, made: list[int]) -> None:
    layer = moved(kind)
    for _ in range(3):
        with torch.no_grad():
            layer(X)
        with torch.inference_mode():
            layer(X[:1])
    assert len(made) == 1
    for _ in range(2):
        x = X.clone().requires_grad_()
        checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert len(made) == 1
    with torch.no_grad():
        layer(X.double())
        layer(X.double())
    assert len(made) == 2
    in_place(layer)
    layer(X)
    assert len(made) == 3
    layer.train()
    assert not layer._cache._entries
    layer(X).sum().backward()
    layer(X).sum().backward()
    assert len(made) == 4


def test_dropout_changes_the_factor_of_training_alone() -> None:
    """s / (1 - p) in training, s in evaluation, whichever comes first and however the mode is changed."""
    layer = moved("lora", dropout=0.5)
    for training in (False, True, False):
        layer.training = training  # no call of train(), which would forget everything
        kept = layer.operands(torch.float32)
        assert kept is not None
        expected = layer.lora_B.detach().double() * layer.alpha / layer.rank * (2.0 if training else 1.0)
        torch.testing.assert_close(kept.scaled_b.double(), expected, rtol=1e-6, atol=0.0)
