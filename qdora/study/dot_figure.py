"""Figures of dots with intervals, in rows over an axis that is broken where some values are far off."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from qdora.files.svg_figure import new_figure
from qdora.study.figure_style import COLORS, NARROW, SHADE, WIDE, legend

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_ROW = 0.34
_FAR = 1.25
"""An axis is broken where a gap is so many times as wide as the part on its side with more values."""


@dataclass(frozen=True)
class Dots:
    """One dot of a row with its interval (nan without ends), and small dots of the seeds.

    may_be_cut: The axis need not hold the interval; an arrow then shows that it goes on. is_hollow: The dot is
    drawn as a ring.
    """

    name: str
    value: float
    lower: float = math.nan
    upper: float = math.nan
    seeds: Sequence[float] = ()
    may_be_cut: bool = False
    is_hollow: bool = False


@dataclass(frozen=True)
class Panel:
    """Rows of dots over one axis: label -> dots; `marks` are values to compare with, `zone` is shaded around 0.

    with_zero: The axis holds 0. tells_values: Write the number beside each interval. in_one_line: The dots of a row do
    not stand below one another.
    """

    x_label: str
    rows: dict[str, list[Dots]]
    marks: dict[str, float] = field(default_factory=dict)
    zone: float | None = None
    title: str = ""
    with_zero: bool = False
    tells_values: bool = False
    in_one_line: bool = False

    def height(self, label: str, width: int) -> float:
        """Of a row, in lines: as many as its dots need, and its label."""
        dots = 1.0 if self.in_one_line else 0.6 * len(self.rows[label])
        return max(1.0, dots, 0.62 * len(textwrap.wrap(label, width)))


def dot_figure(panels: Sequence[Panel], styles: Mapping[str, tuple[str, str]], wide: bool) -> Figure:
    """Panels beside one another if wide, else below; an axis with far values is broken."""
    width = _label_width(wide)
    heights = [_ROW * sum(each.height(label, width) + 0.2 for label in each.rows) + 1.1 for each in panels]
    across = len(panels) if wide else 1
    height = (max(heights) if wide else sum(heights)) + 0.3
    figure = new_figure(WIDE if wide else NARROW, height)
    ratios = None if wide else heights
    parts = figure.subfigures(len(panels) // across, across, squeeze=False, height_ratios=ratios).ravel()
    drawn: dict[str, Any] = {}
    for part, panel in zip(parts, panels, strict=True):
        _draw_panel(part, panel, styles, drawn, wide=wide)
    if len(drawn) > 1:
        legend(figure, drawn, wide)
    return figure


def _draw_panel(
    part: Any, panel: Panel, styles: Mapping[str, tuple[str, str]], drawn: dict[str, Any], *, wide: bool
) -> None:
    """Rows from top to bottom; `drawn` gets a handle for each name."""
    width = _label_width(wide)
    dots = [each for row in panel.rows.values() for each in row]
    marks = {**({"": 0.0} if panel.with_zero else {}), **panel.marks}
    values = [value for each in dots for value in (each.value, *each.seeds)]
    values += [end for each in dots if not each.may_be_cut for end in (each.lower, each.upper) if math.isfinite(end)]
    values += [*panel.marks.values(), *([] if panel.zone is None else [-panel.zone, panel.zone])]
    spans = spans_of(values, with_zero=panel.with_zero)
    if panel.tells_values:
        low, high = spans[-1]
        spans[-1] = low, high + (0.06 if wide else 0.12) * (high - low)
    ratios = [4.0 if low <= np.median(values) <= high else 1.6 for low, high in spans]
    every = part.subplots(1, len(spans), sharey=True, squeeze=False, width_ratios=ratios)[0]
    place, ticks = 0.0, []
    for label, row in panel.rows.items():
        height = panel.height(label, width)
        step = 0.0 if panel.in_one_line else height / len(row)
        ticks.append(place + step * (len(row) - 1) / 2)
        for index, each in enumerate(row):
            style = styles.get(each.name, (COLORS[0], "o"))
            for axes, (low, high) in zip(every, spans, strict=True):
                handle = _draw_dots(axes, each, place + step * index, style)
                if panel.tells_values and low <= each.value <= high:
                    _tell_value(axes, each, place + step * index, (low, high), is_last=axes is every[-1])
            drawn.setdefault(each.name, handle)
            _mark_cut(every, each, place + step * index, (spans[0][0], spans[-1][1]), style[0])
        place += height + 0.2
    for axes, (low, high) in zip(every, spans, strict=True):
        axes.set_xlim(low, high)
        is_far = len(spans) > 1 and not low <= np.median(values) <= high
        _set_ticks(axes, (low, high), 1 if is_far else 6 if wide else 3 if len(spans) == 1 else 2)
        axes.grid(alpha=0.3, axis="x")
        if panel.zone is not None:
            axes.axvspan(-panel.zone, panel.zone, color=SHADE, alpha=0.2, lw=0)
        for name, value in marks.items():
            if low <= value <= high:
                axes.axvline(value, color=SHADE, lw=1, ls="--" if name else "-", zorder=0)
                above = {"xytext": (0, 2), "textcoords": "offset points", "fontsize": "small", "rotation": 25}
                axes.annotate(name, (value, 1.0), xycoords=("data", "axes fraction"), **above)
    every[0].set_yticks(ticks, [textwrap.fill(label, width) for label in panel.rows], fontsize="small")
    every[0].set_ylim(place - 0.4, -0.8)
    _mark_breaks(every)
    part.supxlabel(textwrap.fill(panel.x_label, 2 * width + 10), fontsize="medium")
    if panel.title:
        every[0].set_title(panel.title, loc="left", fontsize="medium", pad=26 if panel.marks else 6)


def _tell_value(axes: Axes, each: Dots, y: float, span: tuple[float, float], *, is_last: bool) -> None:
    """Write the value behind the interval, or before it where the last axis ends soon."""
    low, high = span
    end = each.upper if each.upper <= high else each.value
    is_before = is_last and end > low + 0.7 * (high - low)
    if is_before:
        end = each.lower if each.lower >= low else each.value
    where: dict[str, Any] = {"xytext": (-6 if is_before else 6, -3), "ha": "right" if is_before else "left"}
    told = f"{each.value:.3f}" if abs(each.value) < 100 else f"{each.value:.3g}"
    axes.annotate(told, (end, y), textcoords="offset points", fontsize="x-small", **where)


def _label_width(wide: bool) -> int:
    """Letters in a line of a row's label."""
    return 34 if wide else 19


