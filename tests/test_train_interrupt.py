"""Signals and full disks in whole runs: what is finished stays, what is half written goes, a resume is exact."""

from __future__ import annotations

import errno
import multiprocessing
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from signal import SIGHUP, SIGINT, SIGTERM
from typing import Any

import pytest

from qdora.cli import verb
from qdora.cli.verb import end_as_by_ctrl_c, explain
from qdora.errors import Interrupted, RunFailure, UserError
from qdora.files.run_directory import RunDirectory
from qdora.run import writer
from qdora.run.run_facts import run_facts
from qdora.run.step_evaluations import StepEvaluations
from qdora.run.train import train_run
from qdora.train import interrupt, passes
from tests import tiny_run
from tests.run_files import assert_same_run, trained

STOPPING = [SIGINT, SIGTERM, SIGHUP]


@pytest.fixture(autouse=True)
def heeded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A shell may have started the tests with some of them ignored, and shows their output on a terminal."""
    for module in (verb, interrupt):
        monkeypatch.setattr(module, "leave_closed_terminal", lambda number: None)
    handlers = {SIGINT: signal.default_int_handler, SIGTERM: signal.SIG_DFL, SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def in_step(monkeypatch: pytest.MonkeyPatch, step: int, action: Callable[[], None]) -> None:
    """Do something in the middle of a step: its batch is computed, its update is not made."""
    real, calls = passes.batch_loss, {"n": 0}

    def acting(*args: Any, **settings: Any) -> Any:
        result = real(*args, **settings)
        calls["n"] += 1  # the tiny run has one micro-batch a step
        if calls["n"] == step:
            action()
        return result

    monkeypatch.setattr(passes, "batch_loss", acting)


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
    in_step(monkeypatch, step, send(number, SIGTERM))  # a launcher passes it on at once: still one request
    with pytest.raises(Interrupted, match=rf"stopped after step {step}; saved to .*step-{step}") as raised:
        train_run(tiny_run.recipe(root), tmp_path / "run")
    assert explain(raised.value)[1] == 130
    assert "A second signal stops at once" in capfd.readouterr().err
    assert [signal.getsignal(each) for each in STOPPING] == before
    assert [line["step"] for line in trained(tmp_path / "run")] == list(range(1, step + 1))
    monkeypatch.undo()
    train_run(tiny_run.recipe(root), tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", whole)


def test_a_signal_in_the_last_checkpoint_stops_before_the_last_evaluation(
    root: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_save(monkeypatch, 6, send(SIGTERM))
    with pytest.raises(Interrupted, match=r"stopped after step 6; saved to .*step-6"):
        train_run(tiny_run.recipe(root), tmp_path / "run")
    assert not [line for line in RunDirectory(tmp_path / "run").metrics() if "eval" in line and line["step"] == 6]
    monkeypatch.undo()
    train_run(tiny_run.recipe(root), tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", whole)


def test_an_extended_run_that_is_stopped_in_its_last_step_is_not_finished(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_run(tiny_run.recipe(root, train__steps=4), tmp_path / "run")
    in_step(monkeypatch, 2, send(SIGTERM))
    with pytest.raises(Interrupted, match="stopped after step 6"):
        train_run(tiny_run.recipe(root, train__steps=6), tmp_path / "run", resume=True)
    status = run_facts(RunDirectory(tmp_path / "run"))["status"]
    assert (status["state"], status["num_done"], status["adapter_step"]) == ("unfinished", 6, 4)


@pytest.mark.parametrize("number", STOPPING, ids=lambda number: number.name)
@pytest.mark.parametrize(("step", "safe"), [(0, "no checkpoint was written"), (6, r"Safe on disk: .*step-6")])
def test_a_signal_in_the_first_or_last_evaluation_leaves_the_page(
    root: Path,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    step: int,
    safe: str,
) -> None:
    """There is no step to be finished then, so it ends at once."""
    real = StepEvaluations.measure

    def measure(evaluations: StepEvaluations, at: int, label: str = "adapter") -> Any:
        if at == step:
            send(number)()
        return real(evaluations, at, label)

    monkeypatch.setattr(StepEvaluations, "measure", measure)
    end_as_by_ctrl_c({})
    with pytest.raises(Interrupted, match=f"stopped at once.*{safe}"):
        train_run(tiny_run.recipe(root), tmp_path / "run")
    assert (tmp_path / "run/report.html").is_file()
    monkeypatch.undo()
    train_run(tiny_run.recipe(root), tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", whole)


def test_signals_that_are_ignored_or_a_launchers_stay_so() -> None:
    signal.signal(SIGHUP, signal.SIG_IGN)
    end_as_by_ctrl_c({"WORLD_SIZE": "2"})
    assert [signal.getsignal(each) for each in (SIGTERM, SIGHUP)] == [signal.SIG_DFL, signal.SIG_IGN]
    end_as_by_ctrl_c({})
    assert signal.getsignal(SIGHUP) is signal.SIG_IGN
    with pytest.raises(KeyboardInterrupt):
        send(SIGTERM)()
    send(SIGTERM)()  # a launcher repeats it: the first one's clean-up goes on


@pytest.mark.parametrize(
    "setting",
    [pytest.param("end_as_by_ctrl_c({})", marks=pytest.mark.slow), "stop = stack.enter_context(stop_on_signal())"],
)
def test_a_closed_terminal_does_not_hide_the_end(tmp_path: Path, setting: str) -> None:
    """Each write to it would fail with an error of its own."""
    code = f"""
import contextlib, sys, time
from qdora.cli import verb
from qdora.cli.verb import end_as_by_ctrl_c
from qdora.train.interrupt import stop_on_signal
with contextlib.ExitStack() as stack, contextlib.suppress(KeyboardInterrupt):
    {setting}
    print("handlers stand", flush=True)
    while not stack._exit_callbacks or not stop.requested:
        time.sleep(0.05)
    time.sleep(0.5)  # the kernel may send one, too
print("told", flush=True)
print("told", file=sys.stderr, flush=True)
sys.exit(7)
"""
    terminal, end = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", code], stdout=end, stderr=end, start_new_session=True)
    os.close(end)
    shown = b""
    while b"handlers stand" not in shown:
        shown += os.read(terminal, 100)
    os.close(terminal)
    process.send_signal(SIGHUP)
    assert process.wait(50) == 7


def test_a_forked_worker_is_ended_by_sigterm_without_a_word(capfd: pytest.CaptureFixture[str]) -> None:
    end_as_by_ctrl_c({})
    context = multiprocessing.get_context("fork")
    running = context.Event()
    worker = context.Process(target=lambda: (running.set(), time.sleep(60)))
    worker.start()
    assert running.wait(30)
    worker.terminate()
    worker.join()
    assert worker.exitcode == -SIGTERM
    assert capfd.readouterr().err == ""


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
    assert "The disk is full: removed 1 older checkpoint to continue" in (tmp_path / "run/log.txt").read_text()
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
