"""A cache of values that follow from the parameters of a layer, each computed once for each state of them.

A, B, gates and m change once per optimizer step. The micro-batches of a step, the recompute of a checkpoint and an
evaluation share one row norm and one set of operands.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from qdora.quant.planned_device import is_planning

_Value = TypeVar("_Value")


@dataclass
class _Entry:
    """A value and the state that it is of; the parameters are held, so that no other tensor can take their identity."""

    parameters: tuple[Tensor, ...]
    states: tuple[tuple[int, int], ...]
    settings: tuple[object, ...]
    value: object


class ParameterCache:
    """Remembers a value by its name, for the last state of the parameters that it was computed from.

    A state is known by the identity and address of the parameters and by torch's version counters. Every in-place
    change raises these: a step of an optimizer, `load_state_dict`, `copy_`. bitsandbytes' kernels and writes through
    `.data` raise none. So after the step of any `torch.optim.Optimizer`, bitsandbytes' included, this file raises the
    counters of its parameters. Whoever writes through `.data` outside an optimizer calls `clear` (a layer's
    `parameters_changed`); `model.train()` and `model.eval()` call it where they change the mode.
    """

    def __init__(self) -> None:
        _watch_optimizers()
        self._entries: dict[str, _Entry] = {}

    def __reduce__(self) -> tuple[type[ParameterCache], tuple[()]]:
        """A copy starts empty: its tensors count their versions anew and could meet an old count by chance."""
        return ParameterCache, ()

    def clear(self) -> None:
        """Forget all values."""
        self._entries.clear()

    def get(
        self, name: str, parameters: tuple[Tensor, ...], settings: tuple[object, ...], make: Callable[[], _Value]
    ) -> _Value:
        """The value of the present state, one for each name: detached tensors, which must not be written to.

        Args:
            parameters: The tensors that the value depends on.
            settings: Everything else that it depends on.
            make: Computes the value, without a graph.
        """
        # The usual case, asked in every forward of every layer: before anything that costs time.
        if self.knows(name, parameters, settings):
            return cast(_Value, self._entries[name].value)
        # Not under inference mode, whose tensors cannot be saved for a later backward, nor under autocast, which would
        # run float32 sums in 16 bits.
        no_autocast = torch.autocast(parameters[0].device.type, enabled=False)
        with torch.inference_mode(False), torch.no_grad(), no_autocast:
            value = make()
        self.put(name, parameters, settings, value)
        return value

    def put(self, name: str, parameters: tuple[Tensor, ...], settings: tuple[object, ...], value: object) -> None:
        """Keep a value that was computed elsewhere, for the present state; arguments as in `get`."""
        # Fake tensors have no addresses and no values, and those of inference mode count no versions. So neither is
        # kept, except in a plan, where all are fake and the kept bytes count.
        if not any((isinstance(p, FakeTensor) and not is_planning()) or p.is_inference() for p in parameters):
            self._entries[name] = _Entry(parameters, _states(parameters), settings, value)

    def knows(self, name: str, parameters: tuple[Tensor, ...], settings: tuple[object, ...]) -> bool:
        """Whether `get` would return a value without computing it."""
        entry = self._entries.get(name)
        if entry is None or entry.settings != settings or len(entry.parameters) != len(parameters):
            return False
        # Identity first: only tensors that an entry holds are sure to have an address and a version.
        same = all(old is new for old, new in zip(entry.parameters, parameters, strict=True))
        return same and entry.states == _states(parameters)


def _states(parameters: tuple[Tensor, ...]) -> tuple[tuple[int, int], ...]:
    return tuple((_address(p), p._version) for p in parameters)


def _address(tensor: Tensor) -> int:
    # A fake tensor has no data to point at; its storage is as much its own.
    return tensor.untyped_storage()._cdata if isinstance(tensor, FakeTensor) else tensor.data_ptr()


@functools.cache
def _watch_optimizers() -> None:
    """Once per process, when the first adapted layer is made."""
    register_optimizer_step_post_hook(_raise_versions)


def _raise_versions(optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
    """Mark the parameters of an optimizer as changed, whether or not its kernels did."""
    for group in optimizer.param_groups:
        torch.autograd.graph.increment_version(list(group["params"]))
