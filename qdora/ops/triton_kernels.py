"""Triton kernels for packed weights of 4 bits: tiles in one pass, and the sums of the row norms without any tile.

A tile is decoded from the codes, the double quantised scales and the gain in one launch, with the roundings of the
plain-torch definition (`blockwise`, `tiles`), bit for bit. Kernels run on CUDA tensors, or, if the environment variable
TRITON_INTERPRET was 1 when Triton was imported, on CPU tensors.

Only `kernel_choice` decides whether this file is imported: nothing needs Triton.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from qdora.ops import codebooks
from qdora.ops.packed import PackedWeight, block_scales

INTERPRETED: bool = triton.knobs.runtime.interpret
"""Whether the kernels run in Triton's interpreter, on a CPU. It computes in bf16 wrongly, so they avoid bf16 there."""
# Without software pipelining: it would copy each look-up of a table through shared memory. A fused product and sum
# would round once where the definition rounds twice.
OPTIONS: dict[str, Any] = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": False}
"""Options of every launch."""

_NESTED_BLOCK_SIZE = tl.constexpr(codebooks.NESTED_BLOCK_SIZE)
# Rows and columns of a program's tile. A thread reads 4 bytes of codes and writes 8 weights (16 bytes in bf16) without
# leaving its registers.
DECODED = (4, 256)
# The same of the sums, and the columns of a program: parts of rows, since rows alone are too few for a large GPU.
SQUARES, FACTORS, SPAN = (8, 256), (64, 64), 1024
MOST_RANK = 128
"""The largest rank of `factor_dots`, whose sums are held in registers."""


