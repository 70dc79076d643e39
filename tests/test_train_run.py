"""Whole runs on a tiny model: resumed equals uninterrupted, nothing is lost, every failure is one clear line."""

from __future__ import annotations

import io
import json
import math
import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import nullcontext
from datetime import date
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

from qdora.cli import app
from qdora.data.chat_template import prompt_text
from qdora.data.messages import Turn
from qdora.errors import Interrupted, RunFailure, UserError
from qdora.export.export_run import export_run
from qdora.export.options import ExportOptions
from qdora.files import run_directory
from qdora.files.run_directory import open_run, write_complete
from qdora.recipe.recipe_file import resolved_yaml
from qdora.recipe.settings import Recipe
from qdora.run.evaluate import EvalOptions, evaluate_target
from qdora.run.load_run import load_run, load_target
from qdora.run.open_directory import resumed_recipe
from qdora.run.train import train_run
from qdora.train import passes
from qdora.train.checkpoint import read_state
from tests import tiny_run, tiny_tokenizer
from tests.launched import start_command
from tests.run_files import assert_same_run, make_gradients_nan, same_tensors, stop_after, timeless, trained

FIGURES = {"loss_per_task", "steps", "validation_nll", "validation_accuracy"}


def start_magnitudes(root: Path) -> dict[str, torch.Tensor]:
    """The magnitudes before the first step, by their name in an adapter file."""
    from qdora.model.build_model import choose_compute, find_model, put_adapters
    from qdora.run.load_base import load_base

    recipe = tiny_run.recipe(root)
    base = load_base(recipe, find_model(recipe)[0], choose_compute("float32"))
    put_adapters(base, recipe)
    return {
        f"base_model.model.{name.removesuffix('.magnitude')}.lora_magnitude_vector": p.detach()
        for name, p in base.named_parameters()
        if name.endswith("magnitude")
    }


def test_a_run_leaves_what_the_design_says(whole: Path) -> None:
    for name in ("recipe.yaml", "environment.json", "metrics.jsonl", "log.txt", "adapter/adapter_config.json"):
        assert (whole / name).is_file(), name
    assert {each.stem for each in (whole / "figures").iterdir()} == FIGURES
    assert sorted(each.name for each in (whole / "checkpoints").iterdir()) == ["step-4", "step-6"]
    assert [(line["step"], "eval" in line) for line in timeless(whole)] == [
        (0, True),
        *((step, False) for step in range(1, 7)),
        (6, True),
    ]
    for line in trained(whole):
        assert set(line["tasks"]) <= {"sums", "letters"}
        total = sum(task["nll_sum"] for task in line["tasks"].values())
        assert line["loss"] == pytest.approx(total / line["num_label_tokens"], rel=1e-9)
        assert sum(task["num_tokens"] for task in line["tasks"].values()) == line["num_label_tokens"]
        assert line["num_examples"] == 4
    first, last = (json.loads((whole / f"eval/step-{step}.json").read_text()) for step in (0, 6))
    assert last["average"]["nll_per_token"] < first["average"]["nll_per_token"]
    assert sorted(first["tasks"]) == ["letters", "sums"]
    card = (whole / "README.md").read_text()
    assert "dora, rank 4, alpha 8" in card
    assert f"{last['tasks']['sums']['nll_per_token']:.4f}" in card


