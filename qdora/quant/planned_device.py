"""The device that fake tensors stand for while a plan runs the real code on them.

Fake tensors of a GPU need a GPU build of torch, so a plan's tensors say "cpu" wherever they will live. Code whose tiles
or kernels differ between devices asks here, and a plan for a GPU then counts a GPU's tiles.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal

import torch

_PLANNED: ContextVar[str | None] = ContextVar("planned_device_type", default=None)

Routing = Literal["even", "skewed"]
"""How a plan divides tokens among the experts of a mixture: evenly, or nearly all of them to the same experts."""
_ROUTING: ContextVar[Routing] = ContextVar("planned_routing", default="even")


@contextmanager
def planned_on(device_type: str, routing: Routing = "even") -> Iterator[None]:
    """Inside, all tensors are fake and stand for tensors of this device type ("cpu" or "cuda")."""
    tokens = _PLANNED.set(device_type), _ROUTING.set(routing)
    try:
        yield
    finally:
        _PLANNED.reset(tokens[0])
        _ROUTING.reset(tokens[1])


def is_planning() -> bool:
    """Whether tensors are fake: a number that depends on their values must be replaced by its expectation."""
    return _PLANNED.get() is not None


def planned_counts(num_tokens: int, top_k: int, num_experts: int) -> list[int]:
    """How many tokens each expert of a mixture gets in a plan, (num_experts,), where each token chooses `top_k`.

    Skewed, `top_k` experts get nearly all tokens. Every other expert gets one, where that leaves enough of them: as
    many experts as may be share a launch with the busy ones, and their weights do not lie together.
    """
    if _ROUTING.get() == "even":
        each, more = divmod(num_tokens * top_k, num_experts)
        return [each + (expert < more) for expert in range(num_experts)]
    step = 2 if (num_experts + 1) // 2 >= top_k else 1
    reached = list(range(0, num_experts, step))[: top_k * num_tokens]
    counts = [0] * num_experts
    for expert in reached:
        counts[expert] = 1
    each, more = divmod(num_tokens * top_k - len(reached), top_k)
    for index, expert in enumerate(reached[:top_k]):
        counts[expert] += each + (index < more)
    return counts


def device_kind(device: torch.device) -> str:
    """The type of the device that a tensor is on, or that a fake one stands for."""
    return _PLANNED.get() or device.type
