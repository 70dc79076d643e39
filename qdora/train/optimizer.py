"""AdamW and Lion for adapters stored in bf16, with no update lost to rounding.

A parameter stored in bf16 is the upper half of a float32 number whose other 16 bits, an int16, lie beside it: the
distance of the two bit patterns. To join, update in float32 and split again trains exactly as with float32 parameters,
at 4 bytes a parameter; a copy and a float32 master take 6. Gradients accumulate in float32 (`Tensor.grad_dtype`).

Parameters are updated together, so that a GPU gets a few launches for all of them. They stay tensors of their own;
their averages and low bits lie in flat tensors, of which each has a view. An update joins parameters and gradients to
flat float32 tensors and writes the result back. Each parameter begins at a whole block of the 8-bit format, or of a
vectorised loop, filled up with zeros: its update is the same bit for bit whatever its neighbours.

A paged state is a CPU tensor over memory that a GPU can read. Unlike in bitsandbytes nothing waits for the GPU after
each tensor: `AdapterOptimizer` waits before the host reads pages.
"""

from __future__ import annotations

import gc
import itertools
import logging
import math
import weakref
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import bitsandbytes as bnb
import bitsandbytes.functional as F
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from transformers import PreTrainedModel

from qdora.files.machine import CONCURRENT_MANAGED_ACCESS, device_attribute
from qdora.model.build_model import describe_adapters
from qdora.model.inject import adapter_parameters
from qdora.model.tokens import trained_parameters
from qdora.quant.kernels import is_planning
from qdora.recipe.settings import OptimizerName, Recipe, has_eps

# Averages in a parameter's state: torch's names, then bitsandbytes', and the power of the gradient that each is of.
MOMENTS = {"exp_avg": 1, "exp_avg_sq": 2, "state1": 1, "state2": 2}
# Code books of bitsandbytes' 8-bit format: constants, made again instead of stored.
_NOT_STORED = ("qmap1", "qmap2")
# Last part of the path of trained rows (adapter/rows.py), and of the vectors of all experts of a stack.
_NO_MATRICES = ("rows", "magnitude", "bias")
# Values per block scale in bitsandbytes' 8-bit states, and the least elements of a tensor with such states.
_BLOCK, _LEAST_8BIT = 256, 4096
# As in bitsandbytes: a smaller state is not paged.
_LEAST_PAGED = 100_000
_FREE_PAGES: list[Tensor] = []
# torch's fused AdamW computes what is left behind the last whole vector (16 numbers) with other rounding.
_VECTOR = 16
# Elements of a group, unless it is a single larger parameter. An update holds them twice in float32: 64 MiB.
_GROUP_ELEMENTS = 1 << 23

logger = logging.getLogger("qdora")


def split_float32_(master: Tensor, high: Tensor, low: Tensor) -> None:
    """float32, finite -> `high`, its `nearest_bfloat16`, and `low`, bits(master) - bits(high), int16. `master` is
    contiguous and loses its values."""
    # After the carry of half of bf16's last bit the upper half of each number is the bf16. The lower half is the
    # remainder plus 2^15, and flipping the sign bit subtracts that.
    # Little-endian: lower first
    halves = master.view(-1).view(torch.int32).add_(0x8000).view(torch.int16).view(-1, 2)
    high.view(torch.int16).copy_(halves[:, 1].view(high.shape))
    low.copy_(halves[:, 0].view(low.shape)).bitwise_xor_(-0x8000)


def join_float32(high: Tensor, low: Tensor) -> Tensor:
    """(bfloat16, int16) -> the float32 that `split_float32_` was given, bit for bit, as a new tensor."""
    bits = (high.contiguous().view(torch.int16).to(torch.int32) << 16) + low.to(torch.int32)
    return bits.view(torch.float32)


class GroupKind(NamedTuple):
    """What the parameters of a group have in common."""

    is_matrix: bool  # these get the states of the named optimizer; all others get float32 ones, never paged
    is_8bit: bool
    lr_ratio: float
    decays: bool
    dtype: torch.dtype


