"""Which kernels a layer's pass and a model's step consist of: the table that says what a fused kernel could save."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from gpu import device as on
from gpu.layer_cost import make_base, make_case
from gpu.model_step import fitting_step, make_model
from gpu.part import Part
from gpu.plan import Plan, shape_name

LAYERS = ("own_lora", "own_dora", "own_dora_new_norm", "own_dora_dropout", "peft_lora", "peft_dora")
_TOP = 20


def run(part: Part, plan: Plan, device: torch.device) -> None:
    """A layer at the first two lengths, then a step of a model of two layers."""
    base = make_base(plan.shapes[0], device)
    for tokens in plan.tokens[:2]:
        for name in LAYERS:
            case = make_case(name, base, plan.ranks[0], tokens)
            key = f"{name}, {shape_name(plan.shapes[0])}, {tokens} tokens"
            part.attempt(key, lambda c=case: table(c.step, device))
    del base
    small = plan.middle | {"num_hidden_layers": 2}
    for name in ("own_dora", "peft_lora"):
        part.attempt(f"step of two layers, {name}", lambda n=name: of_step(small, n, plan, device))


def of_step(settings: dict[str, Any], name: str, plan: Plan, device: torch.device) -> dict[str, Any]:
    """A training step of a small stack, optimizer included."""
    step = fitting_step(make_model(settings, name, device, rank=plan.ranks[0]), "adamw", plan.step_tokens[0], device)
    return table(lambda: step(1), device)


def table(function: Callable[[], Any], device: torch.device, calls: int = 3) -> dict[str, Any]:
    """Kernels by time: name, share of the device's time, launches and microseconds per call of `function`."""
    for _ in range(2):
        function()
    on.synchronize(device)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as found:
        for _ in range(calls):
            function()
        on.synchronize(device)
    rows = sorted(_rows(found.key_averages(), device), key=lambda row: -row[1])
    total = sum(microseconds for _, microseconds, _ in rows)
    return {
        "device_microseconds": total / calls,
        "launches": sum(count for *_, count in rows) / calls,
        "kernels": [
            {
                "name": name[:120],
                "share": microseconds / total if total else 0.0,
                "launches": count / calls,
                "microseconds": microseconds / calls,
            }
            for name, microseconds, count in rows[:_TOP]
        ],
    }


def _rows(averages: Any, device: torch.device) -> list[tuple[str, float, int]]:
    """(name, own microseconds, count) of what ran on the device; on a CPU of the operators."""
    if device.type != "cuda":
        return [(each.key, float(each.self_cpu_time_total), each.count) for each in averages]
    # An annotation, such as that of an optimizer's step, has the time of its kernels once more
    on_gpu = [each for each in averages if each.device_type == DeviceType.CUDA and not each.is_user_annotation]
    return [(each.key, float(each.self_device_time_total), each.count) for each in on_gpu]
