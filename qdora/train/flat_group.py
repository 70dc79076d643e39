"""Parameters of an optimizer that are updated as one flat tensor, so that a GPU gets a few launches for all of them.

The parameters stay tensors of their own. Their averages and low bits lie behind each other in flat tensors, of which
each parameter has a view. An update joins parameters and gradients to flat float32 tensors and writes the result back.

States of at least 100,000 elements are paged, as by bitsandbytes, and flat states are nearly always that large. But
nothing waits for the GPU after each tensor: `AdapterOptimizer` waits before the host reads pages. Each parameter begins
at a whole block of the 8-bit format, or of a vectorised loop, and zeros fill up its last one: its update is the same
bit for bit whatever its neighbours.

A parameter stored in bf16 is the upper half of a float32 number whose other 16 bits, an int16, lie beside it, so that
no update is lost. The bf16 is the float32 rounded to nearest, and the layers multiply with it; the int16 is the
distance of the two bit patterns, and joining them gives the float32 back, bit for bit. To join, update in float32 and
split again trains exactly as with float32 parameters, at 4 bytes a parameter; a copy and a float32 master take 6.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Literal, NamedTuple

import bitsandbytes as bnb
import bitsandbytes.functional as F
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from qdora.errors import first_line
from qdora.files.machine import CONCURRENT_MANAGED_ACCESS, device_attribute
from qdora.memory.oom import is_out_of_memory
from qdora.quant.kernels import is_planning

OptimizerName = Literal["paged_adamw_8bit", "paged_adamw_32bit", "adamw", "paged_lion_8bit", "lion"]

MOMENTS = ("exp_avg", "exp_avg_sq", "state1", "state2")
"""Averages in a parameter's state, of the parameter's shape: torch's names, then bitsandbytes'."""
NOT_STORED = ("qmap1", "qmap2")
"""Code books of bitsandbytes' 8-bit format: constants, made again instead of stored."""
# Last part of the path of trained rows (adapter/trained_rows.py), and of the vectors of all experts of a stack.
_NO_MATRICES = ("rows", "magnitude", "bias")
# Values per block scale in bitsandbytes' 8-bit states, and the least elements of a tensor with such states.
_BLOCK, _LEAST_8BIT = 256, 4096
# As in bitsandbytes: a smaller state is not paged.
LEAST_PAGED = 100_000
_FREE_PAGES: list[Tensor] = []
# torch's fused AdamW computes what is left behind the last whole vector (16 numbers) with other rounding.
_VECTOR = 16
# Elements of a group, unless it is a single larger parameter. An update holds them twice in float32: 64 MiB.
_GROUP_ELEMENTS = 1 << 23


def split_float32_(master: Tensor, high: Tensor, low: Tensor) -> None:
    """float32, finite -> `high`, its `nearest_bfloat16`, and `low`, the int16 remainder of the bit pattern.

    The remainder is bits(master) - bits(high) in units of the last float32 bit; that of a tie is -2^15. No memory is
    allocated: `master` is contiguous and loses its values.
    """
    # After the carry of half of bf16's last bit the upper half of each number is the bf16. The lower half is the
    # remainder plus 2^15, and flipping the sign bit subtracts that.
    halves = master.view(-1).view(torch.int32).add_(0x8000).view(torch.int16).view(-1, 2)  # little-endian: lower first
    high.view(torch.int16).copy_(halves[:, 1].view(high.shape))
    low.copy_(halves[:, 0].view(low.shape)).bitwise_xor_(-0x8000)


def join_float32(high: Tensor, low: Tensor) -> Tensor:
    """(bfloat16, int16) -> the float32 that `split_float32_` was given, bit for bit, as a new tensor."""
    bits = (high.contiguous().view(torch.int16).to(torch.int32) << 16) + low.to(torch.int32)
    return bits.view(torch.float32)


class GroupKind(NamedTuple):
    """What the parameters of a group have in common."""

    is_matrix: bool
    """They get the states of the named optimizer; all others get float32 ones, never paged."""
    is_8bit: bool
    lr_ratio: float
    decays: bool
    dtype: torch.dtype


def is_matrix(key: str, shape: tuple[int, ...]) -> bool:
    """Whether a parameter gets the states of the named optimizer; all others get float32 ones."""
    return len(shape) >= 2 and key.rpartition(".")[2] not in _NO_MATRICES


