"""The DoRA algebra: row norm, gain and merge.

    y = g * (x W^T + s (drop(x) A^T) B^T) + bias,        g = m / ||W + s B A||_row

Source: DoRA, arXiv 2402.09353, eq. 5. The norm is held constant in the backward pass (sec. 4.3). LoRA is g = 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Below this share of ||w||^2 the factored sum has cancelled: with W A^T from a bf16 product a row that is left with 0.1
# of its length is 19 % off, one left with 0.33 up to 1.2 %, one left with 0.5 0.4 %, which is bf16's own rounding. Rows
# shorter than that take the direct norm.
CANCELLATION = 0.25


def squared_row_norm(weight: Tensor) -> Tensor:
    """||w||^2 of each row of a dense weight.

    Args:
        weight: (out, in), any float dtype; summed in float32, or float64 for float64 input.
    Returns:
        (out,) float32 or float64.
    """
    wide = weight if weight.dtype == torch.float64 else weight.float()
    return wide.square().sum(dim=1)


@torch.no_grad()
def row_norm(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, *, base_squared: Tensor | None = None
) -> Tensor:
    """Euclidean norm of each row of W + s B A, without forming B A.

    ||w + s b A||^2 = ||w||^2 + 2 s b (A w^T) + s^2 b (A A^T) b^T        row w of W, b of B

    The three terms are exact in exact arithmetic. Rows whose sum cancels (below `CANCELLATION` of ||w||^2) are
    formed and measured directly, so a row that the adapter removes does not come out as rounding noise.

    Source: DoRA, arXiv 2402.09353, eq. 5; held constant in the backward pass (sec. 4.3).

    Args:
        weight: Dense base W, (out, in), any float dtype; the product W A^T runs in this dtype.
        lora_A: (rank, in), any float dtype.
        lora_B: (out, rank), any float dtype.
        scaling: s = alpha / rank.
        base_squared: ||w||^2 per row where it is already known (W is frozen), (out,).
    Returns:
        (out,) float32 (float64 for float64 weights), non-negative, detached.
    Raises:
        ValueError: If an inner size differs.
    """
    if lora_A.shape != (lora_B.shape[1], weight.shape[1]) or lora_B.shape[0] != weight.shape[0]:
        raise ValueError(
            f"shapes do not chain: weight {tuple(weight.shape)}, lora_A {tuple(lora_A.shape)}, "
            f"lora_B {tuple(lora_B.shape)}; allowed: (out, in), (rank, in), (out, rank)."
        )
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    a, b = lora_A.to(wide), lora_B.to(wide)
    if base_squared is None:
        base_squared = squared_row_norm(weight)
    cross = (weight @ lora_A.to(weight.dtype).T).to(wide)  # (out, rank)
    delta_squared = ((b @ (a @ a.T)) * b).sum(dim=1)  # (out,)
    squared = base_squared + 2 * scaling * (b * cross).sum(dim=1) + scaling * scaling * delta_squared
    cancelled = squared < CANCELLATION * base_squared
    if bool(cancelled.any()):
        rows = cancelled.nonzero().squeeze(1)
        direct = weight[rows].to(wide) + scaling * (b[rows] @ a)
        squared[rows] = direct.square().sum(dim=1)
    return squared.clamp_min(0).sqrt()


def gain(magnitude: Tensor, norm: Tensor) -> Tensor:
    """g = m / n per row, with g = 0 where the row is zero (n = 0), so that a pruned row stays zero and is no NaN.

    Args:
        magnitude: m, (out,), float32 or float64.
        norm: ||W + s B A||_row, (out,).
    Returns:
        (out,) in magnitude's dtype.
    """
    return torch.where(norm > 0, magnitude / norm.where(norm > 0, torch.ones_like(norm)), torch.zeros_like(magnitude))


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
    return merged.mul_(gain(magnitude.to(dtype), norm).unsqueeze(1))
