"""The device that fake tensors stand for while a plan runs the real code on them.

Fake tensors of a GPU need a GPU build of torch, so a plan's tensors say "cpu" wherever they will live. Code whose tiles
or kernels differ between devices asks here, and a plan for a GPU then counts a GPU's tiles.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_PLANNED: ContextVar[str | None] = ContextVar("planned_device_type", default=None)


@contextmanager
def planned_on(device_type: str) -> Iterator[None]:
    """Inside, all tensors are fake and stand for tensors of this device type ("cpu" or "cuda")."""
    token = _PLANNED.set(device_type)
    try:
        yield
    finally:
        _PLANNED.reset(token)


def is_planning() -> bool:
    """Whether tensors are fake: a number that depends on their values must be replaced by its expectation."""
    return _PLANNED.get() is not None


def device_kind(device: torch.device) -> str:
    """The type of the device that a tensor is on, or that a fake one stands for."""
    return _PLANNED.get() or device.type
