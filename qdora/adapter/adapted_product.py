"""The product of an adapted layer with its gradients: LoRA and DoRA, plain and masked, in one autograd function.

    y = x (g W)^T + (drop(x) A^T) (s g B)^T + bias,        g = m / ||W + s B A||_row, or 1 for LoRA

DoRA is LoRA on a rescaled base: the gain is multiplied into the block scales of W and into B, so no pass over the
outputs and no rounding is added. Forward and backward read the base tile by tile and keep no dequantised weight. Saved
per call: x, the low-rank activations (tokens, rank), and for DoRA the output, from which the gradient of m is read. It
is the tensor that is returned. Where a model writes into it (OLMo's clip_qkv) the backward pass computes it again,
unless a copy is kept (`keeps_copy`).

Gradients, for dy of the output:

    d_low = dy (s g B)      dA = d_low^T drop(x)      dB = s g (dy^T low)
    dx = dy (g W) + drop(d_low A)                     dm_i = sum_t dy_ti (y_ti - bias_i) / m_i

With a keep mask M, s g M o (B A) replaces the product of the factors (`adapter.masked_update`); nothing else changes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qdora.adapter.dora import Gain
from qdora.adapter.dropout import draw_seed, drop_, dropped, dropped_slices, zeroed, zeroed_
from qdora.adapter.frozen_product import (
    add_product_,
    add_transposed_product_,
    fused_product,
    product_dtype,
    with_bias,
    without_autocast,
)
from qdora.adapter.low_rank_factors import rounded, row_factor, scaled_B
from qdora.quant.planned_device import device_kind
from qdora.quant.tiles import Weight, own_scales, with_scales

if TYPE_CHECKING:
    from qdora.adapter.masked_update import MaskedUpdate

WRITTEN = (
    "the model has written into the output of an adapted layer, from which the gradient of its magnitude is read. Fix: "
    "call qdora.model.attention.keep_inplace_outputs_(model) before training."
)


def adapted_linear(
    x: Tensor,
    weight: Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    *,
    bias: Tensor | None = None,
    magnitude: Tensor | None = None,
    gain: Gain | None = None,
    dropout: float = 0.0,
    keep_bits: Tensor | None = None,
    keeps_copy: bool = False,
    operands: Operands | None = None,
) -> Tensor:
    """y = g * (x W^T + s (drop(x) A^T) B^T) + bias, or the same with g = 1 where magnitude is None.

    Source: DoRA, arXiv 2402.09353, eq. 5 and sec. 4.3 (norm detached); the bias is added after the gain.

    Args:
        x: (..., in); the products run in its dtype, or in the dtype of an active autocast.
        weight: Frozen base W, (out, in), dense or packed.
        lora_A, lora_B: (rank, in) and (out, rank), trainable.
        scaling: s = alpha / rank.
        bias: Frozen, (out,).
        magnitude: m, (out,), float32 (float64 for float64 x), trainable; None for LoRA.
        gain: `adapter.dora.gain` of the present values; given exactly with a magnitude.
        dropout: Probability of zeroing an element of the adapter's input, in [0, 1). Each call draws one seed from
            torch's default CPU generator. A checkpoint's recompute restores that generator and so zeroes the same
            elements; only the seed is kept.
        keep_bits: `quant.sparsity.mask_bits` of a mask M: M o (B A) replaces B A.
        keeps_copy: Keep a copy of the output for the gradient of m, not the output: the caller may write into that.
        operands: `operands_of` the present values for the dtype of the products and s / (1 - dropout); given exactly
            without keep_bits.
    Returns: (..., out) in the dtype of the products.
    """
    assert (magnitude is None) == (gain is None), "a magnitude comes with its gain"
    assert (operands is None) == (keep_bits is not None), "a product has operands or a mask"
    seed = draw_seed() if dropout > 0.0 else 0
    # Dropout scales the rest up by 1 / (1 - p): in s, where it costs nothing.
    call = _Call(
        weight,
        bias,
        keep_bits,
        scaling=scaling / (1.0 - dropout),
        dropout=dropout,
        seed=seed,
        keeps_copy=keeps_copy,
        operands=operands,
    )
    x = x.to(product_dtype(x))
    # A flat copy is made here, where the graph keeps it in the place of x, and not in both passes.
    rows = x if x.is_contiguous() else x.reshape(-1, x.shape[-1])
    out: Tensor = _AdaptedLinear.apply(  # type: ignore[no-untyped-call, unused-ignore]
        rows, lora_A, lora_B, magnitude, *(gain or (None, None)), call
    )
    return out if rows is x else out.reshape(*x.shape[:-1], out.shape[-1])


class Operands(NamedTuple):
    """What the products of a layer read beside their input and the base: the same for one state of the parameters."""

    a: Tensor  # A, (rank, in), in the dtype of the products
    scaled_b: Tensor  # diag(s g) B, (out, rank), likewise
    row_factor: float | Tensor  # s g, (out, 1), or s for LoRA
    gain: Gain | None  # None for LoRA
    scales: Tensor | None  # `quant.tiles.own_scales` of diag(g) W; None: decoded again for every product

    def of_base(self, weight: Weight) -> tuple[Weight, Tensor | None]:
        """The base as the products read it, and the factor of its rows that it does not contain."""
        if self.scales is not None:
            return with_scales(weight, self.scales), None
        return weight, None if self.gain is None else self.gain.value


def operands_of(
    lora_A: Tensor,
    lora_B: Tensor,
    gain: Gain | None,
    scaling: float,
    dtype: torch.dtype,
    kept_of: Weight | None = None,
) -> Operands:
    """The operands of products in `dtype`, without a graph; with the base scales of `kept_of`, where it has any."""
    value = None if gain is None else gain.value
    factor = row_factor(value, scaling)
    scales = None if kept_of is None else own_scales(kept_of, value)
    return Operands(rounded(lora_A, dtype), scaled_B(lora_B, factor, dtype), factor, gain, scales)


def adapted_product(x: Tensor, weight: Weight, bias: Tensor | None, operands: Operands) -> Tensor:
    """The result of `adapted_linear` without dropout, without a graph: bit for bit, or in `decoding` on a GPU by
    `fused_product`, which rounds the base's product before the sum.

    Args:
        x: (..., in), for which `without_graph_or_autocast` holds.
        operands: Of x's dtype.
    """
    flat = x.reshape(-1, x.shape[-1])
    low = flat @ operands.a.T
    base, factor = operands.of_base(weight)
    fused = fused_product(flat, base) if factor is None else None
    if fused is None:
        out = low @ operands.scaled_b.T
        add_product_(out, flat, base, factor)
    else:
        out = fused.addmm_(low, operands.scaled_b.T)
    return with_bias(out, bias, is_kept=False).reshape(*x.shape[:-1], out.shape[-1])


class _Call(NamedTuple):
    """The arguments of a product that have no gradient; `scaling` includes dropout's 1 / (1 - p)."""

    weight: Weight
    bias: Tensor | None
    keep_bits: Tensor | None
    scaling: float
    dropout: float
    seed: int
    keeps_copy: bool
    operands: Operands | None  # None with a mask

    def base(self, gain: Tensor | None) -> tuple[Weight, Tensor | None]:
        """The base as the products read it, and the factor of its rows that it does not contain; `gain` is g."""
        return (self.weight, gain) if self.operands is None else self.operands.of_base(self.weight)

    def masked(self, lora_A: Tensor, lora_B: Tensor, gain: Tensor | None) -> MaskedUpdate:
        """The update of a pruned base, which has a mask."""
        from qdora.adapter.masked_update import MaskedUpdate

        assert self.keep_bits is not None, "products without a mask have operands"
        return MaskedUpdate(self.keep_bits, lora_A, lora_B, gain, self.scaling)


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
        call: _Call,
    ) -> Tensor:
        flat, low = _product(x.reshape(-1, x.shape[-1]), lora_A, lora_B, gain, call)
        # Shaped here and not by the caller, whose views are two more nodes of the graph. Not a view to autograd, so
        # that a model may write into it.
        out = torch.ops.aten._unsafe_view.default(flat, (*x.shape[:-1], flat.shape[1]))
        read_again = out if magnitude is not None and magnitude.requires_grad else None
        ctx.watch = None
        if read_again is not None and call.bias is None:  # a bias makes another tensor
            if call.keeps_copy:
                read_again = out.clone()
            elif not out.is_inference():
                # Saved without torch's count of changes, each of which would be an error: an empty tensor has it.
                ctx.watch, read_again = out.detach(), out.data
                ctx.watch.data = out.new_empty(0)
                ctx.version = ctx.watch._version
        # The backward pass does not read the magnitude, but saving it makes a change before that pass an error.
        ctx.save_for_backward(x, lora_A, lora_B, magnitude, gain, inverse_magnitude, low, read_again)
        ctx.call = call
        return with_bias(out, call.bias, is_kept=read_again is not None)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # Gradients have no graph of their own: an error for whoever asks for one. The wrapper that says so costs the
        # host time, so it is left out where nobody asks.
        gradients = _gradients_without_graph if torch.is_grad_enabled() else _gradients
        return gradients(ctx, *grads)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    # Read once: under a checkpoint a second read is an error.
    x, lora_A, lora_B, _, gain, inverse_magnitude, low, out = ctx.saved_tensors
    call: _Call = ctx.call
    need_x, need_a, need_b, need_m = ctx.needs_input_grad[:4]
    shape, x = x.shape, x.reshape(-1, x.shape[-1])
    if ctx.watch is not None and ctx.watch._version > ctx.version:
        out, _ = _product(x, lora_A, lora_B, gain, call)
    # Where a model transposes its outputs this is a copy, and autograd holds the original beside it.
    dy = dy.reshape(-1, dy.shape[-1])
    dx = da = db = dm = None
    with without_autocast(dy.device):
        if need_m:
            dm = column_dot(dy, out.reshape(dy.shape), inverse_magnitude)
        # Nobody else holds what a checkpoint has recomputed, so `out` and `x` go as soon as they have been read: in a
        # 7B model's down projection, where a step has its peak, 59 MiB.
        del out
        if call.keep_bits is not None:
            update = call.masked(lora_A, lora_B, gain)
            if need_a or need_b:
                da, db = update.factor_gradients(dy, dropped(x, call.dropout, call.seed))
            del x
            if need_x:
                dx = drop_(update.input_gradient(dy), call.dropout, call.seed)
        elif call.operands is not None and (need_x or need_a):
            d_low = dy @ call.operands.scaled_b  # (tokens, rank)
            a = call.operands.a
            if call.dropout > 0.0:
                dx, da = _dropped_input_gradients(x, d_low, a, call, (need_x, need_a))
                del x
            else:
                da = _summed_products(d_low, x) if need_a else None
                del x
                dx = d_low @ a if need_x else None
        if dx is not None:
            add_transposed_product_(dx, dy, *call.base(gain))
        if need_b and call.operands is not None:
            # The narrow factor first: a quarter faster on a CPU than (dy^T low).
            db = _summed_products(low, dy).T * call.operands.row_factor
    dx = None if dx is None else dx.view(shape)
    return dx, da if need_a else None, db if need_b else None, dm, None, None, None


