"""What the adapted layer keeps and computes: tiles, saved tensors, shared inputs, unneeded gradients, accuracy."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from qdora.nn.adapted_linear import AdaptedLinear
from qdora.nn.frozen_linear import FrozenLinear
from qdora.ops import tiles
from qdora.ops.packed import quantize
from tests import reference, tiny
from tests.test_ops_adapted_product import arrays, errors_in_bf16, to_numpy


def saved_storages(run: Any) -> tuple[Any, dict[int, torch.Tensor]]:
    """The result of `run` and the tensors that autograd keeps for backward, one for each storage."""
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        return run(), kept


def layer_of(kind: str, *, bias: bool = False, dropout: float = 0.0, out: int = 24) -> AdaptedLinear:
    layer = tiny.adapted_linear(
        out=out, in_=64, rank=2, kind=kind, bias=bias, dropout=dropout, dtype=torch.bfloat16, quant="nf4"
    )
    tiny.move_all_parameters_(layer)
    return layer


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_saved_are_the_input_the_low_rank_activations_the_output_and_nothing_else_of_token_size(kind, dropout):
    layer = layer_of(kind, dropout=dropout)
    x = torch.randn(50, 64).bfloat16().requires_grad_()
    y, kept = saved_storages(lambda: layer(x))
    sizes = sorted(tensor.numel() for tensor in kept.values() if tensor.shape[:1] == (50,))
    assert sizes == sorted([50 * 64, 50 * 2] + ([50 * 24] if kind == "dora" else []))
    assert x.untyped_storage().data_ptr() in kept
    if kind == "dora":  # the output itself, not a copy of it
        assert y.untyped_storage().data_ptr() in kept
    parameters = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    others = [t for key, t in kept.items() if key not in parameters and t.shape[:1] != (50,)]
    assert all(tensor.shape == (24,) for tensor in others), "per-row vectors only"


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_modules_that_share_an_input_keep_one_copy_of_it(kind):
    """q, k, v of an attention block of three dimensions, and gate, up."""
    x = torch.randn(2, 25, 64).bfloat16().requires_grad_()
    layers = [layer_of(kind, out=out) for out in (24, 8, 8)]
    _, kept = saved_storages(lambda: [layer(x) for layer in layers])
    wide = [tensor for tensor in kept.values() if tensor.numel() == x.numel()]
    assert len(wide) == 1
    assert wide[0].untyped_storage().data_ptr() == x.untyped_storage().data_ptr()


def test_in_a_model_the_projections_of_a_block_keep_one_copy_of_their_input():
    from tests import tiny_adapted

    model = tiny_adapted.adapted("llama", quant="nf4", dtype=torch.bfloat16)
    inputs: dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, AdaptedLinear):
            module.register_forward_pre_hook(
                lambda _, args, name=name: inputs.__setitem__(name, args[0].untyped_storage().data_ptr())
            )
    _, kept = saved_storages(lambda: model(input_ids=tiny_adapted.IDS, use_cache=False).logits)
    assert len(inputs) == 14
    for block in ("model.layers.0.", "model.layers.1."):
        for group in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
            (shared,) = {inputs[block + name] for name in group}
            assert shared in kept


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_an_input_that_needs_no_gradient_costs_no_product(kind, monkeypatch):
    """The first block behind frozen embeddings: the base is not read again in the backward pass."""
    from qdora.ops import frozen_product as module

    read: list[int] = []
    compute = module.column_tiles
    monkeypatch.setattr(module, "column_tiles", lambda *args: (read.append(1), compute(*args))[1])
    layer = layer_of(kind)
    for needs in (False, True):
        x = torch.randn(5, 64).bfloat16().requires_grad_(needs)
        layer(x).float().sum().backward()
        assert (x.grad is not None) == needs
        assert len(read) == needs
    assert layer.lora_A.grad is not None


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("shape", [(40, 192, 5), (33, 96, 1), (7, 131, 7)])
@pytest.mark.parametrize("quant", [None, "nf4", "int8"])
def test_many_small_tiles_give_the_forward_and_gradients_of_the_reference(kind, shape, quant, monkeypatch):
    monkeypatch.setattr(tiles, "_CPU_TILE_BYTES", 4096)
    monkeypatch.setattr(tiles, "_LONG", 8)
    monkeypatch.setattr(tiles, "_SHORT", 3)
    out, in_, rank = shape
    layer = tiny.adapted_linear(out=out, in_=in_, rank=rank, kind=kind, bias=True, dtype=torch.float32, quant=quant)
    tiny.move_all_parameters_(layer)
    x = torch.randn(6, in_, generator=torch.Generator().manual_seed(1)).requires_grad_()
    dy = torch.randn(6, out, generator=torch.Generator().manual_seed(2))
    y = layer(x)
    y.backward(dy)
    numbers = arrays(layer)
    expected = reference.forward(to_numpy(x), bias=to_numpy(layer.base.bias), **numbers)
    grads = reference.gradients(to_numpy(x), to_numpy(dy), **numbers)
    pairs = [(y, expected), (x.grad, grads.x), (layer.lora_A.grad, grads.lora_a), (layer.lora_B.grad, grads.lora_b)]
    if layer.magnitude is not None:
        pairs.append((layer.magnitude.grad, grads.magnitude))
    for got, wanted in pairs:
        assert reference.relative_error(to_numpy(got), wanted) < 2e-6


@settings(max_examples=15, deadline=None)
@given(
    out=st.integers(8, 40),
    in_=st.integers(32, 200),
    rank=st.integers(1, 8),
    alpha=st.sampled_from([0.01, 4.0, 3000.0]),
    kind=st.sampled_from(["lora", "dora"]),
    quant=st.sampled_from([None, "nf4", "fp4", "int8"]),
    seed=st.integers(0, 10**6),
)
def test_bf16_errors_are_at_most_twice_those_of_the_plain_formula(out, in_, rank, alpha, kind, quant, seed):
    """Rank 1, huge scalings, blocks that cross rows included. Mean of eight inputs: with rank 1 a gradient of B is one
    column, whose error is one number for all rows, now large, now near zero, in either formula.
    """
    layer = tiny.adapted_linear(
        out=out, in_=in_, rank=min(rank, out, in_), kind=kind, alpha=alpha, dtype=torch.bfloat16, quant=quant, seed=seed
    )
    tiny.move_all_parameters_(layer, seed=seed)
    ours: Counter[str] = Counter()
    plain: Counter[str] = Counter()
    for number in range(8):
        layer.zero_grad()
        for total, errors in zip((ours, plain), errors_in_bf16(layer, seed=seed + number), strict=True):
            total.update({name: error / 8 for name, error in errors.items()})
    for name, error in ours.items():
        # A rounding of 2^-9 is allowed where the plain formula happens to lose less.
        assert error <= 2 * max(plain[name], 2.0**-9), (name, error, plain[name])


def test_long_factors_are_scaled_in_slices(monkeypatch):
    from qdora.ops import low_rank_factors as module

    layer = layer_of("dora")
    x = torch.randn(5, 64).bfloat16()
    whole = layer(x)
    monkeypatch.setattr(module, "_ENTRIES_PER_SLICE", 5)
    assert torch.equal(layer(x), whole)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_no_tokens_at_all(kind):
    layer = layer_of(kind, dropout=0.2)
    x = torch.zeros(0, 64).bfloat16().requires_grad_()
    layer(x).sum().backward()
    assert layer(x).shape == (0, 24)
    assert torch.equal(layer.lora_B.grad, torch.zeros_like(layer.lora_B.grad))


@pytest.mark.parametrize("module", ["frozen", "lora", "dora"])
def test_autocast_sets_the_dtype_of_the_products_as_for_a_linear_layer(module):
    """transformers' Trainer with bf16=True over a float32 model."""
    torch.manual_seed(0)
    stored = quantize(torch.randn(24, 64) * 0.1, "nf4")
    layer: Any = (
        FrozenLinear(stored) if module == "frozen" else AdaptedLinear(FrozenLinear(stored), kind=module, rank=2)
    )
    if module != "frozen":
        tiny.move_all_parameters_(layer)
    x = torch.randn(5, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        assert y.dtype == torch.bfloat16
        checkpointed = checkpoint(layer, x, use_reentrant=False)
    y.float().square().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
    assert torch.equal(y, checkpointed)
    twin = x.detach().bfloat16().requires_grad_()
    layer(twin).float().square().sum().backward()
    np.testing.assert_array_equal(to_numpy(x.grad), to_numpy(twin.grad))


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_autocast_leaves_float64_alone_as_for_a_linear_layer(kind):
    layer = tiny.adapted_linear(kind=kind)
    tiny.move_all_parameters_(layer)
    x = torch.randn(5, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.nn.functional.linear(x, layer.base.dequantized(torch.float64)).dtype == torch.float64
        y = layer(x)
    assert y.dtype == torch.float64
    np.testing.assert_allclose(to_numpy(y), reference.forward(to_numpy(x), **arrays(layer)), rtol=1e-12)
