"""Trainable gates on rank components: their own Adam, a falling budget, and the removal of dead components.

Between steps every gate has its deterministic value. The values are float64 on the CPU, vectors (n,) with one entry
for each component that still exists, over all layers; the gates of the layers are copies. `cost` is a component's share
of the budget, `layer` the number of its layer, `alive` whether its gate is not 0.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from qdora.adapter.gates import gate_slope, gate_value, probability_on
from qdora.adapter.layer import AdaptedLinear
from qdora.errors import UserError
from qdora.files.tensor_file import write_tensors
from qdora.recipe.settings import GateConfig
from qdora.train.distributed import Processes
from qdora.train.optimizer import AdapterOptimizer
from qdora.train.passes import send

GATES_FILE = "gates.safetensors"
LARGEST_LOGIT = 8.0
"""Bound of log_alpha; beyond it a hard-concrete gate is practically always on or off."""
# The second average is the metric in which components are compared: over the last 100 steps, not 1,000.
_BETAS, _EPS = (0.9, 0.99), 1e-8
# A component is faded out over this share of the anneal before it is removed.
_FADE = 0.1
# Keeps the draws of gates apart from other draws with the same seed.
_STREAM = 0x67617465

_VECTORS = ("value", "exp_avg", "exp_avg_sq", "origin")


class Gates:
    """The gates of a model's adapted layers (path -> layer) while it trains."""

    # The phases are those of the start: a run that is extended continues the anneal that it began.
    STATE = "num_updates", "full", "target", "is_over", "num_warmup", "num_anneal", "died"

    def __init__(
        self, layers: Mapping[str, AdaptedLinear], settings: GateConfig, num_steps: int, seed: int
    ) -> None:
        self.layers, self.settings, self.seed = dict(layers), settings, seed
        self.num_steps = num_steps
        self.num_warmup, self.num_anneal = settings.phases(num_steps)
        for layer in self.layers.values():
            layer.add_gate()
        self.num_updates, self.is_over = 0, False
        self.full = float(self._costs().sum())
        # Mean ranks are rounded down to whole components.
        ranks = math.floor((settings.mean_rank or 0) * len(self.layers) + 1e-9)
        self.target = float(ranks if settings.parameters is None else settings.parameters)
        self.died: dict[str, list[int | None]] = {
            path: [None] * layer.rank for path, layer in self.layers.items()
        }
        start = 1.0 if settings.mode == "l1" else LARGEST_LOGIT / 2
        self._value = torch.full_like(self._costs(), start)
        self._exp_avg, self._exp_avg_sq = torch.zeros_like(self._value), torch.zeros_like(self._value)
        self._origin = torch.cat([torch.arange(layer.rank) for layer in self.layers.values()])
        self._alive = torch.ones(len(self._value), dtype=torch.bool)
        self._noise: Tensor | None = None
        if (fault := settings.length_fault(num_steps)) is not None:
            raise UserError(f"adapter.gates.anneal: {fault}")

    def check_budget(self) -> None:
        """Raise UserError for a budget that all components keep already, or that one component a layer exceeds."""
        least = sum(costs.min().item() for costs in torch.split(self._costs(), self._ranks()))
        if not least <= self.target < self.full:
            name, unit = (
                ("mean_rank", len(self.layers)) if self.settings.parameters is None else ("parameters", 1)
            )
            low, high, value = (f"{cost / unit:,.10g}" for cost in (least, self.full, self.target))
            text = f"got {value}, must be at least {low} (one component a layer) and less than {high}."
            raise UserError(f"adapter.gates.{name}: {text}")

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The gates, in the order of the layers; none after the budget is reached."""
        return [layer.gate for layer in self.layers.values() if layer.gate is not None]

    @property
    def mean_rank(self) -> float:
        """Living components per layer."""
        return int(self._alive.sum()) / len(self.layers)

    @property
    def num_parameters(self) -> int:
        """Parameters of lora_A and lora_B in living components."""
        return int((self._per_component(lambda layer: layer.parameters_per_rank) * self._alive).sum())

    def begin(self, step: int) -> None:
        """Clear gradients and draw gates for the step that follows `step` steps; called before each attempt at it."""
        for gate in self.parameters:
            gate.grad = None
        if self.settings.mode == "hard_concrete" and step >= self.num_warmup and not self.is_over:
            generator = torch.Generator().manual_seed(((self.seed + _STREAM) * 1_000_003 + step) % 2**63)
            first = list(itertools.accumulate(map(len, self.died.values()), initial=0))
            noise = torch.rand(first.pop(), generator=generator, dtype=torch.float64)
            # Indexed by the component's number at the start, so that a removal changes no other component's draws.
            index = self._origin + torch.tensor(first)[self._layer_numbers()]
            self._noise = noise[index].clamp(1e-6, 1 - 1e-6)
            self._write(gate_value(self._value, self._noise))

    def end(
        self, step: int, applied: bool, optimizer: AdapterOptimizer, processes: Processes
    ) -> dict[str, Any]:
        """Update the gates after the step that follows `step` steps, and remove dead components when due.
        The last step keeps the budget even if its update was not `applied`. Returns numbers for the line of metrics."""
        if not self.is_over:
            is_last = step + 1 == self.num_steps
            if applied:
                processes.sum_gradients_(self.parameters)
                self._update(step)
            elif is_last:
                self._keep_budget(step + 1, self._step_size())
            self.settle()
            reached = (applied or is_last) and step + 1 >= self.num_warmup + self.num_anneal
            if reached or (step + 1) % self.settings.shrink_every == 0:
                self.remove_dead(optimizer)
            if reached:
                self._fold(optimizer)
        return {"gates": {"mean_rank": self.mean_rank, "num_parameters": self.num_parameters}}

    def settle(self) -> None:
        """Give every gate its deterministic value, exactly 0 if it is dead."""
        self._noise = None
        for gate in self.parameters:
            gate.grad = None
        self._write(self._value if self.settings.mode == "l1" else gate_value(self._value))

    def remove_dead(self, optimizer: AdapterOptimizer) -> None:
        """Remove dead components from layers, optimizer and vectors; outputs stay the same, to rounding."""
        if bool(self._alive.all()):
            return
        parts = torch.split(self._alive, self._ranks())
        pairs = zip(self.layers, parts, strict=True)
        indices = {path: keep.nonzero().squeeze(1) for path, keep in pairs if not bool(keep.all())}
        cuts: dict[str, tuple[Tensor, int]] = {}
        for path, kept in send(indices, self.parameters[0].device).items():
            self.layers[path].keep_components_(kept)
            cuts |= {f"{path}.lora_A": (kept, -2), f"{path}.lora_B": (kept, -1)}
        optimizer.cut_(cuts)
        for name in _VECTORS:
            setattr(self, f"_{name}", getattr(self, f"_{name}")[self._alive])
        self._alive = self._alive[self._alive]

    @torch.no_grad()
    def _fold(self, optimizer: AdapterOptimizer) -> None:
        for path, layer in self.layers.items():
            assert layer.gate is not None
            optimizer.fold_(f"{path}.lora_B", layer.gate.detach())
            layer.gate = None
            layer.parameters_changed()
        self.is_over = True

    def record(self) -> dict[str, Any]:
        """JSON values for the adapter's record: layer -> its parameters per rank, when each component was removed."""
        return {
            path: {"parameters_per_rank": layer.parameters_per_rank, "removed_after": list(self.died[path])}
            for path, layer in self.layers.items()
        }

    def save(self, directory: Path) -> None:
        """Write gates.safetensors: the vectors, and lora_B without its gate, since adapter/ holds the product."""
        tensors = {name: getattr(self, f"_{name}") for name in _VECTORS}
        write_tensors(directory / GATES_FILE, tensors | self._raw_factors())

    @torch.no_grad()
    def load(self, directory: Path, state: Mapping[str, Any]) -> None:
        """Restore `save` from a checkpoint's `directory`, and `STATE`; its adapter must be loaded already."""
        vars(self).update(state)
        for layer in self.layers.values() if self.is_over else ():
            layer.gate = None
            layer.parameters_changed()
        tensors = load_file(directory / GATES_FILE)
        for name in _VECTORS:
            setattr(self, f"_{name}", tensors[name])
        for name, factor in self._raw_factors().items():
            factor.copy_(tensors[name])
        self._alive = torch.tensor([self.died[path][number] is None for path, number in self._names()])
        self.settle()

    def _raw_factors(self) -> dict[str, nn.Parameter]:
        return {f"lora_B/{path}": layer.lora_B for path, layer in self.layers.items() if layer.gate is not None}

    def _update(self, step: int) -> None:
        parts = [torch.zeros_like(gate) if gate.grad is None else gate.grad for gate in self.parameters]
        gradient = torch.cat(parts).cpu().double()
        if self.settings.mode == "hard_concrete":
            if step < self.num_warmup:
                return
            assert self._noise is not None
            gradient = gradient * gate_slope(self._value, self._noise)
        self.num_updates += 1
        self._exp_avg.lerp_(gradient, 1 - _BETAS[0])
        self._exp_avg_sq.lerp_(gradient.square(), 1 - _BETAS[1])
        step_size = self._step_size()
        moved = self._value - step_size * self._exp_avg / (1 - _BETAS[0] ** self.num_updates)
        self._value = torch.where(self._alive, moved, self._value)
        if step >= self.num_warmup:
            self._keep_budget(step + 1, step_size)

    def allowed_cost(self, step: int) -> float:
        """The budget after `step` steps: `full` during warm-up, then down to `target` along (1 - t)^3.
        Source: arXiv 2303.10512, eq. 15."""
        t = min(max((step - self.num_warmup) / self.num_anneal, 0.0), 1.0)
        return self.target + (self.full - self.target) * (1.0 - t) ** 3

    def _step_size(self) -> Tensor:
        second = self._exp_avg_sq / (1 - _BETAS[1] ** max(self.num_updates, 1))
        return self.settings.lr / (second.sqrt() + _EPS)

    def _keep_budget(self, done: int, step_size: Tensor) -> None:
        cost, layer = self._costs(), self._layer_numbers()
        fade = max(1, round(_FADE * self.num_anneal))
        now, soon = self.allowed_cost(done), self.allowed_cost(done + fade)
        if self.settings.mode == "hard_concrete":
            dying = surplus(self._value, cost, layer, self._alive, now)
            self._alive &= ~dying
            if now <= self.target:  # the remaining gates stay on
                self._value[self._alive] = LARGEST_LOGIT
            elif soon < float(cost[self._alive].sum()):
                # Relative costs, so that the shift has the size of log_alpha
                unit = float(cost.mean())
                self._value = shifted_to_budget(self._value, cost / unit, self._alive, soon / unit)
        else:
            worth = death_penalty(self._value, step_size, cost)
            dying = surplus(worth, cost, layer, self._alive, now)
            fading = surplus(worth, cost, layer, self._alive, soon)
            if bool(fading.any()):
                # Half of the fading gates reach 0 before their removal is due; the others are set to 0 then.
                needed = float(worth[dying].max()) if bool(dying.any()) else 0.0
                penalty = max(needed, float(worth[fading].median()) / fade)
                self._value = proximal_step(self._value, step_size, cost, penalty, fading)
                dying |= fading & (self._value == 0)
                self._value[dying] = 0.0
            self._alive &= ~dying
        for (path, number), is_dying in zip(self._names(), dying.tolist(), strict=True):
            if is_dying:
                self.died[path][number] = done

    @torch.no_grad()
    def _write(self, values: Tensor) -> None:
        if gates := [*self.parameters]:
            living = torch.where(self._alive, values, 0.0).to(gates[0].dtype)
            living = send({"gates": living}, gates[0].device)["gates"]
            # In place, which raises the versions, so that cached norms are computed again.
            torch._foreach_copy_(gates, torch.split(living, self._ranks()))  # type: ignore[arg-type]

    def _ranks(self) -> list[int]:
        return [layer.rank for layer in self.layers.values()]

    def _per_component(self, value: Callable[[AdaptedLinear], int]) -> Tensor:
        """(n,) float64: a number of each component's layer."""
        values = torch.tensor([value(layer) for layer in self.layers.values()], dtype=torch.float64)
        return values[self._layer_numbers()]

    def _costs(self) -> Tensor:
        by_ranks = self.settings.parameters is None
        return self._per_component(lambda layer: 1 if by_ranks else layer.parameters_per_rank)

    def _layer_numbers(self) -> Tensor:
        return torch.arange(len(self.layers)).repeat_interleave(torch.tensor(self._ranks()))

    def _names(self) -> list[tuple[str, int]]:
        paths = [path for path, layer in self.layers.items() for _ in range(layer.rank)]
        return list(zip(paths, self._origin.tolist(), strict=True))


