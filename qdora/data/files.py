"""Data files: which ones a source means, and their rows, a row at a time.

`read_rows` counts the rows of a file and reads any of them when they are asked for; `local_shards` reads row groups of
Parquet files, ranges of bytes of JSON lines, and other files whole, from any row on. A row that cannot be read is a
RowFault.

The readers of `datasets` are used for the Hub only. Measured with datasets 5.2 on local files: a faulty line is named
by its row within a chunk of 10 MB, without the file; a column that only some rows have comes as null in all of them; a
type that changes after the first chunk is an error without a place; texts that look like dates come as datetimes; to
skip to a row reads all rows before it, and a Parquet file takes the memory of a whole row group (251 MiB against 13 for
one of 160 MB).
"""

from __future__ import annotations

import csv
import glob
import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, islice, takewhile
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from qdora.data.rows import Entry, RowFault, Rows, between, empty_data_set, joined, parse_row_json
from qdora.errors import UserError, nearest, nearest_path
from qdora.files.sampled_digest import sampled_digest
from qdora.recipe.data_settings import COMPRESSED_SUFFIXES, FILE_SUFFIXES, is_pattern
from qdora.recipe.section import one_line, reason_of, shown

_RANGE_BYTES = 16 * 2**20
"""Bytes of a shard of a JSON-lines file: small enough to skip to a row of it in some 50 ms."""
_ROWS_AT_ONCE = 1024
"""Rows of a Parquet file that are decoded together."""
_READ_BYTES = 2**20
"""Bytes of a Parquet file per read. Without a limit whole column chunks of a row group are read, 128 MiB and more."""
_MARK = b"\xef\xbb\xbf"
"""The byte order mark."""

_SPLIT_NAMES = frozenset(("train", "training", "validation", "valid", "val", "dev", "test", "testing", "eval"))
"""A folder with one of these words in the name of a file or folder has splits."""
_TRAIN_NAMES = frozenset(("train", "training"))
_SHARD = re.compile(r"-\d+(-of-\d+)?$")
_ABOUT = frozenset(("readme", "license", "licence", "changelog", "dataset_info", "dataset_infos"))
"""Names of files that say something about a folder's data, and hold none."""


# The files of a source


def files_of(source: Path, split: str) -> list[Path]:
    """The files of a source's split, sorted. A single file, and a pattern, are all of the data whatever the split.

    Of a folder they are <split>.<ending>, <split>-*.<ending> and <split>/*.<ending>, in it or in one folder inside it.
    A folder in which no name tells of splits is the training split as a whole, folders inside it included.
    """
    if source.is_file():
        return [source]
    if source.is_dir():
        return files_of_split(source, split) or _whole_folder(source, split)
    if not is_pattern(str(source)):
        raise UserError(missing(source))
    files = _data_files(glob.glob(str(source), recursive=True))
    if not files:
        raise UserError(f"{source}: no data file matches, allowed endings: {', '.join(FILE_SUFFIXES)}.")
    return files


def files_of_split(folder: Path, split: str) -> list[Path]:
    """The files that are named after a split, in a folder or, if it names no split at all, in one folder inside it."""
    files = _named_after(folder, split)
    if files or any(_split_words(path.name) for path in folder.iterdir()):
        return files
    inside: dict[Path, list[Path]] = {}
    for path in sorted(map(Path, glob.glob(f"{glob.escape(str(folder))}/**/", recursive=True))):
        if not any(path.is_relative_to(other) for other in inside) and (files := _named_after(path, split)):
            inside[path] = files
    if len(inside) > 1:
        names = [str(path.relative_to(folder)) for path in inside]
        fix = f"Fix: name one of them, such as {folder / names[0]}."
        raise UserError(f"{folder}: {', '.join(names[:10])} each hold split {split!r}. {fix}")
    return next(iter(inside.values()), [])


def _named_after(folder: Path, split: str) -> list[Path]:
    same = [path for suffix in FILE_SUFFIXES if (path := folder / f"{split}{suffix}").is_file()]
    if len(same) > 1:
        names = ", ".join(path.name for path in same)
        raise UserError(f"{folder}: {names} all hold split {split!r}. Fix: name one file as the source.")
    start = glob.escape(str(folder / split))
    return sorted([*same, *_data_files([*glob.glob(f"{start}-*"), *glob.glob(f"{start}/*")])])


