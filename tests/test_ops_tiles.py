"""Tiles of a frozen weight: together they are the weight, whatever the budget, the format and the shape."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qdora.ops import tiles
from qdora.ops.packed import quantize
from qdora.ops.tiles import column_tiles, dense_weight, own_scales, row_tiles, spans, with_scales
from tests.test_ops_quantize import by_backends

FORMATS = ("nf4", "fp4", "int8", "dense")


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


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of a few hundred bytes."""
    monkeypatch.setattr(tiles, "_CPU_TILE_BYTES", 2048)
    monkeypatch.setattr(tiles, "_LONG", 8)
    monkeypatch.setattr(tiles, "_SHORT", 3)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("with_factor", [False, True])
@pytest.mark.parametrize("shape", [(20, 192), (33, 64), (40, 96), (7, 131), (1, 640), (130, 1)])
def test_tiles_put_together_are_the_scaled_weight(kind, double_quant, with_factor, shape):
    weight = stored(kind, shape, double_quant=double_quant)
    factor = torch.rand(shape[0], generator=torch.Generator().manual_seed(1)) * 2 if with_factor else None
    for dtype in (torch.float32, torch.bfloat16):
        expected = whole(weight, factor, dtype).double()
        by_rows = [(rows, tile.clone()) for rows, tile in row_tiles(weight, dtype, factor)]
        assert [rows.start for rows, _ in by_rows] == [0, *[rows.stop for rows, _ in by_rows[:-1]]]
        by_columns = [(columns, tile.clone()) for columns, tile in column_tiles(weight, dtype, factor)]
        for got in (
            torch.cat([tile for _, tile in by_rows]),
            torch.cat([tile for _, tile in by_columns], dim=1),
        ):
            assert got.dtype == dtype
            assert got.shape == shape
            # float32 products of code, scale and factor, each rounded, in another order than the definition's.
            tolerance = 4e-7 if dtype == torch.float32 else 2**-8
            off = (got.double() - expected).abs() / (expected.abs() + 1e-30)
            assert float(off.max()) <= tolerance
        if factor is None:
            assert torch.equal(torch.cat([tile for _, tile in by_rows]).double(), expected)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("with_factor", [False, True])
def test_scales_of_its_own_give_a_weight_the_same_tiles(kind, double_quant, with_factor):
    weight = stored(kind, (20, 192), double_quant=double_quant)
    factor = torch.rand(20, generator=torch.Generator().manual_seed(1)) * 2 if with_factor else None
    before = {name: tensor.clone() for name, tensor in weight.tensors().items()} if kind != "dense" else {}
    scales = own_scales(weight, factor)
    if kind == "dense":
        assert scales is None
        return
    assert scales is not None
    own = with_scales(weight, scales)
    assert own.packed is weight.packed
    assert own.nested is None
    assert all(torch.equal(tensor, before[name]) for name, tensor in weight.tensors().items())
    for dtype in (torch.float32, torch.bfloat16):
        for cut in (row_tiles, column_tiles):
            pairs = zip(cut(own, dtype), cut(weight, dtype, factor), strict=True)
            assert all(a[0] == b[0] and torch.equal(a[1], b[1]) for a, b in pairs)


def test_blocks_that_cross_rows_have_no_scales_of_their_own():
    assert own_scales(stored("nf4", (7, 131), double_quant=False), torch.ones(7)) is None


@pytest.mark.usefixtures("small_tiles")
def test_tiles_stay_within_the_budget_and_leave_the_weight_alone():
    for kind in FORMATS:
        weight = stored(kind, (64, 256))
        before = dense_weight(weight, torch.float32).clone()
        rows = list(row_tiles(weight, torch.bfloat16, torch.full((64,), 2.0)))
        columns = list(column_tiles(weight, torch.bfloat16, torch.full((64,), 2.0)))
        assert len(rows) > 4
        assert len(columns) >= 4
        assert max(tile.numel() * 2 for _, tile in rows) <= 2048
        # A column tile is at least one block wide.
        assert max(tile.shape[1] for _, tile in columns) <= 64
        assert torch.equal(dense_weight(weight, torch.float32), before)


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


def test_lengths_of_a_large_weight_are_those_that_products_are_fast_with():
    """8 MiB of 4096 columns in 16 bits are 1,024 rows; 11008 = 10 x 1024 + 3 x 256."""
    lengths = [run.stop - run.start for run in spans(11008, 4096, 2, "cpu")]
    assert lengths == [1024] * 10 + [256] * 3
    # 16 MiB are not cut. Rows half as wide: twice as many of them. 1,024 rows of 8192 columns are 16 MiB.
    assert spans(4096, 2048, 2, "cpu") == [slice(0, 4096)]
    assert [run.stop - run.start for run in spans(8192, 2048, 2, "cpu")] == [2048] * 4
    assert [run.stop - run.start for run in spans(2048, 8192, 2, "cpu")] == [1024] * 2
    assert {run.stop - run.start for run in spans(4096, 11008, 2, "cpu", 64)} == {256}


@pytest.mark.parametrize(
    ("total", "other", "align", "lengths"),
    [
        (4096, 4096, 1, [4096]),
        (11008, 4096, 1, [11008]),  # 16,384 rows of 8 KiB fit
        (4096, 11008, 64, [4096]),  # 6,096 columns of 22,016 bytes fit
        (14336, 4096, 64, [14336]),
        (28672, 8192, 1, [7168] * 4),  # 8,192 rows of 16 KiB fit
        (8192, 28672, 64, [2048] * 4),  # 2,340 columns fit
        (11000, 8192, 1, [5504, 5496]),
    ],
)
def test_on_a_gpu_no_product_is_left_with_a_sliver(total, other, align, lengths):
    assert [run.stop - run.start for run in spans(total, other, 2, "cuda", align)] == lengths


def test_a_dense_weight_without_a_factor_is_its_own_single_tile():
    """Nothing is made, so nothing has to stay within a budget."""
    weight = torch.randn(5000, 4096, dtype=torch.bfloat16)
    for tiles_of in (row_tiles, column_tiles):
        ((_, tile),) = tiles_of(weight, torch.bfloat16)
        assert tile.data_ptr() == weight.data_ptr()
    assert len(list(row_tiles(weight, torch.bfloat16, torch.ones(5000)))) > 1