def surplus(order: Tensor, cost: Tensor, layer: Tensor, alive: Tensor, allowed: float) -> Tensor:
    """(n,) bool: the components to remove, the lowest in `order`, (n,), but never a layer's highest.

    The others cost at most `allowed`, unless the highest components of all layers cost more.
    """
    going = torch.zeros_like(alive)
    excess = float(cost[alive].sum()) - allowed
    if excess <= 0:
        return going
    # The highest living component of each layer stays, the first one in a tie.
    down = torch.where(alive, order, float("-inf")).argsort(descending=True, stable=True)
    rest = alive.clone()
    rest[down[np.unique(layer[down].numpy(), return_index=True)[1]]] = False
    candidates = rest.nonzero().squeeze(1)
    lowest = candidates[order[candidates].argsort(stable=True)]
    before = cost[lowest].cumsum(0) - cost[lowest]
    # Exact: sums of whole numbers.
    going[lowest[before < excess]] = True
    return going


def death_penalty(values: Tensor, step_size: Tensor, cost: Tensor) -> Tensor:
    """The weight of the L1 penalty at which a proximal step takes a gate c, of `values`, to 0: |c| / (p cost), (n,).

    With Adam's step size p = lr / (sqrt(v) + eps) this is |c| times the root mean square of its gradient: to first
    order, the change of the loss when the component is removed.
    """
    return values.abs() / (step_size * cost)


