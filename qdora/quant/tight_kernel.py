"""Codes of 2 and 3 bits to dense weights in one launch of Triton. Imported only where Triton is installed."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_STEP = 1024  # weights of a program


def decode_into(
    out: Tensor, packed: Tensor, scales: Tensor, values: Tensor, *, bits: int, block_size: int
) -> None:
    """out[i] = value[code i] * scales[i // block_size], a float32 product and one cast, for all of `out`, in order.

    `packed` are codes as by `blockwise.pack_codes`, `scales` (blocks,) float32, `values` (4 * 2^bits or more,) float32:
    value[code] = values[4 * code + 3], as in `codebooks.resident_values`.
    """
    grid = (-(-out.numel() // _STEP),)
    with torch.cuda.device_of(packed):  # type: ignore[no-untyped-call]
        _kernel[grid](out, packed, scales, values, out.numel(), block_size, bits, _STEP)


def _decode(  # type: ignore[no-untyped-def]
    out, packed, scales, values, numel, BLOCK: tl.constexpr, BITS: tl.constexpr, STEP: tl.constexpr
):
    index = tl.program_id(0).to(tl.int64) * STEP + tl.arange(0, STEP)
    inside = index < numel
    byte = packed + (index * BITS >> 3)
    first = tl.load(byte, mask=inside, other=0).to(tl.int32)
    shift = (16 - BITS - (index * BITS & 7)).to(tl.int32)
    second = tl.load(byte + 1, mask=inside & (shift < 8), other=0).to(tl.int32)  # 3 bits may lie in two bytes
    code = ((first << 8 | second) >> shift) & ((1 << BITS) - 1)
    scale = tl.load(scales + index // BLOCK, mask=inside, other=0.0)
    value = tl.load(values + code * 4 + 3, mask=inside, other=0.0)
    tl.store(out + index, (value * scale).to(out.dtype.element_ty), mask=inside)


_kernel: Any = triton.jit(_decode)
