"""The DoRA algebra: row norm, gain and merge.

    y = g * (x W^T + s (drop(x) A^T) B^T) + bias,        g = m / ||W + s B A||_row

Source: DoRA, arXiv 2402.09353, eq. 5. The norm is held constant in the backward pass (sec. 4.3). LoRA is g = 1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from qdora.ops.tiles import Weight, row_tiles

# Below this share of ||w||^2 the factored sum has cancelled: with W A^T from a bf16 product a row that is left with 0.1
# of its length is 19 % off, one left with 0.33 up to 1.2 %, one left with 0.5 0.4 %, which is bf16's own rounding. Rows
# shorter than that take the direct norm.
CANCELLATION = 0.25

# What a magnitude of exactly 0 counts as: small enough to add nothing to any sum, large enough that the output keeps
# its digits, from which the gradient of the magnitude is read (out of range for float16, where such a row stays dead).
_SMALLEST_MAGNITUDE = 2.0**-100


def _wide(weight: Weight) -> torch.dtype:
    """The dtype of sums over a weight."""
    return torch.float64 if isinstance(weight, Tensor) and weight.dtype == torch.float64 else torch.float32


@torch.no_grad()
def squared_row_norm(weight: Weight) -> Tensor:
    """||w||^2 of each row.

    Args:
        weight: (out, in), packed or dense in any float dtype; read tile by tile.
    Returns:
        (out,) float32, or float64 for a float64 weight.
    """
    wide = _wide(weight)
    parts = [tile.square().sum(dim=1) for _, tile in row_tiles(weight, wide)]
    return torch.cat(parts)


@torch.no_grad()
def row_norm(
    weight: Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    *,
    base_squared: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Euclidean norm of each row of W + s B A, without forming B A.

    ||w + s b A||^2 = ||w||^2 + 2 s b (A w^T) + s^2 b (A A^T) b^T        row w of W, b of B

    The three terms are exact in exact arithmetic. Rows whose sum cancels (below `CANCELLATION` of ||w||^2) are
    formed and measured directly, so a row that the adapter removes does not come out as rounding noise.

    Source: DoRA, arXiv 2402.09353, eq. 5; held constant in the backward pass (sec. 4.3).

    Args:
        weight: Base W, (out, in), packed or dense; read tile by tile.
        lora_A: (rank, in), any float dtype.
        lora_B: (out, rank), any float dtype.
        scaling: s = alpha / rank.
        base_squared: ||w||^2 per row where it is already known (W is frozen), (out,).
        dtype: Of the tiles of W and of the product W A^T. None: W's own, or float32 for a packed one.
    Returns:
        (out,) float32 (float64 for a float64 weight), non-negative, detached.
    Raises:
        ValueError: If an inner size differs.
    """
    if lora_A.shape != (lora_B.shape[1], weight.shape[1]) or lora_B.shape[0] != weight.shape[0]:
        raise ValueError(
            f"shapes do not chain: weight {tuple(weight.shape)}, lora_A {tuple(lora_A.shape)}, "
            f"lora_B {tuple(lora_B.shape)}; allowed: (out, in), (rank, in), (out, rank)."
        )
    wide = _wide(weight)
    dtype = dtype or (weight.dtype if isinstance(weight, Tensor) else wide)
    base_squared = squared_row_norm(weight) if base_squared is None else base_squared
    a = lora_A.to(wide)
    gram = (a @ a.T) * scaling  # (rank, rank)
    a_narrow = lora_A.to(dtype)
    squared = torch.empty_like(base_squared)
    for rows, tile in row_tiles(weight, dtype):
        b = lora_B[rows].to(wide)
        # s b A (2 w + s b A)^T = (2 W A^T + s B A A^T) . s b
        inner = torch.addmm((tile @ a_narrow.T).to(wide), b, gram, beta=2.0)  # (rows, rank)
        squared[rows] = torch.addcmul(base_squared[rows], (inner * b).sum(dim=1), b.new_tensor(scaling))
        _measure_cancelled_(squared[rows], base_squared[rows], tile, a, b, scaling)
    return squared.clamp_min_(0).sqrt_()


def _measure_cancelled_(
    squared: Tensor, base_squared: Tensor, tile: Tensor, a: Tensor, b: Tensor, scaling: float
) -> None:
    """Replace the factored sums that have cancelled by direct ones, in place."""
    cancelled = squared < CANCELLATION * base_squared
    # A fake tensor has no values to branch on; its bytes are those of the usual case, where no row has cancelled.
    if isinstance(cancelled, FakeTensor) or not bool(cancelled.any()):
        return
    rows = cancelled.nonzero().squeeze(1)
    direct = tile[rows].to(a.dtype).addmm_(b[rows], a, alpha=scaling)
    squared[rows] = direct.square().sum(dim=1)


class Gain(NamedTuple):
    """What a DoRA layer multiplies with in one state of its parameters.

    Attributes:
        value: g = m / ||W + s B A||_row, (out,), 0 where the row is zero.
        inverse_magnitude: 1 / m, (out,), finite.
    """

    value: Tensor
    inverse_magnitude: Tensor


@torch.no_grad()
def gain(magnitude: Tensor, norm: Tensor) -> Gain:
    """g = m / n per row, with g = 0 where the row is zero (n = 0), so that a pruned row stays zero and is no NaN.

    A live row with m = 0 gets m = 2^-100: its output is zero for every purpose but its own gradient.

    Args:
        magnitude: m, (out,), float32 or float64.
        norm: ||W + s B A||_row, (out,).
    Returns:
        Gain in magnitude's dtype, detached.
    """
    floored = magnitude.masked_fill(magnitude == 0, _SMALLEST_MAGNITUDE)
    return Gain((floored / norm).masked_fill_(norm == 0, 0.0), floored.reciprocal())


@torch.no_grad()
def merged_weight(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, magnitude: Tensor | None = None
) -> Tensor:
    """The one dense weight that equals base and adapter: g * (W + s B A), or W + s B A for LoRA.

    The norm is taken from the dense sum itself, not from the factored form: here it is at hand.

    Args:
        weight: Dequantised base, (out, in), float32 or float64 (the merge runs in this dtype).
        lora_A: (rank, in).
        lora_B: (out, rank).
        scaling: s = alpha / rank.
        magnitude: m, (out,), or None for LoRA.
    Returns:
        (out, in) in weight's dtype, a new tensor.
    """
    dtype = weight.dtype
    merged = torch.addmm(weight, lora_B.to(dtype), lora_A.to(dtype), alpha=scaling)
    if magnitude is None:
        return merged
    norm = squared_row_norm(merged).sqrt()
    # Not `gain`: here nothing is read back from the result, and a row with m = 0 is to be exactly zero.
    return merged.mul_((magnitude.to(dtype) / norm).masked_fill_(norm == 0, 0.0).unsqueeze(1))
