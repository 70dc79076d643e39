"""The layer on CUDA: bitsandbytes' kernels, cuBLAS into strided slices, no wait of the host. Run with -m gpu.

Numbers come from `reference` (float64, plain loops) or from the CPU.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from qdora.nn.adapted_linear import AdaptedLinear
from qdora.nn.frozen_linear import FrozenLinear
from qdora.nn.prepared_gains import prepare_gains
from qdora.ops import blockwise, bnb_kernels, tiles
from qdora.ops.adapted_product import column_dot
from qdora.ops.loss import chunked_nll
from qdora.ops.packed import PackedWeight, dequantize, quantize
from qdora.ops.tiles import column_tiles, row_tiles
from qdora.train.optimizer import AdapterOptimizer
from tests import reference, tiny
from tests.test_ops_adapted_product import arrays, to_numpy

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
DEVICE = torch.device("cuda", 0)


def layer_on_gpu(**options: Any) -> AdaptedLinear:
    """A DoRA layer of 64 -> 24 off its start, made on the CPU and moved."""
    settings: dict[str, Any] = {"in_": 64, "dtype": torch.bfloat16, "quant": "nf4", "bias": True}
    layer = tiny.adapted_linear(**(settings | options))
    tiny.move_all_parameters_(layer)
    return layer.to(DEVICE)


def on_gpu(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def off(got: torch.Tensor | None, expected: Any) -> float:
    return reference.relative_error(to_numpy(None if got is None else got.cpu()), expected)


def by_definition(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """`dequantize` in plain torch, whatever kernels the device has."""
    if weight.kind == "int8":
        return blockwise.dequantize_rows(weight.packed, weight.absmax, dtype)
    scales, nested = weight.absmax, weight.nested
    if nested is not None:
        scales = blockwise.dequantize_scales(scales, nested.absmax, nested.code, nested.offset)
    form = {"shape": weight.shape, "dtype": dtype}
    return blockwise.dequantize_4bit(weight.packed, scales, weight.kind, weight.block_size, **form)


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8", "int4"])
@pytest.mark.parametrize("shape", [(128, 256), (33, 96), (7, 101)])
def test_a_base_does_not_depend_on_where_it_was_quantised_and_the_kernels_decode_it(kind, shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)).bfloat16() * 0.05
    weight[1] = 0.0
    here, there = quantize(weight, kind, 64, False), quantize(weight.to(DEVICE), kind, 64, False)
    for name, tensor in here.tensors().items():
        assert torch.equal(tensor, there.tensors()[name].cpu()), name
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        expected = by_definition(here, dtype)
        assert torch.equal(dequantize(there, dtype).cpu(), expected)
        assert torch.equal(by_definition(there, dtype).cpu(), expected)


def test_bitsandbytes_runs_here():
    assert bnb_kernels.is_available("cuda")


@pytest.mark.parametrize("double_quant", [False, True])
def test_tiles_cut_from_packed_bytes_are_parts_of_the_scaled_weight(double_quant, monkeypatch):
    monkeypatch.setattr(tiles, "_GPU_TILE_BYTES", 64 << 10)
    packed = quantize(on_gpu(300, 256, seed=2) * 0.05, "nf4", 64, double_quant)
    factor = on_gpu(300, seed=3, dtype=torch.float32)
    expected = to_numpy(by_definition(packed.to("cpu"), torch.float32)) * to_numpy(factor.cpu())[:, None]
    rows = list(row_tiles(packed, torch.bfloat16, factor))
    columns = list(column_tiles(packed, torch.bfloat16, factor))
    assert len(rows) > 1
    assert len(columns) > 1
    for got in (torch.cat([tile for _, tile in rows]), torch.cat([tile for _, tile in columns], dim=1)):
        np.testing.assert_allclose(to_numpy(got.cpu()), expected, rtol=2**-8, atol=1e-30)


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("quant", ["nf4", "int8", None])
@pytest.mark.parametrize("small_tiles", [False, True])
def test_forward_and_every_gradient(kind, quant, small_tiles, monkeypatch):
    if small_tiles:  # products into strided slices of the output
        monkeypatch.setattr(tiles, "_GPU_TILE_BYTES", 16 << 10)
    layer = layer_on_gpu(kind=kind, quant=quant, out=200, in_=192)
    x, dy = on_gpu(37, 192, seed=4).requires_grad_(), on_gpu(37, 200, seed=5)
    layer(x).backward(dy)
    cpu_x, cpu_dy, numbers = to_numpy(x.cpu()), to_numpy(dy.cpu()), on_cpu(layer)
    assert off(layer(x), reference.forward(cpu_x, bias=to_numpy(layer.base.bias.cpu()), **numbers)) < 5e-3
    expected = reference.gradients(cpu_x, cpu_dy, **numbers)
    for got, wanted in (
        (x.grad, expected.x),
        (layer.lora_A.grad, expected.lora_a),
        (layer.lora_B.grad, expected.lora_b),
    ):
        assert off(got, wanted) < 8e-3
    if layer.magnitude is not None:
        assert off(layer.magnitude.grad, expected.magnitude) < 8e-3


def on_cpu(layer: AdaptedLinear) -> dict[str, Any]:
    """The layer's numbers; moving it back and forth changes none."""
    numbers = arrays(layer.cpu())
    layer.to(DEVICE)
    return numbers


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (513, 1008), (4096, 512), (20_000, 64)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_column_dot_is_the_sum_in_float32(shape, dtype):
    left, right = on_gpu(*shape, seed=6, dtype=dtype), on_gpu(*shape, seed=7, dtype=dtype)
    factor = on_gpu(shape[1], seed=8, dtype=torch.float32)
    expected = (left.double() * right.double()).sum(0) * factor.double()
    scale = (left.double() * right.double()).abs().sum(0) * factor.double().abs()
    for a, b in ((left, right), (left.T.contiguous().T, right)):
        assert float(((column_dot(a, b, factor).double() - expected).abs() / scale).max()) < 1e-6


