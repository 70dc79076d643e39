"""The page of a study's report, as HTML and as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qdora.files.html_page import render_page
from qdora.files.markdown_table import markdown_table
from qdora.study.report_contents import Report, Rows, is_number
from qdora.study.report_figures import draw_all

# Table -> title, note (for some tables of each column, and told if that is there), and whether it is unfolded.
_NOTES: dict[str, tuple[str, str | dict[str, str], bool]] = {
    "comparisons": (
        "Comparisons",
        "A positive improvement is better. nll by task: each task counts once. acc, acc norm: share of right choices, "
        "by likelihood and by likelihood per character. lower, upper: 95 % t interval over the seeds; where some were "
        "added, by the spread of the first ones (Stein's two-stage procedure). smallest detectable: would have been "
        "found with the power of the study. planned: half of the interval that the study file expects. p seeds: t "
        "test over the seeds. p examples: over the examples, with the seeds as they are. p holm: the larger of both, "
        "corrected for the tests of the family. p equivalent: that the arms differ by the zone or more. Exploratory "
        "comparisons have no verdict.",
        True,
    ),
    "tasks": (
        "Tasks",
        "The primary comparisons on each task; exploratory. weight: of the task in NLL per token.",
        False,
    ),
    "repair": (
        "Damage and repair",
        {
            "damage_choice": "damage choice: accuracy per character of the uncompressed base, less that of this one, "
            "both untrained.",
            "perplexity": "perplexity: of prompts with their answers, untrained.",
            "hidden_error": "hidden error: of the hidden states after the last block.",
            "left": "left: trained arm against the same arm trained on the uncompressed base; positive is worse.",
            "transplant": "transplant: the same of the adapter trained on the uncompressed base. repaired: what "
            "training on the compressed base gains on it; share: of the transplant's damage.",
            "magnitudes": "magnitudes: what setting them back loses.",
        },
        True,
    ),
    "arms": (
        "Arms",
        "Each arm at the learning rate that was found for it, or by rates.like for another arm, averaged over the "
        "seeds of the study file, without further ones. lower, upper: 95 % t interval over the seeds; of a base over "
        "the examples. With eval.limit each seed has its own examples, so levels with different seeds cannot be "
        "compared. pareto: of the trained arms with the most seeds, no other one is as good in fewer bytes. Intervals "
        "of arms may overlap although the arms differ: hard examples are hard for both. Comparisons pair the seeds.",
        False,
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
    "curves": ("Learning curves", "Training loss, averaged over the seeds and over the steps up to each one.", False),
    "layers": ("Layers", "What compression did to each layer.", False),
    "changes": (
        "Changes of the weights",
        "How far training moved the rows of each layer: 1 - cosine of the directions, and the relative change of the "
        "magnitude, averaged over the rows. error undone: of the error that compression made, the share that the "
        "adapter's update takes back, <update, -error> / |error|^2. error undone best: the same of the best matrix of "
        "the adapter's rank. error cosine: between the update and the negative error.",
        False,
    ),
    "checkpoints": (
        "Checkpoints",
        "nll: of the run's own evaluation, nats per token. direction, magnitude: as above. length: mean over the rows "
        "of the absolute change of the row norm.",
        False,
    ),
    "blocks": (
        "Blocks",
        "relative error: of the hidden states after each block of an untrained base, against the uncompressed one, "
        "averaged over the positions. "
        "block off: rise of the NLL without the adapter of this block, nats per token, on a few examples.",
        False,
    ),
    "guesses": (
        "Guesses",
        "What a model reaches that knows nothing. unigram: the answers' tokens by how often they are in the training "
        "answers. uniform: ln of the vocabulary. choice: a guess among the choices.",
        False,
    ),
    "facts": ("Settings and counts", "", False),
}
# Columns that are shown at first, besides the axes; the others are folded. Tables that are not named show all.
_SHOWN_FIRST = {
    "comparisons": (
        "comparison measure role improvement lower upper verdict reason smallest_detectable half_width "
        "half_width_planned num_seeds"
    ),
    "repair": "damage_choice left left_lower left_upper repaired repaired_lower repaired_upper repaired_share",
    "arms": "kind rate num_seeds bits_per_weight sparsity nll_per_token nll_per_token_lower nll_per_token_upper acc",
    "cells": "train.lr seed stage status reason nll_per_token seconds",
}
_MOST_ROWS, _MOST_ROWS_OF_PAGE = 300, 1000
"""Rows of a table in report.md and in index.html; of longer ones they name the data file."""
_ONLY_DATA = "The rows are many and stand in the data files alone."
_DIGITS = {"bits_per_weight": 2, "total_mib": 2, "adapter_mib": 2, "sparsity": 3, "seconds": 1, "repair": 3}


def shown_tables(report: Report) -> list[dict[str, Any]]:
    """The tables as the page shows them, in its order."""
    return [_table(name, report.tables[name], report) for name in _NOTES if report.tables.get(name)]


def _table(name: str, rows: Rows, report: Report) -> dict[str, Any]:
    """A table for the page: the columns of all rows, in order, without those that are empty in every row."""
    title, note, is_open = _NOTES[name]
    columns = [
        column
        for column in dict.fromkeys(key for row in rows for key in row)
        if any(_shown(column, row.get(column)) for row in rows)
    ]
    first = [*report.axes, report.compare.arm, *_SHOWN_FIRST.get(name, " ".join(columns)).split()]
    columns.sort(key=lambda column: first.index(column) if column in first else len(first))
    return {
        "name": name,
        "title": title,
        "note": note if isinstance(note, str) else " ".join(text for name, text in note.items() if name in columns),
        "open": is_open,
        "header": [column.replace("_", " ") for column in columns],
        "is_text": [not any(is_number(row.get(column)) for row in rows) for column in columns],
        "num_first": sum(column in first for column in columns),
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


def markdown_page(report: Report, tables: Sequence[Mapping[str, Any]], title: str) -> str:
    """The report as Markdown, without figures and without the longest tables."""
    parts = [f"# {report.question}", f"Study: {title}", report.subject, *report.answer]
    parts.append("\n".join(f"- {sentence}" for sentence in report.notes))
    for table in tables:
        text = f"The rows are in [{table['name']}.csv]({table['name']}.csv)."
        if len(table["rows"]) <= _MOST_ROWS:
            text = markdown_table(table["header"], table["rows"], right=[not each for each in table["is_text"]])
        parts.append(f"## {table['title']}\n\n{table['note']}\n\n{text}")
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def html_page(report: Report, tables: Sequence[Mapping[str, Any]], title: str) -> str:
    """The report as a page that needs no other file, without the rows of the longest tables."""
    tables = [
        table
        if len(table["rows"]) <= _MOST_ROWS_OF_PAGE
        else {**table, "rows": [], "note": f"{table['note']} {_ONLY_DATA}"}
        for table in tables
    ]
    facts = {"study": title, "report": report, "title": report.question, "figures": draw_all(report), "tables": tables}
    return render_page("qdora.study", "report_page.html.j2", **facts)
