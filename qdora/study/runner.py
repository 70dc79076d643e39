"""Runs a study: its cells, each once, by any number of processes on one or more machines.

A cell trains (or only evaluates) one recipe and keeps what the report needs. A failed cell is recorded and tried again;
a finished one never runs again.
"""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from qdora.data.sources import has_split
from qdora.errors import Diverged, Interrupted, RunFailure, UserError, not_one_of
from qdora.files.access_tokens import masked
from qdora.files.atomic import atomic_directory, disk_failures
from qdora.files.console import consoles
from qdora.files.run_directory import RunDirectory
from qdora.model.build_model import find_model
from qdora.model.load import Quantization
from qdora.model.pruning import quantized_layers
from qdora.recipe.recipe_file import missing_files, read_yaml
from qdora.run.evaluate import EvalOptions, evaluate_target
from qdora.run.run_page import PAGE_FILE, leave_page
from qdora.run.step_evaluations import adapter_step
from qdora.run.train import train_run
from qdora.study.compare import cannot_win
from qdora.study.grid import Cell, Study, equal_in_words, expand, load_study
from qdora.study.study_directory import Claim, StudyDirectory
from qdora.train.out_of_memory import free_memory

logger = logging.getLogger("qdora")

Work = Callable[[Cell, Path], Mapping[str, Any]]
"""work(cell, run directory) -> JSON values. It is called again if it was cut off, and then finds its earlier files."""
Event = Literal["done", "failed"]
AfterAttempt = Callable[[Cell, Event, float], None]
"""after(cell, result of this attempt, seconds), called after every attempt of this process."""

CLUSTERS = ("slurm", "local")

_SHARD = re.compile(r"([1-9]\d{0,5})/([1-9]\d{0,5})")
_TRACEBACK_LINES = 12
_POLL_SECONDS = 0.2
_COMPRESSED = "base/compressed.json"


@dataclass(frozen=True)
class CellTally:
    """How far a study is: cells with a result from any process, cells that were given up (key -> last reason), and
    cells that another process works on.
    """

    num_cells: int
    num_done: int
    failed: dict[str, str]
    num_elsewhere: int


