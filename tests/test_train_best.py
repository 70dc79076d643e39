"""The best step of a run: kept, taken for adapter/, the same after a kill; and the end of a run that gets no better."""

from __future__ import annotations

import json
import multiprocessing
import os
import shlex
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from qdora.cli import app
from qdora.errors import UserError
from qdora.export.export_run import export_run
from qdora.export.options import ExportOptions
from qdora.recipe.section import with_settings
from qdora.recipe.settings import Recipe
from qdora.run.evaluate import evaluate_target
from qdora.run.run import train_run
from qdora.run.run_page import page_of_run
from qdora.train import checkpoint as writer
from qdora.train.evals import selection_faults
from tests import support
from tests.support import ADAPTER, assert_same_run, same_tensors, timeless, train_until

# A rate at which the loss falls, turns and rises again within a few steps
DIVERGING: dict[str, Any] = {"train__lr": 0.03, "train__schedule": "constant", "train__warmup": 0}
RISING: dict[str, Any] = {"train__lr": 1e-3, "eval__patience": ...}
PROBED = {"interference__every": 1, "interference__examples": 2, "data__validation_fraction": 0.2}
STEPS, PATIENCE = 12, 3
QUIET = Console(quiet=True)


def recipe(root: Path, **changes: Any) -> Recipe:
    """An evaluation after every step, and checkpoints that do not fall together with the best of them."""
    best = {"eval__every": 1, "eval__best_by": "macro", "eval__patience": PATIENCE}
    more = {"train__steps": STEPS, "train__checkpoint_every": 5, "train__keep_checkpoints": 1}
    return support.tiny_recipe(root, **(DIVERGING | best | more | changes))


def values(run: Path, task: str | None = None, metric: str = "nll_per_token", after: int = 0) -> dict[int, float]:
    """Step -> the metric of its evaluation file, of the steps after one."""
    found = {}
    for file in (run / "eval").glob("step-*.json"):
        document = json.loads(file.read_text())
        found[int(file.stem.removeprefix("step-"))] = (document["tasks"][task] if task else document["average"])[metric]
    return {step: value for step, value in sorted(found.items()) if step > after}


