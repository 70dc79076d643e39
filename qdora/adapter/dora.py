"""The DoRA algebra: row norm, gain and merge.

    y = g * (x W^T + s (drop(x) A^T) B^T) + bias,        g = m / ||W + s B A||_row

Source: DoRA, arXiv 2402.09353, eq. 5. The norm is held constant in the backward pass (sec. 4.3). LoRA is g = 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from qdora.quant.planned_device import device_kind, is_planning
from qdora.quant.tiles import Weight, row_tiles, spans, wide_dtype

# Below this share of ||w||^2 the factored sum has cancelled, and the row takes the direct norm. With W A^T from a bf16
# product the norm of a row that keeps 0.1 of its length is 19 % off, at 0.33 up to 1.2 %, and at 0.5 0.4 %, which is
# bf16's own rounding.
CANCELLATION = 0.25
# Replaces a magnitude of exactly 0: small enough to add nothing to any sum, large enough that the output keeps its
# digits, from which the gradient of the magnitude is read (out of range for float16, where such a row stays dead).
_SMALLEST_MAGNITUDE = 2.0**-100


@contextmanager
def full_precision() -> Iterator[None]:
    """Compute float32 products in float32 in the block (or in the function that it decorates), whatever the caller lets
    torch do with them; then the caller's settings are back.

    `torch.set_float32_matmul_precision("high")` and its relatives let a GPU round the factors to TF32, and a CPU to
    bfloat16. In a row norm or a merged weight that is an error of 5e-4 and more.
    """
    backends: Any = torch.backends
    backends = backends.cuda.matmul, backends.mkldnn.matmul
    before = [each.fp32_precision for each in backends]
    try:
        named = torch.get_float32_matmul_precision()
    except RuntimeError:  # set by torch.backends alone, about which torch refuses to answer here
        named = None
    # It sets all backends and the older flags: torch refuses to compute where the two disagree.
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        if named is not None:
            torch.set_float32_matmul_precision(named)
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


@torch.no_grad()
def squared_row_norm(weight: Weight) -> Tensor:
    """||w||^2 of each row, read tile by tile: (out,) float32, or float64 for a float64 weight."""
    wide = wide_dtype(weight)
    if is_planning():  # a plan counts no bytes before the adapters are there, and a stack has thousands of tiles
        return torch.empty(weight.shape[0], dtype=wide, device=weight.device)
    parts = []
    for _, tile in row_tiles(weight, wide):
        # A dense weight comes as one tile; its squares must not take as much again.
        runs = spans(tile.shape[0], tile.shape[1], tile.itemsize, device_kind(tile.device))
        parts += [tile[rows].square().sum(dim=1) for rows in runs]
    return torch.cat(parts)


@torch.no_grad()
def row_norm(
    weight: Weight, lora_A: Tensor, lora_B: Tensor, scaling: float, *, base_squared: Tensor, dtype: torch.dtype
) -> Tensor:
    """Euclidean norm of each row of W + s B A, without forming B A: (out,) float32 (float64 for a float64 weight).

    Calls `factored_norm`, with its arguments and errors, and `measure_cancelled_` where a row has cancelled; a GPU's
    host waits once to know that.
    """
    found = factored_norm(weight, lora_A, lora_B, scaling, base_squared=base_squared, dtype=dtype)
    # A fake tensor has no values to branch on; a plan counts the usual case, in which no row has cancelled.
    if not isinstance(found.cancelled, FakeTensor) and bool(found.cancelled.any()):
        measure_cancelled_(found, weight, lora_A, lora_B, scaling, dtype=dtype)
    return found.norm


class FactoredNorm(NamedTuple):
    """Row norms from the factored sum."""

    norm: Tensor  # (out,), wrong in the cancelled rows
    cancelled: Tensor  # (out,) bool: rows whose sum has cancelled


@torch.no_grad()
def factored_norm(
    weight: Weight, lora_A: Tensor, lora_B: Tensor, scaling: float, *, base_squared: Tensor, dtype: torch.dtype
) -> FactoredNorm:
    """`factored_norms` of one layer: factors (rank, in) and (out, rank), squares and norms (out,).

    Raises ValueError: If an inner size differs.
    """
    if lora_A.shape != (lora_B.shape[1], weight.shape[1]) or lora_B.shape[0] != weight.shape[0]:
        raise ValueError(
            f"weight, lora_A and lora_B must be (out, in), (rank, in) and (out, rank), got {tuple(weight.shape)}, "
            f"{tuple(lora_A.shape)} and {tuple(lora_B.shape)}."
        )
    a, b, squared = (each.unsqueeze(0) for each in (lora_A, lora_B, base_squared))
    found = factored_norms([weight], a, b, scaling, base_squared=squared, dtype=dtype)
    return FactoredNorm(found.norm[0], found.cancelled[0])


@torch.no_grad()
@full_precision()
def factored_norms(
    weights: Sequence[Weight],
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    *,
    base_squared: Tensor,
    dtype: torch.dtype,
) -> FactoredNorm:
    """Euclidean norm of each row of W + s B A of n layers alike, from three terms; no host waits for its GPU.

        ||w + s b A||^2 = ||w||^2 + 2 s b (A w^T) + s^2 b (A A^T) b^T        row w of W, b of B

    The three terms are exact in exact arithmetic. Rows whose sum cancels (below `CANCELLATION` of ||w||^2) are marked.
    Each weight is read on its own; all else is one operation for all layers, since its launches would cost more than
    its arithmetic.

    Source: DoRA, arXiv 2402.09353, eq. 5; held constant in the backward pass (sec. 4.3).

    Args:
        weights: Bases W, (out, in), packed or dense, of one kind; read tile by tile.
        lora_A, lora_B: (n, rank, in) and (n, out, rank), any float dtype.
        scaling: s = alpha / rank.
        base_squared: ||w||^2 of each row, (n, out), constant since W is frozen.
        dtype: Of the tiles of W and of the products W A^T; all else is summed in float32 or wider.
    Returns: Norms and flags, (n, out).
    """
    narrow = lora_A.to(dtype)
    products = torch.empty(lora_B.shape, dtype=dtype, device=lora_B.device)
    for weight, a, product in zip(weights, narrow, products, strict=True):
        for rows, tile in row_tiles(weight, dtype):
            torch.mm(tile, a.T, out=product[rows])
            del tile
    return norms_of_products(products, lora_A, lora_B, scaling, base_squared=base_squared)


def norms_of_products(
    products: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, *, base_squared: Tensor
) -> FactoredNorm:
    """The sums of `factored_norms`, with its arguments, from the products W A^T, (n, out, rank) in any dtype.

    Factors that all share may be (1, ...).
    """
    wide = base_squared.dtype
    a, b = lora_A.to(wide), lora_B.to(wide).expand_as(products)
    gram = (torch.bmm(a, a.mT) * scaling).expand(len(products), -1, -1)  # (n, rank, rank)
    # s b A (2 w + s b A)^T = (2 W A^T + s B A A^T) . s b
    inner = torch.baddbmm(products.to(wide), b, gram, beta=2.0)  # (n, out, rank)
    squared = torch.add(base_squared, inner.mul_(b).sum(dim=-1), alpha=scaling)
    cancelled = squared < CANCELLATION * base_squared
    return FactoredNorm(squared.clamp_min_(0).sqrt_(), cancelled)


@torch.no_grad()
@full_precision()
def measure_cancelled_(
    found: FactoredNorm, weight: Weight, lora_A: Tensor, lora_B: Tensor, scaling: float, *, dtype: torch.dtype
) -> None:
    """Form the cancelled rows of W + s B A and write their norms over the factored ones.

    So the norm of a row that the adapter removes is not rounding noise. Arguments are those of `factored_norm`.
    """
    a = lora_A.to(wide_dtype(weight))
    for span, tile in row_tiles(weight, dtype):
        rows = found.cancelled[span].nonzero().squeeze(1)
        if len(rows):
            direct = tile[rows].to(a.dtype).addmm_(lora_B[span][rows].to(a.dtype), a, alpha=scaling)
            found.norm[span][rows] = direct.square().sum(dim=1).sqrt_()
        del tile


@torch.no_grad()
@full_precision()
def masked_row_norm(
    weight: Weight, keep_bits: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, *, dtype: torch.dtype
) -> Tensor:
    """Euclidean norm of each row of W + s M o (B A), formed block by block of rows: (out,) float32 or float64.

    Args:
        keep_bits: The mask M in the form of `quant.sparsity.mask_bits`.
        dtype: Of the tiles of W. The sum with B A is formed and added up in float32 (float64 for float64 tiles).
    """
    from qdora.adapter.masked_update import row_blocks
    from qdora.quant.sparsity import mask_from_bits

    wide = torch.promote_types(dtype, torch.float32)
    norm = torch.empty(weight.shape[0], dtype=wide, device=lora_A.device)
    shape = (weight.shape[0], weight.shape[1])
    a = lora_A.to(wide)
    for rows, tile in row_tiles(weight, dtype):
        for some in row_blocks(rows.stop, rows.start):
            delta = (lora_B[some].to(wide) @ a).mul_(mask_from_bits(keep_bits, shape, some))
            adapted = delta.mul_(scaling).add_(tile[some.start - rows.start : some.stop - rows.start])
            norm[some] = adapted.square_().sum(dim=1).sqrt_()
            del delta, adapted
        del tile
    return norm


class Gain(NamedTuple):
    """The gain of a DoRA layer in one state of its parameters."""

    value: Tensor  # g = m / ||W + s B A||_row, (out,), 0 where the row is zero
    inverse_magnitude: Tensor  # 1 / m, (out,), finite


@torch.no_grad()
def gain(magnitude: Tensor, norm: Tensor) -> Gain:
    """g = m / n per row, and g = 0 where the row is zero (n = 0), so that a pruned row stays zero and is no NaN.

    A live row with m = 0 gets m = 2^-100: its output counts as zero everywhere but in its own gradient.

    Args:
        magnitude: m, (out,), float32 or float64, which is the dtype of the result.
        norm: ||W + s B A||_row, (out,).
    """
    floored = magnitude.masked_fill(magnitude == 0, _SMALLEST_MAGNITUDE)
    return Gain((floored / norm).masked_fill_(norm == 0, 0.0), floored.reciprocal())


@torch.no_grad()
@full_precision()
def merged_weight(
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    magnitude: Tensor | None = None,
    keep_mask: Tensor | None = None,
) -> Tensor:
    """The dense weight that equals base and adapter: g * (W + s B A), or W + s B A for LoRA; a new tensor.

    The norm is that of the dense sum, which is at hand here, not the factored one.

    Args:
        weight: Dequantised base, (out, in), float32 or float64, in which the merge runs and which the result has.
        magnitude: m, (out,), or None for LoRA.
        keep_mask: (out, in) bool; B A counts only where it is True (default: everywhere).
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
    """g = m / ||total||_row, (out,), from the dense sum W + s B A, float32 or float64; 0 where the row is zero.

    Unlike `gain` it leaves a row with m = 0 exactly zero: no gradient is read from the result.
    """
    norm = squared_row_norm(total).sqrt()
    return (magnitude.to(total.dtype) / norm).masked_fill_(norm == 0, 0.0)
