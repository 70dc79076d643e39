"""The sum over tokens of the product of two token-sized tensors: the gradient of a factor per output.

Autograd of the frozen linear map and of the adapted one (LoRA and DoRA in one function).

    y = x (g W)^T + (drop(x) A^T) (s g B)^T + bias,        g = m / ||W + s B A||_row, or 1 for LoRA

DoRA is LoRA on a rescaled base: the gain is multiplied into the block scales of W and into B, so no pass over the
outputs and no rounding is added. Forward and backward read the base tile by tile and keep no dequantised weight. Saved
per call: x, the low-rank activations (tokens, rank), and for DoRA the output, from which the gradient of m is read. It
is the tensor that is returned: a model that writes into it (OLMo's clip_qkv) gets torch's error in the backward pass.

Gradients, for dy of the output:

    d_low = dy (s g B)      dA = d_low^T drop(x)      dB = s g (dy^T low)
    dx = dy (g W) + drop(d_low A)                     dm_i = sum_t dy_ti (y_ti - bias_i) / m_i
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qdora.ops.dora import Gain
from qdora.ops.dropout import draw_seed, dropped_slices, zeroed, zeroed_
from qdora.ops.linear_map import add_product_, add_transposed_product_, product, transposed_product
from qdora.ops.planned_device import device_kind
from qdora.ops.split_float import split_float32
from qdora.ops.tiles import Weight


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


# Entries of lora_B that are scaled at a time, in float32: 4 MiB, and 32 MiB on a GPU, where launches cost more.
_ENTRIES_PER_SLICE = 1 << 20
_GPU_ENTRIES_PER_SLICE = 1 << 23


def frozen_linear(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """y = x W^T + bias with a frozen W.

    Args:
        x: (..., in), a float dtype; the product runs in it, or in the dtype of an active autocast.
        weight: Frozen base, (out, in), dense or packed.
        bias: (out,) or None.
    Returns:
        (..., out) in x's dtype. Differentiable with respect to x only.
    """
    if is_plain(x):
        out = with_bias(product(x.reshape(-1, x.shape[-1]), weight), bias, is_kept=False)
        return out.reshape(*x.shape[:-1], out.shape[-1])
    x = x.to(product_dtype(x))
    flat = x.reshape(-1, x.shape[-1])
    mapped: Tensor = _FrozenLinear.apply(flat, weight, bias)  # type: ignore[no-untyped-call, unused-ignore]
    return mapped.reshape(*x.shape[:-1], mapped.shape[-1])


def is_plain(x: Tensor) -> bool:
    """Whether products of `x` run in its own dtype and without a graph, for which a token's time would pay, too."""
    return not torch.is_grad_enabled() and not torch.is_autocast_enabled(x.device.type)


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        # Nothing is kept of it. But asking for what was saved is what makes a checkpoint compute its block again, and a
        # weight that comes and goes is read where it was only after that.
        ctx.save_for_backward(x.new_empty(0))
        out = product(x, weight)
        return out if bias is None else out.add_(bias.to(out.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None, None
        _ = ctx.saved_tensors
        return transposed_product(grads[0], ctx.weight), None, None


def adapted_linear(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    *,
    magnitude: Tensor | None = None,
    gain: Gain | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """y = g * (x W^T + s (drop(x) A^T) B^T) + bias, or the same with g = 1 where magnitude is None.

    Source: DoRA, arXiv 2402.09353, eq. 5 and sec. 4.3 (norm detached); the bias is added after the gain.

    Args:
        x: (..., in); the products run in its dtype, or in the dtype of an active autocast.
        weight: Frozen base W, (out, in), dense or packed.
        bias: Frozen (out,) or None.
        lora_A: (rank, in), trainable.
        lora_B: (out, rank), trainable.
        scaling: s = alpha / rank.
        magnitude: m, (out,), float32 (float64 for float64 x), trainable, or None for LoRA.
        gain: `ops.dora.gain` of the present values; given exactly with a magnitude.
        dropout: Probability of zeroing an element of the adapter's input, in [0, 1). Each call draws one seed from
            torch's default CPU generator, so that a checkpoint's recompute, which restores that generator, zeroes the
            same elements; only the seed is kept.
    Returns:
        (..., out) in x's dtype.
    """
    assert (magnitude is None) == (gain is None), "a magnitude comes with its gain"
    x = x.to(product_dtype(x))
    flat = x.reshape(-1, x.shape[-1])
    seed = draw_seed() if dropout > 0.0 else 0
    out: Tensor = _AdaptedLinear.apply(  # type: ignore[no-untyped-call, unused-ignore]
        flat, lora_A, lora_B, magnitude, *(gain or (None, None)), weight, bias, scaling, dropout, seed
    )
    return out.reshape(*x.shape[:-1], out.shape[-1])


def adapted_product(
    x: Tensor, weight: Weight, bias: Tensor | None, a: Tensor, scaled_b: Tensor, gain: Tensor | None
) -> Tensor:
    """What `adapted_linear` gives without dropout, bit for bit, with its factors made before and no graph.

    Args:
        x: (..., in), for which `is_plain` holds.
        weight, bias: As of `adapted_linear`.
        a, scaled_b: From `factors_of_products` for x's dtype.
        gain: g, (out,), or None for LoRA.
    """
    flat = x.reshape(-1, x.shape[-1])
    out = (flat @ a.T) @ scaled_b.T
    add_product_(out, flat, weight, gain)
    return with_bias(out, bias, is_kept=False).reshape(*x.shape[:-1], out.shape[-1])


def factors_of_products(
    lora_A: Tensor, lora_B: Tensor, gain: Tensor | None, scaling: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """A (rank, in) and diag(s g) B (out, rank) in the dtype of the products."""
    return rounded(lora_A, dtype), scaled_B(lora_B, row_factor(gain, scaling), dtype)


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype of the products of an input: its own, or that of an active autocast, as in torch's own linear map."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def rounded(factor: Tensor, dtype: torch.dtype) -> Tensor:
    """A low-rank factor in the dtype of the products.

    float32 goes to bfloat16 as `split_float32` rounds, so an adapter stored in float32 and one stored in bfloat16 with
    its low bits beside it multiply with the same numbers, and train alike bit for bit.
    """
    if factor.dtype == torch.float32 and dtype == torch.bfloat16:
        return split_float32(factor)[0]
    return factor.to(dtype)


def row_factor(gain: Tensor | None, scaling: float) -> float | Tensor:
    """s g: what a row of B is multiplied by; (out, 1), or a number for LoRA."""
    return scaling if gain is None else (gain * scaling).unsqueeze(1)


def scaled_B(lora_B: Tensor, factor: float | Tensor, dtype: torch.dtype) -> Tensor:
    """diag(s g) B in the dtype of the products: (out, rank), rounded once more after `rounded`."""
    entries = _ENTRIES_PER_SLICE if device_kind(lora_B.device) == "cpu" else _GPU_ENTRIES_PER_SLICE
    if lora_B.numel() <= entries:
        return _times(rounded(lora_B, dtype), factor, dtype)
    scaled = torch.empty(lora_B.shape, dtype=dtype, device=lora_B.device)
    step = max(1, entries // lora_B.shape[1])
    for start in range(0, lora_B.shape[0], step):
        rows = slice(start, start + step)
        some = factor if isinstance(factor, float) else factor[rows]
        scaled[rows] = _times(rounded(lora_B[rows], dtype), some, dtype)
    return scaled


def output_to_keep(out: Tensor, magnitude: Tensor | None) -> Tensor | None:
    """The output where the gradient of m will be read from it; None for LoRA and for a frozen magnitude."""
    return out if magnitude is not None and magnitude.requires_grad else None


def with_bias(out: Tensor, bias: Tensor | None, *, is_kept: bool) -> Tensor:
    """The output and its bias: in place, unless `out` is kept.

    The gradient of the magnitude needs the output without its bias. Taking the bias off again would leave its rounding
    in its place (Qwen's key biases are hundreds of times the rest).
    """
    if bias is None:
        return out
    return out + bias.to(out.dtype) if is_kept else out.add_(bias.to(out.dtype))


def _times(values: Tensor, factor: float | Tensor, dtype: torch.dtype) -> Tensor:
    if isinstance(factor, float):
        return (values * factor).to(dtype)
    # Widened first: torch multiplies tensors of two dtypes entry by entry, at half the speed.
    return (values.to(factor.dtype) * factor).to(dtype)


class _AdaptedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        magnitude: Tensor | None,
        gain: Tensor | None,
        inverse_magnitude: Tensor | None,
        weight: Weight,
        bias: Tensor | None,
        scaling: float,
        dropout: float,
        seed: int,
    ) -> Tensor:
        dtype = x.dtype
        # What dropout leaves is scaled up by 1 / (1 - p): in s, where it costs nothing.
        scaling = scaling / (1.0 - dropout)
        with torch.autocast(x.device.type, enabled=False):
            a, scaled_b = factors_of_products(lora_A, lora_B, gain, scaling, dtype)
            low = _low_rank_input(x, a, dropout, seed)
            # The small term first: the sum is then rounded once, when the base's product is added to it.
            out = low @ scaled_b.T
            del a, scaled_b
            add_product_(out, x, weight, gain)
        # The magnitude itself is not read again, but a change of it before the backward pass is an error.
        read_again = output_to_keep(out, magnitude)
        ctx.save_for_backward(x, lora_A, lora_B, magnitude, gain, inverse_magnitude, low, read_again)
        ctx.weight = weight
        ctx.scaling, ctx.dropout, ctx.seed = scaling, dropout, seed
        return with_bias(out, bias, is_kept=read_again is not None)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grads
        # Read once: under a checkpoint a second read is an error.
        x, lora_A, lora_B, _, gain, inverse_magnitude, low, out = ctx.saved_tensors
        dtype = dy.dtype
        need_x, need_a, need_b, need_m = ctx.needs_input_grad[:4]
        dx = da = db = dm = None
        with torch.autocast(dy.device.type, enabled=False):
            if need_m:
                dm = column_dot(dy, out, inverse_magnitude)
            # Nobody else holds what a checkpoint has recomputed, so `out` and `x` go as soon as they have been read:
            # in a 7B model's down projection, where a step has its peak, 59 MiB.
            del out
            factor = row_factor(gain, ctx.scaling)
            if need_x or need_a:
                d_low = dy @ scaled_B(lora_B, factor, dtype)  # (tokens, rank)
                a = rounded(lora_A, dtype)
                if ctx.dropout > 0.0:
                    dx, da = _dropped_input_gradients(ctx, x, d_low, a, need_x, need_a)
                    del x
                else:
                    da = d_low.T @ x if need_a else None
                    del x
                    dx = d_low @ a if need_x else None
            if dx is not None:
                add_transposed_product_(dx, dy, ctx.weight, gain)
            if need_b:
                # The narrow factor first: a quarter faster on a CPU than (dy^T low).
                db = _wide(low.T @ dy).T * factor
        return dx, None if da is None else _wide(da), db, dm, None, None, None, None, None, None, None


def _wide(gradient: Tensor) -> Tensor:
    """float32 or wider, in which gradients accumulate."""
    return gradient.to(torch.promote_types(gradient.dtype, torch.float32))


def _low_rank_input(x: Tensor, a: Tensor, dropout: float, seed: int) -> Tensor:
    """drop(x) A^T without the factor 1 / (1 - p): (tokens, rank)."""
    if dropout == 0.0:
        return x @ a.T
    low = x.new_empty(x.shape[0], a.shape[0])
    for tokens, positions in dropped_slices(x.shape[0], x.shape[1], dropout, seed, x.device):
        torch.mm(zeroed(x[tokens], positions), a.T, out=low[tokens])
    return low


def _dropped_input_gradients(
    ctx: Any, x: Tensor, d_low: Tensor, a: Tensor, need_x: bool, need_a: bool
) -> tuple[Tensor | None, Tensor | None]:
    """drop(d_low A), to which the base's part is added, and dA; the factor 1 / (1 - p) is in d_low."""
    dx = torch.empty(x.shape, dtype=d_low.dtype, device=x.device) if need_x else None
    da = torch.zeros(a.shape, dtype=torch.promote_types(a.dtype, torch.float32), device=x.device) if need_a else None
    for tokens, positions in dropped_slices(x.shape[0], x.shape[1], ctx.dropout, ctx.seed, x.device):
        if dx is not None:
            torch.mm(d_low[tokens], a, out=dx[tokens])
            zeroed_(dx[tokens], positions)
        if da is not None:
            da += d_low[tokens].T @ zeroed(x[tokens], positions)
    return dx, da
