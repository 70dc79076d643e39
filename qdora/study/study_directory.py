"""The directory of a study: one run directory a cell, and files that say which cells are done, failed and claimed.

    study.json  cells/<key>/  results/<key>.json  failures/<key>.json  claims/<key>.json  shared/<stage>/<key>/  report/

Any number of processes may share it; a process claims a cell before it runs it.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qdora.errors import UserError, not_there
from qdora.files.atomic import atomic_write_json
from qdora.files.work_lock import lock_if_free
from qdora.study.cells import Cells
from qdora.study.grid import Study

_FOLDERS = ("cells", "results", "failures", "claims", "shared")

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
    def claimed(self, key: str) -> Iterator[bool]:
        """Hold a cell while the block runs; yields False if another process has it.

        A process that is killed leaves its claim file unlocked: whoever has the cell next records the death.
        """
        file = self.path / "claims" / f"{key}.json"
        with lock_if_free(file.with_suffix(".lock")) as is_free:
            if not is_free:
                yield False
                return
            dead = _read(file)
            if dead is not None and not self.is_done(key):
                reason = f"process {dead['pid']} on {dead['host']} ended without a result"
                self.add_failure(key, {"kind": "died", "reason": reason})
            atomic_write_json(file, {"host": socket.gethostname(), "pid": os.getpid()})
            try:
                yield True
            finally:
                file.unlink(missing_ok=True)

    def num_working_here(self) -> int:
        """How many processes of this machine work on cells, or died at one that nobody has taken yet."""
        claims = map(_read, (self.path / "claims").glob("*.json"))
        return sum(claim is not None and claim["host"] == socket.gethostname() for claim in claims)

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
        return any(map(_is_held, (self.path / "claims").glob("*.json")))

    def _result(self, key: str) -> Path:
        return self.path / "results" / f"{key}.json"

    def _failures(self, key: str) -> Path:
        return self.path / "failures" / f"{key}.json"


def read_index(path: Path) -> dict[str, Any]:
    """Read study.json: study, cells (`Cell.record`), num_waiting, rates. UserError: there is none."""
    found = _read(path / "study.json")
    if found is None:
        fix = "name a directory that 'qdora study' made."
        raise UserError(not_there(path, "a study (it has no study.json)", fix))
    return found


def _is_held(claim: Path) -> bool:
    with lock_if_free(claim.with_suffix(".lock")) as is_free:
        return not is_free


def _read(file: Path) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads(file.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise UserError(f"{file}: damaged ({error}). Fix: delete it; the cell then runs again.") from None
    return found
