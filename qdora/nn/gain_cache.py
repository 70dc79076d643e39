"""What follows from the parameters of a layer, computed once for each state of them: row norm and gain of DoRA, and in
evaluation the factors as the products take them.

A, B, gates and m change once per optimizer step. The micro-batches of a step and the recompute of a checkpoint share
one norm; in evaluation one serves until the parameters change.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from qdora.ops.dora import Gain, gain
from qdora.ops.packed import PackedWeight
from qdora.ops.planned_device import is_planning


class NormSettings(NamedTuple):
    """What the norm depends on beside tensors: the dtype of W A^T, and s."""

    dtype: torch.dtype
    scaling: float


@dataclass
class _State:
    """`parameters` as they were; they are held, so that no other tensor can take their identity."""

    parameters: tuple[Tensor, ...]
    states: tuple[tuple[int, int], ...]
    settings: NormSettings


@dataclass
class _Entry(_State):
    """Values of one state."""

    norm: Tensor
    gain: Gain


class Products(NamedTuple):
    """What evaluation multiplies with.

    Attributes:
        a: A, (rank, in), in the dtype of the products.
        scaled_b: diag(s g) B, (out, rank), likewise.
        gain: g, (out,), to be laid on the base's rows; None for LoRA, and where `weight` has it.
        weight: diag(g) W with block scales of its own, where the layer keeps them; None: the base as it is.
    """

    a: Tensor
    scaled_b: Tensor
    gain: Tensor | None
    weight: PackedWeight | None = None


@dataclass
class _Products(_State):
    """What evaluation multiplies with in one state."""

    products: Products


class GainCache:
    """Remembers the norm and gain for lora_A, lora_B (and a gate), magnitude as they are.

    A state is known by the identity and address of these tensors and by torch's version counters, which every
    in-place change raises: a step of an optimizer, `load_state_dict`, `copy_`. bitsandbytes' kernels and writes through
    `.data` raise none; so after the step of any `torch.optim.Optimizer`, bitsandbytes' included, the counters of its
    parameters are raised here. Whoever writes through `.data` outside an optimizer calls `clear` (a layer's
    `parameters_changed`); `model.train()` and `model.eval()` call it, too.
    """

    def __init__(self) -> None:
        _watch_optimizers()
        self._entry: _Entry | None = None
        self._settings: NormSettings | None = None

    def __reduce__(self) -> tuple[type[GainCache], tuple[()]]:
        """A copy starts empty: its tensors count their versions anew and could meet an old count by chance."""
        return GainCache, ()

    def clear(self) -> None:
        """Forget; the next call computes anew."""
        self._entry = None

    def get(
        self,
        factors: tuple[Tensor, ...],
        magnitude: Tensor,
        settings: NormSettings,
        row_norm: Callable[[], Tensor],
    ) -> Gain:
        """The gain of the present state.

        Args:
            factors: The parameters of the norm: lora_A, lora_B and a gate where there is one.
            magnitude: m.
            settings: Others make another entry.
            row_norm: Computes ||W + s B A||_row, (out,).
        Returns:
            Detached tensors, not to be written to.
        """
        parameters = (*factors, magnitude)
        entry = self._entry
        # The usual case, asked in every forward of every layer: before anything that costs time.
        if entry is not None and entry.settings == settings and _same(entry, parameters):
            return entry.gain
        # Not under inference mode, whose tensors cannot be saved for a later backward, nor under autocast, which would
        # run float32 sums in 16 bits.
        no_autocast = torch.autocast(magnitude.device.type, enabled=False)
        with torch.inference_mode(False), torch.no_grad(), no_autocast:
            # Fake tensors have no addresses and no values, those of inference mode count no versions: never kept, but
            # in a plan, where all are fake and what is kept counts.
            if not _can_be_kept(parameters):
                return gain(magnitude, row_norm())
            known = entry is not None and entry.settings == settings and _same(entry, factors)
            norm = entry.norm if entry is not None and known else row_norm()
            self._entry = _Entry(parameters, _states(parameters), settings, norm, gain(magnitude, norm))
            self._settings = settings
            return self._entry.gain

    def wanted(self, factors: tuple[Tensor, ...], scaling: float) -> torch.dtype | None:
        """The dtype of the norm that the next `get` will compute if it asks as the last one did; None if none."""
        entry = self._entry
        if entry is not None and entry.settings.scaling == scaling and _same(entry, factors):
            return None
        return None if self._settings is None else self._settings.dtype


class ProductCache:
    """Remembers what evaluation multiplies with, for lora_A, lora_B, a gate and the magnitude as they are.

    One token's pass through a layer is so short that making it anew for each of them shows. A state is known as in
    `GainCache`.
    """

    def __init__(self) -> None:
        _watch_optimizers()
        self._entry: _Products | None = None

    def __reduce__(self) -> tuple[type[ProductCache], tuple[()]]:
        """As of `GainCache`."""
        return ProductCache, ()

    def clear(self) -> None:
        """Forget; the next call makes it anew."""
        self._entry = None

    def get(self, parameters: tuple[Tensor, ...], settings: NormSettings, make: Callable[[], Products]) -> Products:
        """The products of the present state, not to be written to; `make` makes them."""
        entry = self._entry
        if entry is not None and entry.settings == settings and _same(entry, parameters):
            return entry.products
        with torch.inference_mode(False), torch.no_grad():
            made = make()
            if _can_be_kept(parameters):
                self._entry = _Products(parameters, _states(parameters), settings, made)
        return made


def _can_be_kept(parameters: tuple[Tensor, ...]) -> bool:
    return not any((isinstance(p, FakeTensor) and not is_planning()) or p.is_inference() for p in parameters)


def _states(parameters: tuple[Tensor, ...]) -> tuple[tuple[int, int], ...]:
    return tuple((_address(p), p._version) for p in parameters)


def _address(tensor: Tensor) -> int:
    # A fake tensor has no data to point at; its storage is as much its own.
    return tensor.untyped_storage()._cdata if isinstance(tensor, FakeTensor) else tensor.data_ptr()


def _same(entry: _State, parameters: tuple[Tensor, ...]) -> bool:
    """Whether `parameters` are the entry's first ones, unchanged."""
    # Identity first: a tensor that an entry holds has an address and a version, another one need not have them.
    first = len(parameters) >= len(entry.parameters) - 1  # all of the norm's, at the least
    held = first and all(old is new for old, new in zip(entry.parameters, parameters, strict=False))
    return held and entry.states[: len(parameters)] == _states(parameters)


@functools.cache
def _watch_optimizers() -> None:
    """Once per process, when the first DoRA layer is made."""
    register_optimizer_step_post_hook(_raise_versions)


def _raise_versions(optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
    """Say that the parameters of an optimizer have changed, whether or not its kernels said so."""
    for group in optimizer.param_groups:
        torch.autograd.graph.increment_version(list(group["params"]))