_gradients_without_graph = once_differentiable(_gradients)  # type: ignore[no-untyped-call, unused-ignore]


def _product(
    x: Tensor, lora_A: Tensor, lora_B: Tensor, gain: Tensor | None, call: _Call
) -> tuple[Tensor, Tensor | None]:
    """The output without its bias, (tokens, out), and the low-rank activations, (tokens, rank), or None with a mask."""
    low = None
    with without_autocast(x.device):
        # The small term first: the sum is then rounded once, when the base's product is added to it.
        if call.operands is not None:
            low = _low_rank_input(x, call.operands.a, call)
            out = low @ call.operands.scaled_b.T
        else:
            out = call.masked(lora_A, lora_B, gain).product(dropped(x, call.dropout, call.seed))
        add_product_(out, x, *call.base(gain))
    return out, low


def _summed_products(left: Tensor, right: Tensor) -> Tensor:
    """left^T right, (tokens, m) and (tokens, n) -> (m, n), in float32 or wider, in which gradients accumulate.

    A GPU's product of 16-bit numbers writes the float32 sums themselves; a CPU's has none such, and they are rounded.
    """
    if device_kind(left.device) != "cpu" and left.dtype.itemsize == 2:
        summed: Tensor = torch.mm(left.T, right, out_dtype=torch.float32)
        return summed
    product = left.T @ right
    return product.to(torch.promote_types(product.dtype, torch.float32))


