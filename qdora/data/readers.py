"""Readers of Parquet, JSON-lines, JSON, CSV and text files and of data sets on the Hub: whole, or a shard at a time.

A shard is a row group of a Parquet file, a range of bytes of a JSON-lines file, or a file of a data set on the Hub. It
is read from any row on, a row at a time. A row that cannot be read comes as a RowFault. The rows of a file that is not
streamed stay on disk, too, until they are asked for: of JSON lines only their places are kept.

The readers of `datasets` are used for the Hub only. Measured with datasets 5.2 on local files: a faulty line is named
by its row within a chunk of 10 MB, without the file; a column that only some rows have comes as null in all of them; a
type that changes after the first chunk is an error without a place; texts that look like dates come as datetimes; to
skip to a row reads all rows before it, and a Parquet file takes the memory of a whole row group (251 MiB against 13 for
one of 160 MB).
"""

from __future__ import annotations

import csv
import json
import logging
import time
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

from qdora.data.data_file import (
    ending,
    identity_of,
    name_without_ending,
    open_bytes,
    open_text,
    readable,
    skip_bytes,
)
from qdora.data.rows import Entry, RowFault, Rows, rows_of, shown
from qdora.errors import HubFailure, UserError, nearest
from qdora.files.json_file import parse_json
from qdora.recipe.data_settings import COMPRESSED_SUFFIXES, STREAMED_SUFFIXES
from qdora.recipe.faults import one_line, reason_of

logger = logging.getLogger("qdora")

_RANGE_BYTES = 16 * 2**20
"""Bytes of a shard of a JSON-lines file: small enough to skip to a row of it in some 50 ms."""
_ROWS_AT_ONCE = 1024
"""Rows of a Parquet file that are decoded together."""
_READ_BYTES = 2**20
"""Bytes of a Parquet file per read. Without a limit whole column chunks of a row group are read, 128 MiB and more."""
_BLANK = b" \t\r\n\v\f\xef\xbb\xbf"
"""White space and the byte order mark."""

_HUB_WAITS = (1.0, 5.0, 25.0)
"""Seconds before each new attempt to read a row from the Hub."""
_JSON_COLUMNS = ("messages", "choices", "answer")
"""Columns of a CSV file whose cells are JSON if they can be read as such; all others are text."""

PlacedRow = tuple[str, Entry]
"""(place, row): "file: row 17" for error lines, and column -> value, or why the row cannot be read."""
Reader = Callable[[int], Iterator[PlacedRow]]
"""The rows of one shard, without its first `skip` rows."""


def read_rows(path: Path) -> Rows:
    """The rows of a file, read when they are asked for. Its ending says the format.

    Raises: UserError if the file is missing, has an unknown ending, is empty or damaged.
    """
    reader = READERS.get(ending(path))
    if not path.is_file():
        raise UserError(missing(path))
    if reader is None:
        raise UserError(f"{path}: unknown ending {ending(path)!r}, allowed: {', '.join(READERS)}.")
    with readable(path):
        return _not_empty(reader(path))


def split_file(directory: Path, split: str) -> Path | None:
    """The file <split>.<ending> of a directory; None where there is none.

    Raises: UserError if two files could be meant.
    """
    found = [path for suffix in READERS if (path := directory / f"{split}{suffix}").is_file()]
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise UserError(f"{directory}: {names} all hold split {split!r}. Fix: name one file as the source.")
    return found[0] if found else None


def split_names(directory: Path) -> list[str]:
    """The splits for which a directory has a file."""
    return sorted({name_without_ending(path) for path in directory.iterdir() if ending(path) in READERS})


def missing(path: Path) -> str:
    """The error line for a path that does not exist, with the nearest name that does."""
    if path.is_dir():
        return f"{path}: is a directory, expected a file"
    folder = path.parent
    while not folder.is_dir():
        folder = folder.parent
    wanted = path.relative_to(folder).parts[0]
    return f"{path}: no such file.{nearest(wanted, sorted(entry.name for entry in folder.iterdir()))}"


def _parquet(path: Path) -> Rows:
    groups = _row_groups(path)

    def chosen(indices: Sequence[int]) -> Iterator[tuple[int, Entry]]:
        for group, first, size in groups:
            wanted = indices[bisect_left(indices, first) : bisect_left(indices, first + size)]
            if len(wanted):
                yield from _row_group(path, group, first, wanted)

    return Rows(str(path), "row", sum(size for _, _, size in groups), chosen, identity_of(path))


