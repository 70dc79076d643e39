"""The page of a run: it says how far the run came, shows the numbers of its files, loads nothing and escapes all."""

from __future__ import annotations

import base64
import json
import math
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from rich.console import Console
from scipy import stats
from typer.testing import CliRunner

from qdora.cli import app
from qdora.errors import Diverged, Interrupted, RunFailure, UserError
from qdora.files.run_directory import failures_logged, open_run
from qdora.recipe.recipe_file import load_recipe
from qdora.run import run_page
from qdora.run.adapter_step import adapter_step
from qdora.run.evaluate import EvalOptions, evaluate_target
from qdora.run.run_facts import next_commands
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


@pytest.fixture(scope="module")
def unevaluated(root: Path) -> Path:
    """A finished run without evaluations or a plan."""
    train_run(tiny_run.recipe(root, **UNEVALUATED), root / "unevaluated", console=QUIET)
    return root / "unevaluated"


def page(run: Path) -> Page:
    return Page((run / "report.html").read_text(encoding="utf-8"))


def read(run: Path, name: str) -> Any:
    return json.loads((run / name).read_text())


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def copy_of(run: Path, place: Path) -> Path:
    return Path(shutil.copytree(run, place / "run"))


def test_training_leaves_a_page_that_needs_nothing_else(whole: Path, unevaluated: Path) -> None:
    for run, least in ((whole, 7), (unevaluated, 5)):
        found = page(run)
        assert not found.loads
        assert not found.faults
        assert not {"script", "link", "iframe", "object", "form"} & set(found.tags)
        assert len(found.images) >= least
        for image in found.images:
            assert "<svg" in base64.b64decode(image.partition(",")[2]).decode()
        assert "prefers-color-scheme: dark" in found.style
        assert "@media print" in found.style


def test_a_finished_run_says_so_and_what_comes_next(whole: Path) -> None:
    found = page(whole)
    assert "Finished: 6 of 6 steps." in found.text
    assert f"qdora export {whole} {whole}-merged --audit" in found.text
    assert f"--run-dir {whole} --resume -s train.steps=12" in found.text


def test_what_comes_next_is_possible(whole: Path) -> None:
    """An audit compares the forms of an adapter; a run without a checkpoint has none to continue from."""
    run, recipe = open_run(whole), load_recipe(str(whole / "recipe.yaml"))
    status: dict[str, Any] = {"state": "finished", "num_steps": 6, "num_done": 6, "newest_checkpoint": 6}
    full = recipe.model_copy(update={"adapter": recipe.adapter.model_copy(update={"kind": "full"})})
    for known, has_audit in ((recipe, True), (full, False)):
        [export] = [each for each in next_commands(run, known, status, True) if " export " in each["command"]]
        assert ("--audit" in export["command"], "compare" in export["why"]) == (has_audit, has_audit)
    [again] = next_commands(run, recipe, status | {"state": "unfinished", "newest_checkpoint": None}, True)
    assert again["why"] == "Start the run again: it has saved no checkpoint"


def test_the_sources_are_those_of_the_mix(whole: Path) -> None:
    rows = page(whole).table("source", "examples")
    sources = read(whole, "mix.json")["sources"]
    assert len(rows) == len(sources) == 2
    for row, source in zip(rows, sources, strict=True):
        shares = [f"{100 * source[name]:.1f}%" for name in ("share_asked", "share_seen")]
        passes = f"{source['num_draws'] / source['num_examples']:.2f}"
        assert row[:3] == [source["name"], str(source["num_examples"]), str(source["num_tokens"])]
        assert row[3:] == [*shares, str(source["num_tokens_seen"]), passes, "0", "0"]


def test_the_examples_show_what_is_in_the_loss(whole: Path, root: Path) -> None:
    found = page(whole)
    # Rows that stay for training, as the files hold them; the end of sequence is learnt with the answer
    sums = [json.loads(line) for line in (root / "data/sums.jsonl").read_text().splitlines()]
    letters = [json.loads(line) for line in (root / "data/letters.jsonl").read_text().splitlines()]
    texts = [(row["prompt"], row["completion"]) for row in sums]
    texts += [(f"Question: {row['question']}⏎\nAnswer:", f" {row['choices'][0]}") for row in letters]
    assert len(found.tokens) == 3
    for tokens in found.tokens:
        *others, end = tokens
        assert end == ("<|im_end|>", True, True)
        assert not any(special for _, _, special in others)
        learnt = [in_loss for _, in_loss, _ in others]
        assert learnt == sorted(learnt)
        prompt, answer = ("".join(text for text, in_loss, _ in others if in_loss == wanted) for wanted in (False, True))
        assert (prompt, answer) in texts


