"""AdamW and Lion for adapters stored in bf16, with no update lost to rounding.

The 16 bits that bf16 drops from a float32 parameter are kept in an int16 beside it (ops/split_float.py). Each step
joins the two to float32, updates there and splits again, so training runs as with float32 parameters while the layers
read bf16. Gradients arrive and accumulate in float32 (`Tensor.grad_dtype`).

The averages are float32 in torch's and bitsandbytes' 32-bit states, and codes with block scales in its 8-bit states. A
paged state is a CPU tensor over memory that a GPU can read; its block scales are on the GPU.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import bitsandbytes as bnb
import bitsandbytes.functional as F
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from qdora.errors import RunFailure, first_line
from qdora.ops.planned_device import is_planning
from qdora.ops.split_float import join_float32, split_float32_
from qdora.train.out_of_memory import free_memory, is_out_of_memory

OptimizerName = Literal["paged_adamw_8bit", "paged_adamw_32bit", "adamw", "paged_lion_8bit", "lion"]

MOMENTS = ("exp_avg", "exp_avg_sq", "state1", "state2")
"""Averages in a parameter's state, of the parameter's shape: torch's names, then bitsandbytes'."""
# Averages of the gradient; the other two are of its square.
_FIRST_MOMENTS = ("exp_avg", "state1")
# Code books of bitsandbytes' 8-bit format: constants, made again instead of stored.
_NOT_STORED = ("qmap1", "qmap2")
# Last part of the path of trained rows (nn/trained_rows.py), and of the vectors of all experts of a stack together.
_NO_MATRICES = ("rows", "magnitude", "bias")
# Values per block scale in bitsandbytes' 8-bit states.
_BLOCK = 256
# Parameters that are joined to float32 at the same time: 64 MiB of them (or one, if that is larger).
_GROUP_ELEMENTS = 1 << 24

logger = logging.getLogger("qdora")


@dataclass(frozen=True)
class _Group:
    """Parameters that are updated together: all matrices or all vectors, at one rate."""

    keys: list[str]
    inner: torch.optim.Optimizer
    lr_ratio: float
    weight_decay: float


class UpdateOutOfMemory(RuntimeError):
    """The update of the parameters `left`, out of `num_updated`, did not fit into memory; the others are updated."""

    def __init__(self, left: list[str], num_updated: int, reason: str) -> None:
        which = f"{len(left)} of {num_updated} trainable tensors, e.g. {left[0]}"
        super().__init__(f"out of memory in the update of {which} ({reason.rstrip('.')})")
        self.left, self.num_updated = left, num_updated


class AdapterOptimizer:
    """AdamW or Lion over named parameters, stored in bf16 or float32.

    AdamW: arXiv 1711.05101, algorithm 2. Lion: arXiv 2302.06675, algorithm 2 (sec. 5 there: its rate is 3 to 10 times
    smaller than AdamW's, its decay that much larger). The decay is decoupled, p <- (1 - lr * weight_decay) p before the
    update, and applied here: bitsandbytes' kernels differ between devices (its issues 1992 and 2010).

    Matrices use the named optimizer. Vectors (magnitudes, biases, norms) use the same one with float32 states, never
    paged, without weight decay: bitsandbytes would give vectors of 4,096 elements or more 8-bit states, which are too
    coarse for a magnitude. So do trained rows of an embedding, which are few.

    Args:
        parameters: Path -> trainable parameter, bf16 or float32.
        name: paged_adamw_8bit, paged_adamw_32bit, paged_lion_8bit (bitsandbytes; paged on CUDA, the same arithmetic
            unpaged elsewhere), lion (bitsandbytes, 32-bit) or adamw (torch, fused).
        lr_ratios: Last part of a path -> its rate in units of lr, such as {"lora_B": 16.0} (LoRA+, arXiv 2402.12354);
            1 for all others.
        undecayed: Paths of matrices without weight decay, such as embeddings: a row whose token does not occur would
            shrink.
        betas: Decay of the averages; None: 0.9, 0.999 for AdamW and 0.9, 0.99 for Lion, as in their papers.
    Raises:
        ValueError: A parameter has another dtype, or a ratio belongs to no parameter.
        RunFailure: Memory does not suffice for the states. All are made here, so that a later update needs no more
            memory than a float32 copy of some parameters, and parameters that never get a gradient have a state, too.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        *,
        name: OptimizerName = "adamw",
        lr: float = 2e-4,
        lr_ratios: Mapping[str, float] | None = None,
        undecayed: Collection[str] = (),
        betas: tuple[float, float] | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        self.parameters = dict(parameters)
        self._masters: dict[str, nn.Parameter] = {}
        self._residuals: dict[str, Tensor] = {}
        for key, parameter in self.parameters.items():
            if parameter.dtype == torch.bfloat16:
                parameter.grad_dtype = torch.float32
                self._residuals[key] = torch.zeros_like(parameter, dtype=torch.int16)
                self._masters[key] = nn.Parameter(torch.empty(0, device=parameter.device))
            elif parameter.dtype == torch.float32:
                self._masters[key] = parameter
            else:
                raise ValueError(f"{key} is stored in {parameter.dtype}, must be bfloat16 or float32.")
        options: dict[str, Any] = {"lr": lr, "betas": betas or ((0.9, 0.99) if "lion" in name else (0.9, 0.999))}
        if "lion" not in name:
            options["eps"] = eps
        self._groups: list[_Group] = []
        rates = _rates(self.parameters, lr_ratios or {})
        shapes = {key: tuple(parameter.shape) for key, parameter in self.parameters.items()}
        self.undecayed = frozenset(undecayed)
        for keys, are_matrices in groups_of(shapes, rates, self.undecayed):
            inner = _inner_optimizer(name, [self._masters[key] for key in keys], are_matrices, options)
            decays = are_matrices and keys[0] not in self.undecayed
            self._groups.append(_Group(keys, inner, rates[keys[0]], weight_decay if decays else 0.0))
        self._make_states(name)
        if name.startswith("paged") and not is_planning() and not any(_can_page(p) for p in self.parameters.values()):
            logger.warning("%s: no CUDA here, so its states are not paged; the arithmetic is the same.", name)

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One update; parameters without a gradient stay. Memory: 2^24 float32 elements, or the largest parameter.

        A group that does not fit into memory is updated again one parameter after the other.

        Raises:
            UpdateOutOfMemory: Some parameters do not fit. They and their states stay; all others are updated.
        """
        left: list[str] = []
        reason = ""
        for group in self._groups:
            keys = [key for key in group.keys if self.parameters[key].grad is not None]
            if keys and self._update(group, keys, lr) is not None:
                free_memory()
                for key in keys:
                    shortage = self._update(group, [key], lr)
                    if shortage is not None:
                        left, reason = [*left, key], shortage
        if left:
            num_updated = sum(parameter.grad is not None for parameter in self.parameters.values())
            raise UpdateOutOfMemory(left, num_updated, reason)

    def _update(self, group: _Group, keys: list[str], lr: float) -> str | None:
        """Update some parameters of a group, all or none; returns why memory did not suffice, or None.

        Only joining allocates memory, which changes nothing yet.
        """
        try:
            self._join(keys)
        except (RuntimeError, MemoryError) as error:
            for key in keys:
                self._release(key)
            if not is_out_of_memory(error):
                raise
            return first_line(error)
        rate = lr * group.lr_ratio
        if group.weight_decay:
            for key in keys:
                self._masters[key].mul_(1.0 - rate * group.weight_decay)
        for inner_group in group.inner.param_groups:
            inner_group["lr"] = rate
        with self._without_gradients(set(group.keys).difference(keys)):
            group.inner.step()
        for key in keys:
            if key in self._residuals:
                self._store(key, self._masters[key].detach())
                self._release(key)
        # Neither bitsandbytes nor torch's fused AdamW raises the version of a parameter that it writes, and caches
        # (of row norms) go by the version.
        torch.autograd.graph.increment_version([self.parameters[key] for key in keys])
        return None

    @contextmanager
    def _without_gradients(self, keys: Iterable[str]) -> Iterator[None]:
        """Hide the gradients of these parameters in the block: optimizers leave them and their states as they are."""
        hidden = {key: self._masters[key].grad for key in keys}
        for key in hidden:
            self._masters[key].grad = None
        try:
            yield
        finally:
            for key, gradient in hidden.items():
                self._masters[key].grad = gradient

    @torch.no_grad()
    def _make_states(self, name: str) -> None:
        """The states that a first step would make, in all groups."""
        try:
            for group in self._groups:
                for index, key in enumerate(group.keys):
                    self._join([key])
                    _fresh_state(group.inner, self._masters[key], index)
                    self._release(key)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            number = sum(parameter.numel() for parameter in self.parameters.values())
            raise RunFailure(
                f"out of memory while making the states of {name} for {number:,} parameters ({first_line(error)}). "
                "Fix: lower adapter.rank, or choose train.optimizer paged_adamw_8bit."
            ) from error

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for parameter in self.parameters.values():
            parameter.grad = None

    @torch.no_grad()
    def gradient_norm(self) -> Tensor:
        """Euclidean norm of all gradients together, a float32 scalar on their device (0 if there are none)."""
        grads = [parameter.grad for parameter in self.parameters.values() if parameter.grad is not None]
        # A few kernels on CUDA instead of one for each parameter.
        return torch.nn.utils.get_total_norm(grads)

    @torch.no_grad()
    def scale_gradients_(self, factor: Tensor | float) -> None:
        """Multiply every gradient by `factor`."""
        for parameter in self.parameters.values():
            if parameter.grad is not None:
                parameter.grad.mul_(factor)

    def master(self, key: str) -> Tensor:
        """The full float32 value of a parameter, as a new tensor."""
        parameter = self.parameters[key].detach()
        return join_float32(parameter, self._residuals[key]) if key in self._residuals else parameter.clone()

    @torch.no_grad()
    def cut_(self, key: str, kept: Tensor, dim: int) -> None:
        """Cut the low bits and states of a parameter that was itself cut already, to the indices `kept` of `dim`.

        8-bit states are quantised again.
        """
        group = self._group_of(key)
        index, master = group.keys.index(key), self._masters[key]
        before = group.inner.state.pop(master)
        wide = widened_state(before, master.device)
        if key in self._residuals:
            self._residuals[key] = self._residuals[key].index_select(dim, kept)
        self._join([key])
        cut = {name: each.index_select(dim, kept) if name in MOMENTS else each for name, each in wide.items()}
        _fill_state_(_shrunk_state(group.inner, master, index, before), cut)
        self._release(key)

    @torch.no_grad()
    def fold_(self, key: str, factor: Tensor) -> None:
        """Multiply a parameter, as the layer reads it, by `factor`, which is broadcast and nowhere 0.

        Its gradient is then the old one divided by the factor, so the averages are divided by it, too (by its square,
        for squares).
        """
        self._store(key, self.parameters[key].detach().float() * factor)
        master = self._masters[key]
        state = self._group_of(key).inner.state[master]
        powers = {name: 1 if name in _FIRST_MOMENTS else 2 for name in MOMENTS}
        wide = widened_state(state, master.device)
        _fill_state_(state, {n: each / factor ** powers[n] if n in powers else each for n, each in wide.items()})

    def state_tensors(self) -> dict[str, Tensor]:
        """All tensors that a resume needs beside the parameters: 'residual/<path>' and 'state/<path>/<name>'."""
        tensors = {f"residual/{key}": residual for key, residual in self._residuals.items()}
        for group in self._groups:
            for key in group.keys:
                for name, value in group.inner.state[self._masters[key]].items():
                    if name not in _NOT_STORED:
                        stored = value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.int64)
                        tensors[f"state/{key}/{name}"] = stored.detach()
        return tensors

    @torch.no_grad()
    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore `state_tensors`, by copying into states that bitsandbytes has made itself, so that they stay paged.

        Raises:
            ValueError: A tensor is missing, unknown or of another shape or dtype; names the first five.
        """
        places: dict[str, tuple[dict[str, Any], str]] = {f"residual/{k}": (self._residuals, k) for k in self._residuals}
        for group in self._groups:
            for key in group.keys:
                state = group.inner.state[self._masters[key]]
                places |= {f"state/{key}/{name}": (state, name) for name in state if name not in _NOT_STORED}
        faults = [f"{name} is unknown" for name in tensors.keys() - places.keys()]
        for name, (state, key) in places.items():
            place, tensor = state[key], tensors.get(name)
            if tensor is None:
                faults.append(f"{name} is missing")
            elif isinstance(place, Tensor) and (place.shape, place.dtype) != (tensor.shape, tensor.dtype):
                got, wanted = (f"{tuple(t.shape)} {t.dtype}".replace("torch.", "") for t in (tensor, place))
                faults.append(f"{name} is {got}, not {wanted}")
        if faults:
            raise ValueError("optimizer state does not fit these parameters: " + "; ".join(sorted(faults)[:5]))
        for name, (state, key) in places.items():
            if isinstance(state[key], Tensor):
                state[key].copy_(tensors[name])
            else:
                state[key] = int(tensors[name])

    def _group_of(self, key: str) -> _Group:
        return next(group for group in self._groups if key in group.keys)

    def _join(self, keys: Iterable[str]) -> None:
        for key in keys:
            if key in self._residuals:
                parameter, master = self.parameters[key], self._masters[key]
                master.data = join_float32(parameter.detach(), self._residuals[key])
                master.grad = parameter.grad

    def _store(self, key: str, value: Tensor) -> None:
        """Write a float32 value into the parameter and its low bits, if it has some; that overwrites `value`."""
        if key in self._residuals:
            split_float32_(value, self.parameters[key].detach(), self._residuals[key])
        else:
            self.parameters[key].copy_(value)

    def _release(self, key: str) -> None:
        if key in self._residuals:
            master = self._masters[key]
            master.grad = None
            master.data = torch.empty(0, device=master.device)


def _rates(keys: Iterable[str], lr_ratios: Mapping[str, float]) -> dict[str, float]:
    """Key -> its rate in units of lr."""
    parts = {key: key.rpartition(".")[2] for key in keys}
    unknown = [part for part in lr_ratios if part not in parts.values()]
    if unknown:
        known = ", ".join(sorted(set(parts.values())))
        raise ValueError(f"lr_ratios: {', '.join(unknown)} names no parameter, must be one of {known}.")
    return {key: lr_ratios.get(part, 1.0) for key, part in parts.items()}


def groups_of(
    shapes: Mapping[str, tuple[int, ...]],
    ratios: Mapping[str, float] | None = None,
    undecayed: Collection[str] = (),
) -> list[tuple[list[str], bool]]:
    """(keys, whether they are matrices) of the parameters (key -> shape) that are updated together, in order.

    A group has at most _GROUP_ELEMENTS elements, or one key, one rate (key -> its `ratios`), and decays or not. Trained
    rows of an embedding count as vectors. The grouping changes no number, since every parameter is updated by itself.
    """
    groups: list[tuple[list[str], bool]] = []
    newest: dict[tuple[bool, float, bool], list[str]] = {}
    sizes: dict[tuple[bool, float, bool], int] = {}
    for key, shape in shapes.items():
        kind, size = (is_matrix(key, shape), (ratios or {}).get(key, 1.0), key not in undecayed), math.prod(shape)
        if kind not in newest or sizes[kind] + size > _GROUP_ELEMENTS:
            newest[kind], sizes[kind] = [], 0
            groups.append((newest[kind], kind[0]))
        newest[kind].append(key)
        sizes[kind] += size
    return groups


def is_matrix(key: str, shape: tuple[int, ...]) -> bool:
    """Whether a parameter gets the states of the named optimizer; all others get float32 ones."""
    return len(shape) >= 2 and key.rpartition(".")[2] not in _NO_MATRICES


def _can_page(parameter: Tensor) -> bool:
    return parameter.device.type == "cuda"


def _inner_optimizer(
    name: OptimizerName, masters: list[nn.Parameter], is_matrix: bool, options: dict[str, Any]
) -> torch.optim.Optimizer:
    made: torch.optim.Optimizer
    if name == "lion" or ("lion" in name and not is_matrix):
        made = bnb.optim.Lion32bit(masters, **options, weight_decay=0.0)
    elif name == "adamw" or not is_matrix:
        made = torch.optim.AdamW(masters, **options, weight_decay=0.0, fused=True)
    else:
        paged, plain = {
            "paged_adamw_8bit": (bnb.optim.PagedAdamW8bit, bnb.optim.AdamW8bit),
            "paged_adamw_32bit": (bnb.optim.PagedAdamW32bit, bnb.optim.AdamW32bit),
            "paged_lion_8bit": (bnb.optim.PagedLion8bit, bnb.optim.Lion8bit),
        }[name]
        kind = paged if _can_page(masters[0]) else plain
        # The code books of 8-bit states are computed from values, so outside the fake mode of a plan; the plan then
        # counts tensors of their size.
        with _disable_current_modes() if is_planning() else nullcontext():
            made = kind(masters, **options, weight_decay=0.0)
        if is_planning():
            made.name2qmap = {key: torch.empty(256) for key in made.name2qmap}  # type: ignore[attr-defined]
    return made


def _fresh_state(inner: torch.optim.Optimizer, master: nn.Parameter, index: int) -> dict[str, Any]:
    """The state that a first step would make; bitsandbytes makes its own, which may be paged."""
    if isinstance(inner, torch.optim.AdamW):
        zeros = torch.zeros_like(master)
        step = torch.zeros((), dtype=torch.float32, device=master.device)
        inner.state[master] = {"step": step, "exp_avg": zeros, "exp_avg_sq": zeros.clone()}
    else:
        inner.init_state(inner.param_groups[0], master, 0, index)  # type: ignore[attr-defined]
    state: dict[str, Any] = inner.state[master]
    return state


def _shrunk_state(
    inner: torch.optim.Optimizer, master: nn.Parameter, index: int, before: Mapping[str, Any]
) -> dict[str, Any]:
    """`_fresh_state` of a parameter that shrank, in the pages of its state `before`, if that has any."""
    pages = {name: value for name, value in before.items() if getattr(value, "is_paged", False)}
    if not pages:
        return _fresh_state(inner, master, index)
    inner.is_paged = False  # type: ignore[attr-defined]  # else bitsandbytes takes new pages, which it never frees
    try:
        state = _fresh_state(inner, master, index)
    finally:
        inner.is_paged = True  # type: ignore[attr-defined]
    for name, page in pages.items():
        like = state[name]
        found: Any = torch.empty(0, dtype=like.dtype).set_(page.untyped_storage(), 0, like.shape, like.stride())
        found.is_paged, found.page_deviceid = True, page.page_deviceid
        state[name] = found
    return state


def widened_state(state: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """A parameter's averages in float32, as new tensors on `device`, and its step count."""
    wide: dict[str, Any] = {}
    for name, value in state.items():
        if name == "step":
            wide[name] = value
        elif name in MOMENTS:
            if value.dtype == torch.float32:
                wide[name] = value.to(device, copy=True)
                continue
            number = name.removeprefix("state")
            absmax, code = state[f"absmax{number}"], state[f"qmap{number}"]
            found = F.dequantize_blockwise(value.to(absmax.device), absmax=absmax, code=code, blocksize=_BLOCK)
            wide[name] = found.view_as(value).to(device)
    return wide


def _fill_state_(state: dict[str, Any], wide: Mapping[str, Any]) -> None:
    """Write the numbers of a `widened_state`, or a part of them, into an existing state, in the state's own format."""
    for name, value in wide.items():
        place = state[name]
        if not isinstance(place, Tensor):
            state[name] = int(value)
        elif place.dtype == torch.uint8:
            number = name.removeprefix("state")
            codes, quantized = F.quantize_blockwise(value.contiguous(), code=state[f"qmap{number}"], blocksize=_BLOCK)
            place.copy_(codes.view_as(place))
            state[f"absmax{number}"].copy_(quantized.absmax)
        else:
            place.copy_(value)