def _json_lines(path: Path) -> Rows:
    numbers, places = array("q"), array("q")
    for number, place, _ in _lines(path, 0):
        numbers.append(number)
        places.append(place)

    def chosen(indices: Sequence[int]) -> Iterator[tuple[int, Entry]]:
        with readable(path), open_bytes(path) as file:
            here = 0
            for index in indices:
                skip_bytes(file, places[index] - here)
                line = file.readline()
                here = places[index] + len(line)
                yield numbers[index], _parsed(line)

    return Rows(str(path), "line", len(places), chosen, identity_of(path))


def _json(path: Path) -> Rows:
    """A list of objects, or JSON-lines under the wrong ending."""
    with open_text(path) as file:
        text = file.read()
    try:
        value = parse_json(text) if text.strip() else []
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # a second value after the first: one object a line
            return _json_lines(path)
        raise UserError(f"{path}: line {error.lineno}: not JSON (column {error.colno}: {error.msg})") from error
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({_json_reason(error)})") from error
    if isinstance(value, dict) and not any(isinstance(entry, list) and entry for entry in value.values()):
        value = [value]
    if not isinstance(value, list):
        raise UserError(f"{path}: must be a list of objects, or one object a line, got {shown(value)}")
    return rows_of(str(path), "row", [(row, _object(entry)) for row, entry in enumerate(value)], identity_of(path))


def _csv(path: Path) -> Rows:
    """Columns named by the first line; `_JSON_COLUMNS` may hold JSON."""
    placed: list[tuple[int, Entry]] = []
    most = csv.field_size_limit(2**31 - 1)  # of the whole process; Python's default cuts texts of 128 KiB
    try:
        with open_text(path, newline="") as file:
            lines = csv.reader(file, strict=True)
            header = next(lines, [])
            for cells in lines:
                if not cells:
                    continue
                if len(cells) == len(header):
                    row = {name: _cell(name, text) for name, text in zip(header, cells, strict=True)}
                    placed.append((lines.line_num, row))
                else:
                    what = f"has {len(cells)} cells, the first line names {len(header)} columns"
                    placed.append((lines.line_num, RowFault(what)))
    except csv.Error as error:
        raise UserError(f"{path}: line {lines.line_num}: not CSV ({error})") from error
    finally:
        csv.field_size_limit(most)
    return rows_of(str(path), "line", placed, identity_of(path))


def _cell(name: str, text: str) -> Any:
    if name not in _JSON_COLUMNS:
        return text
    try:
        return parse_json(text)
    except ValueError:
        return text


def _text(path: Path) -> Rows:
    """One row {"text": ...} for each document; documents are separated by blank lines."""
    placed: list[tuple[int, Entry]] = []
    start, lines = 1, list[str]()
    with open_text(path) as file:
        text = file.read()
    if "\0" in text:  # UTF-16 without its mark is valid UTF-8, with a null byte behind every letter
        raise UserError(f"{path}: holds null bytes, so it is not UTF-8 text. Fix: convert it, or remove them.")
    for number, line in enumerate([*text.split("\n"), ""], start=1):
        if line.strip():
            if not lines:
                start = number
            lines.append(line.rstrip("\r"))
        elif lines:
            placed.append((start, {"text": "\n".join(lines)}))
            lines = []
    return rows_of(str(path), "line", placed, identity_of(path))


_PLAIN: dict[str, Callable[[Path], Rows]] = {
    ".jsonl": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".txt": _text,
    ".md": _text,
}
READERS: dict[str, Callable[[Path], Rows]] = {
    ".parquet": _parquet,
    **{plain + packed: reader for packed in ("", *COMPRESSED_SUFFIXES) for plain, reader in _PLAIN.items()},
}
"""Ending of a file -> its reader."""


@dataclass(frozen=True)
class Shards:
    """The shards of one split.

    Attributes:
        where: File, directory or Hub address, for error lines.
        names: A name for each shard; one of a Parquet file includes its number of rows.
        readers: A reader for each shard.
        num_rows: Rows of all shards; None where only reading all of them would tell.
        num_bytes: Bytes of all JSON-lines files. A mended row changes them a little.
    """

    where: str
    names: tuple[str, ...]
    readers: tuple[Reader, ...]
    num_rows: int | None
    num_bytes: int = 0


