"""The page of a run: it says how far the run came, shows the numbers of its files, loads nothing and escapes all."""

from __future__ import annotations

import base64
import json
import math
import shlex
import shutil
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from pydantic import ByteSize
from rich.console import Console
from scipy import stats
from typer.testing import CliRunner

from qdora.cli import app
from qdora.errors import Diverged, Interrupted, UserError
from qdora.files.run_directory import open_run
from qdora.run import run_page
from qdora.run.adapter_step import adapter_step
from qdora.run.evaluate import EvalOptions, evaluate_target
from qdora.run.run_page import page_of_run, write_page
from qdora.run.step_evaluations import StepEvaluations
from qdora.run.train import train_run
from tests import tiny_run
from tests.page_parser import Page
from tests.run_files import make_gradients_nan, same_tensors, stop_after

QUIET = Console(quiet=True)
UNEVALUATED = {"eval__at_start": False, "eval__at_end": False, "eval__limit": ...}
EVIL = "</pre><script>alert('x')</script><img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("page")


@pytest.fixture(scope="module")
def whole(root: Path) -> Path:
    """A finished run with a plan and enough validation examples for intervals."""
    recipe = tiny_run.recipe(root, eval__limit=..., data__validation_fraction=0.5, memory__budget="20GiB")
    train_run(recipe, root / "whole", console=QUIET)
    return root / "whole"


def page(run: Path) -> Page:
    return Page((run / "report.html").read_text(encoding="utf-8"))


def read(run: Path, name: str) -> Any:
    return json.loads((run / name).read_text())


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def copy_of(run: Path, place: Path) -> Path:
    return Path(shutil.copytree(run, place / "run"))


def facts(run: Path) -> dict[str, Any]:
    return page_of_run(run, console=QUIET)


def test_training_leaves_a_page_that_needs_nothing_else(whole: Path) -> None:
    found = page(whole)
    assert not found.loads
    assert not found.faults
    assert not {"script", "link", "iframe", "object", "form"} & set(found.tags)
    assert len(found.images) == 4
    for image in found.images:
        assert "<svg" in base64.b64decode(image.partition(",")[2]).decode()


def test_a_finished_run_says_so_what_comes_next_and_its_recipe(whole: Path) -> None:
    found = page(whole)
    assert "Finished: 6 of 6 steps." in found.text
    assert f"qdora export {whole} {whole}-merged" in found.text
    assert f"--run-dir {whole} --resume -s train.steps=12" in found.text
    assert (whole / "recipe.yaml").read_text() in found.text


@pytest.mark.parametrize(
    "metric, label, record, factor, digits",
    [("nll_per_token", "NLL, nats a token", "nll", 1, 4), ("acc", "accuracy, %", "acc", 100, 1)],
)
def test_before_and_after_with_paired_intervals(
    whole: Path, metric: str, label: str, record: str, factor: float, digits: int
) -> None:
    rows = {row[1]: row for row in page(whole).table("data", "task", "metric") if row[2] == label}
    before, after = (read(whole, f"eval/step-{step}.json") for step in (0, 6))
    tasks = [task for task, numbers in after["tasks"].items() if numbers[metric] is not None]
    assert set(rows) == {*tasks, "average"} if len(tasks) > 1 else set(tasks)
    for task in tasks:
        old, new = (
            {each["id"]: each for each in every["per_example"] if each["task"] == task} for every in (before, after)
        )
        number = len(old)
        assert number >= 10
        weights = [each["num_answer_tokens"] if metric == "nll_per_token" else 1 for each in new.values()]
        gaps = [new[key][record] - old[key][record] for key in old]
        change = sum(gaps) / sum(weights)
        residuals = [gap - change * weight for gap, weight in zip(gaps, weights, strict=True)]
        deviation = math.sqrt(sum((each - sum(residuals) / number) ** 2 for each in residuals) / (number - 1))
        error = deviation / math.sqrt(number) / (sum(weights) / number)
        half = stats.t.ppf(0.975, number - 1) * error
        row = rows[task]
        assert (row[0], row[3]) == ("validation, step 6", str(number))
        assert row[4:6] == [f"{factor * every['tasks'][task][metric]:.{digits}f}" for every in (before, after)]
        assert row[6] == f"{factor * change:+.{digits}f}"
        ends = [float(end) for end in row[7].split(" to ")]
        assert ends == pytest.approx([factor * (change - half), factor * (change + half)], abs=0.51 * 10**-digits)


def test_the_headline_numbers_are_those_of_the_files(whole: Path) -> None:
    found = page(whole)
    trained = [line for line in lines(whole) if "loss" in line]
    seconds = [line["time"]["step_seconds"] for line in trained]
    rate = median(line["num_tokens"] / line["time"]["step_seconds"] for line in trained)
    assert f"{rate:,.0f} tokens/s, {median(seconds):.3g} s a step" in found.text
    assert f"{trained[0]['loss']:.4f} to {trained[-1]['loss']:.4f} nats a token" in found.text
    planned = sum(read(whole, "plan.json")["components"].values())
    assert facts(whole)["numbers"]["planned peak"] == ByteSize(planned).human_readable()
    assert "dora, rank 4, alpha 8" in found.text


