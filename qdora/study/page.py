"""The page of a study's report, as HTML and as Markdown: answer, figures, main columns. The CSV files have all."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from qdora.files.atomic import atomic_write_text
from qdora.files.html_page import render_page
from qdora.files.markdown_table import markdown_table
from qdora.study.figures import Rows, draw_all
from qdora.study.grid import CompareConfig

# Table -> title, columns behind the axes, what they mean
_SHOWN = {
    "comparisons": (
        "Comparisons",
        "comparison measure role improvement lower upper p_holm p_equivalent_holm smallest_detectable num_seeds "
        "verdict reason",
        "A positive improvement is better. lower, upper: 95 % t interval over the seeds. p holm: the larger p-value of "
        "the t tests over seeds and over examples; p equivalent holm: that the arms differ by the zone or more; both "
        "are corrected for the tests of the family. smallest detectable: would have been found with the power of the "
        "study. nll by task: each task counts once.",
    ),
    "tasks": ("Tasks", "comparison task weight measure improvement lower upper", "weight: of the task in the metric."),
    "repair": (
        "Damage and repair",
        "damage_choice damage_choice_lower damage_choice_upper left left_lower left_upper transplant repaired "
        "repaired_share repaired_share_lower repaired_share_upper magnitudes magnitudes_lower magnitudes_upper",
        "damage choice: accuracy per character that the untrained base lost. left: how much worse the trained arm is "
        "than the same arm trained on the uncompressed base; transplant: the same of that arm's adapter on this base. "
        "repaired: what training gains on the transplant, as a share of the transplant's damage where that is "
        "significant. magnitudes: what setting them back loses.",
    ),
    "arms": (
        "Arms",
        "kind rate num_seeds num_missing num_diverged bits_per_weight sparsity total_mib nll_per_token "
        "nll_per_token_lower nll_per_token_upper acc acc_norm",
        "Means over the seeds of the study file. Intervals of arms may overlap although the arms differ: hard examples "
        "are hard for both.",
    ),
    "rates": (
        "Learning rates",
        "rate is_interior num_runs num_diverged losses",
        "losses: validation loss of each rate; inf: a run diverged.",
    ),
    "guesses": (
        "Guesses",
        "guess nll acc",
        "Of models that know nothing: by the frequency of tokens in the training answers, uniform over the vocabulary, "
        "uniform among the choices.",
    ),
    "facts": ("Settings", "fact value", ""),
}


@dataclass(frozen=True)
class Report:
    """What a report shows; `tables` are named for their data files, `axes` are those of a context."""

    tables: dict[str, Rows]
    answer: list[str]
    status: str
    axes: list[str]
    compare: CompareConfig


def write_report(report: Report, directory: Path, title: str) -> list[Path]:
    """Write index.html, report.md, and each table as .csv; returns the files."""
    figures = draw_all(report.tables, report.axes, report.compare)
    shown = [_shown_table(report, name) for name in _SHOWN if report.tables.get(name)]
    csv = {f"{name}.csv": rows for name, rows in report.tables.items() if rows}
    page = {"title": title, "report": report, "figures": figures, "tables": shown, "files": list(csv)}
    directory.mkdir(parents=True, exist_ok=True)
    texts = {
        "index.html": render_page("qdora.study", "page.html.j2", **page),
        "report.md": _markdown(report, shown, title, list(csv)),
        **{name: pd.DataFrame(rows).to_csv(index=False) for name, rows in csv.items()},
    }
    for name, text in texts.items():
        atomic_write_text(directory / name, text)
    return [directory / name for name in texts]


def _shown_table(report: Report, name: str) -> dict[str, Any]:
    title, columns, note = _SHOWN[name]
    rows = report.tables[name]
    names = [*report.axes, report.compare.arm, *columns.split()]
    names = [column for column in names if any(_text(row.get(column)) for row in rows)]
    is_number = [any(isinstance(row.get(column), int | float) for row in rows) for column in names]
    cells = [[_text(row.get(column)) or "–" for column in names] for row in rows]
    header = [column.replace("_", " ") for column in names]
    return {"title": title, "note": note, "header": header, "is_number": is_number, "rows": cells}


def _text(value: Any) -> str:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.4f}"
    return "" if value is None else str(value)


def _markdown(report: Report, tables: list[dict[str, Any]], title: str, files: list[str]) -> str:
    parts = [f"# {title}", *report.answer, report.status]
    for table in tables:
        parts += [f"## {table['title']}", table["note"]]
        parts.append(markdown_table(table["header"], table["rows"], right=table["is_number"]))
    parts.append(f"All columns and tables: {', '.join(f'[{name}]({name})' for name in files)}.")
    return "\n\n".join(filter(None, parts)) + "\n"
