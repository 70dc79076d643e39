"""Whole runs on a tiny model: resumed equals uninterrupted, nothing is lost, every failure is one clear line."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from qdora.cli import app
from qdora.data.chat_template import prompt_text
from qdora.data.messages import Turn
from qdora.errors import UserError
from qdora.export.export_run import export_run
from qdora.export.options import ExportOptions
from qdora.files import run_directory
from qdora.files.run_directory import open_run, write_complete
from qdora.model.build_model import choose_compute, find_model, put_adapters
from qdora.recipe.recipe_file import resolved_yaml
from qdora.run.base import load_base
from qdora.run.evaluate import EvalOptions, evaluate_target
from qdora.run.load_run import load_run, load_target
from qdora.run.run import resumed_recipe, train_run
from tests import support
from tests.support import (
    ADAPTER,
    UNEVALUATED,
    assert_resumes,
    in_batches,
    same_tensors,
    start_command,
    timeless,
    train_until,
    training_lines,
)

FIGURES = {"loss_per_task", "steps", "validation_nll", "validation_accuracy"}
CONSTANT = {"train__schedule": "constant"}
FULL: dict[str, Any] = {f"adapter__{key}": ... for key in ("rank", "alpha", "dropout")}
FULL |= {"adapter__kind": "full", "base__quant": "none", "train__steps": 3}


def start_magnitudes(root: Path) -> dict[str, torch.Tensor]:
    """The magnitudes before the first step, by their name in an adapter file."""
    recipe = support.tiny_recipe(root)
    base = load_base(recipe, find_model(recipe)[0], choose_compute("float32"))
    put_adapters(base, recipe)
    return {
        f"base_model.model.{name.removesuffix('.magnitude')}.lora_magnitude_vector": p.detach()
        for name, p in base.named_parameters()
        if name.endswith("magnitude")
    }


def nll(run: Path, step: int) -> float:
    found: float = json.loads((run / f"eval/step-{step}.json").read_text())["average"]["nll_per_token"]
    return found


def test_a_run_leaves_what_the_design_says(root: Path, whole: Path) -> None:
    for name in ("recipe.yaml", "environment.json", "metrics.jsonl", "log.txt", "adapter/adapter_config.json"):
        assert (whole / name).is_file(), name
    assert {each.stem for each in (whole / "figures").iterdir()} == FIGURES
    assert sorted(each.name for each in (whole / "checkpoints").iterdir()) == ["step-4", "step-6"]
    steps = [(step, False) for step in range(1, 7)]
    assert [(line["step"], "eval" in line) for line in timeless(whole)] == [(0, True), *steps, (6, True)]
    for line in training_lines(whole):
        assert set(line["tasks"]) <= {"sums", "letters"}
        total = sum(task["nll_sum"] for task in line["tasks"].values())
        assert line["loss"] == pytest.approx(total / line["num_label_tokens"], rel=1e-9)
        assert sum(task["num_tokens"] for task in line["tasks"].values()) == line["num_label_tokens"]
        assert line["num_examples"] == 4
    assert nll(whole, 6) < nll(whole, 0)
    card = (whole / "README.md").read_text()
    assert "dora, rank 4, alpha 8" in card
    last = json.loads((whole / "eval/step-6.json").read_text())["tasks"]
    assert sorted(last) == ["letters", "sums"]
    assert f"{last['sums']['nll_per_token']:.4f}" in card
    # Magnitudes move in float32, factors are stored in bf16
    adapter, start = load_file(whole / ADAPTER), start_magnitudes(root)
    assert len(start) == 14
    for name, tensor in adapter.items():
        assert tensor.dtype == (torch.float32 if name in start else torch.bfloat16)
        if name in start:
            assert (tensor != start[name]).float().mean() >= 0.99, name


@pytest.mark.parametrize("stop_at", [1, 3, 4])
def test_resumed_equals_uninterrupted_bit_for_bit(root: Path, whole: Path, tmp_path: Path, stop_at: int) -> None:
    assert_resumes(support.tiny_recipe(root), whole, tmp_path / "run", stop_at=stop_at)


def test_rates_of_the_parts_and_the_end_of_the_schedule_reach_the_optimizer(root: Path, tmp_path: Path) -> None:
    """Two steps of Lion, each of which moves an entry by its rate, up or down, or not at all."""
    rates = {"lr": 1e-3, "lr_end": 5e-4, "warmup": 0, "lr_ratio_B": 4.0, "lr_ratio_magnitude": 0.5}
    changes = {f"train__{key}": value for key, value in rates.items()}
    train_run(support.tiny_recipe(root, **changes, **UNEVALUATED, train__steps=2, train__optimizer="lion"), tmp_path)
    assert [line["lr"] for line in timeless(tmp_path)] == pytest.approx([1e-3, 7.5e-4])
    adapter, magnitudes = load_file(tmp_path / ADAPTER), start_magnitudes(root)
    for part, ratio, atol in (("lora_B.weight", 4.0, 7e-3 / 2**8), ("lora_magnitude_vector", 0.5, 1e-6)):  # B in bf16
        steps = {ratio * (first * 1e-3 + second * 7.5e-4) for first in (-1, 0, 1) for second in (-1, 0, 1)}
        names = [name for name in adapter if name.endswith(part)]
        assert len(names) == 14
        for name in names:
            way = adapter[name].double() - magnitudes.get(name, torch.zeros(())).double()
            assert float(torch.stack([(way - step).abs() for step in steps]).amin(dim=0).max()) < atol, name
            assert float(way.abs().max()) == pytest.approx(ratio * 1.75e-3, rel=0.01), name


@pytest.mark.parametrize("setting, chunk", [("auto", None), (3, 3)])
def test_the_recipe_says_how_many_tokens_have_logits_at_once(
    root: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: Any, chunk: int | None
) -> None:
    chunks: list[Any] = []
    in_batches(monkeypatch, lambda _number, _loss, _ids, options: chunks.append(options["chunk"]))
    train_run(support.tiny_recipe(root, memory__loss_chunk=setting, train__steps=2, **UNEVALUATED), tmp_path)
    assert chunks == [chunk] * 2
    assert timeless(tmp_path)[0]["loss"] == pytest.approx(training_lines(whole)[0]["loss"], rel=1e-6)


@pytest.fixture(scope="module")
def longer(root: Path) -> Path:
    """A run of nine steps, two of them with a growing rate."""
    train_run(support.tiny_recipe(root, train__steps=9, train__warmup=2, **CONSTANT), root / "longer")
    return root / "longer"


@pytest.mark.parametrize("stop_at", [None, 1, 3])
def test_extended_as_if_longer_from_the_start(root: Path, longer: Path, tmp_path: Path, stop_at: int | None) -> None:
    """Constant rate, bit for bit. The warm-up, a share of all steps, stays that of the start: 2 steps."""
    run, short = tmp_path / "run", support.tiny_recipe(root, **CONSTANT)
    if stop_at is None:
        train_run(short, run)
    else:
        train_until(short, run, stop_at)
    assert train_run(support.tiny_recipe(root, train__steps=9, **CONSTANT), run, resume=True)["num_steps"] == 9
    assert training_lines(run) == training_lines(longer)
    same_tensors(run / ADAPTER, longer / ADAPTER)
    states = [(each / "checkpoints/step-9/state.json").read_text() for each in (run, longer)]
    assert states[0] == states[1]
    assert "steps: 9" in (run / "recipe.yaml").read_text()


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_an_extended_run_has_the_rates_of_the_longer_one(root: Path, tmp_path: Path, schedule: str) -> None:
    changes = {"train__schedule": schedule, "train__lr_end": 1e-4, **UNEVALUATED}
    train_run(support.tiny_recipe(root, **changes), tmp_path)
    train_run(support.tiny_recipe(root, train__steps=10, **changes), tmp_path, resume=True)

    def rate(step: int, num_steps: int) -> float:  # warm-up over steps 0 and 1
        done = (step - 2) / (num_steps - 2)
        share = 1 - done if schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
        return (0.5e-3, 1e-3)[step] if step < 2 else 1e-4 + 9e-4 * share

    rates = [line["lr"] for line in training_lines(tmp_path)]
    assert rates == pytest.approx([rate(step, 6 if step < 6 else 10) for step in range(10)])
    log = (tmp_path / "log.txt").read_text()
    assert f"The run has 10 steps now, 6 before: from step 7 on the learning rate is that of a {schedule}" in log
    assert f"old warm-up, {rates[6]:.3g} at first" in log


def test_a_run_is_extended_by_epochs_and_what_began_it_stays(root: Path, whole: Path, tmp_path: Path) -> None:
    changes = {"train__steps": ..., "train__batch": 26, **UNEVALUATED}
    assert train_run(support.tiny_recipe(root, train__epochs=1, **changes), tmp_path)["evaluations"] == {}
    assert not (tmp_path / "eval").exists()
    before = training_lines(tmp_path)
    train_run(support.tiny_recipe(root, train__epochs=2, **changes), tmp_path, resume=True)
    lines = training_lines(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]  # of 50 examples, 28 sums and 22 letters
    assert lines[:2] == before
    assert "epochs: 2" in (tmp_path / "recipe.yaml").read_text()
    for recipe, run, said in (
        (support.tiny_recipe(root, train__epochs=1, **changes), tmp_path, r"epochs: must be 2\.0 or more.*got 1\.0"),
        (support.tiny_recipe(root, train__steps=5), whole, r"steps: must be 6 or more.*\(got 5\)"),
        (support.tiny_recipe(root, train__seed=5), whole, r"seed: must be 0, as when the run started.*\(got 5\)"),
    ):
        with pytest.raises(UserError, match=rf"train\.{said}"):
            train_run(recipe, run, resume=True)
    # A finished run stays as it is, whatever may change
    shutil.copytree(whole, tmp_path / "copy")
    for setting in ("auto", "eager"):
        train_run(support.tiny_recipe(root, model__attention=setting), tmp_path / "copy", resume=True)
    assert (tmp_path / "copy" / ADAPTER).read_bytes() == (whole / ADAPTER).read_bytes()


@pytest.mark.parametrize(
    ("file", "damage", "fault"),
    [
        ("state.json", lambda text: text.replace(b'"schedule"', b'"schedules"'), "KeyError: 'schedule'"),
        ("state.json", lambda text: text.replace(b'"format": 3', b'"format": 2'), r"format must be 3 \(got 2\)"),
        ("state.json", lambda text: b'{"format": 2, "step": ' + b"[" * 100_000, "it is nested too deeply"),
        ("optimizer.safetensors", lambda content: b"\xff" * 64, "SafetensorError: "),
        ("random.safetensors", lambda content: content[:-8], "SafetensorError: "),
    ],
)
def test_a_checkpoint_that_another_program_wrote_is_one_line(
    root: Path, whole: Path, tmp_path: Path, file: str, damage: Callable[[bytes], bytes], fault: str
) -> None:
    """Its check sums are right."""
    shutil.copytree(whole, tmp_path / "run")
    newest = open_run(tmp_path / "run").newest_checkpoint()
    assert newest is not None
    (newest.path / file).write_bytes(damage((newest.path / file).read_bytes()))
    (newest.path / "complete.json").unlink()
    write_complete(newest.path, newest.step)
    with pytest.raises(UserError, match=fault) as raised:
        train_run(support.tiny_recipe(root), tmp_path / "run", resume=True)
    assert str(newest.path) in str(raised.value)
    assert len(raised.value.faults) == 1


def test_data_that_changed_is_refused_on_resume_and_nothing_is_rewritten(tmp_path: Path) -> None:
    def written() -> list[bytes]:
        return [(tmp_path / "run" / name).read_bytes() for name in ("recipe.yaml", "mix.json", "environment.json")]

    longer, recipe = (support.tiny_recipe(tmp_path, train__steps=steps, **UNEVALUATED) for steps in (4, 2))
    train_run(recipe, tmp_path / "run")
    sums, before = tmp_path / "data/sums.jsonl", written()
    sums.write_text(sums.read_text() + '{"prompt": "9 + 9 =", "completion": " 18"}\n')
    with pytest.raises(UserError, match=r"^--resume: source sums differs from the data of the checkpoint"):
        train_run(longer, tmp_path / "run", resume=True)
    assert written() == before


def test_a_checkpoint_is_evaluated_and_exported_with_its_own_numbers(root: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train_run(support.tiny_recipe(root, train__steps=4, eval__every=2), run)
    assert evaluate_target(str(run), EvalOptions(step=2))["label"] == "step-2"
    assert export_run(run, tmp_path / "out", ExportOptions(dtype="float32", step=2))["state"] == "step-2"
    card = (tmp_path / "out/README.md").read_text()
    numbers = json.loads((run / "eval/step-2.json").read_text())["tasks"]["sums"]["nll_per_token"]
    for words in (f"{numbers:.4f}", "step-2", "| steps | 2 of 4 |"):
        assert words in card
    assert re.search(r"^- sums \(\d+ draws of 28 examples in all steps\)$", card, re.MULTILINE)
    assert "| steps | 4 of 4 |" in (run / "README.md").read_text()


@pytest.mark.parametrize("kind", ["lora", "full", "none"])
def test_other_arms_run_evaluate_and_export(root: Path, tmp_path: Path, kind: str) -> None:
    arms: dict[str, dict[str, Any]] = {"lora": {"adapter__kind": "lora"}, "full": FULL}
    arms["none"] = FULL | {"adapter__kind": "none", "base__quant": "nf4", "train__steps": 0}
    changes = arms[kind] | ({"train__checkpoint_every": ...} if kind == "none" else {})
    train_run(support.tiny_recipe(root, **changes), tmp_path / "run")
    document = evaluate_target(str(tmp_path / "run"))
    assert document["label"] == ("base" if kind == "none" else "final")
    exported = export_run(tmp_path / "run", tmp_path / "merged", ExportOptions(dtype="float32"))
    assert exported["verification"]["passed"]
    assert exported["num_merged_layers"] == (14 if kind == "lora" else 0)
    if kind == "full":
        assert document["evaluation"]["average"]["nll_per_token"] < nll(tmp_path / "run", 0)


def test_full_fine_tuning_resumes_bit_for_bit(root: Path, tmp_path: Path) -> None:
    recipe = support.tiny_recipe(root, **FULL, **UNEVALUATED, train__checkpoint_every=1, model__dtype="bfloat16")
    runs = [tmp_path / "whole", tmp_path / "run"]
    train_run(recipe, runs[0])
    train_until(recipe, runs[1], 2)
    train_run(recipe, runs[1], resume=True)
    same_tensors(*(run / "adapter/parameters.safetensors" for run in runs))
    assert timeless(runs[0]) == timeless(runs[1])


def test_going_on_from_an_adapter_starts_where_it_ended(root: Path, whole: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {f"adapter__{key}": ... for key in ("rank", "alpha")}
    changes |= {"adapter__resume_from": str(whole / "adapter"), "train__steps": 1}
    run = tmp_path / "run"
    assert list(train_run(support.tiny_recipe(root, **changes), run)["evaluations"]) == ["start", "adapter"]
    assert "| starts from | an earlier adapter |" in (run / "README.md").read_text()
    assert "<dt>starts from</dt><dd>an earlier adapter</dd>" in (run / "report.html").read_text()
    assert "starts from" not in (whole / "README.md").read_text()
    assert nll(run, 0) == nll(whole, 6)
    assert "was trained on" not in (run / "log.txt").read_text()
    # On another base that is warned of
    changes |= {"base__quant": "int8", "base__double_quant": ..., **UNEVALUATED}
    train_run(support.tiny_recipe(tmp_path, **changes), tmp_path / "other")
    text = f"the adapter in {whole / 'adapter'} was trained on {root / 'model'} (quant nf4, block_size 64, double_quant"
    log = (tmp_path / "other/log.txt").read_text()
    assert text in log
    assert f"this run puts it on {tmp_path / 'model'} (quant int8)" in log


def test_export_equals_the_running_model_and_evaluates_alike(whole: Path, tmp_path: Path) -> None:
    exported = export_run(whole, tmp_path / "merged", ExportOptions(dtype="float32"))
    check = exported["verification"]
    assert check["passed"]
    assert check["exported_vs_running"]["max_logit_difference"] < 1e-4
    assert json.loads((tmp_path / "merged/export.json").read_text()) == json.loads(json.dumps(exported))
    merged = evaluate_target(str(tmp_path / "merged"), EvalOptions(like=whole))["evaluation"]["average"]
    run = evaluate_target(str(whole))["evaluation"]["average"]
    assert merged["nll_per_token"] == pytest.approx(run["nll_per_token"], rel=0.05)
    assert export_run(whole, tmp_path / "adapter", ExportOptions(format_="peft"))["format"] == "peft"
    same_tensors(tmp_path / "adapter/adapter_model.safetensors", whole / ADAPTER)


def test_eval_uses_the_tasks_of_the_run_and_keeps_what_is_asked_beside_it(root: Path, tmp_path: Path) -> None:
    """`block` decides which examples a limit takes."""
    changes: dict[str, Any] = {"eval__tasks": ["letters"], "eval__block": 1, "data__validation_fraction": 0.5}
    run = tmp_path / "run"
    train_run(support.tiny_recipe(root, **changes, train__steps=1), run)
    assert evaluate_target(str(run))["evaluation"]["tasks"].keys() == {"letters"}
    file = run / "eval/final-validation.json"
    own = json.loads(file.read_text())["per_example"]
    evaluate_target(str(run), EvalOptions(limit=4, tasks=["letters"]))  # the same question
    for options in (EvalOptions(limit=2), EvalOptions(tasks=["sums"]), EvalOptions(tasks=["demo/facts"], limit=1)):
        evaluate_target(str(run), options)
    assert json.loads(file.read_text())["per_example"] == own
    kept = {file.stem.removeprefix("final-validation") for file in (run / "eval").glob("final-*")}
    assert kept == {"-demo-facts-limit-1", "-limit-2", "-sums", ""}
    text = tmp_path / "a text.txt"
    text.write_text("the quick brown fox")
    found = evaluate_target(str(run), EvalOptions(texts=[text]))["perplexity"]
    (written,) = (run / "eval").glob("final-perplexity-a-text.txt-*")
    assert json.loads(written.read_text()) == found | {"step": 1, "texts": [str(text)]}


def test_a_model_alone_is_evaluated_on_a_text(
    root: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "t.txt"
    text.write_text("the quick brown fox")
    found = evaluate_target(str(root / "model"), EvalOptions(texts=[text]))["perplexity"]
    assert found["num_tokens"] > 3
    assert found["perplexity"] == pytest.approx(math.exp(found["nll_sum"] / found["num_tokens"]))
    assert found["nll_per_byte"] == pytest.approx(found["nll_sum"] / len(text.read_bytes()))
    shown = evaluate_target(str(whole), EvalOptions(split="train", limit=3))["evaluation"]["tasks"]
    assert {task: row["num_examples"] for task, row in shown.items()} == {"sums": 3, "letters": 3}
    monkeypatch.chdir(root / "model")
    assert load_target(".", verb="eval").label == "model"


OF_A_RUN: list[tuple[dict[str, Any], str]] = [
    ({"like": Path("run")}, "--like"),
    ({"step": 4, "base_only": True}, "--step: is not used with --base"),
    ({"texts": [Path("nowhere.txt")]}, r"nowhere\.txt: No such file"),
    ({"tasks": ["letters"], "texts": [Path("latin.txt")]}, r"latin\.txt: not UTF-8 text"),
    ({"tasks": ["letters"], "texts": [Path("empty.txt")]}, r"empty\.txt: the file is empty"),
    ({"split": "tset"}, "--split: got 'tset', must be one of validation, test, train.*Did you mean 'test'"),
    ({"split": "test"}, "--split: sums has no test split"),
    ({"quant": "nf4"}, "--quant"),
]
OF_A_MODEL: list[tuple[dict[str, Any], str]] = [
    ({"texts": [Path("t.txt")], "limit": 3}, "--limit: counts examples of tasks, got only --text"),
    ({}, "is not a run .*Fix: add --tasks, --data, --text, --harness or --like RUN"),
    ({"texts": [Path("t.txt")], "step": 2}, "--step and --base are used only with a run"),
    ({"texts": [Path("t.txt")], "quant": "nf44"}, "--quant: got 'nf44', must be one of nf4, fp4, int8"),
    ({"tasks": ["boolqq"]}, "--tasks: got 'boolqq', must be one of .*Did you mean 'boolq'"),
]


def test_options_without_effect_are_refused(
    root: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, content in (("t", b"the quick brown fox"), ("latin", b"caf\xe9"), ("empty", b"")):
        Path(f"{name}.txt").write_bytes(content)
    with pytest.raises(UserError, match=r"modell does not exist\..* 'model'"):
        evaluate_target(f"{root / 'model'}l")
    for target, table in ((whole, OF_A_RUN), (root / "model", OF_A_MODEL)):
        for options, message in table:
            with pytest.raises(UserError, match=message):
                evaluate_target(str(target), EvalOptions(**options))


def test_a_run_resumes_with_its_own_settings(root: Path, tmp_path: Path) -> None:
    """The options of the start need not be repeated; where the file differs, a line tells it."""
    recipe = support.tiny_recipe(root, train__steps=2, **UNEVALUATED)
    file, run, model = tmp_path / "r.yaml", tmp_path / "run", recipe.model.source

    def command(*words: str, code: int = 0) -> str:
        """What it writes on standard error."""
        done = CliRunner().invoke(app, ["train", str(file), "--run-dir", str(run), *words])
        assert done.exit_code == code, done.stderr
        return str(done.stderr)

    file.write_text(resolved_yaml(recipe).replace(model, "nobody/nothing"))
    own = ("-s", f"model.source={model}", "-s", "train.lr=0.5", "-s", "train.seed=3")
    assert command(*own, "--resume", code=2).startswith(f"{run}: no such directory")  # before the model is looked for
    command(*own)
    before = (run / "recipe.yaml").read_text()
    said = command("--resume").splitlines()[0]
    assert said.startswith(f"{run} continues with its own recipe.yaml, which differs from {file} in model.source (the ")
    assert f"train.lr (the run: 0.5, {file}: 0.001), train.seed (the run: 3, {file}: 0). " in said
    assert (run / "recipe.yaml").read_text() == before
    assert "differs" not in command(*own, "--resume", "-s", "train.steps=3")
    assert open_run(run).last_step() == 3
    assert "train.seed: must be 3, as when the run started" in command("--resume", "-s", "train.seed=4", code=2)
    # options of the start that another one needs are not given again; a recipe that is not valid alone is not compared
    file.write_text("model: {source: 3}\n")
    assert f"{file} is not compared with it: {file}: model.source: " in command("--resume", "-s", "train.steps=3")
    # a run of a release without a setting resumes with its default, and not with another value
    kept = (run / "recipe.yaml").read_text()
    older = kept.replace("  packing: false\n", "")
    assert older != kept
    (run / "recipe.yaml").write_text(older)
    assert "packing: must be False, as when" in command("--resume", "-s", "data.packing=true", code=2)
    command("--resume")
    assert (run / "recipe.yaml").read_text() == kept
    refused = CliRunner().invoke(app, ["train", str(run)])  # a run in place of a recipe
    assert refused.exit_code == 2
    assert refused.stderr.startswith(f"{run}: is a run. Fix: continue it with --resume")


def test_ctrl_c_saves_and_exits_with_130(root: Path, tmp_path: Path) -> None:
    file, run = tmp_path / "long.yaml", tmp_path / "run"
    file.write_text(resolved_yaml(support.tiny_recipe(root, train__steps=5000, train__checkpoint_every=...)))
    changes = ("-s", "train.lr=1e-3", "-s", "data.mix[0].limit=20")
    process = start_command("train", str(file), "-d", str(run), *changes, output=tmp_path)
    while process.is_alive() and not ((run / "metrics.jsonl").exists() and training_lines(run)):
        time.sleep(0.01)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGINT)
    process.join(120)
    errors = (tmp_path / "stderr").read_text()
    assert process.exitcode == 130, errors
    again = f"qdora train {file} -s train.lr=1e-3 -s 'data.mix[0].limit=20' --run-dir {run} --resume"
    assert errors.splitlines()[-1].endswith(f". Continue with: {again}")
    assert "Traceback" not in errors
    newest = open_run(run).newest_checkpoint()
    assert newest is not None
    assert newest.step == len(training_lines(run))


BAD: list[tuple[dict[str, Any], str]] = [
    ({"adapter__rank": "many"}, r"adapter\.rank: .*many"),
    ({"data__mix": [{"source": "/nowhere/x.jsonl"}]}, r"data\.mix\[0\].*/nowhere/x\.jsonl"),
    ({"data__max_length": 4}, r"sums: .*longest.*data\.max_length"),
    ({"adapter__rank": 100}, r"adapter\.rank: must be at most 32 for layer .*got 100"),
    ({"eval__tasks": ["letters", "sum"]}, r"eval\.tasks\[1\]: .*'sum'.*Did you mean 'sums'"),
    ({"adapter__targets": ["q_porj"]}, r"adapter\.targets: 'q_porj' matches no .*Did you mean 'q_proj'"),
]


def test_bad_input_is_one_clear_line(root: Path, tmp_path: Path) -> None:
    """A mistake that shows late does not block the corrected start."""
    for changes, message in BAD:
        with pytest.raises(UserError, match=message) as caught:
            train_run(support.tiny_recipe(root, **changes), tmp_path / "run")
        assert all("\n" not in fault for fault in caught.value.faults)
    train_run(support.tiny_recipe(root, adapter__targets=["q_proj"], train__steps=1, **UNEVALUATED), tmp_path / "run")
    unnamed = tmp_path / os.fsdecode(b"run\xff")
    with pytest.raises(UserError, match=r"run .*: the name is not UTF-8 text"):
        train_run(support.tiny_recipe(root), unnamed)
    assert not unnamed.exists()


def test_model_without_tokenizer_and_empty_data(tmp_path: Path) -> None:
    recipe = support.tiny_recipe(tmp_path)
    (tmp_path / "data/sums.jsonl").write_text("")
    with pytest.raises(UserError, match=r"data\.mix\[0\]: .*sums\.jsonl"):
        train_run(recipe, tmp_path / "run")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "model" / file).unlink()
    with pytest.raises(UserError, match=r"model\.tokenizer: .* has no tokenizer"):
        train_run(support.tiny_recipe(tmp_path), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_whose_base_and_data_were_moved(tmp_path: Path, whole: Path) -> None:
    """Each command says where to write the new path, and with it goes on as if nothing had been moved."""
    before, now, run = tmp_path / "before", tmp_path / "now", tmp_path / "run"
    train_until(support.tiny_recipe(before), run, 3)
    of_steps = {name for name in FIGURES if not name.startswith("validation")}  # the base alone was evaluated
    assert {each.stem for each in (run / "figures").iterdir()} == of_steps
    shutil.move(before, now)
    file, merged = run / "recipe.yaml", tmp_path / "out"
    for command, number in (
        (lambda: load_run(run), 1),
        (lambda: export_run(run, merged, ExportOptions()), 1),
        (lambda: resumed_recipe(run, str(file), []), 3),
    ):
        with pytest.raises(UserError) as raised:
            command()
        places = {
            "model.source": "model",
            "data.mix[0].source": "data/sums.jsonl",
            "data.mix[1].source": "data/letters.",
        }
        assert len(raised.value.faults) == number
        for fault, (key, place) in zip(raised.value.faults, places.items(), strict=False):
            assert fault.startswith(f"{file}: {key}: no such file or directory, got {before / place}")
            assert fault.endswith(f"Fix: if it was moved, write its new path into {file}.")
    file.write_text(file.read_text().replace(f"{before}/data", f"{now}/data"))
    overrides = [f"model.source={now / 'model'}"]
    with pytest.raises(UserError, match=rf"as when the run started; .* Fix: if it was moved, write .* into {file}\.$"):
        train_run(resumed_recipe(run, str(file), overrides), run, resume=True)
    file.write_text(file.read_text().replace(str(before), str(now)))
    train_run(resumed_recipe(run, str(file), []), run, resume=True)
    same_tensors(run / ADAPTER, whole / ADAPTER)
    export_run(run, merged, ExportOptions())


def chats(tmp_path: Path, **changes: Any) -> Any:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "the cat"}]
    (tmp_path / "chats.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 30)
    mix = [{"source": str(tmp_path / "chats.jsonl")}]
    return support.tiny_recipe(tmp_path, data__mix=mix, data__template_kwargs={"loud": True}, train__steps=2, **changes)


LOUD = "{% if loud is defined and loud %}LOUD{% endif %}"


def test_a_run_keeps_its_chat_template(tmp_path: Path) -> None:
    """data.chat_template and template_kwargs reach training, the loaded run and its exports; the file may change."""
    file = tmp_path / "mine.jinja"
    file.write_text(LOUD + support.CHATML)
    recipe = chats(tmp_path, data__chat_template=str(file))
    train_until(recipe, tmp_path / "run", 1)
    assert json.loads((tmp_path / "run/environment.json").read_text())["has_chats"] is True
    before = file.read_text()
    file.write_text(support.CHATML + "{% if loud is defined %}{% endif %}")
    with pytest.raises(UserError, match=r"data.chat_template differs from .*run/chat_template.jinja, with which the r"):
        train_run(recipe, tmp_path / "run", resume=True)
    file.write_text(before)
    train_run(recipe, tmp_path / "run", resume=True)
    file.unlink()
    shutil.move(tmp_path / "run", tmp_path / "moved")
    tokenizer = load_run(tmp_path / "moved").tokenizer
    assert prompt_text(tokenizer, (Turn("user", "Hi"),)).startswith("LOUD<|im_start|>user")
    assert tokenizer.chat_template == before


def test_a_run_keeps_the_date_of_its_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chat template that prints the date: resumed and evaluated on another day, the run reads what it learnt from."""
    model, run = support.write_llama(tmp_path / "model"), tmp_path / "run"
    dated = "{{ strftime_now('%d %b %Y') }}" + LOUD + support.CHATML
    support.tokenizer(chat_template=dated).save_pretrained(model)
    recipe = chats(tmp_path)

    class Calendar(date):
        day = "2026-02-28"

        @classmethod
        def today(cls) -> date:
            return date.fromisoformat(cls.day)

    monkeypatch.setattr(run_directory, "date", Calendar)
    train_until(recipe, run, 1)
    assert json.loads((run / "environment.json").read_text())["chat_date"] == "2026-02-28"
    Calendar.day = "2026-03-01"
    train_run(recipe, run, resume=True)
    scored = evaluate_target(str(run))["evaluation"]["average"]["nll_per_token"]
    assert scored == pytest.approx(nll(run, 2), rel=1e-6)
    assert prompt_text(load_run(run).tokenizer, (Turn("user", "Hi"),)).startswith("28 Feb 2026LOUD")
    base = evaluate_target(str(run), EvalOptions(base_only=True))["evaluation"]
    alone = evaluate_target(str(model), EvalOptions(like=run, quant="nf4"))["evaluation"]
    assert alone["average"]["nll_per_token"] == pytest.approx(base["average"]["nll_per_token"], rel=2e-4)  # bf16
