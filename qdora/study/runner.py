"""Runs the cells of a study, each once, among any number of processes; what fails is recorded and tried again."""

from __future__ import annotations

import logging
import os
import socket
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qdora.access_tokens import masked
from qdora.atomic_files import atomic_directory
from qdora.errors import Interrupted, RunFailure
from qdora.study.claims import Claim
from qdora.study.grid import Cell
from qdora.study.store import StudyDirectory

logger = logging.getLogger("qdora")

Work = Callable[[Cell, Path], Mapping[str, Any]]
"""work(cell, run directory) -> JSON values. Called anew for a cell whose work did not end; it may find its files."""
Event = Literal["done", "failed"]
Report = Callable[[Cell, Event, float], None]
"""report(cell, what became of this attempt, seconds), after every attempt of this process."""

_TRACEBACK_LINES = 12
_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Tally:
    """Where a study stands when a process has nothing left to do.

    Attributes:
        num_cells: Cells asked for.
        num_done: Those with a result, whoever got it.
        failed: Those given up -> the last reason.
        num_elsewhere: Those that another process is at.
    """

    num_cells: int
    num_done: int
    failed: dict[str, str]
    num_elsewhere: int


def shard_of(cells: Sequence[Cell], index: int, count: int) -> list[Cell]:
    """Part `index` of `count` (from 1) of the cells, every count-th one: long and short ones are spread."""
    if not 1 <= index <= count:
        raise ValueError(f"shard {index}/{count}: allowed are 1/{count} to {count}/{count}")
    return list(cells[index - 1 :: count])


def run_cells(cells: Sequence[Cell], store: StudyDirectory, work: Work, report: Report | None = None) -> Tally:
    """Run every cell that has no result and that no other process is at, until there is none left.

    An exception of `work` is recorded as a failure; the cell is tried again after the others, `store.retries` times.
    A process that dies leaves its claim; whoever finds it runs the cell again.

    Raises:
        Interrupted, KeyboardInterrupt: From `work`; its claim is given back and its files stay.
    """
    busy = True
    while busy:
        busy = False
        for cell in cells:
            if store.is_done(cell.key) or store.is_given_up(cell.key):
                continue
            claim = store.claims.take(cell.key)
            if claim is None:
                continue
            try:
                _record_death(store, claim)
                # Between the look and the claim another process may have finished it
                if not store.is_done(cell.key) and not store.is_given_up(cell.key):
                    _attempt(cell, store, claim, work, report)
                    busy = True
            finally:
                claim.release()
    return tally(cells, store)


def tally(cells: Sequence[Cell], store: StudyDirectory) -> Tally:
    """Where these cells stand now."""
    open_ = [cell.key for cell in cells if not store.is_done(cell.key)]
    failed = {key: store.failures(key)[-1]["reason"] for key in open_ if store.is_given_up(key)}
    return Tally(len(cells), len(cells) - len(open_), failed, len(open_) - len(failed))


def once(store: StudyDirectory, stage: str, key: str, make: Callable[[Path], None]) -> Path:
    """A directory that cells share, such as a compressed base: made by the first that asks, awaited by the others.

    Args:
        stage: Kind of thing, a file name.
        key: What it depends on, a file name.
        make: Fills an empty directory. If it raises, nothing stays, and the next that asks tries again.
    """
    path = store.path / "shared" / stage / key
    while not path.is_dir():
        claim = store.claims.take(f"{stage}-{key}")
        if claim is None:
            time.sleep(_POLL_SECONDS)
            continue
        try:
            if not path.is_dir():
                with store.claims.renewed(claim), atomic_directory(path) as directory:
                    make(directory)
        finally:
            claim.release()
    return path


def _attempt(cell: Cell, store: StudyDirectory, claim: Claim, work: Work, report: Report | None) -> None:
    began = time.perf_counter()
    event: Event = "done"
    try:
        with store.claims.renewed(claim):
            result = dict(work(cell, store.cell(cell.key)))
        if not claim.is_mine():
            raise RunFailure("the claim was taken over: this process was silent for too long")
        store.write_result(cell.key, {"seconds": round(time.perf_counter() - began, 3), **result})
    except Interrupted:
        raise
    except Exception as error:  # whatever it is, the other cells are worth running; it is recorded and shown
        event = "failed"
        if claim.is_mine():
            store.add_failure(cell.key, _failure(error))
        logger.warning("%s: %s", cell.key, _reason(error))
    if report is not None:
        report(cell, event, time.perf_counter() - began)


def _record_death(store: StudyDirectory, claim: Claim) -> None:
    if claim.left_by is None or store.is_done(claim.key):
        return
    pid, host = claim.left_by.get("pid"), claim.left_by.get("host")
    store.add_failure(claim.key, {"kind": "died", "reason": f"process {pid} on {host} ended without a result"})


def _failure(error: Exception) -> dict[str, Any]:
    lines = [line for text in traceback.format_exception(error) for line in text.splitlines()]
    where = [masked(line) for line in lines[-_TRACEBACK_LINES:]]
    who = {"host": socket.gethostname(), "pid": os.getpid()}
    return {"kind": "error", "reason": _reason(error), "traceback": where} | who


def _reason(error: Exception) -> str:
    first = next((line for line in str(error).splitlines() if line.strip()), "")
    return masked(f"{type(error).__name__}: {first}")
