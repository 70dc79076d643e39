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

from qdora.cli import verb
from qdora.cli.verb import end_as_by_ctrl_c, explain
from qdora.errors import Interrupted, RunFailure, UserError
from qdora.files.run_directory import RunDirectory
from qdora.run.run import train_run
from qdora.run.run_page import run_facts
from qdora.train import checkpoint as writer
from qdora.train import interrupt
from qdora.train.evals import StepEvaluations
from tests import support
from tests.support import assert_same_run, in_batches, training_lines

STOPPING = [SIGINT, SIGTERM, SIGHUP]


@pytest.fixture(autouse=True)
def _heeded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A shell may have started the tests with some of them ignored, and shows their output on a terminal."""
    for module in (verb, interrupt):
        monkeypatch.setattr(module, "leave_closed_terminal", lambda number: None)
    handlers = {SIGINT: signal.default_int_handler, SIGTERM: signal.SIG_DFL, SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def send(*numbers: int) -> Callable[[], None]:
    return lambda: [os.kill(os.getpid(), number) for number in numbers] and None


def full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def in_step(patch: pytest.MonkeyPatch, step: int, action: Callable[[], None]) -> None:
    """Do something in the middle of a step: its only batch is computed, its update is not made."""
    in_batches(patch, lambda number, *_: action() if number == step else None)


def in_save(patch: pytest.MonkeyPatch, step: int, action: Callable[[], None]) -> None:
    """Do something in the middle of writing the checkpoint of `step`: the adapter is there, the rest is not."""
    real = writer.write_state

    def acting(directory: Path, **state: Any) -> None:
        if state["step"] == step:
            action()
        real(directory, **state)

    patch.setattr(writer, "write_state", acting)


def in_evaluation(patch: pytest.MonkeyPatch, step: int, action: Callable[[], None]) -> None:
    real = StepEvaluations.measure

    def acting(evaluations: StepEvaluations, at: int, label: str = "adapter") -> Any:
        if at == step:
            action()
        return real(evaluations, at, label)

    patch.setattr(StepEvaluations, "measure", acting)


@pytest.mark.parametrize(
    ("number", "step"), [(SIGINT, 3), (SIGTERM, 3), (SIGHUP, 3), (SIGTERM, 6)], ids=["INT", "TERM", "HUP", "last step"]
)
def test_a_signal_finishes_the_step_saves_and_gives_130(
    root: Path,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    number: signal.Signals,
    step: int,
) -> None:
    before = [signal.getsignal(each) for each in STOPPING]
    with monkeypatch.context() as patch:
        in_step(patch, step, send(number, SIGTERM))  # a launcher passes it on at once: still one request
        with pytest.raises(Interrupted, match=rf"stopped after step {step}; saved to .*step-{step}") as raised:
            train_run(support.tiny_recipe(root), tmp_path)
    assert explain(raised.value)[1] == 130
    assert "A second signal stops at once" in capfd.readouterr().err
    assert [signal.getsignal(each) for each in STOPPING] == before
    assert [line["step"] for line in training_lines(tmp_path)] == list(range(1, step + 1))
    train_run(support.tiny_recipe(root), tmp_path, resume=True)
    assert_same_run(tmp_path, whole)


def in_both(patch: pytest.MonkeyPatch) -> None:
    in_step(patch, 4, send(SIGTERM))
    in_save(patch, 4, send(SIGTERM))


@pytest.mark.parametrize(
    ("disturb", "error", "said", "checkpoints"),
    [
        (lambda p: in_save(p, 6, send(SIGTERM)), Interrupted, r"stopped after step 6; saved to .*step-6", [4, 6]),
        (lambda p: in_evaluation(p, 0, send(SIGINT)), Interrupted, "at once.*no checkpoint was written", []),
        (lambda p: in_evaluation(p, 6, send(SIGHUP)), Interrupted, r"at once.*Safe on disk: .*step-6", [4, 6]),
        (lambda p: in_step(p, 1, send(SIGINT, SIGINT)), Interrupted, "at once.*no checkpoint was written", []),
        (
            lambda p: in_step(p, 4, send(SIGINT, SIGINT)),
            Interrupted,
            r"at once\. Safe on disk: .*step-2 \(step 2\)",
            [2],
        ),
        (in_both, Interrupted, r"at once\. Safe on disk: .*step-2 \(step 2\)", [2]),
        (
            lambda p: in_save(p, 4, full),
            RunFailure,
            r"checkpoint of step 4 could not be written.*Safe on disk: .*step-2",
            [2],
        ),
    ],
    ids=["last save", "base", "last evaluation", "twice in step 1", "twice", "twice in a save", "full disk"],
)
def test_what_is_whole_is_kept_and_gone_on_with(
    root: Path,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    disturb: Callable[[pytest.MonkeyPatch], None],
    error: type[Exception],
    said: str,
    checkpoints: list[int],
) -> None:
    """An evaluation, which has no step to be finished, and a second signal end at once."""
    end_as_by_ctrl_c({})
    with monkeypatch.context() as patch:
        patch.setattr(interrupt, "SAME_REQUEST_SECONDS", 0.0)
        disturb(patch)
        with pytest.raises(error, match=said) as raised:
            train_run(support.tiny_recipe(root), tmp_path)
    assert (explain(raised.value)[1] == 130) == (error is Interrupted)
    names = os.listdir(tmp_path / "checkpoints") if (tmp_path / "checkpoints").exists() else []
    assert sorted(names) == [f"step-{step}" for step in checkpoints]
    assert not [line for line in RunDirectory(tmp_path).metrics() if "eval" in line and line["step"] == 6]
    assert (tmp_path / "report.html").is_file()
    train_run(support.tiny_recipe(root), tmp_path, resume=True)
    assert_same_run(tmp_path, whole)


def test_stopped_in_its_last_step_it_is_not_finished(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_run(support.tiny_recipe(root, train__steps=4), tmp_path)
    in_step(monkeypatch, 2, send(SIGTERM))
    with pytest.raises(Interrupted, match="stopped after step 6"):
        train_run(support.tiny_recipe(root, train__steps=6), tmp_path, resume=True)
    status = run_facts(RunDirectory(tmp_path))["status"]
    assert (status["state"], status["num_done"], status["adapter_step"]) == ("unfinished", 6, 4)


def test_signals_that_are_ignored_or_a_launchers_stay_so(monkeypatch: pytest.MonkeyPatch) -> None:
    signal.signal(SIGHUP, signal.SIG_IGN)
    end_as_by_ctrl_c({"WORLD_SIZE": "2"})
    assert [signal.getsignal(each) for each in (SIGTERM, SIGHUP)] == [signal.SIG_DFL, signal.SIG_IGN]
    end_as_by_ctrl_c({})
    assert signal.getsignal(SIGHUP) is signal.SIG_IGN
    with pytest.raises(KeyboardInterrupt):
        send(SIGTERM)()
    send(SIGTERM)()  # a launcher repeats it: the first one's clean-up goes on
    for ignored in (SIGHUP, SIGINT):  # as under nohup, and in the background
        for launched in (False, True):
            signal.signal(ignored, signal.SIG_IGN)
            if launched:
                monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a job")
            with interrupt.stop_on_signal() as stop:
                send(ignored)()
                assert stop.requested == launched
                send(SIGTERM)()
                assert stop.requested
            assert signal.getsignal(ignored) is signal.SIG_IGN
            monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)


def test_older_checkpoints_make_room(root: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for two checkpoints where three are asked for: the run goes on with those that fit."""
    folder = tmp_path / "checkpoints"

    def too_small() -> None:
        if len([each for each in folder.iterdir() if each.name.startswith("step-")]) == 2:
            full()

    in_save(monkeypatch, 6, too_small)
    train_run(support.tiny_recipe(root, train__keep_checkpoints=3), tmp_path)
    assert sorted(os.listdir(folder)) == ["step-4", "step-6"]
    assert "The disk is full: removed 1 older checkpoint to continue" in (tmp_path / "log.txt").read_text()
    assert_same_run(tmp_path, whole)


