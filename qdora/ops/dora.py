"""The DoRA algebra: row norm, gain and merge.

    y = g * (x W^T + s (drop(x) A^T) B^T) + bias,        g = m / ||W + s B A||_row

Source: DoRA, arXiv 2402.09353, eq. 5. The norm is held constant in the backward pass (sec. 4.3). LoRA is g = 1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from qdora.ops.planned_device import device_kind
from qdora.ops.tiles import Weight, row_tiles, spans

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
    parts = []
    for _, tile in row_tiles(weight, wide):
        # A dense weight comes whole; its squares must not be a second one.
        runs = spans(tile.shape[0], tile.shape[1], tile.itemsize, device_kind(tile.device))
        parts += [tile[rows].square().sum(dim=1) for rows in runs]
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

    `factored_norm`, and `measure_cancelled_` where it is needed. On a GPU the host waits once for the answer.

    Args:
        As of `factored_norm`.
    Returns:
        (out,) float32 (float64 for a float64 weight), non-negative, detached.
    Raises:
        ValueError: If an inner size differs.
    """
    found = factored_norm(weight, lora_A, lora_B, scaling, base_squared=base_squared, dtype=dtype)
    # A fake tensor has no values to branch on; its bytes are those of the usual case, where no row has cancelled.
    if not isinstance(found.cancelled, FakeTensor) and bool(found.cancelled.any()):
        measure_cancelled_(found, weight, lora_A, lora_B, scaling, dtype=dtype)
    return found.norm


class FactoredNorm(NamedTuple):
    """Row norms from the factored sum.

    Attributes:
        norm: (out,), wrong in the rows that are `cancelled`.
        cancelled: (out,) bool, rows whose sum has cancelled.
    """

    norm: Tensor
    cancelled: Tensor


@torch.no_grad()
def factored_norm(
    weight: Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    *,
    base_squared: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> FactoredNorm:
    """Euclidean norm of each row of W + s B A from three terms; a GPU runs it without the host waiting.

    ||w + s b A||^2 = ||w||^2 + 2 s b (A w^T) + s^2 b (A A^T) b^T        row w of W, b of B

    The three terms are exact in exact arithmetic. Rows whose sum cancels (below `CANCELLATION` of ||w||^2) are marked.

    Source: DoRA, arXiv 2402.09353, eq. 5; held constant in the backward pass (sec. 4.3).

    Args:
        weight: Base W, (out, in), packed or dense; read tile by tile.
        lora_A: (rank, in), any float dtype.
        lora_B: (out, rank), any float dtype.
        scaling: s = alpha / rank.
        base_squared: ||w||^2 per row where it is already known (W is frozen), (out,).
        dtype: Of the tiles of W and of the product W A^T. None: W's own, or float32 for a packed one.
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
        squared[rows] = torch.add(base_squared[rows], (inner * b).sum(dim=1), alpha=scaling)
        del tile
    cancelled = squared < CANCELLATION * base_squared
    return FactoredNorm(squared.clamp_min_(0).sqrt_(), cancelled)


@torch.no_grad()
def measure_cancelled_(
    found: FactoredNorm,
    weight: Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    *,
    dtype: torch.dtype | None = None,
) -> None:
    """Form the cancelled rows of W + s B A and put their own norms in place of the factored ones.

    So a row that the adapter removes does not come out as rounding noise. Arguments as of `factored_norm`.
    """
    a = lora_A.to(_wide(weight))
    dtype = dtype or (weight.dtype if isinstance(weight, Tensor) else a.dtype)
    for span, tile in row_tiles(weight, dtype):
        rows = found.cancelled[span].nonzero().squeeze(1)
        if len(rows):
            direct = tile[rows].to(a.dtype).addmm_(lora_B[span][rows].to(a.dtype), a, alpha=scaling)
            found.norm[span][rows] = direct.square().sum(dim=1).sqrt_()
        del tile


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
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    magnitude: Tensor | None = None,
    keep_mask: Tensor | None = None,
) -> Tensor:
    """The one dense weight that equals base and adapter: g * (W + s B A), or W + s B A for LoRA.

    The norm is taken from the dense sum itself, not from the factored form: here it is at hand.

    Args:
        weight: Dequantised base, (out, in), float32 or float64 (the merge runs in this dtype).
        lora_A: (rank, in).
        lora_B: (out, rank).
        scaling: s = alpha / rank.
        magnitude: m, (out,), or None for LoRA.
        keep_mask: (out, in) bool; B A counts only where it is True. None: everywhere.
    Returns:
        (out, in) in weight's dtype, a new tensor.
    """
    dtype = weight.dtype
    if keep_mask is None:
        merged = torch.addmm(weight, lora_B.to(dtype), lora_A.to(dtype), alpha=scaling)
    else:
        masked = (lora_B.to(dtype) @ lora_A.to(dtype)).masked_fill_(~keep_mask, 0)
        merged = torch.add(weight, masked, alpha=scaling)
    if magnitude is None:
        return merged
    return merged.mul_(gain_of_sum(merged, magnitude).unsqueeze(1))


@torch.no_grad()
def gain_of_sum(total: Tensor, magnitude: Tensor) -> Tensor:
    """g = m / ||total||_row, with the norm taken from the dense sum W + s B A itself; 0 where the row is zero.

    Not `gain`: nothing is read back from the result, and a row with m = 0 is to be exactly zero.

    Args:
        total: W + s B A, (out, in), float32 or float64.
        magnitude: m, (out,).
    Returns:
        (out,) in total's dtype.
    """
    norm = squared_row_norm(total).sqrt()
    return (magnitude.to(total.dtype) / norm).masked_fill_(norm == 0, 0.0)
