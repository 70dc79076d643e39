"""The report of a study: one HTML page that needs no other file, Markdown, and every number as CSV and Parquet."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from rich.console import Console

from qdora.errors import UserError
from qdora.files.atomic import atomic_write_bytes, atomic_write_text, disk_failures
from qdora.files.console import consoles
from qdora.files.html_page import render_page
from qdora.files.markdown_table import markdown_table
from qdora.files.svg_figure import new_figure, svg_text
from qdora.study.cells import equal_in_words
from qdora.study.compare import (
    BASE_ARM,
    CONFIDENCE,
    Arm,
    Results,
    comparisons,
    find_arms,
    quality,
    reference_of,
)
from qdora.study.grid import RATE, SEED, Study, in_words
from qdora.study.repair import damage_row, repair_row
from qdora.study.scores import HIGHER_IS_BETTER
from qdora.study.study_directory import StudyDirectory, read_index
from qdora.study.verdict import verdict

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Rows = list[dict[str, Any]]

_MIB = 2**20
_LABELS = {
    "nll_per_token": "NLL (nats per token)",
    "choice_nll": "NLL among the choices (nats per question)",
    "acc": "accuracy",
    "acc_norm": "accuracy per character",
}
_NAMES = {"nll_per_token": "NLL (nats per token)", "acc": "accuracy"}
_X = {"bits_per_weight": "bits per weight of the linear layers", "sparsity": "share of pruned weights"}
_PANELS = {"bits_per_weight": "sparsity", "sparsity": "bits_per_weight"}
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")
_MARKERS = "osD^vPX*"
_NOTES = {
    "arms": (
        "Arms",
        "Each arm at the learning rate that was found for it. lower, upper: 95 % t interval over the seeds; of a base "
        "over the examples. pareto: no other arm is as good in fewer bytes. Intervals of arms may overlap although the "
        "arms differ: hard examples are hard for both. The comparisons pair the seeds.",
        True,
    ),
    "comparisons": (
        "Comparisons",
        "A positive improvement is better. lower, upper: 95 % t interval over the seeds. p seeds: its t test. "
        "p examples: t test over the examples, with the seeds as they are. p holm: the larger of both, corrected for "
        "the number of primary comparisons. p equivalent: that the arms differ by the zone or more. smallest "
        "detectable: would have been found with the power of the study. Exploratory comparisons have no verdict.",
        True,
    ),
    "repair": (
        "Damage and repair",
        "damage choice: NLL of the right choice among a question's choices, less that of the uncompressed base, both "
        "untrained. perplexity: of prompts with their answers, untrained. hidden error: of the hidden states after the "
        "last block. left: trained arm against the same arm trained on the uncompressed base. transplant: the same of "
        "the adapter trained on the uncompressed base. repaired: what training on the compressed base gains on it; "
        "share: of the transplant's damage. Positive damage is worse. magnitudes: what setting them back loses.",
        True,
    ),
    "rates": (
        "Learning rates",
        "Mean validation loss of each rate that was tried, over the seeds of the search; inf: a run diverged. rate: "
        "the minimum of the parabola through the best one and its neighbours.",
        False,
    ),
    "cells": (
        "Cells",
        "One row for each run. The reason says why a run failed or diverged. equal to: other combinations of the grid "
        "with the same recipe.",
        False,
    ),
    "layers": ("Layers", "What compression did to each layer.", False),
    "changes": (
        "Changes of the weights",
        "How far training moved the rows of each layer: 1 - cosine of the directions, and the relative change of the "
        "magnitude, averaged over the rows.",
        False,
    ),
    "blocks": (
        "Blocks",
        "Relative error of the hidden states after each block, against those of the uncompressed base.",
        False,
    ),
    "facts": ("Settings and counts", "", False),
}
_DIGITS = {"bits_per_weight": 2, "total_mib": 2, "adapter_mib": 2, "sparsity": 3, "seconds": 1, "repair": 3}


def report_run(directory: Path, out: Path | None = None, *, console: Console | None = None) -> dict[str, Any]:
    """Write the report of a study, whether or not all of its cells are finished; default `directory`/report.

    Returns the page, all files, the verdict, and the comparisons. UserError: no study, or no finished cell.
    """
    _, results = consoles(console)
    report = read_report(directory)
    folder = out or directory / "report"
    with disk_failures(folder):
        files = write_report(report, folder, directory.resolve().name)
    for sentence in report.verdict:
        results.print(sentence, markup=False, highlight=False)
    results.print(f"report: {files[0]}", markup=False, highlight=False, soft_wrap=True)
    return {
        "page": str(files[0]),
        "files": [str(file) for file in files],
        "verdict": report.verdict,
        "comparisons": report.tables["comparisons"],
    }


def write_report(report: Report, directory: Path, title: str) -> list[Path]:
    """Write index.html, report.md, and each table as .csv and .parquet; returns the files."""
    directory.mkdir(parents=True, exist_ok=True)
    written = []
    for name, rows in report.tables.items():
        if not rows:
            continue
        frame = pd.DataFrame(rows)
        stream = io.BytesIO()
        frame.to_parquet(stream, index=False)
        atomic_write_text(directory / f"{name}.csv", frame.to_csv(index=False))
        atomic_write_bytes(directory / f"{name}.parquet", stream.getvalue())
        written += [directory / f"{name}.csv", directory / f"{name}.parquet"]
    shown = [_table(name, rows) for name, rows in report.tables.items() if rows]
    page = _html(report, shown, title)  # draws the figures: if that fails, no page is written
    atomic_write_text(directory / "report.md", _markdown(report, shown, title))
    atomic_write_text(directory / "index.html", page)
    return [directory / "index.html", directory / "report.md", *written]


def _table(name: str, rows: Rows) -> dict[str, Any]:
    """A table for the page: the columns of all rows, in order, without those that are empty in every row."""
    title, note, is_open = _NOTES[name]
    columns = [
        column
        for column in dict.fromkeys(key for row in rows for key in row)
        if any(_shown(column, row.get(column)) for row in rows)
    ]
    return {
        "name": name,
        "title": title,
        "note": note,
        "open": is_open,
        "header": [column.replace("_", " ") for column in columns],
        "is_text": [not any(is_number(row.get(column)) for row in rows) for column in columns],
        "rows": [[_shown(column, row.get(column)) or "–" for column in columns] for row in rows],
    }


def _shown(column: str, value: Any) -> str:
    """A value as the page shows it; numbers are those of the data file, rounded."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not is_number(value):
        return value if isinstance(value, str) else ""
    if float(value).is_integer() and (isinstance(value, int) or column == "value"):
        return f"{value:.0f}"
    digits = next((number for stem, number in _DIGITS.items() if column.startswith(stem)), 4)
    return f"{value:.{digits}f}"