def waits_of(function: Any) -> list[str]:
    """What torch says of operations that made the host wait."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            function()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return [f"{each.filename}:{each.lineno}" for each in caught if "called a synchronizing" in str(each.message)]


@pytest.mark.parametrize("options", [{"kind": "lora"}, {}, {"dropout": 0.3}, {"quant": "int8"}, {"quant": None}])
def test_a_pass_makes_the_host_wait_for_nothing(options):
    layer, x = layer_on_gpu(**options), on_gpu(8, 64).requires_grad_()
    layer(x).sum().backward()
    assert waits_of(lambda: layer(x).sum().backward()) == []


def test_norms_of_all_layers_make_it_wait_once():
    layers, x = [layer_on_gpu(rank=rank) for rank in (1, 2, 3)], on_gpu(8, 64)
    for layer in layers:
        layer(x)
        with torch.no_grad():
            layer.lora_B.mul_(1.5)
    assert len(waits_of(lambda: prepare_gains(layers))) == 1
    assert waits_of(lambda: [layer(x) for layer in layers]) == []
    for layer in layers:
        gain, numbers = layer.gain(torch.bfloat16), on_cpu(layer)
        assert gain is not None
        norms = reference.row_norm(*(numbers[name] for name in ("weight", "lora_a", "lora_b", "scaling")))
        np.testing.assert_allclose(to_numpy(gain.value.cpu()) * norms, numbers["magnitude"], rtol=1e-3)


def test_dropout_zeroes_the_same_elements_in_both_directions_and_in_a_recompute():
    size, share = 64, 0.3
    base = FrozenLinear(torch.zeros(size, size, device=DEVICE))
    layer = AdaptedLinear(base, kind="lora", rank=size, alpha=float(size), dropout=share, dtype=torch.float32).train()
    with torch.no_grad():  # y = drop(x)
        layer.lora_A.copy_(torch.eye(size))
        layer.lora_B.copy_(torch.eye(size))
    x = torch.ones(2000, size, device=DEVICE, requires_grad=True)
    y = checkpoint(layer, x, use_reentrant=False)
    y.backward(torch.ones_like(y))
    assert x.grad is not None
    assert torch.equal(y == 0, x.grad == 0)
    assert abs(float((y == 0).double().mean()) - share) < 5 * math.sqrt(share * (1 - share) / y.numel())
    assert float(y.detach().max()) == pytest.approx(1 / (1 - share), rel=1e-5)


@pytest.mark.parametrize("name", ["paged_adamw_8bit", "paged_adamw_32bit", "adamw", "lion"])
def test_after_a_step_the_norm_is_the_new_one(name):
    """131,072 elements a matrix: bitsandbytes pages states from 100,000 on."""
    layer = layer_on_gpu(out=1024, in_=1024, rank=128)
    optimizer = AdapterOptimizer(dict(layer.named_parameters()), name=name)
    before = layer.lora_B.detach().clone()
    for _ in range(2):
        layer(on_gpu(4, 1024)).float().square().sum().backward()
        optimizer.step(0.01)
        optimizer.zero_grad()
    assert not torch.equal(before, layer.lora_B)
    gain = layer.gain(torch.bfloat16)
    assert gain is not None
    assert layer.magnitude is not None
    low = layer.lora_B.detach().double() @ layer.lora_A.detach().double()
    norm = (layer.base.dequantized().double() + layer.scaling * low).norm(dim=1)
    torch.testing.assert_close(gain.value.double(), layer.magnitude.detach().double() / norm, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("softcap", [None, 20.0])
def test_chunked_loss_and_its_gradient(softcap):
    hidden, head = on_gpu(50, 32, seed=1).requires_grad_(), on_gpu(300, 32, seed=2)
    labels = torch.randint(0, 300, (50,), generator=torch.Generator().manual_seed(3))
    chunked_nll(hidden, head, labels.to(DEVICE), softcap=softcap, chunk=16).sum().backward()
    cpu_hidden, cpu_head = to_numpy(hidden.cpu()), to_numpy(head.cpu())
    nll, gradient = reference.head_nll(cpu_hidden, cpu_head, labels.numpy(), softcap=softcap)
    assert off(chunked_nll(hidden.detach(), head, labels.to(DEVICE), softcap=softcap), nll) < 2e-2
    assert off(hidden.grad, gradient) < 2e-2


def test_autocast_computes_in_its_dtype():
    layer, x = layer_on_gpu(dtype=torch.float32), on_gpu(8, 64, dtype=torch.float32).requires_grad_()
    with torch.autocast("cuda", torch.bfloat16):
        out = layer(x)
    out.float().sum().backward()
    assert out.dtype == torch.bfloat16
    assert off(out, reference.forward(to_numpy(x.cpu()), bias=to_numpy(layer.base.bias.cpu()), **on_cpu(layer))) < 1e-2