@pytest.mark.parametrize(
    "title, metric, record, factor, digits", [(0, "nll_per_token", "nll", 1, 4), (1, "acc", "acc", 100, 1)]
)
def test_before_and_after_with_paired_intervals(
    whole: Path, title: int, metric: str, record: str, factor: float, digits: int
) -> None:
    columns = ["task", "examples", "before", "after", "change", "95 % interval"]
    tables = [table for table in page(whole).tables if table[0][:6] == columns]
    assert len(tables) == 2
    rows = {row[0]: row for row in tables[title][1:]}
    before, after = (read(whole, f"eval/step-{step}.json") for step in (0, 6))
    tasks = [task for task, numbers in after["tasks"].items() if numbers[metric] is not None]
    assert set(rows) == {*tasks, "average"} if len(tasks) > 1 else set(tasks)
    for task in tasks:
        old, new = (
            {each["id"]: each for each in every["per_example"] if each["task"] == task} for every in (before, after)
        )
        assert list(old) == list(new)
        number = len(old)
        assert number >= 10
        weights = [each["num_answer_tokens"] if metric == "nll_per_token" else 1 for each in new.values()]
        gaps = [new[key][record] - old[key][record] for key in old]
        change = sum(gaps) / sum(weights)
        residuals = [gap - change * weight for gap, weight in zip(gaps, weights, strict=True)]
        deviation = math.sqrt(sum((each - sum(residuals) / number) ** 2 for each in residuals) / (number - 1))
        error = deviation / math.sqrt(number) / (sum(weights) / number)
        half = stats.t.ppf(0.975, number - 1) * error
        form = f"{{:+.{digits}f}}"
        row = rows[task]
        assert row[1] == str(number)
        assert row[2:4] == [f"{factor * every['tasks'][task][metric]:.{digits}f}" for every in (before, after)]
        assert row[4] == form.format(factor * change)
        ends = [float(end) for end in row[5].split(" to ")]
        assert ends == pytest.approx([factor * (change - half), factor * (change + half)], abs=0.51 * 10**-digits)


def test_losses_time_and_speed_are_those_of_the_metrics(whole: Path) -> None:
    found = page(whole)
    trained = [line for line in lines(whole) if "loss" in line]
    for task, first, last in found.table("task", "first tenth of the steps"):
        for shown, line in ((first, trained[0]), (last, trained[-1])):
            numbers = line["tasks"].get(task)
            assert shown == ("–" if numbers is None else f"{numbers['nll_sum'] / numbers['num_tokens']:.4f}")
    seconds = [line["time"]["step_seconds"] for line in trained]
    # Read from the lines of metrics.jsonl; the files of the evaluations say the same
    evaluated = sum(read(whole, f"eval/step-{step}.json")["settings"]["seconds"] for step in (0, 6))
    assert evaluated == sum(line["time"]["evaluation_seconds"] for line in lines(whole) if "eval" in line)
    expected = {"training steps": sum(seconds), "evaluations": evaluated}
    for work, shown, share in found.table("work", "seconds", "share"):
        assert shown == f"{expected[work]:,.1f}"
        assert share == f"{100 * expected[work] / sum(expected.values()):.1f}%"
    rate = median(line["num_tokens"] / line["time"]["step_seconds"] for line in trained)
    assert f"{rate:,.0f} tokens/s, {median(seconds):.3g} s a step" in found.text
    assert f"6 logged steps, {sum(line['num_tokens'] for line in trained)} tokens" in found.text


def size(num_bytes: float) -> str:
    if num_bytes >= 2**30:  # the peak is that of the whole process, which other tests have made larger
        return f"{num_bytes / 2**30:.2f} GiB"
    return f"{num_bytes / 2**20:.1f} MiB" if num_bytes >= 2**20 else f"{num_bytes / 2**10:.0f} KiB"


def test_memory_is_planned_against_measured_by_component(whole: Path) -> None:
    plan, held = read(whole, "plan.json")["components"], read(whole, "trained.json")["memory"]
    peak = max(line["time"]["peak_memory_bytes"] for line in lines(whole) if "loss" in line)
    rows = {name: (planned, measured) for name, planned, measured in page(whole).table("component", "planned")}
    for name in {*plan, *held}:
        assert rows[name] == tuple(size(part[name]) if name in part else "–" for part in (plan, held)), name
    assert rows["packed base"][0] == rows["packed base"][1]
    assert rows["peak"] == (size(sum(plan.values())), size(peak))
    others = sum(size for name, size in plan.items() if name not in held)
    assert rows["all that is not held, together"] == (size(others), size(peak - sum(held.values())))


