"""bitsandbytes' kernels of 4-bit weights, called as torch ops.

Its layers are never used: on CPUs with AVX512-BF16, `Linear4bit` repacks its weight in the first eval-mode forward, and
dequantising then gives garbage without an error. The ops below only read their arguments.
"""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor

from qdora.quant.codebooks import NESTED_BLOCK_SIZE


@functools.cache
def is_available(device_type: str) -> bool:
    """Whether bitsandbytes' compiled library runs on this device type ("cpu" or "cuda")."""
    if device_type not in ("cpu", "cuda"):
        return False
    # Without the optional package `kernels`, which only its layers use, it logs a warning at import.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        from bitsandbytes.cextension import ErrorHandlerMockBNBNativeLibrary, lib
    except ImportError:
        return False
    missing = isinstance(lib, ErrorHandlerMockBNBNativeLibrary)
    return not missing and (device_type == "cpu" or bool(getattr(lib, "compiled_with_cuda", False)))


def dequantize_scales(codes: Tensor, absmax: Tensor, code: Tensor, offset: Tensor) -> Tensor:
    """The decoded block scales of double quantisation, (blocks,) float32."""
    decode = torch.ops.bitsandbytes.dequantize_blockwise.default
    scales: Tensor = decode(codes, absmax, code, NESTED_BLOCK_SIZE, torch.float32)
    return scales.add_(offset)


def dequantize_4bit(
    packed: Tensor, absmax: Tensor, kind: str, block_size: int, *, shape: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """(out, in) in `dtype`, which is float32, bfloat16 or float16."""
    dense: Tensor = torch.ops.bitsandbytes.dequantize_4bit.default(
        packed.contiguous(), absmax.contiguous(), block_size, kind, list(shape), dtype
    )
    return dense


def has_product(device_type: str) -> bool:
    """Whether `product_4bit` runs on this device type."""
    return is_available(device_type) and hasattr(torch.ops.bitsandbytes, "gemm_4bit")


def product_4bit(
    x: Tensor, packed: Tensor, absmax: Tensor, kind: str, block_size: int, *, shape: tuple[int, int]
) -> Tensor:
    """x W^T, (tokens, out) in x's dtype, which is float32, bfloat16 or float16, from the codes of W, (out, in)."""
    out: Tensor = torch.ops.bitsandbytes.gemm_4bit.default(x, packed.view(-1, 1), list(shape), absmax, block_size, kind)
    return out
