"""Which kernels a layer's pass and a model's step consist of, the longest first: torch's own table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from gpu import device as on
from gpu.layer_cost import make_base, make_case
from gpu.model_step import make_model, make_step
from gpu.part import Part
from gpu.plan import Plan


def run(part: Part, plan: Plan, device: torch.device) -> None:
    """A layer at the first length, then a step of a model of two layers, optimizer included."""
    base, tokens = make_base(plan.shapes[0], device), plan.tokens[0]
    for name in ("own_lora", "own_dora", "own_dora_new_norm", "own_dora_dropout", "peft_lora", "peft_dora"):
        part.attempt(name, table, make_case(name, base, plan.ranks[0], tokens).step, device)
    small = plan.middle | {"num_hidden_layers": 2}
    for name in ("own_dora", "peft_lora"):
        step = make_step(make_model(small, name, device, rank=plan.ranks[0]), "adamw", plan.step_tokens[0], device)
        part.attempt(f"step of two layers, {name}", table, lambda s=step: s(1), device)


def table(function: Callable[[], Any], device: torch.device) -> list[str]:
    """Lines of the table for one call; the time of an annotation is that of its kernels once more."""
    on.timed(device, function, 2)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as found:
        on.timed(device, function)
    text = found.key_averages().table(sort_by=f"self_{device.type}_time_total", row_limit=25, max_name_column_width=90)
    return [" ".join(line.split()) for line in text.splitlines() if not line.startswith("-")]
