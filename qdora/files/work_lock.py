"""Locks on what one process works on: a second process is refused, or waits. The system frees a lock however its holder
ends."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from qdora.errors import UserError
from qdora.files.console import OF_THIS_PROCESS

logger = logging.getLogger("qdora")

# File systems that know no locks; two processes in one directory are then not noticed.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextmanager
def work_lock(file: Path, what: str) -> Iterator[None]:
    """Hold the lock file while the block runs; it is removed at the end, and one that a kill has left is not held.

    `what` is named in the error: the directory on which only one process may work.

    Raises:
        UserError: Another process holds it.
        OSError: The file cannot be made.
    """
    descriptor = _held(file, what)
    try:
        yield
    finally:
        with suppress(OSError):  # before it is freed: who opens it now makes a new one
            file.unlink()
        os.close(descriptor)


@contextmanager
def in_turn(directory: Path) -> Iterator[OSError | None]:
    """Let one process at a time in: of several that start together one makes `directory`, and the others find it there.

    The lock file beside the directory stays. Yields why it cannot be written, or None; who may only read waits for a
    writer, too. A file system without locks lets all in, after a warning.

    Raises OSError for a lock that fails in another way.
    """
    file = directory.with_name(f".{directory.name}.lock")
    descriptor, refusal = None, None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        refusal = error
        with suppress(OSError):  # a copied directory may lack the lock
            descriptor = os.open(file, os.O_RDONLY)
    try:
        how = fcntl.LOCK_EX if refusal is None else fcntl.LOCK_SH
        if descriptor is not None and not flock(descriptor, how):
            text = "%s: this file system has no locks: start only one process until this directory is there."
            logger.warning(text, directory)
        yield refusal
    finally:
        if descriptor is not None:
            os.close(descriptor)


def flock(descriptor: int, how: int) -> bool:
    """`fcntl.flock`; False on a file system without locks. With LOCK_NB, BlockingIOError if another holds it."""
    try:
        fcntl.flock(descriptor, how)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return False
        raise
    return True


def _held(file: Path, what: str) -> int:
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if not flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB):
                logger.warning(
                    "%s: this file system has no locks: start only one process on it.", what, extra=OF_THIS_PROCESS
                )
                return descriptor
            if os.path.exists(file) and os.path.samestat(os.fstat(descriptor), file.stat()):
                os.truncate(descriptor, 0)
                os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
                return descriptor
            os.close(descriptor)  # its holder has ended and removed it meanwhile
        except OSError as error:
            holder = os.read(descriptor, 200).decode(errors="replace") or "a process"
            os.close(descriptor)
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            raise UserError(f"{what}: another process works on it ({holder}). Fix: wait until it ends.") from None