def _low_rank_input(x: Tensor, a: Tensor, call: _Call) -> Tensor:
    """drop(x) A^T without the factor 1 / (1 - p): (tokens, rank)."""
    if call.dropout == 0.0:
        return x @ a.T
    low = x.new_empty(x.shape[0], a.shape[0])
    for tokens, zeros in dropped_slices(x, call.dropout, call.seed):
        torch.mm(zeroed(x[tokens], zeros), a.T, out=low[tokens])
    return low


def _dropped_input_gradients(
    x: Tensor, d_low: Tensor, a: Tensor, call: _Call, needed: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """drop(d_low A), to which the base's part is added, and dA, where needed; the factor 1 / (1 - p) is in d_low."""
    need_x, need_a = needed
    dx = torch.empty(x.shape, dtype=d_low.dtype, device=x.device) if need_x else None
    da = None
    for tokens, zeros in dropped_slices(x, call.dropout, call.seed):
        if dx is not None:
            torch.mm(d_low[tokens], a, out=dx[tokens])
            zeroed_(dx[tokens], zeros)
        if need_a:
            part = _summed_products(d_low[tokens], zeroed(x[tokens], zeros))
            da = part if da is None else da.add_(part)
    if need_a and da is None:  # no tokens
        da = torch.zeros(a.shape, dtype=torch.promote_types(a.dtype, torch.float32), device=x.device)
    return dx, da


def column_dot(left: Tensor, right: Tensor, factor: Tensor) -> Tensor:
    """factor_i sum_t left[t, i] right[t, i] for each column i, in one pass and without a temporary of token size.

    torch has one kernel that forms these sums: the gradient of the weight of a batch normalisation with mean 0 and
    deviation 1 / factor. On a CPU it reads bf16 and sums in float32, takes 0.4 to 0.6 of the time of `(left *
    right).sum(0)`, and has a relative error of 2e-7 where the rounded products of that have 2e-3.

    Args:
        left, right: (tokens, out), the same float dtype.
        factor: (out,) float32, or float64 for float64 inputs; the result is like it.
    """
    zero = torch.zeros_like(factor)
    if left.shape[0] == 0:
        return zero
    if left.dtype == torch.float16 and device_kind(left.device) == "cpu":  # that kernel takes bf16 only
        left, right = left.float(), right.float()
    # True: mean and deviation are those of these tokens. The list asks for the weight's gradient alone.
    total: Tensor = torch.ops.aten.native_batch_norm_backward(
        left.contiguous(), right.contiguous(), factor, None, None, zero, factor, True, 0.0, [False, True, False]
    )[1]
    return total
