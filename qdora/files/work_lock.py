"""Locks on what one process works on: a second one is refused, or waits. The system frees a lock however its holder
ends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from qdora.errors import UserError


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
    """`lock_if_free`, with a UserError if another process holds it: it works on `what`, a directory."""
    with lock_if_free(file) as is_free:
        if not is_free:
            raise UserError(f"{what}: another process works on it. Fix: wait until it ends.")
        yield


@contextmanager
def in_turn(directory: Path) -> Iterator[OSError | None]:
    """Let one process at a time in: of several that start together one makes `directory`, and the others find it there.

    The lock file beside the directory stays. Yields why it cannot be written, or None: who may only read need not wait.
    """
    lock = FileLock(directory.with_name(f".{directory.name}.lock"))
    refusal: OSError | None = None
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        refusal = error
    try:
        yield refusal
    finally:
        lock.release()
