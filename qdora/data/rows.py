"""Rows of a data set with their places, and the checks of their fields."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from qdora.errors import UserError

Row = Mapping[str, Any]
"""Column -> value."""
Entry = TypeVar("Entry")
Made = TypeVar("Made")

MAX_SHOWN_FAULTS = 5
"""Faulty rows that are named; the rest is counted. A wrong column is wrong in all 100,000 rows."""


class RowFault(ValueError):
    """What is wrong with one row. The caller adds the file and the line."""


@dataclass(frozen=True)
class Rows:
    """The rows of one file or split.

    Attributes:
        where: File or Hub address, for error lines.
        unit: "line" (counted from 1, as editors do) or "row" (from 0, as data frames do).
        placed: (line or row number, column -> value) of each row.
    """

    where: str
    unit: str
    placed: list[tuple[int, dict[str, Any]]]

    def examples(self, make: Callable[[int, Row], Made]) -> list[Made]:
        """make(place, row) of every row; see `each_made`."""
        return [each for _, each in each_made(self.where, self.unit, self.placed, make)]


def each_made(
    where: str, unit: str, entries: Iterable[tuple[int, Entry]], make: Callable[[int, Entry], Made]
) -> list[tuple[int, Made]]:
    """(place, make(place, entry)) of every entry.

    Raises: UserError for every RowFault of `make`: "file: line 17: what" of the first few, and how many more there are.
    """
    found, faults = [], []
    for place, entry in entries:
        try:
            found.append((place, make(place, entry)))
        except RowFault as fault:
            faults.append(f"{where}: {unit} {place}: {fault}")
    if faults:
        rest = len(faults) - MAX_SHOWN_FAULTS
        more = [f"{where}: {rest} more faulty rows"] if rest > 0 else []
        raise UserError(*faults[:MAX_SHOWN_FAULTS], *more)
    return found


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
