"""y = x W^T + bias with a frozen W, read tile by tile; differentiable any number of times with respect to x.

The backward pass of x W^T is y W, and that of y W is x W^T again. No graph keeps a dequantised weight, not even the
graph over a graph that a curvature product takes.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qdora.ops.tiles import Weight, column_tiles, row_tiles


def frozen_linear(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """y = x W^T + bias with a frozen W, (out, in), dense or packed, and a frozen bias, (out,).

    The product of x (..., in) runs in its dtype, or in the dtype of an active autocast, which the result has.
    """
    if without_graph_or_autocast(x):
        out = tiled_product(x.reshape(-1, x.shape[-1]), weight, False)
    else:
        x = x.to(product_dtype(x))
        product = partial(tiled_product, weight=weight)
        out = FrozenMap.apply(  # type: ignore[no-untyped-call, unused-ignore]
            x.reshape(-1, x.shape[-1]), product, False
        )
    return with_bias(out, bias, is_kept=False).reshape(*x.shape[:-1], out.shape[-1])


def without_graph_or_autocast(x: Tensor) -> bool:
    """Whether products of `x` run in its own dtype and without a graph, which would slow down a single token."""
    return not torch.is_grad_enabled() and not torch.is_autocast_enabled(x.device.type)


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype of the products of an input: its own, or that of an active autocast, as in torch's own linear map.

    Autocast leaves float64 alone.
    """
    kind = x.device.type
    casts = torch.is_autocast_enabled(kind) and x.dtype != torch.float64
    return torch.get_autocast_dtype(kind) if casts else x.dtype


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Inside, products run in the dtype of their arguments. Where no autocast is active, none is entered: that
    would cost the host time."""
    kind = device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def tiled_product(x: Tensor, weight: Weight, transposed: bool) -> Tensor:
    """x W^T, or x W where `transposed`, in x's dtype: (tokens, in) -> (tokens, out), or back, without a graph."""
    out = x.new_empty(x.shape[0], weight.shape[1 if transposed else 0])
    tiles = column_tiles if transposed else row_tiles
    for span, tile in tiles(weight, x.dtype):
        torch.mm(x, tile if transposed else tile.T, out=out[:, span])
        del tile
    return out


def add_product_(out: Tensor, x: Tensor, weight: Weight, gain: Tensor | None) -> None:
    """Add x (diag(g) W)^T to `out`, (tokens, out), one tile of rows at a time; g is (out,), or None for 1."""
    for rows, tile in row_tiles(weight, x.dtype, gain):
        part = out if tile.shape[0] == out.shape[1] else out[:, rows]  # a view costs the host time
        part.addmm_(x, tile.T)
        del tile


def add_transposed_product_(dx: Tensor, dy: Tensor, weight: Weight, gain: Tensor | None) -> None:
    """Add dy diag(g) W to `dx`, (tokens, in), one tile of columns at a time; g is (out,), or None for 1."""
    for columns, tile in column_tiles(weight, dy.dtype, gain):
        part = dx if tile.shape[1] == dx.shape[1] else dx[:, columns]
        part.addmm_(dy, tile)
        del tile


def with_bias(out: Tensor, bias: Tensor | None, *, is_kept: bool) -> Tensor:
    """The output plus its bias: in place, unless `out` is kept.

    The gradient of the magnitude needs the output without its bias. Subtracting the bias again would leave the rounding
    of the sum (Qwen's key biases are hundreds of times the rest).
    """
    if bias is None:
        return out
    return out + bias.to(out.dtype) if is_kept else out.add_(bias.to(out.dtype))


class FrozenMap(torch.autograd.Function):
    """x -> product(x, transposed=False), a linear map whose backward pass is dy -> product(dy, transposed=True).

    It can be differentiated any number of times.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, product: Callable[..., Tensor], transposed: bool) -> Tensor:
        ctx.product, ctx.transposed = product, transposed
        if ctx.needs_input_grad[0]:
            # The backward pass needs no values. But the request for saved tensors makes a checkpoint recompute its
            # block, and only that brings a streamed weight back to its slot.
            ctx.save_for_backward(x.new_empty(0))
        return product(x, transposed=transposed)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None, None
        _ = ctx.saved_tensors
        dx: Tensor = FrozenMap.apply(  # type: ignore[no-untyped-call, unused-ignore]
            grads[0], ctx.product, not ctx.transposed
        )
        return dx, None, None
