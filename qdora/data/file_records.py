"""The records of JSON-lines, JSON, CSV, TSV and text files: where each begins, and the row that it holds.

A record is a line, an item of a JSON list, a row of CSV (which may go over several lines), or a document between blank
lines. To split a file into records does not read what they hold, so a file is counted at little cost, and a faulty
record is the fault of one row.
"""

from __future__ import annotations

import codecs
import csv
import json
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

from qdora.data.data_file import ending, open_bytes, readable
from qdora.data.rows import Entry, RowFault, parse_row_json
from qdora.errors import UserError
from qdora.files.json_file import parse_json
from qdora.recipe.faults import shown

_MARK = b"\xef\xbb\xbf"
"""The byte order mark."""
_MARKS_OF_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_READ_BYTES = 2**20
"""Bytes of a JSON list that are looked at together."""

Record = tuple[int, int, bytes]
"""(number of its line or row, its first byte, its bytes)."""


@dataclass(frozen=True)
class RecordFile:
    """A file as records.

    Attributes:
        unit: What a record's number counts: "line" (from 1, its first one) or "row" (from 0).
        place, number: The byte at which the records begin, and the number there.
        split: (file at a border between records, its byte, the number there) -> the records from there on.
        parse: The bytes of a record -> its row.
    """

    path: Path
    unit: str
    place: int
    number: int
    split: Callable[[BinaryIO, int, int], Iterator[Record]]
    parse: Callable[[bytes], Entry]

    def records(self, file: BinaryIO) -> Iterator[Record]:
        """All records of the opened file."""
        file.read(self.place)
        return self.split(file, self.place, self.number)


def record_file(path: Path) -> RecordFile:
    """A file as records; its ending says the format. Only its beginning is read.

    Raises: UserError if the file is damaged at its beginning, or is UTF-16 text.
    """
    with readable(path):
        check_utf8(path)
        return RECORD_FILES[Path(ending(path)).stem](path)


def check_utf8(path: Path) -> None:
    """Raise UserError if a file begins as UTF-16 text does, which would be a fault in each of its rows."""
    with open_bytes(path) as file:
        if file.read(2) in _MARKS_OF_UTF16:
            raise UserError(
                f"{path}: must be UTF-8 text, got UTF-16. Fix: convert it, such as by iconv -f UTF-16 -t UTF-8."
            )


def json_lines(path: Path) -> RecordFile:
    """One object a line."""
    return RecordFile(path, unit="line", place=0, number=1, split=split_lines, parse=json_entry)


def _lines_or_list(path: Path) -> RecordFile:
    """JSON lines, or a list of objects under the wrong ending."""
    place, start = _first_bytes(path)
    if start != b"[":
        return json_lines(path)
    with open_bytes(path) as file:
        file.read(place)
        first, has_more = file.readline(_READ_BYTES), bool(file.read(_READ_BYTES).strip())
    # A whole list in the first of several lines is a faulty row.
    return json_lines(path) if has_more and first.rstrip().endswith(b"]") else _json_list(path, place)


def split_lines(file: BinaryIO, place: int, number: int) -> Iterator[Record]:
    """The lines that are not blank.

    Only \\n ends a line: JSON strings may hold U+2028 and other characters that `splitlines` takes for line ends.
    """
    for line in file:
        if not _is_blank(line):
            yield number, place, line
        number += 1
        place += len(line)


def _is_blank(line: bytes) -> bool:
    return line.strip() in (b"", _MARK)


