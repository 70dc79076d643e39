"""How runs end: at the best step, by a signal, on a full disk; what is finished stays, and a resume is exact."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from signal import SIGHUP, SIGINT, SIGTERM
from typing import Any

import pytest
from rich.console import Console

from qdora.cli.app import end_as_by_ctrl_c, explain
from qdora.errors import Interrupted, RunFailure, UserError
from qdora.export.export import export_run
from qdora.files.run_directory import RunDirectory
from qdora.recipe.options import ExportOptions
from qdora.recipe.section import with_settings
from qdora.recipe.settings import Recipe
from qdora.run.run import train_run
from qdora.run.verbs import evaluate_target
from qdora.train import distributed as interrupt
from qdora.train.evals import StepEvaluations
from qdora.train.trainer import Trainer
from tests import support
from tests.support import ADAPTER, assert_same_run, in_batches, same_tensors, timeless, train_until, training_lines

# A rate at which the loss falls, turns and rises again within a few steps
DIVERGING: dict[str, Any] = {"train__lr": 0.03, "train__schedule": "constant", "train__warmup": 0}
RISING: dict[str, Any] = {"train__lr": 1e-3, "eval__patience": ...}


STEPS, PATIENCE = 12, 3
QUIET = Console(quiet=True)


def recipe(root: Path, **changes: Any) -> Recipe:
    """An evaluation after every step, and checkpoints that do not fall together with the best of them."""
    best = {"eval__every": 1, "eval__best_by": "macro", "eval__patience": PATIENCE}
    more = {"train__steps": STEPS, "train__checkpoint_every": 5, "train__keep_checkpoints": 1, "train__log_every": 5}
    return support.tiny_recipe(root, **(DIVERGING | best | more | changes))


def values(run: Path, task: str | None = None) -> dict[int, float]:
    """Step -> NLL per token of its evaluation file, but for the base."""
    found = {}
    for file in (run / "eval").glob("step-*.json"):
        document = json.loads(file.read_text())
        numbers = document["tasks"][task] if task else document["average"]
        found[int(file.stem.removeprefix("step-"))] = numbers["nll_per_token"]
    return {step: value for step, value in sorted(found.items()) if step > 0}


def steps_on_disk(run: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*"))


def assert_same_choice(run: Path, other: Path, step: int) -> None:
    assert_same_run(run, other, step=step)
    assert (run / "adapter/best.json").read_bytes() == (other / "adapter/best.json").read_bytes()


@pytest.fixture(scope="module")
def stopped(root: Path) -> dict[str, Any]:
    """The summary of a run that got worse and stopped early; nothing disturbed it."""
    return train_run(recipe(root), root / "stopped", console=QUIET)


@pytest.fixture(scope="module")
def stopped_run(stopped: dict[str, Any]) -> Path:
    return Path(stopped["run"])


@pytest.fixture(scope="module")
def best(stopped_run: Path) -> int:
    """Its best step."""
    found = values(stopped_run)
    return min(found, key=lambda step: found[step])


def test_the_best_step_is_kept_and_the_run_stops(
    stopped: dict[str, Any], stopped_run: Path, best: int, tmp_path: Path
) -> None:
    found, last = values(stopped_run), best + PATIENCE
    assert best > 1, "nothing improved: the run shows nothing"
    assert list(found) == list(range(1, last + 1)), "the run went on, or stopped too soon"
    assert last < STEPS
    assert steps_on_disk(stopped_run) == [best, last]
    same_tensors(stopped_run / ADAPTER, stopped_run / f"checkpoints/step-{best}" / ADAPTER)
    assert (stopped["stopped_early"], stopped["num_steps"]) == (True, last)
    assert (stopped["best"]["step"], stopped["best"]["value"]) == (best, found[best])
    assert stopped["evaluations"]["adapter"]["average"]["nll_per_token"] == found[best]
    # The loss of each step with an evaluation is there, whatever steps train.log_every leaves out
    losses = {line["step"]: line["loss"] for line in training_lines(stopped_run)}
    assert list(losses) == list(found)
    assert stopped["final_loss"] == losses[last]
    lines = [line for line in timeless(stopped_run) if "best" in line]
    assert [line["best"]["num_since"] for line in lines][-PATIENCE:] == [1, 2, 3]
    assert all(line["best"]["value"] == min(list(found.values())[: line["step"]]) for line in lines)
    log, card = ((stopped_run / name).read_text() for name in ("log.txt", "README.md"))
    assert f"Stopped early after step {last} of {STEPS}" in log
    assert f"step {best}, the best by macro nll_per_token ({found[best]:.4g}) of {last} steps, stopped early" in card
    # eval and export take the best step
    document = evaluate_target(str(stopped_run), console=QUIET)
    assert document["evaluation"]["average"]["nll_per_token"] == found[best]
    export_run(stopped_run, tmp_path / "peft", ExportOptions(format="peft"), console=QUIET)
    same_tensors(tmp_path / "peft/adapter_model.safetensors", stopped_run / ADAPTER)


def killed_in_checkpoint(settings: Recipe, run: Path, step: int) -> None:
    """SIGKILL while the checkpoint of a step is being written."""
    real = Trainer._write_state

    def killing(trainer: Trainer, *args: Any) -> None:
        real(trainer, *args)
        if trainer.step == step:
            os.kill(os.getpid(), signal.SIGKILL)

    Trainer._write_state = killing  # type: ignore[method-assign]
    train_run(settings, run, resume=run.exists(), console=QUIET)


def test_killed_and_resumed_decides_alike(root: Path, stopped_run: Path, best: int, tmp_path: Path) -> None:
    """At one that is the best so far, at one that is due, and at the one that ends the run."""
    settings, run = recipe(root), tmp_path / "run"
    for step in (2, best, best + PATIENCE):
        child = multiprocessing.get_context("fork").Process(target=killed_in_checkpoint, args=(settings, run, step))
        child.start()
        child.join(240)
        assert child.exitcode == -signal.SIGKILL
        assert step not in steps_on_disk(run)
    train_run(settings, run, resume=True, console=QUIET)
    assert_same_choice(run, stopped_run, best + PATIENCE)
    assert steps_on_disk(run) == steps_on_disk(stopped_run)


def test_a_stop_saves_before_what_is_due_and_the_resumed_run_measures_it(root: Path, tmp_path: Path) -> None:
    """A launcher kills processes soon after it asks them to stop; an evaluation may take longer."""
    settings, run = recipe(root, train__steps=3), tmp_path / "run"
    train_run(settings, tmp_path / "whole", console=QUIET)
    train_until(settings, run, 2)
    assert steps_on_disk(run)[-1] == 2
    assert list(values(run)) == [1]
    train_run(settings, run, resume=True, console=QUIET)
    assert_same_choice(run, tmp_path / "whole", 3)


def test_a_finished_run_goes_on_with_more_patience(root: Path, stopped_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(stopped_run, run)
    again = train_run(recipe(root), run, resume=True, console=QUIET)
    assert_same_run(run, stopped_run, step=again["num_steps"])
    more = train_run(recipe(root, eval__patience=None), run, resume=True, console=QUIET)
    assert (again["stopped_early"], more["stopped_early"], more["num_steps"]) == (True, False, STEPS)
    assert more["best"]["value"] == min(values(run).values())


def test_extended_at_its_best_step_it_chooses_alike(root: Path, stopped_run: Path, best: int, tmp_path: Path) -> None:
    """The evaluation after its last step, which followed the checkpoint, is compared with those that come."""
    train_run(recipe(root, train__steps=best), tmp_path, console=QUIET)
    train_run(recipe(root), tmp_path, resume=True, console=QUIET)
    assert_same_choice(tmp_path, stopped_run, best + PATIENCE)
    assert steps_on_disk(tmp_path) == steps_on_disk(stopped_run) == [best, best + PATIENCE]


def test_the_last_step_has_a_say_and_a_best_one_that_is_gone_is_said(root: Path, tmp_path: Path) -> None:
    """At a low rate every evaluation is better than the one before, the one after training too."""
    settings = recipe(root, **RISING, train__steps=3, eval__best_by="letters", eval__every=2)
    summary = train_run(settings, tmp_path, console=QUIET)
    found = values(tmp_path, "letters")
    assert list(found) == [2, 3]
    assert found[3] < found[2]
    assert (summary["best"]["step"], summary["stopped_early"]) == (3, False)
    assert summary["best"]["question"]["tasks"] == ["letters"]
    same_tensors(tmp_path / ADAPTER, tmp_path / f"checkpoints/step-3/{ADAPTER}")
    (tmp_path / "checkpoints/step-2" / ADAPTER).write_bytes(b"")
    summary = train_run(settings, tmp_path, resume=True, console=QUIET)
    assert summary["best"]["step"] == 3
    assert "The best checkpoint, step-2, is not whole" in (tmp_path / "log.txt").read_text()


def test_other_validation_examples_choose_anew(tmp_path: Path) -> None:
    """The sums are right in the first file and wrong in the second, so values of the two cannot be compared."""
    held, run = tmp_path / "held.jsonl", tmp_path / "run"

    def asked(word: str) -> Recipe:
        rows = [{"prompt": f"{n} + 3 =", "completion": f" {word or n + 3}"} for n in range(6)]
        held.write_text("".join(json.dumps(row) + "\n" for row in rows))
        plain = recipe(tmp_path, **RISING, train__steps=4, eval__best_by="sums")
        first, *others = plain.data.mix
        return with_settings(plain, data={"mix": (first.model_copy(update={"validation": str(held)}), *others)})

    train_until(asked(""), run, 2)
    summary = train_run(asked("zebra"), run, resume=True, console=QUIET)
    assert "The run chose the best step in another way before, or by other examples" in (run / "log.txt").read_text()
    found = values(run, "sums")  # a stop comes before its step's evaluation, which is made again
    del found[1]
    assert list(found) == [2, 3, 4]
    assert summary["best"]["step"] == min(found, key=lambda step: found[step])
    assert summary["best"]["value"] == min(found.values())


def test_two_processes_decide_alike(root: Path, tmp_path: Path) -> None:
    settings = recipe(root, adapter__dropout=0.0)
    assert support.run_processes(2, lambda _rank: train_run(settings, tmp_path, console=QUIET)) == ["", ""]
    found = values(tmp_path)
    best = min(found, key=lambda step: found[step])
    assert steps_on_disk(tmp_path) == [best, best + PATIENCE]
    assert json.loads((tmp_path / "adapter/best.json").read_text())["step"] == best


def test_what_would_choose_nothing_is_refused(root: Path, tmp_path: Path) -> None:
    """What only the data show."""
    for changes, words in (
        ({"eval__best_by": "sums", "eval__tasks": ["letters"]}, "eval.best_by: .*got 'sums'"),
        ({"eval__best_by": "sums", "eval__best_metric": "acc"}, "eval.best_metric: got acc, must be nll_per_token"),
        ({"eval__every": STEPS}, "eval.every: got 12, must be less than the run's 12 steps"),
    ):
        with pytest.raises(UserError, match=words):
            train_run(recipe(root, **changes), tmp_path / "run", console=QUIET)
        assert not (tmp_path / "run").exists()


@pytest.fixture(autouse=True)
def _heeded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A shell may have started the tests with some of them ignored, and shows their output on a terminal."""
    for module in (sys.modules["qdora.cli.app"], interrupt):
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
    real = Trainer._write_state

    def acting(trainer: Trainer, *args: Any) -> None:
        if trainer.step == step:
            action()
        real(trainer, *args)

    patch.setattr(Trainer, "_write_state", acting)


