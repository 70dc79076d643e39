"""A data file as bytes: its ending, plain or compressed, and what stands for its content."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from qdora.errors import UserError
from qdora.files.sampled_digest import sampled_digest
from qdora.recipe.data_settings import COMPRESSED_SUFFIXES


def ending(path: Path) -> str:
    """.jsonl of rows.jsonl, .jsonl.gz of rows.jsonl.gz."""
    last = path.suffix.lower()
    return Path(path.stem).suffix.lower() + last if last in COMPRESSED_SUFFIXES else last


def name_without_ending(path: Path) -> str:
    """rows of rows.jsonl and of rows.jsonl.gz."""
    return path.name[: len(path.name) - len(ending(path))]


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


def go_to(file: BinaryIO, place: int, *, can_seek: bool) -> None:
    """Go to a byte of a file that was just opened, or that can be sought in."""
    if can_seek:
        file.seek(place)
        return
    while place > 0 and (passed := len(file.read(min(place, 2**20)))):
        place -= passed


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


def identity_of(path: Path) -> str:
    """Name, size, time and samples of a file as text, which changes when the content does, but for rare exceptions."""
    with readable(path):
        facts, digest = sampled_digest(path)
    return f"{path.name} {facts.st_size} {facts.st_mtime_ns} {digest}"