def _whole_folder(folder: Path, split: str) -> list[Path]:
    files = _data_files(glob.glob(f"{glob.escape(str(folder))}/**", recursive=True))
    names = {part for path in files for part in path.relative_to(folder).parts[:-1]}
    names |= {_stem(path) for path in files}
    others = {name for name in names if _split_words(name) - _TRAIN_NAMES}
    if split != "train" or not files or others:
        there = list(dict.fromkeys(_SHARD.sub("", name) for name in [*sorted(others), *sorted(names)]))
        what = f"there are {', '.join(there[:10])}" if there else "there is no data file at all"
        meant = next((f", such as {path}" for path in files if _split_words(_stem(path)) & _TRAIN_NAMES), "")
        fix = f" Fix: name the files that are meant{meant}." if files else ""
        near = nearest(split, there) if split != "train" else ""
        looked = f"looked for {split}.*, {split}-* and {split}/*"
        raise UserError(f"{folder}: no file for split {split!r}, {looked}; {what}.{near or fix}")
    endings = sorted(set(map(ending, files)))
    if len(endings) > 1:
        what = f"holds files of several kinds ({', '.join(endings)}), and none is named after split {split!r}."
        raise UserError(f"{folder}: {what} Fix: name those that are meant, such as {folder}/*{endings[0]}.")
    return files


def _split_words(name: str) -> frozenset[str]:
    return _SPLIT_NAMES.intersection(re.split(r"[-_. ]", name.lower()))


def _data_files(paths: Iterable[str]) -> list[Path]:
    """Those that are data files, without what only tells of the others. (`glob` leaves out what is hidden.)"""
    files = (path for path in map(Path, paths) if ending(path) in FILE_SUFFIXES)
    return sorted(path for path in files if _stem(path).lower() not in _ABOUT and path.is_file())


def ending(path: Path) -> str:
    """.jsonl of rows.jsonl, .jsonl.gz of rows.jsonl.gz."""
    last = path.suffix.lower()
    return Path(path.stem).suffix.lower() + last if last in COMPRESSED_SUFFIXES else last


def _stem(path: Path) -> str:
    return path.name[: len(path.name) - len(ending(path))]


def missing(path: Path) -> str:
    """The error line for a path that does not exist, with the nearest name that does."""
    if path.is_dir():
        return f"{path}: is a directory, expected a file"
    return f"{path}: no such file.{nearest_path(path)}"


# A file as bytes


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


# A file as records


class _Records(NamedTuple):
    """A file as records, which are counted and passed over at little cost: what they hold is read by `parse`."""

    unit: str  # that a record's number counts: "line" (from 1, its first one) or "row" (from 0)
    split: Callable[[BinaryIO], Iterator[tuple[int, Any]]]  # -> (number, content) of each record
    parse: Callable[[Any], Entry]


def _record_file(path: Path) -> _Records:
    """A file as records; its ending says the format. JSON is a list of objects or lines, whatever the ending says."""
    kind = Path(ending(path)).stem
    if kind in (".csv", ".tsv"):
        return _Records("line", partial(_csv, path, "," if kind == ".csv" else "\t"), lambda entry: entry)
    if kind not in (".json", ".jsonl"):
        return _Records("line", _documents, _text_entry)
    with readable(path), open_bytes(path) as file:
        head = file.read(_READ_BYTES).removeprefix(_MARK).lstrip()
    first, _, rest = head.partition(b"\n")
    if head[:1] == b"[":  # a whole list in the first of several lines is a faulty row
        is_lines = bool(rest.strip()) and first.rstrip().endswith(b"]")
    else:
        is_lines = kind == ".jsonl" or not head or (bool(rest.strip()) and isinstance(_json_entry(first), dict))
    if is_lines:
        return _Records("line", lambda file: ((number, line) for number, _, line in _lines(file, 0, 1)), _json_entry)
    return _Records("row", partial(_json_items, path), _object)


def _lines(file: BinaryIO, place: int, number: int) -> Iterator[tuple[int, int, bytes]]:
    """(number, first byte, bytes) of the lines that are not blank, from a border between lines on.

    Only \\n ends a line: JSON strings may hold U+2028 and other characters that `splitlines` takes for line ends.
    """
    for line in file:
        if line.strip() not in (b"", _MARK):
            yield number, place, line
        number += 1
        place += len(line)


