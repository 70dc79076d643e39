"""A step with its checkpoints in the host's memory: what they cost, and whether the device's memory stays as planned.

The bytes that are allocated in the host's order say little: what counts is what the allocator has to reserve while the
host runs ahead of the GPU.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from gpu import device as on
from gpu.model_step import make_model, make_step, peak_and_time
from gpu.part import Part
from gpu.plan import Plan
from gpu.shaped_model import Weights
from qdora.memory.activation_offload import ActivationOffload


def run(part: Part, plan: Plan, device: torch.device) -> None:
    """Peak, time and losses of the middle model's steps at the longest sequence, without and with the offload."""
    part.put("limit_share", on.limit_memory(device, on.CARD_40GB_BYTES))
    tokens, weights = plan.step_tokens[-1], Weights(device)

    def steps(offloads: bool) -> dict[str, Any]:
        model = make_model(plan.middle, "own_dora", device, rank=plan.ranks[0], weights=weights)
        if offloads:
            # The dry run has no other memory.
            stays = lambda tensor: SimpleNamespace(fetch=lambda: None, take=lambda: tensor)  # noqa: E731
            ActivationOffload(model, None if device.type == "cuda" else stays)
        return peak_and_time(make_step(model, "adamw", tokens, device), tokens, plan.num_steps, device)

    part.attempt("plain", steps, False)
    part.attempt("offloaded", steps, True)
    losses = [part.entries[name].get("losses") for name in ("plain", "offloaded") if name in part.entries]
    if len(losses) == 2 and all(losses):
        worst = max(abs(a / b - 1) for a, b in zip(*losses, strict=True))
        # The backward pass of attention is not deterministic on every GPU.
        part.put("same losses", {"relative_difference": worst, "ok": worst < 1e-3})
