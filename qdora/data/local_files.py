"""Local data files as rows: Parquet, JSON-lines, JSON and plain text, each row with the place it came from."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qdora.data.commonsense import RowFault, shown
from qdora.errors import UserError, nearest

MAX_SHOWN_FAULTS = 5
"""Faulty rows of one file that are named; the rest is counted. A wrong column is wrong in all 100,000 rows."""


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
            raise UserError(
                *faults[:MAX_SHOWN_FAULTS], *([f"{self.where}: {rest} more faulty rows"] if rest > 0 else [])
            )


def read_rows(path: Path) -> Rows:
    """All rows of a file, by its ending.

    Raises:
        UserError: If the file is missing, has an unknown ending, is empty or damaged.
    """
    reader = READERS.get(path.suffix.lower())
    if not path.is_file():
        raise UserError(missing(path))
    if reader is None:
        raise UserError(f"{path}: unknown ending {path.suffix!r}, allowed: {', '.join(READERS)}.")
    try:
        rows = reader(path)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start})") from error
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error
    if not rows.rows:
        raise UserError(f"{path}: the data set is empty, allowed: at least one row")
    return rows


def split_file(directory: Path, split: str) -> Path | None:
    """The file <split>.<ending> of a directory; None where there is none.

    Raises:
        UserError: If two files could be meant.
    """
    found = [path for suffix in READERS if (path := directory / f"{split}{suffix}").is_file()]
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise UserError(f"{directory}: {names} all hold split {split!r}; name one file as the source.")
    return found[0] if found else None


def missing(path: Path) -> str:
    """The error line for a path that does not exist, with the nearest name that does."""
    if path.is_dir():
        return f"{path}: is a directory, expected a file"
    folder = path.parent
    while not folder.is_dir():
        folder = folder.parent
    wanted = path.relative_to(folder).parts[0]
    return f"{path}: no such file.{nearest(wanted, sorted(entry.name for entry in folder.iterdir()))}"


def split_names(directory: Path) -> list[str]:
    """The splits for which a directory has a file."""
    return sorted({path.stem for path in directory.iterdir() if path.suffix.lower() in READERS})


def _parquet(path: Path) -> Rows:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path, partitioning=None)
    except pa.ArrowInvalid as error:
        raise UserError(f"{path}: not a Parquet file ({error})") from error
    return Rows(str(path), "row", list(range(table.num_rows)), table.to_pylist())


def _json_lines(path: Path) -> Rows:
    return _parse_lines(path, path.read_text(encoding="utf-8-sig"))


def _parse_lines(path: Path, text: str) -> Rows:
    rows, faults = Rows(str(path), "line"), []
    # Not splitlines(): JSON strings may hold U+2028 and other characters that it takes for line ends.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            rows.add(number, _object(json.loads(line)))
        except json.JSONDecodeError as error:
            faults.append(rows.fault(number, f"not JSON (column {error.colno}: {error.msg})"))
        except RowFault as fault:
            faults.append(rows.fault(number, fault))
    rows.raise_faults(faults)
    return rows


def _json(path: Path) -> Rows:
    """A list of objects, or JSON-lines under the wrong ending."""
    text = path.read_text(encoding="utf-8-sig")
    try:
        value = json.loads(text) if text.strip() else []
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # a second value after the first: one object a line
            return _parse_lines(path, text)
        raise UserError(f"{path}: line {error.lineno}: not JSON (column {error.colno}: {error.msg})") from error
    if isinstance(value, dict) and not any(isinstance(entry, list) and entry for entry in value.values()):
        value = [value]
    if not isinstance(value, list):
        raise UserError(f"{path}: got {shown(value)}, allowed: a list of objects, or one object a line")
    rows, faults = Rows(str(path), "row"), []
    for number, entry in enumerate(value):
        try:
            rows.add(number, _object(entry))
        except RowFault as fault:
            faults.append(rows.fault(number, fault))
    rows.raise_faults(faults)
    return rows


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise RowFault(f"got {shown(value)}, allowed: an object {{column: value}}")
    return value


def _text(path: Path) -> Rows:
    """One row {"text": ...} for each document; documents are separated by blank lines."""
    rows = Rows(str(path), "line")
    start, lines = 1, list[str]()
    for number, line in enumerate([*path.read_text(encoding="utf-8-sig").split("\n"), ""], start=1):
        if line.strip():
            if not lines:
                start = number
            lines.append(line.rstrip("\r"))
        elif lines:
            rows.add(start, {"text": "\n".join(lines)})
            lines = []
    return rows


READERS: dict[str, Callable[[Path], Rows]] = {
    ".parquet": _parquet,
    ".jsonl": _json_lines,
    ".json": _json,
    ".txt": _text,
    ".md": _text,
}
"""Ending of a file -> its reader."""