@pytest.mark.parametrize("stop_at", [1, pytest.param(3, marks=pytest.mark.figures), 4])
def test_interrupted_and_resumed_equals_uninterrupted_bit_for_bit(
    root: Path, whole: Path, tmp_path: Path, stop_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_run.recipe(root)
    stop_after(monkeypatch, stop_at)
    with pytest.raises(Interrupted, match=rf"stopped after step {stop_at}; saved to .*step-{stop_at}"):
        train_run(recipe, tmp_path / "run")
    if stop_at == 3:
        of_steps = {name for name in FIGURES if not name.startswith("validation")}  # the base alone was evaluated
        assert {each.stem for each in (tmp_path / "run/figures").iterdir()} == of_steps
    monkeypatch.undo()
    torch.manual_seed(999)  # a resume must not depend on the process's generator
    train_run(recipe, tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", whole)


def test_a_finished_run_can_be_resumed_and_stays_the_same(root: Path, tmp_path: Path) -> None:
    recipe = tiny_run.recipe(root, train__steps=2)
    train_run(recipe, tmp_path / "run")
    before = (tmp_path / "run/adapter/adapter_model.safetensors").read_bytes()
    train_run(recipe, tmp_path / "run", resume=True)
    train_run(tiny_run.recipe(root, train__steps=2, model__attention="eager"), tmp_path / "run", resume=True)
    assert (tmp_path / "run/adapter/adapter_model.safetensors").read_bytes() == before
    with pytest.raises(
        UserError,
        match=r"train\.seed: must be 0, as when the run started; to change it, start another --run-dir \(got 5\)",
    ):
        train_run(tiny_run.recipe(root, train__steps=2, train__seed=5), tmp_path / "run", resume=True)


CONSTANT = {"train__schedule": "constant"}


@pytest.fixture(scope="module")
def longer(root: Path) -> Path:
    """A run of nine steps, two of them with a growing rate."""
    train_run(tiny_run.recipe(root, train__steps=9, train__warmup=2, **CONSTANT), root / "longer")
    return root / "longer"


@pytest.mark.parametrize("stop_at", [None, 1, 3])
def test_a_run_is_extended_as_if_it_had_been_longer_from_the_start(
    root: Path, longer: Path, tmp_path: Path, stop_at: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Constant rate, bit for bit. The warm-up, a share of all steps, stays that of the start: 2 steps."""
    if stop_at is not None:
        stop_after(monkeypatch, stop_at)
    with nullcontext() if stop_at is None else pytest.raises(Interrupted):
        train_run(tiny_run.recipe(root, **CONSTANT), tmp_path / "run")
    monkeypatch.undo()
    summary = train_run(tiny_run.recipe(root, train__steps=9, **CONSTANT), tmp_path / "run", resume=True)
    assert summary["num_steps"] == 9
    assert trained(tmp_path / "run") == trained(longer)
    same_tensors(*(run / "adapter/adapter_model.safetensors" for run in (tmp_path / "run", longer)))
    states = [(run / "checkpoints/step-9/state.json").read_text() for run in (tmp_path / "run", longer)]
    assert states[0] == states[1]
    assert "steps: 9" in (tmp_path / "run/recipe.yaml").read_text()


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_an_extended_run_continues_at_the_rates_of_the_longer_schedule(
    root: Path, tmp_path: Path, schedule: str
) -> None:
    changes = {"train__schedule": schedule, "train__lr_end": 1e-4}
    train_run(tiny_run.recipe(root, **changes), tmp_path / "run")
    train_run(tiny_run.recipe(root, train__steps=10, **changes), tmp_path / "run", resume=True)

    def rate(step: int, num_steps: int) -> float:  # warm-up over steps 0 and 1
        done = (step - 2) / (num_steps - 2)
        share = 1 - done if schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
        return (0.5e-3, 1e-3)[step] if step < 2 else 1e-4 + 9e-4 * share

    rates = [line["lr"] for line in trained(tmp_path / "run")]
    assert rates == pytest.approx([rate(step, 6 if step < 6 else 10) for step in range(10)])
    said = f"The run has 10 steps now, 6 before: from step 7 on the learning rate is that of a {schedule} schedule of "
    assert f"{said}10 steps with the old warm-up, {rates[6]:.3g} at first." in (tmp_path / "run/log.txt").read_text()


def test_a_run_is_extended_by_epochs(root: Path, tmp_path: Path) -> None:
    changes = {"train__steps": ..., "train__batch": 26, "eval__tasks": [], "eval__limit": ...}
    train_run(tiny_run.recipe(root, train__epochs=1, **changes), tmp_path / "run")
    before = trained(tmp_path / "run")
    train_run(tiny_run.recipe(root, train__epochs=2, **changes), tmp_path / "run", resume=True)
    lines = trained(tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]  # of 50 examples, 28 sums and 22 letters
    assert lines[:2] == before
    assert "epochs: 2" in (tmp_path / "run/recipe.yaml").read_text()
    with pytest.raises(UserError, match=r"train\.epochs: must be 2\.0 or more, as when the run started; .*got 1\.0"):
        train_run(tiny_run.recipe(root, train__epochs=1, **changes), tmp_path / "run", resume=True)


def test_a_run_is_not_shortened(root: Path, whole: Path) -> None:
    said = r"train\.steps: must be 6 or more, as when the run started; .*\(got 5\)"
    with pytest.raises(UserError, match=said):
        train_run(tiny_run.recipe(root, train__steps=5), whole, resume=True)


@pytest.mark.parametrize(
    ("file", "damage", "fault"),
    [
        (
            "state.json",
            lambda text: text.replace(b'"micro_batch_tokens"', b'"tokens"'),
            "KeyError: 'micro_batch_tokens'",
        ),
        ("state.json", lambda text: text.replace(b'"loader"', b'"reader"'), "KeyError: 'loader'"),
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
        train_run(tiny_run.recipe(root), tmp_path / "run", resume=True)
    assert str(newest.path) in str(raised.value)
    assert len(raised.value.faults) == 1


@pytest.mark.parametrize("draws", [True, False])
def test_another_number_of_processes_is_told_where_steps_draw(
    whole: Path, caplog: pytest.LogCaptureFixture, draws: bool
) -> None:
    newest = open_run(whole).newest_checkpoint()
    assert newest is not None
    options: dict[str, Any] = {"processes": Mock(size=4, rank=3), "seed": 1, "draws": draws}
    read_state(newest.path, optimizer=Mock(), load_loader=Mock(), **options)
    assert ("from 1 processes, this run has 4: same data, different dropout." in caplog.text) == draws


def test_data_that_changed_is_refused_on_resume_and_nothing_is_rewritten(root: Path, tmp_path: Path) -> None:
    def written() -> dict[str, bytes]:
        return {
            name: (tmp_path / "run" / name).read_bytes() for name in ("recipe.yaml", "mix.json", "environment.json")
        }

    longer, recipe = (tiny_run.recipe(tmp_path, train__steps=steps) for steps in (4, 2))
    train_run(recipe, tmp_path / "run")
    sums, before = tmp_path / "data/sums.jsonl", written()
    sums.write_text(sums.read_text() + '{"prompt": "9 + 9 =", "completion": " 18"}\n')
    with pytest.raises(UserError, match=r"^--resume: source sums differs from the data of the checkpoint"):
        train_run(longer, tmp_path / "run", resume=True)
    assert written() == before


def test_magnitudes_move_in_bf16_storage_and_the_base_does_not(root: Path, whole: Path) -> None:
    trained = load_file(whole / "adapter/adapter_model.safetensors")
    magnitudes = {name: tensor for name, tensor in trained.items() if name.endswith("lora_magnitude_vector")}
    assert len(magnitudes) == 14
    assert all(tensor.dtype == torch.float32 for tensor in magnitudes.values())
    assert all(tensor.dtype == torch.bfloat16 for name, tensor in trained.items() if name not in magnitudes)
    start = start_magnitudes(root)
    assert len(start) == 14
    for name, value in start.items():
        assert (magnitudes[name] != value).float().mean() >= 0.99, name


def test_rates_of_the_parts_and_the_end_of_the_schedule_reach_the_optimizer(root: Path, tmp_path: Path) -> None:
    """Two steps of Lion, each of which moves an entry by its rate, up or down, or not at all."""
    rates = {"lr": 1e-3, "lr_end": 5e-4, "warmup": 0, "lr_ratio_B": 4.0, "lr_ratio_magnitude": 0.5}
    changes = {f"train__{key}": value for key, value in rates.items()}
    recipe = tiny_run.recipe(root, **changes, train__steps=2, train__optimizer="lion", eval__tasks=[], eval__limit=...)
    train_run(recipe, tmp_path / "run")
    assert [line["lr"] for line in timeless(tmp_path / "run")] == pytest.approx([1e-3, 7.5e-4])
    trained = load_file(tmp_path / "run/adapter/adapter_model.safetensors")
    magnitudes = start_magnitudes(root)
    for part, ratio, atol in (("lora_B.weight", 4.0, 7e-3 / 2**8), ("lora_magnitude_vector", 0.5, 1e-6)):  # B in bf16
        steps = {ratio * (first * 1e-3 + second * 7.5e-4) for first in (-1, 0, 1) for second in (-1, 0, 1)}
        names = [name for name in trained if name.endswith(part)]
        assert len(names) == 14
        for name in names:
            way = trained[name].double() - magnitudes.get(name, torch.zeros(())).double()
            assert float(torch.stack([(way - step).abs() for step in steps]).amin(dim=0).max()) < atol, name
            assert float(way.abs().max()) == pytest.approx(ratio * 1.75e-3, rel=0.01), name


def test_nan_loss_stops_with_the_state_before_it_and_the_batch(
    root: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_run.recipe(root)
    real, calls = passes.batch_loss, {"n": 0}

    def poisoned(*args: Any, **settings: Any) -> Any:
        result = real(*args, **settings)
        calls["n"] += 1
        if calls["n"] == 4:
            return type(result)(result.nll_sum * float("nan"), result.example_nll * float("nan"), result.example_tokens)
        return result

    monkeypatch.setattr(passes, "batch_loss", poisoned)
    with pytest.raises(RunFailure, match=r"step 4: loss nan is not finite.*Safe on disk: .*step-3, .*bad-steps/step-4"):
        train_run(recipe, tmp_path / "run")
    kept = json.loads((tmp_path / "run/bad-steps/step-4/batch.json").read_text())
    assert len(kept["examples"]) == 4
    monkeypatch.undo()
    train_run(recipe, tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.parametrize("kind", ["lora", "full", "none"])
def test_other_arms_run_evaluate_and_export(root: Path, tmp_path: Path, kind: str) -> None:
    changes: dict[str, Any] = {"adapter__kind": kind}
    if kind in ("full", "none"):
        changes |= {f"adapter__{key}": ... for key in ("rank", "alpha", "dropout")}
    if kind == "full":
        changes |= {"base__quant": "none", "train__steps": 3}
    if kind == "none":
        changes |= {"train__steps": 0, "train__checkpoint_every": ...}
    train_run(tiny_run.recipe(root, **changes), tmp_path / "run")
    document = evaluate_target(str(tmp_path / "run"))
    assert document["label"] == {"lora": "final", "full": "final", "none": "base"}[kind]
    exported = export_run(tmp_path / "run", tmp_path / "merged", ExportOptions(dtype="float32"))
    assert exported["verification"]["passed"]
    assert exported["num_merged_layers"] == (14 if kind == "lora" else 0)
    if kind == "full":
        started = json.loads((tmp_path / "run/eval/step-0.json").read_text())["average"]["nll_per_token"]
        assert document["evaluation"]["average"]["nll_per_token"] < started


def test_full_fine_tuning_resumes_bit_for_bit(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes: dict[str, Any] = {f"adapter__{key}": ... for key in ("rank", "alpha", "dropout")}
    changes |= {"adapter__kind": "full", "base__quant": "none", "train__steps": 3, "train__checkpoint_every": 1}
    changes |= {"model__dtype": "bfloat16", "eval__at_start": False, "eval__at_end": False, "eval__limit": ...}
    recipe = tiny_run.recipe(root, **changes)
    train_run(recipe, tmp_path / "whole")
    stop_after(monkeypatch, 2)
    with pytest.raises(Interrupted):
        train_run(recipe, tmp_path / "run")
    monkeypatch.undo()
    train_run(recipe, tmp_path / "run", resume=True)
    same_tensors(tmp_path / "whole/adapter/parameters.safetensors", tmp_path / "run/adapter/parameters.safetensors")
    assert timeless(tmp_path / "whole") == timeless(tmp_path / "run")


def test_export_equals_the_running_model_and_evaluates_alike(whole: Path, tmp_path: Path) -> None:
    exported = export_run(whole, tmp_path / "merged", ExportOptions(dtype="float32"))
    check = exported["verification"]
    assert check["passed"]
    assert check["exported_vs_running"]["max_logit_difference"] < 1e-4
    assert json.loads((tmp_path / "merged/export.json").read_text()) == json.loads(json.dumps(exported))
    merged = evaluate_target(str(tmp_path / "merged"), EvalOptions(like=whole))["evaluation"]["average"]
    run = evaluate_target(str(whole))["evaluation"]["average"]
    assert merged["nll_per_token"] == pytest.approx(run["nll_per_token"], rel=0.05)
    adapter = export_run(whole, tmp_path / "adapter", ExportOptions(format_="peft"))
    assert adapter["format"] == "peft"
    same_tensors(tmp_path / "adapter/adapter_model.safetensors", whole / "adapter/adapter_model.safetensors")


def test_no_task_to_evaluate_means_no_evaluation(root: Path, tmp_path: Path) -> None:
    recipe = tiny_run.recipe(root, train__steps=1, eval__tasks=[], eval__limit=...)
    assert train_run(recipe, tmp_path / "run")["evaluations"] == {}
    assert not (tmp_path / "run/eval").exists()


def test_eval_uses_the_tasks_of_the_run_and_keeps_what_is_asked_beside_it(root: Path, tmp_path: Path) -> None:
    """`block` decides which examples a limit takes."""
    changes: dict[str, Any] = {"eval__tasks": ["letters"], "eval__block": 1, "data__validation_fraction": 0.5}
    train_run(tiny_run.recipe(root, **changes, train__steps=1), tmp_path / "run")
    assert evaluate_target(str(tmp_path / "run"))["evaluation"]["tasks"].keys() == {"letters"}
    file = tmp_path / "run/eval/final-validation.json"
    own = json.loads(file.read_text())["per_example"]
    evaluate_target(str(tmp_path / "run"), EvalOptions(limit=4, tasks=["letters"]))  # the same question
    for options in (EvalOptions(limit=2), EvalOptions(tasks=["sums"]), EvalOptions(tasks=["demo/facts"], limit=1)):
        evaluate_target(str(tmp_path / "run"), options)
    assert json.loads(file.read_text())["per_example"] == own
    kept = sorted(file.name.removeprefix("final-") for file in (tmp_path / "run/eval").glob("final-*"))
    own_and_others = ["validation-demo-facts-limit-1", "validation-limit-2", "validation-sums", "validation"]
    assert kept == sorted(f"{name}.json" for name in own_and_others)
    text = tmp_path / "a text.txt"
    text.write_text("the quick brown fox")
    found = evaluate_target(str(tmp_path / "run"), EvalOptions(texts=[text]))["perplexity"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other/a text.txt").write_text("over the lazy dog")
    other = evaluate_target(str(tmp_path / "run"), EvalOptions(texts=[tmp_path / "other/a text.txt"]))["perplexity"]
    files = (tmp_path / "run/eval").glob("final-perplexity-a-text.txt-*")
    kept_texts = [json.loads(file.read_text()) for file in files]
    assert len(kept_texts) == 2  # of two files with one name
    assert found | {"step": 1, "texts": [str(text)]} in kept_texts
    assert other | {"step": 1, "texts": [str(tmp_path / "other/a text.txt")]} in kept_texts


def test_a_text_that_cannot_be_read_is_told_before_the_model_is_loaded(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qdora.run.evaluate.load_target", lambda *_, **__: pytest.fail("loaded"))
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "empty.txt").write_text("")
    for name, fault in (("latin", "not UTF-8 text"), ("empty", "the file is empty")):
        with pytest.raises(UserError, match=f"{name}.txt: {fault}"):
            evaluate_target(str(whole), EvalOptions(tasks=["letters"], texts=[tmp_path / f"{name}.txt"]))


def test_going_on_from_an_adapter_starts_where_it_ended(root: Path, whole: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {f"adapter__{key}": ... for key in ("rank", "alpha")}
    recipe = tiny_run.recipe(root, **changes, adapter__resume_from=str(whole / "adapter"), train__steps=1)
    summary = train_run(recipe, tmp_path / "run")
    assert list(summary["evaluations"]) == ["start", "adapter"]
    card = (tmp_path / "run/README.md").read_text()
    assert "| starts from | an earlier adapter |" in card
    assert "<dt>starts from</dt><dd>an earlier adapter</dd>" in (tmp_path / "run/report.html").read_text()
    assert "starts from" not in (whole / "README.md").read_text()
    before, after = (
        json.loads((path).read_text())["average"]["nll_per_token"]
        for path in (whole / "eval/step-6.json", tmp_path / "run/eval/step-0.json")
    )
    assert after == before
    assert "was trained on" not in (tmp_path / "run/log.txt").read_text()


def test_going_on_on_another_base_is_warned_of(root: Path, whole: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {f"adapter__{key}": ... for key in ("rank", "alpha")}
    changes |= {"adapter__resume_from": str(whole / "adapter"), "eval__at_start": False, "eval__at_end": False}
    changes |= {"eval__limit": ..., "train__steps": 1}
    other = tiny_run.recipe(tmp_path, **changes, base__quant="int8", base__double_quant=...)
    train_run(other, tmp_path / "run")
    before, now = (
        f"{root / 'model'} (quant nf4, block_size 64, double_quant True)",
        f"{tmp_path / 'model'} (quant int8)",
    )
    text = f"the adapter in {whole / 'adapter'} was trained on {before}, and this run puts it on {now}. It may not fit."
    assert text in (tmp_path / "run/log.txt").read_text()


@pytest.mark.parametrize("setting, chunk", [("auto", None), (3, 3)])
def test_the_recipe_says_how_many_tokens_have_logits_at_once(
    root: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: Any, chunk: int | None
) -> None:
    real, chunks = passes.batch_loss, []

    def spying(*args: Any, **settings: Any) -> Any:
        chunks.append(settings["chunk"])
        return real(*args, **settings)

    monkeypatch.setattr(passes, "batch_loss", spying)
    train_run(
        tiny_run.recipe(root, memory__loss_chunk=setting, train__steps=2, eval__tasks=[], eval__limit=...), tmp_path
    )
    assert chunks
    assert set(chunks) == {chunk}
    assert timeless(tmp_path)[0]["loss"] == pytest.approx(trained(whole)[0]["loss"], rel=1e-6)


def test_after_a_nan_the_learning_rate_may_be_lowered(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_gradients_nan(monkeypatch)
    with pytest.raises(RunFailure, match=r"step 1: gradient norm nan is not finite"):
        train_run(tiny_run.recipe(root), tmp_path / "run")
    monkeypatch.undo()
    summary = train_run(tiny_run.recipe(root, train__lr=1e-4), tmp_path / "run", resume=True)
    assert summary["num_steps"] == 6


def test_a_mistake_that_shows_late_does_not_block_the_corrected_start(root: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="q_porj"):
        train_run(tiny_run.recipe(root, adapter__targets=["q_porj"]), tmp_path / "run")
    train_run(tiny_run.recipe(root, adapter__targets=["q_proj"], train__steps=1), tmp_path / "run")


def test_a_terminal_shows_a_bar_while_it_trains_and_evaluates(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    console = Console(force_terminal=True, width=120, file=io.StringIO())
    monkeypatch.setattr("qdora.files.console.shows_bars", lambda _: True)
    monkeypatch.setattr("qdora.train.progress.shows_bars", lambda _: True)
    recipe = tiny_run.recipe(root, train__steps=2, eval__every=1)
    train_run(recipe, tmp_path / "run", console=console)
    assert "step 2/2" in console.file.getvalue()  # type: ignore[attr-defined]
    assert [line["step"] for line in timeless(tmp_path / "run")] == [0, 1, 1, 2, 2]


def test_a_run_that_cannot_be_written_is_evaluated(
    whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run, text = tmp_path / "run", tmp_path / "t.txt"
    shutil.copytree(whole, run, ignore=shutil.ignore_patterns("eval"))
    (run / "eval").write_text("in the way")
    text.write_text("the quick brown fox")
    found = evaluate_target(str(run), EvalOptions(tasks=["letters"], limit=1, texts=[text]))
    assert found["evaluation"]["tasks"]["letters"]["num_examples"] == 1
    assert found["perplexity"]["num_tokens"] > 0
    warnings = [each.message for each in caplog.records if "was not written" in each.message]
    assert len(warnings) == 2
    assert f"{run}/eval/final-validation-letters-limit-1.json was not written: " in warnings[0]


def test_the_label_of_the_working_directory(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root_model(whole))
    assert load_target(".", verb="eval").label == "model"


def test_a_run_in_place_of_a_recipe_is_continued(
    whole: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not runs/<its name>, which may be another run."""
    shutil.copytree(whole, tmp_path / "elsewhere/one")
    monkeypatch.chdir(tmp_path)
    steps = tiny_run.recipe(root).train.steps
    call = ["train", "elsewhere/one", "-s", f"train.steps={(steps or 0) + 1}"]
    refused = CliRunner().invoke(app, call)
    assert refused.exit_code == 2
    assert refused.stderr.startswith("elsewhere/one: is a run. Fix: continue it with --resume")
    done = CliRunner().invoke(app, [*call, "--resume"])
    assert done.exit_code == 0, done.stderr
    assert "continues with its own" not in done.stderr
    assert open_run(tmp_path / "elsewhere/one").last_step() == (steps or 0) + 1
    assert not (tmp_path / "runs").exists()


def test_a_name_that_is_no_text_is_refused_at_the_start(root: Path, tmp_path: Path) -> None:
    run = tmp_path / os.fsdecode(b"run\xff")
    with pytest.raises(UserError, match=r"run .*: the name is not UTF-8 text\. Fix: choose another --run-dir"):
        train_run(tiny_run.recipe(root), run)
    assert not run.exists()


def test_splits_that_a_source_does_not_have_are_refused(whole: Path, root: Path) -> None:
    with pytest.raises(UserError, match="--split: sums has no test split"):
        evaluate_target(str(whole), EvalOptions(split="test"))
    shown = evaluate_target(str(whole), EvalOptions(split="train", limit=3))["evaluation"]["tasks"]
    assert {task: row["num_examples"] for task, row in shown.items()} == {"sums": 3, "letters": 3}


def test_options_that_would_do_nothing_are_refused(whole: Path, tmp_path: Path) -> None:
    text = tmp_path / "t.txt"
    text.write_text("the quick brown fox")
    for options, message in (
        ({"like": whole}, "--like"),
        ({"step": 4, "base_only": True}, "--step: is not used with --base"),
        ({"texts": [tmp_path / "nowhere.txt"]}, "nowhere.txt: No such file"),
        ({"split": "tset"}, "--split: got 'tset', must be one of validation, test, train.*Did you mean 'test'"),
        ({"quant": "nf4"}, "--quant"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate_target(str(whole), EvalOptions(**options))  # type: ignore[arg-type]
    for model_options, message in (
        (EvalOptions(texts=[text], limit=3), "--limit: counts examples of tasks, got only --text"),
        (EvalOptions(), "is not a run .*Fix: add --tasks, --data, --text, --harness or --like RUN"),
        (EvalOptions(texts=[text], step=2), "--step and --base are used only with a run"),
        (EvalOptions(texts=[text], quant="nf44"), "--quant: got 'nf44', must be one of nf4, fp4, int8"),
        (EvalOptions(tasks=["boolqq"]), "--tasks: got 'boolqq', must be one of .*Did you mean 'boolq'"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate_target(str(root_model(whole)), model_options)
    with pytest.raises(UserError, match=r"modell does not exist\..* 'model'"):
        evaluate_target(f"{root_model(whole)}l")
    document = evaluate_target(str(root_model(whole)), EvalOptions(texts=[text]))
    found = document["perplexity"]
    assert found["num_tokens"] > 3
    assert found["perplexity"] == pytest.approx(math.exp(found["nll_sum"] / found["num_tokens"]))
    assert found["nll_per_byte"] == pytest.approx(found["nll_sum"] / len(text.read_bytes()))


def root_model(run: Path) -> Path:
    return run.parent / "model"


def test_a_checkpoint_is_evaluated_and_exported_with_its_own_numbers(root: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train_run(tiny_run.recipe(root, train__steps=4, eval__every=2), run)
    assert evaluate_target(str(run), EvalOptions(step=2))["label"] == "step-2"
    exported = export_run(run, tmp_path / "out", ExportOptions(dtype="float32", step=2))
    assert exported["state"] == "step-2"
    card = (tmp_path / "out/README.md").read_text()
    numbers = json.loads((run / "eval/step-2.json").read_text())["tasks"]["sums"]["nll_per_token"]
    assert f"{numbers:.4f}" in card
    assert "step-2" in card
    assert "| steps | 2 of 4 |" in card
    assert re.search(r"^- sums \(\d+ draws of 28 examples in all steps\)$", card, re.MULTILINE)
    assert "| steps | 4 of 4 |" in (run / "README.md").read_text()


def test_export_and_other_tasks_work_when_the_data_is_gone(tmp_path: Path) -> None:
    train_run(tiny_run.recipe(tmp_path, train__steps=1), tmp_path / "run")
    (tmp_path / "data/sums.jsonl").unlink()
    assert list(evaluate_target(str(tmp_path / "run"), EvalOptions(tasks=["letters"]))["evaluation"]["tasks"]) == [
        "letters"
    ]
    assert export_run(tmp_path / "run", tmp_path / "out", ExportOptions(dtype="float32"))["verification"]["passed"]
    with pytest.raises(UserError, match="is not empty"):
        export_run(tmp_path / "run", tmp_path / "out")


def run_command(*arguments: str, output: Path) -> int | None:
    process = start_command(*arguments, output=output)
    process.join(120)
    return process.exitcode


def write_recipe(path: Path, recipe: Recipe) -> Path:
    path.write_text(resolved_yaml(recipe))
    return path


def test_a_run_resumes_with_its_own_settings(root: Path, tmp_path: Path) -> None:
    """The options of the start need not be repeated; where the file differs, a line tells it."""
    template = tmp_path / "t.jinja"
    template.write_text(tiny_tokenizer.CHATML)
    changes: dict[str, Any] = {"train__steps": 2, "data__chat_template": str(template), "eval__at_start": False}
    recipe = tiny_run.recipe(root, **changes)
    file, run, model = tmp_path / "r.yaml", tmp_path / "run", recipe.model.source

    def command(*words: str) -> Result:
        return CliRunner().invoke(app, ["train", str(file), "--run-dir", str(run), *words])

    file.write_text(resolved_yaml(recipe).replace(model, "nobody/nothing"))
    own = ("-s", f"model.source={model}", "-s", "train.lr=0.5", "-s", "train.seed=3")
    assert command(*own, "--resume").stderr.startswith(f"{run}: no such directory")  # before the model is looked for
    assert command(*own).exit_code == 0
    before = (run / "recipe.yaml").read_text()
    done = command("--resume")
    assert done.exit_code == 0, done.stderr
    assert done.stderr.splitlines()[0] == (
        f"{run} continues with its own recipe.yaml, which differs from {file} in model.source (the run: {model!r}, "
        f"{file}: 'nobody/nothing'), train.lr (the run: 0.5, {file}: 0.001), train.seed (the run: 3, {file}: 0). "
        "`qdora guide runs` names the settings that -s can change."
    )
    assert (run / "recipe.yaml").read_text() == before
    assert command(*own, "--resume", "-s", "train.steps=3").exit_code == 0
    assert open_run(run).last_step() == 3
    assert "differs" not in command(*own, "--resume", "-s", "train.steps=3").stderr
    assert "train.seed: must be 3, as when the run started" in command("--resume", "-s", "train.seed=4").stderr
    # options of the start that another one needs are not given again; a recipe that is not valid alone is not compared
    file.write_text("model: {source: 3}\n")
    done = command("--resume", "-s", "train.steps=3")
    assert done.exit_code == 0, done.stderr
    assert f"{file} is not compared with it: {file}: model.source: " in done.stderr
    # a run of a release without a setting resumes with its default, and not with another value
    kept = (run / "recipe.yaml").read_text()
    older = kept.replace("  packing: false\n", "")
    assert older != kept
    (run / "recipe.yaml").write_text(older)
    assert "data.packing: must be False, as when" in command("--resume", "-s", "data.packing=true").stderr
    done = command("--resume")
    assert done.exit_code == 0, done.stderr
    assert (run / "recipe.yaml").read_text() == kept


def test_ctrl_c_saves_and_exits_with_130(root: Path, tmp_path: Path) -> None:
    file = write_recipe(tmp_path / "long.yaml", tiny_run.recipe(root, train__steps=5000, train__checkpoint_every=...))
    changes = ("-s", "train.lr=1e-3", "-s", "data.mix[0].limit=20")
    process = start_command("train", str(file), "-d", str(tmp_path / "run"), *changes, output=tmp_path)
    metrics = tmp_path / "run/metrics.jsonl"
    while process.is_alive() and not (metrics.exists() and trained(tmp_path / "run")):
        time.sleep(0.01)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGINT)
    process.join(120)
    errors = (tmp_path / "stderr").read_text()
    assert process.exitcode == 130, errors
    again = f"qdora train {file} -s train.lr=1e-3 -s 'data.mix[0].limit=20' --run-dir {tmp_path / 'run'} --resume"
    assert errors.splitlines()[-1].endswith(f". Continue with: {again}")
    assert "Traceback" not in errors
    newest = open_run(tmp_path / "run").newest_checkpoint()
    assert newest is not None
    assert newest.step == len(trained(tmp_path / "run"))


def test_8_bit_states_on_a_cpu_are_told_to_be_slow(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("adamw", "paged_adamw_8bit"):
        recipe = tiny_run.recipe(tmp_path, train__steps=1, train__optimizer=name, eval__at_start=False)
        train_run(recipe, tmp_path / name)
    (said,) = [each for each in caplog.messages if "slow" in each]
    assert said == "train.optimizer paged_adamw_8bit is slow on a CPU; adamw is faster."


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("wrong type", {"adapter__rank": "many"}, r"adapter\.rank: .*many"),
    ("missing file", {"data__mix": [{"source": "/nowhere/x.jsonl"}]}, r"data\.mix\[0\].*/nowhere/x\.jsonl"),
    ("too long", {"data__max_length": 4}, r"sums: .*longest.*data\.max_length"),
    ("target", {"adapter__targets": ["q_porj"]}, r"adapter\.targets: 'q_porj' matches no .*Did you mean 'q_proj'"),
    ("rank", {"adapter__rank": 100}, r"adapter\.rank: must be at most 32 for layer .*got 100"),
    ("eval task", {"eval__tasks": ["letters", "sum"]}, r"eval\.tasks\[1\]: .*'sum'.*Did you mean 'sums'"),
]


@pytest.mark.parametrize("name, changes, message", BAD, ids=[each[0] for each in BAD])
def test_bad_input_is_one_clear_line(
    root: Path, tmp_path: Path, name: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        train_run(tiny_run.recipe(root, **changes), tmp_path / "run")
    assert all("\n" not in fault for fault in caught.value.faults)


def test_model_without_tokenizer_and_empty_data(tmp_path: Path) -> None:
    recipe = tiny_run.recipe(tmp_path)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "model" / file).unlink()
    with pytest.raises(UserError, match=r"model\.tokenizer: .* has no tokenizer"):
        train_run(recipe, tmp_path / "run")
    recipe = tiny_run.recipe(tmp_path / "other")
    (tmp_path / "other/data/sums.jsonl").write_text("")
    with pytest.raises(UserError, match=r"data\.mix\[0\]: .*sums\.jsonl"):
        train_run(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_whose_base_and_data_were_moved(tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each command says where to write the new path, and with it goes on as if nothing had been moved."""
    before, now, run = tmp_path / "before", tmp_path / "now", tmp_path / "run"
    recipe = tiny_run.recipe(before)
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(Interrupted):
            train_run(recipe, run)
    shutil.move(before, now)
    file = run / "recipe.yaml"

    def moved(key: str, path: Path) -> str:
        fix = f"Fix: if it was moved, write its new path into {file}."
        return f"{file}: {key}: no such file or directory, got {path}. {fix}"

    base = moved("model.source", before / "model")
    data = [moved(f"data.mix[{i}].source", before / f"data/{name}.jsonl") for i, name in enumerate(("sums", "letters"))]
    for command in (lambda: load_run(run), lambda: export_run(run, tmp_path / "out", ExportOptions())):
        with pytest.raises(UserError) as raised:
            command()
        assert raised.value.faults == (base,)
    with pytest.raises(UserError) as raised:
        resumed_recipe(run, str(file), [])
    assert raised.value.faults == (base, *data)
    file.write_text(file.read_text().replace(f"{before}/data", f"{now}/data"))
    overrides = [f"model.source={now / 'model'}"]
    with pytest.raises(UserError, match=rf"as when the run started; .* Fix: if it was moved, write .* into {file}\.$"):
        train_run(resumed_recipe(run, str(file), overrides), run, resume=True)
    file.write_text(file.read_text().replace(str(before), str(now)))
    train_run(resumed_recipe(run, str(file), []), run, resume=True)
    same_tensors(run / "adapter/adapter_model.safetensors", whole / "adapter/adapter_model.safetensors")
    export_run(run, tmp_path / "out", ExportOptions())


def test_exit_codes_of_the_command_line(root: Path, tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(resolved_yaml(tiny_run.recipe(root)).replace("rank:", "rnak:"))
    assert run_command("train", str(file), output=tmp_path) == 2
    said = (tmp_path / "stderr").read_text()
    assert "adapter.rnak: unknown key" in said
    assert "Did you mean 'rank'?" in said
    assert "Traceback" not in said
    for arguments in (("train", "no-such-recipe"), ("export", "nowhere", "out"), ("frobnicate",)):
        assert run_command(*arguments, output=tmp_path) == 2


def test_json_is_one_document_on_standard_output(root: Path, tmp_path: Path) -> None:
    file = write_recipe(tmp_path / "r.yaml", tiny_run.recipe(root, train__steps=1))
    assert run_command("train", str(file), "--json", "-d", str(tmp_path / "run"), output=tmp_path) == 0
    assert json.loads((tmp_path / "stdout").read_text())["num_steps"] == 1


def test_a_run_keeps_its_chat_template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """data.chat_template and template_kwargs reach training, the loaded run and its exports; the file may change."""
    file = tmp_path / "mine.jinja"
    file.write_text("{% if loud is defined and loud %}LOUD{% endif %}" + tiny_tokenizer.CHATML)
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "the cat"}]
    (tmp_path / "chats.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 30)
    chats = {"data__mix": [{"source": str(tmp_path / "chats.jsonl")}], "data__chat_template": str(file)}
    recipe = tiny_run.recipe(tmp_path, **chats, data__template_kwargs={"loud": True}, train__steps=2)
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        with pytest.raises(Interrupted):
            train_run(recipe, tmp_path / "run")
    assert json.loads((tmp_path / "run/environment.json").read_text())["has_chats"] is True
    before = file.read_text()
    file.write_text(tiny_tokenizer.CHATML + "{% if loud is defined %}{% endif %}")
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
    model = tiny_run.write_model(tmp_path / "model")
    head = "{{ strftime_now('%d %b %Y') }}{% if loud is defined and loud %}LOUD{% endif %}"
    dated = tiny_tokenizer.make(chat_template=head + tiny_tokenizer.CHATML)
    dated.save_pretrained(model)
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "the cat"}]
    chats = tmp_path / "chats.jsonl"
    chats.write_text((json.dumps({"messages": turns}) + "\n") * 30)
    recipe = tiny_run.recipe(tmp_path, data__mix=[{"source": str(chats)}], data__template_kwargs={"loud": True})

    class Calendar(date):
        day = "2026-02-28"

        @classmethod
        def today(cls) -> date:
            return date.fromisoformat(cls.day)

    monkeypatch.setattr(run_directory, "date", Calendar)
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(Interrupted):
            train_run(recipe, tmp_path / "run")
    assert json.loads((tmp_path / "run/environment.json").read_text())["chat_date"] == "2026-02-28"
    Calendar.day = "2026-03-01"
    train_run(recipe, tmp_path / "run", resume=True)
    scored = evaluate_target(str(tmp_path / "run"))["evaluation"]["average"]["nll_per_token"]
    stored = json.loads((tmp_path / "run/eval/step-6.json").read_text())["average"]["nll_per_token"]
    assert scored == pytest.approx(stored, rel=1e-6)
    trained = load_run(tmp_path / "run")
    assert prompt_text(trained.tokenizer, (Turn("user", "Hi"),)).startswith("28 Feb 2026LOUD")
    base = evaluate_target(str(tmp_path / "run"), EvalOptions(base_only=True))["evaluation"]
    alone = evaluate_target(str(model), EvalOptions(like=tmp_path / "run", quant="nf4"))["evaluation"]
    assert alone["average"]["nll_per_token"] == pytest.approx(base["average"]["nll_per_token"], rel=2e-4)  # bf16