def _json_entry(line: bytes) -> Entry:
    try:
        return _object(parse_row_json(line.rstrip(b"\r\n").decode("utf-8-sig")))
    except UnicodeDecodeError as error:
        return RowFault(f"not UTF-8 text (byte {error.start} of the row)")
    except RowFault as fault:
        return fault
    except json.JSONDecodeError as error:
        return RowFault(f"not JSON (column {error.colno}: {error.msg})")
    except ValueError as error:  # nested too deeply, a number of thousands of digits
        return RowFault(f"not JSON ({error})")


def _object(value: Any) -> Entry:
    return value if isinstance(value, dict) else RowFault(f"must be an object {{column: value}}, got {shown(value)}")


def _json_items(path: Path, file: BinaryIO) -> Iterator[tuple[int, Any]]:
    """The items of a list, or a single object; all of them are in memory for the time of a pass."""
    try:
        value = parse_row_json(file.read().decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: line {error.lineno}: not JSON (column {error.colno}: {error.msg})") from error
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from error
    return enumerate(value if isinstance(value, list) else [value])


def _csv(path: Path, delimiter: str, file: BinaryIO) -> Iterator[tuple[int, Entry]]:
    """Rows of the columns that the first line names. A row may go over several lines."""
    # Bytes that are not UTF-8 are halves of surrogate pairs until their row is known
    text = io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline="\n")
    reader, names = csv.reader(text, delimiter=delimiter, strict=True), list[str]()
    while True:
        number, cells = reader.line_num + 1, list[str]()
        entry: RowFault | None = None
        most = csv.field_size_limit(2**31 - 1)  # of the whole process; the default cuts texts of 128 KiB
        try:
            cells = next(reader)
            "".join(cells).encode()
        except StopIteration:
            return
        except UnicodeEncodeError:
            entry = RowFault("not UTF-8 text")
        except csv.Error as error:
            if "unexpected end of data" in str(error):  # else all rows behind it would be one
                raise UserError(f"{path}: line {number}: a quotation mark opens here and is never closed.") from error
            entry = RowFault(f"not CSV ({error})")
        finally:
            csv.field_size_limit(most)
        if not entry and not cells:  # a blank line
            continue
        if not names:
            twice = [name for index, name in enumerate(cells) if name in cells[:index]]
            if entry or twice:
                raise UserError(f"{path}: line {number}: {entry or f'names the column {twice[0]!r} twice'}")
            names = cells
        elif entry or len(cells) == len(names):
            yield number, entry or dict(zip(names, cells, strict=True))
        else:
            yield number, RowFault(f"has {len(cells)} cells, the first line names {len(names)} columns")


