"""The figures of a study's report: differences between the arms, what is left of the damage, learning curves."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd

from qdora.files.pages import new_figure, svg_text
from qdora.study.grid import CompareConfig

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = Mapping[str, Any]
Rows = list[dict[str, Any]]

LABELS = {
    "nll_per_token": "NLL (nats per token)",
    "acc": "accuracy",
    "acc_norm": "accuracy per character",
}
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")
_MARKERS = "osD^vPX*"
_WIDTH, _ROW = 9.0, 0.33  # inches


@dataclass(frozen=True)
class Drawn:
    """A figure as SVG, and the sentence below it."""

    title: str
    note: str
    svg: str


def draw_all(tables: Mapping[str, Rows], axes: Sequence[str], compare: CompareConfig) -> list[Drawn]:
    """Every figure that the tables have rows for."""
    pairs = [row for row in tables["comparisons"] if row["measure"] == compare.metric]
    left = [row for row in tables["repair"] if "left" in row]
    figures = []
    if pairs:
        note = "Right of 0: the arm is better. Large: mean with its 95 % t interval; squares are primary comparisons. "
        note += "Small: seeds. Shaded: the zone of equivalence; the scale is linear there and logarithmic outside."
        figures.append(Drawn("Differences between the arms", note, svg_text(_differences(pairs, axes, compare))))
    if left:
        note = "How much worse each arm is than the same arm trained on the uncompressed base. Hollow: the adapter of "
        note += "the uncompressed base, without training on this one. Bars, shade and scale as above."
        figures.append(Drawn("Damage and repair", note, svg_text(_damage(left, axes, compare))))
    if tables["curves"]:
        note = "Training loss, averaged over the seeds."
        figures.append(Drawn("Learning curves", note, svg_text(_curves(tables["curves"], axes, compare))))
    return figures


def _differences(rows: Rows, axes: Sequence[str], compare: CompareConfig) -> Figure:
    figure, axis = _row_figure(len(rows), compare.zone, 1.0)
    where, labels = _naming(rows, axes), []
    for y, row in enumerate(rows):
        color, marker = ("#000000", "s") if row["role"] == "primary" else (_COLORS[0], "o")
        seeds = [float(text.rpartition(": ")[2]) for text in row["seed_improvements"].split("; ")]
        axis.plot(seeds, [y + 0.3] * len(seeds), ".", ms=4, color=color, alpha=0.6)
        _dot(axis, row, "improvement", y, color=color, marker=marker)
        labels.append(", ".join(filter(None, (row["comparison"], where(row)))))
    axis.set_yticks(range(len(rows)), labels, fontsize="small")
    axis.set_xlabel(f"improvement, {LABELS[compare.metric]}")
    # Intervals of too few seeds for a verdict may leave the figure
    sure = [row for row in rows if row["num_seeds"] >= compare.min_seeds] or rows
    ends = [row[end] for row in sure for end in ("lower", "upper") if math.isfinite(row[end])]
    values = [*ends, *(row["improvement"] for row in rows), -2 * compare.zone, 2 * compare.zone]
    axis.set_xlim(1.1 * min(values), 1.1 * max(values))
    return figure


def _damage(rows: Rows, axes: Sequence[str], compare: CompareConfig) -> Figure:
    where, arms = _naming(rows, axes), list(dict.fromkeys(row[compare.arm] for row in rows))
    bases: dict[str, Rows] = {}
    for row in sorted(rows, key=lambda row: row["left"]):
        bases.setdefault(where(row), []).append(row)
    figure, axis = _row_figure(len(bases) * max(1.0, max(map(len, bases.values())) / 4), compare.zone, 0.5)
    drawn: dict[str, Any] = dict.fromkeys(arms)
    places = [
        (base + 0.8 * ((index + 0.5) / len(own) - 0.5), row)
        for base, own in enumerate(bases.values())
        for index, row in enumerate(own)
    ]
    for y, row in places:
        index = arms.index(row[compare.arm])
        color, marker = _COLORS[index % len(_COLORS)], _MARKERS[index % len(_MARKERS)]
        if "transplant" in row:
            _dot(axis, row, "transplant", y, color=color, marker=marker, mfc="white")
        drawn[arms[index]] = _dot(axis, row, "left", y, color=color, marker=marker)
    axis.set_yticks(range(len(bases)), list(bases), fontsize="small")
    axis.set_xlabel(f"worse than on the uncompressed base, {LABELS[compare.metric]}")
    figure.legend(drawn.values(), drawn.keys(), loc="outside upper left", ncols=4, fontsize="small")
    return figure


def _curves(rows: Rows, axes: Sequence[str], compare: CompareConfig) -> Figure:
    where, arms = _naming(rows, axes), list(dict.fromkeys(row[compare.arm] for row in rows))
    panels = pd.DataFrame([row | {"where": where(row)} for row in rows]).groupby("where", sort=False)
    across = min(3, len(panels))
    down = -(-len(panels) // across)
    figure = new_figure(_WIDTH, 2.6 * down + 0.6)
    grid = figure.subplots(down, across, squeeze=False, sharey=True).ravel()
    drawn: dict[Any, Any] = {}
    for axis, (title, panel) in zip(grid, panels, strict=False):
        for arm, line in panel.groupby(compare.arm, sort=False):
            color = _COLORS[arms.index(arm) % len(_COLORS)]
            (drawn[arm],) = axis.plot(line["step"], line["training_loss"], lw=1.3, color=color)
        axis.set_title(title, fontsize="small")
        axis.set_xlabel("optimizer step")
        axis.grid(alpha=0.3)
    for axis in grid[len(panels) :]:
        axis.set_visible(False)
    grid[0].set_ylabel("nats per token")
    figure.legend(drawn.values(), drawn.keys(), loc="outside upper left", ncols=4, fontsize="small")
    return figure


def _row_figure(num_rows: float, zone: float, decades: float) -> tuple[Figure, Axes]:
    """Rows over an axis that is linear from 0 to the zone, as long as so many decades, and logarithmic outside."""
    figure = new_figure(_WIDTH, _ROW * num_rows + 1.2)
    axis = figure.add_subplot()
    axis.set_xscale("symlog", linthresh=zone, linscale=decades)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.axvspan(-zone, zone, color="#777777", alpha=0.2, lw=0)
    axis.axvline(0.0, color="#777777", lw=1)
    axis.grid(alpha=0.3, axis="x")
    axis.margins(y=0.02)
    axis.invert_yaxis()
    return figure, axis


def _dot(axis: Axes, row: Row, column: str, y: float, **style: Any) -> Any:
    """A value with its interval; the ends are nan with one seed."""
    lower, upper = (row.get(f"{column}_{end}", row.get(end)) for end in ("lower", "upper"))
    axis.plot([lower, upper], [y, y], color=style["color"], lw=2, alpha=0.6)
    return axis.plot([row[column]], [y], ls="none", **style)[0]


def _naming(rows: Rows, axes: Sequence[str]) -> Callable[[Row], str]:
    """Names a context by the axes on which the rows differ."""
    differing = [axis for axis in axes if len({row.get(axis, "") for row in rows} - {""}) > 1] or axes[:1]
    return lambda row: ", ".join(row[axis] for axis in differing if row.get(axis))