def _markdown(report: Report, tables: Sequence[Mapping[str, Any]], title: str) -> str:
    parts = [f"# {title}", report.verdict[0], "\n".join(f"- {sentence}" for sentence in report.verdict[1:])]
    for table in tables:
        text = markdown_table(table["header"], table["rows"], right=[not each for each in table["is_text"]])
        parts.append(f"## {table['title']}\n\n{table['note']}\n\n{text}")
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def _html(report: Report, tables: Sequence[Mapping[str, Any]], title: str) -> str:
    facts = {"title": title, "verdict": report.verdict, "figures": draw_all(report), "tables": tables}
    return render_page("qdora.study", "report_page.html.j2", **facts)


@dataclass(frozen=True)
class Report:
    """All that a report shows; every number of its page is in one of the tables, which are named for their data files.

    `axes` are those of a context: neither compared, tuned nor seeds.
    """

    tables: dict[str, Rows]
    verdict: list[str]
    axes: list[str]
    arm_axis: str
    metric: str
    metric_label: str


def read_report(directory: Path) -> Report:
    """All tables from the finished cells of a study's directory. UserError: no study, or no finished cell."""
    index = read_index(directory)
    study = Study.model_validate(index["study"])
    compare, cells = study.compare, index["cells"]
    store = StudyDirectory(directory, retries=study.retries)
    results = Results(store, study)
    arms = find_arms(cells, results)
    if not arms:
        if any(results.diverged(cell["key"]) for cell in cells):
            raise UserError(f"{directory}: every finished cell diverged. Fix: add lower values to rates.")
        raise UserError(f"{directory}: no cell is finished yet. Fix: run 'qdora study' first.")
    reference = reference_of(arms, study)
    pairs = comparisons(arms, results, reference, _measures(arms, results))
    axes = [axis for axis in study.product if axis != compare.arm]
    arm_rows = [_arm_row(arm, axes, results) for arm in arms]
    _mark_pareto(arm_rows, compare.metric)
    cell_rows = [_cell_row(cell, list(study.product), store, results) for cell in cells]
    tables = {
        "comparisons": pairs,
        "repair": [row for arm in arms if (row := _repair_row(arm, arms, axes, results))],
        "arms": arm_rows,
        "rates": index["rates"],
        "cells": cell_rows,
        "layers": [row for cell in cells for row in _layer_rows(cell, axes, results)],
        "changes": [row for cell in cells for row in _change_rows(cell, axes, results)],
        "blocks": [row for cell in cells for row in _block_rows(cell, axes, results)],
        "facts": _facts(cell_rows, pairs, results, reference),
    }
    label = _LABELS[compare.metric]
    said = verdict(pairs, cell_rows, index["rates"], axes, label)
    waiting = sum(index["num_waiting"].values())
    if waiting:
        said.insert(1, f"{waiting} more cells wait for a learning rate or an adapter.")
    return Report(
        tables=tables,
        verdict=[*said, *filter(None, [equal_in_words(cells)])],
        axes=axes,
        arm_axis=compare.arm,
        metric=compare.metric,
        metric_label=label,
    )


