"""Ranks for all layers under one budget of parameters, from the worth of each rank component; their figures.

A component is worth the next-largest energy of its layer's spectrum and costs as many parameters as one rank more. The
ranks maximise the total worth within the budget, exactly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qdora.errors import UserError
from qdora.files.pages import svg_file
from qdora.model.inject import block_of

Array = NDArray[np.float64]


@dataclass(frozen=True)
class LayerSpectrum:
    """The worth of each component of a layer.

    Attributes:
        energies: (most,) worth of the first, second, ... component; never rising, never negative.
        total: Energy of the whole spectrum. An estimate may be below the known part.
        cost: Parameters of a component.
    """

    energies: Array
    total: float
    cost: int


def effective_rank(spectrum: LayerSpectrum, threshold: float) -> int | None:
    """The fewest components that hold `threshold` (0 to 1) of the total energy; None where the known ones hold less."""
    reached = np.cumsum(spectrum.energies) >= threshold * spectrum.total * (1.0 - 1e-12)
    return int(reached.argmax()) + 1 if reached.any() else None


def allocate(spectra: Mapping[str, LayerSpectrum], budget: int) -> dict[str, int]:
    """The ranks of largest summed energy whose parameters fit into the budget; at least 1.

    Layers of one cost share one list of components, from the most valuable down; branch and bound finds how many to
    take from each list. Beyond rank 1 no component without energy is given.
    """
    ranks = dict.fromkeys(spectra, 1)
    needed = sum(spectrum.cost for spectrum in spectra.values())
    if needed > budget:
        raise UserError(f"--budget: must be at least {needed:,} parameters for rank 1 everywhere, got {budget:,}.")
    costs = sorted({spectrum.cost for spectrum in spectra.values()}, reverse=True)
    pools, owners = [], []
    for cost in costs:
        components = [
            (-float(energy), index, position, name)
            for index, (name, spectrum) in enumerate(spectra.items())
            if spectrum.cost == cost
            for position, energy in enumerate(spectrum.energies[1:])
            if energy > 0
        ]
        components.sort()  # a layer's own stay in their order: they never rise
        pools.append(np.array([-each[0] for each in components]))
        owners.append([each[3] for each in components])
    for count, names in zip(_best_counts(pools, costs, budget - needed), owners, strict=True):
        for name in names[:count]:
            ranks[name] += 1
    return ranks


def _best_counts(pools: Sequence[Array], costs: Sequence[int], budget: int) -> list[int]:
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


def _depth_and_kind(name: str) -> tuple[int, str]:
    depth = block_of(name)
    return (0, name) if depth is None else (depth, name.partition(f".{depth}.")[2])


def draw_spectra(spectra: Mapping[str, Array], path: Path, *, measure: str, ranks: Mapping[str, int]) -> None:
    """Magnitudes of falling values: one panel a kind of layer, one line a depth (dark is early). SVG. Values below 0
    are crosses, the last one within `ranks` a dot."""
    from matplotlib import colormaps

    places = {name: _depth_and_kind(name) for name in spectra}
    kinds = list(dict.fromkeys(kind for _, kind in places.values()))
    columns = min(len(kinds), 4)
    rows = -(-len(kinds) // columns)
    deepest = max(depth for depth, _ in places.values()) or 1
    with svg_file(path, 3.4 * columns, 0.4 + 2.8 * rows) as figure:
        axes = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel()
        for name, signed in spectra.items():
            depth, kind = places[name]
            axis, colour = axes[kinds.index(kind)], colormaps["viridis"](0.9 * depth / deepest)
            values = np.where(signed != 0, np.abs(signed), np.nan)  # a logarithm has no place for zero
            numbers = np.arange(1, len(values) + 1)
            axis.semilogy(numbers, values, color=colour, linewidth=1, gid=f"spectrum {name}")
            axis.semilogy(numbers[signed < 0], values[signed < 0], "x", color=colour, markersize=3)
            if name in ranks:
                axis.semilogy([ranks[name]], [values[ranks[name] - 1]], "o", color=colour, markersize=3)
        for axis, kind in zip(axes, kinds, strict=False):
            axis.set_title(kind, fontsize="small")
            axis.set_xlabel("number")
            axis.grid(alpha=0.3)
        for axis in axes[len(kinds) :]:
            axis.set_axis_off()
        axes[0].set_ylabel(measure)


def draw_rank_map(ranks: Mapping[str, int], path: Path) -> None:
    """Kind of layer by depth, each rank in colour and as a number. SVG."""
    places = {name: _depth_and_kind(name) for name in ranks}
    kinds = list(dict.fromkeys(kind for _, kind in places.values()))
    depths = sorted({depth for depth, _ in places.values()})
    grid = np.full((len(kinds), len(depths)), np.nan)
    for name, (depth, kind) in places.items():
        grid[kinds.index(kind), depths.index(depth)] = ranks[name]
    with svg_file(path, 2.6 + 0.34 * len(depths), 1.4 + 0.34 * len(kinds)) as figure:
        axes = figure.add_subplot()
        image = axes.imshow(grid, cmap="viridis", aspect="auto")
        middle = (float(np.nanmin(grid)) + float(np.nanmax(grid))) / 2
        for (row, column), rank in np.ndenumerate(grid):
            if not np.isnan(rank):
                colour = "white" if rank <= middle else "black"
                axes.text(column, row, f"{rank:.0f}", ha="center", va="center", color=colour, fontsize=6)
        axes.set_yticks(range(len(kinds)), kinds, fontsize="small")
        axes.set_xticks(range(len(depths)), [str(depth) for depth in depths], fontsize=6)
        axes.set_xlabel("depth")
        figure.colorbar(image, ax=axes, label="rank")
