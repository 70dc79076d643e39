"""AdamW and Lion for adapters stored in bf16, with no update lost to rounding.

The 16 bits that bf16 drops from a float32 parameter are kept in an int16 beside it (`split_float32_`). Each step
joins the two to float32, updates there and splits again, so training runs as with float32 parameters while the layers
read bf16. Gradients arrive and accumulate in float32 (`Tensor.grad_dtype`).

The averages are float32 in torch's and bitsandbytes' 32-bit states, and codes with block scales in its 8-bit states. A
paged state is a CPU tensor over memory that a GPU can read; its block scales are on the GPU. Parameters are updated
together (train/flat_group.py).
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qdora.errors import RunFailure, first_line
from qdora.memory.oom import free_memory, is_out_of_memory
from qdora.model.build_model import describe_adapters
from qdora.model.inject import adapter_parameters
from qdora.model.tokens import trained_parameters
from qdora.quant.kernels import is_planning
from qdora.recipe.settings import Recipe
from qdora.train.flat_group import (
    MOMENTS,
    NOT_STORED,
    FlatGroup,
    OptimizerName,
    can_page,
    fill_state_,
    groups_of,
    join_float32,
    split_float32_,
    widened_state,
)

# Averages of the gradient; the other two are of its square.
_FIRST_MOMENTS = ("exp_avg", "state1")

LARGE = 10**9
"""Base weights from which a run on a CPU is said to be slow."""

logger = logging.getLogger("qdora")


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
        lr_ratios: Mapping[str, float] | None = None,
        undecayed: Collection[str] = (),
        betas: tuple[float, float] | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        self.parameters = dict(parameters)
        for key, parameter in self.parameters.items():
            if parameter.dtype == torch.bfloat16:
                parameter.grad_dtype = torch.float32
            elif parameter.dtype != torch.float32:
                raise ValueError(f"{key} is stored in {parameter.dtype}, must be bfloat16 or float32.")
        self._name = name
        self._options: dict[str, Any] = {"betas": betas or ((0.9, 0.99) if "lion" in name else (0.9, 0.999))}
        if "lion" not in name:
            self._options["eps"] = eps
        self._weight_decay = weight_decay
        self._rates = _rates(self.parameters, lr_ratios or {})
        self.undecayed = frozenset(undecayed)
        if any(can_page(parameter) for parameter in self.parameters.values()):
            gc.collect()  # an earlier run's optimizer gives its pages back
        self._groups = self._made_groups(self.parameters)
        if name.startswith("paged") and not is_planning() and not any(can_page(p) for p in self.parameters.values()):
            why = "the driver cannot page" if torch.cuda.is_available() else "no CUDA here"
            logger.info("%s: %s, so its states are not paged; the arithmetic is the same.", name, why)

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
            rate = lr * group.kind.lr_ratio
            for run in group.runs():
                if group.update(run, rate) is not None:
                    free_memory()
                    for key in run:
                        shortage = group.update([key], rate)
                        if shortage is not None:
                            left, reason = [*left, key], shortage
        if left:
            num_updated = sum(parameter.grad is not None for parameter in self.parameters.values())
            raise UpdateOutOfMemory(left, num_updated, reason)

    @torch.no_grad()
    def _made_groups(self, keys: Iterable[str]) -> list[FlatGroup]:
        """Groups of these parameters, with the states that a first step would make."""
        shapes = {key: (tuple(self.parameters[key].shape), self.parameters[key].dtype) for key in keys}
        found = groups_of(shapes, self._name, ratios=self._rates, undecayed=self.undecayed)
        made = []
        try:
            for members, kind in found:
                parameters = {key: self.parameters[key] for key in members}
                decay = self._weight_decay if kind.is_matrix and kind.decays else 0.0
                made.append(FlatGroup(parameters, kind, self._name, self._options, weight_decay=decay))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            number = sum(parameter.numel() for parameter in self.parameters.values())
            raise RunFailure(
                f"out of memory while making the states of {self._name} for {number:,} parameters "
                f"({first_line(error)}). Fix: lower adapter.rank, or choose train.optimizer paged_adamw_8bit."
            ) from error
        return made

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
        grads = [parameter.grad for parameter in self.parameters.values() if parameter.grad is not None]
        if grads:
            torch._foreach_mul_(grads, factor)

    def master(self, key: str) -> Tensor:
        """The full float32 value of a parameter, as a new tensor."""
        parameter, low = self.parameters[key].detach(), self._group_of(key).low(key)
        return parameter.clone() if low is None else join_float32(parameter, low)

    def state(self, key: str) -> dict[str, Any]:
        """The state of a parameter: views, and its count of updates. Pages can be read."""
        self._wait_for_pages()
        return self._group_of(key).state_of(key)

    @torch.no_grad()
    def cut_(self, cuts: Mapping[str, tuple[Tensor, int]]) -> None:
        """Cut low bits and states of parameters that were themselves cut already: key -> the indices kept of a dim.

        8-bit states of these parameters are quantised again.
        """
        self._wait_for_pages()
        place = 0
        # One after the other: the old states of a group are freed before the next one's copies are made.
        while place < len(self._groups):
            group = self._groups[place]
            made = [group] if cuts.keys().isdisjoint(group.parameters) else self._cut_group(group, cuts)
            self._groups[place : place + 1] = made
            place += len(made)

    def _cut_group(self, group: FlatGroup, cuts: Mapping[str, tuple[Tensor, int]]) -> list[FlatGroup]:
        """The groups that take the place of one after `cut_`."""
        lows: dict[str, Tensor | None] = {}
        states: dict[str, dict[str, Tensor]] = {}
        for key, parameter in group.parameters.items():
            low, state = group.low(key), group.state_of(key)
            if key in cuts:
                kept, dim = cuts[key]
                low = None if low is None else low.index_select(dim, kept)
                wide = widened_state(state, parameter.device)
                states[key] = {name: each.index_select(dim, kept) for name, each in wide.items()}
            else:
                states[key] = {name: each for name, each in state.items() if name not in (*NOT_STORED, "step")}
            lows[key] = low
        made = self._made_groups(lows)
        for each in made:
            for key in each.parameters:
                each.steps[key] = group.steps[key]
                fill_state_(each.state_of(key), states.pop(key))
                low, place = lows[key], each.low(key)
                if low is not None and place is not None:
                    place.copy_(low)
        return made

    @torch.no_grad()
    def fold_(self, key: str, factor: Tensor) -> None:
        """Multiply a parameter, as the layer reads it, by `factor`, which is broadcast and nowhere 0.

        Its gradient is then the old one divided by the factor, so the averages are divided by it, too (by its square,
        for squares).
        """
        parameter, state = self.parameters[key].detach(), self.state(key)
        folded, low = parameter.float() * factor, self._group_of(key).low(key)
        if low is None:
            parameter.copy_(folded)
        else:
            split_float32_(folded, parameter, low)
        powers = {name: 1 if name in _FIRST_MOMENTS else 2 for name in MOMENTS}
        wide = widened_state(state, parameter.device)
        fill_state_(state, {name: each / factor ** powers[name] for name, each in wide.items()})

    def state_tensors(self) -> dict[str, Tensor]:
        """All tensors that a resume needs beside the parameters: 'residual/<path>' and 'state/<path>/<name>'."""
        self._wait_for_pages()
        tensors: dict[str, Tensor] = {}
        for key in self.parameters:
            group = self._group_of(key)
            low = group.low(key)
            if low is not None:
                tensors[f"residual/{key}"] = low
            stored = {name: each for name, each in group.state_of(key).items() if name not in NOT_STORED}
            tensors |= {f"state/{key}/{name}": each.detach() for name, each in stored.items()}
        return tensors

    @torch.no_grad()
    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore `state_tensors`, by copying into states that bitsandbytes has made itself, so that they stay paged.

        Raises:
            ValueError: A tensor is missing, unknown or of another shape or dtype; names the first five.
        """
        places = self.state_tensors()
        faults = [f"{name} is unknown" for name in tensors.keys() - places.keys()]
        for name, place in places.items():
            tensor = tensors.get(name)
            if tensor is None:
                faults.append(f"{name} is missing")
            elif (place.shape, place.dtype) != (tensor.shape, tensor.dtype):
                got, wanted = (f"{tuple(t.shape)} {t.dtype}".replace("torch.", "") for t in (tensor, place))
                faults.append(f"{name} is {got}, not {wanted}")
        if faults:
            raise ValueError("optimizer state does not fit these parameters: " + "; ".join(sorted(faults)[:5]))
        for name, place in places.items():
            place.copy_(tensors[name])
        for key in self.parameters:
            self._group_of(key).steps[key] = int(tensors[f"state/{key}/step"])

    def _group_of(self, key: str) -> FlatGroup:
        return next(group for group in self._groups if key in group.parameters)

    def _wait_for_pages(self) -> None:
        """Wait for the GPU if it may still write pages, which the host reads as its own memory."""
        if torch.cuda.is_available() and any(group.is_paged for group in self._groups):
            torch.cuda.synchronize()