def _documents(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Texts that blank lines separate; those of the white space of Unicode, too."""
    number, lines = 1, list[bytes]()
    for line in file:
        is_blank = line.strip() in (b"", _MARK)
        if not is_blank and (line.isascii() or line.decode("utf-8", "replace").strip()):
            lines.append(line)
            continue
        if lines:
            yield number, b"".join(lines)
        number, lines = number + len(lines) + 1, []
    if lines:
        yield number, b"".join(lines)


def _text_entry(content: bytes) -> Entry:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return RowFault(f"not UTF-8 text (byte {error.start} of the document)")
    if "\0" in text:  # UTF-16 without its mark is valid UTF-8, with a null byte behind every letter
        return RowFault("holds null bytes, so it is not UTF-8 text. Fix: convert it, or remove them.")
    return {"text": text.replace("\r\n", "\n").removesuffix("\n")}


def _check_ending(path: Path) -> None:
    if ending(path) not in FILE_SUFFIXES:
        raise UserError(f"{path}: unknown ending {ending(path)!r}, allowed: {', '.join(FILE_SUFFIXES)}.")


# All rows of a file, or any of them


def read_rows(path: Path) -> Rows:
    """The rows of a file, read when they are asked for. Its ending says the format."""
    if not path.is_file():
        raise UserError(missing(path))
    _check_ending(path)
    rows = _parquet_rows(path) if ending(path) == ".parquet" else _record_rows(path)
    if rows.num_rows == 0:
        raise UserError(empty_data_set(path))
    # Name, size, time and samples of the file change when the content does, but for rare exceptions.
    with readable(path):
        facts, digest = sampled_digest(path)
    return replace(rows, identity=f"{path.name} {facts.st_size} {facts.st_mtime_ns} {digest}")


def rows_of_split(source: Path, split: str) -> Rows:
    """The rows of all files of a source's split, one file behind the other; see `files_of`."""
    files = files_of(source, split)
    if len(files) == 1:
        return read_rows(files[0])
    folder, parts = _folder_of(files), [read_rows(file) for file in files]
    names = [str(file.relative_to(folder)) for file in files]
    identity = " ".join(f"{name} {part.identity}" for name, part in zip(names, parts, strict=True))
    return replace(joined(str(folder), parts, names), identity=identity)


def _folder_of(files: Sequence[Path]) -> Path:
    return Path(os.path.commonpath([file.parent for file in files]))


def _record_rows(path: Path) -> Rows:
    kind = _record_file(path)
    with readable(path), open_bytes(path) as file:
        num_rows = sum(1 for _ in kind.split(file))

    def chosen(indices: Sequence[int]) -> Iterator[tuple[int, Entry]]:
        with readable(path), open_bytes(path) as file:
            records, here = kind.split(file), 0
            for index in indices:
                number, content = next(islice(records, index - here, None))
                here = index + 1
                yield number, kind.parse(content)

    return Rows(str(path), kind.unit, num_rows, chosen)


def _parquet_rows(path: Path) -> Rows:
    groups = _row_groups(path)

    def chosen(indices: Sequence[int]) -> Iterator[tuple[int, Entry]]:
        for group, first, size in groups:
            mine = between(indices, first, first + size)
            if len(mine):
                yield from _row_group(path, group, first, mine)

    return Rows(str(path), "row", sum(size for _, _, size in groups), chosen)


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


def _row_group(path: Path, group: int, first: int, indices: Sequence[int]) -> Iterator[tuple[int, Entry]]:
    """(number in the file, row) of some rows of a row group, which begins at row `first`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    start = first
    try:
        with pq.ParquetFile(path, buffer_size=_READ_BYTES, pre_buffer=False, page_checksum_verification=True) as file:
            for batch in file.iter_batches(_ROWS_AT_ONCE, row_groups=[group], use_threads=False):
                stop = start + batch.num_rows
                mine = between(indices, start, stop)
                if len(mine):
                    yield from zip(map(int, mine), _entries(batch.take([row - start for row in mine])), strict=True)
                start = stop
                if stop > indices[-1]:
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


# The rows of a stream, a shard at a time

PlacedRow = tuple[str, Entry]
"""(place, row): "file: row 17" for error lines, and column -> value, or why the row cannot be read."""
Reader = Callable[[int], Iterator[PlacedRow]]
"""The rows of one shard, without its first `skip` rows."""


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
    """The shards of the files of a source's split. Of Parquet files the footers are read, of others the beginnings."""
    files = files_of(source, split)
    for file in files:
        _check_ending(file)
    folder = source if source.is_dir() else _folder_of(files)
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
            starts = range(0, size, _RANGE_BYTES)
            readers += [partial(_line_range, file, start, min(start + _RANGE_BYTES, size)) for start in starts]
            names += [f"{label} {number}" for number in range(len(starts))]
        elif size:
            readers.append(partial(_records_from, file, _record_file(file)))
            names.append(label)
    if not readers:
        raise UserError(empty_data_set(source))
    return Shards(str(source), tuple(names), tuple(readers), num_rows, num_bytes)


def _group_from(path: Path, group: int, first: int, size: int, skip: int) -> Iterator[PlacedRow]:
    rows = _row_group(path, group, first, range(first + skip, first + size)) if skip < size else ()
    return ((f"{path}: row {number}", row) for number, row in rows)


def _line_range(path: Path, start: int, stop: int, skip: int) -> Iterator[PlacedRow]:
    """The rows of the lines that begin in a range of bytes of a JSON-lines file, from `skip` on."""
    with readable(path), path.open("rb") as file:
        place = 0
        if start:
            file.seek(start - 1)
            place = start - 1 + len(file.readline())  # to the first line that begins at `start` or behind it
        lines = takewhile(lambda line: line[1] < stop, _lines(file, place, 0))
        for _, here, line in islice(lines, skip, None):
            yield f"{path}: byte {here}", _json_entry(line)


def _records_from(path: Path, kind: _Records, skip: int) -> Iterator[PlacedRow]:
    with readable(path), open_bytes(path) as file:
        for number, content in islice(kind.split(file), skip, None):
            yield f"{path}: {kind.unit} {number}", kind.parse(content)
