"""The directory of a study: one run directory a cell, and files that say which cells are done, failed and claimed.

    study.json  cells/<key>/  results/<key>.json  failures/<key>.json  claims/<key>.json  processes/<id>.json
    shared/<stage>/<key>/  report/

Any number of processes may share it. A process claims a cell by creating its claim file (O_EXCL), which it keeps locked
and removes after the work. A claim that was left behind is taken over: on the same machine when its lock is free, which
the system sees to however its process ended (a paused process keeps it); on another machine when it was not renewed for
long. Process ids and host names do not count, since containers on one machine may share both. All times are those of
the file system, so the clocks of the machines do not matter.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any

from qdora.errors import UserError
from qdora.files.atomic import atomic_write_json
from qdora.files.environment import cpus
from qdora.files.work_lock import flock
from qdora.study.cells import Cells
from qdora.study.grid import Study

_RENEWALS = 20  # number of renewals within the time after which a claim is stale
_UNREADABLE_SECONDS = 30.0  # an empty claim older than this was left by a process killed before it wrote the file
_FOLDERS = ("cells", "results", "failures", "claims", "processes", "shared")

MAX_DEATHS = 8
"""Times that a cell may take its whole process down (out of memory, kill -9) before it is given up."""


class StudyDirectory:
    """The files of a study; a failed cell is given up after `retries` more attempts.

    Missing folders are made, but not without `makes`, for a look at what is there.
    """

    def __init__(self, path: Path, *, retries: int = 1, makes: bool = True) -> None:
        self.path, self.retries = path, retries
        for name in _FOLDERS if makes else ():
            (path / name).mkdir(parents=True, exist_ok=True)
        self.claims = Claims(path / "claims")

    def cell(self, key: str) -> Path:
        """The run directory of a cell."""
        return self.path / "cells" / key

    def shared(self, stage: str, key: str) -> Path:
        """A directory that cells share (`once`)."""
        return self.path / "shared" / stage / key

    def is_done(self, key: str) -> bool:
        """Whether the cell has a result."""
        return self._result(key).is_file()

    def result(self, key: str) -> dict[str, Any] | None:
        """The result of the cell, or None."""
        return _read(self._result(key))

    def write_result(self, key: str, value: Mapping[str, Any]) -> None:
        """Write a result atomically."""
        atomic_write_json(self._result(key), value)

    def num_done(self, keys: set[str]) -> int:
        """How many of these cells have a result from any process."""
        return len(keys & {file.stem for file in (self.path / "results").glob("[!.]*.json")})

    def failures(self, key: str) -> list[dict[str, Any]]:
        """All failed attempts, oldest first: kind (error or died), reason, time, host, pid, traceback."""
        found = _read(self._failures(key))
        return [] if found is None else list(found["attempts"])

    def add_failure(self, key: str, attempt: Mapping[str, Any]) -> None:
        """Record a failed attempt; only the holder of the claim may do so."""
        stamp = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
        atomic_write_json(self._failures(key), {"attempts": [*self.failures(key), stamp | dict(attempt)]})

    def is_given_up(self, key: str) -> bool:
        """Whether the cell has no attempts left."""
        kinds = [attempt["kind"] for attempt in self.failures(key)]
        return kinds.count("error") > self.retries or kinds.count("died") > MAX_DEATHS

    def forget_failures(self, keys: Sequence[str]) -> None:
        """Let cells that were given up run again."""
        for key in keys:
            if not self.is_done(key) and self.is_given_up(key):
                self._failures(key).unlink(missing_ok=True)

    @contextmanager
    def present(self) -> Iterator[None]:
        """While the block runs, `share_of_cores` counts this process."""
        path = self.path / "processes" / f"{uuid.uuid4().hex}.json"
        with path.open("x", encoding="utf-8") as stream:
            flock(stream.fileno(), fcntl.LOCK_EX)
            stream.write(json.dumps({"machine": _machine(), "cores": cpus()}))
            stream.flush()
            try:
                yield
            finally:
                path.unlink(missing_ok=True)

    def share_of_cores(self) -> int:
        """Cores for this process, at least 1: each is divided among the `present` processes that may run on it."""
        users: Counter[int] = Counter()
        for path in (self.path / "processes").glob("*.json"):
            found = _read_claim(path)
            if found is None or found["machine"] != _machine():
                continue
            is_held = _is_locked(path)
            if is_held:
                users.update(found["cores"])
            elif is_held is not None:
                path.unlink(missing_ok=True)
        return max(1, int(sum(Fraction(1, max(1, users[core])) for core in cpus())))

    def write_index(self, study: Study, cells: Cells) -> None:
        """Write study.json for the report: the study, its cells, and what the searches found."""
        plain = study.model_dump(mode="json", exclude_unset=True)
        document = {
            "study": plain,
            "cells": [cell.record() for cell in cells.cells],
            "num_waiting": cells.num_waiting,
            "rates": cells.search_rows(),
        }
        atomic_write_json(self.path / "study.json", document)

    def is_at_work(self) -> bool:
        """Whether a process works on a cell now; one that died at it does not."""
        return any(map(self.claims.is_alive, (self.path / "claims").glob("*.json")))

    def _result(self, key: str) -> Path:
        return self.path / "results" / f"{key}.json"

    def _failures(self, key: str) -> Path:
        return self.path / "failures" / f"{key}.json"


def read_index(path: Path) -> dict[str, Any]:
    """Read study.json: study, cells (`Cell.record`), num_waiting, rates. UserError: there is none."""
    found = _read(path / "study.json")
    if found is None:
        raise UserError(f"{path}: must be a directory that 'qdora study' made (no study.json there).")
    return found


def _read(file: Path) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads(file.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise UserError(f"{file}: damaged ({error}). Fix: delete it; the cell then runs again.") from None
    return found


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
        return (_read_claim(self.path) or {}).get("token") == self.token

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
        if claim is not None or not self._is_stale(path, _read_claim(path)):
            return claim
        # Two processes that find one dead claim must not both remove it: the second would remove the first's new claim.
        with (self.directory / ".takeover").open("a") as lock:
            flock(lock.fileno(), fcntl.LOCK_EX)  # released when the process ends, however it ends
            if not path.exists():  # released meanwhile; the first process to create it has it
                return self._create(key, path)
            left = _read_claim(path)
            if not self._is_stale(path, left):
                return None
            path.unlink(missing_ok=True)
            return self._create(key, path, left or {})

    def is_alive(self, path: Path) -> bool:
        """Whether a process still holds the claim of a file."""
        return not self._is_stale(path, _read_claim(path))

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
        owner = {"token": claim.token, "machine": _machine(), "host": socket.gethostname(), "pid": os.getpid()}
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
        is_held = _is_locked(path) if owner.get("machine") == _machine() else None
        return age > self.stale_seconds if is_held is None else not is_held

    def _now(self) -> float:
        """The time of the file system."""
        clock = self.directory / f".clock-{uuid.uuid4().hex}"
        clock.touch()
        now = clock.stat().st_mtime
        clock.unlink(missing_ok=True)
        return now


def _read_claim(path: Path) -> dict[str, Any] | None:
    """What the owner of a claim wrote; None if the file is incomplete or missing."""
    try:
        found = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _is_locked(path: Path) -> bool | None:
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
def _machine() -> str:
    """The running kernel, which all containers on it share; other machines and the next boot have other names."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return socket.gethostname()
