"""Signals and full disks in whole runs: what is finished stays, what is half written goes, a resume is exact."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from signal import SIGHUP, SIGINT, SIGTERM
from typing import Any

import pytest

from qdora.cli.verb import explain
from qdora.errors import Interrupted, RunFailure, UserError
from qdora.files.run_directory import RunDirectory
from qdora.run import writer
from qdora.run.train import train_run
from qdora.train import interrupt, loop
from tests import tiny_run
from tests.run_files import assert_same_run, trained

STOPPING = [SIGINT, SIGTERM, SIGHUP]


@pytest.fixture(autouse=True)
def heeded() -> Iterator[None]:
    """A shell may have started the tests with some of them ignored."""
    handlers = {SIGINT: signal.default_int_handler, SIGTERM: signal.SIG_DFL, SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def in_step(monkeypatch: pytest.MonkeyPatch, step: int, action: Callable[[], None]) -> None:
    """Do something in the middle of a step: its batch is computed, its update is not made."""
    real, calls = loop.batch_loss, {"n": 0}

    def acting(*args: Any, **settings: Any) -> Any:
        result = real(*args, **settings)
        calls["n"] += 1  # the tiny run has one micro-batch a step
        if calls["n"] == step:
            action()
        return result

    monkeypatch.setattr(loop, "batch_loss", acting)


def send(*numbers: int) -> Callable[[], None]:
    return lambda: [os.kill(os.getpid(), number) for number in numbers] and None


def in_save(monkeypatch: pytest.MonkeyPatch, step: int, action: Callable[[], None]) -> None:
    """Do something in the middle of writing the checkpoint of `step`: the adapter is there, the rest is not."""
    real = writer.write_state

    def acting(directory: Path, **state: Any) -> None:
        if state["step"] == step:
            action()
        real(directory, **state)

    monkeypatch.setattr(writer, "write_state", acting)


@pytest.mark.parametrize("number", STOPPING, ids=lambda number: number.name)
def test_a_signal_finishes_the_step_saves_and_gives_130(
    root: Path,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    number: signal.Signals,
) -> None:
    before = [signal.getsignal(each) for each in STOPPING]
    in_step(monkeypatch, 3, send(number, SIGTERM))  # a launcher passes it on at once: still one request
    with pytest.raises(Interrupted, match=r"stopped after step 3; saved to .*step-3") as raised:
        train_run(tiny_run.recipe(root), tmp_path / "run")
    assert explain(raised.value)[1] == 130
    assert "A second signal stops at once" in capfd.readouterr().err
    assert [signal.getsignal(each) for each in STOPPING] == before
    assert [line["step"] for line in trained(tmp_path / "run")] == [1, 2, 3]
    monkeypatch.undo()
    train_run(tiny_run.recipe(root), tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.parametrize("ignored", [SIGHUP, SIGINT], ids=["nohup", "background"])
@pytest.mark.parametrize("launched", [False, True])
def test_an_ignored_signal_stays_ignored_except_under_torchrun(
    monkeypatch: pytest.MonkeyPatch, ignored: signal.Signals, launched: bool
) -> None:
    signal.signal(ignored, signal.SIG_IGN)
    if launched:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a job")
    with interrupt.stop_on_signal() as stop:
        send(ignored)()
        assert stop.requested == launched
        send(SIGTERM)()
        assert stop.requested
    assert signal.getsignal(ignored) is signal.SIG_IGN


@pytest.mark.parametrize("saving", [False, True], ids=["in a step", "in a checkpoint"])
def test_a_second_signal_stops_at_once_and_harms_nothing(
    root: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saving: bool
) -> None:
    monkeypatch.setattr(interrupt, "SAME_REQUEST_SECONDS", 0.0)
    if saving:
        in_step(monkeypatch, 4, send(SIGTERM))
        in_save(monkeypatch, 4, send(SIGTERM))
    else:
        in_step(monkeypatch, 4, send(SIGINT, SIGINT))
    with pytest.raises(Interrupted, match=r"stopped at once\. Safe on disk: .*step-2 \(step 2\)") as raised:
        train_run(tiny_run.recipe(root), tmp_path / "run")
    assert explain(raised.value)[1] == 130
    assert os.listdir(tmp_path / "run/checkpoints") == ["step-2"]
    monkeypatch.undo()
    train_run(tiny_run.recipe(root), tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", whole)


def test_stopped_at_once_before_the_first_checkpoint(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interrupt, "SAME_REQUEST_SECONDS", 0.0)
    in_step(monkeypatch, 1, send(SIGINT, SIGINT))
    with pytest.raises(Interrupted, match="no checkpoint was written yet"):
        train_run(tiny_run.recipe(root), tmp_path / "run")


def full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_names_the_last_checkpoint_and_loses_nothing(
    root: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_save(monkeypatch, 4, full)
    with pytest.raises(RunFailure, match=r"checkpoint of step 4 could not be written.*Safe on disk: .*step-2"):
        train_run(tiny_run.recipe(root), tmp_path / "run")
    assert os.listdir(tmp_path / "run/checkpoints") == ["step-2"]
    monkeypatch.undo()
    train_run(tiny_run.recipe(root), tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", whole)


def test_older_checkpoints_make_room_on_a_full_disk(
    root: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Room for two checkpoints where three are asked for: the run goes on with those that fit."""
    folder = tmp_path / "run/checkpoints"

    def too_small() -> None:
        if len([each for each in folder.iterdir() if each.name.startswith("step-")]) == 2:
            full()

    in_save(monkeypatch, 6, too_small)
    train_run(tiny_run.recipe(root, train__keep_checkpoints=3), tmp_path / "run")
    assert sorted(os.listdir(folder)) == ["step-4", "step-6"]
    assert "The disk is full: removed 1 older checkpoints to continue" in (tmp_path / "run/log.txt").read_text()
    assert_same_run(tmp_path / "run", whole)