def _measures(arms: Sequence[Arm], results: Results) -> list[str]:
    """The metric of the study, and what else is told of its comparisons."""
    scored = {
        measure
        for arm in arms
        for key in arm.seeds.values()
        if arm.kind == "trained" and not results.diverged(key)
        for measure in results.scores(key)
    }
    more = ("choice_nll", "right", "unparsable")
    metric = results.study.compare.metric
    return [metric, *(measure for measure in more if measure in scored and measure != metric)]


def _labels_of(labels: Mapping[str, str], axes: Sequence[str]) -> dict[str, Any]:
    """Labels on the axes; the uncompressed base has none, and no base has one on an axis that only changes training."""
    return {axis: labels.get(axis, "" if labels else "uncompressed") for axis in axes}


def _arm_row(arm: Arm, axes: Sequence[str], results: Results) -> dict[str, Any]:
    row: dict[str, Any] = _labels_of(arm.context, axes)
    row |= {results.study.compare.arm: arm.name, "kind": arm.kind, "is_trained": arm.kind == "trained"}
    row |= {"rate": arm.rate, "rate_is_interior": arm.is_interior}
    diverged = sum(map(results.diverged, arm.seeds.values()))
    row |= {"num_seeds": len(arm.seeds), "num_missing": arm.num_missing, "num_diverged": diverged}
    for measure in HIGHER_IS_BETTER:
        found = quality(arm, results, measure)
        if found is not None:
            row |= found.columns(measure)
    return row | _sizes([key for key in arm.seeds.values() if not results.diverged(key)], results)


def _repair_row(arm: Arm, arms: Sequence[Arm], axes: Sequence[str], results: Results) -> dict[str, Any]:
    """Damage of a base, or what an arm repaired; empty for a transplant."""
    found = damage_row(arm, results) | repair_row(arm, arms, results)
    return _labels_of(arm.context, axes) | {results.study.compare.arm: arm.name} | found if found else {}


def _sizes(keys: Sequence[str], results: Results) -> dict[str, Any]:
    """Bytes and sparsity of the first of these cells; empty without one."""
    result = results.result(keys[0]) if keys else None
    if result is None:
        return {}
    size, compression = result["size"], result.get("compression") or {}
    return {
        "bits_per_weight": 8 * size["num_linear_bytes"] / max(1, size["num_linear_weights"]),
        "sparsity": float(compression.get("sparsity", 0.0)),
        "total_mib": (size["num_base_bytes"] + size["num_adapter_bytes"]) / _MIB,
        "adapter_mib": size["num_adapter_bytes"] / _MIB,
    }


def _mark_pareto(rows: Rows, metric: str) -> None:
    """Mark each arm: is no other arm as good in fewer bytes, or better in as many?"""
    sign = -1.0 if HIGHER_IS_BETTER[metric] else 1.0
    shown = [row for row in rows if metric in row and "total_mib" in row]
    points = [(row["total_mib"], sign * row[metric]) for row in shown]
    for row in shown:
        mib, score = row["total_mib"], sign * row[metric]
        row["pareto"] = not any(m <= mib and s <= score and (m, s) != (mib, score) for m, s in points)