@triton.jit
def _block_scales(  # type: ignore[no-untyped-def]
    absmax, nested_absmax, nested_code, nested_offset, block, mask, NESTED: tl.constexpr
):
    """The block scales of any blocks, float32, rounded as by `blockwise.dequantize_scales`; 0 outside of the mask."""
    scale = tl.load(absmax + block, mask=mask, other=0)
    if NESTED:
        group = tl.load(nested_absmax + block // _NESTED_BLOCK_SIZE, mask=mask, other=0.0)
        scale = tl.load(nested_code + scale.to(tl.int32)) * group + tl.load(nested_offset)
        scale = tl.where(mask, scale, 0.0)
    return scale


@triton.jit
def _decoded(  # type: ignore[no-untyped-def]
    codes, absmax, nested_absmax, nested_code, nested_offset, table, gain,
    row, row_mask, first, stop, in_features,
    BLOCK_SIZE: tl.constexpr, NESTED: tl.constexpr, GAIN: tl.constexpr, CROSSING: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Some rows of diag(gain) W, columns `first` to `first` + COLUMNS, float32; 0 outside of the masks.

    Args:
        row: (ROWS,) int64, rows of the weight.
        first, stop: The first column, a multiple of the block unless CROSSING, and the end of the columns wanted.
    """
    factor = tl.full([ROWS], 1.0, tl.float32)
    if GAIN:
        factor = tl.load(gain + row, mask=row_mask, other=0.0)
    if CROSSING:
        # A row may begin inside a block, and inside a byte. The definition scales by the gain last.
        column = first + tl.arange(0, COLUMNS)
        mask = row_mask[:, None] & (column < stop)[None, :]
        entry = row[:, None] * in_features + column[None, :]
        byte = tl.load(codes + entry // 2, mask=mask, other=0).to(tl.int32)
        code = tl.where(entry % 2 == 0, byte >> 4, byte & 15)
        scale = _block_scales(absmax, nested_absmax, nested_code, nested_offset, entry // BLOCK_SIZE, mask, NESTED)
        weight = tl.load(table + code) * scale
        if GAIN:
            weight = weight * factor[:, None]
        return tl.where(mask, weight, 0.0)
    # Each scale is read once, for the SPAN weights of its block that are in the tile.
    SPAN: tl.constexpr = BLOCK_SIZE if BLOCK_SIZE < COLUMNS else COLUMNS
    BLOCKS: tl.constexpr = COLUMNS // SPAN
    start = first + tl.arange(0, BLOCKS) * SPAN
    block_mask = row_mask[:, None] & (start < stop)[None, :]
    block = row[:, None] * (in_features // BLOCK_SIZE) + (start // BLOCK_SIZE)[None, :]
    scale = _block_scales(absmax, nested_absmax, nested_code, nested_offset, block, block_mask, NESTED)
    if GAIN:
        scale = scale * factor[:, None]
    pair = tl.arange(0, SPAN // 2)
    place = (row * (in_features // 2))[:, None, None] + (start // 2)[None, :, None] + pair[None, None, :]
    byte = tl.load(codes + place, mask=block_mask[:, :, None], other=0).to(tl.int32)
    high = tl.load(table + (byte >> 4)) * scale[:, :, None]
    low = tl.load(table + (byte & 15)) * scale[:, :, None]
    return tl.reshape(tl.join(high, low), [ROWS, COLUMNS])


@triton.jit
def _rows_of(  # type: ignore[no-untyped-def]
    place, num_rows, first_row, experts, rows_each, EXPERTS: tl.constexpr
):
    """The rows of the weight, int64, at some places of the result: `first_row` on, or those of the experts named."""
    row = first_row + place.to(tl.int64)
    if EXPERTS:
        expert = tl.load(experts + place // rows_each, mask=place < num_rows, other=0)
        row = expert.to(tl.int64) * rows_each + place % rows_each
    return row


@triton.jit
def decode_kernel(  # type: ignore[no-untyped-def]
    out, codes, absmax, nested_absmax, nested_code, nested_offset, table, gain, experts,
    in_features, rows_each, first_row, num_rows, first_column, num_columns,
    BLOCK_SIZE: tl.constexpr, NESTED: tl.constexpr, GAIN: tl.constexpr, EXPERTS: tl.constexpr,
    CROSSING: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One tile of ROWS x COLUMNS per program, in a grid of one dimension: the others end at 65,535."""
    across = tl.cdiv(num_columns, COLUMNS)
    program = tl.program_id(0)
    place = (program // across) * ROWS + tl.arange(0, ROWS)
    shift = (program % across) * COLUMNS
    row_mask = place < num_rows
    row = _rows_of(place, num_rows, first_row, experts, rows_each, EXPERTS)
    weight = _decoded(
        codes, absmax, nested_absmax, nested_code, nested_offset, table, gain,
        row, row_mask, first_column + shift, first_column + num_columns, in_features,
        BLOCK_SIZE, NESTED, GAIN, CROSSING, ROWS, COLUMNS,
    )  # fmt: skip
    column = shift + tl.arange(0, COLUMNS)
    target = out + place.to(tl.int64)[:, None] * num_columns + column[None, :]
    tl.store(target, weight.to(out.dtype.element_ty), mask=row_mask[:, None] & (column < num_columns)[None, :])


@triton.jit
def square_kernel(  # type: ignore[no-untyped-def]
    out, codes, absmax, nested_absmax, nested_code, nested_offset, table, in_features, num_rows,
    BLOCK_SIZE: tl.constexpr, NESTED: tl.constexpr, CROSSING: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """The sums of squares of ROWS rows over SPAN columns: out is (cdiv(in, SPAN), rows) float32."""
    parts = tl.cdiv(in_features, SPAN)
    part = tl.program_id(0) % parts
    place = (tl.program_id(0) // parts) * ROWS + tl.arange(0, ROWS)
    row_mask = place < num_rows
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for shift in range(0, SPAN, COLUMNS):
        first = part * SPAN + shift
        weight = _decoded(
            codes, absmax, nested_absmax, nested_code, nested_offset, table, absmax,
            place.to(tl.int64), row_mask, first, in_features, in_features,
            BLOCK_SIZE, NESTED, False, CROSSING, ROWS, COLUMNS,
        )  # fmt: skip
        total += weight * weight
    tl.store(out + part.to(tl.int64) * num_rows + place, tl.sum(total, axis=1), mask=row_mask)


@triton.jit
def factor_kernel(  # type: ignore[no-untyped-def]
    out, codes, absmax, nested_absmax, nested_code, nested_offset, table, experts, lora_A, lora_B,
    in_features, rows_each, num_rows, rank, a_stride, b_stride,
    BLOCK_SIZE: tl.constexpr, NESTED: tl.constexpr, EXPERTS: tl.constexpr, CROSSING: tl.constexpr,
    IN_FLOAT32: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SPAN: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """b_i . (W A^T)_i of ROWS rows over SPAN columns: out is (cdiv(in, SPAN), rows) float32.

    A program has rows of one expert: the grid is (experts, blocks of rows, parts of columns) in one dimension. A is
    lora_A + expert's place * a_stride, of the dtype of the product; B likewise, float32; a stride of 0 shares them.
    IN_FLOAT32: A is float32, and the product, too.
    """
    parts, blocks = tl.cdiv(in_features, SPAN), tl.cdiv(rows_each, ROWS)
    program = tl.program_id(0)
    part = program % parts
    expert_place = program // (parts * blocks)
    inside = (program // parts % blocks) * ROWS + tl.arange(0, ROWS)
    row_mask = inside < rows_each
    place = expert_place * rows_each + inside
    row = _rows_of(place, num_rows, 0, experts, rows_each, EXPERTS)
    rank_index = tl.arange(0, RANK)
    a_start = lora_A + expert_place.to(tl.int64) * a_stride
    product = tl.zeros([ROWS, RANK], tl.float32)
    for shift in range(0, SPAN, COLUMNS):
        first = part * SPAN + shift
        weight = _decoded(
            codes, absmax, nested_absmax, nested_code, nested_offset, table, absmax,
            row, row_mask, first, in_features, in_features,
            BLOCK_SIZE, NESTED, False, CROSSING, ROWS, COLUMNS,
        )  # fmt: skip
        column = first + tl.arange(0, COLUMNS)
        a = tl.load(
            a_start + rank_index[None, :] * in_features + column[:, None],
            mask=(rank_index < rank)[None, :] & (column < in_features)[:, None],
            other=0.0,
        )
        if IN_FLOAT32:
            product = tl.dot(weight, a, product, input_precision="ieee")
        else:
            product = tl.dot(weight.to(a.dtype), a, product)
    b = tl.load(
        lora_B + expert_place.to(tl.int64) * b_stride + inside.to(tl.int64)[:, None] * rank + rank_index[None, :],
        mask=row_mask[:, None] & (rank_index < rank)[None, :],
        other=0.0,
    )
    tl.store(out + part.to(tl.int64) * num_rows + place, tl.sum(product * b, axis=1), mask=row_mask)


class Experts(NamedTuple):
    """Some experts of a stack."""

    numbers: Tensor  # (n,) int64, in any order
    rows_each: int


class _Stored(NamedTuple):
    """The tensors that a kernel decodes from, in the order of its arguments, and its constants."""

    codes: Tensor
    absmax: Tensor
    nested_absmax: Tensor
    nested_code: Tensor
    nested_offset: Tensor
    table: Tensor

    @classmethod
    def of(cls, weight: PackedWeight) -> _Stored:
        table, nested = _table(weight), weight.nested
        if nested is None:
            absmax = block_scales(weight)  # of mxfp4 these are decoded
            return cls(weight.packed, absmax, absmax, absmax, absmax, table)
        return cls(weight.packed, weight.absmax, nested.absmax, nested.code, nested.offset, table)


_TABLES: dict[tuple[str, torch.device], Tensor] = {}


def _table(weight: PackedWeight) -> Tensor:
    """The values of 16 codes on the weight's device, sent there once for each kind.

    Kernels run on real tensors only; no table is made under a mode that would mark it as fake.
    """
    key = weight.kind, weight.device
    if key not in _TABLES:
        with torch.inference_mode(False):
            _TABLES[key] = codebooks.sixteen_values(weight.kind).to(weight.device)
    return _TABLES[key]


def _constants(weight: PackedWeight, tile: tuple[int, int]) -> dict[str, Any]:
    """The constants that all kernels have."""
    crossing = weight.shape[1] % weight.block_size != 0
    constants = {"BLOCK_SIZE": weight.block_size, "NESTED": weight.nested is not None, "CROSSING": crossing}
    return {**constants, "ROWS": tile[0], "COLUMNS": tile[1], **OPTIONS}


def _on(tensor: Tensor) -> AbstractContextManager[Any]:
    """A launch goes to the current device, which must be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


@torch.no_grad()
def decode(
    weight: PackedWeight,
    dtype: torch.dtype,
    *,
    rows: slice | None = None,
    columns: slice | None = None,
    gain: Tensor | None = None,
    experts: Experts | None = None,
) -> Tensor:
    """A dense tile of diag(gain) W in one launch: the bits of `tiles.row_tiles` and `tiles.column_tiles`.

    Args:
        weight: Any kind of 4 bits.
        dtype: float32, bfloat16 or float16.
        rows, columns: A part of the weight (default: all); columns begin and end at blocks, unless they are all.
        gain: (out,) float32 of all rows of the weight.
        experts: All rows of these experts of a stack, in this order, in place of `rows`.
    """
    first_row, stop_row, _ = (rows or slice(None)).indices(weight.shape[0])
    first, stop, _ = (columns or slice(None)).indices(weight.shape[1])
    num_rows = stop_row - first_row if experts is None else len(experts.numbers) * experts.rows_each
    out = torch.empty(num_rows, stop - first, dtype=torch.float32 if INTERPRETED else dtype, device=weight.device)
    factor = None if gain is None else gain.to(torch.float32).contiguous()
    stored = _Stored.of(weight)
    with _on(out):
        decode_kernel[(triton.cdiv(num_rows, DECODED[0]) * triton.cdiv(stop - first, DECODED[1]),)](
            out, *stored, stored.table if factor is None else factor,
            stored.table if experts is None else experts.numbers,
            weight.shape[1], 1 if experts is None else experts.rows_each,
            first_row, num_rows, first, stop - first,
            GAIN=factor is not None, EXPERTS=experts is not None, **_constants(weight, DECODED),
        )  # fmt: skip
    return out.to(dtype)


@torch.no_grad()
def squared_row_norm(weight: PackedWeight) -> Tensor:
    """||w||^2 of each row, (out,) float32, summed in float32 without a tile in memory."""
    rows, columns = weight.shape
    parts = triton.cdiv(columns, SPAN)
    out = torch.empty(parts, rows, dtype=torch.float32, device=weight.device)
    with _on(out):
        square_kernel[(triton.cdiv(rows, SQUARES[0]) * parts,)](
            out, *_Stored.of(weight), columns, rows, SPAN=SPAN, **_constants(weight, SQUARES)
        )
    return out.sum(dim=0)


@torch.no_grad()
def factor_dots(weight: PackedWeight, lora_A: Tensor, lora_B: Tensor, experts: Experts | None = None) -> Tensor:
    """b_i . (W A^T)_i of each row: the term of the factored row norm that reads W, without a tile in memory.

    W is rounded to A's dtype, as in a product of tiles; the product and its dot with B stay in float32.

    Args:
        lora_A: (rank, in), bfloat16 or float16; of experts (n, rank, in), or (1, ...) for one that they share.
        lora_B: (out, rank) float32; of experts (n, out, rank) or (1, ...).
        experts: The experts of a stack, or None for the whole weight.
    Returns: (out,) float32; of experts (n, out).
    """
    count, rows_each = (1, weight.shape[0]) if experts is None else (len(experts.numbers), experts.rows_each)
    a, b = lora_A.contiguous(), lora_B.contiguous()
    a = a.float() if INTERPRETED else a
    rank, columns = a.shape[-2:]
    parts = triton.cdiv(columns, SPAN)
    out = torch.empty(parts, count * rows_each, dtype=torch.float32, device=weight.device)
    stored = _Stored.of(weight)
    with _on(out):
        factor_kernel[(count * triton.cdiv(rows_each, FACTORS[0]) * parts,)](
            out, *stored, stored.table if experts is None else experts.numbers, a, b,
            columns, rows_each, count * rows_each, rank,
            *(0 if factor.dim() == 2 or len(factor) == 1 else factor.stride(0) for factor in (a, b)),
            EXPERTS=experts is not None, IN_FLOAT32=INTERPRETED, SPAN=SPAN, RANK=max(16, triton.next_power_of_2(rank)),
            **_constants(weight, FACTORS),
        )  # fmt: skip
    dots = out.sum(dim=0)
    return dots if experts is None else dots.view(count, rows_each)
