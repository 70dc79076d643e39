"""The figures of a study's report, each drawn twice: as wide as a page, and as wide as a telephone."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from qdora.files.svg_figure import new_figure, svg_text
from qdora.study.report_contents import Naming, Report, Row, Rows, is_number, naming
from qdora.study.scores import HIGHER_IS_BETTER

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")
_MARKERS = "osD^vPX*"
_STROKES = ("-", "--", ":", "-.")
_SHADE = "#777777"
_WIDE, _NARROW = 11.0, 4.0  # inches: at 10 points, letters have about 13 pixels on a page and on a telephone
_PAIR = ("arm", "reference")
_ROW = 0.34
_MOST_ROWS, _MOST_PANELS = 40, 12
_FAR = 1.25
"""An axis is broken where a gap is so many times as wide as the part on its side with more values."""


@dataclass(frozen=True)
class Drawn:
    """A figure in both sizes, as SVG, and the sentence below it."""

    title: str
    note: str
    wide: str
    narrow: str


@dataclass(frozen=True)
class Dots:
    """One dot of a row with its interval (nan without ends), and small dots of the seeds.

    may_be_cut: The axis need not hold the interval; an arrow then shows that it goes on.
    """

    name: str
    value: float
    lower: float = math.nan
    upper: float = math.nan
    seeds: Sequence[float] = ()
    may_be_cut: bool = False


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


def draw_all(report: Report) -> list[Drawn]:
    """Every figure that the study has points for, the answer first.

    Transplants, and adapters with their magnitudes set back, are in none: they have the names of trained arms.
    """
    made: list[tuple[str, str, Callable[[bool], Figure] | None]] = [
        (*_forest_words(report), _forest(report)),
        ("What is left of the damage", _LEFT, _damage_left(report)),
        ("Choosing the right answer", _CHOICE, _choices(report)),
        ("Quality and bytes", _BYTES, _pareto(report)),
        ("Learning curves", "Training loss, averaged over the seeds.", _learning_curves(report)),
        ("Where in depth", _DEPTH, _depth(report)),
        ("Magnitudes and directions", _CHANGES, _changes(report)),
        ("Error of the weights", "Relative error by the kind of layer, averaged over the blocks.", _layers(report)),
    ]
    return [
        Drawn(title, note, svg_text(draw(True)), svg_text(draw(False)))
        for title, note, draw in made
        if draw is not None
    ]


_LEFT = (
    "How much worse each trained arm is than the same arm trained on the uncompressed base, with 95 % t intervals over "
    "the seeds. 0: all damage is repaired. Unigram and uniform: models that know nothing reach this."
)
_BYTES = (
    "Trained arms; better is up. The line joins arms that no other one beats in fewer bytes. Hollow: arms that lack "
    "seeds, so that they were scored on other examples; the line leaves them out."
)
_CHOICE = (
    "NLL of the right choice among a question's choices: of bases without training, with intervals over the examples, "
    "and of trained arms, with intervals over the seeds. Above chance: wrong choices are preferred too confidently."
)
_DEPTH = (
    "By block: the relative error of the hidden states of untrained bases, and, where the study measures it, the rise "
    "of the NLL without the adapter of one block and the share of the compression error that the update takes back. "
    "Colours: bases. Kinds of line: arms."
)
_CHANGES = (
    "Each dot is a layer of a trained arm: how far its rows turned (1 - cosine) and how much their length changed, "
    "averaged over its rows and the seeds."
)


def _forest_words(report: Report) -> tuple[str, str]:
    better = "right" if HIGHER_IS_BETTER[report.metric] else "left"
    title = "Differences between the arms"
    return title, (
        f"{report.metric_label}: to the {better} of 0 the arm is better than the reference (a positive improvement). "
        "Small dots: single seeds. Bars: 95 % t intervals; where there are too few seeds for a verdict, an arrow says "
        "that the interval is longer than the figure. Shaded: the zone within which arms are equivalent. Squares: "
        "primary comparisons."
    )


def _forest(report: Report) -> Callable[[bool], Figure] | None:
    rows = [row for row in report.tables["comparisons"] if row["measure"] == report.metric]
    if not rows:
        return None
    rows.sort(key=lambda row: row["role"] != "primary")
    named = naming(rows, report.axes)
    sign = 1.0 if HIGHER_IS_BETTER[report.metric] else -1.0
    several = len({row["arm"] for row in rows}) > 1
    (least,) = (row["value"] for row in report.tables["facts"] if row["fact"] == "least seeds")
    found: dict[str, list[Dots]] = {}
    for row in rows[:_MOST_ROWS]:
        where = named(row)
        label = row["comparison"] if not where else f"{row['arm']}: {where}" if several else where
        lower, upper = sorted((sign * row["lower"], sign * row["upper"]))
        seeds = [sign * float(text.rpartition(": ")[2]) for text in row["seed_improvements"].split("; ")]
        is_few, value = row["num_seeds"] < least, sign * row["improvement"]
        dots = Dots(row["role"], value, lower, upper, seeds=seeds, may_be_cut=is_few)
        found.setdefault(label, []).append(dots)
    arm = "arm" if several else rows[0]["arm"]
    panel = Panel(f"{arm} − {rows[0]['reference']}, {report.metric_label}", found, zone=rows[0]["zone"], with_zero=True)
    styles = {"primary": ("#000000", "s"), "exploratory": (COLORS[0], "o")}
    return lambda wide: _dot_figure([panel], styles, wide)


def _damage_left(report: Report) -> Callable[[bool], Figure] | None:
    """Against bits, of bases that are not pruned, and against sparsity, of all pruned ones."""
    sizes = {_identity(row, report): row for row in _trained(report)}
    rows = [
        row | {name: sizes[_identity(row, report)][name] for name in ("bits_per_weight", "sparsity")}
        for row in report.tables["repair"]
        if is_number(row.get("left")) and "sparsity" in sizes.get(_identity(row, report), {})
    ]
    if not rows:
        return None
    named = naming(rows, report.axes)
    panels = []
    marks = _guesses_beyond(report)
    for is_pruned, title in ((False, "quantised, by bits per weight"), (True, "pruned, by sparsity")):
        found: dict[str, list[Dots]] = {}
        part = [row for row in rows if (row["sparsity"] > 0.005) == is_pruned]
        for row in sorted(part, key=lambda row: (row["sparsity"], -row["bits_per_weight"], named(row))):
            size = f"{row['bits_per_weight']:.1f} bits" if not is_pruned else f"{row['sparsity']:.0%}"
            dots = Dots(row[report.arm_axis], row["left"], row["left_lower"], row["left_upper"])
            found.setdefault(f"{named(row)} ({size})", []).append(dots)
        if found:
            label = f"damage left, {report.metric_label}"
            panels.append(Panel(label, found, marks, title=title, with_zero=True, tells_values=True))
    styles = _styles(report)
    return lambda wide: _dot_figure(panels, styles, wide)


def _choices(report: Report) -> Callable[[bool], Figure] | None:
    rows = [row for row in _bases_and_trained(report) if is_number(row.get("choice_nll"))]
    if not rows:
        return None
    asked = {row[which] for row in report.tables["comparisons"] if row["role"] == "primary" for which in _PAIR}
    rows = [row for row in rows if row["kind"] == "base" or not asked or row[report.arm_axis] in asked]
    named = naming(rows, report.axes)
    found: dict[str, list[Dots]] = {}
    for row in sorted(rows, key=lambda row: -row.get("bits_per_weight", 0.0) + 100 * row.get("sparsity", 0.0)):
        dots = Dots(row[report.arm_axis], row["choice_nll"], row["choice_nll_lower"], row["choice_nll_upper"])
        found.setdefault(named(row) or "uncompressed", []).append(dots)
    known = {row["guess"]: row["nll"] for row in report.tables["guesses"]}
    marks = {"chance": known["choice"]} if "choice" in known else {}
    panel = Panel(
        "NLL among the choices, nats a question", dict(list(found.items())[:_MOST_ROWS]), marks, with_zero=True
    )
    styles = _styles(report)
    return lambda wide: _dot_figure([panel], styles, wide)


def _guesses_beyond(report: Report) -> dict[str, float]:
    """Guesses, less the NLL of the reference trained on the uncompressed base; {} without such an arm."""
    (reference,) = (row["text"] for row in report.tables["facts"] if row["fact"] == "reference")
    own = [row for row in _trained(report) if row[report.arm_axis] == reference]
    dense = [row for row in own if row["is_dense"] and "nll_per_token" in row]
    if not dense or report.metric != "nll_per_token":
        return {}
    known = {row["guess"]: row["nll"] for row in report.tables["guesses"]}
    return {name: known[name] - dense[0]["nll_per_token"] for name in ("unigram", "uniform") if name in known}


def _layers(report: Report) -> Callable[[bool], Figure] | None:
    """Mean over the blocks, by the last part of the layers' names."""
    rows = [row for row in report.tables["layers"] if is_number(row.get("relative_error"))]
    if not rows:
        return None
    named = naming(rows, report.axes)
    errors: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        kind = row["layer"].rpartition(".")[2]
        errors.setdefault(named(row), {}).setdefault(kind, []).append(row["relative_error"])
    found = {
        base: [Dots(kind, float(np.mean(values))) for kind, values in kinds.items()]
        for base, kinds in list(errors.items())[:_MOST_ROWS]
    }
    panel = Panel("relative error of the weight", found, in_one_line=True)
    names = list(dict.fromkeys(dots.name for each in found.values() for dots in each))
    return lambda wide: _dot_figure([panel], _styles_of(names), wide)


