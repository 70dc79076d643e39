"""A step with its checkpoints in the host's memory: what they cost, and whether the device's memory stays as planned.

The bytes that are allocated in the host's order say little: what counts is what the allocator has to reserve while the
host runs ahead of the GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gpu import device as on
from gpu.model_step import fitting_step, make_model, one_sequence, peak_and_time
from gpu.part import Part
from gpu.plan import Plan
from gpu.shaped_model import Weights
from qdora.memory.activation_offload import ActivationOffload


class Kept:
    """Takes a tensor nowhere: the dry run has no other memory."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def fetch(self) -> None:
        """Nothing to fetch."""

    def take(self) -> Tensor:
        """The tensor."""
        return self.tensor


def run(part: Part, plan: Plan, device: torch.device) -> None:
    """Peak and time of the middle model's step at the longest sequence, without and with the offload."""
    part.put("limit_share", on.limit_memory(device, on.CARD_40GB_BYTES))
    tokens, weights = plan.step_tokens[-1], Weights(device)
    model = make_model(plan.middle, "own_dora", device, rank=plan.ranks[0], weights=weights)
    part.put("checkpoint_bytes", 2 * tokens * plan.middle["hidden_size"])
    part.put("held_bytes", on.held_bytes(device))
    ids = one_sequence(tokens, plan.middle["vocab_size"]).steps[0].micro_batches[0].input_ids.to(device)
    step = fitting_step(model, "adamw", tokens, device)
    part.attempt("plain", lambda: peak_and_time(step, tokens, plan.num_steps, device))
    before = gradient_norm(model, ids)
    ActivationOffload(model, None if device.type == "cuda" else Kept)
    found = gradient_norm(model, ids)
    # The backward pass of attention is not deterministic on every GPU.
    part.put("gradient", {"ok": abs(found / before - 1) < 1e-3, "norms": [before, found]})
    part.attempt("offloaded", lambda: peak_and_time(step, tokens, plan.num_steps, device))


def gradient_norm(model: Any, ids: Tensor) -> float:
    """Of all adapters, from one pass over the sequence."""
    model.train()
    parameters = [each for each in model.parameters() if each.requires_grad]
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    norm = torch.stack([each.grad.float().norm() for each in parameters if each.grad is not None]).norm()
    for each in parameters:
        each.grad = None
    return float(norm)
