"""Claims of processes on keys: the right to work on something, which ends with the process that holds it.

A process claims a key by creating its claim file (O_EXCL), which it keeps locked and removes after the work. A claim
that was left behind is taken over: on the same machine when its lock is free, which the system sees to however its
process ended (a paused process keeps it); on another machine when it was not renewed for long. Process ids and host
names do not count, since containers on one machine may share both. All times are those of the file system, so the
clocks of the machines do not matter.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from qdora.files.work_lock import flock

_RENEWALS = 20  # number of renewals within the time after which a claim is stale
_UNREADABLE_SECONDS = 30.0  # an empty claim older than this was left by a process killed before it wrote the file


@dataclass(frozen=True)
class Claim:
    """The right to work on a key until `release`.

    `lock` is the descriptor of the claim's file, locked. `left_by` is the dead claim that this one took over, as its
    process wrote it; None if the key was free.
    """

    key: str
    token: str
    path: Path
    lock: int
    left_by: dict[str, Any] | None = None

    def is_mine(self) -> bool:
        """False once another process has taken the claim over."""
        return (read_claim(self.path) or {}).get("token") == self.token

    def release(self) -> None:
        """Remove the claim, unless another process has taken it over."""
        if self.is_mine():
            self.path.unlink(missing_ok=True)
        os.close(self.lock)  # last: until the file is gone, a free lock would look like a death


class Claims:
    """This process's claims in a directory. A claim of another machine is dead after `stale_seconds` of silence."""

    def __init__(self, directory: Path, *, stale_seconds: float = 3600.0) -> None:
        self.directory, self.stale_seconds = directory, stale_seconds

    def take(self, key: str) -> Claim | None:
        """Claim a key; None if another process has it."""
        path = self.directory / f"{key}.json"
        claim = self._create(key, path)
        if claim is not None or not self._is_stale(path, read_claim(path)):
            return claim
        # Two processes that find one dead claim must not both remove it: the second would remove the first's new claim.
        with (self.directory / ".takeover").open("a") as lock:
            flock(lock.fileno(), fcntl.LOCK_EX)  # released when the process ends, however it ends
            if not path.exists():  # released meanwhile; the first process to create it has it
                return self._create(key, path)
            left = read_claim(path)
            if not self._is_stale(path, left):
                return None
            path.unlink(missing_ok=True)
            return self._create(key, path, left or {})

    def is_alive(self, path: Path) -> bool:
        """Whether a process still holds the claim of a file."""
        return not self._is_stale(path, read_claim(path))

    @contextmanager
    def renewed(self, claim: Claim) -> Iterator[None]:
        """While the block runs, show other machines that this process is alive."""
        stop = threading.Event()

        def renew() -> None:
            while not stop.wait(self.stale_seconds / _RENEWALS):
                with suppress(OSError):
                    os.utime(claim.path)

        thread = threading.Thread(target=renew, daemon=True, name=f"claim {claim.key}")
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def _create(self, key: str, path: Path, left_by: dict[str, Any] | None = None) -> Claim | None:
        try:
            lock = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o644)
        except FileExistsError:
            return None
        flock(lock, fcntl.LOCK_EX)  # before the file says whose it is: then a free lock is a dead process
        claim = Claim(key, uuid.uuid4().hex, path, lock, left_by)
        # Host and process id are for people
        owner = {"token": claim.token, "machine": machine(), "host": socket.gethostname(), "pid": os.getpid()}
        os.write(lock, json.dumps(owner).encode())
        # If this process was paused before writing, another may have taken over the empty file
        if claim.is_mine():
            return claim
        os.close(lock)
        return None

    def _is_stale(self, path: Path, owner: dict[str, Any] | None) -> bool:
        now = self._now()
        try:
            age = now - path.stat().st_mtime
        except FileNotFoundError:
            return True  # released meanwhile
        if owner is None:
            return age > _UNREADABLE_SECONDS
        is_held = is_locked(path) if owner.get("machine") == machine() else None
        return age > self.stale_seconds if is_held is None else not is_held

    def _now(self) -> float:
        """The time of the file system."""
        clock = self.directory / f".clock-{uuid.uuid4().hex}"
        clock.touch()
        now = clock.stat().st_mtime
        clock.unlink(missing_ok=True)
        return now


def read_claim(path: Path) -> dict[str, Any] | None:
    """What the owner of a claim wrote; None if the file is incomplete or missing."""
    try:
        found = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def is_locked(path: Path) -> bool | None:
    """Whether a process of this machine holds the lock of a file; False if there is no file, None without locks."""
    try:
        with path.open("rb") as stream:
            # Shared: two that look do not disturb each other
            return False if flock(stream.fileno(), fcntl.LOCK_SH | fcntl.LOCK_NB) else None
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False


@lru_cache(maxsize=1)
def machine() -> str:
    """The running kernel, which all containers on it share; other machines and the next boot have other names."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return socket.gethostname()
