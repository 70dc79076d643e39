"""How often the host waits for the GPU in a layer's pass and in a training step: each wait empties the GPU's queue."""

from __future__ import annotations

from typing import Any

import torch

from gpu import device as on
from gpu.layer_cost import make_base, make_case
from gpu.model_step import make_model, make_step
from gpu.part import Part
from gpu.plan import Plan

LAYERS = ("own_lora", "own_dora", "own_dora_dropout", "own_dora_new_norm", "peft_lora", "peft_dora")
_NO_WAIT = LAYERS[:3]


def run(part: Part, plan: Plan, device: torch.device) -> None:
    """Layers first, then a step of a model of two layers, by the line that waits."""
    base = make_base(plan.shapes[-1], device)
    for name in LAYERS:
        part.attempt(name, of_layer, name, base, plan, device)
    for name in ("own_dora", "peft_dora"):
        part.attempt(f"training step of {name}", of_step, name, plan, device)


def of_layer(name: str, base: Any, plan: Plan, device: torch.device) -> dict[str, Any]:
    """Waits of one forward and backward pass, and whether there are as few as there should be."""
    case = make_case(name, base, plan.ranks[0], plan.tokens[0])
    case.step()
    with on.host_waits(device) as waits:
        case.step()
    number = sum(waits.values())
    return {"waits": number, "lines": dict(waits)} | ({"ok": number == 0} if name in _NO_WAIT else {})


def of_step(name: str, plan: Plan, device: torch.device) -> dict[str, Any]:
    """Waits of the third step through the training loop; a step has one micro-batch."""
    small = plan.middle | {"num_hidden_layers": 2, "vocab_size": 512}
    step = make_step(make_model(small, name, device, rank=plan.ranks[0]), "adamw", plan.step_tokens[0], device)
    step(2)
    with on.host_waits(device) as waits:
        step(1)
    return {"waits": sum(waits.values()), "lines": dict(waits.most_common(30))}
