"""Ranks for all layers under one budget of parameters, from the worth of each rank component.

A component of a layer is worth the next-largest energy of its spectrum (a worth of components.py, a squared singular
value) and costs as many parameters as one rank more of the layer. The ranks maximise the total worth within the budget,
exactly and in whole components.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qdora.errors import UserError

Array = NDArray[np.float64]


@dataclass(frozen=True)
class LayerSpectrum:
    """The worth of each component of a layer.

    Attributes:
        energies: (most,) worth of the first, second, ... component; never rising, never negative. Its length is the
            largest rank that the layer may get.
        total: Energy of the whole spectrum, known components or not. An estimate may be below the known part.
        cost: Parameters of a component: in + out, for a stack of experts more (`parameters_per_rank`).
    """

    energies: Array
    total: float
    cost: int

    def __post_init__(self) -> None:
        rising = len(self.energies) > 1 and bool((np.diff(self.energies) > 0).any())
        if not len(self.energies) or rising or self.energies[-1] < 0 or not np.isfinite(self.energies).all():
            raise ValueError("energies must be one or more finite numbers of at least 0 that never rise.")


def effective_rank(spectrum: LayerSpectrum, threshold: float) -> int | None:
    """The fewest components that hold `threshold` (0 to 1) of the total energy; None where the known ones hold less.

    A spectrum without energy needs 1.
    """
    reached = np.cumsum(spectrum.energies) >= threshold * spectrum.total * (1.0 - 1e-12)
    return int(reached.argmax()) + 1 if reached.any() else None


def allocate(spectra: Mapping[str, LayerSpectrum], budget: int) -> dict[str, int]:
    """The ranks of largest summed energy whose parameters fit into the budget.

    Layers of one cost share one list of components, from the most valuable down. Branch and bound finds how many to
    take from each list; the bound is the same problem with the last component cut to fit.

    Args:
        budget: Parameters of all components together.
    Returns: Layer -> rank, at least 1, in the order given. Beyond rank 1 no component without energy is given.
    Raises: UserError: The budget is too small for rank 1 everywhere.
    """
    ranks = dict.fromkeys(spectra, 1)
    needed = sum(spectrum.cost for spectrum in spectra.values())
    if needed > budget:
        raise UserError(f"--budget: must be at least {needed:,} parameters for rank 1 everywhere, got {budget:,}.")
    pools = _pools(spectra, ranks)
    counts = _best_counts([energies for _, energies, _ in pools], [cost for cost, _, _ in pools], budget - needed)
    for count, (_, _, owners) in zip(counts, pools, strict=True):
        for name in owners[:count]:
            ranks[name] += 1
    return ranks


def _pools(spectra: Mapping[str, LayerSpectrum], ranks: Mapping[str, int]) -> list[tuple[int, Array, list[str]]]:
    """(cost, energies, layer of each energy) of the components beyond `ranks`, for each cost."""
    found = []
    for cost in sorted({spectrum.cost for spectrum in spectra.values()}, reverse=True):
        components = [
            (-float(energy), place, position, name)
            for place, (name, spectrum) in enumerate(spectra.items())
            if spectrum.cost == cost
            for position, energy in enumerate(spectrum.energies[ranks[name] :])
            if energy > 0
        ]
        components.sort()  # a layer's own stay in their order: they never rise
        energies = np.array([-each[0] for each in components])
        found.append((cost, energies, [each[3] for each in components]))
    return found


def _best_counts(pools: Sequence[Array], costs: Sequence[int], budget: int) -> list[int]:
    """How many of each pool's first components to take: the largest sum that fits."""
    values = [np.concatenate([[0.0], np.cumsum(energies)]) for energies in pools]
    bounds = [_bound(pools[start:], costs[start:]) for start in range(len(pools))]
    # Below this, sums in another order could differ
    rounding = 1e-12 * sum(float(each[-1]) for each in values)
    best: list[int] = []
    best_value = -np.inf

    def search(taken: list[int], room: int, value: float) -> None:
        nonlocal best, best_value
        depth = len(taken)
        if depth == len(pools):
            if value > best_value:
                best, best_value = taken, value
            return
        most = min(room // costs[depth], len(pools[depth]))
        reachable = value + values[depth][: most + 1]
        if depth + 1 < len(pools):
            cost, energy = bounds[depth + 1]
            reachable = reachable + np.interp(room - costs[depth] * np.arange(most + 1), cost, energy)
        for count in np.argsort(-reachable, kind="stable"):
            if reachable[count] <= best_value + rounding:
                break
            search([*taken, int(count)], room - costs[depth] * int(count), value + float(values[depth][count]))

    search([], budget, 0.0)
    return best


def _bound(pools: Sequence[Array], costs: Sequence[int]) -> tuple[Array, Array]:
    """(parameters, energy) of the best components by energy per parameter: a concave bound of what can be reached."""
    cost = np.concatenate([np.full(len(energies), float(cost)) for energies, cost in zip(pools, costs, strict=True)])
    energy = np.concatenate(list(pools))
    order = np.argsort(-energy / cost, kind="stable")
    return np.concatenate([[0.0], np.cumsum(cost[order])]), np.concatenate([[0.0], np.cumsum(energy[order])])
