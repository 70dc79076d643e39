"""The report of a study: one HTML page that needs no other file, Markdown, and every number as CSV and Parquet."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from rich.console import Console

from qdora.files.atomic import atomic_write_bytes, atomic_write_text
from qdora.files.console import consoles
from qdora.files.markdown_table import markdown_table
from qdora.study.report_figures import draw_all
from qdora.study.report_tables import Report, Rows, is_number, read_report

_NOTES = {
    "arms": (
        "Arms",
        "Every arm with the value tuned for it. Intervals are over examples and seeds. repair: share of the loss from "
        "compression that the arm recovered. pareto: no other arm is as good in fewer bytes. The intervals of two arms "
        "may overlap although the arms differ: hard examples are hard for both. The comparisons pair the examples.",
        True,
    ),
    "comparisons": (
        "Comparisons",
        "A positive improvement is better. lower, upper: BCa bootstrap interval. lower t, upper t: t interval, which "
        "allows for few seeds. p examples: permutation of examples. p seeds: permutation of seeds. p holm: the larger "
        "of p examples and p t, corrected for the number of comparisons.",
        True,
    ),
    "cells": ("Cells", "Every run. Failed runs have their reason.", False),
    "layers": ("Layers", "What compression did to each layer.", False),
    "facts": ("Settings and counts", "", False),
}
_DIGITS = {"bits_per_weight": 2, "total_mib": 2, "adapter_mib": 2, "sparsity": 3, "seconds": 1, "repair": 3}
_DEFAULT_DIGITS = 4


def report_run(directory: Path, out: Path | None = None, *, console: Console | None = None) -> dict[str, Any]:
    """Write the report of a study, whether or not all of its cells are finished; default `directory`/report.

    Returns the page, all files, the verdict, and the comparisons. UserError: no study, or no finished cell.
    """
    _, results = consoles(console)
    report = read_report(directory)
    files = write_report(report, out or directory / "report", directory.resolve().name)
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
    atomic_write_text(directory / "report.md", _markdown(report, shown, title))
    atomic_write_text(directory / "index.html", _html(report, shown, title))
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
    digits = next((number for stem, number in _DIGITS.items() if column.startswith(stem)), _DEFAULT_DIGITS)
    return f"{value:.{digits}f}"


def _markdown(report: Report, tables: Sequence[Mapping[str, Any]], title: str) -> str:
    parts = [f"# {title}", report.verdict[0], "\n".join(f"- {sentence}" for sentence in report.verdict[1:])]
    for table in tables:
        text = markdown_table(table["header"], table["rows"], right=[not each for each in table["is_text"]])
        parts.append(f"## {table['title']}\n\n{table['note']}\n\n{text}")
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def _html(report: Report, tables: Sequence[Mapping[str, Any]], title: str) -> str:
    source = resources.files("qdora.study").joinpath("report_page.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    page = environment.from_string(source)
    return page.render(title=title, verdict=report.verdict, figures=draw_all(report), tables=tables)