def test_layers_are_those_of_the_file(whole: Path) -> None:
    layers = read(whole, "trained.json")["layers"]
    rows = page(whole).table("layer", "number")
    assert sum(int(row[1]) for row in rows) == len(layers) == 14
    for kind, number, rank, mean, most, update in rows:
        own = [layer for layer in layers if layer["path"].endswith(f".{kind}")]
        assert (number, rank) == (str(len(own)), "4")
        assert mean == f"{100 * sum(layer['magnitude_moved'] for layer in own) / len(own):.2f}%"
        assert most == f"{100 * max(layer['magnitude_moved_most'] for layer in own):.2f}%"
        assert update == f"{100 * sum(layer['update'] for layer in own) / len(own):.2f}%"
        assert mean != "0.00%"


def test_a_run_without_evaluation_or_plan(unevaluated: Path) -> None:
    found = page(unevaluated)
    assert "Finished: 6 of 6 steps." in found.text
    assert "The run was not evaluated." in found.text
    assert "no memory was planned" in found.text
    assert f"qdora eval {unevaluated} --base" in found.text
    assert [row[0] for row in found.table("component", "measured")][-1] == "peak"
    assert [row[0] for row in found.table("task", "first tenth of the steps")] == ["sums", "letters"]


def test_an_interrupted_run_leaves_a_page(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_after(monkeypatch, 3)
    with pytest.raises(Interrupted):
        train_run(tiny_run.recipe(root), tmp_path / "run", console=QUIET)
    found = page(tmp_path / "run")
    assert "Not finished: 3 of 6 steps, the newest checkpoint is of step 3." in found.text
    assert "The numbers are those of all 6 planned steps, of which 3 are done." in found.text
    assert "evaluated only before training" in found.text
    assert f"qdora train {tmp_path}/run/recipe.yaml --run-dir {tmp_path}/run --resume" in found.text
    assert len(found.tokens) == 3
    monkeypatch.undo()
    train_run(tiny_run.recipe(root), tmp_path / "run", resume=True, console=QUIET)
    assert "Finished: 6 of 6 steps." in page(tmp_path / "run").text
    assert "planned steps" not in page(tmp_path / "run").text


def test_a_failed_run_says_so_on_its_page(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_gradients_nan(monkeypatch)
    with pytest.raises(Diverged):
        train_run(tiny_run.recipe(root, **UNEVALUATED), tmp_path / "run", console=QUIET)
    monkeypatch.undo()
    found = page(tmp_path / "run")
    assert "Not finished: 0 of 6 steps" in found.text
    assert "The last start failed: step 1: gradient norm nan is not finite" in found.text
    train_run(tiny_run.recipe(root, **UNEVALUATED), tmp_path / "run", resume=True, console=QUIET)
    assert "The last start failed" not in page(tmp_path / "run").text


def test_the_page_has_the_first_line_of_the_error_that_ended_the_last_start(whole: Path, tmp_path: Path) -> None:
    """Not its last one, and no error of another verb."""
    run = copy_of(whole, tmp_path)
    text = "CUDA error: device-side assert triggered\nThe stacktrace below might be incorrect.\nFor debugging ...\n"

    def failure_after(verb: str, error: Exception) -> str | None:
        with pytest.raises(type(error)), failures_logged(run, verb):
            raise error
        found: str | None = write_page(open_run(run))["status"]["failure"]
        return found

    assert failure_after("eval", RuntimeError("no memory")) is None
    assert failure_after("train", RuntimeError(text)) == "RuntimeError: CUDA error: device-side assert triggered"
    assert failure_after("export", RunFailure("disk full.")) == "RuntimeError: CUDA error: device-side assert triggered"
    assert failure_after("train", RunFailure("disk full.")) == "disk full."
    open_run(run).log("Continuing from step-4.")
    assert failure_after("rank", RuntimeError("no memory")) is None
    log = (run / "log.txt").read_text()
    assert log.count("Traceback") == 5
    assert "For debugging" in log


def test_an_evaluation_of_the_adapter_keeps_its_step_when_the_run_goes_on(whole: Path, tmp_path: Path) -> None:
    run = copy_of(whole, tmp_path)
    options = EvalOptions(tasks=["letters"], limit=2)
    evaluate_target(str(run), options, console=QUIET)
    evaluate_target(str(run), replace(options, base_only=True), console=QUIET)
    evaluate_target(str(run), replace(options, step=4), console=QUIET)
    names = {"final": 6, "base": 0, "step-4": 4}
    assert {name: read(run, f"eval/{name}-validation-letters-limit-2.json")["step"] for name in names} == names
    trained = read(run, "trained.json") | {"step": 8}
    (run / "trained.json").write_text(json.dumps(trained))
    write_page(open_run(run))
    assert "validation-letters-limit-2: after step 6" in page(run).text


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
    assert (adapter_step(open_run(run)), page_of_run(run, console=QUIET)["status"]["adapter_step"]) == (4, 4)
    assert "adapter/ holds" not in page(run).text
    (run / "trained.json").write_text(json.dumps(read(run, "trained.json") | {"step": 2}))
    write_page(open_run(run))
    assert "Not finished: 4 of 4 steps, the newest checkpoint is of step 4. adapter/ holds step 2." in page(run).text


def test_evaluations_of_other_examples_before_and_after_are_named(whole: Path, tmp_path: Path) -> None:
    assert "Not the same examples" not in page(whole).text
    run = copy_of(whole, tmp_path)
    document = read(run, "eval/step-6.json")
    document["per_example"] = [each for each in document["per_example"] if each["task"] != "sums"][1:]
    (run / "eval/step-6.json").write_text(json.dumps(document))
    write_page(open_run(run))
    assert "Not the same examples were evaluated before and after (letters): eval.limit or the data" in page(run).text


def test_evaluations_of_an_abandoned_branch_are_gone(root: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train_run(tiny_run.recipe(root, eval__every=2), run, console=QUIET)
    evaluate_target(str(run), EvalOptions(limit=2, step=6), console=QUIET)
    own = ["step-0.json", "step-2.json", "step-4.json", "step-6.json"]
    assert sorted(file.name for file in (run / "eval").iterdir()) == sorted([*own, "step-6-validation-limit-2.json"])
    shutil.rmtree(run / "checkpoints/step-6")
    (run / "eval/step-6-generated.json").write_text("{}")
    stopped = tiny_run.recipe(root, eval__at_end=False)
    train_run(stopped, run, resume=True, console=QUIET)
    kept = sorted(file.name for file in (run / "eval").iterdir())
    assert kept == [*own[:3], "step-6-validation-limit-2.json"]
    assert "validation: after step 4" in page(run).text


def test_the_command_that_trains_on_is_accepted(root: Path, tmp_path: Path) -> None:
    recipe = tiny_run.recipe(root, train__steps=..., train__epochs=0.2, **UNEVALUATED)
    train_run(recipe, tmp_path / "run", console=QUIET)
    commands = [each["command"] for each in page_of_run(tmp_path / "run", console=QUIET)["next"]]
    (words,) = [shlex.split(command) for command in commands if "--resume" in command]
    found = CliRunner().invoke(app, ["--quiet", *words[1:]])
    assert found.exit_code == 0, found.output
    assert "train.epochs=0.4" in words
    assert "Finished: 5 of 5 steps." in page(tmp_path / "run").text


def test_a_page_for_which_there_is_no_place(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file: .* Fix: name another directory with --o"):
        page_of_run(whole, tmp_path / "file", console=QUIET)
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(UserError, match=r"whole: .* Fix: name another directory with --out"):
        page_of_run(whole, console=QUIET)


def test_a_run_that_wrote_nothing_yet_has_a_page(whole: Path, tmp_path: Path) -> None:
    for name in ("recipe.yaml", "environment.json"):
        shutil.copy(whole / name, tmp_path / name)
    facts = page_of_run(tmp_path, console=QUIET)
    found = page(tmp_path)
    assert facts["status"]["state"] == "unfinished"
    assert "Not finished: 0 steps, no checkpoint yet." in found.text
    assert "There is no mix.json" in found.text
    assert not found.tables


def test_everything_from_the_files_is_escaped(whole: Path, tmp_path: Path) -> None:
    run = copy_of(whole, tmp_path)
    text = (run / "mix.json").read_text().replace('"sums"', json.dumps(f"sums{EVIL}"))
    (run / "mix.json").write_text(text)
    examples = read(run, "examples.json")
    examples["examples"][0]["pieces"][0]["text"] = f"{EVIL}\u202e\u200b\ud800"
    examples["examples"][1]["id"] = EVIL
    (run / "examples.json").write_text(json.dumps(examples))
    for step in (0, 6):
        document = (run / f"eval/step-{step}.json").read_text().replace('"sums"', json.dumps(f"sums{EVIL}"))
        (run / f"eval/step-{step}.json").write_text(document)
    with (run / "log.txt").open("a") as log:
        log.write(f"2026-01-01T00:00:00Z WARNING {EVIL}\n")
        log.write(f"Traceback\nRuntimeError: {EVIL}\n2026-01-01T00:00:00Z FAILURE train: RuntimeError: {EVIL}\n")
    figure = run / "figures/extra.svg"
    figure.write_text(f"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script>{EVIL}</svg>")
    write_page(open_run(run))
    found = page(run)
    assert not found.faults
    assert not found.loads
    assert "script" not in found.tags
    assert found.text.count("alert('x')") >= 6
    assert found.tokens[0][0][0] == f"{EVIL}\\u202e\\u200b\\ud800"
    assert f"The last start failed: RuntimeError: {EVIL}" in found.text


def test_warnings_of_the_log_are_on_the_page_once(whole: Path, tmp_path: Path) -> None:
    run = copy_of(whole, tmp_path)
    assert "Warnings" not in page(run).text
    with (run / "log.txt").open("a") as log:
        log.write("2026-01-01T00:00:00Z WARNING first\n2026-01-01T00:00:01Z harmless\n" * 2)
    facts = write_page(open_run(run))
    assert facts["warnings"] == ["first (2 times)"]
    assert "harmless" not in page(run).text


def test_a_warning_is_marked_in_the_log(root: Path, tmp_path: Path) -> None:
    recipe = tiny_run.recipe(root, train__steps=1, train__batch=100, **UNEVALUATED)
    train_run(recipe, tmp_path / "run", console=QUIET)
    (text,) = page_of_run(tmp_path / "run", console=QUIET)["warnings"]
    assert text.startswith("An optimizer step takes 100 examples, but the training data has only 50")


def test_answers_in_words_have_a_table_of_their_own(whole: Path, tmp_path: Path) -> None:
    run = copy_of(whole, tmp_path)
    outcomes = {0: ["wrong"] * 8 + ["unparsable"] * 4, 6: ["right"] * 9 + ["wrong"] * 3}
    for step, found in outcomes.items():
        records = [{"task": "letters", "id": str(n), "outcome": outcome} for n, outcome in enumerate(found)]
        share = found.count("right") / 12
        numbers = {"num_examples": 12, "acc": share, "chance": 0.5, "num_unparsable": found.count("unparsable")}
        document = {"tasks": {"letters": numbers}, "average": numbers, "settings": {}, "per_example": records}
        (run / f"eval/step-{step}-generated.json").write_text(json.dumps(document))
    write_page(open_run(run))
    header, row = next(table for table in page(run).tables if "unparsable" in table[0])
    assert header == ["task", "examples", "before", "after", "change", "95 % interval", "chance", "unparsable"]
    half = stats.t.ppf(0.975, 11) * math.sqrt((9 * 0.25**2 + 3 * 0.75**2) / 11 / 12)
    ends = f"{75 - 100 * half:+.1f} to {75 + 100 * half:+.1f}"
    assert row == ["letters", "12", "0.0", "75.0", "+75.0", ends, "50.0", "0"]


def test_a_damaged_file_is_a_warning_and_the_rest_is_shown(whole: Path, tmp_path: Path) -> None:
    run = copy_of(whole, tmp_path)
    (run / "eval/step-6.json").write_text('{"tasks": ')
    (run / "trained.json").write_text("[]")
    facts = page_of_run(run, console=QUIET)
    assert any("step-6.json" in text for text in facts["warnings"])
    assert len([text for text in facts["warnings"] if "trained.json" in text]) == 1
    assert page(run).table("source", "examples")
    (run / "mix.json").write_text('{"sources": [{"name": "x"}]}')
    with pytest.raises(UserError, match="does not hold what a run writes"):
        page_of_run(run, console=QUIET)


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
    assert document["data"] == read(whole, "mix.json")
    assert document["examples"] == read(whole, "examples.json")["examples"]
    assert document["layers"] == read(whole, "trained.json")["layers"]
    (tmp_path / "whole").mkdir()
    found = CliRunner().invoke(app, ["report", str(tmp_path / "whale")])
    assert found.exit_code == 2
    assert "no such directory. Did you mean 'whole'? Fix: name a directory that 'qdora train'" in found.output
