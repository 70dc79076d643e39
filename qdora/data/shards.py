"""Data sets larger than memory as shards: pieces that are read by themselves, from any row on, a row at a time.

A shard is a row group of a Parquet file, a range of bytes of a JSON-lines file, or a file of a data set on the Hub.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

from qdora.data.commonsense import shown
from qdora.data.commonsense_hub import reason_of
from qdora.data.local_files import missing
from qdora.errors import UserError, nearest
from qdora.recipe.data_settings import STREAMED_SUFFIXES

_RANGE_BYTES = 16 * 2**20
"""Of a JSON-lines file: small enough to skip to a row of it in some 50 ms."""
_ROWS_AT_ONCE = 1024
"""Rows of a Parquet file that are decoded together."""
_READ_BYTES = 2**20
"""Of a Parquet file that are read together; otherwise whole column chunks of a row group, 128 MiB and more, are."""

PlacedRow = tuple[str, dict[str, Any]]
"""(place, row): "file: row 17" for error lines, and column -> value."""
Reader = Callable[[int], Iterator[PlacedRow]]
"""The rows of one shard from row `skip` of it on."""


@dataclass(frozen=True)
class Shards:
    """The shards of one split.

    Attributes:
        where: File, directory or Hub address, for error lines.
        names: Of each shard, with what tells a changed file from the old one (its length).
        readers: Of each shard.
        num_rows: In all shards; None where only reading all of them would tell.
    """

    where: str
    names: tuple[str, ...]
    readers: tuple[Reader, ...]
    num_rows: int | None


def local_shards(source: Path, split: str) -> Shards:
    """The shards of a file, or of the files of a split: <split>.<ending>, <split>-*.<ending> or <split>/*.<ending>.

    Only footers of Parquet files are read.

    Raises:
        UserError: If there is no such file, or it is of another kind or damaged.
    """
    files = [source] if source.is_file() else _files_of_split(source, split)
    wrong = [file for file in files if file.suffix.lower() not in STREAMED_SUFFIXES]
    if wrong:
        raise UserError(
            f"{wrong[0]}: cannot be streamed, allowed: {', '.join(STREAMED_SUFFIXES)}; or leave stream out."
        )
    names: list[str] = []
    readers: list[Reader] = []
    counts: list[int | None] = []
    for file in files:
        label = str(file.relative_to(source)) if file != source else file.name
        found = _parquet(file) if file.suffix.lower() == ".parquet" else _json_lines(file)
        names += [f"{label} {file.stat().st_size} {number}" for number in range(len(found))]
        readers += [reader for reader, _ in found]
        counts += [count for _, count in found]
    if not readers:
        raise UserError(f"{source}: the data set is empty, allowed: at least one row")
    known = [count for count in counts if count is not None]
    return Shards(str(source), tuple(names), tuple(readers), sum(known) if len(known) == len(counts) else None)


def hub_shards(source: str, *, split: str, revision: str | None, hint: str = "") -> Shards:
    """The files of a data set on the Hub, in its default configuration, through the streaming of `datasets`.

    Raises:
        UserError: With the reason that `datasets` gives and `hint`, if there is no such data set or split, no
            connection, or the data set is a loading script.
    """
    import datasets  # takes a second; only needed for data from the Hub

    try:
        stream = datasets.load_dataset(source, split=split, revision=revision, streaming=True)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"{source}: cannot be read from the Hub ({reason_of(error)}).{hint}") from error
    num_shards = stream.num_shards
    splits = stream.info.splits or {}
    num_rows = splits[split].num_examples if split in splits else None
    readers = tuple(partial(_hub_rows, source, stream, number) for number in range(num_shards))
    names = tuple(f"{source}@{revision} {split} {number} of {num_shards}" for number in range(num_shards))
    return Shards(source, names, readers, num_rows or None)


def _hub_rows(source: str, stream: Any, number: int, skip: int) -> Iterator[PlacedRow]:
    shard = stream.shard(stream.num_shards, number)
    try:
        for row, values in enumerate(shard.skip(skip) if skip else shard, start=skip):
            yield f"{source}: shard {number}: row {row}", dict(values)
    except (OSError, RuntimeError) as error:  # a connection that is lost for longer than `datasets` tries
        raise UserError(f"{source}: shard {number}: cannot be read from the Hub ({reason_of(error)})") from error


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


def _parquet(path: Path) -> list[tuple[Reader, int | None]]:
    """A shard for each row group that has rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        metadata = pq.read_metadata(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path}: not a Parquet file ({error})") from error
    sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    starts = accumulate(sizes, initial=0)
    return [
        (partial(_row_group, path, group, start), size)
        for group, (start, size) in enumerate(zip(starts, sizes, strict=False))
        if size > 0
    ]


def _row_group(path: Path, group: int, first: int, skip: int) -> Iterator[PlacedRow]:
    """Rows of a row group, a part at a time; `first` is its first row's number in the file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    start = 0
    try:
        with pq.ParquetFile(path, buffer_size=_READ_BYTES, pre_buffer=False) as file:
            for batch in file.iter_batches(_ROWS_AT_ONCE, row_groups=[group], use_threads=False):
                kept = batch.slice(min(max(skip - start, 0), batch.num_rows))
                number = first + start + batch.num_rows - kept.num_rows
                start += batch.num_rows
                for offset, row in enumerate(kept.to_pylist()):
                    yield f"{path}: row {number + offset}", row
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: row group {group}: damaged ({error})") from error


def _json_lines(path: Path) -> list[tuple[Reader, int | None]]:
    """A shard for each range of bytes; a line belongs to the range in which it begins."""
    size = path.stat().st_size
    ranges = range(0, size, _RANGE_BYTES)
    return [(partial(_lines, path, start, min(start + _RANGE_BYTES, size)), None) for start in ranges]


def _lines(path: Path, start: int, stop: int, skip: int) -> Iterator[PlacedRow]:
    with path.open("rb") as file:
        if start:
            file.seek(start - 1)
            file.readline()  # to the first line that begins at `start` or behind it
        place, number = file.tell(), 0
        while place < stop and (line := file.readline()):
            if line.strip():
                number += 1
                if number > skip:
                    yield f"{path}: byte {place}", _object(f"{path}: byte {place}", line)
            place += len(line)


def _object(place: str, line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{place}: not UTF-8 text (byte {error.start} of the line)") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{place}: not JSON (column {error.colno}: {error.msg})") from error
    if not isinstance(value, dict):
        raise UserError(f"{place}: got {shown(value)}, allowed: an object {{column: value}}")
    return value
