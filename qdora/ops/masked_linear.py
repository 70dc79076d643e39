"""The adapted linear map that keeps the zeros of a pruned base: B A is masked in forward, norm and merge.

    y = g * (x W^T + s drop(x) (M o B A)^T) + bias,        g = m / ||W + s M o B A||_row, or 1 for LoRA

M is the keep mask of W, held as bits. A masked product does not factor, neither M o (B A) nor its norm, so it is formed
for a block of rows at a time, and never kept. That costs a second product of the base's size in forward and two in
backward; in return the merged weight has every zero of the base.

Gradients, for dy of the output, block by block of rows R:

    G = M o (dy_R^T drop(x))          dA = sum_R (s g B_R)^T G          dB_R = s g G A^T
    dx = dy (g W) + drop(sum_R dy_R (s g M o B_R A))                    dm_i = sum_t dy_ti (y_ti - bias_i) / m_i
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qdora.ops.adapted_map import column_dot, output_to_keep, product_dtype, rounded, row_factor, scaled_B, with_bias
from qdora.ops.dora import Gain
from qdora.ops.dropout import draw_seed, dropped_slices, zeroed_
from qdora.ops.linear_map import add_product_, add_transposed_product_
from qdora.ops.sparsity import mask_from_bits
from qdora.ops.tiles import Weight, row_tiles

# Rows of B A that are formed at a time: 16 MiB of float32 for 4096 columns.
_ROWS = 1024


def masked_linear(
    x: Tensor,
    weight: Weight,
    keep_bits: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    *,
    magnitude: Tensor | None = None,
    gain: Gain | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """y = g * (x W^T + s drop(x) (M o B A)^T) + bias, or the same with g = 1 where magnitude is None.

    Args:
        keep_bits: The mask M as `ops.sparsity.mask_bits`.
        All others: As of `ops.adapted_linear.adapted_linear`.
    Returns:
        (..., out) in x's dtype.
    """
    assert (magnitude is None) == (gain is None), "a magnitude comes with its gain"
    x = x.to(product_dtype(x))
    flat = x.reshape(-1, x.shape[-1])
    seed = draw_seed() if dropout > 0.0 else 0
    out: Tensor = _MaskedLinear.apply(  # type: ignore[no-untyped-call, unused-ignore]
        flat, lora_A, lora_B, magnitude, *(gain or (None, None)), weight, keep_bits, bias, scaling, dropout, seed
    )
    return out.reshape(*x.shape[:-1], out.shape[-1])


@torch.no_grad()
def masked_row_norm(
    weight: Weight, keep_bits: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, *, dtype: torch.dtype
) -> Tensor:
    """Euclidean norm of each row of W + s M o (B A), formed block by block of rows.

    Args:
        weight: (out, in), packed or dense.
        keep_bits: The mask M as `ops.sparsity.mask_bits`.
        lora_A: (rank, in).
        lora_B: (out, rank).
        scaling: s.
        dtype: Of the tiles of W; the sum with B A is formed and added up in float32, or float64 for float64 tiles.
    Returns:
        (out,) float32 or float64, non-negative.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    norm = torch.empty(weight.shape[0], dtype=wide, device=lora_A.device)
    shape = (weight.shape[0], weight.shape[1])
    a = lora_A.to(wide)
    for rows, tile in row_tiles(weight, dtype):
        for start in range(rows.start, rows.stop, _ROWS):
            some = slice(start, min(start + _ROWS, rows.stop))
            delta = (lora_B[some].to(wide) @ a).mul_(mask_from_bits(keep_bits, shape, some))
            adapted = delta.mul_(scaling).add_(tile[some.start - rows.start : some.stop - rows.start])
            norm[some] = adapted.square_().sum(dim=1).sqrt_()
            del delta, adapted
        del tile
    return norm


