"""A frozen weight as a sequence of dense tiles, so that no product needs the whole dense weight at once.

A factor per row goes into the block scales: absmax * g gives the tile of diag(g) W with no further rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from qdora.quant import blockwise, codebooks
from qdora.quant.kernels import device_kind
from qdora.quant.packed import PackedWeight, block_scales, decode_blocks, dequantize

Weight = PackedWeight | Tensor
"""A frozen weight (out, in), packed or dense."""

# Most bytes of a dense tile. A GPU needs few, large products: a layer of 4096 x 14336 has one tile.
_CPU_TILE_BYTES = 16 << 20
_GPU_TILE_BYTES = 128 << 20
# A weight that must be cut on a CPU is cut into tiles of about this size, which stay in the cache.
_CPU_CUT_BYTES = 8 << 20
# Rows (or columns) of a tile on a CPU: with AMX oneDNN's bf16 product takes twice the time with 384 to 768.
_LONG, _SHORT = 1024, 256
# On a GPU the runs are equally long (a short last one leaves most of the chip idle) and multiples of cuBLAS's tile.
_GPU_STEP = 128


def wide_dtype(weight: Weight) -> torch.dtype:
    """The dtype of sums over a weight: float32, or float64 for a float64 weight."""
    return torch.promote_types(weight.dtype, torch.float32) if isinstance(weight, Tensor) else torch.float32


def dense_weight(weight: Weight, dtype: torch.dtype) -> Tensor:
    """The whole dense (out, in) weight in `dtype`; a dense weight is cast."""
    return weight.to(dtype) if isinstance(weight, Tensor) else dequantize(weight, dtype)


def spans(total: int, other: int, itemsize: int, device_type: str, align: int = 1) -> list[slice]:
    """Cut a dimension of length `total` into runs whose tiles stay within the budget of a "cpu" or "cuda". `other` is a
    tile's other dimension; every run but the last is a multiple of `align`."""
    budget = _CPU_TILE_BYTES if device_type == "cpu" else _GPU_TILE_BYTES
    fits = budget // (other * itemsize)
    if total <= fits:
        return [slice(0, total)]
    if device_type != "cpu":  # the fewest runs that fit, all but the last equally long
        step = math.lcm(align, _GPU_STEP) if fits >= _GPU_STEP else align
        longest = max(fits // step, 1) * step
        length = _round_up(-(-total // -(-total // longest)), step)
        return [slice(start, min(start + length, total)) for start in range(0, total, length)]
    long, short = _round_up(_LONG, align), _round_up(_SHORT, align)
    long *= min(fits // long, max(1, _CPU_CUT_BYTES // (other * itemsize * long)))
    runs, start = [], 0
    while start < total:
        length = long if 0 < long <= total - start else short
        runs.append(slice(start, min(start + length, total)))
        start += length
    return runs


def is_one_tile(weight: Weight, dtype: torch.dtype) -> bool:
    """Whether the whole weight is one tile in this dtype."""
    budget = _CPU_TILE_BYTES if device_kind(weight.device) == "cpu" else _GPU_TILE_BYTES
    return weight.shape[0] * weight.shape[1] * dtype.itemsize <= budget


def _round_up(length: int, align: int) -> int:
    return -(-length // align) * align


def dense_tiles(
    weight: Weight, dtype: torch.dtype, row_factor: Tensor | None = None, dim: int = 0
) -> Iterator[tuple[slice, Tensor]]:
    """Tiles (rows, in) of whole rows of diag(row_factor) W with the rows that each covers, in order, in any float
    dtype; with `dim` 1 of whole columns, (out, columns).

    Products of codes, scales and factors, (out,), are float32 (float64 for float64 weights), then cast once. A tile may
    share memory with the weight; a loop that ends with `del tile` holds one. Blocks that cross rows give one tile.
    """
    total, other, kind = weight.shape[dim], weight.shape[1 - dim], device_kind(weight.device)
    if isinstance(weight, Tensor):
        if row_factor is None and weight.dtype == dtype:
            yield slice(0, total), weight  # costs nothing, so it needs no budget
            return
        for run in spans(total, other, dtype.itemsize, kind):
            factor = row_factor if row_factor is None or dim == 1 else row_factor[run]
            yield run, _scaled_rows(weight[run] if dim == 0 else weight[:, run], factor, dtype)
        return
    block = 1 if weight.kind == "int8" else weight.block_size
    runs = spans(total, other, dtype.itemsize, kind, 1 if dim == 0 else block)
    if len(runs) == 1 and row_factor is None:  # spares the host some ten views
        yield runs[0], dequantize(weight, dtype)
        return
    if weight.shape[1] % weight.block_size:
        yield slice(0, total), _scaled_rows(dequantize(weight, torch.float32), row_factor, dtype)
        return
    codes, scales = weight.packed.view(weight.shape[0], -1), _row_scales(weight, row_factor)
    zeros = None if weight.zeros is None else weight.zeros.view(scales.shape)
    bits = codebooks.CODE_BITS[weight.kind]
    for run in runs:
        if dim == 0:
            some, part = codes[run], (run, slice(None))
        else:
            some = codes[:, run.start * bits // 8 : run.stop * bits // 8]
            of_rows = weight.kind == "int8"
            part = slice(None), slice(None) if of_rows else slice(run.start // block, run.stop // block)
        blocks = scales[part]
        if weight.kind == "int8":
            yield run, blockwise.dequantize_rows(some, blocks.squeeze(1), dtype)
            continue
        shape = (some.shape[0], some.shape[1] * 8 // bits)
        form = some.reshape(-1), blocks.reshape(-1), weight.kind, block
        own = None if zeros is None else zeros[part].reshape(-1)
        yield run, decode_blocks(*form, shape=shape, dtype=dtype, zeros=own)


def own_scales(weight: Weight, row_factor: Tensor | None = None) -> Tensor | None:
    """The decoded block scales of diag(row_factor) W, for `with_scales`: (blocks,) float32; None for a dense weight,
    and if blocks cross rows."""
    if isinstance(weight, Tensor) or weight.shape[1] % weight.block_size:
        return None
    return _row_scales(weight, row_factor).reshape(-1)


def with_scales(weight: Any, scales: Tensor) -> PackedWeight:
    """diag(row_factor) W from the codes of W and the `own_scales` of W and that factor: the same tiles, bit for bit."""
    form = weight.kind, weight.shape, weight.block_size, weight.packed, scales
    return PackedWeight(*form, zeros=weight.zeros)


def _row_scales(weight: PackedWeight, row_factor: Tensor | None) -> Tensor:
    """The block scales by rows, times the factor: (out, blocks of a row) float32; (out, 1) for int8."""
    scales = block_scales(weight).view(weight.shape[0], -1)
    if row_factor is None:
        return scales
    factor = (row_factor if row_factor.dtype == scales.dtype else row_factor.to(scales.dtype)).unsqueeze(1)
    # Double quantised scales have just been decoded into memory of their own.
    return scales * factor if weight.nested_absmax is None else scales.mul_(factor)


def _scaled_rows(tile: Tensor, row_factor: Tensor | None, dtype: torch.dtype) -> Tensor:
    if row_factor is None:
        return tile.to(dtype)
    return (tile * row_factor.unsqueeze(1)).to(dtype)