def test_a_full_disk_for_metrics_stops_the_run(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = RunDirectory.append_metrics

    def small(run: RunDirectory, values: Any) -> None:
        if values["step"] == 5:
            with run._disk_failures("metrics.jsonl"):
                full()
        real(run, values)

    monkeypatch.setattr(RunDirectory, "append_metrics", small)
    with pytest.raises(RunFailure, match=r"metrics.jsonl could not be written: the disk is full.*on disk: .*step-4"):
        train_run(support.tiny_recipe(root), tmp_path)
    assert os.listdir(tmp_path / "checkpoints") == ["step-4"]


def test_a_second_process_is_refused_and_a_damaged_checkpoint_skipped(
    root: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second --resume would remove the checkpoint that the first is writing, and write metrics of its own."""

    def second() -> None:
        before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
        assert (tmp_path / "checkpoints/.step-4.partial") in {file.parent.parent for file in before}
        for resume in (True, False):
            with pytest.raises(UserError, match="another process works on it"):
                train_run(support.tiny_recipe(root), tmp_path, resume=resume)
        assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before

    with monkeypatch.context() as patch:
        in_save(patch, 4, second)
        train_run(support.tiny_recipe(root), tmp_path)
    assert_same_run(tmp_path, whole)
    file = tmp_path / "checkpoints/step-6/optimizer.safetensors"
    os.truncate(file, file.stat().st_size // 2)
    train_run(support.tiny_recipe(root), tmp_path, resume=True)
    log = (tmp_path / "log.txt").read_text()
    assert "Skipped a damaged checkpoint: step-6: optimizer.safetensors has " in log
    assert "Continuing from" in log
    assert_same_run(tmp_path, whole)
