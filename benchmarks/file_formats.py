"""Data files of every kind: memory to draw 100 rows of a gigabyte, and time to start a run of 200,000 rows again.

    python benchmarks/file_formats.py [--bytes 1e9] [--rows 200000] [--kinds jsonl,csv.gz] [--smoke]

A row has a prompt and a completion of made-up words, about 600 bytes; a text file holds the same as documents, a folder
eight JSON-lines files. Each measurement is a process of its own that reads and tokenises as `qdora train` does, with
SmolLM2's tokenizer and the default 5 % of validation data:

    limit: 100   rows of `--bytes` bytes, before compression. Peak of resident memory above that after the imports and
                 with the tokenizer. The bar: 150 MB.
    again        `--rows` rows, whose tokens an earlier start has kept. Seconds until they are in memory, imports and
                 tokenizer not counted. The bar: 5 s.

A later call keeps the kinds that it does not measure.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import io
import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd  # noqa: F401  # pyarrow imports it to make rows, and imports are not counted
import pyarrow as pa
import pyarrow.parquet as pq
from byte_tokenizer import write_model
from measure import facts, fresh, parser_of, peak_rss_bytes, reset_peak_rss, write

from qdora.data.build_data import read_data, tokenized_mix
from qdora.model.build_model import find_model
from qdora.recipe.recipe_file import recipe_from
from qdora.recipe.settings import Recipe

KINDS = ("jsonl", "json", "csv", "tsv", "txt", "parquet", "jsonl.gz", "jsonl.zst", "csv.gz", "folder")
MEMORY_BAR_BYTES, SECONDS_BAR = 150e6, 5.0
_GROUP_ROWS = 100_000
_NUM_COMPLETIONS = 20_000


def main() -> None:
    """All kinds, or one measurement."""
    parser = parser_of(__doc__, "file_formats", smoke="a tokenizer of bytes and small files")
    parser.add_argument("--bytes", type=float, default=1e9)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--limit", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.data is not None:
        print(json.dumps(one_start(recipe(args.data, args.limit, smoke=args.smoke))))
        return
    if args.smoke:
        args.bytes, args.rows = 2e6, 700
    kinds = earlier(args)
    for kind in args.kinds.split(","):
        with tempfile.TemporaryDirectory() as folder:
            kinds[kind] = both(kind, Path(folder), args)
    result = facts("python benchmarks/file_formats.py") | {
        "num_bytes": int(args.bytes),
        "num_rows": args.rows,
        "kinds": kinds,
        "bars": {"memory_bytes": int(MEMORY_BAR_BYTES), "seconds": SECONDS_BAR},
        "passes": {
            kind: found["limit"]["added_bytes"] < MEMORY_BAR_BYTES and found["again"]["seconds"] < SECONDS_BAR
            for kind, found in kinds.items()
        },
    }
    write(args.out, result)


def earlier(args: argparse.Namespace) -> dict[str, Any]:
    """What an earlier call found for other kinds, with the same sizes."""
    if not args.out.exists():
        return {}
    found = json.loads(args.out.read_text())
    same = (found["num_bytes"], found["num_rows"]) == (int(args.bytes), args.rows)
    return {kind: value for kind, value in found["kinds"].items() if same}


def both(kind: str, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """The two measurements of a kind of file."""
    if args.smoke:
        write_model(folder / "model")
    smoke = ["--smoke"] if args.smoke else []
    large = folder / "large"
    num_rows = write_rows(large, kind, most_bytes=args.bytes)
    limit = fresh(__file__, "--data", str(large), "--limit", "100", *smoke)
    limit |= {"num_rows": num_rows, "file_bytes": sum(file.stat().st_size for file in large.iterdir())}
    for file in large.iterdir():
        file.unlink()
    write_rows(folder / "rows", kind, most_rows=args.rows)
    first, again = (fresh(__file__, "--data", str(folder / "rows"), *smoke) for _ in range(2))
    assert first["num_tokens"] == again["num_tokens"]
    return {"limit": limit, "first": first, "again": again}


def recipe(data: Path, limit: int | None, *, smoke: bool) -> Recipe:
    """The run that reads the only file in a folder, or its files."""
    files = list(data.iterdir())
    source = {"source": str(files[0] if len(files) == 1 else data)} | ({} if limit is None else {"limit": limit})
    return recipe_from(
        {
            "model": {"source": str(data.parent / "model") if smoke else "builtin"},
            "data": {"mix": [source], "max_length": 2048, "cache": str(data.parent / "cache")},
            "train": {"steps": 1, "batch": 1},
        }
    )


def one_start(settings: Recipe) -> dict[str, Any]:
    """Seconds to the tokens of a recipe's data, and the memory that it takes."""
    _, tokenizer = find_model(settings, weights=False)
    before, began = reset_peak_rss(), time.perf_counter()
    train, validation = read_data(settings.data)
    mix = tokenized_mix(settings, tokenizer, train)
    seconds = time.perf_counter() - began
    return {
        "seconds": seconds,
        "added_bytes": peak_rss_bytes() - before,
        "num_tokens": sum(part.num_tokens for part in mix.sets),
        "num_examples": sum(map(len, mix.sets)),
        "num_validation": sum(map(len, validation.values())),
    }