def groups_of(
    shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    name: OptimizerName,
    *,
    ratios: Mapping[str, float] | None = None,
    undecayed: Collection[str] = (),
) -> list[tuple[list[str], GroupKind]]:
    """The parameters (key -> shape and dtype) that are updated together, in order.

    A group has at most _GROUP_ELEMENTS elements, or one key, one rate (key -> its `ratios`), and decays or not. Trained
    rows of an embedding count as vectors. The grouping changes no number.
    """
    groups: list[tuple[list[str], GroupKind]] = []
    newest: dict[GroupKind, list[str]] = {}
    sizes: dict[GroupKind, int] = {}
    for key, (shape, dtype) in shapes.items():
        size, matrix = math.prod(shape), is_matrix(key, shape)
        is_8bit = matrix and name.endswith("8bit") and size >= _LEAST_8BIT
        kind = GroupKind(matrix, is_8bit, (ratios or {}).get(key, 1.0), key not in undecayed, dtype)
        if kind not in newest or sizes[kind] + size > _GROUP_ELEMENTS:
            newest[kind], sizes[kind] = [], 0
            groups.append((newest[kind], kind))
        newest[kind].append(key)
        sizes[kind] += size
    return groups


class FlatGroup:
    """Parameters of one kind, their states and their low bits, which begin at 0.

    Attributes:
        parameters: Key -> parameter, bf16 or float32, all alike.
        steps: Key -> updates that it had.
        state: The flat states, by the names of the optimizer that updates them.

    Args:
        options: Those of the optimizer: betas, eps.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        kind: GroupKind,
        name: OptimizerName,
        options: Mapping[str, Any],
        *,
        weight_decay: float,
    ) -> None:
        self.parameters, self.kind, self.weight_decay = dict(parameters), kind, weight_decay
        self.steps = dict.fromkeys(self.parameters, 0)
        self._shapes = {key: parameter.shape for key, parameter in self.parameters.items()}
        self._places: dict[str, slice] = {}
        self._unit = _BLOCK if kind.is_8bit else _VECTOR
        start = 0
        for key, parameter in self.parameters.items():
            self._places[key] = slice(start, start + parameter.numel())
            start = self._whole(start + parameter.numel())
        first = next(iter(self.parameters.values()))
        self._low = None
        if kind.dtype == torch.bfloat16:
            self._low = torch.zeros(start, dtype=torch.int16, device=first.device)
        # Only its shape is read. It is empty between the updates.
        self._master = nn.Parameter(torch.empty(start, dtype=torch.float32, device=first.device))
        self.inner = _inner_optimizer(name, self._master, kind, options)
        self.state = _fresh_state(self.inner, self._master)
        self._release()

    @property
    def is_paged(self) -> bool:
        """Whether the states are in pages."""
        return any(map(_is_page, self.state.values()))

    def runs(self) -> list[list[str]]:
        """The keys with a gradient, in as few runs of neighbours with equally many updates as there are."""
        found: list[list[str]] = []
        before: int | None = None  # updates of the neighbour, if it has a gradient
        for key, parameter in self.parameters.items():
            if parameter.grad is None:
                before = None
                continue
            if self.steps[key] != before:
                found.append([])
            before = self.steps[key]
            found[-1].append(key)
        return found

    def update(self, run: Sequence[str], rate: float) -> str | None:
        """Update one of the `runs` or a part of it, all or nothing; why memory did not suffice, or None.

        Only joining allocates memory, which changes nothing yet.
        """
        try:
            self._join(run)
        except (RuntimeError, MemoryError) as error:
            self._release()
            if not is_out_of_memory(error):
                raise
            return first_line(error)
        if self.weight_decay:
            self._master.mul_(1.0 - rate * self.weight_decay)
        self.inner.param_groups[0]["lr"] = rate
        state = self.inner.state[self._master] = self._state_at(self._span(run))
        steps = self.steps[run[0]]
        if isinstance(self.inner, torch.optim.AdamW):
            state["step"].fill_(steps)
            self.inner.step()
        else:  # bitsandbytes' step waits for the GPU after each tensor
            state["step"] = steps
            self.inner.prefetch_state(self._master)  # type: ignore[attr-defined]
            self.inner.update_step(self.inner.param_groups[0], self._master, 0, 0)  # type: ignore[attr-defined]
        self._store(run)
        self._release()
        for key in run:
            self.steps[key] += 1
        # Neither bitsandbytes nor torch's fused AdamW raises the version of a parameter that it writes, and caches
        # (of row norms) go by the version.
        torch.autograd.graph.increment_version([self.parameters[key] for key in run])
        return None

    def low(self, key: str) -> Tensor | None:
        """The low bits of a parameter, int16 of its shape; None if it is stored in float32."""
        return None if self._low is None else self._low[self._places[key]].view(self._shapes[key])

    def state_of(self, key: str) -> dict[str, Any]:
        """The state of a parameter, its averages as views of its shape; "step" as optimizers store it."""
        dtype = torch.float32 if isinstance(self.inner, torch.optim.AdamW) else torch.int64
        found: dict[str, Any] = self._state_at(self._places[key]) | {"step": torch.tensor(self.steps[key], dtype=dtype)}
        for name in (name for name in MOMENTS if name in found):
            found[name] = _page_of(found[name], found[name].view(self._shapes[key]))
        return found

    def _whole(self, size: int) -> int:
        """The size rounded up to whole units."""
        return -(-size // self._unit) * self._unit

    def _span(self, run: Sequence[str]) -> slice:
        """Where a run lies, in whole units."""
        return slice(self._places[run[0]].start, self._whole(self._places[run[-1]].stop))

    def _state_at(self, span: slice) -> dict[str, Any]:
        """The part of the flat state that lies there."""
        blocks = slice(span.start // _BLOCK, -(-span.stop // _BLOCK))
        found: dict[str, Any] = {}
        for name, value in self.state.items():
            if name in MOMENTS:
                found[name] = _page_of(value, value[span])
            else:
                found[name] = value[blocks] if name.startswith("absmax") else value
        return found

    def _join(self, run: Sequence[str]) -> None:
        """The master and its gradient: of a single parameter in float32 its own memory."""
        span, parameters = self._span(run), [self.parameters[key] for key in run]
        master = self._flat([parameter.detach() for parameter in parameters], run)
        self._master.data = master if self._low is None else join_float32(master, self._low[span])
        del master
        self._master.grad = self._flat([parameter.grad for parameter in parameters if parameter.grad is not None], run)

    def _flat(self, tensors: Sequence[Tensor], run: Sequence[str]) -> Tensor:
        """The tensors of a run behind each other, each filled up to whole units with zeros; a plain one as it is."""
        if self._is_plain(run):
            return tensors[0].reshape(-1)
        gaps = [self._whole(tensor.numel()) - tensor.numel() for tensor in tensors]
        zeros = tensors[0].new_zeros(max(gaps))
        parts = [part for tensor, gap in zip(tensors, gaps, strict=True) for part in (tensor.reshape(-1), zeros[:gap])]
        return torch.cat([part for part in parts if part.numel()])

    def _is_plain(self, run: Sequence[str]) -> bool:
        """Whether a run is one parameter that lies in memory as in the flat tensors."""
        parameter = self.parameters[run[0]]
        return len(run) == 1 and parameter.numel() % self._unit == 0 and parameter.is_contiguous()

    def _store(self, run: Sequence[str]) -> None:
        """Write the master into the parameters and their low bits; that overwrites it and its gradient."""
        span, master, gradient = self._span(run), self._master.detach(), self._master.grad
        assert gradient is not None
        parameters = [self.parameters[key].detach() for key in run]
        is_joined = not self._is_plain(run)
        high = master
        if self._low is not None:
            # A joined gradient is no longer needed, so that this allocates nothing.
            high = gradient.view(torch.bfloat16)[: len(master)] if is_joined else parameters[0].view(-1)
            split_float32_(master, high, self._low[span])
        if is_joined:
            places = [self._places[key] for key in run]
            parts = [high[each.start - span.start : each.stop - span.start] for each in places]
            torch._foreach_copy_(parameters, [part.view_as(p) for part, p in zip(parts, parameters, strict=True)])

    def _release(self) -> None:
        self._master.grad = None
        self._master.data = torch.empty(0, device=self._master.device)
        self.inner.state.clear()


def _inner_optimizer(
    name: OptimizerName, master: nn.Parameter, kind: GroupKind, options: Mapping[str, Any]
) -> torch.optim.Optimizer:
    made: torch.optim.Optimizer
    if name == "lion" or ("lion" in name and not kind.is_matrix):
        made = bnb.optim.Lion32bit([master], **options, weight_decay=0.0)
    elif name == "adamw" or not kind.is_matrix:
        made = torch.optim.AdamW([master], **options, weight_decay=0.0, fused=True)
    else:
        rule = "Lion" if "lion" in name else "AdamW"
        is_paged = can_page(master) and master.numel() >= LEAST_PAGED
        paged, bits = "Paged" if is_paged else "", "8bit" if kind.is_8bit else "32bit"
        # The code books of 8-bit states are computed from values, so outside the fake mode of a plan; the plan then
        # counts tensors of their size.
        with _disable_current_modes() if is_planning() else nullcontext():
            made = getattr(bnb.optim, f"{paged}{rule}{bits}")([master], **options, weight_decay=0.0)
        if is_paged:
            made.get_state_buffer = _page_like  # type: ignore[attr-defined]
        if is_planning():
            made.name2qmap = {key: torch.empty(256) for key in made.name2qmap}  # type: ignore[attr-defined]
    return made


def can_page(parameter: Tensor) -> bool:
    """Whether the states of a parameter can be paged: bitsandbytes ends the process where they cannot.

    Assumed where no driver answers: a plan on a machine without a GPU.
    """
    device = parameter.device
    return device.type == "cuda" and device_attribute(CONCURRENT_MANAGED_ACCESS, device.index or 0) != 0


def _page_like(master: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Zeros of the shape of `master` in a page: host memory that moves to the GPU and back.

    bitsandbytes never frees a page. So those of this process are used again, once no tensor lies in them any more.
    """
    size = master.numel() * dtype.itemsize
    fitting = [(page.nbytes, place) for place, page in enumerate(_FREE_PAGES) if page.nbytes >= size]
    if fitting:
        page = _FREE_PAGES.pop(min(fitting)[1])
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # the last kernels of its owner may still write it
    else:
        page = F.get_paged(size, dtype=torch.uint8, device=master.device)
    memory = page.numpy()
    weakref.finalize(memory, _FREE_PAGES.append, page).atexit = False
    state: Tensor = _page_of(page, torch.from_numpy(memory)[:size].view(dtype).view(master.shape).zero_())
    return state


