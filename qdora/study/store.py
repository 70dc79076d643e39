"""The directory of a study: one run directory a cell, and beside them what is finished, claimed and failed.

study.json  cells/<key>/  results/<key>.json  failures/<key>.json  claims/<key>.json  shared/<stage>/<key>/  report/
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qdora.atomic_files import atomic_write_json
from qdora.errors import UserError
from qdora.study.claims import Claims
from qdora.study.config import Study
from qdora.study.grid import Cell

MAX_DEATHS = 8
"""Times that a cell may take its whole process down (out of memory, kill -9) before it is given up."""

_FOLDERS = ("cells", "results", "failures", "claims", "shared")


class StudyDirectory:
    """Files of a study; made where missing. Any number of processes may share it.

    Args:
        path: The directory.
        retries: Failures after which a cell is given up, less one.
        stale_seconds: Silence after which another machine's claim is taken for dead.
    """

    def __init__(self, path: Path, *, retries: int = 1, stale_seconds: float = 3600.0) -> None:
        self.path, self.retries = path, retries
        for name in _FOLDERS:
            (path / name).mkdir(parents=True, exist_ok=True)
        self.claims = Claims(path / "claims", stale_seconds=stale_seconds)

    def cell(self, key: str) -> Path:
        """The run directory of a cell."""
        return self.path / "cells" / key

    def is_done(self, key: str) -> bool:
        """Whether the cell has a result."""
        return self._result(key).is_file()

    def result(self, key: str) -> dict[str, Any] | None:
        """What the cell's work gave, or None."""
        return _read(self._result(key))

    def write_result(self, key: str, value: Mapping[str, Any]) -> None:
        """Keep a result; it is there whole or not at all."""
        atomic_write_json(self._result(key), value)

    def num_done(self, keys: set[str]) -> int:
        """How many of these cells have a result, whoever wrote it."""
        return len(keys & {file.stem for file in (self.path / "results").glob("[!.]*.json")})

    def failures(self, key: str) -> list[dict[str, Any]]:
        """Every attempt that gave no result, oldest first: kind (error or died), reason, time, host, pid, traceback."""
        found = _read(self._failures(key))
        return [] if found is None else list(found["attempts"])

    def add_failure(self, key: str, attempt: Mapping[str, Any]) -> None:
        """Record an attempt that gave no result; only the holder of the claim may."""
        stamp = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
        atomic_write_json(self._failures(key), {"attempts": [*self.failures(key), stamp | dict(attempt)]})

    def is_given_up(self, key: str) -> bool:
        """Whether the cell failed as often as it may."""
        kinds = [attempt["kind"] for attempt in self.failures(key)]
        return kinds.count("error") > self.retries or kinds.count("died") > MAX_DEATHS

    def forget_failures(self, keys: Sequence[str]) -> int:
        """Give cells without result that were given up another chance; returns how many."""
        again = [key for key in keys if not self.is_done(key) and self.is_given_up(key)]
        for key in again:
            self._failures(key).unlink(missing_ok=True)
        return len(again)

    def write_index(self, study: Study, cells: Sequence[Cell]) -> None:
        """What the report reads: the study as it was given, and its cells."""
        plain = study.model_dump(mode="json", exclude_unset=True)
        atomic_write_json(self.path / "study.json", {"study": plain, "cells": [cell.record() for cell in cells]})

    def _result(self, key: str) -> Path:
        return self.path / "results" / f"{key}.json"

    def _failures(self, key: str) -> Path:
        return self.path / "failures" / f"{key}.json"


def read_index(path: Path) -> dict[str, Any]:
    """study.json of a study's directory: `study` and `cells` (`Cell.record`).

    Raises:
        UserError: There is none.
    """
    found = _read(path / "study.json")
    if found is None:
        raise UserError(f"{path}: no study (no study.json there), allowed: a directory that 'qdora study' made.")
    return found


def _read(file: Path) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads(file.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise UserError(f"{file}: damaged ({error}), allowed: delete it, and the cell is run again.") from None
    return found