def local_shards(source: Path, split: str) -> Shards:
    """The shards of a file, or of the files of a split: <split>.<ending>, <split>-*.<ending> or <split>/*.<ending>.

    Only footers of Parquet files are read.

    Raises: UserError if there is no such file, or it is of another kind or damaged.
    """
    files = [source] if source.is_file() else _files_of_split(source, split)
    wrong = [file for file in files if file.suffix.lower() not in STREAMED_SUFFIXES]
    if wrong:
        raise UserError(
            f"{wrong[0]}: cannot be streamed, allowed: {', '.join(STREAMED_SUFFIXES)}. Fix: set stream: false."
        )
    names: list[str] = []
    readers: list[Reader] = []
    num_rows: int | None = 0
    num_bytes = 0
    for file in files:
        label, size = str(file.relative_to(source)) if file != source else file.name, file.stat().st_size
        if file.suffix.lower() == ".parquet":
            groups = _row_groups(file)
            readers += [partial(_group_from, file, *group) for group in groups]
            names += [f"{label} {number}: {rows} rows" for number, _, rows in groups]
            num_rows = None if num_rows is None else num_rows + sum(rows for _, _, rows in groups)
        else:
            starts = range(0, size, _RANGE_BYTES)
            readers += [partial(_line_range, file, start, min(start + _RANGE_BYTES, size)) for start in starts]
            names += [f"{label} {number}" for number in range(len(starts))]
            num_rows, num_bytes = None, num_bytes + size
    if not readers:
        raise UserError(f"{source}: the data set is empty, allowed: at least one row")
    return Shards(str(source), tuple(names), tuple(readers), num_rows, num_bytes)


def _files_of_split(folder: Path, split: str) -> list[Path]:
    if not folder.is_dir():
        raise UserError(missing(folder))
    endings = [f"{folder.name}/{split}{form}" for form in ("", "-*", "/*")]
    found = [
        path
        for ending in STREAMED_SUFFIXES
        for pattern in (f"{split}{ending}", f"{split}-*{ending}", f"{split}/*{ending}")
        for path in folder.glob(pattern)
        if path.is_file()
    ]
    if not found:
        names = sorted({entry.name.partition(".")[0].partition("-")[0] for entry in folder.iterdir()})
        there = f"there are {', '.join(names[:10])}" if names else "it is empty"
        raise UserError(
            f"{folder}: no file for split {split!r}, looked for {', '.join(endings)} with "
            f"{' or '.join(STREAMED_SUFFIXES)}; {there}.{nearest(split, names)}"
        )
    return sorted(found)


def _row_groups(path: Path) -> list[tuple[int, int, int]]:
    """(number, its first row's number in the file, rows) of each row group that has rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        metadata = pq.read_metadata(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path}: not a Parquet file ({one_line(str(error))[:300]})") from error
    sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    starts = accumulate(sizes, initial=0)
    return [(group, start, size) for group, (start, size) in enumerate(zip(starts, sizes, strict=False)) if size > 0]


def _row_group(path: Path, group: int, first: int, wanted: Sequence[int]) -> Iterator[tuple[int, Entry]]:
    """(number in the file, row) of the wanted rows of a row group, which begins at row `first`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    start = first
    try:
        with pq.ParquetFile(path, buffer_size=_READ_BYTES, pre_buffer=False, page_checksum_verification=True) as file:
            for batch in file.iter_batches(_ROWS_AT_ONCE, row_groups=[group], use_threads=False):
                stop = start + batch.num_rows
                mine = wanted[bisect_left(wanted, start) : bisect_left(wanted, stop)]
                if len(mine):
                    yield from zip(map(int, mine), _entries(batch.take([row - start for row in mine])), strict=True)
                start = stop
                if stop > wanted[-1]:
                    return
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: row group {group}: damaged ({one_line(str(error))[:300]})") from error


def _entries(batch: Any) -> list[Entry]:
    """The rows of an Arrow batch; one by one where Python cannot express a value, such as text that is not UTF-8."""
    try:
        return list(batch.to_pylist())
    except (ValueError, OverflowError) as error:
        if batch.num_rows == 1:
            return [RowFault(f"a value cannot be read ({reason_of(error)})")]
        return [entry for row in range(batch.num_rows) for entry in _entries(batch.slice(row, 1))]


def _group_from(path: Path, group: int, first: int, size: int, skip: int) -> Iterator[PlacedRow]:
    """The rows of a row group of `size` rows from `skip` on."""
    if skip < size:
        for number, row in _row_group(path, group, first, range(first + skip, first + size)):
            yield f"{path}: row {number}", row


