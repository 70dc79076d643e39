"""Readers of data files: whole, or a shard at a time.

A shard is a row group of a Parquet file, a range of bytes of a JSON-lines file, or any other file. It is read from any
row on, a row at a time. A row that cannot be read comes as a RowFault. The rows of a file that is not streamed stay on
disk, too, until they are asked for: only the places of some of them are kept.

The readers of `datasets` are used for the Hub only. Measured with datasets 5.2 on local files: a faulty line is named
by its row within a chunk of 10 MB, without the file; a column that only some rows have comes as null in all of them; a
type that changes after the first chunk is an error without a place; texts that look like dates come as datetimes; to
skip to a row reads all rows before it, and a Parquet file takes the memory of a whole row group (251 MiB against 13 for
one of 160 MB).
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, islice, takewhile
from pathlib import Path
from typing import Any

from qdora.data.data_file import ending, go_to, identity_of, open_bytes, readable
from qdora.data.file_records import Record, RecordFile, check_utf8, json_entry, record_file, split_lines
from qdora.data.rows import Entry, Place, RowFault, Rows, between, chosen_of_parts, empty_data_set
from qdora.data.source_files import files_of, missing
from qdora.errors import UserError
from qdora.recipe.data_settings import FILE_SUFFIXES
from qdora.recipe.faults import one_line, reason_of

_RANGE_BYTES = 16 * 2**20
"""Bytes of a shard of a JSON-lines file: small enough to skip to a row of it in some 50 ms."""
_ROWS_AT_ONCE = 1024
"""Rows of a Parquet file that are decoded together."""
_READ_BYTES = 2**20
"""Bytes of a Parquet file per read. Without a limit whole column chunks of a row group are read, 128 MiB and more."""
_KEPT_EACH = 16
"""Records from one whose place is kept to the next: to read one of them, up to 15 before it are passed over."""

PlacedRow = tuple[str, Entry]
"""(place, row): "file: row 17" for error lines, and column -> value, or why the row cannot be read."""
Reader = Callable[[int], Iterator[PlacedRow]]
"""The rows of one shard, without its first `skip` rows."""


def read_rows(path: Path) -> Rows:
    """The rows of a file, read when they are asked for. Its ending says the format.

    Raises: UserError if the file is missing, has an unknown ending, is empty or damaged.
    """
    if not path.is_file():
        raise UserError(missing(path))
    _check_endings([path])
    with readable(path):
        found = _parquet(path) if ending(path) == ".parquet" else _records(path)
    if found.num_rows == 0:
        raise UserError(empty_data_set(path))
    return found


def rows_of_split(source: Path, split: str) -> Rows:
    """The rows of all files of a source's split, one file behind the other; see `files_of`.

    Raises: UserError: As `files_of`, and of each file as `read_rows`.
    """
    files = files_of(source, split)
    return read_rows(files[0]) if len(files) == 1 else joined_rows(_shared_folder(files), files)


def joined_rows(folder: Path, files: Sequence[Path]) -> Rows:
    """The rows of several files in a folder. A row's place begins with the name of its file."""
    parts = [read_rows(file) for file in files]
    names = [str(file.relative_to(folder)) for file in files]

    def chosen(indices: Sequence[int]) -> Iterator[tuple[Place, Entry]]:
        for number, _, place, row in chosen_of_parts(parts, indices):
            yield f"{names[number]}: {parts[number].unit} {place}", row

    identity = " ".join(f"{name} {part.identity}" for name, part in zip(names, parts, strict=True))
    return Rows(str(folder), "row", sum(part.num_rows for part in parts), chosen, identity)


def _shared_folder(files: Sequence[Path]) -> Path:
    return Path(os.path.commonpath([file.parent for file in files]))


def _check_endings(files: Sequence[Path]) -> None:
    for file in files:
        if ending(file) not in FILE_SUFFIXES:
            raise UserError(f"{file}: unknown ending {ending(file)!r}, allowed: {', '.join(FILE_SUFFIXES)}.")


def _parquet(path: Path) -> Rows:
    groups = _row_groups(path)

    def chosen(indices: Sequence[int]) -> Iterator[tuple[int, Entry]]:
        for group, first, size in groups:
            wanted = between(indices, first, first + size)
            if len(wanted):
                yield from _row_group(path, group, first, wanted)

    return Rows(str(path), "row", sum(size for _, _, size in groups), chosen, identity_of(path))


