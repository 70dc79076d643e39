"""A data file as bytes: its ending, plain or compressed, and what stands for its content."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from qdora.errors import UserError
from qdora.files.samples import sampled
from qdora.recipe.data_settings import COMPRESSED_SUFFIXES


def ending(path: Path) -> str:
    """.jsonl of rows.jsonl, .jsonl.gz of rows.jsonl.gz."""
    last = path.suffix.lower()
    return Path(path.stem).suffix.lower() + last if last in COMPRESSED_SUFFIXES else last


def name_without_ending(path: Path) -> str:
    """rows of rows.jsonl and of rows.jsonl.gz."""
    return path.name[: len(path.name) - len(ending(path))]


def open_bytes(path: Path) -> BinaryIO:
    """The bytes of a file, decompressed.

    Raises: UserError where no library for .zst is installed.
    """
    last = path.suffix.lower()
    if last == ".gz":
        return cast(BinaryIO, gzip.open(path))
    return _open_zst(path) if last == ".zst" else path.open("rb")


def open_text(path: Path, newline: str | None = None) -> io.TextIOWrapper:
    """The UTF-8 text of a file, decompressed, without its byte order mark."""
    return io.TextIOWrapper(open_bytes(path), encoding="utf-8-sig", newline=newline)


def skip_bytes(file: BinaryIO, number: int) -> None:
    """Go forward in a file that may be compressed."""
    if file.seekable():
        file.seek(number, io.SEEK_CUR)
        return
    while number > 0:
        number -= len(file.read(min(number, 2**20))) or number


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
        raise UserError(f"{path}: {error.strerror or error}") from error


def identity_of(path: Path) -> str:
    """Name, size, time and samples of a file as text, which changes when the content does, but for rare exceptions."""
    with readable(path):
        facts, digest = sampled(path)
    return f"{path.name} {facts.st_size} {facts.st_mtime_ns} {digest}"


def _open_zst(path: Path) -> BinaryIO:
    try:
        from compression import zstd  # type: ignore[import-not-found, unused-ignore]  # Python 3.14
    except ImportError:
        pass
    else:
        return cast(BinaryIO, zstd.open(path))
    try:
        import zstandard  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        raise UserError(
            f"{path}: no library that reads .zst is installed. Fix: pip install zstandard, or unpack it: zstd -d"
        ) from None
    return io.BufferedReader(_ZstFrames(path.open("rb"), zstandard), 2**20)


class _ZstFrames(io.RawIOBase):
    """The content of all frames of a .zst file. zstandard's own reader takes a cut file for a whole one."""

    def __init__(self, file: BinaryIO, zstandard: Any) -> None:
        self.file, self.zstandard = file, zstandard
        self.frame: Any = None  # None between two frames
        self.compressed = self.content = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.content:
            self.compressed = self.compressed or self.file.read(2**17)
            if not self.compressed:
                if self.frame is not None:
                    raise EOFError("the compressed data ends too early")
                return 0
            # Frames of 'zstd --long' look back over up to 2 GiB.
            if self.frame is None:
                self.frame = self.zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()
            try:
                self.content, self.compressed = self.frame.decompress(self.compressed), b""
            except self.zstandard.ZstdError as error:
                raise EOFError(str(error)) from error
            if self.frame.eof:
                self.compressed, self.frame = self.frame.unused_data, None
        size = min(len(buffer), len(self.content))
        buffer[:size], self.content = self.content[:size], self.content[size:]
        return size

    def close(self) -> None:
        self.file.close()
        super().close()
