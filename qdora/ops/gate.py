"""One gate per rank component: diag(gate) between B and A, folded into B.

    W + s B diag(gate) A = W + s B' A,        B' = B diag(gate)

Everything that takes B (forward, norm, merge, the file) takes B' instead, so there is no second formula.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qdora.ops.adapted_linear import rounded


def fold_gate(lora_B: Tensor, gate: Tensor) -> Tensor:
    """B' = B diag(gate), rounded to B's dtype and held in float32 or wider.

    Rounded, so that the products, the norm, the merge and the stored adapter have the same numbers; held wide, so that
    its gradient is not rounded on the way back. With gate 1 it is B itself.

    Args:
        lora_B: (out, rank).
        gate: (rank,), float32 or wider.
    Returns:
        (out, rank), differentiable with respect to both; the rounding counts as the identity.
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
        d_gate = (grad * lora_B.to(grad.dtype)).sum(dim=0).to(gate.dtype) if need_gate else None
        return grad * gate.to(grad.dtype) if need_b else None, d_gate
