"""Rows of data files and of data sets on the Hub, read when they are asked for.

`Rows` are counted; the shards of a stream are read one behind the other, from any row on.
A row that cannot be read is a RowFault.

`datasets` reads the Hub only. With local files (5.2) it names no faulty line, turns texts into dates, reads all rows
before the first one asked for, and a whole row group of Parquet (251 MiB against 13 for one of 160 MB).
"""

from __future__ import annotations

import csv
import glob
import io
import json
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, chain, islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from qdora.data.example import Made, Row, RowFault, made_from
from qdora.errors import HubFailure, UserError
from qdora.files.atomic import sampled_digest
from qdora.recipe.data_settings import COMPRESSED_SUFFIXES, FILE_SUFFIXES, SourceConfig
from qdora.recipe.section import reason_of, shown

_RANGE_BYTES = 16 * 2**20  # of a shard of a JSON-lines file: small enough to skip to a row of it in some 50 ms
_ROWS_AT_ONCE = 1024  # of a Parquet file, that are decoded together
_READ_BYTES = 2**20  # of a Parquet file per read, else whole column chunks, 128 MiB and more
# A folder with one of these words in the name of a file or folder has splits
_SPLIT_NAMES = {"train", "training", "validation", "valid", "val", "dev", "test", "testing", "eval"}
# Files about the data
_ABOUT = {"readme", "license", "licence", "changelog", "dataset_info", "dataset_infos"}

Entry = dict[str, Any] | RowFault  # column -> value, or why the row cannot be read
PlacedRow = tuple[str, Entry]  # "file: row 17" for error lines, and the row
Reader = Callable[[int], Iterator[PlacedRow]]  # the rows of one shard, without its first `skip` rows


# The files of a source


def files_of(source: Path, split: str) -> list[Path]:
    """The files of a source's split, sorted. A single file, and a pattern, are all of the data whatever the split.

    Of a folder: <split>.<ending>, <split>-*.<ending> and <split>/*.<ending>, in it or in one folder inside it. A folder
    without such names is the training split as a whole.
    """
    if source.is_file():
        return [source]
    if not source.is_dir():
        if files := _data_files(glob.glob(str(source), recursive=True)):
            return files
        raise UserError(f"{source}: no such file.")
    files = files_of_split(source, split)
    if not files and split == "train":
        files = _data_files(glob.glob(f"{glob.escape(str(source))}/**", recursive=True))
        names = {part for path in files for part in (*path.relative_to(source).parts[:-1], _stem(path))}
        if any(_split_words(name) - {"train", "training"} for name in names):
            files = []
        if len(endings := sorted(set(map(ending, files)))) > 1:
            raise UserError(f"{source}: files of several kinds ({', '.join(endings)}).")
    if not files:
        raise UserError(
            f"{source}: no file for split {split!r}, looked for {split}.*, {split}-* and {split}/*."
        )
    return files


def files_of_split(folder: Path, split: str) -> list[Path]:
    """The files named after a split, in a folder or, if it names no split at all, in one folder inside it."""
    files = _named_after(folder, split)
    if files or any(_split_words(path.name) for path in folder.iterdir()):
        return files
    inside: dict[Path, list[Path]] = {}
    for path in sorted(map(Path, glob.glob(f"{glob.escape(str(folder))}/**/", recursive=True))):
        if not any(path.is_relative_to(other) for other in inside) and (files := _named_after(path, split)):
            inside[path] = files
    if len(inside) > 1:
        raise UserError(f"{folder}: {', '.join(map(str, inside))} each hold split {split!r}.")
    return next(iter(inside.values()), [])


def _named_after(folder: Path, split: str) -> list[Path]:
    same = [path for suffix in FILE_SUFFIXES if (path := folder / f"{split}{suffix}").is_file()]
    if len(same) > 1:
        raise UserError(f"{folder}: {', '.join(path.name for path in same)} all hold split {split!r}.")
    start = glob.escape(str(folder / split))
    return sorted([*same, *_data_files([*glob.glob(f"{start}-*"), *glob.glob(f"{start}/*")])])


def _split_words(name: str) -> set[str]:
    return _SPLIT_NAMES.intersection(re.split(r"[-_. ]", name.lower()))