def json_entry(record: bytes) -> Entry:
    """The object in the bytes of a line."""
    try:
        value = parse_row_json(record.rstrip(b"\r\n").decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return RowFault(f"not UTF-8 text (byte {error.start} of the row)")
    except RowFault as fault:
        return fault
    except ValueError as error:  # also nested too deeply, a number of thousands of digits
        return RowFault(f"not JSON ({_json_reason(error)})")
    return value if isinstance(value, dict) else RowFault(f"must be an object {{column: value}}, got {shown(value)}")


def _json_reason(error: ValueError) -> str:
    return f"column {error.colno}: {error.msg}" if isinstance(error, json.JSONDecodeError) else str(error)


def _json(path: Path) -> RecordFile:
    """A list of objects, one object, or JSON lines under the wrong ending."""
    place, start = _first_bytes(path)
    if start == b"[":
        return _json_list(path, place)
    with open_bytes(path) as file:
        lines = (line for line in file if not _is_blank(line))
        is_lines = isinstance(json_entry(next(lines, b"{}")), dict) and next(lines, None) is not None
    return json_lines(path) if is_lines or not start else _one_value(path)


def _json_list(path: Path, place: int) -> RecordFile:
    """The objects of a list that begins at `place`."""
    items = partial(_list_items, path)
    return RecordFile(path, unit="row", place=place + 1, number=0, split=items, parse=json_entry)


def _first_bytes(path: Path) -> tuple[int, bytes]:
    """The first byte that is not blank and its place; no byte where all are blank."""
    place = _mark_bytes(path)
    with open_bytes(path) as file:
        file.read(place)
        while (found := file.read(1)).isspace():
            place += 1
    return place, found


def _mark_bytes(path: Path) -> int:
    """The bytes of the byte order mark at the beginning of a file; 0 without one."""
    with open_bytes(path) as file:
        return len(_MARK) if file.read(len(_MARK)) == _MARK else 0


def _one_value(path: Path) -> RecordFile:
    with open_bytes(path) as file:
        content = file.read()
    try:
        value = parse_json(content.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # a second value after the first: one object a line
            return json_lines(path)
        raise UserError(f"{path}: line {error.lineno}: not JSON (column {error.colno}: {error.msg})") from error
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: must be a list of objects, or one object a line, got {shown(value)}")
    if any(isinstance(entry, list) and entry for entry in value.values()):  # a row, or all rows in one of its values
        raise UserError(
            f"{path}: must be a list of objects, got a single object that holds a list, {shown(value)}. Fix: put [ ] "
            "around the object if it is a row; if its list holds the rows, keep only the list."
        )
    return RecordFile(
        path, unit="row", place=0, number=0, split=lambda file, *_: iter([(0, 0, file.read())]), parse=json_entry
    )


_STRUCTURE = json.JSONDecoder(strict=False, parse_int=str, parse_float=str)
_WHITE = re.compile(r"[ \t\r\n]*")


class _Window:
    """The part of a file that is looked at, as Latin-1: one character a byte, with the structure of JSON in UTF-8."""

    def __init__(self, file: BinaryIO, place: int) -> None:
        self.file, self.place, self.text, self.here, self.is_end = file, place, "", 0, False

    def _drop(self) -> None:
        """Drop what is done."""
        self.text, self.place, self.here = self.text[self.here :], self.place + self.here, 0

    def grow(self) -> None:
        """Drop what is done, and read as much as is left once more."""
        self._drop()
        found = self.file.read(max(_READ_BYTES, len(self.text)))
        self.text, self.is_end = self.text + found.decode("latin-1"), not found

    def mark(self) -> str:
        """The next character that is no white space; none at the end of the file."""
        while True:
            self.here = _WHITE.match(self.text, self.here).end()  # type: ignore[union-attr]  # it always matches
            if self.here < len(self.text) or self.is_end:
                return self.text[self.here : self.here + 1]
            self.grow()

    def value(self) -> bytes:
        """The bytes of the JSON value that begins here. Raises ValueError; that of json has the place in `text`."""
        while True:
            try:
                end = _STRUCTURE.raw_decode(self.text, self.here)[1]
            except RecursionError:
                raise ValueError("it is nested too deeply") from None
            except json.JSONDecodeError as error:
                is_cut = error.msg.startswith("Unterminated string") or error.pos > len(self.text) - 16
                if self.is_end or not is_cut:
                    raise
            else:
                if end < len(self.text) or self.is_end:  # else a number may go on
                    found, self.here = self.text[self.here : end].encode("latin-1"), end
                    if len(found) > _READ_BYTES:  # a text of megabytes is not kept beside its row
                        self._drop()
                    return found
            self.grow()


def _list_items(path: Path, file: BinaryIO, place: int, number: int) -> Iterator[Record]:
    """The items of a JSON list, a few of them in memory at a time."""
    window = _Window(file, place)
    try:
        is_over = number == 0 and window.mark() == "]"  # an empty list
        while not is_over:
            window.mark()
            item = window.value()
            yield number, window.place + window.here - len(item), item
            number += 1
            mark = window.mark()
            if mark not in (",", "]"):
                raise json.JSONDecodeError("Expecting ',' delimiter", window.text, window.here)
            is_over = mark == "]"
            window.here += not is_over
        window.here += 1
        if window.mark():
            raise json.JSONDecodeError("Extra data", window.text, window.here)
    except json.JSONDecodeError as error:
        line, column = _line_of(path, window.place + error.pos)
        raise UserError(f"{path}: line {line}: not JSON (column {column}: {error.msg})") from error
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from error


def _line_of(path: Path, place: int) -> tuple[int, int]:
    """(line, column) of a byte, both from 1."""
    line, column = 1, 1
    with open_bytes(path) as file:
        while place and (found := file.read(min(place, _READ_BYTES))):
            place -= len(found)
            line += found.count(b"\n")
            column = len(found) - found.rfind(b"\n") if b"\n" in found else column + len(found)
    return line, column


def _csv(path: Path, delimiter: str) -> RecordFile:
    """Columns named by the first line."""
    split = partial(_split_csv, path, delimiter)
    mark = _mark_bytes(path)
    with open_bytes(path) as file:
        file.read(mark)
        number, place, record = next(split(file, mark, 1), (1, mark, b""))
    try:
        names = _cells(record, delimiter)
    except RowFault as fault:
        raise UserError(f"{path}: line {number}: {fault}") from fault
    twice = [name for place_, name in enumerate(names) if name in names[:place_]]
    if twice:
        raise UserError(f"{path}: line {number}: names the column {twice[0]!r} twice")

    def parse(content: bytes) -> Entry:
        try:
            cells = _cells(content, delimiter)
        except RowFault as fault:
            return fault
        if len(cells) == len(names):
            return dict(zip(names, cells, strict=True))
        return RowFault(f"has {len(cells)} cells, the first line names {len(names)} columns")

    next_number = number + record.count(b"\n")
    return RecordFile(path, unit="line", place=place + len(record), number=next_number, split=split, parse=parse)


def _split_csv(path: Path, delimiter: str, file: BinaryIO, place: int, number: int) -> Iterator[Record]:
    pulled: list[bytes] = []
    is_first = True

    def next_line() -> str:
        nonlocal is_first
        if not is_first:
            pulled.append(file.readline())
        is_first = False
        return pulled[-1].decode("latin-1")

    reader = csv.reader(iter(next_line, ""), delimiter=delimiter, strict=True)
    for line in file:
        pulled[:] = [line]
        if b'"' in line:  # the record may go on in the next lines
            is_first = True
            with suppress(csv.Error):
                _next_row(reader)
            if not pulled[-1]:  # else all rows behind it would be one
                raise UserError(f"{path}: line {number}: a quotation mark opens here and is never closed.")
        record = b"".join(pulled)
        if record.strip(b"\r\n"):
            yield number, place, record
        number += record.count(b"\n")
        place += len(record)


def _cells(record: bytes, delimiter: str) -> list[str]:
    """The cells of a record. Raises RowFault."""
    try:
        return _next_row(csv.reader((record.decode("utf-8"),), delimiter=delimiter, strict=True))
    except UnicodeDecodeError as error:
        raise RowFault(f"not UTF-8 text (byte {error.start} of the row)") from error
    except csv.Error as error:
        raise RowFault(f"not CSV ({error})") from error


def _next_row(reader: Iterator[list[str]]) -> list[str]:
    """The next row; Python's default cuts texts of 128 KiB, and the limit is one of the whole process."""
    most = csv.field_size_limit(2**31 - 1)
    try:
        return next(reader, [])
    finally:
        csv.field_size_limit(most)


def _text(path: Path) -> RecordFile:
    """One row {"text": ...} for each document; documents are separated by blank lines."""
    return RecordFile(path, unit="line", place=0, number=1, split=_split_text, parse=_document)


def _split_text(file: BinaryIO, place: int, number: int) -> Iterator[Record]:
    lines: list[bytes] = []
    for line in file:
        # the second test is for the white space of Unicode
        if not _is_blank(line) and (line.isascii() or line.decode("utf-8", "replace").strip()):
            lines.append(line)
            continue
        if lines:
            document = b"".join(lines)
            yield number, place, document
            number, place, lines = number + len(lines), place + len(document), []
        number += 1
        place += len(line)
    if lines:
        yield number, place, b"".join(lines)


def _document(content: bytes) -> Entry:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return RowFault(f"not UTF-8 text (byte {error.start} of the document)")
    if "\0" in text:  # UTF-16 without its mark is valid UTF-8, with a null byte behind every letter
        return RowFault("holds null bytes, so it is not UTF-8 text. Fix: convert it, or remove them.")
    return {"text": text.replace("\r\n", "\n").removesuffix("\n")}


RECORD_FILES: dict[str, Callable[[Path], RecordFile]] = {
    ".jsonl": _lines_or_list,
    ".json": _json,
    ".csv": partial(_csv, delimiter=","),
    ".tsv": partial(_csv, delimiter="\t"),
    ".txt": _text,
    ".md": _text,
}
"""Ending of a file, without that of its compression -> its records."""