def _learning_curves(report: Report) -> Callable[[bool], Figure] | None:
    rows = report.tables["curves"]
    if not rows:
        return None
    named = naming(rows, report.axes)
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for row in rows:
        lines = panels.setdefault(named(row), {})
        lines.setdefault(row[report.arm_axis], []).append((row["step"], row["training_loss"]))
    several = {title: lines for title, lines in panels.items() if len(lines) > 1}
    panels = dict(list((several or panels).items())[:_MOST_PANELS])
    labels = ("optimizer step", "training loss, nats per token")
    styles = _styles(report)
    return lambda wide: _line_figure(panels, styles, labels, wide)


def _depth(report: Report) -> Callable[[bool], Figure] | None:
    blocks = report.tables["blocks"]
    errors = [row for row in blocks if "relative_error" in row]
    off = [row for row in blocks if "block_off" in row]
    undone = [row for row in report.tables["changes"] if is_number(row.get("error_undone")) and is_number(row["block"])]
    if not errors and not off:
        return None
    compared = [row for row in report.tables["comparisons"] if row.get(report.axes[0] if report.axes else "")]
    named = naming([*errors, *off], report.axes)
    told = set(map(named, [*errors, *off]))
    # Compared bases first: there are few colors
    bases = [name for name in dict.fromkeys(map(named, [*compared, *errors, *off])) if name in told][: len(COLORS)]
    of_arm = replace(named, axes=(*named.axes, report.arm_axis))
    parts = (
        ("error of the hidden states, untrained", errors, named, "relative_error"),
        ("rise of the NLL without the block's adapter", off, of_arm, "block_off"),
        ("share of the error that the update takes back", undone, of_arm, "error_undone"),
    )
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    looks = _Looks(bases)
    for title, rows, naming_of_part, column in parts:
        shown = [row for row in rows if named(row) in bases]
        if shown:
            panels[title] = _by_block(shown, naming_of_part, column)
            for row in shown:
                looks.add(naming_of_part(row), named(row), row.get(report.arm_axis))
    return lambda wide: _line_figure(panels, looks.styles, ("block", ""), wide, looks=looks)


