"""Readers of Parquet, JSON-lines, JSON and text files and of data sets on the Hub: whole, or a shard at a time.

A shard is a row group of a Parquet file, a range of bytes of a JSON-lines file, or a file of a data set on the Hub. It
is read from any row on, a row at a time. A file that is read whole is read by the same functions.

The readers of `datasets` are used for the Hub only. Measured with datasets 5.2 on local files: a faulty line is named
by its row within a chunk of 10 MB, without the file; a column that only some rows have comes as null in all of them; a
type that changes after the first chunk is an error without a place; texts that look like dates come as datetimes; to
skip to a row reads all rows before it, and a Parquet file takes the memory of a whole row group (251 MiB against 13 for
one of 160 MB).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

from qdora.data.rows import RowFault, Rows, each_made, shown
from qdora.errors import UserError, nearest
from qdora.files.json_file import parse_json
from qdora.recipe.data_settings import STREAMED_SUFFIXES
from qdora.recipe.faults import one_line

_RANGE_BYTES = 16 * 2**20
"""Bytes of a shard of a JSON-lines file: small enough to skip to a row of it in some 50 ms."""
_ROWS_AT_ONCE = 1024
"""Rows of a Parquet file that are decoded together."""
_READ_BYTES = 2**20
"""Bytes of a Parquet file per read. Without a limit whole column chunks of a row group are read, 128 MiB and more."""
_BLANK = b" \t\r\n\v\f\xef\xbb\xbf"
"""White space and the byte order mark."""

PlacedRow = tuple[str, dict[str, Any]]
"""(place, row): "file: row 17" for error lines, and column -> value."""
Reader = Callable[[int], Iterator[PlacedRow]]
"""The rows of one shard, without its first `skip` rows."""


def read_rows(path: Path) -> Rows:
    """All rows of a file. Its ending says the format.

    Raises: UserError if the file is missing, has an unknown ending, is empty or damaged.
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
    return _not_empty(rows)


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
    return sorted({path.stem for path in directory.iterdir() if path.suffix.lower() in READERS})


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
    return Rows(str(path), "row", [placed for group in groups for placed in _row_group(path, *group[:2])])


def _json_lines(path: Path) -> Rows:
    lines = ((number, line) for number, _, line in _lines(path, 0, path.stat().st_size))
    return Rows(str(path), "line", each_made(str(path), "line", lines, lambda _, line: _parsed(line)))


def _json(path: Path) -> Rows:
    """A list of objects, or JSON-lines under the wrong ending."""
    text = path.read_text(encoding="utf-8-sig")
    try:
        value = parse_json(text) if text.strip() else []
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # a second value after the first: one object a line
            return _json_lines(path)
        raise UserError(f"{path}: line {error.lineno}: not JSON (column {error.colno}: {error.msg})") from error
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from error
    if isinstance(value, dict) and not any(isinstance(entry, list) and entry for entry in value.values()):
        value = [value]
    if not isinstance(value, list):
        raise UserError(f"{path}: must be a list of objects, or one object a line, got {shown(value)}")
    return Rows(str(path), "row", each_made(str(path), "row", enumerate(value), lambda _, entry: _object(entry)))


def _text(path: Path) -> Rows:
    """One row {"text": ...} for each document; documents are separated by blank lines."""
    rows = Rows(str(path), "line", [])
    start, lines = 1, list[str]()
    text = path.read_text(encoding="utf-8-sig")
    if "\0" in text:  # UTF-16 without its mark is valid UTF-8, with a null byte behind every letter
        raise UserError(f"{path}: holds null bytes, so it is not UTF-8 text. Fix: convert it, or remove them.")
    for number, line in enumerate([*text.split("\n"), ""], start=1):
        if line.strip():
            if not lines:
                start = number
            lines.append(line.rstrip("\r"))
        elif lines:
            rows.placed.append((start, {"text": "\n".join(lines)}))
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


@dataclass(frozen=True)
class Shards:
    """The shards of one split.

    Attributes:
        where: File, directory or Hub address, for error lines.
        names: A name for each shard. It includes the length of the file, so that a changed file gets another name.
        readers: A reader for each shard.
        num_rows: Rows of all shards; None where only reading all of them would tell.
    """

    where: str
    names: tuple[str, ...]
    readers: tuple[Reader, ...]
    num_rows: int | None


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
    for file in files:
        label, size = str(file.relative_to(source)) if file != source else file.name, file.stat().st_size
        if file.suffix.lower() == ".parquet":
            groups = _row_groups(file)
            found = [partial(_placed, f"{file}: row", partial(_row_group, file, *group[:2])) for group in groups]
            num_rows = None if num_rows is None else num_rows + sum(group[2] for group in groups)
        else:
            starts = range(0, size, _RANGE_BYTES)
            found = [partial(_line_range, file, start, min(start + _RANGE_BYTES, size)) for start in starts]
            num_rows = None
        names += [f"{label} {size} {number}" for number in range(len(found))]
        readers += found
    if not readers:
        raise UserError(f"{source}: the data set is empty, allowed: at least one row")
    return Shards(str(source), tuple(names), tuple(readers), num_rows)


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