def in_evaluation(patch: pytest.MonkeyPatch, step: int, action: Callable[[], None]) -> None:
    real = StepEvaluations.measure

    def acting(evaluations: StepEvaluations, at: int, label: str = "adapter") -> Any:
        if at == step:
            action()
        return real(evaluations, at, label)

    patch.setattr(StepEvaluations, "measure", acting)


DISTURBED: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], type[Exception], str, list[int]]] = {
    "a step": (lambda p: in_step(p, 3, send(SIGINT)), Interrupted, r"stopped after step 3; saved to .*step-3", [2, 3]),
    "last step": (lambda p: in_step(p, 6, send(SIGTERM)), Interrupted, r"after step 6; saved to .*step-6", [4, 6]),
    "last save": (lambda p: in_save(p, 6, send(SIGTERM)), Interrupted, r"after step 6; saved to .*step-6", [4, 6]),
    "base": (lambda p: in_evaluation(p, 0, send(SIGINT)), Interrupted, "at once.*no checkpoint was written", []),
    "evaluation": (lambda p: in_evaluation(p, 6, send(SIGHUP)), Interrupted, r"at once.*on disk: .*step-6", [4, 6]),
    "twice": (lambda p: in_step(p, 4, send(SIGINT, SIGINT)), Interrupted, r"at once.*disk: .*step-2 \(step 2\)", [2]),
    "full disk": (lambda p: in_save(p, 4, full), RunFailure, r"the disk is full.*on disk: .*step-2", [2]),
}