def _records(path: Path) -> Rows:
    """The rows of a file of records. Of every 16 the place of one is kept."""
    file_of = record_file(path)
    numbers, places, num_rows = array("q"), array("q"), 0
    with readable(path), open_bytes(path) as file:
        for number, place, _ in file_of.records(file):
            if num_rows % _KEPT_EACH == 0:
                numbers.append(number)
                places.append(place)
            num_rows += 1

    def chosen(indices: Sequence[int]) -> Iterator[tuple[int, Entry]]:
        is_plain = ending(path) == path.suffix.lower()
        records: Iterator[Record] | None = None
        here = 0
        with readable(path), open_bytes(path) as file:
            for index in indices:
                kept = index // _KEPT_EACH
                if records is None or (is_plain and kept > here // _KEPT_EACH):
                    go_to(file, places[kept], can_seek=is_plain)
                    records, here = file_of.split(file, places[kept], numbers[kept]), kept * _KEPT_EACH
                number, _, content = next(islice(records, index - here, None))
                here = index + 1
                yield number, file_of.parse(content)

    return Rows(str(path), file_of.unit, num_rows, chosen, identity_of(path))


@dataclass(frozen=True)
class Shards:
    """The shards of one split.

    Attributes:
        where: File, folder, pattern or Hub address, for error lines.
        names: A name for each shard; one of a Parquet file includes its number of rows.
        readers: A reader for each shard.
        num_rows: Rows of all shards; None where only reading all of them would tell.
        num_bytes: Bytes of all files but Parquet. A mended row changes them a little.
    """

    where: str
    names: tuple[str, ...]
    readers: tuple[Reader, ...]
    num_rows: int | None
    num_bytes: int = 0


def local_shards(source: Path, split: str) -> Shards:
    """The shards of the files of a source's split; see `files_of`.

    Of Parquet files the footers are read, of others the beginnings.

    Raises: UserError if there is no such file, or it is of another kind or damaged.
    """
    files = files_of(source, split)
    _check_endings(files)
    folder = source if source.is_dir() else _shared_folder(files)
    names: list[str] = []
    readers: list[Reader] = []
    num_rows: int | None = 0
    num_bytes = 0
    for file in files:
        label, size = str(file.relative_to(folder)), file.stat().st_size
        if ending(file) == ".parquet":
            groups = _row_groups(file)
            readers += [partial(_group_from, file, *group) for group in groups]
            names += [f"{label} {number}: {rows} rows" for number, _, rows in groups]
            num_rows = None if num_rows is None else num_rows + sum(rows for _, _, rows in groups)
            continue
        num_rows, num_bytes = None, num_bytes + size
        if ending(file) == ".jsonl":
            check_utf8(file)
            starts = range(0, size, _RANGE_BYTES)
            readers += [partial(_line_range, file, start, min(start + _RANGE_BYTES, size)) for start in starts]
            names += [f"{label} {number}" for number in range(len(starts))]
        elif size:
            readers.append(partial(_records_from, record_file(file)))
            names.append(label)
    if not readers:
        raise UserError(empty_data_set(source))
    return Shards(str(source), tuple(names), tuple(readers), num_rows, num_bytes)


def _row_groups(path: Path) -> list[tuple[int, int, int]]:
    """(number, its first row's number in the file, rows) of each row group that has rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        metadata = pq.read_metadata(path)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # the last of a name in the footer
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
                mine = between(wanted, start, stop)
                if len(mine):
                    yield from zip(map(int, mine), _entries(batch.take([row - start for row in mine])), strict=True)
                start = stop
                if stop > wanted[-1]:
                    return
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
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


def _line_range(path: Path, start: int, stop: int, skip: int) -> Iterator[PlacedRow]:
    """The rows of the lines that begin in a range of bytes of a JSON-lines file, from `skip` on."""
    with readable(path), path.open("rb") as file:
        place = 0
        if start:
            file.seek(start - 1)
            place = start - 1 + len(file.readline())  # to the first line that begins at `start` or behind it
        lines = takewhile(lambda record: record[1] < stop, split_lines(file, place, 0))
        for _, here, line in islice(lines, skip, None):
            yield f"{path}: byte {here}", json_entry(line)


def _records_from(file_of: RecordFile, skip: int) -> Iterator[PlacedRow]:
    """The rows of a file of records from `skip` on."""
    with readable(file_of.path), open_bytes(file_of.path) as file:
        for number, _, content in islice(file_of.records(file), skip, None):
            yield f"{file_of.path}: {file_of.unit} {number}", file_of.parse(content)
