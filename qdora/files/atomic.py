"""Files that appear whole or not at all, by one process at a time; strict JSON without access tokens.

A file or directory is written under another name, flushed to the disk, and renamed. A leftover begins with a dot and
ends in .partial or .replaced.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from pydantic_core import to_jsonable_python

from qdora.errors import RunFailure, UserError

READ_ONLY = os.strerror(errno.EROFS)
DISK_FULL = "the disk is full"
PARTIAL, REPLACED = ".partial", ".replaced"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_TOKEN = re.compile(r"hf_[A-Za-z0-9]{20,}")  # the Hub's; prefix and length as the Hub issues them


def masked(text: str) -> str:
    return _TOKEN.sub("hf_***", text)


def disk_reason(error: BaseException) -> str | None:
    """Why a write failed; None for another error. Rust and C++ libraries raise their own, with the system's words."""
    text = str(error)
    if getattr(error, "errno", None) in _FULL or any(os.strerror(number) in text for number in _FULL):
        return DISK_FULL
    return READ_ONLY if READ_ONLY in text else text if isinstance(error, OSError) else None


@contextmanager
def disk_failures(path: Path, fix: str = "", safe: Callable[[], Sequence[Path]] = tuple) -> Iterator[None]:
    """RunFailure with `path` if the disk is full or read-only, and with what is `safe` on it.

    With a `fix`, for a place that the user chose, any OSError but a full disk is a UserError.
    """
    try:
        yield
    except (UserError, RunFailure):
        raise
    except Exception as error:
        reason = disk_reason(error)
        if isinstance(error, OSError) and fix and reason != DISK_FULL:
            raise UserError(f"{path}: cannot be written: {error.strerror}. Fix: {fix}.") from None
        if reason in (DISK_FULL, READ_ONLY):
            raise RunFailure(f"{path}: cannot be written: {reason}.", safe()) from error
        raise


def json_value(value: Any) -> Any:
    """Strict JSON: NaN and infinities become null, paths strings, tuples lists, numpy and torch scalars numbers."""
    return to_jsonable_python(value, inf_nan_mode="null", fallback=lambda scalar: scalar.item())


def json_text(value: Any, *, indent: int | None = None) -> str:
    return json.dumps(json_value(value), indent=indent, ensure_ascii=False, allow_nan=False)


def json_bytes(value: Any, *, indent: int | None = None) -> bytes:
    """`json_text` as UTF-8 with a line end; half a surrogate pair becomes its escape."""
    return (json_text(value, indent=indent) + "\n").encode("utf-8", "backslashreplace")


def read_json_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path}: missing.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: must be a JSON object (got a {type(value).__name__}).")
    return value


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A file to write, which gets the name `path` when the block ends, and is removed if the block raises."""
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
    with atomic_file(path) as aside, aside.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def atomic_write_text(path: Path, text: str) -> None:
    atomic_write_bytes(path, text.encode("utf-8"))


def atomic_write_json(path: Path, value: Any) -> None:
    atomic_write_bytes(path, json_bytes(value, indent=2))


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """A directory to fill, which gets the name `path` when the block ends, and is removed if the block raises.

    Only one process at a time may make `path` (`work_lock`, `in_turn`).
    """
    aside, old = (path.with_name(f".{path.name}{end}") for end in (PARTIAL, REPLACED))
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        remove_directory(aside)
        aside.mkdir()
        yield aside
        for folder, _, files in os.walk(aside, topdown=False):
            for name in (*files, "."):
                sync(Path(folder, name))
        if path.exists():
            remove_directory(old)
            os.rename(path, old)
        os.rename(aside, path)
    except BaseException:
        with suppress(OSError):
            remove_directory(aside)
        if old.exists() and not path.exists():
            os.rename(old, path)
        raise
    sync(path.parent)
    remove_directory(old)


def remove_leftovers(folder: Path) -> None:
    """Remove what an interrupted writer left in `folder`, and put back a directory that was being replaced."""
    for entry in filter(is_leftover, list(folder.iterdir()) if folder.is_dir() else ()):
        path = entry.with_name(entry.name.removeprefix(".").removesuffix(REPLACED))
        if entry.name.endswith(REPLACED) and not path.exists():
            os.rename(entry, path)
        elif entry.is_dir():
            remove_directory(entry)
        else:
            entry.unlink()


def is_leftover(path: Path) -> bool:
    return path.name.startswith(".") and path.name.endswith((PARTIAL, REPLACED))


def remove_directory(path: Path) -> None:
    if path.exists():
        shutil.rmtree(path)


def link_or_copy(source: str, target: str) -> None:
    """A second name of a file that is never changed, which takes no room; a copy on another file system."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def lock_if_free(file: Path) -> Iterator[bool]:
    """Hold the lock file while the block runs; yields False, without it, if another process holds it."""
    lock = FileLock(file)
    with suppress(Timeout):
        lock.acquire(timeout=0)
    try:
        yield lock.is_locked
    finally:
        if lock.is_locked:
            with suppress(OSError):  # before it is freed: filelock does not take a file that is gone
                file.unlink()
        lock.release()


@contextmanager
def work_lock(file: Path, what: str) -> Iterator[None]:
    """`lock_if_free`, with a UserError if another process holds it."""
    with lock_if_free(file) as is_free:
        if not is_free:
            raise UserError(f"{what}: another process works on it. Fix: wait until it ends.")
        yield


@contextmanager
def in_turn(directory: Path) -> Iterator[None]:
    """Let one process at a time in: one makes `directory`, and the others find it there."""
    lock = FileLock(directory.with_name(f".{directory.name}.lock"))
    with suppress(OSError):  # who may only read need not wait
        directory.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def sampled_digest(path: Path) -> tuple[os.stat_result, str]:
    """Size and times of a file, and the SHA-256 of 16 samples of 64 KiB: all of a 70B model would take minutes."""
    facts, digest = path.stat(), hashlib.sha256()
    with path.open("rb") as stream:
        for start in range(0, facts.st_size, max(facts.st_size // 16, 64 << 10)):
            stream.seek(start)
            digest.update(stream.read(64 << 10))
    return facts, digest.hexdigest()
