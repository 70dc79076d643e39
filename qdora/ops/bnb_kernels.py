"""bitsandbytes' dequantisation kernels, called as torch ops.

Never its layers: on CPUs with AVX512-BF16, `Linear4bit` repacks its weight in the first eval-mode forward, after which
dequantising gives garbage without an error. The ops below only read what they are given.
"""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor


@functools.cache
def is_available(device_type: str) -> bool:
    """Whether bitsandbytes' compiled library runs on this device type ("cpu" or "cuda")."""
    if device_type not in ("cpu", "cuda"):
        return False
    # It logs an error at import where the optional package `kernels`, which serves its layers only, is missing.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        from bitsandbytes.cextension import ErrorHandlerMockBNBNativeLibrary, lib
    except ImportError:
        return False
    if isinstance(lib, ErrorHandlerMockBNBNativeLibrary):
        return False
    return device_type == "cpu" or bool(getattr(lib, "compiled_with_cuda", False))


def quantize_4bit(weight: Tensor, kind: str, block_size: int) -> tuple[Tensor, Tensor]:
    """Codes (ceil(numel / 2),) uint8 and absmax (blocks,) float32. Needs several copies of the weight on a CPU."""
    packed, absmax = torch.ops.bitsandbytes.quantize_4bit.default(
        weight.detach().contiguous(), block_size, kind, torch.uint8
    )
    return packed.reshape(-1), absmax


def quantize_scales(absmax: Tensor, code: Tensor, block_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (blocks,) uint8, nested absmax (ceil(blocks / block_size),) float32, offset () float32."""
    offset = absmax.mean()
    codes, nested = torch.ops.bitsandbytes.quantize_blockwise.default(absmax - offset, code, block_size)
    return codes, nested, offset


def dequantize_scales(codes: Tensor, absmax: Tensor, code: Tensor, offset: Tensor, block_size: int) -> Tensor:
    """The block scales behind double quantisation, (blocks,) float32."""
    scales: Tensor = torch.ops.bitsandbytes.dequantize_blockwise.default(codes, absmax, code, block_size, torch.float32)
    return scales.add_(offset)


def dequantize_4bit(
    packed: Tensor, absmax: Tensor, kind: str, block_size: int, shape: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """(out, in) in `dtype`, which is float32, bfloat16 or float16."""
    dense: Tensor = torch.ops.bitsandbytes.dequantize_4bit.default(
        packed.contiguous(), absmax.contiguous(), block_size, kind, list(shape), dtype
    )
    return dense