def _data_files(paths: Iterable[str]) -> list[Path]:
    files = (path for path in map(Path, paths) if ending(path) in FILE_SUFFIXES)
    return sorted(path for path in files if _stem(path).lower() not in _ABOUT and path.is_file())


def ending(path: Path) -> str:
    """.jsonl of rows.jsonl, .jsonl.gz of rows.jsonl.gz."""
    last = path.suffix.lower()
    return Path(path.stem).suffix.lower() + last if last in COMPRESSED_SUFFIXES else last


def _stem(path: Path) -> str:
    return path.name[: len(path.name) - len(ending(path))]


# A file as records


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # of the operating system, gzip, json, csv, pyarrow
        raise UserError(f"{path}: cannot be read ({reason_of(error)})") from error


def _open(path: Path) -> BinaryIO:
    file, codec = path.open("rb"), {".gz": "gzip", ".zst": "zstd"}.get(path.suffix.lower())
    if codec is None:
        return file
    import pyarrow as pa

    # Frames one behind the other are read, and a file that was cut is an error.
    return cast(BinaryIO, io.BufferedReader(pa.input_stream(file, compression=codec), 2**20))


def _records(path: Path, skip: int) -> Iterator[tuple[int, Any]]:
    """(number, content) of the rows from `skip` on of a file but Parquet; `_entry` reads them."""
    kind = Path(ending(path)).stem
    records: Iterator[tuple[int, Any]]
    with _readable(path), _open(path) as file:
        if kind == ".jsonl":
            records = ((number, line) for number, line in enumerate(file, 1) if line.strip())
        elif kind == ".json":
            rows = parse_json(file.read().decode("utf-8-sig"))
            if not isinstance(rows, list):
                raise ValueError(f"must be a list of rows, got {shown(rows)}")
            records = enumerate(rows)
        else:
            text = io.TextIOWrapper(file, "utf-8-sig", newline="\n")
            records = (
                _documents(text) if kind in (".txt", ".md") else _csv(text, "," if kind == ".csv" else "\t")
            )
        yield from islice(records, skip, None)


def _entry(content: Any) -> Entry:
    try:
        value = parse_json(content.decode("utf-8-sig")) if isinstance(content, bytes) else content
    except ValueError as error:
        return RowFault(f"not JSON ({error})")
    if isinstance(value, dict | RowFault):
        return value
    return RowFault(f"must be an object {{column: value}}, got {shown(value)}")


_HALF = re.compile(r"\\u[dD][89a-fA-F]")  # escape of half a surrogate pair


def parse_json(text: str) -> Any:
    """The value of JSON text. ValueError for half a surrogate pair, which no tokenizer takes."""
    try:
        value = json.loads(text)
        if _HALF.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return value


def _csv(text: Iterable[str], delimiter: str) -> Iterator[tuple[int, Entry]]:
    csv.field_size_limit(2**31 - 1)  # the default refuses texts of 128 KiB
    reader, names, number = csv.reader(text, delimiter=delimiter, strict=True), list[str](), 1
    try:
        for cells in reader:
            if not names:
                names = cells
                if doubled := [name for name in names if name and names.count(name) > 1]:
                    raise ValueError(f"line {number}: two columns are called {doubled[0]!r}")
            elif len(cells) == len(names):
                yield number, dict(zip(names, cells, strict=True))
            elif cells:
                yield number, RowFault(f"has {len(cells)} cells, the first line names {len(names)} columns")
            number = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"line {number}: {error}") from error


def _documents(text: Iterable[str]) -> Iterator[tuple[int, Entry]]:
    lines = list[str]()
    for number, line in enumerate(chain(text, [""]), 1):
        if line.strip():
            lines.append(line)
        elif lines:
            yield number - len(lines), {"text": "".join(lines).replace("\r\n", "\n").removesuffix("\n")}
            lines = []


def _lines(path: Path, start: int, skip: int) -> Iterator[tuple[int, bytes]]:
    """(first byte, line) of the rows from `skip` on that begin in a range of bytes."""
    with _readable(path), path.open("rb") as file:
        file.seek(max(start - 1, 0))
        place = start and start - 1 + len(file.readline())  # the first line that begins in the range
        for line in file:
            if place >= start + _RANGE_BYTES:
                return
            if line.strip() and (skip := skip - 1) < 0:
                yield place, line
            place += len(line)


