"""Writes a report: one HTML page that needs nothing beside it, Markdown, and every number as CSV and Parquet.

qdora report: what a study shows, as a page, Markdown and data files.
"""

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
from qdora.files.console import default_console
from qdora.study.report_figures import draw_all
from qdora.study.report_tables import Report, Rows, is_number, read_report

_NOTES = {
    "arms": (
        "Arms",
        "Every arm with the value tuned for it; bands and intervals over examples and seeds. repair: share of what "
        "compressing lost that the arm made good. pareto: nothing is as good in fewer bytes. Bands hold how hard the "
        "examples are, which all arms share: what separates two arms is in the comparisons.",
        True,
    ),
    "comparisons": (
        "Comparisons",
        "Positive improvements are better. lower, upper: BCa interval; lower t, upper t: with the spread of few seeds; "
        "p examples: permutation over examples; p holm: corrected for all comparisons; p seeds: over seeds alone.",
        True,
    ),
    "cells": ("Cells", "Every run, failed ones with their reason.", False),
    "layers": ("Layers", "What compressing did to each layer.", False),
    "facts": ("Settings and counts", "", False),
}
_DIGITS = {"bits_per_weight": 2, "total_mib": 2, "adapter_mib": 2, "sparsity": 3, "seconds": 1, "repair": 3}
_DEFAULT_DIGITS = 4


def write_report(report: Report, directory: Path, title: str) -> list[Path]:
    """Write index.html, report.md and <table>.csv and .parquet; returns the files.

    Args:
        report: What is shown.
        directory: Made if needed; files of these names are replaced.
        title: Of the page.
    """
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
    figures = draw_all(report)
    shown = [_table(name, rows) for name, rows in report.tables.items() if rows]
    atomic_write_text(directory / "report.md", _markdown(report, shown, title))
    atomic_write_text(directory / "index.html", _html(report, shown, figures, title))
    return [directory / "index.html", directory / "report.md", *written]


def _html(report: Report, tables: Sequence[Mapping[str, Any]], figures: Mapping[str, str], title: str) -> str:
    source = resources.files("qdora.study").joinpath("report_page.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return environment.from_string(source).render(title=title, verdict=report.verdict, figures=figures, tables=tables)


def _markdown(report: Report, tables: Sequence[Mapping[str, Any]], title: str) -> str:
    parts = [f"# {title}", report.verdict[0], "\n".join(f"- {sentence}" for sentence in report.verdict[1:])]
    for table in tables:
        titles = [column["title"] for column in table["columns"]]
        lines = [titles, ["---" if column["text"] else "---:" for column in table["columns"]]]
        lines += [[cell["value"].replace("|", "\\|") for cell in row] for row in table["rows"]]
        text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
        parts.append(f"## {table['title']}\n\n{table['note']}\n\n{text}")
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def _table(name: str, rows: Rows) -> dict[str, Any]:
    """A table as it is shown: the columns of all rows, in order, without those that are empty everywhere."""
    title, note, is_open = _NOTES[name]
    columns = [
        column
        for column in dict.fromkeys(key for row in rows for key in row)
        if any(_shown(column, row.get(column)) for row in rows)
    ]
    texts = {column: not any(is_number(row.get(column)) for row in rows) for column in columns}
    return {
        "name": name,
        "title": title,
        "note": note,
        "open": is_open,
        "columns": [{"title": column.replace("_", " "), "text": texts[column]} for column in columns],
        "rows": [
            [{"value": _shown(column, row.get(column)) or "–", "text": texts[column]} for column in columns]
            for row in rows
        ],
    }


def _shown(column: str, value: Any) -> str:
    """A value as the page has it; a number is the one of the data file, rounded."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not is_number(value):
        return value if isinstance(value, str) else ""
    if float(value).is_integer() and (isinstance(value, int) or column == "value"):
        return f"{value:.0f}"
    digits = next((number for stem, number in _DIGITS.items() if column.startswith(stem)), _DEFAULT_DIGITS)
    return f"{value:.{digits}f}"


def report_run(directory: Path, out: Path | None = None, *, console: Console | None = None) -> dict[str, Any]:
    """Write the report of a study, finished or not.

    Args:
        directory: Of the study.
        out: Where the files go; report/ inside it by default.
        console: Where the verdict is shown; standard error by default.
    Returns:
        JSON values: the page, the verdict, and the comparisons.
    Raises:
        UserError: No study there, or none of its cells is finished.
    """
    console = console or default_console()
    report = read_report(directory)
    files = write_report(report, out or directory / "report", directory.resolve().name)
    for sentence in report.verdict:
        console.print(sentence, markup=False, highlight=False)
    console.print(f"report: {files[0]}", markup=False, highlight=False, soft_wrap=True)
    return {
        "page": str(files[0]),
        "files": [str(file) for file in files],
        "verdict": report.verdict,
        "comparisons": report.tables["comparisons"],
    }