def proximal_step(values: Tensor, step_size: Tensor, cost: Tensor, penalty: float, chosen: Tensor) -> Tensor:
    """argmin over z of penalty cost |z| + (z - c)^2 / (2 p) for the `chosen` gates: |c| shrinks by penalty p cost, to 0
    at the least. The names are those of `death_penalty`."""
    shrunk = values.sign() * (values.abs() - penalty * step_size * cost).clamp_min(0.0)
    return torch.where(chosen, shrunk, values)


def shifted_to_budget(log_alpha: Tensor, cost: Tensor, alive: Tensor, allowed: float) -> Tensor:
    """log_alpha + delta cost of the living gates, (n,), with delta such that their expected cost is `allowed`: of
    independent gates that keep the budget on average the nearest in KL divergence."""

    def moved(delta: float) -> Tensor:
        return (log_alpha + delta * cost).clamp(-LARGEST_LOGIT, LARGEST_LOGIT)

    def expected(delta: float) -> float:
        return float((probability_on(moved(delta)) * cost)[alive].sum())

    # Far enough to bring every gate to either bound.
    high = 2.0 * LARGEST_LOGIT / float(cost.min())
    low = -high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if expected(middle) < allowed else (low, middle)
    return torch.where(alive, moved(high), log_alpha)
