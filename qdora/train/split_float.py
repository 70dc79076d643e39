"""A float32 number kept as a bfloat16 and 16 more bits, so that bf16 storage loses no update.

The bf16 half is the float32 rounded to nearest, and the layers multiply with it. The int16 half is the distance of the
two bit patterns, and joining them gives the float32 back, bit for bit. An optimizer that joins, updates in float32 and
splits again trains exactly as with float32 parameters, at 4 bytes a parameter; a bf16 copy and a float32 master take 6.
"""

from __future__ import annotations

import torch
from torch import Tensor


def split_float32_(master: Tensor, high: Tensor, low: Tensor) -> None:
    """float32, finite -> `high`, its `nearest_bfloat16`, and `low`, the int16 remainder of the bit pattern.

    The remainder is bits(master) - bits(high) in units of the last float32 bit; that of a tie is -2^15. No memory is
    allocated: `master` is contiguous and loses its values.
    """
    # After the carry of half of bf16's last bit the upper half of each number is the bf16. The lower half is the
    # remainder plus 2^15, and flipping the sign bit subtracts that.
    halves = master.view(-1).view(torch.int32).add_(0x8000).view(torch.int16).view(-1, 2)  # little-endian: lower first
    high.view(torch.int16).copy_(halves[:, 1].view(high.shape))
    low.copy_(halves[:, 0].view(low.shape)).bitwise_xor_(-0x8000)


def join_float32(high: Tensor, low: Tensor) -> Tensor:
    """(bfloat16, int16) -> the float32 that `split_float32_` was given, bit for bit, as a new tensor."""
    bits = (high.contiguous().view(torch.int16).to(torch.int32) << 16) + low.to(torch.int32)
    return bits.view(torch.float32)
