"""The frozen linear map, differentiable any number of times.

Training needs one derivative, and `ops/adapted_linear.py` gives it at the least cost. A curvature product needs the
derivative of a derivative: here the backward pass of x W^T is the map y W, whose backward pass is x W^T again. Both
read the base tile by tile, so a graph over a graph keeps no dequantised weight either.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qdora.ops.tiles import Weight, column_tiles, row_tiles


def linear_map(x: Tensor, weight: Weight) -> Tensor:
    """x W^T with a frozen W.

    Args:
        x: (..., in), a float dtype; the product runs in it, and so does every derivative.
        weight: Frozen W, (out, in), dense or packed.
    Returns:
        (..., out) in x's dtype, differentiable any number of times with respect to x.
    """
    out: Tensor = _Map.apply(x.reshape(-1, x.shape[-1]), weight)  # type: ignore[no-untyped-call, unused-ignore]
    return out.reshape(*x.shape[:-1], out.shape[-1])


def product(x: Tensor, weight: Weight) -> Tensor:
    """x W^T in x's dtype: (tokens, in) -> (tokens, out), without a graph."""
    out = x.new_empty(x.shape[0], weight.shape[0])
    for rows, tile in row_tiles(weight, x.dtype):
        torch.mm(x, tile.T, out=out[:, rows])
        del tile
    return out


def transposed_product(y: Tensor, weight: Weight) -> Tensor:
    """y W in y's dtype: (tokens, out) -> (tokens, in), without a graph."""
    out = y.new_empty(y.shape[0], weight.shape[1])
    for columns, tile in column_tiles(weight, y.dtype):
        torch.mm(y, tile, out=out[:, columns])
        del tile
    return out


def add_product_(out: Tensor, x: Tensor, weight: Weight, gain: Tensor | None) -> None:
    """Add x (diag(g) W)^T to `out`, (tokens, out), one tile of rows at a time; g is (out,), or None for 1."""
    for rows, tile in row_tiles(weight, x.dtype, gain):
        out[:, rows].addmm_(x, tile.T)
        del tile


def add_transposed_product_(dx: Tensor, dy: Tensor, weight: Weight, gain: Tensor | None) -> None:
    """Add dy diag(g) W to `dx`, (tokens, in), one tile of columns at a time; g is (out,), or None for 1."""
    for columns, tile in column_tiles(weight, dy.dtype, gain):
        dx[:, columns].addmm_(dy, tile)
        del tile


class _Map(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Weight) -> Tensor:
        ctx.weight = weight
        return product(x, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None
        transposed: Tensor = _Transposed.apply(grads[0], ctx.weight)  # type: ignore[no-untyped-call, unused-ignore]
        return transposed, None


class _Transposed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, weight: Weight) -> Tensor:
        ctx.weight = weight
        return transposed_product(y, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None
        back: Tensor = _Map.apply(grads[0], ctx.weight)  # type: ignore[no-untyped-call, unused-ignore]
        return back, None
