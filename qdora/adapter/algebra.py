"""The DoRA algebra: low-rank factors as the products take them, row norm, gain and merge.

    y = g * (x W^T + s (drop(x) A^T) B^T) + bias,        g = m / ||W + s B A||_row

Source: DoRA, arXiv 2402.09353, eq. 5; the norm is constant in the backward pass (sec. 4.3). LoRA is g = 1. With a keep
mask M of a pruned W, M o (B A) takes the place of B A.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from qdora.quant.kernels import device_kind, is_planning
from qdora.quant.packed import mask_from_bits
from qdora.quant.tiles import Weight, dense_tiles, spans, wide_dtype

# Below this share of ||w||^2 the factored sum has cancelled, and the row takes the direct norm. With W A^T in bf16 the
# norm of a row that keeps 0.1 of its length is 19 % off, at 0.33 1.2 %, at 0.5 0.4 % (bf16's own rounding).
CANCELLATION = 0.25
# In place of a magnitude of 0: it adds nothing to any sum, yet the output keeps the digits from which the gradient of
# the magnitude is read (not in float16, where such a row stays dead).
_SMALLEST_MAGNITUDE = 2.0**-100
# Rows of M o (B A) that are formed at a time: 16 MiB of float32 for 4096 columns.
_ROWS = 1024


@contextmanager
def full_precision() -> Iterator[None]:
    """Compute float32 products in float32, inside the block or the decorated function.

    `torch.set_float32_matmul_precision("high")` allows TF32 (GPU) or bfloat16 (CPU): 5e-4 in a norm or a merge.
    """
    backends: Any = torch.backends
    backends = backends.cuda.matmul, backends.mkldnn.matmul
    before = [each.fp32_precision for each in backends]
    try:
        named = torch.get_float32_matmul_precision()
    except RuntimeError:  # set by torch.backends alone
        named = None
    # It sets the older flags, too: torch refuses to compute where the two disagree.
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        if named is not None:
            torch.set_float32_matmul_precision(named)
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


def nearest_bfloat16(master: Tensor) -> Tensor:
    """float32, finite -> the nearest bfloat16, ties away from zero."""
    # Half of bf16's last bit is added and the rest cut. A carry into the exponent is right: float bits are ordered.
    bits = master.contiguous().view(torch.int32)
    return ((bits + 0x8000) >> 16).to(torch.int16).view(torch.bfloat16)


def rounded(factor: Tensor, dtype: torch.dtype) -> Tensor:
    """A low-rank factor in the dtype of the products. float32 goes to bfloat16 as the optimizer splits it, so that
    float32 and bfloat16 storage train alike, bit for bit."""
    if factor.dtype == torch.float32 and dtype == torch.bfloat16:
        return nearest_bfloat16(factor)
    return factor.to(dtype)


def row_factor(gain: Tensor | None, scaling: float) -> float | Tensor:
    """s g, the factor of each row of B: (..., out, 1) for gains (..., out), or s for LoRA."""
    return scaling if gain is None else (gain * scaling).unsqueeze(-1)


def scaled_B(lora_B: Tensor, factor: float | Tensor, dtype: torch.dtype) -> Tensor:
    """diag(s g) B in the dtype of the products, (..., out, rank), by a `row_factor`."""
    values = rounded(lora_B, dtype)
    if isinstance(factor, float):
        return (values * factor).to(dtype)
    # Widened first: torch multiplies tensors of two dtypes entry by entry, at half the speed.
    return (values.to(factor.dtype) * factor).to(dtype)


def row_blocks(stop: int, start: int = 0) -> Iterator[slice]:
    """Blocks of rows of M o (B A), which does not factor and is never formed whole."""
    for first in range(start, stop, _ROWS):
        yield slice(first, min(first + _ROWS, stop))


@torch.no_grad()
def squared_row_norm(weight: Weight) -> Tensor:
    """||w||^2 of each row, tile by tile: (out,) float32, or float64 for a float64 weight."""
    wide = wide_dtype(weight)
    if is_planning():  # a stack has thousands of tiles
        return torch.empty(weight.shape[0], dtype=wide, device=weight.device)
    parts = []
    for _, tile in dense_tiles(weight, wide):
        # The squares of a dense weight, one tile, must not take as much again.
        runs = spans(tile.shape[0], tile.shape[1], tile.itemsize, device_kind(tile.device))
        parts += [tile[rows].square().sum(dim=1) for rows in runs]
    return torch.cat(parts)


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
) -> tuple[Tensor, Tensor]:
    """Norm of each row of W + s B A of n layers alike, from three terms; no host waits for its GPU.

        ||w + s b A||^2 = ||w||^2 + 2 s b (A w^T) + s^2 b (A A^T) b^T        row w of W, b of B

    Returns the norms, (n, out), and which of them have cancelled (`CANCELLATION`). Source: DoRA, arXiv 2402.09353, eq.
    5. A is (n, rank, in), B (n, out, rank), `base_squared` ||w||^2, (n, out). The tiles of W and W A^T are in `dtype`,
    all else in float32 or wider, and one operation for all layers, since launches cost more than its arithmetic.
    """
    narrow = lora_A.to(dtype)
    if len(weights) < len(lora_A):  # experts of a stack that are one tile
        ((_, tile),) = dense_tiles(weights[0], dtype)
        products = tile.view(*base_squared.shape, -1) @ narrow.mT
    else:
        products = torch.empty(lora_B.shape, dtype=dtype, device=lora_B.device)
        for weight, a, product in zip(weights, narrow, products, strict=True):
            for rows, tile in dense_tiles(weight, dtype):
                torch.mm(tile, a.T, out=product[rows])
                del tile
    wide = base_squared.dtype
    a, b = lora_A.to(wide), lora_B.to(wide)
    gram = torch.bmm(a, a.mT) * scaling  # (n, rank, rank)
    # s b A (2 w + s b A)^T = (2 W A^T + s B A A^T) . s b
    inner = torch.baddbmm(products.to(wide), b, gram, beta=2.0)  # (n, out, rank)
    squared = torch.add(base_squared, inner.mul_(b).sum(dim=-1), alpha=scaling)
    cancelled = squared < CANCELLATION * base_squared
    return squared.clamp_min_(0).sqrt_(), cancelled


@torch.no_grad()
@full_precision()
def measure_cancelled_(
    norm: Tensor,
    cancelled: Tensor,
    weight: Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    *,
    dtype: torch.dtype,
) -> None:
    """Form the cancelled rows of W + s B A of one layer and overwrite their norms, (out,), which are rounding noise."""
    a = lora_A.to(wide_dtype(weight))
    for span, tile in dense_tiles(weight, dtype):
        rows = cancelled[span].nonzero().squeeze(1)
        if len(rows):
            direct = tile[rows].to(a.dtype).addmm_(lora_B[span][rows].to(a.dtype), a, alpha=scaling)
            norm[span][rows] = direct.square().sum(dim=1).sqrt_()
        del tile


@torch.no_grad()
@full_precision()
def row_norm(
    weight: Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    *,
    base_squared: Tensor,
    dtype: torch.dtype,
    keep_bits: Tensor | None = None,
) -> Tensor:
    """Norm of each row of W + s B A, (out,) float32 (float64 for a float64 weight); a GPU's host waits once.

    With `keep_bits`, `quant.packed.mask_bits` of M, of W + s M o (B A), whose rows are formed block by block.
    """
    if keep_bits is None:
        factors, squared = (lora_A.unsqueeze(0), lora_B.unsqueeze(0)), base_squared.unsqueeze(0)
        norms, lost = factored_norms([weight], *factors, scaling, base_squared=squared, dtype=dtype)
        if not isinstance(lost, FakeTensor) and bool(lost.any()):  # in a plan none has cancelled
            measure_cancelled_(norms[0], lost[0], weight, lora_A, lora_B, scaling, dtype=dtype)
        return norms[0]
    norm = torch.empty(weight.shape[0], dtype=torch.promote_types(dtype, torch.float32), device=lora_A.device)
    a = lora_A.to(norm.dtype)
    for rows, tile in dense_tiles(weight, dtype):
        for some in row_blocks(rows.stop, rows.start):
            mask = mask_from_bits(keep_bits, (weight.shape[0], weight.shape[1]), some)
            delta = (lora_B[some].to(a.dtype) @ a).mul_(mask)
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
    """g = m / n per row, (out,); 0, not NaN, where the row is zero."""
    # A live row with m = 0 counts as zero everywhere but in its own gradient.
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
    """g * (W + s B A), or W + s B A for LoRA: a new tensor in the dtype of `weight`, float32 or float64.

    The norm is that of the dense sum. B A counts only where `keep_mask`, (out, in) bool, is True (None: everywhere).
    Factors and magnitudes of a stack of experts come expert by expert, `weight` is (experts * out, in).
    """
    if lora_B.ndim == 3:
        size, lacking = lora_B.shape[1], [None] * len(lora_B)
        own = lacking if magnitude is None else magnitude
        keep = lacking if keep_mask is None else torch.split(keep_mask, size)
        parts = zip(torch.split(weight, size), lora_A, lora_B, own, keep, strict=True)
        return torch.cat([merged_weight(w, a, b, scaling, m, mask) for w, a, b, m, mask in parts])
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
    """g = m / ||total||_row, (out,), from the dense sum W + s B A; 0 where the row is zero and, unlike in `gain`, where
    m is."""
    norm = squared_row_norm(total).sqrt()
    return (magnitude.to(total.dtype) / norm).masked_fill_(norm == 0, 0.0)
