"""Where does the host wait, and which kernels run? Each wait empties the GPU's queue."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from contenders import NEW_NORM, LayerCall, random_base
from torch.profiler import ProfilerActivity, profile

from gpu import device as on
from gpu.plan import Part, Plan
from gpu.steps import make_model, make_step

_NO_WAIT = ("own_lora", "own_dora", "own_dora_dropout")
LAYERS = (*_NO_WAIT, f"own_dora{NEW_NORM}", "peft_lora", "peft_dora")


def run(part: Part, plan: Plan, device: torch.device) -> None:
    """Waits by the line that waits: of one pass of a layer, which should be none, and of the third step of a model of
    two layers through the training loop, in one micro-batch."""

    def of_layer(name: str) -> dict[str, Any]:
        call = LayerCall(name, base, plan.ranks[0], plan.tokens[0])
        call.step()
        with on.host_waits(device) as waits:
            call.step()
        number = sum(waits.values())
        return {"waits": number, "lines": dict(waits)} | ({"ok": number == 0} if name in _NO_WAIT else {})

    def of_step(name: str) -> dict[str, Any]:
        small = plan.middle | {"num_hidden_layers": 2, "vocab_size": 512}
        step = make_step(make_model(small, name, device, rank=plan.ranks[0]), "adamw", plan.step_tokens[0], device)
        step(2)
        with on.host_waits(device) as waits:
            step(1)
        return {"waits": sum(waits.values()), "lines": dict(waits.most_common(30))}

    base = random_base(*plan.shapes[-1], device)
    for name in LAYERS:
        part.attempt(name, of_layer, name)
    for name in ("own_dora", "peft_dora"):
        part.attempt(f"training step of {name}", of_step, name)


def profiles(part: Part, plan: Plan, device: torch.device) -> None:
    """torch's own tables: a layer at the first length, then a step of a model of two layers, optimizer included."""
    base, tokens = random_base(*plan.shapes[0], device), plan.tokens[0]
    for name in LAYERS:
        part.attempt(name, longest_kernels, LayerCall(name, base, plan.ranks[0], tokens).step, device)
    small = plan.middle | {"num_hidden_layers": 2}
    for name in ("own_dora", "peft_lora"):
        step = make_step(make_model(small, name, device, rank=plan.ranks[0]), "adamw", plan.step_tokens[0], device)
        part.attempt(f"step of two layers, {name}", longest_kernels, lambda s=step: s(1), device)


def longest_kernels(function: Callable[[], Any], device: torch.device) -> list[str]:
    """Lines of the table for one call; the time of an annotation is that of its kernels once more."""
    on.timed(device, function, 2)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as found:
        on.timed(device, function)
    text = found.key_averages().table(sort_by=f"self_{device.type}_time_total", row_limit=25, max_name_column_width=90)
    return [" ".join(line.split()) for line in text.splitlines() if not line.startswith("-")]
