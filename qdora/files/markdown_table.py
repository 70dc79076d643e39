"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[bool] = ()) -> str:
    """A Markdown table without a final line break; every cell is one line, and its cell borders are escaped.

    `right` says for each column whether its cells are aligned to the right; columns beyond its end are not.
    """
    marks = ["---:" if index < len(right) and right[index] else "---" for index in range(len(header))]
    lines = [map(markdown_cell, header), marks, *(map(markdown_cell, row) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def markdown_cell(text: str) -> str:
    """Text on one line, without cell borders."""
    return " ".join(str(text).split()).replace("|", "\\|")
