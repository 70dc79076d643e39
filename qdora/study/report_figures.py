"""The figures of a study's report: quality against bits, sparsity and bytes, and the error of each layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from qdora.files.svg_figure import inline_svg, new_figure
from qdora.study.report_tables import Report, Rows, is_number
from qdora.study.scores import HIGHER_IS_BETTER

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_NAMES = {"nll_per_token": "NLL (nats per token)", "acc": "accuracy"}
_X = {"bits_per_weight": "bits per weight of the linear layers", "sparsity": "share of pruned weights"}
_PANELS = {"bits_per_weight": "sparsity", "sparsity": "bits_per_weight"}
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")
_MARKERS = "osD^vPX*"


def draw_all(report: Report) -> dict[str, str]:
    """Title -> <svg> element of every figure that the study has points for."""
    rows = report.tables["arms"]
    drawn = {}
    for x, title in (("bits_per_weight", "Quality and bits per weight"), ("sparsity", "Quality and sparsity")):
        if len({round(row[x], 4) for row in rows}) > 1:
            drawn[title] = _curves(rows, x, report.arm_axis)
    if any(report.metric in row for row in rows):
        drawn["Quality and bytes"] = _pareto(rows, report)
    if report.tables["layers"]:
        drawn["Error of each layer"] = _layers(report.tables["layers"], report.axes)
    return drawn


def _curves(rows: Rows, x: str, arm_axis: str) -> str:
    """One row of panels a measure, one panel a value of the other way to compress, one line an arm."""
    measures = [name for name in _NAMES if any(is_number(row.get(name)) for row in rows)]
    other = _PANELS[x]
    groups: dict[float, Rows] = {}
    for row in rows:
        groups.setdefault(round(row[other], 2), []).append(row)
    panels = {value: part for value, part in sorted(groups.items()) if len({round(r[x], 4) for r in part}) > 1}
    panels = panels or {float("nan"): rows}
    names = list(dict.fromkeys(row[arm_axis] for row in rows))
    width = 3.6 * len(panels) if len(panels) > 1 else 5.8
    figure = new_figure(width + 0.6, 2.9 * len(measures) + 0.6)
    grid = figure.subplots(len(measures), len(panels), squeeze=False, sharex=True, sharey="row")
    for line, measure in zip(grid, measures, strict=True):
        line[0].set_ylabel(_NAMES[measure])
        for axes, (value, part) in zip(line, panels.items(), strict=True):
            _lines(axes, {name: [row for row in part if row[arm_axis] == name] for name in names}, x, measure)
            if len(panels) > 1:
                axes.set_title(f"{value:g} {'pruned' if other == 'sparsity' else 'bits per weight'}", fontsize="small")
    for axes in grid[-1]:
        axes.set_xlabel(_X[x])
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside upper left", ncols=4, fontsize="small")
    return inline_svg(figure, x)


def _lines(axes: Axes, arms: Mapping[str, Rows], x: str, measure: str) -> None:
    """A line with its interval for each arm; an arm without points keeps its colour."""
    for number, (name, rows) in enumerate(arms.items()):
        part = sorted((row for row in rows if is_number(row.get(measure))), key=lambda row: float(row[x]))
        color, marker = _COLORS[number % len(_COLORS)], _MARKERS[number % len(_MARKERS)]
        points: list[tuple[float, float]] = []
        for row in part:
            if points and points[-1][0] == row[x]:  # two bases at one x: a gap, no line from one to the other
                points.append((row[x], math.nan))
            points.append((row[x], row[measure]))
        axes.plot(*zip(*points, strict=True) if points else ([], []), marker=marker, ms=4, color=color, label=name)
        ends = np.array([[r[x], r[f"{measure}_lower"], r[f"{measure}_upper"]] for r in part], dtype=float)
        if len(ends):  # an unknown end leaves a gap
            axes.fill_between(ends[:, 0], ends[:, 1], ends[:, 2], color=color, alpha=0.15, lw=0)
    axes.grid(alpha=0.3)


def _pareto(rows: Rows, report: Report) -> str:
    figure = new_figure(6.4, 3.8)
    axes = figure.add_subplot()
    rows = [row for row in rows if report.metric in row]
    for number, name in enumerate(dict.fromkeys(row[report.arm_axis] for row in rows)):
        part = [row for row in rows if row[report.arm_axis] == name]
        style: dict[str, Any] = {"color": _COLORS[number % len(_COLORS)], "marker": _MARKERS[number % len(_MARKERS)]}
        axes.scatter([r["total_mib"] for r in part], [r[report.metric] for r in part], label=name, s=24, **style)
    best = sorted((row["total_mib"], row[report.metric]) for row in rows if row["pareto"])
    axes.step(*zip(*best, strict=True), where="post", color="#777777", lw=1, label="none better in fewer bytes")
    if not HIGHER_IS_BETTER[report.metric]:
        axes.invert_yaxis()  # better is up, whatever the metric
    axes.set_xlabel("base and adapter, MiB")
    axes.set_ylabel(report.metric_label)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    return inline_svg(figure, "pareto")


def _layers(rows: Rows, axes_names: Sequence[str]) -> str:
    figure = new_figure(6.4, 3.4)
    axes = figure.add_subplot()
    groups: dict[str, list[float]] = {}
    for row in rows:
        if is_number(row.get("relative_error")):
            groups.setdefault(", ".join(str(row[axis]) for axis in axes_names), []).append(row["relative_error"])
    for number, (name, errors) in enumerate(groups.items()):
        axes.plot(range(len(errors)), errors, lw=1, color=_COLORS[number % len(_COLORS)], label=name)
    axes.set_xlabel("layer, in model order")
    axes.set_ylabel("relative error of the weight")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    return inline_svg(figure, "layers")
