"""Tiles of a frozen weight: together they are the weight, whatever the budget, the format and the shape."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qdora.ops import tiles
from qdora.ops.frozen_product import frozen_linear
from qdora.ops.packed import quantize
from qdora.ops.tiles import column_tiles, dense_weight, is_one_tile, own_scales, row_tiles, spans, with_scales
from tests.adapter_numbers import cut_tiles
from tests.test_ops_quantize import by_backends

FORMATS = ("nf4", "fp4", "int8", "int4", "nf3", "nf2", "dense")


@pytest.fixture
def _small_tiles(monkeypatch):
    cut_tiles(monkeypatch, 2048)


def stored(kind: str, shape: tuple[int, int], *, block_size: int = 64, double_quant: bool = True) -> tiles.Weight:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(3)) * 0.1
    return weight if kind == "dense" else quantize(weight, kind, block_size, double_quant)


def whole(weight: tiles.Weight, row_factor: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """diag(row_factor) W in float64, rounded once: the definition."""
    dense = weight if isinstance(weight, torch.Tensor) else by_backends(weight, torch.float32)["torch"]
    dense = dense.double()
    if row_factor is not None:
        dense = dense * row_factor.double()[:, None]
    return dense.to(dtype)


def factor_of(rows: int) -> torch.Tensor:
    return torch.rand(rows, generator=torch.Generator().manual_seed(1)) * 2


@pytest.mark.usefixtures("_small_tiles")
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("with_factor", [False, True])
@pytest.mark.parametrize("shape", [(20, 192), (33, 64), (40, 96), (7, 131), (1, 640), (130, 1)])
def test_tiles_put_together_are_the_scaled_weight(kind, double_quant, with_factor, shape):
    weight = stored(kind, shape, double_quant=double_quant)
    factor = factor_of(shape[0]) if with_factor else None
    for dtype in (torch.float32, torch.bfloat16):
        expected = whole(weight, factor, dtype).double()
        by_rows = [(rows, tile.clone()) for rows, tile in row_tiles(weight, dtype, factor)]
        assert [rows.start for rows, _ in by_rows] == [0, *[rows.stop for rows, _ in by_rows[:-1]]]
        by_columns = [(columns, tile.clone()) for columns, tile in column_tiles(weight, dtype, factor)]
        # float32 products of code, scale and factor, each rounded, in another order than the definition's.
        tolerance = 0.0 if factor is None else 4e-7 if dtype == torch.float32 else 2**-8
        for found in (torch.cat([tile for _, tile in by_rows]), torch.cat([tile for _, tile in by_columns], dim=1)):
            assert (found.dtype, found.shape) == (dtype, shape)
            off = (found.double() - expected).abs() / (expected.abs() + 1e-30)
            assert float(off.max()) <= tolerance


@pytest.mark.usefixtures("_small_tiles")
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("double_quant", [False, True])
def test_scales_of_its_own_give_a_weight_the_same_tiles_and_leave_it_alone(kind, double_quant):
    weight, factor = stored(kind, (64, 256), double_quant=double_quant), factor_of(64)
    before = dense_weight(weight, torch.float32).clone()
    for dtype, some in itertools.product((torch.float32, torch.bfloat16), (None, factor)):
        scales = own_scales(weight, some)
        for cut in (row_tiles, column_tiles):
            found = [(run, tile.clone()) for run, tile in cut(weight, dtype, some)]
            if some is not None and dtype == torch.bfloat16:
                assert len(found) >= 4
                # A column tile is at least one block wide.
                assert all(tile.nbytes <= 2048 or tile.shape[1] <= 64 for _, tile in found)
            if kind == "dense":
                assert scales is None
                continue
            assert scales is not None
            own = with_scales(weight, scales)
            assert own.packed is weight.packed
            assert own.nested is None
            pairs = zip(cut(own, dtype), found, strict=True)
            assert all(a[0] == b[0] and torch.equal(a[1], b[1]) for a, b in pairs)
    assert torch.equal(dense_weight(weight, torch.float32), before)
    crossing = stored(kind, (7, 131), double_quant=double_quant)
    assert (own_scales(crossing, torch.ones(7)) is None) == (kind != "int8")


@settings(max_examples=200, deadline=None)
@given(
    total=st.integers(1, 200_000),
    other=st.integers(1, 40_000),
    itemsize=st.sampled_from([2, 4, 8]),
    device=st.sampled_from(["cpu", "cuda"]),
    align=st.sampled_from([1, 2, 16, 64, 128, 4096]),
)
def test_spans_cover_the_dimension_once_in_aligned_runs(total, other, itemsize, device, align):
    runs = spans(total, other, itemsize, device, align)
    assert runs[0].start == 0
    assert runs[-1].stop == total
    assert all(left.stop == right.start for left, right in itertools.pairwise(runs))
    assert all(run.start < run.stop and run.start % align == 0 for run in runs)
    budget = tiles._CPU_TILE_BYTES if device == "cpu" else tiles._GPU_TILE_BYTES
    longest = max(run.stop - run.start for run in runs)
    assert longest * other * itemsize <= budget or longest <= max(256, align)


@pytest.mark.parametrize(
    ("device", "total", "other", "align", "lengths"),
    [
        ("cpu", 11008, 4096, 1, [1024] * 10 + [256] * 3),  # 8 MiB of 4096 columns in 16 bits are 1,024 rows
        ("cpu", 4096, 2048, 1, [4096]),  # 16 MiB are not cut
        ("cpu", 4097, 2048, 1, [2048, 2048, 1]),
        ("cpu", 8192, 2048, 1, [2048] * 4),  # rows half as wide: twice as many of them
        ("cpu", 2048, 8192, 1, [1024] * 2),  # 1,024 rows of 8192 columns are 16 MiB
        ("cpu", 4096, 11008, 64, [256] * 16),
        # On a GPU no product is left with a sliver.
        ("cuda", 4096, 4096, 1, [4096]),
        ("cuda", 11008, 4096, 1, [11008]),  # 16,384 rows of 8 KiB fit
        ("cuda", 4096, 11008, 64, [4096]),  # 6,096 columns of 22,016 bytes fit
        ("cuda", 11008, 4096, 64, [11008]),
        ("cuda", 14336, 4096, 64, [14336]),
        ("cuda", 28672, 8192, 1, [7168] * 4),  # 8,192 rows of 16 KiB fit
        ("cuda", 8192, 28672, 64, [2048] * 4),  # 2,340 columns fit
        ("cuda", 11000, 8192, 1, [5504, 5496]),
    ],
)
def test_lengths_of_a_large_weight_are_those_that_products_are_fast_with(device, total, other, align, lengths):
    assert [run.stop - run.start for run in spans(total, other, 2, device, align)] == lengths


def test_a_dense_weight_without_a_factor_is_its_own_single_tile():
    """Nothing is made, so nothing has to stay within a budget."""
    weight = torch.zeros(2049, 4096, dtype=torch.bfloat16)
    for tiles_of in (row_tiles, column_tiles):
        ((_, tile),) = tiles_of(weight, torch.bfloat16)
        assert tile.data_ptr() == weight.data_ptr()
    assert len(list(row_tiles(weight, torch.bfloat16, torch.ones(2049)))) > 1
    assert not is_one_tile(weight, torch.bfloat16)
    assert is_one_tile(weight[1:], torch.bfloat16)


@pytest.mark.parametrize("quant", ["nf4", "int8", "dense"])
def test_the_frozen_product_is_differentiable_twice(quant):
    weight = stored(quant, (6, 64))
    weight = weight.double() if isinstance(weight, torch.Tensor) else weight
    x, bias = torch.randn(2, 3, 64, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    wanted = x @ dense_weight(weight, torch.float64).T + bias
    with_graph = frozen_linear(x.clone().requires_grad_(), weight, bias)
    torch.testing.assert_close(with_graph, wanted, rtol=1e-6, atol=1e-7)
    with torch.no_grad():
        assert torch.equal(frozen_linear(x, weight, bias), with_graph)
    short = x[0, :1].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda each: frozen_linear(each, weight), (short,))
    assert torch.autograd.gradgradcheck(lambda each: frozen_linear(each, weight).tanh(), (short,))
