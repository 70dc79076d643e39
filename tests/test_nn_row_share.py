"""The rows of a weight that each of several processes holds, without processes: together they are the weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qdora.nn.row_share import RowShare, span
from qdora.ops.packed import PackedWeight, dequantize, quantize
from qdora.ops.sparsity import mask_bits, mask_from_bits


class Group:
    """What a share asks of a process group."""

    def __init__(self, rank: int, size: int) -> None:
        self._rank, self._size = rank, size

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._size


def shares(weight: Any, size: int, keep_bits: torch.Tensor | None = None) -> list[RowShare]:
    found = []
    for rank in range(size):
        share = RowShare(weight, keep_bits, Group(rank, size))  # type: ignore[arg-type]
        tensors = {"weight": weight}
        if isinstance(weight, PackedWeight):
            tensors = {"packed": weight.packed, "absmax": weight.absmax}
        if keep_bits is not None:
            tensors["keep_bits"] = keep_bits
        share.parts = {name: share.mine(share.cut(tensor)) for name, tensor in tensors.items()}
        found.append(share)
    return found


@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize(
    ("kind", "double_quant"), [("nf4", True), ("nf4", False), ("int8", False), ("nf3", True), (None, False)]
)
def test_the_rows_of_all_are_the_rows_of_the_weight(kind: str | None, double_quant: bool, size: int) -> None:
    """514 rows of four blocks: a group of 256 block scales begins in the rows of one process and ends in another's."""
    dense = torch.randn(514, 64, generator=torch.Generator().manual_seed(0))
    weight = dense if kind is None else quantize(dense, kind, 16, double_quant)
    expected = dense if isinstance(weight, torch.Tensor) else dequantize(weight)
    for share in shares(weight, size):
        assert share.by_rows
        mine = share.weight()
        found = mine if isinstance(mine, torch.Tensor) else dequantize(mine)
        assert torch.equal(found, expected[share.rows])


def test_masks_are_cut_with_the_rows() -> None:
    weight = torch.randn(10, 24, generator=torch.Generator().manual_seed(0))
    keep = torch.rand(10, 24, generator=torch.Generator().manual_seed(1)) > 0.5
    for share in shares(weight, 4, mask_bits(keep)):
        rows = share.rows
        shape = (rows.stop - rows.start, 24)
        assert torch.equal(mask_from_bits(share.keep_bits(), shape), keep[rows])


@pytest.mark.parametrize(("shape", "masked"), [((6, 40), False), ((6, 36), True)])
def test_blocks_or_mask_bytes_that_cross_rows_are_not_cut_by_rows(shape: tuple[int, int], masked: bool) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    stored = weight if masked else quantize(weight, "nf4", 64)
    bits = mask_bits(weight > 0) if masked else None
    assert not any(share.by_rows for share in shares(stored, 2, bits))


@pytest.mark.parametrize(("length", "size"), [(7, 3), (3, 5), (8, 4), (1, 2), (10, 4)])
def test_spans_are_those_of_torch_chunk(length: int, size: int) -> None:
    values = torch.arange(length)
    chunks = [*values.chunk(size), *[values[:0]] * size][:size]
    assert [values[span(length, rank, size)].tolist() for rank in range(size)] == [each.tolist() for each in chunks]