def _row_group(path: Path, group: int, first: int, skip: int) -> Iterator[tuple[int, Any]]:
    """(number in the file, row) of the rows from `skip` on of a row group, which begins at row `first`."""
    import pyarrow.parquet as pq

    with (
        _readable(path),
        pq.ParquetFile(
            path, buffer_size=_READ_BYTES, pre_buffer=False, page_checksum_verification=True
        ) as file,
    ):
        for batch in file.iter_batches(_ROWS_AT_ONCE, row_groups=[group], use_threads=False):
            if skip < batch.num_rows:
                yield from enumerate(batch.slice(skip).to_pylist(), first + skip)
            first, skip = first + batch.num_rows, max(skip - batch.num_rows, 0)


class _Part(NamedTuple):
    """A row group of Parquet, a range of JSON lines, or a whole file."""

    path: Path
    name: str  # in its file; of a row group with its number of rows
    unit: str  # what the numbers of its rows count: line (from 1), row (from 0) or byte
    read: Callable[[int], Iterator[tuple[int, Any]]]  # (number, content) of the rows from a given one on
    num_rows: int  # 0: not counted

    def placed(self, skip: int) -> Iterator[PlacedRow]:
        return ((f"{self.path}: {self.unit} {number}", _entry(content)) for number, content in self.read(skip))


def _parts(path: Path, ranges: bool) -> list[_Part]:
    """The parts of a file; with `ranges` JSON lines are divided, too."""
    if ending(path) not in FILE_SUFFIXES:
        raise UserError(f"{path}: unknown ending {ending(path)!r}, allowed: {', '.join(FILE_SUFFIXES)}.")
    if ending(path) == ".parquet":
        import pyarrow.parquet as pq

        with _readable(path):
            metadata = pq.read_metadata(path)
        sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        groups = enumerate(zip(sizes, accumulate(sizes, initial=0), strict=False))
        return [
            _Part(path, f"{group}: {size} rows", "row", partial(_row_group, path, group, first), size)
            for group, (size, first) in groups
            if size
        ]
    with _readable(path):
        size = path.stat().st_size
    if ranges and ending(path) == ".jsonl":
        starts = enumerate(range(0, size, _RANGE_BYTES))
        return [_Part(path, str(number), "byte", partial(_lines, path, start), 0) for number, start in starts]
    unit = "row" if Path(ending(path)).stem == ".json" else "line"
    return [_Part(path, "", unit, partial(_records, path), 0)] if size else []


# All rows of a split, or the shards of a stream


@dataclass(frozen=True)
class Rows:
    """The rows of a split, unread."""

    where: str  # file, folder, pattern or Hub address
    readers: tuple[Reader, ...]  # of the files or shards, one behind the other
    num_rows: int  # faulty ones included; 0 where only reading all would tell
    names: tuple[str, ...] = ()  # of the shards of a stream; of Parquet with the number of rows
    identity: str | None = None  # changes with the content, where that is known

    def chosen(self, indices: Iterable[int]) -> Iterator[PlacedRow]:
        """The rows of rising indices."""
        every, here = chain.from_iterable(reader(0) for reader in self.readers), 0
        for index in indices:
            yield next(islice(every, index - here, None))
            here = index + 1

    def made(self, make: Callable[[Row, str], Made], indices: Iterable[int]) -> Iterator[Made]:
        """What `make` makes of these rows and their places. UserError for faulty ones, after the last."""
        faults = []
        for place, row in self.chosen(indices):
            made = made_from(row, make, place)
            if isinstance(made, RowFault):
                faults.append(f"{place}: {made}")
            else:
                yield made
        if faults:
            raise UserError(*faults)

    def id_of(self, place: str) -> str:
        """The number of a line or row, with several files "name: line 17"."""
        inner = place.removeprefix(self.where)
        return inner[1:] if inner.startswith("/") else inner.rpartition(" ")[2]