def groups_of(
    shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    name: OptimizerName,
    *,
    ratios: Mapping[str, float] | None = None,
    undecayed: Collection[str] = (),
) -> list[tuple[list[str], GroupKind]]:
    """The parameters (key -> shape and dtype) that are updated together: one kind, at most _GROUP_ELEMENTS elements.
    `ratios`: last part of a path -> its rate in units of lr."""
    groups: list[tuple[list[str], GroupKind]] = []
    newest: dict[GroupKind, list[str]] = {}
    sizes: dict[GroupKind, int] = {}
    for key, (shape, dtype) in shapes.items():
        size, part = math.prod(shape), key.rpartition(".")[2]
        is_matrix = len(shape) >= 2 and part not in _NO_MATRICES
        is_8bit = is_matrix and name.endswith("8bit") and size >= _LEAST_8BIT
        kind = GroupKind(is_matrix, is_8bit, (ratios or {}).get(part, 1.0), key not in undecayed, dtype)
        if kind not in newest or sizes[kind] + size > _GROUP_ELEMENTS:
            newest[kind], sizes[kind] = [], 0
            groups.append((newest[kind], kind))
        newest[kind].append(key)
        sizes[kind] += size
    return groups


class FlatGroup:
    """Parameters of one kind (key -> parameter, bf16 or float32), their flat states and low bits, which begin at 0."""

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
        self.steps = dict.fromkeys(self.parameters, 0)  # updates that each had
        self._shapes = {key: parameter.shape for key, parameter in self.parameters.items()}
        self._spans: dict[str, slice] = {}
        self._unit = _BLOCK if kind.is_8bit else _VECTOR
        start = 0
        for key, parameter in self.parameters.items():
            self._spans[key] = slice(start, start + parameter.numel())
            start = self._whole(start + parameter.numel())
        device = next(iter(self.parameters.values())).device
        self._low = (
            torch.zeros(start, dtype=torch.int16, device=device) if kind.dtype == torch.bfloat16 else None
        )
        # Only its shape is read. It is empty between the updates.
        self._master = nn.Parameter(torch.empty(start, dtype=torch.float32, device=device))
        self.inner = _inner_optimizer(name, self._master, kind, options)
        self.state = _fresh_state(self.inner, self._master)
        self._release()

    def runs(self) -> list[list[str]]:
        """The keys with a gradient, in as few runs of neighbours with equally many updates as there are."""

        def num_updates(key: str) -> int | None:
            return None if self.parameters[key].grad is None else self.steps[key]

        groups = itertools.groupby(self.parameters, num_updates)
        return [list(keys) for steps, keys in groups if steps is not None]

    def update(self, run: Sequence[str], rate: float) -> None:
        """Update one of the `runs`."""
        span, parameters = self._span(run), [self.parameters[key].detach() for key in run]
        gradients = [self.parameters[key].grad for key in run]
        values = self._flat(parameters, run)
        self._master.data = values if self._low is None else join_float32(values, self._low[span])
        del values
        gradient = self._flat([each for each in gradients if each is not None], run)
        self._master.grad = gradient
        if self.weight_decay:
            self._master.mul_(1.0 - rate * self.weight_decay)
        self.inner.param_groups[0]["lr"] = rate
        state = self.inner.state[self._master] = self._state_at(span)
        if isinstance(self.inner, torch.optim.AdamW):
            state["step"].fill_(self.steps[run[0]])
            self.inner.step()
        else:  # bitsandbytes' step waits for the GPU after each tensor
            state["step"] = self.steps[run[0]]
            self.inner.prefetch_state(self._master)
            self.inner.update_step(self.inner.param_groups[0], self._master, 0, 0)
        # What follows overwrites the master and its gradient.
        high, is_joined = self._master.detach(), not self._is_plain(run)
        if self._low is not None:
            master = high
            # A joined gradient is no longer needed, so that this allocates nothing.
            high = gradient.view(torch.bfloat16)[: len(master)] if is_joined else parameters[0].view(-1)
            split_float32_(master, high, self._low[span])
        if is_joined:
            spans = [self._spans[key] for key in run]
            parts = [high[own.start - span.start : own.stop - span.start] for own in spans]
            torch._foreach_copy_(
                parameters, [part.view_as(p) for part, p in zip(parts, parameters, strict=True)]
            )
        self._release()
        for key in run:
            self.steps[key] += 1
        # Neither bitsandbytes nor torch's fused AdamW raises the version of a parameter that it writes, and caches
        # (of row norms) go by the version.
        torch.autograd.graph.increment_version([self.parameters[key] for key in run])

    def low(self, key: str) -> Tensor | None:
        """The low bits of a parameter, int16 of its shape; None if it is stored in float32."""
        return None if self._low is None else self._low[self._spans[key]].view(self._shapes[key])

    def state_of(self, key: str) -> dict[str, Any]:
        """The state of a parameter, its averages as views of its shape."""
        dtype = torch.float32 if isinstance(self.inner, torch.optim.AdamW) else torch.int64
        state = self._state_at(self._spans[key]) | {"step": torch.tensor(self.steps[key], dtype=dtype)}
        for name in state.keys() & MOMENTS.keys():
            state[name] = _page_of(state[name], state[name].view(self._shapes[key]))
        return state

    def _whole(self, size: int) -> int:
        return -(-size // self._unit) * self._unit

    def _span(self, run: Sequence[str]) -> slice:
        return slice(self._spans[run[0]].start, self._whole(self._spans[run[-1]].stop))

    def _state_at(self, span: slice) -> dict[str, Any]:
        blocks = slice(span.start // _BLOCK, -(-span.stop // _BLOCK))
        state: dict[str, Any] = {}
        for name, value in self.state.items():
            if name in MOMENTS:
                state[name] = _page_of(value, value[span])
            else:
                state[name] = value[blocks] if name.startswith("absmax") else value
        return state

    def _flat(self, tensors: Sequence[Tensor], run: Sequence[str]) -> Tensor:
        """The tensors of a run behind each other, each filled up to whole units with zeros; a plain one as it is."""
        if self._is_plain(run):
            return tensors[0].reshape(-1)
        gaps = [self._whole(tensor.numel()) - tensor.numel() for tensor in tensors]
        zeros = tensors[0].new_zeros(max(gaps))
        parts = [
            part
            for tensor, gap in zip(tensors, gaps, strict=True)
            for part in (tensor.reshape(-1), zeros[:gap])
        ]
        return torch.cat([part for part in parts if part.numel()])

    def _is_plain(self, run: Sequence[str]) -> bool:
        parameter = self.parameters[run[0]]
        return len(run) == 1 and parameter.numel() % self._unit == 0 and parameter.is_contiguous()

    def _release(self) -> None:
        self._master.grad = None
        self._master.data = torch.empty(0, device=self._master.device)
        self.inner.state.clear()


def _inner_optimizer(
    name: OptimizerName, master: nn.Parameter, kind: GroupKind, options: Mapping[str, Any]
) -> Any:
    if not kind.is_matrix or not name.endswith("bit"):
        if "lion" in name:
            return bnb.optim.Lion32bit([master], **options, weight_decay=0.0)
        return torch.optim.AdamW([master], **options, weight_decay=0.0, fused=True)
    rule = "Lion" if "lion" in name else "AdamW"
    is_paged = can_page(master) and master.numel() >= _LEAST_PAGED
    paged, bits = "Paged" if is_paged else "", "8bit" if kind.is_8bit else "32bit"
    # The code books of 8-bit states are computed from values, so outside the fake mode of a plan.
    with _disable_current_modes() if is_planning() else nullcontext():
        inner = getattr(bnb.optim, f"{paged}{rule}{bits}")([master], **options, weight_decay=0.0)
    if is_paged:
        inner.get_state_buffer = _page_like
    if is_planning():
        inner.name2qmap = {key: torch.empty(256) for key in inner.name2qmap}
    return inner


def can_page(parameter: Tensor) -> bool:
    """Whether the states of a parameter can be paged: bitsandbytes ends the process where they cannot. Assumed where no
    driver answers, as in a plan on a machine without a GPU."""
    device = parameter.device
    return device.type == "cuda" and device_attribute(CONCURRENT_MANAGED_ACCESS, device.index or 0) != 0


def _page_like(master: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Zeros of the shape of `master` in a page, host memory that a GPU reads. bitsandbytes never frees one, so pages in
    which no tensor lies any more are used again."""
    size = master.numel() * dtype.itemsize
    fitting = [(page.nbytes, index) for index, page in enumerate(_FREE_PAGES) if page.nbytes >= size]
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


def _fresh_state(inner: Any, master: nn.Parameter) -> dict[str, Any]:
    if isinstance(inner, torch.optim.AdamW):
        zeros = torch.zeros_like(master)
        step = torch.zeros((), dtype=torch.float32, device=master.device)
        return {"step": step, "exp_avg": zeros, "exp_avg_sq": zeros.clone()}
    inner.init_state(inner.param_groups[0], master, 0, 0)
    state: dict[str, Any] = inner.state[master]
    if not is_planning():
        for number in (name[-1] for name in state if name.startswith("qmap")):
            # A fresh state has the code 0, which means -1 times a block scale of 0. A scale that is loaded is not 0,
            # and the zeros behind a parameter share it.
            state[f"state{number}"].fill_(int(state[f"qmap{number}"].abs().argmin()))
    return state


def _page_of(page: Any, part: Any) -> Any:
    """A part of a state; marked as paged, as bitsandbytes does it, if the state is."""
    if getattr(page, "is_paged", False):
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
        values = F.dequantize_blockwise(value.to(absmax.device), absmax=absmax, code=code, blocksize=_BLOCK)
        wide[name] = values.view_as(value).to(device)
    return wide


def fill_state_(state: Mapping[str, Any], values: Mapping[str, Tensor]) -> None:
    """Write the averages of a `widened_state`, or the tensors of another state, in the format of this state."""
    for name, value in values.items():
        target = state[name]
        if target.dtype == torch.uint8 and value.dtype != torch.uint8:
            number = name.removeprefix("state")
            codes, quantized = F.quantize_blockwise(
                value.contiguous(), code=state[f"qmap{number}"], blocksize=_BLOCK
            )
            target.copy_(codes.view_as(target))
            state[f"absmax{number}"].copy_(quantized.absmax)
        else:
            target.copy_(value)


class AdapterOptimizer:
    """AdamW or Lion over named parameters, stored in bf16 or float32.

    AdamW: arXiv 1711.05101, algorithm 2. Lion: arXiv 2302.06675, algorithm 2 (sec. 5 there: its rate is 3 to 10 times
    smaller than AdamW's, its decay that much larger). The decay is decoupled, p <- (1 - lr * weight_decay) p before the
    update, and applied here: bitsandbytes' kernels differ between devices (its issues 1992 and 2010).

    Matrices use `name`. Vectors (magnitudes, biases, norms) and trained rows of an embedding use the same rule with
    float32 states, never paged, without weight decay: 8-bit states are too coarse for a magnitude. Matrices that are
    `undecayed`, such as embeddings, have no decay either: a row whose token does not occur would shrink. `lr_ratios`:
    last part of a path -> its rate in units of lr, such as {"lora_B": 16.0} (LoRA+, arXiv 2402.12354).
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        *,
        name: OptimizerName = "adamw",
        lr_ratios: Mapping[str, float] | None = None,
        undecayed: Collection[str] = (),
        betas: tuple[float, float] | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        self.parameters = dict(parameters)
        for parameter in self.parameters.values():
            parameter.grad_dtype = torch.float32
        self._name, self._ratios = name, lr_ratios
        self._options: dict[str, Any] = {"betas": betas or ((0.9, 0.99) if "lion" in name else (0.9, 0.999))}
        if has_eps(name):
            self._options["eps"] = eps
        self._weight_decay = weight_decay
        self.undecayed = frozenset(undecayed)
        if any(can_page(parameter) for parameter in self.parameters.values()):
            gc.collect()  # an earlier run's optimizer gives its pages back
        self._groups = self._made_groups(self.parameters)

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One update; parameters without a gradient stay."""
        for group in self._groups:
            rate = lr * group.kind.lr_ratio
            for run in group.runs():
                group.update(run, rate)
        for parameter in self.parameters.values():
            getattr(parameter, "put_zeros_back_", lambda: None)()  # of `keep_zeros_`

    @torch.no_grad()
    def _made_groups(self, keys: Iterable[str]) -> list[FlatGroup]:
        shapes = {key: (tuple(self.parameters[key].shape), self.parameters[key].dtype) for key in keys}
        groups = []
        for members, kind in groups_of(shapes, self._name, ratios=self._ratios, undecayed=self.undecayed):
            parameters = {key: self.parameters[key] for key in members}
            decay = self._weight_decay if kind.is_matrix and kind.decays else 0.0
            groups.append(FlatGroup(parameters, kind, self._name, self._options, weight_decay=decay))
        return groups

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for parameter in self.parameters.values():
            parameter.grad = None

    @torch.no_grad()
    def gradient_norm(self) -> Tensor:
        """Euclidean norm of all gradients together, a float32 scalar on their device (0 if there are none)."""
        return torch.nn.utils.get_total_norm(self._gradients())

    @torch.no_grad()
    def scale_gradients_(self, factor: Tensor | float) -> None:
        """Multiply every gradient by `factor`."""
        if gradients := self._gradients():
            torch._foreach_mul_(gradients, factor)

    def _gradients(self) -> list[Tensor]:
        return [parameter.grad for parameter in self.parameters.values() if parameter.grad is not None]

    @torch.no_grad()
    def cut_(self, cuts: Mapping[str, tuple[Tensor, int]]) -> None:
        """Cut low bits and states of parameters that were themselves cut already: key -> the indices kept of a dim."""
        self._wait_for_pages()
        # One after the other: the old states of a group are freed before the next one's copies are made.
        for _ in range(len(self._groups)):
            group = self._groups.pop(0)
            if cuts.keys().isdisjoint(group.parameters):
                self._groups.append(group)
                continue
            for made in self._made_groups(group.parameters):
                for key, parameter in made.parameters.items():
                    low, state = group.low(key), group.state_of(key)
                    if key in cuts:
                        kept, dim = cuts[key]
                        wide = widened_state(state, parameter.device)
                        state = {name: values.index_select(dim, kept) for name, values in wide.items()}
                        low = None if low is None else low.index_select(dim, kept)
                    made.steps[key] = group.steps[key]
                    fill_state_(made.state_of(key), state)
                    target = made.low(key)
                    if low is not None and target is not None:
                        target.copy_(low)
                self._groups.append(made)
            del group, low, state

    @torch.no_grad()
    def fold_(self, key: str, factor: Tensor) -> None:
        """Multiply a parameter by `factor`, nowhere 0, and divide its averages by the factor or its square."""
        self._wait_for_pages()
        parameter, group = self.parameters[key].detach(), self._group_of(key)
        folded, low, state = parameter.float() * factor, group.low(key), group.state_of(key)
        if low is None:
            parameter.copy_(folded)
        else:
            split_float32_(folded, parameter, low)
        wide = widened_state(state, parameter.device)
        fill_state_(state, {name: values / factor ** MOMENTS[name] for name, values in wide.items()})

    def state_tensors(self) -> dict[str, Tensor]:
        """All tensors that a resume needs beside the parameters: 'residual/<path>' and 'state/<path>/<name>'."""
        self._wait_for_pages()
        tensors: dict[str, Tensor] = {}
        for key in self.parameters:
            group = self._group_of(key)
            if (low := group.low(key)) is not None:
                tensors[f"residual/{key}"] = low
            for name, value in group.state_of(key).items():
                if name not in _NOT_STORED:
                    tensors[f"state/{key}/{name}"] = value.detach()
        return tensors

    @torch.no_grad()
    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore `state_tensors`, by copying into states that bitsandbytes has made, so that they stay paged."""
        for name, target in self.state_tensors().items():
            target.copy_(tensors[name])
        for key in self.parameters:
            self._group_of(key).steps[key] = int(tensors[f"state/{key}/step"])

    def _group_of(self, key: str) -> FlatGroup:
        return next(group for group in self._groups if key in group.parameters)

    def _wait_for_pages(self) -> None:
        states = (value for group in self._groups for value in group.state.values())
        if torch.cuda.is_available() and any(getattr(value, "is_paged", False) for value in states):
            torch.cuda.synchronize()


def optimizer_of(recipe: Recipe, model: PreTrainedModel) -> AdapterOptimizer:
    """The optimizer of a recipe over all that it trains in a model; over nothing if it trains nothing."""
    train, kind = recipe.train, recipe.adapter.kind
    if kind == "none":
        return AdapterOptimizer({})
    counts = describe_adapters(model)
    logger.info(
        "Training %s parameters on %s adapted layers.", f"{counts['num_trainable']:,}", counts["num_layers"]
    )
    return AdapterOptimizer(
        adapter_parameters(model),
        name=train.optimizer,
        lr_ratios={"lora_B": train.lr_ratio_B or 1.0, "magnitude": train.lr_ratio_magnitude or 1.0},
        undecayed=() if kind == "full" else trained_parameters(model),
        betas=train.betas,
        eps=train.eps,
        weight_decay=train.weight_decay,
    )
