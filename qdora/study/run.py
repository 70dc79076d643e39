"""Runs a study: its cells, each once, by any number of processes on one or more machines.

A failed cell is recorded and tried again; a finished one never runs again.
"""

from __future__ import annotations

import logging
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from qdora.data.sources import has_split
from qdora.errors import Diverged, Interrupted, RunFailure, UserError, named
from qdora.files.atomic import disk_failures, masked
from qdora.files.console import consoles, duration
from qdora.files.machine import check_gpu
from qdora.files.run_directory import RunDirectory
from qdora.memory.oom import free_memory
from qdora.model.build_model import find_model
from qdora.model.load import load_config
from qdora.recipe.recipe_file import missing_files, read_yaml, recipe_from, settings
from qdora.recipe.section import with_settings
from qdora.run.run import train_run
from qdora.study.cells import Cell, Expander
from qdora.study.compare import against_all_verdicts
from qdora.study.grid import in_words, load_study
from qdora.study.measure import evaluate_magnitudes, measure_by_layer, measure_checkpoints
from qdora.study.report import read_report, report_run
from qdora.study.results import Results, StudyDirectory, cells_now, planned_cells, stage_times, times_in_words
from qdora.study.vary import keep_grid, table
from qdora.train.evals import adapter_step

logger = logging.getLogger("qdora")

Work = Callable[[Cell, Path], Mapping[str, Any]]
"""work(cell, run directory) -> JSON values. If it was cut off, it is called again and finds its earlier files."""
AfterAttempt = Callable[[Cell, str, float], None]

_TRACEBACK_LINES = 12
_IDLE_SECONDS = 2.0


