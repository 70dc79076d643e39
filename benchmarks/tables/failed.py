"""What was tried and did not help: the whole table, and a short list for README.md."""

from __future__ import annotations

from tables.combined import remedy_that_did_not_help
from tables.ranks import ranks_that_did_not_help
from tables.table import markdown, read

_SHORT = ("PCGrad", "a rank for each layer", "8-bit AdamW states on CPU")
"""Beginnings of the rows that a user of a recipe may ask about."""


def failed() -> str:
    """A row for each idea: what was tried, what is in use instead, and the figure that decided."""
    return markdown(["tried", "in use instead", "measured"], _rows())


def failed_short() -> str:
    """A list item for each idea that a user may ask about."""
    chosen = [row for start in _SHORT for row in _rows() if row[0].startswith(start)]
    return "".join(f"- {tried[0].upper()}{tried[1:]}: {figure}.\n" for tried, _, figure in chosen)


def _rows() -> list[list[str]]:
    rows = [[row["tried"], row["instead"], row["figure"]] for row in read("tried")["rows"]]
    return [*rows, *filter(None, (remedy_that_did_not_help(), ranks_that_did_not_help()))]