def test_a_full_disk_for_metrics_takes_the_older_checkpoints_and_then_stops(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = RunDirectory.append_metrics

    def small(run: RunDirectory, values: Any) -> None:
        if values["step"] == 5:
            with run._disk_failures("metrics.jsonl"):
                full()
        real(run, values)

    monkeypatch.setattr(RunDirectory, "append_metrics", small)
    with pytest.raises(
        RunFailure, match=r"metrics.jsonl could not be written: the disk is full.*Safe on disk: .*step-4"
    ):
        train_run(tiny_run.recipe(root), tmp_path / "run")
    assert os.listdir(tmp_path / "run/checkpoints") == ["step-4"]


def test_a_second_process_is_refused_and_changes_nothing(
    root: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second --resume would remove the checkpoint that the first is writing, and write metrics of its own."""
    run = tmp_path / "run"

    def second() -> None:
        before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
        assert (run / "checkpoints/.step-4.partial") in {file.parent.parent for file in before}
        for resume in (True, False):
            with pytest.raises(UserError, match=rf"run: another process works on it \(process {os.getpid()} on"):
                train_run(tiny_run.recipe(root), run, resume=resume)
        assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before

    in_save(monkeypatch, 4, second)
    train_run(tiny_run.recipe(root), run)
    assert_same_run(run, whole)


def test_resume_says_which_checkpoint_it_skips(root: Path, whole: Path, tmp_path: Path) -> None:
    train_run(tiny_run.recipe(root), tmp_path / "run")
    file = tmp_path / "run/checkpoints/step-6/optimizer.safetensors"
    os.truncate(file, file.stat().st_size // 2)
    train_run(tiny_run.recipe(root), tmp_path / "run", resume=True)
    log = (tmp_path / "run/log.txt").read_text()
    assert "Skipped a damaged checkpoint: step-6: optimizer.safetensors has " in log
    assert "Continuing from" in log
    assert_same_run(tmp_path / "run", whole)