def optimizer_of(recipe: Recipe, model: PreTrainedModel) -> AdapterOptimizer:
    """The optimizer of a recipe over all that it trains in a model; over nothing if it trains nothing."""
    train, kind = recipe.train, recipe.adapter.kind
    if kind == "none":
        return AdapterOptimizer({})
    ratios = {"lora_B": train.lr_ratio_B, "magnitude": train.lr_ratio_magnitude}
    optimizer = AdapterOptimizer(
        adapter_parameters(model),
        name=train.optimizer,
        lr_ratios={part: ratio for part, ratio in ratios.items() if ratio is not None},
        undecayed=() if kind == "full" else trained_parameters(model),
        betas=train.betas,
        eps=train.eps,
        weight_decay=train.weight_decay,
    )
    counts = describe_adapters(model)
    shown = (f"{counts['num_trainable']:,}", f"{counts['num_layers']:,}")
    logger.info("Training %s parameters on %s adapted layers.", *shown)
    if model.device.type == "cpu" and counts["num_adapted"] > LARGE:
        logger.info("Training on %.1f billion weights is slow on a CPU.", counts["num_adapted"] / 1e9)
    return optimizer


def _rates(keys: Iterable[str], lr_ratios: Mapping[str, float]) -> dict[str, float]:
    """Key -> its rate in units of lr."""
    parts = {key: key.rpartition(".")[2] for key in keys}
    unknown = [part for part in lr_ratios if part not in parts.values()]
    if unknown:
        known = ", ".join(sorted(set(parts.values())))
        raise ValueError(f"lr_ratios: {', '.join(unknown)} names no parameter, must be one of {known}.")
    return {key: lr_ratios.get(part, 1.0) for key, part in parts.items()}