class _MaskedLinear(torch.autograd.Function):
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
        keep_bits: Tensor,
        bias: Tensor | None,
        scaling: float,
        dropout: float,
        seed: int,
    ) -> Tensor:
        dtype = x.dtype
        # What dropout leaves is scaled up by 1 / (1 - p): in s, where it costs nothing.
        scaling = scaling / (1.0 - dropout)
        out = x.new_empty(x.shape[0], weight.shape[0])
        with torch.autocast(x.device.type, enabled=False):
            dropped = _dropped(x, dropout, seed)
            # The small term first: the sum is then rounded once, when the base's product is added to it.
            for rows in _row_blocks(weight):
                torch.mm(
                    dropped, _delta(weight, keep_bits, lora_A, lora_B, gain, scaling, rows, dtype).T, out=out[:, rows]
                )
            del dropped
            add_product_(out, x, weight, gain)
        # The magnitude itself is not read again, but a change of it before the backward pass is an error.
        read_again = output_to_keep(out, magnitude)
        ctx.save_for_backward(x, lora_A, lora_B, magnitude, gain, inverse_magnitude, read_again)
        ctx.weight, ctx.keep_bits = weight, keep_bits
        ctx.scaling, ctx.dropout, ctx.seed = scaling, dropout, seed
        return with_bias(out, bias, is_kept=read_again is not None)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grads
        # Read once: under a checkpoint a second read is an error.
        x, lora_A, lora_B, _, gain, inverse_magnitude, out = ctx.saved_tensors
        need_x, need_a, need_b, need_m = ctx.needs_input_grad[:4]
        dx = da = db = dm = None
        with torch.autocast(dy.device.type, enabled=False):
            if need_m:
                dm = column_dot(dy, out, inverse_magnitude)
            del out
            if need_a or need_b:
                da, db = _factor_gradients(ctx, dy, _dropped(x, ctx.dropout, ctx.seed), lora_A, lora_B, gain)
            del x
            if need_x:
                dx = _input_gradient(ctx, dy, lora_A, lora_B, gain)
        return dx, da if need_a else None, db if need_b else None, dm, *[None] * 8


def _factor_gradients(
    ctx: Any, dy: Tensor, dropped: Tensor, lora_A: Tensor, lora_B: Tensor, gain: Tensor | None
) -> tuple[Tensor, Tensor]:
    """dA and dB in float32 or wider."""
    wide = torch.promote_types(dy.dtype, torch.float32)
    a = rounded(lora_A, dy.dtype).to(wide)
    da = torch.zeros(lora_A.shape, dtype=wide, device=dy.device)
    db = torch.empty(lora_B.shape, dtype=wide, device=dy.device)
    shape = (ctx.weight.shape[0], ctx.weight.shape[1])
    for rows in _row_blocks(ctx.weight):
        masked = (dy[:, rows].T @ dropped).to(wide).mul_(mask_from_bits(ctx.keep_bits, shape, rows))
        factor = row_factor(None if gain is None else gain[rows], ctx.scaling)
        b = rounded(lora_B[rows], dy.dtype).to(wide)
        da.addmm_((b * factor).T, masked)
        db[rows] = (masked @ a.T) * factor
        del masked
    return da, db


def _input_gradient(ctx: Any, dy: Tensor, lora_A: Tensor, lora_B: Tensor, gain: Tensor | None) -> Tensor:
    """dx in dy's dtype."""
    dx = dy.new_zeros(dy.shape[0], ctx.weight.shape[1])
    for rows in _row_blocks(ctx.weight):
        delta = _delta(ctx.weight, ctx.keep_bits, lora_A, lora_B, gain, ctx.scaling, rows, dy.dtype)
        dx.addmm_(dy[:, rows], delta)
        del delta
    for tokens, positions in dropped_slices(dx.shape[0], dx.shape[1], ctx.dropout, ctx.seed, dx.device):
        zeroed_(dx[tokens], positions)
    add_transposed_product_(dx, dy, ctx.weight, gain)
    return dx


def _row_blocks(weight: Weight) -> list[slice]:
    return [slice(start, min(start + _ROWS, weight.shape[0])) for start in range(0, weight.shape[0], _ROWS)]


def _delta(
    weight: Weight,
    keep_bits: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    gain: Tensor | None,
    scaling: float,
    rows: slice,
    dtype: torch.dtype,
) -> Tensor:
    """s g M o (B A) of some rows: (rows, in) in `dtype`, from the factors as the products round them."""
    factor = row_factor(None if gain is None else gain[rows], scaling)
    delta = scaled_B(lora_B[rows], factor, dtype) @ rounded(lora_A, dtype)
    return delta.mul_(mask_from_bits(keep_bits, (weight.shape[0], weight.shape[1]), rows))


def _dropped(x: Tensor, dropout: float, seed: int) -> Tensor:
    """drop(x) without the factor 1 / (1 - p); x itself without dropout."""
    if dropout == 0.0:
        return x
    dropped = x.clone(memory_format=torch.contiguous_format)
    for tokens, positions in dropped_slices(x.shape[0], x.shape[1], dropout, seed, x.device):
        zeroed_(dropped[tokens], positions)
    return dropped
