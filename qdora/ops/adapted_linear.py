"""Autograd of the frozen linear map and of the adapted one (LoRA and DoRA in one function).

Neither keeps a dequantised weight between forward and backward: the packed base is dequantised again where it is
needed. Saved per call: x, the low-rank activations (tokens, rank), and for DoRA the output.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qdora.ops.dora import gain, row_norm
from qdora.ops.packed import PackedWeight, dequantize
from qdora.ops.split_float import split_float32

Weight = PackedWeight | Tensor

# Tokens per slice of the float32 sum in the gradient of the magnitude: bounds its workspace to 2 slices.
_TOKENS_PER_SLICE = 1024


def dense_weight(weight: Weight, dtype: torch.dtype) -> Tensor:
    """The dense (out, in) weight in `dtype`: dequantised, or the given tensor cast."""
    return weight.to(dtype) if isinstance(weight, Tensor) else dequantize(weight, dtype)


def frozen_linear(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """y = x W^T + bias with a frozen W.

    Args:
        x: (..., in), a float dtype; the product runs in it.
        weight: Frozen base, (out, in), dense or packed.
        bias: (out,) or None.
    Returns:
        (..., out) in x's dtype. Differentiable with respect to x only.
    """
    flat = x.reshape(-1, x.shape[-1])
    out: Tensor = _FrozenLinear.apply(flat, weight)  # type: ignore[no-untyped-call]
    if bias is not None:
        out = out + bias.to(out.dtype)
    return out.reshape(*x.shape[:-1], out.shape[-1])


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Weight) -> Tensor:
        ctx.weight = weight
        return x @ dense_weight(weight, x.dtype).T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None
        (dy,) = grads
        return dy @ dense_weight(ctx.weight, dy.dtype), None


def adapted_linear(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    *,
    magnitude: Tensor | None = None,
    base_squared: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """y = g * (x W^T + s (drop(x) A^T) B^T) + bias with g = m / ||W + s B A||_row, or g = 1 where magnitude is None.

    Source: DoRA, arXiv 2402.09353, eq. 5 and sec. 4.3 (norm detached); the bias is added after the gain.

    Args:
        x: (..., in); the products run in its dtype.
        weight: Frozen base W, (out, in), dense or packed.
        bias: Frozen (out,) or None.
        lora_A: (rank, in), trainable.
        lora_B: (out, rank), trainable.
        scaling: s = alpha / rank.
        magnitude: m, (out,), float32 (float64 for float64 x), trainable, or None for LoRA.
        base_squared: ||w||^2 per row of the base, (out,), where known.
        dropout: Probability of zeroing an element of the adapter's input, in [0, 1). The mask is drawn from torch's
            default CPU generator as one seed per call, so that a checkpoint's recompute, which restores that
            generator, draws the same mask; only the seed is kept.
    Returns:
        (..., out) in x's dtype.
    """
    flat = x.reshape(-1, x.shape[-1])
    seed = int(torch.randint(2**62, (), dtype=torch.int64)) if dropout > 0.0 else 0
    out: Tensor = _AdaptedLinear.apply(  # type: ignore[no-untyped-call]
        flat, lora_A, lora_B, magnitude, weight, bias, base_squared, scaling, dropout, seed
    )
    return out.reshape(*x.shape[:-1], out.shape[-1])


def rounded(factor: Tensor, dtype: torch.dtype) -> Tensor:
    """A low-rank factor in the dtype of the products.

    float32 goes to bfloat16 as `split_float32` rounds, so an adapter stored in float32 and one stored in bfloat16 with
    its low bits beside it multiply with the same numbers, and train alike bit for bit.
    """
    if factor.dtype == torch.float32 and dtype == torch.bfloat16:
        return split_float32(factor)[0]
    return factor.to(dtype)


def _drop(x: Tensor, dropout: float, seed: int) -> Tensor:
    """x with elements zeroed and the rest scaled by 1 / (1 - dropout): the same ones for the same seed and shape."""
    if dropout == 0.0:
        return x
    generator = torch.Generator(device=x.device).manual_seed(seed)
    keep = torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(1.0 - dropout, generator=generator)
    return x * keep * (1.0 / (1.0 - dropout))


class _AdaptedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        magnitude: Tensor | None,
        weight: Weight,
        bias: Tensor | None,
        base_squared: Tensor | None,
        scaling: float,
        dropout: float,
        seed: int,
    ) -> Tensor:
        dtype = x.dtype
        dense = dense_weight(weight, dtype)
        a, b = rounded(lora_A, dtype), rounded(lora_B, dtype)
        low = _drop(x, dropout, seed) @ a.T  # (tokens, rank)
        out = x @ dense.T
        out.addmm_(low, b.T, alpha=scaling)
        norm = None
        if magnitude is not None:
            norm = row_norm(dense, a, b, scaling, base_squared=base_squared)
            # float32 factor, one rounding of the product: a gain rounded to bf16 is off by up to 2^-9, and in the form
            # (g - 1) rounded, small gains drown.
            out.mul_(gain(magnitude, norm))
        ctx.save_for_backward(x, lora_A, lora_B, magnitude, norm, low, out if magnitude is not None else None)
        ctx.weight = weight
        ctx.scaling, ctx.dropout, ctx.seed = scaling, dropout, seed
        # A new tensor: the gradient of the magnitude needs the output without its bias. Taking the bias off again
        # would leave its rounding in its place (Qwen's key biases are hundreds of times the rest).
        return out if bias is None else out + bias.to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grads
        saved = ctx.saved_tensors  # read once: under a checkpoint a second read is an error
        x, lora_A, lora_B, magnitude, norm, low, _ = saved
        dtype, scaling = dy.dtype, ctx.scaling
        a, b = rounded(lora_A, dtype), rounded(lora_B, dtype)
        need_x, need_a, need_b, need_m = ctx.needs_input_grad[:4]
        dm = None
        dz = dy
        if magnitude is not None:
            # In place: CUDA then needs no float32 copy of token size.
            dz = dy.clone().mul_(gain(magnitude, norm))  # gradient before the gain
            if need_m:
                dm = _magnitude_gradient(ctx, saved, dy)
        d_low = (dz @ b) * scaling if need_x or need_a else None  # (tokens, rank)
        da = db = dx = None
        if need_a:
            assert d_low is not None
            da = (d_low.T @ _drop(x, ctx.dropout, ctx.seed)).to(torch.promote_types(lora_A.dtype, torch.float32))
        if need_b:
            db = ((dz.T @ low) * scaling).to(torch.promote_types(lora_B.dtype, torch.float32))
        if need_x:
            assert d_low is not None
            dx = dz @ dense_weight(ctx.weight, dtype)
            if ctx.dropout == 0.0:
                dx.addmm_(d_low, a)
            else:
                dx += _drop(d_low @ a, ctx.dropout, ctx.seed)
        return dx, da, db, dm, None, None, None, None, None, None


def _magnitude_gradient(ctx: Any, saved: tuple[Tensor, ...], dy: Tensor) -> Tensor:
    """dm_i = sum_t dy_ti y_ti / m_i, y without bias: the output already holds what the gain multiplied.

    Live rows with m = 0 have lost it (y = 0), so there the product is formed again.

    Returns:
        (out,) in magnitude's dtype.
    """
    x, _, lora_B, magnitude, norm, low, out = saved
    wide = magnitude.dtype
    total = torch.zeros_like(magnitude)
    for start in range(0, len(dy), _TOKENS_PER_SLICE):
        rows = slice(start, start + _TOKENS_PER_SLICE)
        total += (dy[rows].to(wide) * out[rows].to(wide)).sum(dim=0)
    zero = magnitude == 0
    dm = total / torch.where(zero, torch.ones_like(magnitude), magnitude)
    lost = zero & (norm > 0)  # a pruned row (norm 0) has no gradient and stays as it is
    if bool(lost.any()):
        index = lost.nonzero().squeeze(1)
        dy_rows = dy[:, index].to(wide)  # (tokens, lost)
        weight_rows = dense_weight(ctx.weight, x.dtype)[index].to(wide)
        inner = ((dy_rows.T @ x.to(wide)) * weight_rows).sum(dim=1)
        inner += ctx.scaling * ((dy_rows.T @ low.to(wide)) * lora_B[index].to(wide)).sum(dim=1)
        dm[index] = inner / norm[index]
    return dm