@pytest.mark.parametrize("case", DISTURBED)
def test_what_is_whole_is_kept_and_gone_on_with(root: Path, whole: Path, tmp_path: Path, case: str) -> None:
    """A step is finished and saved; an evaluation, which has none to be finished, and a second signal end at once."""
    disturb, error, said, checkpoints = DISTURBED[case]
    end_as_by_ctrl_c()
    with pytest.MonkeyPatch.context() as patch:
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


def test_signals_that_are_ignored_or_a_launchers_stay_so(monkeypatch: pytest.MonkeyPatch) -> None:
    signal.signal(SIGHUP, signal.SIG_IGN)
    monkeypatch.setenv("WORLD_SIZE", "2")
    end_as_by_ctrl_c()
    monkeypatch.delenv("WORLD_SIZE")
    assert [signal.getsignal(each) for each in (SIGTERM, SIGHUP)] == [signal.SIG_DFL, signal.SIG_IGN]
    end_as_by_ctrl_c()
    assert signal.getsignal(SIGHUP) is signal.SIG_IGN
    before = [signal.getsignal(each) for each in (SIGINT, SIGTERM)]
    with interrupt.stop_on_signal() as stop:
        send(SIGINT, SIGTERM)()  # a launcher passes it on at once: still one request
        assert stop.requested
    assert [signal.getsignal(each) for each in (SIGINT, SIGTERM)] == before
    with pytest.raises(KeyboardInterrupt):
        send(SIGTERM)()
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
