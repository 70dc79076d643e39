"""The figures of a study's report, each drawn twice: as wide as a page, and as wide as a telephone."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from qdora.files.svg_figure import new_figure, svg_text
from qdora.study.dot_figure import Dots, Panel, dot_figure
from qdora.study.figure_style import COLORS, NARROW, SHADE, STROKES, WIDE, legend, styles_of
from qdora.study.report_contents import Naming, Report, Row, Rows, is_number, naming
from qdora.study.scores import HIGHER_IS_BETTER

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.transforms import BboxBase

_PAIR = ("arm", "reference")
_MOST_ROWS, _MOST_PANELS = 40, 12
_SPARSE = 0.005
"""A base with a greater share of zeros was pruned."""
_OTHER_SIZE = 1.01
"""Arms whose bytes are closer than this are not drawn by their bytes."""


@dataclass(frozen=True)
class Drawn:
    """A figure in both sizes, as SVG, and the sentence below it."""

    title: str
    note: str
    wide: str
    narrow: str


def draw_all(report: Report) -> list[Drawn]:
    """Every figure that the study has points for, the answer first.

    Adapters with their magnitudes set back are in none, and transplants only beside what training left: they have the
    names of trained arms.
    """
    made: list[tuple[str, str, Callable[[bool], Figure] | None]] = [
        (*_forest_words(report), _forest(report)),
        ("What is left of the damage", _left_words(report), _damage_left(report)),
        ("Right choices", _CHOICE, _choices(report)),
        ("Quality and bytes", _bytes_words(report), _pareto(report)),
        ("Learning curves", "Training loss, averaged over the seeds.", _learning_curves(report)),
        ("Where in depth", _depth_words(report), _depth(report)),
        ("Magnitudes and directions", _CHANGES, _changes(report)),
        ("Error of the weights", "Relative error by the kind of layer, averaged over the blocks.", _layers(report)),
    ]
    return [
        Drawn(title, note, svg_text(draw(True)), svg_text(draw(False)))
        for title, note, draw in made
        if draw is not None
    ]


_CHOICE = (
    "Share of questions whose right choice is the likeliest one per character: of bases without training, with "
    "intervals over the examples, and of trained arms, with intervals over the seeds. Choice: a guess."
)
_CHANGES = (
    "Each dot is a layer of a trained arm: how far its rows turned (1 - cosine) and how much their length changed, "
    "averaged over its rows and the seeds."
)


def _forest_words(report: Report) -> tuple[str, str]:
    better = "Right" if HIGHER_IS_BETTER[report.compare.metric] else "Left"
    rows = [row for row in report.tables["comparisons"] if row["measure"] == report.compare.metric]
    arms = {row["arm"] for row in rows}
    arm = arms.pop() if len(arms) == 1 else "the arm"
    reference = rows[0]["reference"] if rows else "the reference"
    said = f"{better} of 0: {arm} is better than {reference}. Small dots: single seeds. Bars: 95 % t intervals"
    if any(row["num_seeds"] < report.compare.min_seeds for row in rows):
        said += "; an arrow where one of too few seeds for a verdict goes on"
    said += ". Shaded: the zone within which arms are equivalent."
    if any(row["role"] == "primary" for row in rows):
        said += " Squares: primary comparisons."
    if len({row["num_seeds"] for row in rows}) > 1:
        said += " Where seeds were added, only the first ones tell the spread, so a bar can be wider than its dots."
    return "Differences between the arms", said


def _forest(report: Report) -> Callable[[bool], Figure] | None:
    rows = [row for row in report.tables["comparisons"] if row["measure"] == report.compare.metric]
    if not rows:
        return None
    rows.sort(key=lambda row: row["role"] != "primary")
    named = naming(rows, report.axes)
    sign = 1.0 if HIGHER_IS_BETTER[report.compare.metric] else -1.0
    several = len({row["arm"] for row in rows}) > 1
    found: dict[str, list[Dots]] = {}
    for row in rows[:_MOST_ROWS]:
        where = named(row)
        label = row["comparison"] if not where else f"{row['arm']}: {where}" if several else where
        lower, upper = sorted((sign * row["lower"], sign * row["upper"]))
        seeds = [sign * float(text.rpartition(": ")[2]) for text in row["seed_improvements"].split("; ")]
        is_few, value = row["num_seeds"] < report.compare.min_seeds, sign * row["improvement"]
        dots = Dots(row["role"], value, lower, upper, seeds=seeds, may_be_cut=is_few)
        found.setdefault(label, []).append(dots)
    arm = "arm" if several else rows[0]["arm"]
    panel = Panel(f"{arm} − {rows[0]['reference']}, {report.metric_label}", found, zone=rows[0]["zone"], with_zero=True)
    styles = {"primary": ("#000000", "s"), "exploratory": (COLORS[0], "o")}
    return lambda wide: dot_figure([panel], styles, wide)


def _left_words(report: Report) -> str:
    said = "How much worse each arm trained on this base is than trained on the uncompressed base. 0: all is repaired. "
    if any(is_number(row.get("transplant")) for row in report.tables["repair"]):
        said += "Hollow (moved): trained on the uncompressed base and moved to this one without further training. "
    if _guesses_beyond(report):
        said += "Unigram and uniform: models that know nothing reach this. "
    return said + f"Bars: 95 % t intervals over the seeds. Shaded: at most {report.compare.zone:g} is left."


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
    styles = _styles(report)
    styles |= {f"{arm}, moved": style for arm, style in styles.items()}

    def label(row: Row) -> str:
        size = f"{row['sparsity']:.0%}" if row["sparsity"] > _SPARSE else f"{row['bits_per_weight']:.1f} bits"
        return f"{named(row)} ({size})"

    for is_pruned, title in ((False, "quantised, by bits per weight"), (True, "pruned, by sparsity")):
        part = [row for row in rows if (row["sparsity"] > _SPARSE) == is_pruned]
        found: dict[str, list[Dots]] = {label(row): [] for row in sorted(part, key=_by_size_and_damage)}
        for row in part:
            arm = row[report.compare.arm]
            for which, name in (("transplant", f"{arm}, moved"), ("left", arm)):
                if is_number(row.get(which)):
                    lower, upper = row[f"{which}_lower"], row[f"{which}_upper"]
                    found[label(row)].append(Dots(name, row[which], lower, upper, is_hollow=which == "transplant"))
        if found:
            worse = f"worse than on the uncompressed base, {report.metric_label}"
            panels.append(Panel(worse, found, marks, report.compare.zone, title, with_zero=True, tells_values=True))
    return lambda wide: dot_figure(panels, styles, wide)


def _by_size_and_damage(row: Row) -> tuple[float, float, float]:
    return round(row["sparsity"], 2), -round(row["bits_per_weight"], 1), row["left"]


def _choices(report: Report) -> Callable[[bool], Figure] | None:
    rows = [row for row in _bases_and_trained(report) if is_number(row.get("acc_norm"))]
    if not rows:
        return None
    asked = {row[which] for row in report.tables["comparisons"] if row["role"] == "primary" for which in _PAIR}
    rows = [row for row in rows if row["kind"] == "base" or not asked or row[report.compare.arm] in asked]
    named = naming(rows, report.axes)
    found: dict[str, list[Dots]] = {}
    for row in sorted(rows, key=lambda row: -row.get("bits_per_weight", 0.0) + 100 * row.get("sparsity", 0.0)):
        dots = Dots(row[report.compare.arm], row["acc_norm"], row["acc_norm_lower"], row["acc_norm_upper"])
        name = named(row) or ("uncompressed" if row["is_dense"] else "base of the recipe")
        found.setdefault(name, []).append(dots)
    marks = {row["guess"]: row["acc"] for row in report.tables["guesses"] if "acc" in row}
    panel = Panel("accuracy per character", dict(list(found.items())[:_MOST_ROWS]), marks)
    styles = _styles(report)
    return lambda wide: dot_figure([panel], styles, wide)


def _guesses_beyond(report: Report) -> dict[str, float]:
    """Guesses, less the NLL of the reference trained on the uncompressed base; {} without such an arm."""
    own = [row for row in _trained(report) if row[report.compare.arm] == report.compare.reference]
    dense = [row for row in own if row["is_dense"] and "nll_per_token" in row]
    if not dense or report.compare.metric != "nll_per_token":
        return {}
    known = {row["guess"]: row["nll"] for row in report.tables["guesses"] if "nll" in row}
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
    return lambda wide: dot_figure([panel], styles_of(names), wide)


def _learning_curves(report: Report) -> Callable[[bool], Figure] | None:
    rows = report.tables["curves"]
    if not rows:
        return None
    named = naming(rows, report.axes)
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for row in rows:
        lines = panels.setdefault(named(row), {})
        lines.setdefault(row[report.compare.arm], []).append((row["step"], row["training_loss"]))
    several = {title: lines for title, lines in panels.items() if len(lines) > 1}
    panels = dict(list((several or panels).items())[:_MOST_PANELS])
    labels = ("optimizer step", "training loss, nats per token")
    styles = _styles(report)
    return lambda wide: _line_figure(panels, styles, labels, wide, same_scale=True)


def _depth_words(report: Report) -> str:
    blocks, changes = report.tables["blocks"], report.tables["changes"]
    parts = []
    if any("relative_error" in row for row in blocks):
        parts.append("the relative error of the hidden states of untrained bases")
    if any("block_off" in row for row in blocks):
        parts.append("the rise of the NLL without the adapter of one block")
    if any(is_number(row.get("error_undone")) for row in changes):
        parts.append("the share of the compression error that the update takes back")
    return f"By block: {'; '.join(parts)}. Colours: bases.{' Kinds of line: arms.' if changes else ''}"


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
    of_arm = replace(named, axes=(*named.axes, report.compare.arm))
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
                looks.add(naming_of_part(row), named(row), row.get(report.compare.arm))
    return lambda wide: _line_figure(panels, looks.styles, ("block", ""), wide, looks=looks)


class _Looks:
    """Lines whose colours are bases and whose strokes are arms.

    Attributes:
        styles: Name of a line -> colour and marker.
        strokes: Name of a line -> its stroke.
    """

    def __init__(self, bases: Sequence[str]) -> None:
        self._of_base = styles_of(bases)
        self._of_arm: dict[str, str] = {}
        self.styles: dict[str, tuple[str, str]] = {}
        self.strokes: dict[str, str] = {}

    def add(self, line: str, base: str, arm: str | None) -> None:
        """A line of a base: untrained, or of an arm."""
        self.styles[line] = self._of_base[base]
        if arm is not None:
            self.strokes[line] = self._of_arm.setdefault(arm, STROKES[len(self._of_arm) % len(STROKES)])

    def legend(self) -> dict[str, dict[str, Any]]:
        """Base, then arm -> the look that the legend explains."""
        used = [base for base, style in self._of_base.items() if base and style in self.styles.values()]
        bases = {base: dict(zip(("color", "marker"), self._of_base[base], strict=True)) for base in used}
        return bases | {arm: {"color": SHADE, "ls": stroke} for arm, stroke in self._of_arm.items()}


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
        which = (named(row), row[report.compare.arm], row["layer"])
        layers.setdefault(which, []).append((row["direction_change"], row["magnitude_change"]))
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for (base, arm, _), pairs in layers.items():
        direction, magnitude = np.mean(pairs, axis=0)
        panels.setdefault(base, {}).setdefault(arm, []).append((float(direction), float(magnitude)))
    labels = ("change of the direction", "change of the magnitude")
    return lambda wide: _line_figure(panels, _styles(report), labels, wide, joined=False)


def _bytes_words(report: Report) -> str:
    rows = _sized(report)
    said = "Trained arms; better is up. The line joins arms that no other one beats in fewer bytes. "
    if any("pareto" not in row for row in rows):
        said += "Hollow: arms that lack seeds, so that they were scored on other examples; the line leaves them out. "
    if any(row["sparsity"] > _SPARSE for row in rows):
        said += "Pruning saves no bytes here, since the zeros are stored. "
    return said + "Embeddings stay as they are."


def _sized(report: Report) -> Rows:
    return [row for row in _trained(report) if "total_mib" in row and report.compare.metric in row]


def _pareto(report: Report) -> Callable[[bool], Figure] | None:
    rows = _sized(report)
    sizes = [row["total_mib"] for row in rows]
    if not rows or max(sizes) < _OTHER_SIZE * min(sizes):
        return None
    named = naming(rows, report.axes)

    def draw(wide: bool) -> Figure:
        figure = new_figure(WIDE if wide else NARROW, 4.4 if wide else 4.0)
        axes = figure.add_subplot()
        drawn: dict[str, Any] = {}
        for name, (color, marker) in _styles(report).items():
            for is_ranked in (False, True):
                own = [row for row in rows if row[report.compare.arm] == name and ("pareto" in row) == is_ranked]
                x, y = [row["total_mib"] for row in own], [row[report.compare.metric] for row in own]
                if own:
                    face = color if is_ranked else "none"
                    drawn[name] = axes.scatter(x, y, s=24, edgecolors=color, facecolors=face, marker=marker)
        best = sorted((row["total_mib"], row[report.compare.metric]) for row in rows if row.get("pareto"))
        axes.step(*zip(*best, strict=True), where="post", color=SHADE, lw=1)
        if not HIGHER_IS_BETTER[report.compare.metric]:
            axes.invert_yaxis()
        axes.set_xlabel("base and adapter, MiB")
        axes.set_ylabel(report.metric_label)
        axes.grid(alpha=0.3)
        legend(figure, drawn, wide)
        _name_points(axes, {named(row): (row["total_mib"], row[report.compare.metric]) for row in reversed(rows)})
        return figure

    return draw


def _name_points(axes: Axes, points: Mapping[str, tuple[float, float]]) -> None:
    """Write the names beside the points, towards the middle; one that would cover another goes below it."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()  # which decides where the points are
    whole = axes.get_window_extent()
    placed: list[BboxBase] = []
    for name, point in sorted(points.items(), key=lambda each: -axes.transData.transform(each[1])[1]):
        is_right = axes.transData.transform(point)[0] > (whole.x0 + whole.x1) / 2
        aside = -12 if is_right else 12
        style: dict[str, Any] = {"ha": "right" if is_right else "left", "va": "center", "fontsize": "x-small"}
        style["bbox"] = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}  # the line of the best arms runs behind
        offset: dict[str, Any] = {"textcoords": "offset points", "in_layout": False}
        note = axes.annotate(name, point, (aside, 0), **offset, **style)
        box, down = note.get_window_extent(), 0
        while any(box.translated(0, -down * figure.dpi / 72).overlaps(other) for other in placed):
            down += 1
        placed.append(box.translated(0, -down * figure.dpi / 72))
        note.set_position((aside, -down))
        if down:
            to_point = {"arrowstyle": "-", "lw": 0.5, "color": SHADE, "shrinkA": 0, "shrinkB": 4}
            axes.annotate("", point, (aside, -down), arrowprops=to_point, **offset)