def steps_on_disk(run: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*"))


def assert_same_choice(run: Path, other: Path, step: int) -> None:
    assert_same_run(run, other, step=step)
    assert (run / "adapter/best.json").read_bytes() == (other / "adapter/best.json").read_bytes()


@pytest.fixture(scope="module")
def stopped_run(root: Path) -> Path:
    """A run that got worse and stopped early; nothing disturbed it."""
    summary = train_run(recipe(root), root / "stopped", console=QUIET)
    (root / "summary.json").write_text(json.dumps(summary))
    return root / "stopped"


@pytest.fixture(scope="module")
def best(stopped_run: Path) -> int:
    """Its best step."""
    found = values(stopped_run)
    return min(found, key=lambda step: found[step])


def test_the_best_step_is_kept_and_the_run_stops(root: Path, stopped_run: Path, best: int, tmp_path: Path) -> None:
    found, last = values(stopped_run), best + PATIENCE
    assert best > 1, "nothing improved: the run shows nothing"
    assert list(found) == list(range(1, last + 1)), "the run went on, or stopped too soon"
    assert last < STEPS
    assert steps_on_disk(stopped_run) == [best, last]
    same_tensors(stopped_run / ADAPTER, stopped_run / f"checkpoints/step-{best}" / ADAPTER)
    summary = json.loads((root / "summary.json").read_text())
    assert (summary["stopped_early"], summary["num_steps"]) == (True, last)
    assert (summary["best"]["step"], summary["best"]["value"]) == (best, found[best])
    assert summary["evaluations"]["adapter"]["average"]["nll_per_token"] == found[best]
    lines = [line for line in timeless(stopped_run) if "best" in line]
    assert [line["best"]["num_since"] for line in lines][-PATIENCE:] == [1, 2, 3]
    assert all(line["best"]["value"] == min(list(found.values())[: line["step"]]) for line in lines)
    said = f"step {best}, the best by macro nll_per_token ({found[best]:.4g})"
    log = (stopped_run / "log.txt").read_text()
    assert f"Stopped early after step {last} of {STEPS}: the last {PATIENCE} evaluations were not better" in log
    assert f"adapter/ is {said}." in log
    card = (stopped_run / "README.md").read_text()
    assert f"{said} of {last} steps, stopped early" in card
    assert f"| steps | {best} of {STEPS} |" in card
    # eval and export take the best step
    document = evaluate_target(str(stopped_run), console=QUIET)
    assert document["evaluation"]["average"]["nll_per_token"] == found[best]
    export_run(stopped_run, tmp_path / "peft", ExportOptions(format_="peft"), console=QUIET)
    same_tensors(tmp_path / "peft/adapter_model.safetensors", stopped_run / ADAPTER)


def test_the_last_loss_of_a_run_that_stops_early(root: Path, tmp_path: Path) -> None:
    """The loss of the last step, whatever steps `train.log_every` leaves out."""
    summary = train_run(recipe(root, train__log_every=5, eval__every=2, eval__patience=1), tmp_path)
    assert summary["stopped_early"]
    assert summary["num_steps"] % 5 != 0
    lines = {line["step"]: line["loss"] for line in timeless(tmp_path) if "loss" in line}
    assert summary["final_loss"] == lines[summary["num_steps"]]


def killed_in_checkpoint(settings: Recipe, run: Path, step: int) -> None:
    """SIGKILL while the checkpoint of a step is being written."""
    real = writer.write_state

    def killing(directory: Path, **state: Any) -> None:
        real(directory, **state)
        if state["step"] == step:
            os.kill(os.getpid(), signal.SIGKILL)

    writer.write_state = killing
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
    settings, run = recipe(root, train__steps=3, **PROBED), tmp_path / "run"
    train_run(settings, tmp_path / "whole", console=QUIET)
    train_until(settings, run, 2)
    assert steps_on_disk(run)[-1] == 2
    assert list(values(run)) == [1]
    assert [line["step"] for line in timeless(run) if "interference" in line] == [1]
    train_run(settings, run, resume=True, console=QUIET)
    assert_same_choice(run, tmp_path / "whole", 3)


def test_a_measurement_that_fails_does_not_end_each_resumed_run(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("no gradient")

    monkeypatch.setattr("qdora.train.trainer.measure", fails)
    settings = recipe(root, train__steps=3, **PROBED | {"interference__every": 2})
    with pytest.raises(RuntimeError, match="no gradient"):
        train_run(settings, tmp_path, console=QUIET)
    assert steps_on_disk(tmp_path)[-1] == 2
    assert train_run(settings, tmp_path, resume=True, console=QUIET)["num_steps"] == 3
    assert "Step 2 cannot be measured; the run goes on: no gradient" in caplog.text


def test_a_finished_run_goes_on_with_more_patience(root: Path, stopped_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(stopped_run, run)
    again = train_run(recipe(root), run, resume=True, console=QUIET)
    assert again["stopped_early"]
    assert_same_run(run, stopped_run, step=again["num_steps"])
    # The page proposes the command that trains on
    commands = [each["command"] for each in page_of_run(run, console=QUIET)["next"]]
    (words,) = [shlex.split(command) for command in commands if "--resume" in command]
    assert words[-2:] == ["-s", "eval.patience=null"]
    found = CliRunner().invoke(app, ["--quiet", *words[1:], "--json"])
    assert found.exit_code == 0, found.output
    more = json.loads(found.stdout)
    assert (more["num_steps"], more["stopped_early"]) == (STEPS, False)
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


@pytest.mark.parametrize("changed", ["metric", "examples"])
def test_another_question_or_other_validation_examples_choose_anew(tmp_path: Path, changed: str) -> None:
    """The sums are right in the first file and wrong in the second, so values of the two cannot be compared."""
    held, run = tmp_path / "held.jsonl", tmp_path / "run"

    def asked(word: str, **changes: Any) -> Recipe:
        rows = [{"prompt": f"{n} + 3 =", "completion": f" {word or n + 3}"} for n in range(6)]
        held.write_text("".join(json.dumps(row) + "\n" for row in rows))
        plain = recipe(tmp_path, **RISING, train__steps=4, **changes)
        first, *others = plain.data.mix
        return with_settings(plain, data={"mix": (first.model_copy(update={"validation": str(held)}), *others)})

    if changed == "metric":
        before, then, lowest = asked(""), asked("", eval__best_metric="acc"), -1
    else:
        before = asked("", eval__best_by="sums")
    train_until(before, run, 2)
    if changed == "examples":
        then, lowest = asked("zebra", eval__best_by="sums"), 1
    summary = train_run(then, run, resume=True, console=QUIET)
    assert "The run chose the best step in another way before, or by other examples" in (run / "log.txt").read_text()
    # A stop comes before its step's evaluation, which is made again
    found = values(run, "sums", after=1) if lowest > 0 else values(run, metric="acc", after=1)
    assert list(found) == [2, 3, 4]
    assert summary["best"]["step"] == min(found, key=lambda step: lowest * found[step])
    assert summary["best"]["value"] == min(found.values(), key=lambda value: lowest * value)


def in_two(rank: int, settings: Recipe, directory: Path) -> None:
    summary = train_run(settings, directory, console=QUIET)
    assert rank == 1 or summary["stopped_early"]


def test_two_processes_decide_alike(root: Path, tmp_path: Path) -> None:
    settings = recipe(root, adapter__dropout=0.0)
    assert support.run_processes(2, in_two, settings, tmp_path / "two") == ["", ""]
    found = values(tmp_path / "two")
    best = min(found, key=lambda step: found[step])
    assert steps_on_disk(tmp_path / "two") == [best, best + PATIENCE]
    assert json.loads((tmp_path / "two/adapter/best.json").read_text())["step"] == best


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"eval__best_by": "lettres"}, "eval.best_by: .*got 'lettres'.*Did you mean 'letters'"),
        ({"eval__best_by": "sums", "eval__tasks": ["letters"]}, "eval.best_by: .*got 'sums'"),
        ({"eval__best_by": ...}, "eval.patience: would be ignored because eval.best_by is not set"),
        ({"eval__every": ...}, "eval.patience: would be ignored because eval.every is not set"),
        # What only the data show
        ({"eval__best_by": "sums", "eval__best_metric": "acc"}, "eval.best_metric: got acc, must be nll_per_token"),
        ({"eval__every": STEPS}, "eval.every: got 12, must be less than the run's 12 steps"),
    ],
)
def test_what_would_choose_nothing_is_refused(root: Path, tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        train_run(recipe(root, **changes), tmp_path / "run", console=QUIET)
    assert not (tmp_path / "run").exists()
    (fault,) = selection_faults(recipe(root), {}, STEPS)
    assert fault.startswith("eval.best_by: got macro, but no source has validation data")
