"""Whole runs on a tiny model: resumed equals uninterrupted, nothing is lost, every failure is one clear line."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from qdora.cli import app
from qdora.data.chats import prompt_text
from qdora.data.example import Turn
from qdora.errors import UserError
from qdora.export.export import export_run
from qdora.files import run_directory
from qdora.files.run_directory import open_run
from qdora.model.build_model import choose_compute, find_model, put_adapters
from qdora.recipe.options import EvalOptions, ExportOptions
from qdora.recipe.recipe_file import load_recipe, resolved_yaml
from qdora.run.base import load_base
from qdora.run.load_run import load_run
from qdora.run.run import train_run
from qdora.run.verbs import evaluate_target
from tests import support
from tests.support import ADAPTER, UNEVALUATED, assert_resumes, same_tensors, timeless, train_until, training_lines

FIGURES = {"loss_per_task", "steps", "validation_nll", "validation_accuracy"}


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
    last, card = json.loads((whole / "eval/step-6.json").read_text())["tasks"], (whole / "README.md").read_text()
    assert sorted(last) == ["letters", "sums"]
    for words in ("dora, rank 4, alpha 8", f"{last['sums']['nll_per_token']:.4f}"):
        assert words in card
    # Magnitudes move in float32, factors are stored in bf16
    adapter, start = load_file(whole / ADAPTER), start_magnitudes(root)
    assert len(start) == 14
    for name, tensor in adapter.items():
        assert tensor.dtype == (torch.float32 if name in start else torch.bfloat16)
        if name in start:
            assert (tensor != start[name]).float().mean() >= 0.99, name


@pytest.mark.parametrize("stop_at", [1, 4])
def test_resumed_equals_uninterrupted_bit_for_bit(root: Path, whole: Path, tmp_path: Path, stop_at: int) -> None:
    assert_resumes(support.tiny_recipe(root), whole, tmp_path / "run", stop_at=stop_at)


def test_rates_of_the_parts_reach_the_optimizer(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps of Lion, each of which moves an entry by its rate, up or down, or not at all. With logits in chunks."""
    chunks: list[int] = []
    support.in_batches(monkeypatch, lambda _number, _loss, _ids, options: chunks.append(options["chunk"]))
    rates = {"lr": 1e-3, "lr_end": 5e-4, "warmup": 0, "lr_ratio_B": 4.0, "lr_ratio_magnitude": 0.5}
    changes: dict[str, Any] = {f"train__{key}": value for key, value in rates.items()} | {"memory__loss_chunk": 3}
    train_run(support.tiny_recipe(root, **changes, **UNEVALUATED, train__steps=2, train__optimizer="lion"), tmp_path)
    assert chunks == [3, 3]
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


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_an_extended_run_has_the_rates_of_the_longer_one(root: Path, tmp_path: Path, schedule: str) -> None:
    """The warm-up, a share of all steps, stays that of the start: 2 steps. A constant rate gives the longer run."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    changes = {"train__schedule": schedule, **UNEVALUATED} | ({"train__lr_end": 1e-4} if schedule != "constant" else {})

    def rate(step: int, num_steps: int) -> float:
        done = (step - 2) / (num_steps - 2)
        share = {"constant": 1, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[schedule]
        return (0.5e-3, 1e-3)[step] if step < 2 else 1e-4 + 9e-4 * share

    train_run(support.tiny_recipe(root, **changes), run)
    longer = support.tiny_recipe(root, train__steps=10, **changes)
    assert train_run(longer, run, resume=True)["num_steps"] == 10
    rates = [line["lr"] for line in training_lines(run)]
    assert rates == pytest.approx([rate(step, 6 if step < 6 else 10) for step in range(10)])
    if schedule == "constant":
        train_run(support.tiny_recipe(root, train__steps=10, train__warmup=2, **changes), whole)
        support.assert_same_run(run, whole, step=10)
        assert "steps: 10" in (run / "recipe.yaml").read_text()


def test_a_run_is_extended_by_epochs_and_what_began_it_stays(root: Path, whole: Path, tmp_path: Path) -> None:
    changes = {"train__steps": ..., "train__batch": 26, **UNEVALUATED}
    assert train_run(support.tiny_recipe(root, train__epochs=1, **changes), tmp_path)["evaluations"] == {}
    before = training_lines(tmp_path)
    train_run(support.tiny_recipe(root, train__epochs=2, **changes), tmp_path, resume=True)
    lines = training_lines(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]  # of 50 examples, 28 sums and 22 letters
    assert lines[:2] == before
    for recipe, run, said in (
        (support.tiny_recipe(root, train__epochs=1, **changes), tmp_path, r"epochs: must be 2\.0 or more.*got 1\.0"),
        (support.tiny_recipe(root, train__steps=5), whole, r"steps: must be 6 or more.*\(got 5\)"),
        (support.tiny_recipe(root, train__seed=5), whole, r"seed: must be 0, as when the run started.*\(got 5\)"),
    ):
        with pytest.raises(UserError, match=rf"train\.{said}"):
            train_run(recipe, run, resume=True)


def test_data_that_changed_is_refused_on_resume_and_nothing_is_rewritten(tmp_path: Path) -> None:
    longer, recipe = (support.tiny_recipe(tmp_path, train__steps=steps, **UNEVALUATED) for steps in (4, 2))
    train_run(recipe, tmp_path / "run")
    files = [tmp_path / "run" / name for name in ("recipe.yaml", "mix.json", "environment.json")]
    sums, before = tmp_path / "data/sums.jsonl", [file.read_bytes() for file in files]
    sums.write_text(sums.read_text() + '{"prompt": "9 + 9 =", "completion": " 18"}\n')
    with pytest.raises(UserError, match=r"^--resume: source sums differs from that of the checkpoint"):
        train_run(longer, tmp_path / "run", resume=True)
    assert [file.read_bytes() for file in files] == before


def test_a_checkpoint_is_evaluated_and_exported_with_its_own_numbers(root: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train_run(support.tiny_recipe(root, train__steps=4, eval__every=2), run)
    assert evaluate_target(str(run), EvalOptions(step=2))["label"] == "step-2"
    assert export_run(run, tmp_path / "out", ExportOptions(dtype="float32", step=2))["state"] == "step-2"
    card = (tmp_path / "out/README.md").read_text()
    numbers = json.loads((run / "eval/step-2.json").read_text())["tasks"]["sums"]["nll_per_token"]
    for words in (f"{numbers:.4f}", "step-2", "| steps | 2 of 4 |"):
        assert words in card


@pytest.mark.parametrize("kind", ["lora", "full", "none"])
def test_other_arms_run_resume_evaluate_and_export(root: Path, tmp_path: Path, kind: str) -> None:
    arms: dict[str, dict[str, Any]] = {"lora": {"adapter__kind": "lora"}, "full": FULL}
    arms["none"] = FULL | {"adapter__kind": "none", "base__quant": "nf4", "train__steps": 0}
    more = {"none": {"train__checkpoint_every": ...}, "full": {"model__dtype": "bfloat16"}, "lora": {}}
    changes = arms[kind] | more[kind]
    recipe, run = support.tiny_recipe(root, **changes), tmp_path / "run"
    train_run(recipe, run)
    document = evaluate_target(str(run))
    assert document["label"] == ("base" if kind == "none" else "final")
    exported = export_run(run, tmp_path / "merged", ExportOptions(dtype="float32"))
    assert exported["verification"]["passed"]
    assert exported["num_merged_layers"] == (14 if kind == "lora" else 0)
    if kind == "full":
        assert document["evaluation"]["average"]["nll_per_token"] < nll(run, 0)
        train_until(recipe, tmp_path / "again", 2)
        train_run(recipe, tmp_path / "again", resume=True)
        same_tensors(*(each / "adapter/parameters.safetensors" for each in (run, tmp_path / "again")))
        assert timeless(run) == timeless(tmp_path / "again")


def test_going_on_from_an_adapter_starts_where_it_ended(root: Path, whole: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {f"adapter__{key}": ... for key in ("rank", "alpha")}
    run, adapter = tmp_path / "run", Path(shutil.copytree(whole / "adapter", tmp_path / "adapter"))
    changes |= {"adapter__resume_from": str(adapter), "train__steps": 1}
    assert list(train_run(support.tiny_recipe(root, **changes), run)["evaluations"]) == ["start", "adapter"]
    assert "| starts from | an earlier adapter |" in (run / "README.md").read_text()
    assert nll(run, 0) == nll(whole, 6)


def test_eval_uses_the_tasks_of_the_run_and_keeps_what_is_asked_beside_it(root: Path, tmp_path: Path) -> None:
    """`block` decides which examples a limit takes."""
    changes: dict[str, Any] = {"eval__tasks": ["letters"], "eval__block": 1, "data__validation_fraction": 0.5}
    run, text = tmp_path / "run", tmp_path / "a text.txt"
    train_run(support.tiny_recipe(root, **changes, train__steps=1), run)
    assert evaluate_target(str(run))["evaluation"]["tasks"].keys() == {"letters"}
    file = run / "eval/final-validation.json"
    own = json.loads(file.read_text())["per_example"]
    evaluate_target(str(run), EvalOptions(limit=4, tasks=["letters"]))  # the same question
    for options in (EvalOptions(limit=2), EvalOptions(tasks=["sums"]), EvalOptions(tasks=["demo/facts"], limit=1)):
        evaluate_target(str(run), options)
    assert json.loads(file.read_text())["per_example"] == own
    kept = {each.stem.removeprefix("final-validation") for each in (run / "eval").glob("final-*")}
    assert kept == {"-demo-facts-limit-1", "-letters-limit-4", "-limit-2", "-sums", ""}
    text.write_text("the quick brown fox")
    found = evaluate_target(str(run), EvalOptions(text=[text]))["perplexity"]
    (written,) = (run / "eval").glob("final-perplexity-a-text.txt-*")
    assert json.loads(written.read_text()) == found | {"step": 1, "texts": [str(text)]}
    # A model alone
    found = evaluate_target(str(root / "model"), EvalOptions(text=[text]))["perplexity"]
    assert found["perplexity"] == pytest.approx(math.exp(found["nll_sum"] / found["num_tokens"]))
    assert found["nll_per_byte"] == pytest.approx(found["nll_sum"] / len(text.read_bytes()))
    shown = evaluate_target(str(run), EvalOptions(split="train", limit=3))["evaluation"]["tasks"]
    assert {task: row["num_examples"] for task, row in shown.items()} == {"letters": 3}


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("run", {"step": 4, "base": True}, "--step: is not used with --base"),
    ("run", {"text": [Path("nowhere.txt")]}, r"nowhere\.txt: .*No such file"),
    ("run", {"split": "tset"}, "--split: sums has no tset split"),
    ("run", {"split": "test"}, "--split: sums has no test split"),
    ("run", {"method": "generation"}, r"--method: .*'loglikelihood' or 'generate', got 'generation'"),
    ("model", {}, "is not a run .*Fix: add --tasks, --data, --text, --harness or --like RUN"),
    ("model", {"text": [Path("t.txt")], "step": 2}, "--step and --base are used only with a run"),
    ("model", {"tasks": ["boolqq"]}, "--tasks: got 'boolqq', must be one of .*boolq"),
    ("modell", {"tasks": ["demo/facts"]}, r"must be a directory.*modell"),
]


@pytest.mark.parametrize(("target", "options", "message"), REFUSED)
def test_options_without_effect_are_refused(
    root: Path, whole: Path, tmp_path: Path, monkeypatch: Any, target: str, options: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("t.txt").write_text("the quick brown fox")
    with pytest.raises(UserError, match=message):
        evaluate_target(str(whole if target == "run" else root / target), EvalOptions(**options))


def test_a_run_resumes_with_its_own_settings(root: Path, tmp_path: Path) -> None:
    """The options of the start need not be repeated."""
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
    assert f"{run} continues with its own recipe.yaml, which only -s changes." in command("--resume")
    # A run of a release without a setting resumes with its default, and not with another value
    kept = (run / "recipe.yaml").read_text()
    older = kept.replace("  packing: false\n", "")
    assert older != kept
    (run / "recipe.yaml").write_text(older)
    assert "packing: must be False, as when" in command("--resume", "-s", "data.packing=true", code=2)
    command("--resume")
    assert (run / "recipe.yaml").read_text() == kept
    command("--resume", "-s", "train.steps=3")
    assert open_run(run).last_step() == 3
    assert "train.seed: must be 3, as when the run started" in command("--resume", "-s", "train.seed=4", code=2)


def test_ctrl_c_saves_and_exits_with_130(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, run = tmp_path / "long.yaml", tmp_path / "run"
    signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background ignore it
    file.write_text(resolved_yaml(support.tiny_recipe(root, train__checkpoint_every=..., **UNEVALUATED)))
    support.in_batches(monkeypatch, lambda number, *_: os.kill(os.getpid(), signal.SIGINT) if number == 2 else None)
    changes = ("-s", "train.lr=1e-3", "-s", "data.mix[0].limit=20")
    done = CliRunner().invoke(app, ["train", str(file), "-d", str(run), *changes])
    assert done.exit_code == 130, done.stderr
    assert "--resume" in done.stderr.splitlines()[-1]
    newest = open_run(run).newest_checkpoint()
    assert newest is not None
    assert (newest.name, len(training_lines(run))) == ("step-2", 2)


def test_a_run_whose_base_and_data_were_moved(tmp_path: Path, whole: Path) -> None:
    """Each command says where to write the new path, and with it goes on as if nothing had been moved."""
    before, now, run = tmp_path / "before", tmp_path / "now", tmp_path / "run"
    train_until(support.tiny_recipe(before), run, 3)
    shutil.move(before, now)
    file = run / "recipe.yaml"
    places = {"model.source": "model", "data.mix[0].source": "data/sums.jsonl", "data.mix[1].source": "data/letters."}
    for command, number in (
        (lambda: load_run(run), 1),
        (lambda: export_run(run, tmp_path / "out", ExportOptions()), 1),
        (lambda: train_run(load_recipe(file), run, where=str(file), resume=True), 3),
    ):
        with pytest.raises(UserError) as raised:
            command()
        assert len(raised.value.faults) == number
        for fault, (key, place) in zip(raised.value.faults, places.items(), strict=False):
            assert fault.startswith(f"{file}: {key}: no such file or directory, got {before / place}")
            assert number == 3 or fault.endswith(f"write its new path into {file}.")
    file.write_text(file.read_text().replace(f"{before}/data", f"{now}/data"))
    with pytest.raises(UserError, match=rf"as when the run started .* write .* into {file}\.$"):
        train_run(load_recipe(file, [f"model.source={now / 'model'}"]), run, resume=True)
    file.write_text(file.read_text().replace(str(before), str(now)))
    train_run(load_recipe(file), run, resume=True)
    same_tensors(run / ADAPTER, whole / ADAPTER)
    export_run(run, tmp_path / "out", ExportOptions())


def test_a_run_keeps_its_chat_template_and_the_date_of_its_start(tmp_path: Path, monkeypatch: Any) -> None:
    """Moved and evaluated on another day, it reads what it learnt from, whatever became of the template's file."""
    file, run = tmp_path / "mine.jinja", tmp_path / "run"
    file.write_text("{{ strftime_now('%d %b %Y') }}{% if loud %}LOUD{% endif %}" + support.CHATML)
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "the cat"}]
    (tmp_path / "chats.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 30)
    mix = [{"source": str(tmp_path / "chats.jsonl")}]
    data = {"mix": mix, "chat_template": str(file), "template_kwargs": {"loud": True}}
    recipe = support.tiny_recipe(tmp_path, **{f"data__{key}": value for key, value in data.items()}, train__steps=2)

    class Calendar(date):
        day = "2026-02-28"

        @classmethod
        def today(cls) -> date:
            return date.fromisoformat(cls.day)

    monkeypatch.setattr(run_directory, "date", Calendar)
    train_until(recipe, run, 1)
    environment = json.loads((run / "environment.json").read_text())
    assert environment["chat_date"] == "2026-02-28"
    Calendar.day = "2026-03-01"
    before = file.read_text()
    file.write_text(support.CHATML + "{% if loud is defined %}{% endif %}")
    with pytest.raises(UserError, match=r"data\.chat_template differs from"):
        train_run(recipe, run, resume=True)
    file.write_text(before)
    train_run(recipe, run, resume=True)
    file.unlink()
    moved = shutil.move(run, tmp_path / "moved")
    tokenizer = load_run(moved).tokenizer
    assert prompt_text(tokenizer, (Turn("user", "Hi"),)).startswith("28 Feb 2026LOUD<|im_start|>user")
    assert tokenizer.chat_template == before
    scored = evaluate_target(str(moved))["evaluation"]["average"]["nll_per_token"]
    assert scored == pytest.approx(nll(moved, 2), rel=1e-6)
    base = evaluate_target(str(moved), EvalOptions(base=True))["evaluation"]
    support.tokenizer(chat_template=before).save_pretrained(tmp_path / "model")
    alone = evaluate_target(str(tmp_path / "model"), EvalOptions(like=moved, quant="nf4"))["evaluation"]
    assert alone["average"]["nll_per_token"] == pytest.approx(base["average"]["nll_per_token"], rel=2e-4)  # bf16
