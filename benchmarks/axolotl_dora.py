"""The algorithm of axolotl's DoRA kernels in plain torch, on PEFT's layer.

    y = g * u,  u = x W^T + s (x A^T) B^T,  g = m / ||W + s B A||

Written from the formulas of axolotl 0.19. u, another (tokens, out), is saved for the gradient of m, and W is made dense
for each product. The norm is that of the dense sum; its cache goes by the versions of A and B, which no bitsandbytes
optimizer raises. The sum of u is made in place, which is kinder than axolotl's third tensor.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor


def use_axolotl_dora(layer: Any, *, cached: bool) -> None:
    """Change the forward pass of one of PEFT's DoRA layers on a 4-bit base. No dropout, no bias."""
    layer.forward = partial(_forward, layer, cached)


def _forward(layer: Any, cached: bool, x: Tensor) -> Tensor:
    a, b, m = layer.lora_A.default.weight, layer.lora_B.default.weight, layer.lora_magnitude_vector.default.weight
    s, versions = layer.scaling["default"], (a._version, b._version)
    known, norm = layer.__dict__.get("_norm", (None, None))
    if not cached or known != versions:
        with torch.no_grad():
            norm = torch.linalg.vector_norm(_dense(layer.base_layer) + s * (b @ a), dim=1)
        layer.__dict__["_norm"] = (versions, norm)
    y: Tensor = _Product.apply(x.flatten(0, -2), a, b, m, m / norm, layer.base_layer, s)
    return y.view(*x.shape[:-1], -1)


def _dense(base: Any) -> Tensor:
    return bnb.functional.dequantize_4bit(base.weight.data, base.weight.quant_state)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, m: Tensor, g: Tensor, base: Any, s: float) -> Tensor:
        u = (x @ _dense(base).T).addmm_(x @ a.T, b.T, alpha=s)
        ctx.save_for_backward(x, a, b, m, g, u)
        ctx.base, ctx.s = base, s
        return g * u

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b, m, g, u = ctx.saved_tensors
        dm = (dy * u).sum(0) * g / m
        du = dy * g
        low = du @ b
        da, db = ctx.s * (low.T @ x), ctx.s * (du.T @ (x @ a.T))
        dx = (du @ _dense(ctx.base)).addmm_(low, a, alpha=ctx.s)
        return dx, da, db, dm, None, None, None