def study_run(
    file: Path,
    directory: Path | None = None,
    *,
    text: str | None = None,
    retry_failed: bool = False,
    dry_run: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Run the cells of a study that have no result and that no other process works on.

    `retry_failed`: also those that were given up. `dry_run`: check every cell, tell how long the study takes, and write
    nothing. `text`: of a study file that is not written yet (`varied`); such a study ends with its table and report.
    Returns the directory and the counts of cells.
    """
    progress, results = consoles(console)
    expander, directory = checked_study(file, directory, text)
    if not dry_run:
        check_gpu()
    elif text is not None:
        results.print(text, soft_wrap=True)
    with disk_failures(directory):
        if text is not None and not dry_run:
            keep_grid(file, text)
        store = StudyDirectory(directory, retries=expander.study.retries, makes=not dry_run)
        known = Results(store, expander.study)
        found = planned_cells(expander, known) if dry_run else cells_now(expander, known)
        cells = found.cells
        results.print(
            f"{len(cells)} cells, {sum(cell.is_trained for cell in cells)} with training; "
            f"{sum(found.num_waiting.values())} more wait for these"
        )
        if why := against_all_verdicts(expander.study):
            results.print(f"No comparison can get a verdict: {why}.", soft_wrap=True)
        if dry_run:
            times = stage_times(cells, known)
            for line in (*(f"  {cell.kind} {in_words(cell.labels)}" for cell in cells), *times_in_words(times)):
                results.print(line, soft_wrap=True)
            whole = {"directory": str(directory), "num_cells": len(cells)}
            return whole | {"stages": times, "cells": [cell.record() for cell in cells]}
        if retry_failed:
            store.forget_failures([cell.key for cell in cells])
        with _quiet_runs():
            _run_all(expander, known, partial(cell_work, store), CellsLog(progress, store))
        found = cells_now(expander, known)
    num_waiting, keys = sum(found.num_waiting.values()), [cell.key for cell in found.cells]
    results.print(f"study: {directory}", soft_wrap=True)
    failed = [key for key in keys if store.is_given_up(key)]
    num_done = store.num_done({*keys})
    if num_done < len(keys) or num_waiting:
        results.print(f"{num_done} of {len(keys)} cells are done; {num_waiting} more wait for these.")
    if failed:
        first = f"{failed[0]}: {store.failures(failed[0])[-1]['reason']}"
        what = f"{len(failed)} of {len(keys)} cells failed; the first is {first}"
        raise RunFailure(f"{what}. Fix: see failures/, then run again with --retry-failed.", safe=[directory])
    facts: dict[str, Any] = {"directory": str(directory), "num_cells": len(keys), "num_done": num_done}
    facts["num_waiting"] = num_waiting
    if text is not None and num_done:
        report = read_report(directory)
        results.print(f"\n{table(report)}\n", soft_wrap=True)
        facts |= {"arms": report.tables["arms"]} | report_run(directory, console=console)
    return facts


def _run_all(expander: Expander, known: Results, work: Work, log: CellsLog) -> None:
    """Run all cells, and those that the results of all processes add to them."""
    store = known.store
    while True:
        cells = cells_now(expander, known).cells
        log.show(cells)
        run_cells(cells, store, work, log.report)
        others_work = store.is_at_work()  # before their results are read
        now = cells_now(expander, known)
        if len(now.cells) == len(cells):
            if not now.num_waiting or not others_work:
                return
            time.sleep(_IDLE_SECONDS)


def checked_study(file: Path, directory: Path | None, text: str | None = None) -> tuple[Expander, Path]:
    where = str(file) if text is None else "--vary"
    expander = Expander(load_study(file, text), where)
    cells = planned_cells(expander, None).cells
    faults = [fault for cell in cells for fault in missing_files(cell.recipe, where)]
    if expander.study.compare.split == "test":
        faults += [
            f"{where}: compare.split: {source.label} has no test split."
            for cell in cells
            for source in cell.recipe.data.mix
            if source.label in (cell.recipe.eval.tasks or [source.label]) and not has_split(source, "test")
        ]
    if faults:
        raise UserError(*dict.fromkeys(faults))
    return expander, (directory or Path("runs") / "studies" / file.stem).absolute()


@contextmanager
def _quiet_runs() -> Iterator[None]:
    """The console shows one line a cell; all else is in its log.txt."""
    handlers = logging.getLogger().handlers
    levels = [handler.level for handler in handlers]
    for handler in handlers:
        handler.setLevel(max(handler.level, logging.WARNING))
    try:
        yield
    finally:
        for handler, level in zip(handlers, levels, strict=True):
            handler.setLevel(level)


class CellsLog:
    """One line for each attempt, with the time that all processes together have left."""

    def __init__(self, console: Console, store: StudyDirectory) -> None:
        self.console, self.store = console, store
        self.keys: set[str] = set()
        self.began, self.num_before = time.monotonic(), -1

    def show(self, cells: Sequence[Cell]) -> None:
        self.keys = {cell.key for cell in cells}
        if self.num_before < 0:
            self.num_before = self.store.num_done(self.keys)

    def report(self, cell: Cell, event: str, seconds: float) -> None:
        done, left = self.store.num_done(self.keys), ""
        if done > self.num_before:
            each = (time.monotonic() - self.began) / (done - self.num_before)
            left = f"; {duration((len(self.keys) - done) * each)} left"
        name = " ".join(cell.labels.values()) or "uncompressed base"
        text = f"{done}/{len(self.keys)} {event}: {name} ({cell.key}), {duration(seconds)}{left}"
        self.console.print(text, soft_wrap=True)


def run_cells(
    cells: Sequence[Cell], store: StudyDirectory, work: Work, report: AfterAttempt = lambda *_: None
) -> None:
    """Run every free cell without a result; a failed one is tried again after the others, `store.retries` times."""
    busy = True
    while busy:
        busy = False
        for cell in cells:
            if store.is_over(cell.key):
                continue
            with store.claimed(cell.key) as is_mine:
                # Another process may have finished the cell just before this one claimed it
                if is_mine and not store.is_over(cell.key):
                    busy = True
                    _attempt(cell, store, work, report)


def _attempt(cell: Cell, store: StudyDirectory, work: Work, report: AfterAttempt) -> None:
    began, event = time.perf_counter(), "done"
    try:
        with disk_failures(store.cell(cell.key)):
            result = work(cell, store.cell(cell.key))
            store.write_result(cell.key, {"seconds": round(time.perf_counter() - began, 3), **result})
    except Interrupted:
        raise
    except Exception as error:  # the other cells must still run; the error is recorded and shown
        reason, lines = masked(named(error)), masked("".join(traceback.format_exception(error))).splitlines()
        store.add_failure(cell.key, {"reason": reason, "traceback": lines[-_TRACEBACK_LINES:]})
        logger.warning("%s: %s", cell.key, reason)
        event = "failed"
    report(cell, event, time.perf_counter() - began)


def cell_work(store: StudyDirectory, cell: Cell, directory: Path) -> dict[str, Any]:
    """The work of a cell. Pruned bases are made once and shared by all cells that start from the same one."""
    run, recipe = RunDirectory(directory), cell.recipe
    try:
        if cell.adapter_key is not None:
            source = store.cell(cell.adapter_key)
            if cell.kind != "transplant":
                if cell.kind == "by_layer":
                    found = measure_checkpoints(source, cell.steps) if cell.steps else measure_by_layer(source)
                else:
                    found = evaluate_magnitudes(source, directory, rescaled=cell.kind == "rescaled")
                return {"num_steps": 0, "final_loss": None, "num_trainable": 0, "compression": None} | found
            moved = {"kind": recipe.adapter.kind, "resume_from": str(source / "adapter")}
            recipe = recipe_from(settings(recipe) | {"adapter": moved})
        if recipe.base.is_made_once:
            recipe = with_settings(recipe, base={"cache": str((store.path / "shared/bases").absolute())})
        resume = run.recipe_file.is_file() and run.has_begun
        summary = train_run(recipe, directory, resume=resume, console=Console(quiet=True))
    except Diverged as error:
        if not cell.is_trained:
            raise
        config = load_config(find_model(cell.recipe)[0]).get_text_config()
        return {"diverged": masked(named(error)), "num_vocabulary": config.vocab_size}
    finally:  # make room for the model of the next cell
        free_memory()
    if cell.kind == "rate":  # nothing reads them, and those of full fine-tuning are large
        shutil.rmtree(run.inside("checkpoints"), ignore_errors=True)
    step = (adapter_step(run) or summary["num_steps"]) if cell.is_trained else 0
    files = {
        "scores": run.evaluation_file(step),
        "generated": run.inside("eval", f"step-{step}-generated.json"),
    }
    return {
        "num_steps": summary["num_steps"],
        "final_loss": summary["final_loss"],
        "num_trainable": summary["num_trainable"] if cell.is_trained else 0,
        "size": summary["size"],
        "files": {name: str(file.relative_to(directory)) for name, file in files.items() if file.is_file()},
        "compression": run.read_json("base/compressed.json") or None,
    }


def submit_study(
    file: Path,
    directory: Path | None,
    num_jobs: int,
    cluster: str,
    options: Sequence[str],
    text: str | None = None,
) -> dict[str, Any]:
    lines = [option.replace("=", ": ", 1) for option in options]
    parameters = read_yaml("\n".join(lines) or "{}", "--job-option (key=value)")
    expander, directory = checked_study(file, directory, text)
    if text is not None:
        keep_grid(file, text)
    cells_now(expander, Results(StudyDirectory(directory, retries=expander.study.retries), expander.study))
    command = [sys.executable, "-m", "qdora.cli", "study", str(file.resolve()), "--dir", str(directory)]
    jobs = submit_jobs(command, directory, num_jobs, cluster=cluster, parameters=parameters)
    return {"directory": str(directory), "jobs": [job.job_id for job in jobs]}


def submit_jobs(
    command: Sequence[str], directory: Path, num_jobs: int, *, cluster: str, parameters: Mapping[str, Any]
) -> list[Any]:
    """Start the same command several times; `parameters` are submitit's: timeout_min, gpus_per_node, ..."""
    try:
        import submitit
        from submitit.helpers import CommandFunction
    except ImportError:
        raise UserError("--jobs: submitit is not installed. Fix: pip install 'qdora[slurm]'") from None
    try:
        executor = submitit.AutoExecutor(folder=directory / "slurm" / "%j", cluster=cluster)
        executor.update_parameters(name="qdora-study", **parameters)
    except Exception as error:  # such as no srun
        raise UserError(f"--cluster {cluster}, --job-option: {' '.join(str(error).split())}") from None
    with executor.batch():
        return [executor.submit(CommandFunction(list(command))) for _ in range(num_jobs)]
