"""Time of an optimizer's step over the adapters of the middle model, and how often the host waits in it.

Parameters are updated as flat tensors: some 20 launches for all, and no wait (tests/test_gpu_launches.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from gpu import device as on
from gpu.part import Part
from gpu.plan import Plan
from gpu.shaped_model import linear_shapes
from qdora.train.optimizer import AdapterOptimizer

NAMES = ("adamw", "paged_adamw_8bit", "paged_adamw_32bit", "lion", "paged_lion_8bit")


def run(part: Part, plan: Plan, device: torch.device) -> None:
    """Each optimizer on bf16 and float32 storage, and torch's own fused AdamW as the floor."""
    shapes = parameter_shapes(plan)
    part.put("num_parameters", len(shapes))
    part.put("num_elements", sum(torch.Size(shape).numel() for shape in shapes.values()))
    for dtype in (torch.bfloat16, torch.float32):
        for name in NAMES:
            key = f"{name}, {str(dtype).removeprefix('torch.')}"
            part.attempt(key, lambda n=name, d=dtype: of_optimizer(n, d, shapes, device))
    part.attempt("torch AdamW, fused, bfloat16", lambda: of_torch(shapes, device))


def parameter_shapes(plan: Plan) -> dict[str, torch.Size]:
    """Of the DoRA adapters of the middle model."""
    rank, found, layer = plan.ranks[0], {}, linear_shapes(plan.middle)
    for index in range(plan.middle["num_hidden_layers"]):
        for name, (out, in_) in layer.items():
            path = f"layers.{index}.{name}"
            found |= {f"{path}.lora_A": torch.Size((rank, in_)), f"{path}.lora_B": torch.Size((out, rank))}
            found[f"{path}.magnitude"] = torch.Size((out,))
    return found


def _parameters(shapes: dict[str, torch.Size], dtype: torch.dtype, device: torch.device) -> dict[str, nn.Parameter]:
    made = {}
    for name, shape in shapes.items():
        kept = torch.float32 if name.endswith("magnitude") else dtype
        made[name] = nn.Parameter(torch.randn(shape, device=device).mul_(0.01).to(kept))
    return made


def of_optimizer(name: Any, dtype: torch.dtype, shapes: dict[str, torch.Size], device: torch.device) -> dict[str, Any]:
    """Seconds of a step after two that make the states, and the host's waits."""
    parameters = _parameters(shapes, dtype, device)
    optimizer = AdapterOptimizer(parameters, name=name)
    for parameter in parameters.values():
        parameter.grad = torch.randn(parameter.shape, device=device)
    for _ in range(2):
        optimizer.step(1e-4)
    sample = on.timed(device, lambda: optimizer.step(1e-4), 3)
    with on.host_waits(device) as waits:
        optimizer.step(1e-4)
    return {"seconds": sample.seconds, "host_seconds": sample.host_seconds, "waits": dict(waits.most_common(10))}


def of_torch(shapes: dict[str, torch.Size], device: torch.device) -> dict[str, Any]:
    """A fused update of bf16 parameters in bf16: the least work, and updates lost to rounding."""
    parameters = list(_parameters(shapes, torch.bfloat16, device).values())
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    for _ in range(2):
        optimizer.step()
    sample = on.timed(device, optimizer.step, 3)
    return {"seconds": sample.seconds, "host_seconds": sample.host_seconds}
