"""The sum over tokens of the product of two token-sized tensors: the gradient of a factor per output."""

from __future__ import annotations

import torch
from torch import Tensor


def column_dot(left: Tensor, right: Tensor, factor: Tensor) -> Tensor:
    """factor_i sum_t left[t, i] right[t, i] for each column i, in one pass and without a temporary of token size.

    torch has one kernel that forms these sums: the gradient of the weight of a batch normalisation with mean 0 and
    deviation 1 / factor. On a CPU it reads bf16 and sums in float32, takes 0.4 to 0.6 of the time of
    `(left * right).sum(0)`, and has a relative error of 2e-7 where the rounded products of that have 2e-3.

    Args:
        left, right: (tokens, out), the same float dtype.
        factor: (out,) float32, or float64 for float64 inputs.
    Returns:
        (out,) in factor's dtype.
    """
    zero = torch.zeros_like(factor)
    if left.shape[0] == 0:
        return zero
    # Mean and deviation are of these tokens (True); of the three gradients only the weight's is wanted.
    total: Tensor = torch.ops.aten.native_batch_norm_backward(
        left.contiguous(), right.contiguous(), factor, None, None, zero, factor, True, 0.0, [False, True, False]
    )[1]
    return total
