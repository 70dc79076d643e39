"""The product of few tokens with a packed weight in one kernel, which reads the codes and writes no dense tile.

Decoding reads every weight for a handful of tokens. bitsandbytes' `gemm_4bit` reads 0.56 bytes a weight for it (codes,
and float32 scales of blocks of 64), where a dense tile of 16 bits is written and read again: 4.6 bytes.

The kernel rounds otherwise than tiles (0.26 % of a weight in place of 0.17 %). Scores that are compared must not depend
on how many tokens a batch has, so only `decoding` uses it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from qdora.ops import bnb_kernels
from qdora.ops.packed import PackedWeight
from qdora.ops.planned_device import device_kind
from qdora.ops.tiles import Weight, is_one_tile

# Up to 4 tokens bitsandbytes never makes a dense weight, and up to 1,536 (0.50.2) it may not, which its own
# measurements decide for each GPU and shape. For the widest weights they prefer a dense one from 33 tokens (sm_100) to
# 257 (sm_89) on.
_MOST_TOKENS = 64
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_DECODING = ContextVar("decoding", default=False)


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
