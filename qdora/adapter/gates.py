"""Gates of rank components: a factor per component between B and A, and hard-concrete gates that reach exactly 0 and 1.

    W + s B diag(gate) A = W + s B' A,        B' = B diag(gate)

Everything that takes B takes B' instead, so there is no second formula. Hard-concrete gates are random numbers:

    s = sigmoid((log u - log(1 - u) + log_alpha) / beta)        z = clip(s (zeta - gamma) + gamma, 0, 1)

Source: arXiv 1712.01312, sec. 3 (eq. 10 to 12) and 4 (beta = 2/3, gamma = -0.1, zeta = 1.1).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qdora.adapter.algebra import rounded

BETA, GAMMA, ZETA = 2.0 / 3.0, -0.1, 1.1
_SHIFT = BETA * math.log(-GAMMA / ZETA)


def fold_gate(lora_B: Tensor, gate: Tensor) -> Tensor:
    """B' = B diag(gate), (..., out, rank), rounded to B's dtype and held in float32 or wider.

    Rounded, so that products, norm, merge and file have the same numbers; differentiable as if it were not.
    """
    folded: Tensor = _FoldGate.apply(lora_B, gate)  # type: ignore[no-untyped-call, unused-ignore]
    return folded


class _FoldGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, lora_B: Tensor, gate: Tensor) -> Tensor:
        ctx.save_for_backward(lora_B, gate)
        wide = torch.promote_types(lora_B.dtype, torch.float32)
        return rounded(lora_B.to(wide) * gate.to(wide), lora_B.dtype).to(wide)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (grad,) = grads
        lora_B, gate = ctx.saved_tensors
        need_b, need_gate = ctx.needs_input_grad
        over = tuple(range(grad.ndim - 1))
        d_gate = (grad * lora_B.to(grad.dtype)).sum(dim=over).to(gate.dtype) if need_gate else None
        return grad * gate.to(grad.dtype) if need_b else None, d_gate


def gate_value(log_alpha: Tensor, noise: Tensor | None = None) -> Tensor:
    """The gate z of a draw with u = `noise` in (0, 1); without noise, for evaluation, eq. 13."""
    return (_concrete(log_alpha, noise) * (ZETA - GAMMA) + GAMMA).clamp(0.0, 1.0)


def gate_slope(log_alpha: Tensor, noise: Tensor) -> Tensor:
    """dz / dlog_alpha of a draw; 0 where z is clipped."""
    s = _concrete(log_alpha, noise)
    stretched = s * (ZETA - GAMMA) + GAMMA
    return torch.where((stretched > 0) & (stretched < 1), (ZETA - GAMMA) * s * (1 - s) / BETA, 0.0)


def probability_on(log_alpha: Tensor) -> Tensor:
    """P(z > 0) = sigmoid(log_alpha - beta log(-gamma / zeta)), eq. 12."""
    return torch.sigmoid(log_alpha - _SHIFT)


def _concrete(log_alpha: Tensor, noise: Tensor | None) -> Tensor:
    return torch.sigmoid(log_alpha if noise is None else (noise.log() - (1 - noise).log() + log_alpha) / BETA)
