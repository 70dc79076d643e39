"""Who works on what, among processes that share a directory: one file a claim, made by whoever is first (O_EXCL).

A claim ends with its work. One that was left behind is taken over: on the same machine when its process is gone (a
paused process keeps it), on another machine when it was not renewed for long. Times are those of the file system, so
that the clocks of the machines do not matter.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_RENEWALS = 20  # within the time after which a claim is stale
_UNREADABLE_SECONDS = 30.0  # from making the file to having written it; a kill in between leaves it empty


@dataclass(frozen=True)
class Claim:
    """The right to work on a key until `release`.

    Attributes:
        key: What is claimed.
        left_by: The claim that this one took over, as its process wrote it; None for a free key.
    """

    key: str
    token: str
    path: Path
    left_by: dict[str, Any] | None = None

    def is_mine(self) -> bool:
        """False once another process has taken it for dead."""
        return (_read(self.path) or {}).get("token") == self.token

    def release(self) -> None:
        """Give it back; nothing happens to the claim of another."""
        if self.is_mine():
            self.path.unlink(missing_ok=True)


class Claims:
    """The claims in a directory, one process's view.

    Args:
        directory: Exists.
        stale_seconds: Silence after which another machine's claim is taken for dead.
    """

    def __init__(self, directory: Path, *, stale_seconds: float = 3600.0) -> None:
        self.directory, self.stale_seconds = directory, stale_seconds
        self.host, self.started = socket.gethostname(), _start_time(os.getpid())

    def take(self, key: str) -> Claim | None:
        """Claim a key, or None where another has it."""
        path = self.directory / f"{key}.json"
        token = uuid.uuid4().hex
        if self._create(path, token):
            return Claim(key, token, path)
        left = _read(path)
        if not self._is_stale(path, left):
            return None
        # Two that find the same dead claim must not both remove it: the second would remove the first one's new claim.
        with self._takeover():
            if not path.exists():  # given back meanwhile, and whoever creates it first has it
                return Claim(key, token, path) if self._create(path, token) else None
            left = _read(path)
            if not self._is_stale(path, left):
                return None
            path.unlink(missing_ok=True)
            return Claim(key, token, path, left or {}) if self._create(path, token) else None

    @contextmanager
    def renewed(self, claim: Claim) -> Iterator[None]:
        """Tell other machines, while the block runs, that its process lives."""
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

    def _create(self, path: Path, token: str) -> bool:
        owner = {"token": token, "pid": os.getpid(), "host": self.host, "started": self.started, "time": time.time()}
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.write(json.dumps(owner))
        # A process that was paused between making and writing may find that another took the empty file for dead
        return (_read(path) or {}).get("token") == token

    def _is_stale(self, path: Path, owner: dict[str, Any] | None) -> bool:
        now = self._now()
        try:
            age = now - path.stat().st_mtime
        except FileNotFoundError:
            return True  # given back meanwhile
        if owner is None:
            return age > _UNREADABLE_SECONDS
        if owner.get("host") != self.host:
            return age > self.stale_seconds
        return not _is_alive(int(owner["pid"]), owner.get("started"))

    def _now(self) -> float:
        """The file system's time."""
        clock = self.directory / f".clock-{self.host}-{os.getpid()}-{threading.get_ident()}"
        clock.touch()
        now = clock.stat().st_mtime
        clock.unlink(missing_ok=True)
        return now

    @contextmanager
    def _takeover(self) -> Iterator[None]:
        with (self.directory / ".takeover").open("a") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)  # ends with the process, however it ends
            yield


def _read(path: Path) -> dict[str, Any] | None:
    """What its owner wrote; None while that is not whole, or where there is no claim."""
    try:
        found = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _is_alive(pid: int, started: str | None) -> bool:
    """Whether the process still runs, and is not another one that got its number."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    now = _start_time(pid)
    return started is None or now is None or now == started


def _start_time(pid: int) -> str | None:
    """When a process began, in ticks since the machine did; '' of one that has ended, None where nobody tells."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    state, *rest = text.rpartition(")")[2].split()
    return "" if state == "Z" else rest[18]
