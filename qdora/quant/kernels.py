"""What computes on a device: kernels of bitsandbytes and Triton, and the device that fake tensors of a plan stand for.

Only ops are called: on CPUs with AVX512-BF16 `Linear4bit` repacks its weight, and dequantising then gives garbage.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal

import torch
from torch import Tensor

from qdora.quant import codebooks
from qdora.quant.codebooks import NESTED_BLOCK_SIZE

log = logging.getLogger("qdora")
Routing = Literal["even", "skewed"]
"""How a plan divides tokens among the experts of a mixture: evenly, or nearly all of them to the same experts."""
# Fake tensors of a GPU need a GPU build of torch, so a plan's tensors say "cpu" wherever they will live.
_PLANNED: ContextVar[tuple[str, Routing] | None] = ContextVar("planned_device_type_and_routing", default=None)


@contextmanager
def planned_on(device_type: str, routing: Routing = "even") -> Iterator[None]:
    """Inside, all tensors are fake and stand for tensors of this device type ("cpu" or "cuda")."""
    token = _PLANNED.set((device_type, routing))
    try:
        yield
    finally:
        _PLANNED.reset(token)


def is_planning() -> bool:
    """Whether tensors are fake: a number that depends on their values must be replaced by its expectation."""
    return _PLANNED.get() is not None


def device_kind(device: torch.device) -> str:
    """The type of the device that a tensor is on, or that a fake one stands for: it decides tiles and kernels."""
    planned = _PLANNED.get()
    return device.type if planned is None else planned[0]


def planned_counts(num_tokens: int, top_k: int, num_experts: int) -> list[int]:
    """How many tokens each expert of a mixture gets in a plan, (num_experts,), where each token chooses `top_k`.

    Skewed, `top_k` experts get nearly all tokens, and as many as may be of the others one: they share a launch with the
    busy ones, and their weights do not lie together.
    """
    planned, counts, left, busy = (
        _PLANNED.get(),
        [0] * num_experts,
        num_tokens * top_k,
        list(range(num_experts)),
    )
    if planned is not None and planned[1] == "skewed":
        reached = busy[:: 2 if (num_experts + 1) // 2 >= top_k else 1][:left]
        for expert in reached:
            counts[expert] = 1
        left, busy = left - len(reached), reached[:top_k]
    each, more = divmod(left, max(1, len(busy)))
    for index, expert in enumerate(busy):
        counts[expert] += each + (index < more)
    return counts


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
    """As `blockwise.dequantize_scales`."""
    decode = torch.ops.bitsandbytes.dequantize_blockwise.default
    scales: Tensor = decode(codes, absmax, code, NESTED_BLOCK_SIZE, torch.float32)
    return scales.add_(offset)


def dequantize_4bit(
    packed: Tensor, absmax: Tensor, kind: str, block_size: int, *, shape: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """As `blockwise.dequantize_blocks`, to float32, bfloat16 or float16."""
    dense: Tensor = torch.ops.bitsandbytes.dequantize_4bit.default(
        packed.contiguous(), absmax.contiguous(), block_size, kind, list(shape), dtype
    )
    return dense


@functools.cache
def tight_decoder(device_type: str) -> Any:
    """`tight_kernel.decode_into`; None where it does not run, on a GPU with one line in the log."""
    if device_type != "cuda":
        return None
    try:
        from qdora.quant.tight_kernel import decode_into

        # Triton compiles at a launch, for which it needs a C compiler.
        codes, ones = (
            torch.ones(32, dtype=dtype, device=device_type) for dtype in (torch.uint8, torch.float32)
        )
        decode_into(torch.empty_like(ones), codes, ones, ones, bits=3, block_size=16)
    except Exception as error:
        log.warning("Weights of 2 and 3 bits are decoded by plain torch, more slowly. Triton: %r", error)
        return None
    return decode_into


def dequantize_tight(
    packed: Tensor, absmax: Tensor, kind: str, block_size: int, *, shape: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """As `blockwise.dequantize_blocks`, for `codebooks.TIGHT`, in one launch."""
    out = torch.empty(shape, dtype=dtype, device=packed.device)
    if not is_planning():
        bits = codebooks.CODE_BITS[kind]
        values = codebooks.resident_values(kind, packed).view(torch.float32)
        tight_decoder(packed.device.type)(out, packed, absmax, values, bits=bits, block_size=block_size)
    return out


def has_product(device_type: str) -> bool:
    """Whether `product_4bit` runs on this device type."""
    return is_available(device_type) and hasattr(torch.ops.bitsandbytes, "gemm_4bit")


def product_4bit(
    x: Tensor, packed: Tensor, absmax: Tensor, kind: str, block_size: int, *, shape: tuple[int, int]
) -> Tensor:
    """x W^T, (tokens, out) in x's dtype, which is float32, bfloat16 or float16, from the codes of W, (out, in)."""
    out: Tensor = torch.ops.bitsandbytes.gemm_4bit.default(
        x, packed.view(-1, 1), list(shape), absmax, block_size, kind
    )
    return out
