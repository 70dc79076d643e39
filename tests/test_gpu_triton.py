"""The Triton kernels on a GPU: the same bits as the definition, and sums against float64."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from qdora.ops import tiles
from qdora.ops.dora import squared_row_norm
from qdora.ops.packed import PackedWeight, quantize
from qdora.ops.tiles import column_tiles, row_tiles
from tests.test_gpu_layer import DEVICE, waits_of
from tests.test_ops_quantize import uneven

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason='Triton is not installed: pip install "qdora[triton]"'
    ),
]
SHAPES = ((300, 1088), (37, 192), (1, 64), (40, 96), (33, 101), (5, 7))


def definition(weight: PackedWeight, dtype: torch.dtype, gain: torch.Tensor | None) -> torch.Tensor:
    from tests import interpreted_triton

    return interpreted_triton.definition(weight, dtype, gain)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["nf4", "int4"])
def test_a_weight_is_decoded_to_the_bits_of_the_definition(shape, double_quant, dtype, kind):
    from qdora.ops import triton_kernels

    weight = quantize(uneven(shape), kind, 64, double_quant)
    for gain in (None, torch.rand(shape[0]) * 2):
        expected = definition(weight, dtype, gain)
        there, factor = weight.to(DEVICE), None if gain is None else gain.to(DEVICE)
        assert torch.equal(triton_kernels.decode(there, dtype, gain=factor).cpu(), expected)


def test_some_experts_in_one_launch():
    from qdora.ops import triton_kernels

    stack, gain = quantize(uneven((8 * 96, 512)), "nf4"), torch.rand(8 * 96)
    numbers = torch.tensor([1, 2, 7])
    expected = definition(stack, torch.bfloat16, gain).view(8, 96, 512)[numbers].reshape(-1, 512)
    some = triton_kernels.Experts(numbers.to(DEVICE), 96)
    got = triton_kernels.decode(stack.to(DEVICE), torch.bfloat16, gain=gain.to(DEVICE), experts=some)
    assert torch.equal(got.cpu(), expected)


@pytest.mark.parametrize(("shape", "rank"), [((300, 2112), 16), ((37, 192), 3), ((33, 101), 20), ((256, 4096), 128)])
def test_sums_over_rows_against_float64(shape, rank):
    from qdora.ops import triton_kernels

    weight = quantize(uneven(shape), "nf4", 64)
    exact = definition(weight, torch.float32, None).double().square().sum(dim=1)
    there = weight.to(DEVICE)
    torch.testing.assert_close(triton_kernels.squared_row_norm(there).cpu().double(), exact, rtol=1e-6, atol=0)
    for dtype in (torch.bfloat16, torch.float16):
        a, b = torch.randn(rank, shape[1]).to(dtype), torch.randn(shape[0], rank)
        dense = definition(weight, dtype, None).double()
        expected = (dense @ a.double().T * b.double()).sum(dim=1)
        # Tensor cores add up float32 with fewer guard bits than IEEE.
        sizes = (dense.abs() @ a.double().abs().T * b.double().abs()).sum(dim=1)
        off = triton_kernels.factor_dots(there, a.to(DEVICE), b.to(DEVICE)).cpu().double() - expected
        assert bool((off.abs() <= 1e-5 * sizes).all())


def test_the_layer_takes_them_and_the_host_waits_for_nothing(monkeypatch):
    monkeypatch.setattr(tiles, "runs_triton", lambda device: device.type == "cuda")
    weight, gain = quantize(uneven((300, 256)), "nf4").to(DEVICE), torch.rand(300, device=DEVICE)

    def all_tiles() -> list[torch.Tensor]:
        return [tile for cut in (row_tiles, column_tiles) for _, tile in cut(weight, torch.bfloat16, gain)]

    rows, columns = all_tiles()
    expected = definition(weight.to("cpu"), torch.bfloat16, gain.cpu())
    assert torch.equal(rows.cpu(), expected)
    assert torch.equal(columns.cpu(), expected)
    assert waits_of(lambda: (all_tiles(), squared_row_norm(weight))) == []