def _row_group(path: Path, group: int, first: int, skip: int = 0) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number in the file, row) of the rows of a row group, decoded a part at a time."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    start = 0
    try:
        with pq.ParquetFile(path, buffer_size=_READ_BYTES, pre_buffer=False, page_checksum_verification=True) as file:
            for batch in file.iter_batches(_ROWS_AT_ONCE, row_groups=[group], use_threads=False):
                kept = batch.slice(min(max(skip - start, 0), batch.num_rows))
                number = first + start + batch.num_rows - kept.num_rows
                start += batch.num_rows
                yield from enumerate(kept.to_pylist(), start=number)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: row group {group}: damaged ({one_line(str(error))[:300]})") from error


def _placed(label: str, read: Callable[[int], Iterator[tuple[int, dict[str, Any]]]], skip: int) -> Iterator[PlacedRow]:
    return ((f"{label} {number}", row) for number, row in read(skip))


def _lines(path: Path, start: int, stop: int) -> Iterator[tuple[int, int, bytes]]:
    """(number from 1, byte, line) of the lines that begin in a range of bytes and are not blank.

    Only \\n ends a line: JSON strings may hold U+2028 and other characters that `splitlines` takes for line ends.
    """
    with path.open("rb") as file:
        if start:
            file.seek(start - 1)
            file.readline()  # to the first line that begins at `start` or behind it
        place, number = file.tell(), 0
        while place < stop and (line := file.readline()):
            number += 1
            if line.strip(_BLANK):
                yield number, place, line
            place += len(line)


def _line_range(path: Path, start: int, stop: int, skip: int) -> Iterator[PlacedRow]:
    """The rows of a range of bytes."""
    for row, (_, place, line) in enumerate(_lines(path, start, stop)):
        if row >= skip:
            try:
                yield f"{path}: byte {place}", _parsed(line)
            except RowFault as fault:
                raise UserError(f"{path}: byte {place}: {fault}") from fault


def _parsed(line: bytes) -> dict[str, Any]:
    try:
        return _object(parse_json(line.rstrip(b"\r\n").decode("utf-8-sig")))
    except UnicodeDecodeError as error:
        raise RowFault(f"not UTF-8 text (byte {error.start} of the line)") from error
    except json.JSONDecodeError as error:
        raise RowFault(f"not JSON (column {error.colno}: {error.msg})") from error
    except RowFault:
        raise
    except ValueError as error:  # nested too deeply, a number of thousands of digits
        raise RowFault(f"not JSON ({error})") from error


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise RowFault(f"must be an object {{column: value}}, got {shown(value)}")
    return value


def hub_rows(source: str, *, split: str, revision: str | None, hint: str = "") -> Rows:
    """The rows of a data set on the Hub, in its default configuration.

    Raises: UserError: As `hub_shards`, and where the data set is empty.
    """
    loaded = _load_dataset(source, hint, split=split, revision=revision)
    return _not_empty(Rows(source, "row", [(number, dict(row)) for number, row in enumerate(loaded)]))


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


def reason_of(error: Exception) -> str:
    """The message of somebody else's error in one line."""
    return one_line(f"{type(error).__name__}: {error}")[:300]


def _load_dataset(source: str, hint: str, **options: Any) -> Any:
    import datasets  # takes a second; only needed for data from the Hub

    try:
        return datasets.load_dataset(source, **options)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"{source}: cannot be read from the Hub ({reason_of(error)}).{hint}") from error


def _hub_shard(source: str, stream: Any, number: int, skip: int) -> Iterator[PlacedRow]:
    shard = stream.shard(stream.num_shards, number)
    try:
        for row, values in enumerate(shard.skip(skip) if skip else shard, start=skip):
            yield f"{source}: shard {number}: row {row}", dict(values)
    except (OSError, RuntimeError) as error:  # a connection that is lost for longer than `datasets` tries
        raise UserError(f"{source}: shard {number}: cannot be read from the Hub ({reason_of(error)})") from error


def _not_empty(rows: Rows) -> Rows:
    if not rows.placed:
        raise UserError(f"{rows.where}: the data set is empty, allowed: at least one row")
    return rows