def _fresh_state(inner: torch.optim.Optimizer, master: nn.Parameter) -> dict[str, Any]:
    """The state that a first step would make."""
    if isinstance(inner, torch.optim.AdamW):
        zeros = torch.zeros_like(master)
        step = torch.zeros((), dtype=torch.float32, device=master.device)
        return {"step": step, "exp_avg": zeros, "exp_avg_sq": zeros.clone()}
    inner.init_state(inner.param_groups[0], master, 0, 0)  # type: ignore[attr-defined]
    state: dict[str, Any] = inner.state[master]
    if not is_planning():
        for number in (name[-1] for name in state if name.startswith("qmap")):
            # A fresh state has the code 0, which means -1 times a block scale of 0. A scale that is loaded is not 0,
            # and the zeros behind a parameter share it.
            state[f"state{number}"].fill_(int(state[f"qmap{number}"].abs().argmin()))
    return state


def _is_page(value: Any) -> bool:
    return getattr(value, "is_paged", False)


def _page_of(page: Any, part: Any) -> Any:
    """A part of a state; marked as paged, as bitsandbytes does it, if the state is."""
    if _is_page(page):
        part.is_paged, part.page_deviceid = True, page.page_deviceid
    return part


def widened_state(state: Mapping[str, Any], device: torch.device) -> dict[str, Tensor]:
    """A parameter's averages in float32, as new tensors on `device`."""
    wide: dict[str, Tensor] = {}
    for name in (name for name in MOMENTS if name in state):
        value = state[name]
        if value.dtype == torch.float32:
            wide[name] = value.to(device, copy=True)
            continue
        number = name.removeprefix("state")
        absmax, code = state[f"absmax{number}"], state[f"qmap{number}"]
        found = F.dequantize_blockwise(value.to(absmax.device), absmax=absmax, code=code, blocksize=_BLOCK)
        wide[name] = found.view_as(value).to(device)
    return wide


def fill_state_(state: Mapping[str, Any], values: Mapping[str, Tensor]) -> None:
    """Write the averages of a `widened_state`, or the tensors of another state, in the format of this state."""
    for name, value in values.items():
        place = state[name]
        if place.dtype == torch.uint8 and value.dtype != torch.uint8:
            number = name.removeprefix("state")
            codes, quantized = F.quantize_blockwise(value.contiguous(), code=state[f"qmap{number}"], blocksize=_BLOCK)
            place.copy_(codes.view_as(place))
            state[f"absmax{number}"].copy_(quantized.absmax)
        else:
            place.copy_(value)
