"""A data file as records: where each begins, and the row that it holds.

A record is a line, an item of a JSON list, a row of CSV (which may go over several lines), or a document between blank
lines. To split a file into records does not read what they hold, so a file is counted at little cost, and a faulty
record is the fault of one row.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO, cast

from qdora.data.rows import Entry, RowFault, parse_row_json
from qdora.errors import UserError
from qdora.files.json_file import parse_json
from qdora.recipe.data_settings import COMPRESSED_SUFFIXES
from qdora.recipe.faults import shown

_MARK = b"\xef\xbb\xbf"
"""The byte order mark."""
_HEAD_BYTES = 2**20
"""Bytes of a .json or .jsonl file that tell a list from lines."""

Record = tuple[int, int, bytes]
"""(number of its line or row, its first byte, its bytes)."""


def ending(path: Path) -> str:
    """.jsonl of rows.jsonl, .jsonl.gz of rows.jsonl.gz."""
    last = path.suffix.lower()
    return Path(path.stem).suffix.lower() + last if last in COMPRESSED_SUFFIXES else last


def open_bytes(path: Path) -> BinaryIO:
    """The bytes of a file, decompressed. Only those of a file that is not compressed can be sought in."""
    last = path.suffix.lower()
    if last == ".gz":
        return cast(BinaryIO, gzip.open(path))
    if last == ".zst":
        import pyarrow as pa  # Python 3.14 is the first with a module for it

        # Frames one behind the other are read, and a file that was cut is an error.
        return cast(BinaryIO, io.BufferedReader(pa.input_stream(path.open("rb"), compression="zstd"), 2**20))
    return path.open("rb")


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn what reading a file raises into a UserError with its name."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start})") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: damaged ({error})") from error
    except OSError as error:
        if error.errno is not None:
            raise UserError(f"{path}: {error.strerror}") from error
        # of pyarrow. Frames of 'zstd --long' look back over up to 2 GiB, which it does not keep.
        fix = f". Fix: unpack it, zstd -d --long=31 {path.name}" if "too much memory" in str(error) else ""
        raise UserError(f"{path}: damaged ({error}){fix}") from error


@dataclass(frozen=True)
class RecordFile:
    """A file as records.

    Attributes:
        unit: What a record's number counts: "line" (from 1, its first one) or "row" (from 0).
        place, number: The byte at which the records begin, and the number there.
        split: (file at a border between records, its byte, the number there) -> the records from there on.
        parse: The bytes of a record -> its row.
    """

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
    """A file as records; its ending says the format. Only its beginning is read."""
    kind = Path(ending(path)).stem
    with readable(path):
        if kind in (".jsonl", ".json"):
            return _json(path, kind)
        if kind in (".csv", ".tsv"):
            return _csv(path, "," if kind == ".csv" else "\t")
        return RecordFile("line", 0, 1, _split_text, _document)


def _json(path: Path, kind: str) -> RecordFile:
    """One object a line or a list of objects, whatever the ending says; in .json also a single object."""
    lines = RecordFile("line", 0, 1, split_lines, json_entry)
    with open_bytes(path) as file:
        head = file.read(_HEAD_BYTES)
    content = head.removeprefix(_MARK).lstrip()
    first, _, rest = content.partition(b"\n")
    # A whole list in the first of several lines is a faulty row.
    if content[:1] == b"[" and not (first.rstrip().endswith(b"]") and rest.strip()):
        return RecordFile("row", len(head) - len(content) + 1, 0, partial(_list_items, path), json_entry)
    if kind == ".jsonl" or not content or (rest.strip() and isinstance(json_entry(first), dict)):
        return lines
    with open_bytes(path) as file:
        text = file.read().decode("utf-8-sig")
    try:
        value = parse_json(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # a second value after the first: one object a line
            return lines
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
    return RecordFile("row", 0, 0, lambda file, *_: iter([(0, 0, file.read())]), json_entry)


def split_lines(file: BinaryIO, place: int, number: int) -> Iterator[Record]:
    """The lines that are not blank.

    Only \\n ends a line: JSON strings may hold U+2028 and other characters that `splitlines` takes for line ends.
    """
    for line in file:
        if line.strip() not in (b"", _MARK):
            yield number, place, line
        number += 1
        place += len(line)


def json_entry(record: bytes) -> Entry:
    """The object in the bytes of a line."""
    try:
        value = parse_row_json(record.rstrip(b"\r\n").decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return RowFault(f"not UTF-8 text (byte {error.start} of the row)")
    except RowFault as fault:
        return fault
    except json.JSONDecodeError as error:
        return RowFault(f"not JSON (column {error.colno}: {error.msg})")
    except ValueError as error:  # nested too deeply, a number of thousands of digits
        return RowFault(f"not JSON ({error})")
    return value if isinstance(value, dict) else RowFault(f"must be an object {{column: value}}, got {shown(value)}")


_STRUCTURE = json.JSONDecoder(strict=False, parse_int=str, parse_float=str)
_WHITE = re.compile(r"[ \t\r\n]*")


def _list_items(path: Path, file: BinaryIO, place: int, number: int) -> Iterator[Record]:
    """The items of a JSON list, parsed one at a time; the bytes of the file are in memory.

    They are read as Latin-1, one character a byte, which has the structure of JSON in UTF-8.
    """
    text, here = file.read().decode("latin-1"), 0

    def mark() -> str:
        nonlocal here
        here = _WHITE.match(text, here).end()  # type: ignore[union-attr]  # it always matches
        return text[here : here + 1]

    try:
        is_over = number == 0 and mark() == "]"  # an empty list
        while not is_over:
            mark()
            start, here = here, _STRUCTURE.raw_decode(text, here)[1]
            yield number, place + start, text[start:here].encode("latin-1")
            number += 1
            if mark() not in (",", "]"):
                raise json.JSONDecodeError("Expecting ',' delimiter", text, here)
            is_over = text[here] == "]"
            here += not is_over
        here += 1
        if mark():
            raise json.JSONDecodeError("Extra data", text, here)
    except json.JSONDecodeError as error:
        with open_bytes(path) as again:
            before = again.read(place + error.pos)
        line, column = before.count(b"\n") + 1, len(before) - before.rfind(b"\n")
        raise UserError(f"{path}: line {line}: not JSON (column {column}: {error.msg})") from error
    except RecursionError:
        raise UserError(f"{path}: not JSON (it is nested too deeply)") from None


def _csv(path: Path, delimiter: str) -> RecordFile:
    """Columns named by the first line."""
    split = partial(_split_csv, path, delimiter)
    with open_bytes(path) as file:
        mark = len(_MARK) if file.read(len(_MARK)) == _MARK else 0
    with open_bytes(path) as file:
        file.read(mark)
        number, place, record = next(split(file, mark, 1), (1, mark, b""))
    try:
        names = _cells(record, delimiter)
    except RowFault as fault:
        raise UserError(f"{path}: line {number}: {fault}") from fault
    twice = [name for index, name in enumerate(names) if name in names[:index]]
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

    return RecordFile("line", place + len(record), number + record.count(b"\n"), split, parse)


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


def _split_text(file: BinaryIO, place: int, number: int) -> Iterator[Record]:
    """Documents, which blank lines separate; those of the white space of Unicode, too."""
    lines: list[bytes] = []
    for line in file:
        is_blank = line.strip() in (b"", _MARK)
        if not is_blank and (line.isascii() or line.decode("utf-8", "replace").strip()):
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
