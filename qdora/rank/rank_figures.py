"""Figures of `qdora rank`: each layer's spectrum, and the map of ranks over depth and kind of layer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from qdora.files.pages import svg_file
from qdora.model.inject import block_of
from qdora.rank.allocate import Array


def depth_and_kind(name: str) -> tuple[int, str]:
    """Depth and kind of a layer: model.layers.3.self_attn.q_proj -> (3, self_attn.q_proj); 0 without a number."""
    depth = block_of(name)
    return (0, name) if depth is None else (depth, name.partition(f".{depth}.")[2])


def draw_spectra(spectra: Mapping[str, Array], path: Path, *, measure: str, ranks: Mapping[str, int]) -> None:
    """Magnitudes of falling values: one panel a kind of layer, one line a depth (dark is early). SVG.

    Each value below 0 is a cross, and the last one within `ranks` a dot.
    """
    from matplotlib import colormaps

    kinds = list(dict.fromkeys(depth_and_kind(name)[1] for name in spectra))
    columns = min(len(kinds), 4)
    rows = -(-len(kinds) // columns)
    deepest = max(depth_and_kind(name)[0] for name in spectra) or 1
    with svg_file(path, 3.4 * columns, 0.4 + 2.8 * rows) as figure:
        axes = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel()
        for axis, kind in zip(axes, kinds, strict=False):
            for name, signed in spectra.items():
                depth, mine = depth_and_kind(name)
                if mine != kind:
                    continue
                colour = colormaps["viridis"](0.9 * depth / deepest)
                values = np.where(signed != 0, np.abs(signed), np.nan)  # a logarithm has no place for zero
                numbers = np.arange(1, len(values) + 1)
                axis.semilogy(numbers, values, color=colour, linewidth=1, gid=f"spectrum {name}")
                axis.semilogy(numbers[signed < 0], values[signed < 0], "x", color=colour, markersize=3)
                if name in ranks:
                    axis.semilogy([ranks[name]], [values[ranks[name] - 1]], "o", color=colour, markersize=3)
            axis.set_title(kind, fontsize="small")
            axis.set_xlabel("number")
            axis.grid(alpha=0.3)
        for axis in axes[len(kinds) :]:
            axis.set_axis_off()
        axes[0].set_ylabel(measure)


def draw_rank_map(ranks: Mapping[str, int], path: Path) -> None:
    """Kind of layer by depth, each rank in colour and as a number. SVG."""
    places = {name: depth_and_kind(name) for name in ranks}
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
