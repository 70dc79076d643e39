"""What does an optimizer's step cost? Time over the adapters of the middle model, the host's waits, and its pages."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from gpu import device as on
from gpu.models import linear_shapes
from gpu.plan import Part, Plan
from qdora.train.optimizer import AdapterOptimizer

NAMES = ("paged_adamw_8bit", "adamw", "paged_adamw_32bit", "lion", "paged_lion_8bit")


def run(part: Part, plan: Plan, device: torch.device) -> None:
    """Each optimizer on bf16 adapters, and torch's own fused AdamW as the floor."""

    def parameters() -> dict[str, nn.Parameter]:
        made = {name: torch.randn(shape, device=device).mul_(0.01) for name, shape in shapes.items()}
        return {name: nn.Parameter(value if value.dim() == 1 else value.bfloat16()) for name, value in made.items()}

    shapes = {
        f"layers.{index}.{name}.{key}": shape
        for index in range(plan.middle["num_hidden_layers"])
        for name, (out, in_) in linear_shapes(plan.middle).items()
        for key, shape in (("lora_A", (plan.ranks[0], in_)), ("lora_B", (out, plan.ranks[0])), ("magnitude", (out,)))
    }
    part.put("num_elements", sum(torch.Size(shape).numel() for shape in shapes.values()))
    for name in NAMES:
        part.attempt(name, lambda name=name: of_optimizer(name, parameters(), device))
    part.attempt("torch AdamW, fused", lambda: of_torch(list(parameters().values()), device))


def of_optimizer(name: Any, parameters: dict[str, nn.Parameter], device: torch.device) -> dict[str, Any]:
    """Seconds of a step after two that make the states, the host's waits, and the bytes that the states take.

    Pages are managed memory, which torch does not count: paged states take few of its bytes.
    """
    on.free(device)
    before = on.memory(device)["held"]
    optimizer = AdapterOptimizer(parameters, name=name)
    held = on.memory(device)["held"] - before
    for parameter in parameters.values():
        parameter.grad = torch.randn(parameter.shape, device=device)
    kept = {key: parameter.detach().clone() for key, parameter in parameters.items()}
    for _ in range(2):
        optimizer.step(1e-2)
    unmoved = [key for key, parameter in parameters.items() if torch.equal(kept[key], parameter.detach())]
    sample = on.timed(device, lambda: optimizer.step(1e-4), 3)
    with on.host_waits(device) as waits:
        optimizer.step(1e-4)
    finite = all(bool(parameter.isfinite().all()) for parameter in parameters.values())
    return {
        **sample._asdict(),
        "waits": dict(waits.most_common(10)),
        "state_bytes_of_torch": held,
        "moved": {"unmoved": unmoved[:5], "ok": finite and not unmoved},
    }


def of_torch(parameters: list[nn.Parameter], device: torch.device) -> dict[str, Any]:
    """A fused update of bf16 parameters in bf16: the least work, and updates lost to rounding."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    on.timed(device, optimizer.step, 2)
    return on.timed(device, optimizer.step, 3)._asdict()