def _lines(path: Path, start: int, stop: int | None = None) -> Iterator[tuple[int, int, bytes]]:
    """(number from 1, byte, line) of the lines that begin in a range of bytes and are not blank.

    Only \\n ends a line: JSON strings may hold U+2028 and other characters that `splitlines` takes for line ends.
    """
    with readable(path), open_bytes(path) as file:
        place = 0
        if start:
            file.seek(start - 1)
            place = start - 1 + len(file.readline())  # to the first line that begins at `start` or behind it
        number = 0
        while (stop is None or place < stop) and (line := file.readline()):
            number += 1
            if line.strip(_BLANK):
                yield number, place, line
            place += len(line)


def _line_range(path: Path, start: int, stop: int, skip: int) -> Iterator[PlacedRow]:
    """The rows of a range of bytes."""
    for row, (_, place, line) in enumerate(_lines(path, start, stop)):
        if row >= skip:
            yield f"{path}: byte {place}", _parsed(line)


def _parsed(line: bytes) -> Entry:
    try:
        return _object(parse_json(line.rstrip(b"\r\n").decode("utf-8-sig")))
    except UnicodeDecodeError as error:
        return RowFault(f"not UTF-8 text (byte {error.start} of the line)")
    except ValueError as error:  # not JSON, nested too deeply, a number of thousands of digits
        return RowFault(f"not JSON ({_json_reason(error)})")


def _json_reason(error: ValueError) -> str:
    return f"column {error.colno}: {error.msg}" if isinstance(error, json.JSONDecodeError) else str(error)


def _object(value: Any) -> Entry:
    return value if isinstance(value, dict) else RowFault(f"must be an object {{column: value}}, got {shown(value)}")


def hub_rows(source: str, *, split: str, revision: str | None, hint: str = "") -> Rows:
    """The rows of a data set on the Hub, in its default configuration.

    Raises: UserError: As `hub_shards`, and where the data set is empty.
    """
    loaded = _load_dataset(source, hint, split=split, revision=revision)

    def chosen(indices: Sequence[int]) -> Iterator[tuple[int, Entry]]:
        return zip(map(int, indices), map(dict, loaded.select(indices)), strict=True)

    # The fingerprint of a data set that `datasets` has prepared follows its files' check sums.
    return _not_empty(Rows(source, "row", len(loaded), chosen, f"{source} {loaded._fingerprint}"))


def hub_shards(source: str, *, split: str, revision: str | None, hint: str = "") -> Shards:
    """The files of a data set on the Hub, in its default configuration, streamed by `datasets`.

    Raises: UserError: With the reason that `datasets` gives and `hint`, if there is no such data set or split, no
        connection, or the data set is a loading script.
    """
    stream = _load_dataset(source, hint, split=split, revision=revision, streaming=True)
    num_shards = stream.num_shards
    splits = stream.info.splits or {}
    num_rows = splits[split].num_examples if split in splits else None
    readers = tuple(partial(_hub_shard, source, stream, number) for number in range(num_shards))
    names = tuple(f"{source}@{revision} {split} {number} of {num_shards}" for number in range(num_shards))
    return Shards(source, names, readers, num_rows or None)


def _load_dataset(source: str, hint: str, **options: Any) -> Any:
    import datasets  # takes a second; only needed for data from the Hub

    try:
        return datasets.load_dataset(source, **options)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise HubFailure(f"{source}: cannot be read from the Hub ({reason_of(error)}).{hint}") from error


def _hub_shard(source: str, stream: Any, number: int, skip: int) -> Iterator[PlacedRow]:
    """The rows of a file on the Hub from `skip` on. A lost connection is opened again, three times for a row."""
    shard, row, waits = stream.shard(stream.num_shards, number), skip, iter(_HUB_WAITS)
    while True:
        try:
            for values in shard.skip(row) if row else shard:
                yield f"{source}: shard {number}: row {row}", dict(values)
                row, waits = row + 1, iter(_HUB_WAITS)
            return
        except Exception as error:  # httpx, aiohttp, fsspec and datasets have no base class in common
            wait = next(waits, None)
            if wait is None:
                place = f"{source}: shard {number}: row {row}"
                raise UserError(f"{place}: cannot be read from the Hub ({reason_of(error)})") from error
            logger.warning("%s: shard %d: %s. Trying again in %g s.", source, number, reason_of(error), wait)
            time.sleep(wait)


def _not_empty(rows: Rows) -> Rows:
    if rows.num_rows == 0:
        raise UserError(f"{rows.where}: the data set is empty, allowed: at least one row")
    return rows