class _Looks:
    """Lines whose colours are bases and whose strokes are arms.

    Attributes:
        styles: Name of a line -> colour and marker.
        strokes: Name of a line -> its stroke.
    """

    def __init__(self, bases: Sequence[str]) -> None:
        self._of_base = _styles_of(bases)
        self._of_arm: dict[str, str] = {}
        self.styles: dict[str, tuple[str, str]] = {}
        self.strokes: dict[str, str] = {}

    def add(self, line: str, base: str, arm: str | None) -> None:
        """A line of a base: untrained, or of an arm."""
        self.styles[line] = self._of_base[base]
        if arm is not None:
            self.strokes[line] = self._of_arm.setdefault(arm, _STROKES[len(self._of_arm) % len(_STROKES)])

    def legend(self) -> dict[str, dict[str, Any]]:
        """Base, then arm -> the look that the legend explains."""
        used = [base for base, style in self._of_base.items() if style in self.styles.values()]
        bases = {base: dict(zip(("color", "marker"), self._of_base[base], strict=True)) for base in used}
        return bases | {arm: {"color": _SHADE, "ls": stroke} for arm, stroke in self._of_arm.items()}


def _by_block(rows: Sequence[Row], named: Naming, column: str) -> dict[str, list[tuple[float, float]]]:
    """Name -> (block, mean over layers and seeds)."""
    values: dict[str, dict[int, list[float]]] = {}
    for row in rows:
        values.setdefault(named(row), {}).setdefault(int(row["block"]), []).append(row[column])
    return {
        name: [(float(block), float(np.mean(found))) for block, found in sorted(blocks.items())]
        for name, blocks in values.items()
    }