def rows() -> Iterator[tuple[str, str]]:
    """Prompts and completions without end; each completion comes again after 20,000 rows."""
    random = np.random.default_rng(0)
    letters = np.array(list("etaoinshrdlucmfwypvbgk"))
    words = ["".join(letters[random.integers(0, 22, size)]) for size in random.integers(2, 10, 5000)]
    chosen = random.integers(0, 5000, (_NUM_COMPLETIONS, 85))
    completions = [" ".join(words[index] for index in row) for row in chosen.tolist()]
    number = 0
    while True:
        yield f"Question {number}: what is it?\n", f" {completions[number % _NUM_COMPLETIONS]}."
        number += 1


def write_rows(folder: Path, kind: str, *, most_bytes: float = float("inf"), most_rows: float = float("inf")) -> int:
    """Write files of a kind until one of the bounds is reached; the number of rows."""
    folder.mkdir()
    num_rows, num_bytes = 0, 0
    with writer(folder, kind) as add:
        for prompt, completion in rows():
            if num_bytes >= most_bytes or num_rows >= most_rows:
                break
            num_bytes += add(prompt, completion)
            num_rows += 1
    return num_rows


@contextmanager
def writer(folder: Path, kind: str) -> Iterator[Any]:
    """A function that writes a row and returns its bytes."""
    if kind == "folder":
        files = [(folder / f"part-{number}.jsonl").open("wb") for number in range(8)]
        number = 0

        def add_in_turn(prompt: str, completion: str) -> int:
            nonlocal number
            number += 1
            return files[number % 8].write(json_line(prompt, completion))

        yield add_in_turn
        for file in files:
            file.close()
        return
    path = folder / f"rows.{kind}"
    if kind == "parquet":
        with pq.ParquetWriter(path, pa.schema({"prompt": pa.string(), "completion": pa.string()})) as file:
            yield from parquet_rows(file)
        return
    with open_file(path) as file:
        yield line_writer(file, kind.partition(".")[0])
        if kind == "json":
            file.write(b"]")


def open_file(path: Path) -> Any:
    """A file to write, compressed if its ending says so."""
    if path.suffix == ".gz":
        return gzip.open(path, "wb", compresslevel=1)
    return pa.output_stream(path, compression="zstd") if path.suffix == ".zst" else path.open("wb")


def parquet_rows(file: pq.ParquetWriter) -> Iterator[Any]:
    """A function that gathers rows and writes them in groups."""
    group: list[dict[str, str]] = []

    def add(prompt: str, completion: str) -> int:
        group.append({"prompt": prompt, "completion": completion})
        if len(group) == _GROUP_ROWS:
            file.write_table(pa.Table.from_pylist(group))
            group.clear()
        return len(prompt) + len(completion)

    yield add
    if group:
        file.write_table(pa.Table.from_pylist(group))


def line_writer(file: Any, kind: str) -> Any:
    """A function that writes a row as text of a kind."""
    if kind in ("csv", "tsv"):
        text = io.StringIO(newline="")
        lines = csv.writer(text, delimiter="," if kind == "csv" else "\t")
        lines.writerow(("prompt", "completion"))

        def add(prompt: str, completion: str) -> int:
            lines.writerow((prompt, completion))
            found = text.getvalue().encode()
            text.seek(0)
            text.truncate()
            file.write(found)
            return len(found)

        return add
    is_first = True

    def add_record(prompt: str, completion: str) -> int:
        nonlocal is_first
        record = f"{prompt}{completion}\n\n".encode() if kind == "txt" else json_line(prompt, completion)
        if kind == "json":
            record = (b"[" if is_first else b",") + record
        is_first = False
        file.write(record)
        return len(record)

    return add_record


def json_line(prompt: str, completion: str) -> bytes:
    """A row as a line of JSON."""
    return json.dumps({"prompt": prompt, "completion": completion}).encode() + b"\n"


if __name__ == "__main__":
    main()
