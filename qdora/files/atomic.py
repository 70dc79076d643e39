"""Files and directories that appear whole or not at all: written under another name, flushed to the disk, renamed.

After a crash, a kill or a full disk either the old or the new content is there. A leftover may stay, whose name begins
with a dot and ends in .partial or .replaced; `remove_leftovers` clears it.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from qdora.errors import DiskFull, Resumable, RunFailure, UserError
from qdora.files.access_tokens import masked

DISK_FULL = "the disk is full"
PARTIAL = ".partial"
REPLACED = ".replaced"
_KEY_FILE = ".resume-key"
_WRONG_PLACE = {
    **dict.fromkeys((errno.EEXIST, errno.ENOTDIR), "is a file, or a parent of it is"),
    **dict.fromkeys((errno.EACCES, errno.EPERM), "cannot be written"),
    errno.ENOENT: "cannot be made",
    errno.ENAMETOOLONG: "its name is too long",
}
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def disk_reason(error: BaseException) -> str | None:
    """Why a write failed, None for an error of another kind; Rust and C++ libraries raise their own for such disks."""
    if isinstance(error, OSError):
        return DISK_FULL if error.errno in _FULL else masked(str(error))
    if not isinstance(error, Exception):
        return None
    text = str(error)
    if os.strerror(errno.EROFS) in text:
        return os.strerror(errno.EROFS)
    return DISK_FULL if any(os.strerror(number) in text for number in _FULL) else None


@contextmanager
def disk_failures(path: Path) -> Iterator[None]:
    """Turn the error of a full or read-only disk in the block into a RunFailure, one line that names `path`."""
    try:
        yield
    except (UserError, RunFailure):
        raise
    except Exception as error:
        reason = disk_reason(error)
        if reason is None or (isinstance(error, OSError) and error.errno not in (*_FULL, errno.EROFS)):
            raise
        kind = DiskFull if reason == DISK_FULL else RunFailure
        raise kind(f"{path}: cannot be written: {reason}.") from error


@contextmanager
def place_failures(path: Path, fix: str) -> Iterator[None]:
    """For the block that makes the directory `path`: UserError, with the `fix`, for a wrong or forbidden place.

    Of another failure RunFailure is raised.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _WRONG_PLACE:
            raise UserError(f"{path}: {_WRONG_PLACE[error.errno]}. Fix: {fix}.") from None
        raise RunFailure(f"{path}: could not be written: {disk_reason(error)}.") from error


def json_text(value: Any, *, indent: int | None = None, in_ascii: bool = False) -> str:
    """Strict JSON: NaN and infinities become null, paths strings, tuples lists, numpy and torch scalars numbers.

    `in_ascii` writes all other characters as escapes.
    Raises TypeError for a key that is not a string, or a value that JSON cannot express.
    """
    return json.dumps(_json_value(value), indent=indent, ensure_ascii=in_ascii, allow_nan=False)


def json_bytes(value: Any, *, indent: int | None = None) -> bytes:
    """`json_text` as UTF-8 with a line end; half a surrogate pair, which UTF-8 cannot encode, becomes its escape."""
    return (json_text(value, indent=indent) + "\n").encode("utf-8", "backslashreplace")


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A file to write, which gets the name `path` when the block ends, and is removed if the block raises.

    A reader sees the old content or all of the new. After an OSError the old file is unchanged.
    """
    # Not the process id: processes of two containers or machines may have the same one
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}{PARTIAL}")
    try:
        yield aside
        os.replace(aside, path)
    except BaseException:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
        raise
    sync(path.parent)


def atomic_write_bytes(path: Path, content: bytes) -> None:
    """Write a file by `atomic_file`."""
    with atomic_file(path) as aside, aside.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def atomic_write_text(path: Path, text: str) -> None:
    """`atomic_write_bytes` of UTF-8 text."""
    atomic_write_bytes(path, text.encode("utf-8"))


def atomic_write_json(path: Path, value: Any) -> None:
    """`atomic_write_bytes` of strict JSON (`json_text`), indented."""
    atomic_write_bytes(path, json_bytes(value, indent=2))


@contextmanager
def atomic_directory(path: Path, *, resume_key: str | None = None) -> Iterator[Path]:
    """A directory to fill. It gets the name `path` when the block ends, and is removed if the block raises.

    Only one process at a time may make `path` (`work_lock`, `in_turn`): each removes what others left beside it.

    An older directory of that name is removed once the new one is whole; after an OSError it is unchanged. `resume_key`
    stands for everything that determines the content. With a key, an interrupt (Ctrl-C, a kill) or Resumable leaves the
    files, and the next call with the same key yields them again; any other call removes them.
    """
    aside = path.with_name(f".{path.name}{PARTIAL}")
    old = path.with_name(f".{path.name}{REPLACED}")
    path.parent.mkdir(parents=True, exist_ok=True)
    key_file = aside / _KEY_FILE
    try:
        if resume_key is None or not key_file.is_file() or key_file.read_text(encoding="utf-8") != resume_key:
            remove_directory(aside)
            aside.mkdir()
        if resume_key is not None:
            atomic_write_text(key_file, resume_key)
        yield aside
        key_file.unlink(missing_ok=True)
        for folder, _, files in os.walk(aside, topdown=False):
            for file in files:
                sync(Path(folder, file))
            sync(Path(folder))
        if path.exists():
            remove_directory(old)
            os.rename(path, old)
        os.rename(aside, path)
    except BaseException as error:
        if resume_key is None or (isinstance(error, Exception) and not isinstance(error, Resumable)):
            with suppress(OSError):
                remove_directory(aside)
        if old.exists() and not path.exists():
            os.rename(old, path)
        raise
    sync(path.parent)
    with suppress(OSError):  # the new directory is in place; the next start clears a leftover
        remove_directory(old)


def remove_leftovers(folder: Path) -> None:
    """Remove what an interrupted writer left in `folder`, and put back a directory that was being replaced."""
    if not folder.is_dir():
        return
    for entry in sorted(folder.iterdir()):
        if not entry.name.startswith("."):
            continue
        if entry.name.endswith(REPLACED) and entry.is_dir():
            path = entry.with_name(entry.name.removeprefix(".").removesuffix(REPLACED))
            if path.exists():
                remove_directory(entry)
            else:
                os.rename(entry, path)
        elif entry.name.endswith(PARTIAL):
            if entry.is_dir() and not entry.is_symlink():
                remove_directory(entry)
            else:
                entry.unlink()


def is_leftover(path: Path) -> bool:
    """Whether a path has the name of an unfinished write."""
    return path.name.startswith(".") and path.name.endswith((PARTIAL, REPLACED))


def remove_directory(path: Path) -> None:
    """Remove a directory and everything below it, if it exists."""
    if path.exists():
        shutil.rmtree(path)


def sync(path: Path) -> None:
    """Flush a file's content, or a directory's names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _json_value(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"JSON keys must be strings, got {key!r}")
        return {key: _json_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json_value(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if getattr(value, "shape", None) == () and hasattr(value, "item"):  # a numpy or torch scalar
        return _json_value(value.item())
    raise TypeError(f"JSON cannot express {type(value).__name__}: {value!r}")