def _changes(report: Report) -> Callable[[bool], Figure] | None:
    """Change of the magnitude against that of the direction (DoRA, arXiv 2402.09353, fig. 2)."""
    rows = report.tables["changes"]
    if not rows:
        return None
    named = naming(rows, report.axes)
    layers: dict[tuple[str, str, str], list[tuple[float, float]]] = {}
    for row in rows:
        which = (named(row), row[report.arm_axis], row["layer"])
        layers.setdefault(which, []).append((row["direction_change"], row["magnitude_change"]))
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for (base, arm, _), pairs in layers.items():
        direction, magnitude = np.mean(pairs, axis=0)
        panels.setdefault(base, {}).setdefault(arm, []).append((float(direction), float(magnitude)))
    labels = ("change of the direction", "change of the magnitude")
    return lambda wide: _line_figure(panels, _styles(report), labels, wide, joined=False)


def _pareto(report: Report) -> Callable[[bool], Figure] | None:
    rows = [row for row in _trained(report) if "total_mib" in row and report.metric in row]
    if not rows:
        return None

    def draw(wide: bool) -> Figure:
        figure = new_figure(_WIDE if wide else _NARROW, 4.4 if wide else 4.0)
        axes = figure.add_subplot()
        drawn: dict[str, Any] = {}
        for name, (color, marker) in _styles(report).items():
            for is_ranked in (False, True):
                own = [row for row in rows if row[report.arm_axis] == name and ("pareto" in row) == is_ranked]
                x, y = [row["total_mib"] for row in own], [row[report.metric] for row in own]
                if own:
                    face = color if is_ranked else "none"
                    drawn[name] = axes.scatter(x, y, s=24, edgecolors=color, facecolors=face, marker=marker)
        best = sorted((row["total_mib"], row[report.metric]) for row in rows if row.get("pareto"))
        axes.step(*zip(*best, strict=True), where="post", color=_SHADE, lw=1)
        if not HIGHER_IS_BETTER[report.metric]:
            axes.invert_yaxis()
        axes.set_xlabel("base and adapter, MiB")
        axes.set_ylabel(report.metric_label)
        axes.grid(alpha=0.3)
        _legend(figure, drawn, wide)
        return figure

    return draw


def _bases_and_trained(report: Report) -> Rows:
    return [row for row in report.tables["arms"] if row["kind"] in ("base", "trained")]


def _trained(report: Report) -> Rows:
    return [row for row in report.tables["arms"] if row["kind"] == "trained"]


def _identity(row: Row, report: Report) -> tuple[Any, ...]:
    return (*(row.get(axis) for axis in report.axes), row[report.arm_axis])


def _styles(report: Report) -> dict[str, tuple[str, str]]:
    """Arm -> colour and marker, the same in all figures."""
    rows = _bases_and_trained(report)
    names = dict.fromkeys(row[report.arm_axis] for row in rows if row["kind"] == "trained")
    names |= dict.fromkeys(row[report.arm_axis] for row in rows)
    return _styles_of(list(names))


