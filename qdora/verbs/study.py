"""qdora study: check a grid, run its cells, say where it stands."""

from __future__ import annotations

import logging
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from qdora.data.sources import has_split
from qdora.errors import RunFailure, UserError
from qdora.recipe_file import missing_files, read_yaml
from qdora.study.config import Study, load_study
from qdora.study.grid import Cell, expand
from qdora.study.runner import Event, Report, Tally, run_cells, shard_of
from qdora.study.slurm import submit_jobs
from qdora.study.store import StudyDirectory
from qdora.verbs.assemble import source_spec
from qdora.verbs.show import default_console

_SHARD = re.compile(r"([1-9]\d{0,5})/([1-9]\d{0,5})")


def study_run(
    file: Path,
    directory: Path | None = None,
    *,
    shard: str | None = None,
    retry_failed: bool = False,
    dry_run: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Run the cells of a study that no process has run and none is at.

    Args:
        file: The study.
        directory: Where it is written; runs/studies/<name of the file> by default.
        shard: "i/n": only every n-th cell from the i-th on.
        retry_failed: Give cells that were given up another chance.
        dry_run: Check every cell and write nothing.
        console: Where progress is shown; standard error by default.
    Returns:
        JSON values: directory, counts of cells, and the reasons of those that failed.
    Raises:
        UserError: The study, one of its recipes, or the shard is wrong.
        RunFailure: Cells failed as often as they may; all others are done.
        Interrupted, KeyboardInterrupt: Everything finished is kept.
    """
    console = console or default_console()
    study, directory, cells = _checked(file, directory)
    index, count = _shard(shard)
    mine = shard_of(cells, index, count)
    console.print(
        f"{len(cells)} cells, {sum(cell.is_trained for cell in cells)} of them trained"
        + (f"; {len(mine)} in shard {shard}" if shard else ""),
        highlight=False,
    )
    if dry_run:
        return {"directory": str(directory), "num_cells": len(cells), "cells": [cell.record() for cell in mine]}
    store = StudyDirectory(directory, retries=study.retries)
    store.write_index(study, cells)
    if retry_failed:
        store.forget_failures([cell.key for cell in mine])
    from qdora.verbs.study_cell import cell_work

    with cells_bar(console, mine, store) as report, _quiet_runs():
        found = run_cells(mine, store, cell_work(study.compare.split, store), report)
    return _concluded(found, mine, directory, console)


def submit_study(
    file: Path, directory: Path | None, num_jobs: int, cluster: str, options: Sequence[str]
) -> dict[str, Any]:
    """Check a study and start processes that run it together, through submitit.

    Args:
        options: "key=value" of submitit.
    Raises:
        UserError: As `study_run` and `submit_jobs`.
    """
    study, directory, cells = _checked(file, directory)
    StudyDirectory(directory, retries=study.retries).write_index(study, cells)
    parameters = {}
    for option in options:
        key, equals, text = option.partition("=")
        if not equals or not key:
            raise UserError(f"--job-option {option}: allowed: key=value such as timeout_min=600.")
        parameters[key.strip()] = read_yaml(f"value: {text}", f"--job-option {option}")["value"]
    command = [sys.executable, "-m", "qdora.cli", "--quiet", "study", str(file.resolve()), "--dir", str(directory)]
    jobs = submit_jobs(command, directory, num_jobs, cluster=cluster, parameters=parameters)
    return {"directory": str(directory), "jobs": [job.job_id for job in jobs]}


@contextmanager
def cells_bar(console: Console, cells: Sequence[Cell], store: StudyDirectory) -> Iterator[Report]:
    """Progress over the cells with the time left: a bar on a terminal, one line a cell elsewhere.

    Cells that other processes finish meanwhile count, too, so the time left is that of all of them together.
    """
    keys, began = {cell.key for cell in cells}, time.monotonic()
    before = store.num_done(keys)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[left]}"))
    names = {cell.key: " ".join(cell.labels.values()) or "uncompressed base" for cell in cells}
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("cells", total=len(cells), completed=before, left="")

        def report(cell: Cell, event: Event, seconds: float) -> None:
            done = store.num_done(keys)
            left = ""
            if done > before:
                left = f"{in_words((len(cells) - done) * (time.monotonic() - began) / (done - before))} left"
            progress.update(task, completed=done, left=left)
            text = f"{done}/{len(cells)} {event}: {names[cell.key]} ({cell.key}), {in_words(seconds)}; {left}"
            if event == "failed" or not console.is_terminal:
                console.print(text.removesuffix("; "), markup=False, highlight=False, soft_wrap=True)

        yield report


def in_words(seconds: float) -> str:
    """A duration as a person says it: 42 s, 3 min, 2 h 05 min."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def _checked(file: Path, directory: Path | None) -> tuple[Study, Path, list[Cell]]:
    study = load_study(file)
    cells = expand(study)
    faults = [fault for cell in cells for fault in missing_files(cell.recipe, str(file))]
    if study.compare.split == "test":
        what = "has no test split, allowed: halves, or sources with one."
        faults += [
            f"{file}: compare.split: {source.label} {what}"
            for cell in cells
            for source in cell.recipe.data.mix
            if not has_split(source_spec(source, cell.recipe.data), "test")
        ]
    if faults:
        raise UserError(*dict.fromkeys(faults))
    return study, (directory or Path("runs") / "studies" / file.stem).absolute(), cells


def _shard(text: str | None) -> tuple[int, int]:
    if text is None:
        return 1, 1
    match = _SHARD.fullmatch(text)
    if match is None or int(match[1]) > int(match[2]):
        raise UserError(f"--shard: got {text!r}, allowed: I/N with I from 1 to N, such as 2/8.")
    return int(match[1]), int(match[2])


@contextmanager
def _quiet_runs() -> Iterator[None]:
    """What a run says goes to its own log.txt; the console has one line a cell."""
    handlers = logging.getLogger().handlers
    levels = [handler.level for handler in handlers]
    for handler in handlers:
        handler.setLevel(max(handler.level, logging.WARNING))
    try:
        yield
    finally:
        for handler, level in zip(handlers, levels, strict=True):
            handler.setLevel(level)


def _concluded(found: Tally, cells: Sequence[Cell], directory: Path, console: Console) -> dict[str, Any]:
    console.print(f"study: {directory}", highlight=False, soft_wrap=True)
    if found.num_elsewhere:
        console.print(f"{found.num_elsewhere} cells are with other processes.", highlight=False)
    if found.failed:
        named = {cell.key: " ".join(cell.labels.values()) for cell in cells}
        key, reason = next(iter(found.failed.items()))
        raise RunFailure(
            f"{len(found.failed)} of {found.num_cells} cells were given up, first {named[key]} ({key}): {reason}. "
            "Their reasons are in failures/; --retry-failed tries them again.",
            safe=[directory],
        )
    return {
        "directory": str(directory),
        "num_cells": found.num_cells,
        "num_done": found.num_done,
        "num_elsewhere": found.num_elsewhere,
    }