def _bases_and_trained(report: Report) -> Rows:
    return [row for row in report.tables["arms"] if row["kind"] in ("base", "trained")]


def _trained(report: Report) -> Rows:
    return [row for row in report.tables["arms"] if row["kind"] == "trained"]


def _identity(row: Row, report: Report) -> tuple[Any, ...]:
    return (*(row.get(axis) for axis in report.axes), row[report.compare.arm])


def _styles(report: Report) -> dict[str, tuple[str, str]]:
    """Arm -> colour and marker, the same in all figures."""
    rows = _bases_and_trained(report)
    names = dict.fromkeys(row[report.compare.arm] for row in rows if row["kind"] == "trained")
    names |= dict.fromkeys(row[report.compare.arm] for row in rows)
    return styles_of(list(names))


def _line_figure(
    panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]],
    styles: Mapping[str, tuple[str, str]],
    labels: tuple[str, str],
    wide: bool,
    *,
    joined: bool = True,
    same_scale: bool = False,
    looks: _Looks | None = None,
) -> Figure:
    """Title -> name -> points; three panels beside one another if wide, else one below the other."""
    across = min(3, len(panels)) if wide else 1
    down = -(-len(panels) // across)
    figure = new_figure(WIDE if wide else NARROW, 2.9 * down + 0.6)
    grid = figure.subplots(down, across, squeeze=False, sharey=same_scale).ravel()
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
        axes.locator_params(axis="x", nbins=5)  # labels such as 0.0012 are long
        axes.grid(alpha=0.3)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    grid[0].set_ylabel(labels[1])
    if looks is not None:
        drawn = {name: grid[0].plot([], [], ms=3, lw=1.3, **look)[0] for name, look in looks.legend().items()}
    legend(figure, drawn, wide)
    return figure