def _styles_of(names: Sequence[str]) -> dict[str, tuple[str, str]]:
    number = len(COLORS)
    return {
        name: (COLORS[index % number], _MARKERS[(index + index // number) % len(_MARKERS)])
        for index, name in enumerate(names)
    }


def _dot_figure(panels: Sequence[Panel], styles: Mapping[str, tuple[str, str]], wide: bool) -> Figure:
    """Panels beside one another if wide, else below; an axis with far values is broken."""
    width = _label_width(wide)
    heights = [_ROW * sum(each.height(label, width) + 0.2 for label in each.rows) + 1.1 for each in panels]
    across = len(panels) if wide else 1
    height = (max(heights) if wide else sum(heights)) + 0.3
    figure = new_figure(_WIDE if wide else _NARROW, height)
    ratios = None if wide else heights
    parts = figure.subfigures(len(panels) // across, across, squeeze=False, height_ratios=ratios).ravel()
    drawn: dict[str, Any] = {}
    for part, panel in zip(parts, panels, strict=True):
        _draw_panel(part, panel, styles, drawn, wide=wide)
    if len(drawn) > 1:
        _legend(figure, drawn, wide)
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
                    where = {"xytext": (6, -3), "textcoords": "offset points", "fontsize": "x-small"}
                    end = each.upper if each.upper <= high else each.value
                    axes.annotate(f"{each.value:.3g}", (end, place + step * index), **where)
            drawn.setdefault(each.name, handle)
            _mark_cut(every, each, place + step * index, (spans[0][0], spans[-1][1]), style[0])
        place += height + 0.2
    for axes, (low, high) in zip(every, spans, strict=True):
        axes.set_xlim(low, high)
        is_far = len(spans) > 1 and not low <= np.median(values) <= high
        _set_ticks(axes, (low, high), 1 if is_far else 6 if wide else 3 if len(spans) == 1 else 2)
        axes.grid(alpha=0.3, axis="x")
        if panel.zone is not None:
            axes.axvspan(-panel.zone, panel.zone, color=_SHADE, alpha=0.2, lw=0)
        for name, value in marks.items():
            if low <= value <= high:
                axes.axvline(value, color=_SHADE, lw=1, ls="--" if name else "-", zorder=0)
                above = {"xytext": (0, 2), "textcoords": "offset points", "fontsize": "small", "rotation": 25}
                axes.annotate(name, (value, 1.0), xycoords=("data", "axes fraction"), **above)
    every[0].set_yticks(ticks, [textwrap.fill(label, width) for label in panel.rows], fontsize="small")
    every[0].set_ylim(place - 0.4, -0.8)
    _mark_breaks(every)
    part.supxlabel(textwrap.fill(panel.x_label, 2 * width + 10), fontsize="medium")
    if panel.title:
        every[0].set_title(panel.title, loc="left", fontsize="medium", pad=26 if panel.marks else 6)


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
    return axes.plot([each.value], [y], marker, ms=6, color=color, ls="none")[0]


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


def _line_figure(
    panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]],
    styles: Mapping[str, tuple[str, str]],
    labels: tuple[str, str],
    wide: bool,
    *,
    joined: bool = True,
    looks: _Looks | None = None,
) -> Figure:
    """Title -> name -> points; three panels beside one another if wide, else one below the other."""
    across = min(3, len(panels)) if wide else 1
    down = -(-len(panels) // across)
    figure = new_figure(_WIDE if wide else _NARROW, 2.9 * down + 0.6)
    grid = figure.subplots(down, across, squeeze=False).ravel()
    drawn: dict[str, Any] = {}
    for axes, (title, lines) in zip(grid, panels.items(), strict=False):
        for name, points in lines.items():
            color, marker = styles.get(name, (COLORS[0], "o"))
            stroke = "-" if looks is None else looks.strokes.get(name, "-")
            width = 1.3 if joined else 0
            (line,) = axes.plot(*zip(*points, strict=True), color=color, marker=marker, ms=3, lw=width, ls=stroke)
            drawn.setdefault(name, line)
        axes.set_title(textwrap.fill(title, 46 if wide else 40), fontsize="small")
        axes.set_xlabel(labels[0])
        axes.grid(alpha=0.3)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    grid[0].set_ylabel(labels[1])
    if looks is not None:
        drawn = {name: grid[0].plot([], [], ms=3, lw=1.3, **look)[0] for name, look in looks.legend().items()}
    _legend(figure, drawn, wide)
    return figure


def _legend(figure: Figure, drawn: Mapping[str, Any], wide: bool) -> None:
    """Above the figure, in as many columns as the longest name allows; name -> what is drawn."""
    columns = max(1, (100 if wide else 34) // (6 + max(map(len, drawn))))
    figure.legend(drawn.values(), drawn.keys(), loc="outside upper left", ncols=columns, fontsize="small")
