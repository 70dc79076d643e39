"""y = x W^T + bias with a frozen W, read tile by tile; differentiable any number of times with respect to x.

The backward pass of x W^T is y W, and that of y W is x W^T again. No graph keeps a dequantised weight, not even the
graph over a graph that a curvature product takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qdora.quant import bnb_kernels
from qdora.quant.packed import PackedWeight
from qdora.quant.planned_device import device_kind
from qdora.quant.tiles import Weight, column_tiles, is_one_tile, row_tiles

# Up to 4 tokens bitsandbytes never makes a dense weight, and up to 1,536 (0.50.2) it may not, which its own
# measurements decide for each GPU and shape. For the widest weights they prefer a dense one from 33 tokens (sm_100) to
# 257 (sm_89) on.
_MOST_TOKENS = 64
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_DECODING = ContextVar("decoding", default=False)


def frozen_linear(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """y = x W^T + bias with a frozen W, (out, in), dense or packed, and a frozen bias, (out,).

    The product of x (..., in) runs in its dtype, or in the dtype of an active autocast, which the result has.
    """
    if without_graph_or_autocast(x):
        out = _tiled_product(x.reshape(-1, x.shape[-1]), weight, False)
    else:
        x = x.to(product_dtype(x))
        product = partial(_tiled_product, weight=weight)
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


def _tiled_product(x: Tensor, weight: Weight, transposed: bool) -> Tensor:
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


@contextmanager
def decoding() -> Iterator[None]:
    """Inside, a model writes text: `fused_product` computes where it can."""
    token = _DECODING.set(True)
    try:
        yield
    finally:
        _DECODING.reset(token)


def fused_product(x: Tensor, weight: Weight) -> Tensor | None:
    """x W^T, (tokens, in) -> (tokens, out), without a graph; None where no kernel computes it, so that tiles must.

    One kernel reads the codes and writes no dense tile. Decoding reads every weight for a handful of tokens;
    bitsandbytes' `gemm_4bit` reads 0.56 bytes a weight for it (codes, and float32 scales of blocks of 64), where a
    dense tile of 16 bits is written and read again: 4.6 bytes. The kernel rounds otherwise than tiles (0.26 % of a
    weight in place of 0.17 %). Scores that are compared must not depend on how many tokens a batch has, so only
    `decoding` uses it.

    A kernel needs `decoding`, a GPU, an NF4 or FP4 weight with decoded scales whose blocks do not cross rows, and few
    tokens. Where bitsandbytes makes the weight dense after all, it makes it whole, so a weight of several tiles is left
    to them.
    """
    if not _DECODING.get() or device_kind(x.device) == "cpu" or not isinstance(weight, PackedWeight):
        return None
    in_kernel = (
        0 < x.shape[0] <= _MOST_TOKENS
        and weight.kind in ("nf4", "fp4")
        and weight.nested is None
        and weight.block_size >= 32
    )
    whole_blocks = weight.shape[1] % weight.block_size == 0
    if not in_kernel or not whole_blocks or x.dtype not in _DTYPES or not is_one_tile(weight, x.dtype):
        return None
    if not bnb_kernels.has_product(x.device.type):
        return None
    return bnb_kernels.product_4bit(x, weight.packed, weight.absmax, weight.kind, weight.block_size, shape=weight.shape)
