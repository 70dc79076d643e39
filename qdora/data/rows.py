"""Rows of a data set with their places, and the checks of their fields."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qdora.errors import UserError

Row = Mapping[str, Any]
"""Column -> value."""

MAX_SHOWN_FAULTS = 5
"""Faulty rows that are named; the rest is counted. A wrong column is wrong in all 100,000 rows."""


class RowFault(ValueError):
    """What is wrong with one row. The caller adds the file and the line."""


Entry = dict[str, Any] | RowFault
"""A row as it was read: column -> value, or why it cannot be read."""


@dataclass(frozen=True)
class Rows:
    """The rows of one file or split, which stay where they are until they are read.

    Attributes:
        where: File or Hub address, for error lines.
        unit: "line" (counted from 1, as editors do) or "row" (from 0, as data frames do).
        num_rows: Number of rows, faulty ones included.
        chosen: Takes indices in rising order; gives (line or row number, row) of each.
        identity: Stands for the content: what changes when it changes. None where that is not known.
    """

    where: str
    unit: str
    num_rows: int
    chosen: Callable[[Sequence[int]], Iterator[tuple[int, Entry]]]
    identity: str | None = None

    def __iter__(self) -> Iterator[tuple[int, Entry]]:
        """(line or row number, row) of every row."""
        return self.chosen(range(self.num_rows))

    def columns(self) -> list[str]:
        """The columns of the first row that can be read; none where no row can."""
        return next((list(row) for _, row in self if not isinstance(row, RowFault)), [])


def rows_of(where: str, unit: str, placed: Sequence[tuple[int, Entry]], identity: str | None = None) -> Rows:
    """Rows that are in memory."""
    return Rows(where, unit, len(placed), lambda indices: (placed[index] for index in indices), identity)


class FaultList:
    """Gathers the faulty rows of a file: the first few by name, the rest as a number."""

    def __init__(self, where: str, unit: str) -> None:
        self.where, self.unit = where, unit
        self.shown: list[str] = []
        self.num_more = 0

    def add(self, place: int, fault: RowFault) -> None:
        """Count a faulty row."""
        if len(self.shown) < MAX_SHOWN_FAULTS:
            self.shown.append(f"{self.where}: {self.unit} {place}: {fault}")
        else:
            self.num_more += 1

    def check(self) -> None:
        """Raise UserError if there is a faulty row."""
        if self.shown:
            more = [f"{self.where}: {self.num_more} more faulty rows"] if self.num_more else []
            raise UserError(*self.shown, *more)


def text_field(row: Row, name: str) -> str:
    """A required text field, stripped."""
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        raise RowFault(f"{name}: must be text that is not empty, got {shown(value)}")
    return value.strip()


def optional_text(row: Row, name: str) -> str:
    """A text field that may be absent, null or empty, stripped."""
    value = row.get(name)
    # pandas writes a missing text as a float NaN
    if value is None or (isinstance(value, float) and value != value):
        return ""
    if not isinstance(value, str):
        raise RowFault(f"{name}: must be text or null, got {shown(value)}")
    return value.strip()


def row_id(row: Row, default: str) -> str:
    """The row's own id, or `default` where it has none."""
    own = row.get("id")
    return default if own in (None, "") else str(own)


def shown(value: object) -> str:
    """A value for an error line: its repr, cut to 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