def test_an_interrupted_run_leaves_a_page(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_after(monkeypatch, 3)
    with pytest.raises(Interrupted):
        train_run(tiny_run.recipe(root), tmp_path / "run", console=QUIET)
    found = page(tmp_path / "run")
    assert "Not finished: 3 of 6 steps, the newest checkpoint is of step 3." in found.text
    assert "validation, only before training" in found.text
    assert f"qdora train {tmp_path}/run/recipe.yaml --run-dir {tmp_path}/run --resume" in found.text
    monkeypatch.undo()
    train_run(tiny_run.recipe(root), tmp_path / "run", resume=True, console=QUIET)
    assert "Finished: 6 of 6 steps." in page(tmp_path / "run").text


def test_a_failed_run_says_so_on_its_page(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_gradients_nan(monkeypatch)
    with pytest.raises(Diverged):
        train_run(tiny_run.recipe(root, **UNEVALUATED), tmp_path / "run", console=QUIET)
    monkeypatch.undo()
    assert "Not finished: 0 of 6 steps" in page(tmp_path / "run").text
    assert "The last start failed: step 1: gradient norm nan is not finite" in page(tmp_path / "run").text
    train_run(tiny_run.recipe(root, **UNEVALUATED), tmp_path / "run", resume=True, console=QUIET)
    found = page(tmp_path / "run").text
    assert "The last start failed" not in found
    assert "The run was not evaluated." in found
    assert f"qdora eval {tmp_path}/run --base" in found


def test_evaluations_of_other_data_stand_beside_those_of_the_base(whole: Path, tmp_path: Path) -> None:
    run = copy_of(whole, tmp_path)
    for options in (EvalOptions(tasks=["letters"], limit=2), EvalOptions(tasks=["letters"], limit=2, base_only=True)):
        evaluate_target(str(run), options, console=QUIET)
    found = {each["data"]: each for each in facts(run)["evaluations"]}
    (loss,) = found["validation-letters-limit-2"]["nll_per_token"]
    scores = [read(run, f"eval/{name}-validation-letters-limit-2.json") for name in ("base", "final")]
    values = [each["tasks"]["letters"]["nll_per_token"] for each in scores]
    assert [loss["before"], loss["after"], loss["num_examples"]] == [*values, 2]


def test_an_interrupt_in_the_last_evaluation_of_an_extended_run_leaves_the_right_step(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    run = tmp_path / "run"
    train_run(tiny_run.recipe(root, train__steps=2), run, console=QUIET)
    monkeypatch.setattr(StepEvaluations, "measure", interrupt)
    with pytest.raises(Interrupted):
        train_run(tiny_run.recipe(root, train__steps=4), run, resume=True, console=QUIET)
    same_tensors(
        run / "adapter/adapter_model.safetensors", run / "checkpoints/step-4/adapter/adapter_model.safetensors"
    )
    assert (adapter_step(open_run(run)), facts(run)["status"]["adapter_step"]) == (4, 4)
    (run / "trained.json").write_text(json.dumps(read(run, "trained.json") | {"step": 2}))
    found = facts(run)["status"]["text"]
    assert found == "Not finished: 4 of 4 steps, the newest checkpoint is of step 4. adapter/ holds step 2."


def test_evaluations_of_an_abandoned_branch_are_gone(root: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train_run(tiny_run.recipe(root, eval__every=2), run, console=QUIET)
    evaluate_target(str(run), EvalOptions(limit=2, step=6), console=QUIET)
    own = ["step-0.json", "step-2.json", "step-4.json", "step-6.json"]
    assert sorted(file.name for file in (run / "eval").iterdir()) == sorted([*own, "step-6-validation-limit-2.json"])
    shutil.rmtree(run / "checkpoints/step-6")
    (run / "eval/step-6-generated.json").write_text("{}")
    train_run(tiny_run.recipe(root, eval__at_end=False), run, resume=True, console=QUIET)
    assert sorted(file.name for file in (run / "eval").iterdir()) == [*own[:3], "step-6-validation-limit-2.json"]


def test_the_command_that_trains_on_is_accepted(root: Path, tmp_path: Path) -> None:
    recipe = tiny_run.recipe(root, train__steps=..., train__epochs=0.2, **UNEVALUATED)
    train_run(recipe, tmp_path / "run", console=QUIET)
    (words,) = [
        shlex.split(each["command"]) for each in facts(tmp_path / "run")["next"] if "--resume" in each["command"]
    ]
    found = CliRunner().invoke(app, ["--quiet", *words[1:]])
    assert found.exit_code == 0, found.output
    assert "train.epochs=0.4" in words
    assert "Finished: 5 of 5 steps." in page(tmp_path / "run").text


def test_a_page_for_which_there_is_no_place(whole: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file: .* --out"):
        page_of_run(whole, tmp_path / "file", console=QUIET)


def test_a_run_that_wrote_nothing_yet_has_a_page(whole: Path, tmp_path: Path) -> None:
    for name in ("recipe.yaml", "environment.json"):
        shutil.copy(whole / name, tmp_path / name)
    assert facts(tmp_path)["status"]["state"] == "unfinished"
    assert "Not finished: 0 steps, no checkpoint yet." in page(tmp_path).text
    assert not page(tmp_path).tables


def test_everything_from_the_files_is_escaped(whole: Path, tmp_path: Path) -> None:
    run = copy_of(whole, tmp_path)
    for step in (0, 6):
        document = (run / f"eval/step-{step}.json").read_text().replace('"sums"', json.dumps(f"sums{EVIL}"))
        (run / f"eval/step-{step}.json").write_text(document)
    with (run / "log.txt").open("a") as log:
        log.write(f"2026-01-01T00:00:00Z WARNING {EVIL}\n")
        log.write(f"Traceback\nRuntimeError: {EVIL}\n2026-01-01T00:00:00Z FAILURE train: RuntimeError: {EVIL}\n")
    with (run / "recipe.yaml").open("a") as recipe:
        recipe.write(f"# {EVIL}\n")
    (run / "figures/steps.svg").write_text(f"<svg xmlns='http://www.w3.org/2000/svg'><script/>{EVIL}</svg>")
    write_page(open_run(run), tmp_path / "report.html")
    found = page(tmp_path)
    assert not found.faults
    assert not found.loads
    assert "script" not in found.tags
    assert found.text.count("alert('x')") == 4  # the task, the warning, the failure, the recipe
    assert f"The last start failed: RuntimeError: {EVIL}" in found.text


def test_warnings_of_the_log_are_on_the_page_once(whole: Path, tmp_path: Path) -> None:
    run = copy_of(whole, tmp_path)
    assert "Warnings" not in page(run).text
    with (run / "log.txt").open("a") as log:
        log.write("2026-01-01T00:00:00Z WARNING first\n2026-01-01T00:00:01Z harmless\n" * 2)
    assert facts(run)["warnings"] == ["first (2 times)"]
    assert "harmless" not in page(run).text


def test_answers_in_words_are_an_evaluation_of_their_own(whole: Path, tmp_path: Path) -> None:
    run = copy_of(whole, tmp_path)
    outcomes = {0: ["wrong"] * 8 + ["unparsable"] * 4, 6: ["right"] * 9 + ["wrong"] * 3}
    for step, found in outcomes.items():
        records = [{"task": "letters", "id": str(n), "outcome": outcome} for n, outcome in enumerate(found)]
        numbers = {"num_examples": 12, "acc": found.count("right") / 12}
        document = {"tasks": {"letters": numbers}, "average": numbers, "settings": {}, "per_example": records}
        (run / f"eval/step-{step}-generated.json").write_text(json.dumps(document))
    facts(run)
    (row,) = [row for row in page(run).table("data", "task") if row[0] == "validation-generated, step 6"]
    half = stats.t.ppf(0.975, 11) * math.sqrt((9 * 0.25**2 + 3 * 0.75**2) / 11 / 12)
    ends = f"{75 - 100 * half:+.1f} to {75 + 100 * half:+.1f}"
    assert row[1:] == ["letters", "accuracy, %", "12", "0.0", "75.0", "+75.0", ends]


def test_a_damaged_file_is_named(whole: Path, tmp_path: Path) -> None:
    run = copy_of(whole, tmp_path)
    (run / "eval/step-6.json").write_text('{"tasks": ')
    with pytest.raises(UserError, match=r"eval/step-6\.json: cannot be read as JSON"):
        facts(run)
    (run / "eval/step-6.json").write_text('{"tasks": {"x": 1}, "per_example": [{}]}')
    with pytest.raises(UserError, match="does not hold what a run writes"):
        facts(run)


def test_a_page_that_cannot_be_made_does_not_end_the_run(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise KeyError("strange")

    monkeypatch.setattr(run_page, "write_page", fail)
    recipe = tiny_run.recipe(root, train__steps=1, **UNEVALUATED)
    assert train_run(recipe, tmp_path / "run", console=QUIET)["num_steps"] == 1
    assert "WARNING report.html was not written: KeyError: 'strange'" in (tmp_path / "run/log.txt").read_text()


def test_the_command(whole: Path, tmp_path: Path) -> None:
    found = CliRunner().invoke(app, ["report", str(whole), "--out", str(tmp_path / "out"), "--json"])
    assert found.exit_code == 0, found.output
    document = json.loads(found.stdout)
    assert document["page"] == str(tmp_path / "out/report.html")
    assert (tmp_path / "out/report.html").is_file()
    assert document["status"]["state"] == "finished"
    (tmp_path / "whole").mkdir()
    found = CliRunner().invoke(app, ["report", str(tmp_path / "whale")])
    assert found.exit_code == 2
    assert "Did you mean 'whole'?" in found.output
