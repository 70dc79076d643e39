"""Rows of a data set with their places, and the checks of their fields."""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from qdora.errors import UserError
from qdora.recipe.section import shown

Row = Mapping[str, Any]
"""Column -> value."""

MAX_SHOWN_FAULTS = 5
"""Faulty rows that are named; the rest is counted. A wrong column is wrong in all 100,000 rows."""


class RowFault(ValueError):
    """What is wrong with one row. The caller adds the file and the line."""


Place = int | str
"""Number of a line or row of a file; with several files "name of the file: line 17"."""

Entry = dict[str, Any] | RowFault
"""A row as it was read: column -> value, or why it cannot be read."""


@dataclass(frozen=True)
class Rows:
    """The rows of a file or split, which stay where they are until they are read.

    Attributes:
        where: File, folder or Hub address, for error lines.
        unit: "line" (counted from 1, as editors do) or "row" (from 0, as data frames do).
        num_rows: Number of rows, faulty ones included.
        chosen: Takes indices in rising order; gives (place, row) of each.
        identity: Changes when the content changes. None where that is not known.
    """

    where: str
    unit: str
    num_rows: int
    chosen: Callable[[Sequence[int]], Iterator[tuple[Place, Entry]]]
    identity: str | None = None

    def __iter__(self) -> Iterator[tuple[Place, Entry]]:
        """(place, row) of every row."""
        return self.chosen(range(self.num_rows))

    def first(self, num: int) -> list[Row]:
        """The readable rows among the first `num`; one more where none of them is, if there is one."""

        def readable(num: int) -> Iterator[Row]:
            return (row for _, row in self.chosen(range(num)) if not isinstance(row, RowFault))

        return list(readable(min(num, self.num_rows))) or list(islice(readable(self.num_rows), 1))


def joined(where: str, parts: Sequence[Rows], names: Sequence[str] = ()) -> Rows:
    """Several `Rows` one behind the other; those without a chosen row are not opened.

    A row's place begins with the name of its part; without names it is its number among all rows.
    """

    def chosen(indices: Sequence[int]) -> Iterator[tuple[Place, Entry]]:
        first = 0
        for number, part in enumerate(parts):
            mine = between(indices, first, first + part.num_rows)
            if len(mine):
                rows = part.chosen([index - first for index in mine])
                for index, (place, row) in zip(mine, rows, strict=True):
                    yield f"{names[number]}: {part.unit} {place}" if names else int(index), row
            first += part.num_rows

    return Rows(where, "row", sum(part.num_rows for part in parts), chosen)


def between(indices: Sequence[int], first: int, stop: int) -> Sequence[int]:
    """Those of rising indices that lie from `first` to before `stop`."""
    return indices[bisect_left(indices, first) : bisect_left(indices, stop)]


def empty_data_set(where: object) -> str:
    """The error line for a file, folder or data set on the Hub without a row."""
    return f"{where}: the data set is empty, must have at least one row"


class FaultList:
    """Gathers the faulty rows of a file: the first few by name, the rest as a number."""

    def __init__(self, where: str, unit: str) -> None:
        self.where, self.unit = where, unit
        self.shown: list[str] = []
        self.num_more = 0

    def add(self, place: Place, fault: RowFault) -> None:
        """Count a faulty row."""
        if len(self.shown) < MAX_SHOWN_FAULTS:
            at = f"{self.where}/{place}" if isinstance(place, str) else f"{self.where}: {self.unit} {place}"
            self.shown.append(f"{at}: {fault}")
        else:
            self.num_more += 1

    def check(self) -> None:
        """Raise UserError if there is a faulty row."""
        if self.shown:
            rows = "row" if self.num_more == 1 else "rows"
            more = [f"{self.where}: {self.num_more} more faulty {rows}"] if self.num_more else []
            raise UserError(*self.shown, *more)


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for place, name in enumerate(names) if name in names[:place])
        raise RowFault(f"has the key {shown(twice)} twice in one object")
    return row


# `json.loads` makes a new decoder at each call with a hook: 3.4 us for a short row, 1.4 without a hook, 1.5 here
_ROW = json.JSONDecoder(object_pairs_hook=_each_once)
_HALF = re.compile(r"\\u[dD][89a-fA-F]")
"""Beginning of an escape that stands for a half of a surrogate pair, maybe beside the other half."""


def parse_row_json(text: str) -> Any:
    """The value that JSON in a row stands for.

    Raises ValueError if it is not JSON, is nested too deeply, or has half of a surrogate pair, which JSON can write and
    no tokenizer or file takes; RowFault, which is one, for a key that an object has twice.
    """
    try:
        value = _ROW.decode(text)
        if _HALF.search(text):
            check_encodable(json.dumps(value, ensure_ascii=False))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return value


def check_encodable(text: str) -> None:
    """Raise ValueError if a text holds half of a surrogate pair, which is no character."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):x}"
        raise ValueError(f"{half} is half of a surrogate pair and no character") from None


def is_empty(value: Any) -> bool:
    """Whether a value is what files write where there is none: null, pandas' NaN, an empty text or list."""
    return value is None or (isinstance(value, float) and value != value) or value in ("", [], {})


def text_field(row: Row, name: str) -> str:
    """A required text field, stripped."""
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        raise RowFault(f"{name}: must be text that is not empty, got {shown(value)}")
    return value.strip()


def optional_text(row: Row, name: str) -> str:
    """A text field that may be absent, null or empty, stripped."""
    value = row.get(name)
    if value is None or (isinstance(value, float) and value != value):
        return ""
    if not isinstance(value, str):
        raise RowFault(f"{name}: must be text or null, got {shown(value)}")
    return value.strip()


def row_id(row: Row, default: str) -> str:
    """The row's own id, or `default` where it has none."""
    own = row.get("id")
    return default if own in (None, "") else str(own)
