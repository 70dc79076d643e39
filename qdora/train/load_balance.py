"""How unevenly routers divide tokens among experts, as a differentiable number."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def load_balancing_loss(router_logits: Sequence[Tensor], top_k: int, real: Tensor) -> Tensor:
    """E sum_e f_e P_e over the real tokens of all routers together; f is counted and has no gradient.

    f_e is how often expert e is among the `top_k` most probable ones, for each token; P_e its mean probability. It is
    `top_k` where all experts have the same probability, and E where all tokens choose the same experts for certain.

    Source: Switch Transformer, arXiv 2101.03961, eq. 4 to 6, for several choices as in transformers.

    Args:
        router_logits: Of each router, (tokens, E), any float dtype; the softmax runs in float32 (float64 for float64).
        real: (tokens,), 1 or True for tokens that are not padding; at least one.
    Returns: Scalar, float32 or float64.
    """
    num_experts = router_logits[0].shape[-1]
    wide = torch.promote_types(router_logits[0].dtype, torch.float32)
    device = router_logits[0].device
    weights = real.to(device, wide)
    chosen_by = real.to(device, torch.int64).unsqueeze(1).expand(-1, top_k).reshape(-1)
    counts = torch.zeros(num_experts, dtype=torch.int64, device=device)  # integers: no order of sums
    probability = torch.zeros(num_experts, dtype=wide, device=device)
    for logits in router_logits:
        own = logits.to(device, wide)
        counts.scatter_add_(0, own.topk(top_k, dim=-1).indices.reshape(-1), chosen_by)
        probability = probability + weights @ torch.softmax(own, dim=-1)
    num_routed = weights.sum() * len(router_logits)
    return num_experts * (counts / num_routed * (probability / num_routed)).sum()