def _set_ticks(axes: Axes, span: tuple[float, float], most: int) -> None:
    """Round ticks on the x axis: one, or about so many."""
    from matplotlib.ticker import MaxNLocator

    for number in (most, 3):
        ticks = MaxNLocator(number, steps=[1, 2, 5, 10]).tick_values(*span)
        inside = [float(tick) for tick in ticks if span[0] <= tick <= span[1]]
        if inside:
            break
    axes.set_xticks(inside[(len(inside) - 1) // 2 :][:1] if most == 1 else inside)


def _draw_dots(axes: Axes, each: Dots, y: float, style: tuple[str, str]) -> Any:
    color, marker = style
    if each.seeds:
        axes.plot(each.seeds, [y + 0.28] * len(each.seeds), "o", ms=2.6, color=color, alpha=0.6, mew=0)
    if math.isfinite(each.lower):
        axes.plot([each.lower, each.upper], [y, y], color=color, lw=2, alpha=0.6, solid_capstyle="butt")
    face = "white" if each.is_hollow else color
    return axes.plot([each.value], [y], marker, ms=6, color=color, mfc=face, ls="none")[0]


def _mark_cut(every: Sequence[Axes], each: Dots, y: float, limits: tuple[float, float], color: str) -> None:
    """An arrow at an end of the axis beyond which the interval goes on."""
    ends = ((every[0], 0.0, "<", each.lower < limits[0]), (every[-1], 1.0, ">", each.upper > limits[1]))
    for axes, x, marker, is_cut in ends:
        if is_cut:
            axes.plot([x], [y], marker, ms=7, color=color, clip_on=False, transform=axes.get_yaxis_transform())


def spans_of(values: Sequence[float], *, with_zero: bool = False) -> list[tuple[float, float]]:
    """The parts of an axis that shows these values: one, or two where some are far off all others.

    with_zero: The part that is nearest to 0 goes on to 0, however far that is.
    """
    ordered = sorted(values)
    whole = min(ordered[0], 0.0) if with_zero else ordered[0], max(ordered[-1], 0.0) if with_zero else ordered[-1]
    best, widest = [whole], _FAR
    for place in range(1, len(ordered)):
        halves = [ordered[:place], ordered[place:]]
        if with_zero:
            nearest = min(halves, key=lambda part: max(part[0], -part[-1]))
            nearest[:] = sorted([0.0, *nearest])
        near = max(halves, key=len)
        length, gap = near[-1] - near[0], halves[1][0] - halves[0][-1]
        if length > 0 and gap > widest * length:
            best, widest = [(half[0], half[-1]) for half in halves], gap / length
    return [_padded(low, high, best[-1][1] - best[0][0]) for low, high in best]


def _padded(low: float, high: float, whole: float) -> tuple[float, float]:
    """With some room: by the length of this part of an axis, or of the whole axis if it is a point."""
    room = 0.06 * (high - low) or 0.06 * whole or 0.06 * abs(high) or 1.0
    return low - room, high + room


def _mark_breaks(every: Sequence[Axes]) -> None:
    """Hide the border between the parts of a broken axis, and mark it by slanted strokes."""
    style: dict[str, Any] = {"marker": [(-0.5, -1), (0.5, 1)], "ms": 9, "ls": "none", "color": "k", "clip_on": False}
    for left, right in pairwise(every):
        left.spines["right"].set_visible(False)
        right.spines["left"].set_visible(False)
        right.tick_params(left=False)
        left.plot([1, 1], [0, 1], transform=left.transAxes, **style)
        right.plot([0, 0], [0, 1], transform=right.transAxes, **style)