def rows_of(where: str, rows: Collection[Any], identity: str | None = None) -> Rows:
    """Rows of a collection that gives them in turn."""

    def reader(skip: int) -> Iterator[PlacedRow]:
        return islice(((f"{where}: row {number}", row) for number, row in enumerate(rows)), skip, None)

    return Rows(where, (reader,), len(rows), identity=identity)


def rows_of_split(source: Path, split: str) -> Rows:
    """The rows of a source's split; see `files_of`."""
    return read_rows(*files_of(source, split))


def read_rows(*files: Path) -> Rows:
    """The rows of files, one behind the other."""
    where = files[0] if len(files) == 1 else _folder_of(files)
    parts = [part for file in files for part in _parts(file, ranges=False)]
    num_rows = sum(part.num_rows or sum(1 for _ in part.read(0)) for part in parts)
    facts = [(file.relative_to(where), *sampled_digest(file)) for file in files]
    identity = " ".join(f"{name} {stat.st_size} {stat.st_mtime_ns} {digest}" for name, stat, digest in facts)
    return Rows(str(where), tuple(part.placed for part in parts), num_rows, identity=identity)


def _folder_of(files: Sequence[Path]) -> Path:
    return Path(os.path.commonpath([file.parent for file in files]))


def local_shards(source: Path, split: str) -> Rows:
    """The rows of a source's split in shards, unread but for Parquet's footers."""
    files = files_of(source, split)
    folder = source if source.is_dir() else _folder_of(files)
    parts = [part for file in files for part in _parts(file, ranges=True)]
    if not parts:
        raise UserError(f"{source}: the data set is empty")
    names = tuple(f"{part.path.relative_to(folder)} {part.name}".rstrip() for part in parts)
    sizes = [part.num_rows for part in parts]
    num_rows = sum(sizes) if all(sizes) else 0
    return Rows(str(source), tuple(part.placed for part in parts), num_rows, names)


# The Hub


@contextmanager
def from_hub(place: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # of `datasets`, huggingface_hub and others, without a common base
        fix = f" For the folder here write ./{place}" if os.path.exists(place) else ""
        raise HubFailure(f"{place}: cannot be read from the Hub ({reason_of(error)}).{fix}") from error


def hub_rows(source: SourceConfig, split: str) -> Rows:
    """The rows of a split of a data set on the Hub; of a streamed one in memory."""
    place, identity = str(source.source), None
    if source.stream:  # else `datasets` downloads all splits
        stream = _load_dataset(source, split, streaming=True)
        with from_hub(place):
            loaded = list(stream)
    else:
        loaded = _load_dataset(source, split)
        # The fingerprint follows the files' check sums
        identity = f"{place} {source.config} {loaded._fingerprint}"
    return rows_of(place, loaded, identity)


def hub_shards(source: SourceConfig) -> Rows:
    """The files of the training split on the Hub, streamed by `datasets`."""
    place, split = str(source.source), source.split
    stream = _load_dataset(source, split, streaming=True)
    num_shards = stream.num_shards
    # Known of the whole data set only
    splits = (stream.info.splits or {}) if source.data_files is None else {}
    num_rows = (splits[split].num_examples or 0) if split in splits else 0
    readers = tuple(partial(_hub_shard, place, stream, number) for number in range(num_shards))
    parts = f" {source.config or ''} {source.data_files or ''}".rstrip()
    names = tuple(
        f"{place}@{source.revision}{parts} {split} {number} of {num_shards}" for number in range(num_shards)
    )
    return Rows(place, readers, num_rows, names)


def _load_dataset(source: SourceConfig, split: str, **options: Any) -> Any:
    import datasets  # takes a second

    files: Any = source.data_files
    if files is not None:
        files = files if isinstance(files, Mapping) else {re.split(r"[+[]", source.split)[0]: files}
        files = {name: list(some) if isinstance(some, tuple) else some for name, some in files.items()}
    options |= {"name": source.config, "data_files": files, "revision": source.revision}
    with from_hub(str(source.source)):
        return datasets.load_dataset(source.source, split=split, **options)


def _hub_shard(place: str, stream: Any, number: int, skip: int) -> Iterator[PlacedRow]:
    with from_hub(f"{place}: shard {number}"):
        for row, values in enumerate(stream.shard(stream.num_shards, number).skip(skip), skip):
            yield f"{place}: shard {number}: row {row}", dict(values)
