"""Rows of a data set with their places, and the checks of their fields."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from qdora.errors import UserError

Row = Mapping[str, Any]
"""Column -> value."""

MAX_SHOWN_FAULTS = 5
"""Faulty rows that are named; the rest is counted. A wrong column is wrong in all 100,000 rows."""


class RowFault(ValueError):
    """What is wrong with one row. The caller adds the file and the line."""


@dataclass
class Rows:
    """The rows of one file or split.

    Attributes:
        where: File or Hub address, for error lines.
        unit: "line" (counted from 1, as editors do) or "row" (from 0, as data frames do).
        places: Line or row number of each row.
        rows: Column -> value.
    """

    where: str
    unit: str
    places: list[int] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(self, place: int, row: dict[str, Any]) -> None:
        """Append one row."""
        self.places.append(place)
        self.rows.append(row)

    def __iter__(self) -> Iterator[tuple[int, dict[str, Any]]]:
        return zip(self.places, self.rows, strict=True)

    def fault(self, place: int, what: object) -> str:
        """An error line: file: line 17: what."""
        return f"{self.where}: {self.unit} {place}: {what}"

    def raise_faults(self, faults: list[str]) -> None:
        """Raise the gathered faults as a UserError, if there are any: the first few, and how many more there are."""
        if faults:
            rest = len(faults) - MAX_SHOWN_FAULTS
            more = [f"{self.where}: {rest} more faulty rows"] if rest > 0 else []
            raise UserError(*faults[:MAX_SHOWN_FAULTS], *more)


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
