"""The low-rank factors A and B as the products take them: rounded to the dtype of the products, B scaled by s g."""

from __future__ import annotations

import torch
from torch import Tensor

from qdora.quant.planned_device import device_kind

# In float32 4 MiB, and 32 MiB on a GPU, where launches cost more.
_ENTRIES_PER_SLICE = 1 << 20
_GPU_ENTRIES_PER_SLICE = 1 << 23


def entries_at_a_time(device: torch.device) -> int:
    """Entries of low-rank factors that are computed with at a time on a device."""
    return _ENTRIES_PER_SLICE if device_kind(device) == "cpu" else _GPU_ENTRIES_PER_SLICE


def nearest_bfloat16(master: Tensor) -> Tensor:
    """float32, finite -> the nearest bfloat16, ties away from zero."""
    # Adding half of bf16's last bit and cutting rounds to nearest in sign-magnitude order; the carry into the exponent
    # is right there too, since float bit patterns of one sign are ordered.
    bits = master.contiguous().view(torch.int32)
    return ((bits + 0x8000) >> 16).to(torch.int16).view(torch.bfloat16)


def rounded(factor: Tensor, dtype: torch.dtype) -> Tensor:
    """A low-rank factor in the dtype of the products.

    float32 goes to bfloat16 as the optimizer splits it. So an adapter stored in float32 and one stored in bfloat16 with
    its low bits beside it multiply with the same numbers and train alike, bit for bit.
    """
    if factor.dtype == torch.float32 and dtype == torch.bfloat16:
        return nearest_bfloat16(factor)
    return factor.to(dtype)


def row_factor(gain: Tensor | None, scaling: float) -> float | Tensor:
    """s g, the factor of each row of B: (..., out, 1) for gains (..., out), or a number for LoRA."""
    return scaling if gain is None else (gain * scaling).unsqueeze(-1)


def scaled_B(lora_B: Tensor, factor: float | Tensor, dtype: torch.dtype) -> Tensor:
    """diag(s g) B in the dtype of the products: (out, rank), rounded once more after `rounded`."""
    entries = entries_at_a_time(lora_B.device)
    if lora_B.numel() <= entries:
        return scaled_rows(rounded(lora_B, dtype), factor, dtype)
    scaled = torch.empty(lora_B.shape, dtype=dtype, device=lora_B.device)
    step = max(1, entries // lora_B.shape[1])
    for start in range(0, lora_B.shape[0], step):
        rows = slice(start, start + step)
        some = factor if isinstance(factor, float) else factor[rows]
        scaled[rows] = scaled_rows(rounded(lora_B[rows], dtype), some, dtype)
    return scaled


def scaled_rows(values: Tensor, factor: float | Tensor, dtype: torch.dtype) -> Tensor:
    """`values` (..., out, rank) times a `row_factor`, rounded to `dtype`; unlike `scaled_B` all at a time."""
    if isinstance(factor, float):
        return (values * factor).to(dtype)
    # Widened first: torch multiplies tensors of two dtypes entry by entry, at half the speed.
    return (values.to(factor.dtype) * factor).to(dtype)