def _cell_row(cell: Mapping[str, Any], axes: Sequence[str], store: StudyDirectory, results: Results) -> dict[str, Any]:
    key = cell["key"]
    attempts, result = store.failures(key), results.result(key)
    status = "done" if result is not None else "failed" if store.is_given_up(key) else "open"
    row: dict[str, Any] = {axis: cell["labels"].get(axis, "") for axis in (*axes, RATE, SEED)}
    row |= {"stage": cell["stage"], "kind": cell["kind"], "cell": key}
    row |= {"equal_to": "; ".join(map(in_words, cell.get("equal", ()))), "status": status}
    row |= {"num_failures": len(attempts), "reason": attempts[-1]["reason"] if attempts else ""}
    if result is None:
        return row
    if results.diverged(key):
        return row | {"status": "diverged", "reason": result["diverged"], "seconds": result["seconds"]}
    found = {measure: results.mean(key, measure, "all") for measure in HIGHER_IS_BETTER}
    kept = {name: result.get(name) for name in ("seconds", "num_steps", "num_trainable", "final_loss")}
    return row | {name: value for name, value in found.items() if value == value} | kept | _sizes([key], results)


def _layer_rows(cell: Mapping[str, Any], axes: Sequence[str], results: Results) -> Rows:
    """What compression did to each layer; only bases have such rows, since adapters do not change the base."""
    result = results.result(cell["key"]) if cell["kind"] == "base" else None
    layers = ((result or {}).get("compression") or {}).get("layers") or {}
    context = _labels_of(cell["labels"], axes)
    return [context | {"layer": name} | dict(values) for name, values in layers.items()]


def _change_rows(cell: Mapping[str, Any], axes: Sequence[str], results: Results) -> Rows:
    """What training did to the weights of an arm whose magnitudes were set back afterwards."""
    result = results.result(cell["key"]) if cell["kind"] == "set_back" else None
    context = {axis: cell["labels"].get(axis, "") for axis in (*axes, results.study.compare.arm, SEED)}
    return [
        context | {"layer": path, "direction_change": change["direction"], "magnitude_change": change["magnitude"]}
        for path, change in ((result or {}).get("changes") or {}).items()
    ]


def _block_rows(cell: Mapping[str, Any], axes: Sequence[str], results: Results) -> Rows:
    """What compression of all layers together did to the hidden states."""
    result = results.result(cell["key"]) if cell["kind"] == "base" else None
    errors = enumerate((result or {}).get("hidden_errors", ()))
    return [_labels_of(cell["labels"], axes) | {"block": block, "relative_error": error} for block, error in errors]


def _facts(cells: Rows, pairs: Rows, results: Results, reference: str) -> Rows:
    compare = results.study.compare
    status = [row["status"] for row in cells]
    facts: dict[str, Any] = {
        "cells": len(cells),
        "trainings": sum(row["kind"] in ("rate", "trained") for row in cells),
        "cells done": status.count("done"),
        "cells diverged": status.count("diverged"),
        "trainings diverged in the comparison": sum(
            (row["kind"], row["status"]) == ("trained", "diverged") for row in cells
        ),
        "cells failed": status.count("failed"),
        "cells open": status.count("open"),
        "cells without result": len(cells) - status.count("done") - status.count("diverged"),
        "failed attempts": sum(row["num_failures"] for row in cells),
        "confidence %": 100 * CONFIDENCE,
        "alpha": compare.alpha,
        "zone": compare.zone,
        "power %": 100 * compare.power,
        "least seeds": compare.min_seeds,
        "hours": sum(row.get("seconds") or 0.0 for row in cells) / 3600,
        "reference": reference or BASE_ARM,
        "weights of tasks": f"{compare.tasks} in NLL per token",
        "compared on": "the test split"
        if compare.split == "test"
        else "one half of the validation examples; the other half chose the rates"
        if results.part == "compare"
        else "the validation examples",
    }
    primary = [row for row in pairs if row["role"] == "primary"]
    winners = [row["winner"] for row in primary]
    facts |= {"primary comparisons": len(primary), "not decided": sum(r["verdict"] == "not decided" for r in primary)}
    facts |= {"equivalent": sum(r["verdict"].startswith("no difference") for r in primary)}
    facts |= {f"{name} is better": winners.count(name) for name in sorted({*winners} - {""})}
    return [
        {"fact": name, "value": None, "text": value}
        if isinstance(value, str)
        else {"fact": name, "value": float(value), "text": ""}
        for name, value in facts.items()
    ]


def is_number(value: Any) -> bool:
    """Whether a value of a table is a finite number."""
    return isinstance(value, int | float | np.number) and not isinstance(value, bool) and math.isfinite(value)


def draw_all(report: Report) -> dict[str, str]:
    """Title -> SVG of every figure that the study has points for.

    Transplants, and adapters with their magnitudes set back, are left out: they have the names of trained arms.
    """
    rows = [row for row in report.tables["arms"] if row["kind"] in ("base", "trained") and "total_mib" in row]
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
    return svg_text(figure)


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
    return svg_text(figure)


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
    return svg_text(figure)
