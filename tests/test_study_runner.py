"""Cells of a study: each is done once whatever happens to the processes, and nothing that fails is dropped."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import LlamaConfig

from qdora.errors import Diverged, Interrupted, UserError
from qdora.study.cells import Cell, Expander
from qdora.study.cluster_jobs import submit_jobs, submit_study
from qdora.study.compare import Results
from qdora.study.grid import load_study
from qdora.study.runner import (
    _run_all,
    cell_work,
    cells_bar,
    once,
    run_cells,
    shard_of,
    tally,
)
from qdora.study.study_directory import MAX_DEATHS, StudyDirectory
from qdora.study.upcoming import cells_now
from tests import fake_study, study_worker

ROOT = Path(__file__).parent.parent


def start(directory: Path, number: int, seconds: float) -> ForkProcess:
    """A process that runs the cells; forked, so that it does not import torch again."""
    process = multiprocessing.get_context("fork").Process(target=study_worker.main, args=(directory, number, seconds))
    process.start()
    return process


def exit_code(process: ForkProcess) -> int | None:
    """Its exit code within four minutes."""
    process.join(240)
    return process.exitcode


def started(directory: Path) -> list[str]:
    """Keys of the cells in the order in which their work began."""
    file = directory / "started"
    return [line.split()[0] for line in file.read_text().splitlines()] if file.exists() else []


def values(store: StudyDirectory, number: int) -> list[Any]:
    return [(store.result(cell.key) or {}).get("value") for cell in study_worker.cells(number)]


def wait_for(condition: Any, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)


def test_two_processes_do_every_cell_once_between_them(tmp_path: Path) -> None:
    pair = [start(tmp_path, 60, 0.02) for _ in range(2)]
    assert [exit_code(process) for process in pair] == [0, 0]
    assert sorted(started(tmp_path)) == [cell.key for cell in study_worker.cells(60)]
    assert values(StudyDirectory(tmp_path), 60) == [index**2 for index in range(60)]
    assert not list((tmp_path / "claims").glob("*.json"))


def test_killed_in_the_middle_and_started_again_gives_the_same_results(tmp_path: Path) -> None:
    process = start(tmp_path, 6, 0.3)
    wait_for(lambda: len(started(tmp_path)) == 3)
    process.kill()
    assert exit_code(process) == -signal.SIGKILL
    store = StudyDirectory(tmp_path)
    assert store.num_done({cell.key for cell in study_worker.cells(6)}) == 2
    assert exit_code(start(tmp_path, 6, 0.0)) == 0
    assert values(store, 6) == [index**2 for index in range(6)]
    began = started(tmp_path)
    assert sorted(set(began)) == [cell.key for cell in study_worker.cells(6)]
    assert [key for key in set(began) if began.count(key) > 1] == [f"{2:016x}"]  # the one that was killed
    (died,) = store.failures(f"{2:016x}")
    assert died["kind"] == "died"
    assert str(process.pid) in died["reason"]


def test_results_are_not_computed_again(tmp_path: Path) -> None:
    cells = study_worker.cells(3)
    run_cells(cells[:2], StudyDirectory(tmp_path), lambda cell, path: {"value": 1})
    calls = []
    store = StudyDirectory(tmp_path)
    run_cells(cells, store, lambda cell, path: calls.append(cell.key) or {"value": 2})
    done = tally(cells, store)
    assert calls == [cells[2].key]
    assert (done.num_cells, done.num_done, done.num_elsewhere, done.failed) == (3, 3, 0, {})


def test_a_failure_is_recorded_retried_after_the_others_and_given_up(tmp_path: Path) -> None:
    calls: list[str] = []

    def work(cell: Cell, path: Path) -> dict[str, Any]:
        calls.append(cell.key)
        if cell.key.endswith("0") or (cell.key.endswith("1") and calls.count(cell.key) == 1):
            raise RuntimeError(f"no memory for {cell.key}\nand more")
        return {}

    events: list[tuple[str, str]] = []
    cells, store = study_worker.cells(3), StudyDirectory(tmp_path, retries=2)
    run_cells(cells, store, work, lambda cell, event, seconds: events.append((cell.key, event)))
    found = tally(cells, store)
    zero, one, two = (cell.key for cell in cells)
    assert calls == [zero, one, two, zero, one, zero]
    first = [(zero, "failed"), (one, "failed"), (two, "done")]
    assert events == [*first, (zero, "failed"), (one, "done"), (zero, "failed")]
    assert found.failed == {zero: f"RuntimeError: no memory for {zero}"}
    assert found.num_done == 2
    assert [attempt["reason"] for attempt in store.failures(one)] == [f"RuntimeError: no memory for {one}"]
    assert any("no memory" in line for line in store.failures(zero)[0]["traceback"])
    run_cells(cells, store, work)
    assert tally(cells, store).failed.keys() == {zero}
    assert len(calls) == 6  # given up, and not dropped: the tally names it
    store.forget_failures([zero, one, two])
    assert [bool(store.failures(key)) for key in (zero, one, two)] == [False, True, False]
    run_cells(cells, store, lambda cell, path: {})
    assert tally(cells, store).num_done == 3


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EFBIG])
def test_a_cell_on_a_full_disk_says_so(tmp_path: Path, number: int) -> None:
    def work(cell: Cell, directory: Path) -> dict[str, Any]:
        raise OSError(number, os.strerror(number))

    store = StudyDirectory(tmp_path, retries=0)
    cell = study_worker.cells(1)[0]
    run_cells([cell], store, work)
    assert "cannot be written: the disk is full" in store.failures(cell.key)[-1]["reason"]


def test_an_interrupt_gives_the_claim_back_and_is_no_failure(tmp_path: Path) -> None:
    store = StudyDirectory(tmp_path)

    def work(cell: Cell, path: Path) -> dict[str, Any]:
        raise Interrupted(3, None)

    with pytest.raises(Interrupted):
        run_cells(study_worker.cells(2), store, work)
    assert not list((tmp_path / "claims").glob("*.json"))
    assert store.failures(study_worker.cells(1)[0].key) == []
    assert tally(study_worker.cells(2), store).num_elsewhere == 2


def test_a_cell_that_takes_its_process_down_is_given_up_in_the_end(tmp_path: Path) -> None:
    store, key = StudyDirectory(tmp_path), study_worker.cells(1)[0].key
    for number in range(MAX_DEATHS + 1):
        assert not store.is_given_up(key), number
        store.add_failure(key, {"kind": "died", "reason": "killed"})
    assert store.is_given_up(key)


def test_a_cell_is_claimed_by_one(tmp_path: Path) -> None:
    first, second, key = StudyDirectory(tmp_path), StudyDirectory(tmp_path), f"{0:016x}"
    with first.claimed(key) as mine, second.claimed(key) as theirs:
        assert (mine, theirs) == (True, False)
        assert first.is_at_work()
    with second.claimed(key) as again:
        assert again
    assert not second.is_at_work()
    assert second.failures(key) == []


def test_a_claim_lasts_as_long_as_its_process(tmp_path: Path) -> None:
    process, key = start(tmp_path, 1, 600.0), f"{0:016x}"
    wait_for(lambda: started(tmp_path))
    store = StudyDirectory(tmp_path)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGSTOP)  # paused is not dead
    with store.claimed(key) as mine:
        assert not mine
    process.kill()
    process.join()
    assert not store.is_at_work()
    with store.claimed(key) as mine:
        assert mine
    assert [each["kind"] for each in store.failures(key)] == ["died"]


def test_of_many_that_find_a_dead_claim_one_gets_it(tmp_path: Path) -> None:
    for round_ in range(20):
        (tmp_path / "claims").mkdir(exist_ok=True)
        (tmp_path / f"claims/{round_}.json").write_text(json.dumps({"host": "x", "pid": 1}))
        got: list[bool] = []
        begin, end = threading.Barrier(8), threading.Barrier(8)

        def take(name: str = str(round_), begin: Any = begin, end: Any = end, got: list[bool] = got) -> None:
            store = StudyDirectory(tmp_path)
            begin.wait()
            with store.claimed(name) as mine:
                got.append(mine)
                end.wait()

        threads = [threading.Thread(target=take) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(got) == [False] * 7 + [True]
        assert len(StudyDirectory(tmp_path).failures(str(round_))) == 1


def test_a_diverged_cell_is_done_with_the_worst_score_and_not_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverge(*_: Any) -> None:
        raise Diverged("step 3: loss nan is not finite")

    monkeypatch.setattr("qdora.study.runner._run", diverge)
    store, (cell, other) = StudyDirectory(tmp_path, retries=0), study_worker.cells(2)
    base = replace(other, kind="base")
    monkeypatch.setattr("qdora.study.runner.find_model", lambda _: (None, None))
    monkeypatch.setattr("qdora.study.runner.load_config", lambda _: LlamaConfig(vocab_size=77))
    run_cells([cell, base], store, cell_work(store))
    found = tally([cell, base], store)
    assert (found.num_done, list(found.failed)) == (1, [base.key])  # a base that is broken has no rate to blame
    result = store.result(cell.key) or {}
    assert (result["diverged"], result["num_vocabulary"]) == ("Diverged: step 3: loss nan is not finite", 77)


@pytest.mark.parametrize("chosen, expected", [(None, 2), ("6", 6)])
def test_processes_of_one_machine_divide_its_cores_unless_the_user_chose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chosen: str | None, expected: int
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if chosen is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", chosen)
    monkeypatch.setattr("qdora.study.runner._run", lambda *_: {"threads": torch.get_num_threads()})
    before, store = torch.get_num_threads(), StudyDirectory(tmp_path)
    (tmp_path / "claims/far.json").write_text(json.dumps({"host": "elsewhere", "pid": 1}))
    try:
        torch.set_num_threads(6)
        with store.claimed("a"), store.claimed("b"), store.claimed("c"):
            found = cell_work(store)(study_worker.cells(1)[0], tmp_path)
    finally:
        torch.set_num_threads(before)
    assert found["threads"] == expected


@pytest.mark.parametrize(
    "cluster, options, fault",
    [
        ("slrum", [], "--cluster: got 'slrum', must be one of slurm, local. Did you mean 'slurm'?"),
        ("local", ["timeout_min"], "--job-option: must be key=value"),
        ("local", {"timeout_mn": 5}, "--job-option: "),
        ("local", {"timeout_min": "five"}, "--job-option: "),
        ("slurm", {}, "--cluster slurm: Could not detect"),
    ],
)
def test_a_fault_of_a_job_names_its_own_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cluster: str, options: Any, fault: str
) -> None:
    if isinstance(options, list):  # needs no submitit
        with pytest.raises(UserError) as caught:
            submit_study(tmp_path / "study.yaml", tmp_path, 1, cluster, options)
    else:
        pytest.importorskip("submitit")
        monkeypatch.setenv("PATH", "")  # no srun
        with pytest.raises(UserError) as caught:
            submit_jobs(["true"], tmp_path, 1, cluster=cluster, parameters=options)
    assert str(caught.value).startswith(fault)


def test_what_cells_share_is_made_once(tmp_path: Path) -> None:
    calls: list[int] = []

    def make(directory: Path) -> None:
        calls.append(1)
        time.sleep(0.2)
        (directory / "weights").write_text("w")

    found: list[Path] = []
    stores = [StudyDirectory(tmp_path) for _ in range(3)]
    threads = [threading.Thread(target=lambda s=s: found.append(once(s, "base", "abc", make))) for s in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert calls == [1]
    assert {(path / "weights").read_text() for path in found} == {"w"}
    with pytest.raises(ZeroDivisionError):
        once(stores[0], "base", "other", lambda path: print(1 / 0))
    assert once(stores[0], "base", "other", make).is_dir()


def test_a_process_waits_for_cells_that_others_work_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two shards at once. One has done its part of the search long before the other, whose rates it needs."""
    monkeypatch.setattr("qdora.study.runner._IDLE_SECONDS", 0.02)
    product = fake_study.DOCUMENT["product"] | {"base.quant": ["nf4"]}
    fake_study.make(tmp_path, fail="1000", product=product)  # writes the files; the search fails
    study = load_study(tmp_path / "study.yaml")
    stores = [StudyDirectory(tmp_path / "both") for _ in range(2)]
    found: list[list[Cell]] = []

    def run(store: StudyDirectory, shard: str, seconds: float) -> None:
        made_up = fake_study.work_of()

        def work(cell: Cell, directory: Path) -> Mapping[str, Any]:
            time.sleep(seconds)
            return made_up(cell, directory)

        with cells_bar(Console(quiet=True), store) as bar:
            expander = Expander(study)
            found.append(_run_all(expander, Results(store, expander.study), shard, work, bar))

    threads = [
        threading.Thread(target=run, args=(store, f"{part}/2", seconds))
        for store, part, seconds in zip(stores, (1, 2), (0.0, 0.3), strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    trained = [cell for cells in found for cell in cells if cell.kind == "trained"]
    assert len(trained) == 8  # both arms with four seeds, in both shards
    assert all(stores[0].is_done(cell.key) for cell in trained)


def test_a_process_does_not_wait_for_one_that_died(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other shard was killed in a run of the search whose rate this one needs."""
    monkeypatch.setattr("qdora.study.runner._IDLE_SECONDS", 0.0)
    product = fake_study.DOCUMENT["product"] | {"base.quant": ["nf4"]}
    fake_study.make(tmp_path, fail="1000", product=product, bases=False)  # writes the files
    study = load_study(tmp_path / "study.yaml")
    store = StudyDirectory(tmp_path / "shard")
    expander = Expander(study)
    results = Results(store, expander.study)
    (other, *_) = shard_of(cells_now(expander, results).cells, "2/2")
    with store.claimed(other.key):
        assert store.is_at_work()
    (tmp_path / f"shard/claims/{other.key}.json").write_text(json.dumps({"host": "x", "pid": 1}))  # as after a kill
    looks = iter(range(20))

    def look(_: StudyDirectory, real: Any = StudyDirectory.is_at_work) -> bool:
        assert next(looks, None) is not None, "waits for ever"
        return bool(real(store))

    monkeypatch.setattr(StudyDirectory, "is_at_work", look)
    with cells_bar(Console(quiet=True), store) as bar:
        _run_all(expander, results, "1/2", fake_study.work_of(), bar)
    assert cells_now(expander, results).num_waiting["main"] > 0


def test_shards_share_the_cells_out() -> None:
    cells = study_worker.cells(7)
    parts = [shard_of(cells, f"{index}/3") for index in (1, 2, 3)]
    assert sorted(cell.key for part in parts for cell in part) == [cell.key for cell in cells]
    assert [len(part) for part in parts] == [3, 2, 2]
    with pytest.raises(UserError, match="4/3"):
        shard_of(cells, "4/3")


def test_jobs_of_submitit_share_a_study(tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    command = [sys.executable, "-m", "tests.study_worker", str(tmp_path / "study"), "8", "0.05"]
    (tmp_path / "study").mkdir()
    jobs = submit_jobs(
        ["env", f"PYTHONPATH={ROOT}", *command], tmp_path / "study", 2, cluster="local", parameters={"timeout_min": 5}
    )
    for job in jobs:
        job.result()
    assert sorted(started(tmp_path / "study")) == [cell.key for cell in study_worker.cells(8)]


@pytest.mark.slow
def test_a_thousand_trivial_cells_take_under_a_minute(tmp_path: Path) -> None:
    began = time.perf_counter()
    process = start(tmp_path, 1000, 0.0)
    assert exit_code(process) == 0
    assert time.perf_counter() - began < 60
    assert values(StudyDirectory(tmp_path), 1000) == [index**2 for index in range(1000)]