def study_run(
    file: Path,
    directory: Path | None = None,
    *,
    shard: str | None = None,
    retry_failed: bool = False,
    dry_run: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Run the cells of a study that have no result and that no other process works on.

    Args:
        directory: Where results are written; default runs/studies/<name of the file>.
        shard: "i/n": only every n-th cell, starting with the i-th.
        retry_failed: Also run cells that were given up.
        dry_run: Check every cell and write nothing.
    Returns:
        The directory and the counts of cells.
    Raises:
        UserError: The study, one of its recipes, or the shard is wrong.
        RunFailure: Some cells were given up; all others are done.
    """
    progress, results = consoles(console)
    study, directory, cells = _checked(file, directory)
    mine = shard_of(cells, shard)
    results.print(
        f"{len(cells)} cells, {sum(cell.is_trained for cell in cells)} with training"
        + (f"; {len(mine)} in shard {shard}" if shard else ""),
        highlight=False,
    )
    notes = _tell_notes(study, cells, progress)
    if dry_run:
        for cell in mine:
            results.print(f"  {cell.in_words()}", markup=False, highlight=False, soft_wrap=True)
        shown = {"directory": str(directory), "num_cells": len(cells), "notes": notes}
        return shown | {"cells": [cell.record() for cell in mine]}
    with disk_failures(directory):
        store = StudyDirectory(directory, retries=study.retries)
        store.write_index(study, cells)
        if retry_failed:
            store.forget_failures([cell.key for cell in mine])
        with cells_bar(progress, mine, store) as report, _quiet_runs(), store.present():
            found = run_cells(mine, store, cell_work(study.compare.split, store), report)
            _leave_missing_pages(mine, store)
    return _concluded(found, mine, directory, results)


def _leave_missing_pages(cells: Sequence[Cell], store: StudyDirectory) -> None:
    """Write the pages of finished cells that could not be written before, on a full disk for example."""
    for run in (RunDirectory(store.cell(cell.key)) for cell in cells if store.is_done(cell.key)):
        if not run.inside(PAGE_FILE).exists():
            leave_page(run)


def _tell_notes(study: Study, cells: Sequence[Cell], console: Console) -> list[str]:
    notes = notes_on(study, cells)
    for note in notes:
        console.print(note, markup=False, highlight=False)
    return notes


def notes_on(study: Study, cells: Sequence[Cell]) -> list[str]:
    """What to know of a grid before it runs: combinations that are equal, and why it can have no winner."""
    records = [cell.record() for cell in cells]
    equal, reasons = equal_in_words(records), cannot_win(records, study.compare)
    never = [f"This grid cannot have a winner: {'; '.join(reasons)}. It gives scores and intervals."] if reasons else []
    return [*([] if equal is None else [equal]), *never]


def submit_study(
    file: Path, directory: Path | None, num_jobs: int, cluster: str, options: Sequence[str]
) -> dict[str, Any]:
    """Check a study and start `num_jobs` processes that run it together; `options` of submitit are key=value each."""
    if cluster not in CLUSTERS:
        raise UserError(not_one_of("--cluster", cluster, CLUSTERS))
    study, directory, cells = _checked(file, directory)
    notes = _tell_notes(study, cells, consoles(None)[0])
    StudyDirectory(directory, retries=study.retries).write_index(study, cells)
    parameters = {}
    for option in options:
        key, equals, text = option.partition("=")
        if not equals or not key:
            raise UserError(f"--job-option: must be key=value such as timeout_min=600, got {option!r}.")
        parameters[key.strip()] = read_yaml(f"value: {text}", f"--job-option {option}")["value"]
    command = [sys.executable, "-m", "qdora.cli", "study", str(file.resolve()), "--dir", str(directory)]
    jobs = submit_jobs(command, directory, num_jobs, cluster=cluster, parameters=parameters)
    return {"directory": str(directory), "notes": notes, "jobs": [job.job_id for job in jobs]}


def submit_jobs(
    command: Sequence[str], directory: Path, num_jobs: int, *, cluster: str, parameters: Mapping[str, Any]
) -> list[Any]:
    """Start the same command several times through submitit; each process claims the next free cell of the study.

    All jobs must see the study's directory under the same path; their output goes to slurm/ inside it. `cluster` is
    slurm, or local for processes on this machine. `parameters` of submitit: timeout_min, gpus_per_node,
    slurm_partition, ... UserError: submitit is missing, or does not know a parameter or the cluster.
    """
    try:
        import submitit
        from submitit.helpers import CommandFunction
    except ImportError:
        raise UserError("--jobs: submitit is not installed. Fix: pip install 'qdora[slurm]'") from None
    try:
        executor = submitit.AutoExecutor(folder=directory / "slurm" / "%j", cluster=cluster)
    except (RuntimeError, ValueError, ImportError) as error:  # such as no srun on this machine
        raise UserError(f"--cluster {cluster}: {' '.join(str(error).split())}") from None
    try:
        executor.update_parameters(**{"name": "qdora-study", **parameters})
    except (RuntimeError, NameError, TypeError, ValueError, AssertionError) as error:
        raise UserError(f"--job-option: {' '.join(str(error).split())}") from None
    with executor.batch():
        return [executor.submit(CommandFunction(list(command))) for _ in range(num_jobs)]


def _checked(file: Path, directory: Path | None) -> tuple[Study, Path, list[Cell]]:
    study = load_study(file)
    cells = expand(study)
    faults = [fault for cell in cells for fault in missing_files(cell.recipe, str(file))]
    if study.compare.split == "test":
        faults += [
            f"{file}: compare.split: {source.label} has no test split. Fix: set compare.split to halves."
            for cell in cells
            for source in cell.recipe.data.mix
            if source.label in (cell.recipe.eval.tasks or [source.label]) and not has_split(source, "test")
        ]
    if faults:
        raise UserError(*dict.fromkeys(faults))
    return study, (directory or Path("runs") / "studies" / file.stem).absolute(), cells


def shard_of(cells: Sequence[Cell], shard: str | None) -> list[Cell]:
    """Shard "i/n": every n-th cell, so that long and short cells are spread evenly; None is all."""
    match = _SHARD.fullmatch(shard or "1/1")
    if match is None or int(match[1]) > int(match[2]):
        raise UserError(f"--shard: must be I/N with I from 1 to N, such as 2/8, got {shard!r}.")
    return list(cells[int(match[1]) - 1 :: int(match[2])])


@contextmanager
def _quiet_runs() -> Iterator[None]:
    """Messages of a run go to its own log.txt only; the console shows one line a cell."""
    handlers = logging.getLogger().handlers
    levels = [handler.level for handler in handlers]
    for handler in handlers:
        handler.setLevel(max(handler.level, logging.WARNING))
    try:
        yield
    finally:
        for handler, level in zip(handlers, levels, strict=True):
            handler.setLevel(level)


@contextmanager
def cells_bar(console: Console, cells: Sequence[Cell], store: StudyDirectory) -> Iterator[AfterAttempt]:
    """Progress over the cells with the time left: a bar on a terminal, otherwise one line a cell.

    Cells that other processes finish count, too, so the time left is that of all processes together.
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
    """A duration in words: 42 s, 3 min, 2 h 05 min."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def _concluded(found: CellTally, cells: Sequence[Cell], directory: Path, console: Console) -> dict[str, Any]:
    console.print(f"study: {directory}", highlight=False, soft_wrap=True)
    if found.num_elsewhere:
        console.print(f"Other processes work on {found.num_elsewhere} cells.", highlight=False)
    if found.failed:
        named = {cell.key: " ".join(cell.labels.values()) for cell in cells}
        key, reason = next(iter(found.failed.items()))
        raise RunFailure(
            f"{len(found.failed)} of {found.num_cells} cells failed; the first is {named[key]} ({key}): {reason}. "
            "The reasons are in failures/. Fix: mend the cause, then run again with --retry-failed.",
            safe=[directory],
        )
    return {"directory": str(directory)} | {key: value for key, value in vars(found).items() if key != "failed"}


def run_cells(
    cells: Sequence[Cell], store: StudyDirectory, work: Work, report: AfterAttempt | None = None
) -> CellTally:
    """Run every cell that has no result and that no other process works on, until none is left.

    An exception in `work` is recorded as a failure; the cell is tried again after the others, `store.retries` times. A
    process that dies leaves its claim; the next process that finds the claim runs the cell again. An interrupt releases
    the claim, and the files stay.
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
                # Another process may have finished the cell just before this one claimed it
                if not store.is_done(cell.key) and not store.is_given_up(cell.key):
                    _attempt(cell, store, claim, work, report)
                    busy = True
            finally:
                claim.release()
    return tally(cells, store)


def tally(cells: Sequence[Cell], store: StudyDirectory) -> CellTally:
    """How far these cells are now."""
    open_ = [cell.key for cell in cells if not store.is_done(cell.key)]
    failed = {key: store.failures(key)[-1]["reason"] for key in open_ if store.is_given_up(key)}
    return CellTally(len(cells), len(cells) - len(open_), failed, len(open_) - len(failed))


def _attempt(cell: Cell, store: StudyDirectory, claim: Claim, work: Work, report: AfterAttempt | None) -> None:
    began = time.perf_counter()
    event: Event = "done"
    try:
        with disk_failures(store.cell(cell.key)):
            with store.claims.renewed(claim):
                result = dict(work(cell, store.cell(cell.key)))
            if not claim.is_mine():
                raise RunFailure("another process took over this cell: this process was silent for too long")
            store.write_result(cell.key, {"seconds": round(time.perf_counter() - began, 3), **result})
    except Interrupted:
        raise
    except Exception as error:  # the other cells must still run; the error is recorded and shown
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


def cell_work(split: str, store: StudyDirectory) -> Work:
    """The work of a cell: train and evaluate its recipe; with split "test" also evaluate on the test examples.

    Pruned bases are made once in the study's directory and shared by all cells that start from the same one. Processes
    of one machine share its cores evenly, unless OMP_NUM_THREADS is set; each counts the others when it begins a cell.
    """
    most = torch.get_num_threads()

    def work(cell: Cell, directory: Path) -> dict[str, Any]:
        try:
            if "OMP_NUM_THREADS" not in os.environ:
                torch.set_num_threads(min(most, store.share_of_cores()))
            return _run(cell, directory, split, store)
        except Diverged as error:
            if not cell.is_trained:
                raise
            return {"diverged": _reason(error)}
        finally:  # make room for the model of the next cell
            free_memory()

    return work


def _run(cell: Cell, directory: Path, split: str, store: StudyDirectory) -> dict[str, Any]:
    run, quiet, shared_bases = RunDirectory(directory), Console(quiet=True), partial(once, store, "bases")
    resume = run.recipe_file.is_file() and run.has_begun
    summary = train_run(cell.recipe, directory, resume=resume, console=quiet, shared_bases=shared_bases)
    step = (adapter_step(run) or summary["num_steps"]) if cell.is_trained else 0
    files = {"validation": run.evaluation_file(step)}
    if split == "test":
        evaluate_target(str(directory), EvalOptions(split="test"), console=quiet)
        files["test"] = run.inside("eval", f"{'final' if cell.is_trained else 'base'}-test.json")
    generated = run.inside("eval", f"step-{step}-generated.json")
    if generated.is_file():
        files["generated"] = generated
    return {
        "num_steps": summary["num_steps"],
        "final_loss": summary["final_loss"],
        "num_trainable": summary["num_trainable"] if cell.is_trained else 0,
        "size": summary["size"],
        "files": {name: str(file.relative_to(directory)) for name, file in files.items()},
        "compression": _compression(run, cell),
    }


def _compression(run: RunDirectory, cell: Cell) -> dict[str, Any] | None:
    """Errors of every layer of a pruned base; for a cell without training, also of a base that is only quantised."""
    file = run.inside(_COMPRESSED)
    if file.is_file():
        found: dict[str, Any] = json.loads(file.read_bytes())
        return found
    base = cell.recipe.base
    if cell.is_trained or base.quant == "none":
        return None
    wanted = Quantization(base.quant, base.block_size, base.double_quant, base.skip)
    layers = quantized_layers(find_model(cell.recipe)[0], wanted)
    return {"layers": layers} if layers else None


def once(store: StudyDirectory, stage: str, key: str, make: Callable[[Path], None]) -> Path:
    """A directory that cells share, such as a compressed base: the first caller makes it, the others wait for it.

    `stage` (the kind of content) and `key` are file names. `make` fills an empty directory; if it raises, the directory
    is removed, and the next caller tries again.
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
