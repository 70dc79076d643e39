"""Cells of a study: each is done once whatever happens to the processes, and nothing that fails is dropped."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from qdora.cli import app
from qdora.errors import Diverged, Interrupted
from qdora.study import run
from qdora.study.cells import Cell, Expander
from qdora.study.grid import load_study
from qdora.study.results import Results, StudyDirectory, cells_now
from qdora.study.run import CellsLog, run_cells, submit_jobs
from tests import fake_study
from tests.fake_study import numbered

ROOT = Path(__file__).parent.parent
needs_submitit = pytest.mark.skipif(find_spec("submitit") is None, reason="submitit is not installed")


def start(directory: Path, number: int, seconds: float) -> ForkProcess:
    """A process that runs the cells; forked, so that it does not import torch again."""
    context = multiprocessing.get_context("fork")
    process = context.Process(target=fake_study.run_numbered, args=(directory, number, seconds))
    process.start()
    return process


def exit_code(process: ForkProcess) -> int | None:
    process.join(240)
    return process.exitcode


def together(*calls: Callable[[], Any]) -> None:
    with ThreadPoolExecutor(len(calls)) as pool:
        list(pool.map(lambda call: call(), calls))


def write(folder: Path) -> Path:
    """A study of both adapters on nf4, whose recipe is never run."""
    (folder / "recipe.yaml").write_text(yaml.safe_dump(fake_study.RECIPE))
    document = fake_study.DOCUMENT | {"product": fake_study.product("nf4"), "bases": False}
    (folder / "study.yaml").write_text(yaml.safe_dump(document, sort_keys=False))
    return folder / "study.yaml"


def started(directory: Path) -> list[str]:
    """Keys of the cells in the order in which their work began."""
    file = directory / "started"
    return [line.split()[0] for line in file.read_text().splitlines()] if file.exists() else []


def failed(cells: Sequence[Cell], store: StudyDirectory) -> dict[str, str]:
    """Key of a cell that was given up -> why its last attempt failed."""
    return {cell.key: store.failures(cell.key)[-1]["reason"] for cell in cells if store.is_given_up(cell.key)}


def values(store: StudyDirectory, number: int) -> list[Any]:
    return [(store.result(cell.key) or {}).get("value") for cell in numbered(number)]


def test_two_processes_do_every_cell_once_between_them(tmp_path: Path) -> None:
    pair = [start(tmp_path, 40, 0.01) for _ in range(2)]
    assert [exit_code(process) for process in pair] == [0, 0]
    assert sorted(started(tmp_path)) == [cell.key for cell in numbered(40)]
    assert values(StudyDirectory(tmp_path), 40) == [index**2 for index in range(40)]
    assert not list((tmp_path / "claims").glob("*.lock"))


def test_killed_in_the_middle_and_started_again_gives_the_same_results(tmp_path: Path) -> None:
    process, cells = start(tmp_path, 6, 0.3), numbered(6)
    while len(started(tmp_path)) < 3:  # the test's own time limit ends it
        time.sleep(0.02)
    key = cells[2].key
    store = StudyDirectory(tmp_path)
    os.kill(process.pid or 0, signal.SIGSTOP)  # paused is not dead
    with store.claimed(key) as mine:
        assert not mine
    assert store.is_at_work()
    process.kill()
    assert exit_code(process) == -signal.SIGKILL
    assert not store.is_at_work()
    assert store.num_done({cell.key for cell in cells}) == 2
    assert exit_code(start(tmp_path, 6, 0.0)) == 0
    assert values(store, 6) == [index**2 for index in range(6)]
    began = started(tmp_path)
    assert sorted(began) == sorted([*(cell.key for cell in cells), key])  # only the one that was killed again
    assert store.failures(key) == []


def test_a_failure_is_recorded_retried_after_the_others_and_given_up(tmp_path: Path) -> None:
    calls, events = list[str](), list[tuple[str, str]]()

    def work(cell: Cell, path: Path) -> dict[str, Any]:
        calls.append(cell.key)
        if cell.key.endswith("0") or (cell.key.endswith("1") and calls.count(cell.key) == 1):
            raise RuntimeError(f"no memory for {cell.key}\nand more")
        if cell.key.endswith("3"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return {}

    cells, store = numbered(3), StudyDirectory(tmp_path, retries=2)
    run_cells(cells, store, work, lambda cell, event, seconds: events.append((cell.key, event)))
    zero, one, two = (cell.key for cell in cells)
    first = [(zero, "failed"), (one, "failed"), (two, "done")]
    assert events == [*first, (zero, "failed"), (one, "done"), (zero, "failed")]
    assert calls == [key for key, _ in events]
    assert store.num_done({zero, one, two}) == 2
    assert failed(cells, store) == {zero: f"RuntimeError: no memory for {zero}"}
    assert [attempt["reason"] for attempt in store.failures(one)] == [f"RuntimeError: no memory for {one}"]
    assert any("no memory" in line for line in store.failures(zero)[0]["traceback"])
    run_cells(cells, store, work)
    assert (failed(cells, store).keys(), len(calls)) == ({zero}, 6)  # given up, and not dropped
    store.forget_failures([zero, one, two])
    assert [bool(store.failures(key)) for key in (zero, one, two)] == [False, True, False]
    run_cells(cells, store, lambda cell, path: {})
    assert store.num_done({zero, one, two}) == 3
    full = numbered(4)[3:]
    run_cells(full, store, work)
    assert "cannot be written: the disk is full" in failed(full, store)[full[0].key]


def test_an_interrupt_gives_the_claim_back_and_is_no_failure(tmp_path: Path) -> None:
    def work(cell: Cell, path: Path) -> dict[str, Any]:
        raise Interrupted(3, None)

    store = StudyDirectory(tmp_path)
    with pytest.raises(Interrupted):
        run_cells(numbered(2), store, work)
    assert not list((tmp_path / "claims").glob("*.lock"))
    assert [(store.failures(cell.key), store.is_done(cell.key)) for cell in numbered(2)] == [([], False)] * 2


def test_a_base_that_diverges_has_failed_since_it_has_no_rate_to_blame(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverge(*_: Any, **__: Any) -> None:
        raise Diverged("eval: the model's log-likelihood is not finite")

    monkeypatch.setattr(run, "train_run", diverge)
    store, base = StudyDirectory(tmp_path, retries=0), replace(numbered(1)[0], kind="base")
    run_cells([base], store, partial(run.cell_work, store))
    assert store.is_given_up(base.key)


@pytest.mark.parametrize(
    "options, words",
    [
        (["--jobs", "2", "--dry-run"], ["--dry-run: is not used with --jobs"]),
        (["--cluster", "local"], ["--cluster: is used only with --jobs"]),
        (["--jobs", "1", "--job-option", "timeout_min"], ["--job-option", "key=value"]),
    ],
)
def test_a_fault_names_its_own_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], words: list[str]
) -> None:
    monkeypatch.setenv("PATH", "")  # no srun
    found = CliRunner().invoke(app, ["study", str(write(tmp_path)), "--dir", str(tmp_path / "study"), *options])
    assert found.exit_code == 2
    text = " ".join(found.output.split())
    assert [word for word in words if word not in text] == []


@needs_submitit
def test_jobs_of_submitit_share_a_study(tmp_path: Path) -> None:
    command = ["env", f"PYTHONPATH={ROOT}", sys.executable, "-m", "tests.fake_study", str(tmp_path), "8", "0.05"]
    jobs = submit_jobs(command, tmp_path, 2, cluster="local", parameters={"timeout_min": 5})
    for job in jobs:
        job.result()
    assert len(jobs) == 2
    assert sorted(started(tmp_path)) == [cell.key for cell in numbered(8)]


@pytest.fixture
def expander(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Expander:
    """A study on nf4, of which nothing has run."""
    monkeypatch.setattr(run, "_IDLE_SECONDS", 0.02)
    return Expander(load_study(write(tmp_path)))


def run_all(expander: Expander, store: StudyDirectory, seconds: float = 0.0) -> None:
    def work(cell: Cell, directory: Path) -> Mapping[str, Any]:
        time.sleep(seconds)
        return fake_study.work_of()(cell, directory)

    run._run_all(expander, Results(store, expander.study), work, CellsLog(Console(quiet=True), store))


def test_a_process_waits_for_cells_that_others_work_on(expander: Expander, tmp_path: Path) -> None:
    """Two processes at once. One waits for a run of the search that the other, slower one works on."""
    stores = [StudyDirectory(tmp_path / "both") for _ in range(2)]
    other = Expander(expander.study)
    together(lambda: run_all(expander, stores[0]), lambda: run_all(other, stores[1], 0.1))
    cells = cells_now(expander, Results(stores[0], expander.study)).cells
    assert sum(cell.kind == "trained" for cell in cells) == 8  # both arms with four seeds
    assert all(stores[0].is_done(cell.key) for cell in cells)


def test_a_process_does_not_wait_for_one_that_died(expander: Expander, tmp_path: Path, monkeypatch: Any) -> None:
    """Another one was killed in a run of the search; a cell of the search was given up."""
    store = StudyDirectory(tmp_path / "one", retries=0)
    results, looks = Results(store, expander.study), iter(range(20))
    first = cells_now(expander, results).cells[0]
    store.add_failure(first.key, {"reason": "RuntimeError: no memory"})
    (tmp_path / f"one/claims/{first.key}.lock").touch()

    def sleep(_: float) -> None:
        assert next(looks, None) is not None, "waits for ever"

    monkeypatch.setattr(time, "sleep", sleep)
    run_all(expander, store)
    assert cells_now(expander, results).num_waiting["main"] > 0
