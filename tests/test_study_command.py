"""qdora study on a tiny model: cells are whole runs, done once, gone on with, and evaluated once a base."""

from __future__ import annotations

import errno
import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from torch import nn
from typer.testing import CliRunner

from qdora.cli import app
from qdora.errors import RunFailure, UserError
from qdora.model.inject import inject
from qdora.model.model_size import model_size
from qdora.nn.frozen_linear import FrozenLinear
from qdora.ops.packed import quantize
from qdora.recipe.recipe_file import settings
from qdora.run.evaluate import EvalOptions, evaluate_target
from qdora.study import runner as study_verb
from qdora.study.report import read_report
from qdora.study.runner import in_words, study_run
from qdora.study.study_directory import StudyDirectory, read_index
from tests import tiny_run


def write_study(root: Path, **changes: Any) -> Path:
    """Two cells of one step on the tiny model."""
    recipe = tiny_run.recipe(root, train__steps=2, train__checkpoint_every=1, eval__limit=4, eval__at_start=...)
    plain = settings(recipe)
    for name in ("block_size", "double_quant", "skip"):
        del plain["base"][name]
    (root / "recipe.yaml").write_text(yaml.safe_dump(plain))
    document = {
        "recipe": "recipe.yaml",
        "product": {
            "base.quant": ["nf4"],
            "adapter": {"lora": {"adapter.kind": "lora"}, "dora": {"adapter.kind": "dora"}},
            "train.seed": [0],
        },
    }
    file = root / "study.yaml"
    file.write_text(yaml.safe_dump(document | changes))
    return file


@pytest.fixture(scope="module")
def done(root: Path) -> Path:
    """A study that has run."""
    study_run(write_study(root), root / "study", console=Console(file=io.StringIO()))
    return root / "study"


def test_a_full_disk_is_one_line(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the cell nor the record of its failure can be written."""

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(study_verb, "train_run", full)
    monkeypatch.setattr(StudyDirectory, "add_failure", full)
    with pytest.raises(RunFailure, match=r"study: cannot be written: the disk is full\.$"):
        study_run(write_study(root), tmp_path / "study", console=Console(file=io.StringIO()))


def test_every_cell_is_a_run_and_has_a_result(done: Path) -> None:
    cells = read_index(done)["cells"]
    assert [cell["is_trained"] for cell in cells] == [False, False, True, True]
    store = StudyDirectory(done)
    for cell in cells:
        run = store.cell(cell["key"])
        assert (run / "recipe.yaml").is_file()
        result = store.result(cell["key"])
        assert result is not None
        scores = json.loads((run / result["files"]["validation"]).read_text())["per_example"]
        assert len(scores) == 3  # 5 % of each task
        assert (run / "adapter").exists() == cell["is_trained"]
        layers = (result["compression"] or {"layers": {}})["layers"]
        is_quantized_base = not cell["is_trained"] and "nf4" in cell["labels"].values()
        assert len(layers) == (14 if is_quantized_base else 0)
        assert all(0.05 < layer["relative_error"] < 0.15 for layer in layers.values())
        assert result["num_steps"] == (2 if cell["is_trained"] else 0)
        assert len(list((run / "eval").glob("step-*.json"))) == 1
    assert not list((done / "claims").glob("*.json"))


def test_bytes_of_bases_and_adapters(done: Path) -> None:
    store = StudyDirectory(done)
    found = {}
    for cell in read_index(done)["cells"]:
        name = cell["labels"].get("adapter") or ("nf4" if cell["labels"] else "dense")
        found[name] = (store.result(cell["key"]) or {})["size"]
    assert found["dense"]["num_linear_bytes"] == 2 * found["dense"]["num_linear_weights"]
    bits = 8 * found["nf4"]["num_linear_bytes"] / found["nf4"]["num_linear_weights"]
    assert 4.1 < bits < 8  # the code of the scales, 1 KiB a layer, is much beside tiny layers
    assert found["nf4"]["num_adapter_bytes"] == 0
    assert found["lora"]["num_base_bytes"] == found["nf4"]["num_base_bytes"]
    assert found["dora"]["num_adapter_bytes"] > found["lora"]["num_adapter_bytes"] > 0


def test_bytes_against_a_count_by_hand() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(10, 6), nn.Linear(6, 10, bias=False)
            self.head.weight = self.embed.weight
            self.q_proj, self.norm = nn.Linear(6, 8), nn.LayerNorm(6)

        def get_output_embeddings(self) -> nn.Module:
            return self.head

    model = Tied()
    size = model_size(model)
    assert (size.num_linear_weights, size.num_linear_bytes, size.num_adapter_bytes) == (48, 96, 0)
    assert size.num_base_bytes == 2 * (60 + 48 + 8 + 12)
    inject(model, kind="dora", rank=2, alpha=2.0, targets=["q_proj"], dtype=torch.bfloat16)
    size = model_size(model)
    assert size.num_adapter_bytes == 2 * (2 * 6 + 8 * 2) + 4 * 8
    assert size.num_base_bytes == 2 * (60 + 48 + 8 + 12)


def test_a_simulated_format_counts_the_bits_of_its_codes() -> None:
    model = nn.ModuleDict(
        {"q_proj": FrozenLinear(quantize(torch.randn(64, 64), "nf2", block_size=64, double_quant=False))}
    )
    # 2 bits a code and a float32 scale for every 64 weights, though the codes are held in 4 bits
    assert model_size(model).num_linear_bytes == 64 * 64 * 2 // 8 + 64 * 4


def test_a_finished_study_does_nothing_more(done: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qdora.study.runner.train_run", None)
    found = study_run(write_study(root), done, console=Console(file=io.StringIO()))
    assert (found["num_cells"], found["num_done"]) == (4, 4)


def test_a_page_that_could_not_be_written_is_written_by_the_next_start(done: Path, root: Path) -> None:
    page = next((done / "cells").glob("*/report.html"))
    page.unlink()
    study_run(root / "study.yaml", done, console=Console(file=io.StringIO()))
    assert "</html>" in page.read_text(encoding="utf-8")


def test_a_cell_that_was_cut_off_goes_on_from_its_checkpoint(
    done: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qdora.study import runner as study_cell

    real, calls = study_cell.train_run, []

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("cut")

    def cut(recipe: Any, directory: Path, **options: Any) -> Any:
        calls.append(options["resume"])
        with monkeypatch.context() as patch:
            if len(calls) == 1:
                patch.setattr("qdora.run.step_evaluations.evaluate", broken)
            return real(recipe, directory, **options)

    monkeypatch.setattr(study_cell, "train_run", cut)
    output = io.StringIO()
    product = {"base.quant": ["nf4"], "adapter": {"dora": {"adapter.kind": "dora"}}, "train.seed": [0]}
    study_run(write_study(root, product=product, bases=False), tmp_path, console=Console(file=output, width=200))
    assert calls == [False, True]
    assert "failed: dora nf4 0" in output.getvalue()
    ours, whole = StudyDirectory(tmp_path), StudyDirectory(done)
    for cell in read_index(tmp_path)["cells"]:
        found = [list((store.cell(cell["key"]) / "eval").glob("step-*.json")) for store in (ours, whole)]
        files = [json.loads(file.read_text()) for (file,) in found]
        assert files[0]["per_example"] == files[1]["per_example"]


def test_a_cell_with_a_budget_that_was_killed_after_its_plan_runs_again(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qdora.run import train

    real, calls = train.base_of_run, []

    def killed(*given: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return real(*given, **options)

    monkeypatch.setattr(train, "base_of_run", killed)
    product = {"adapter": {"dora": {"adapter.kind": "dora"}}, "train.seed": [0]}
    file = write_study(root, product=product, bases=False, settings={"memory.budget": "10GiB"})
    with pytest.raises(KeyboardInterrupt):
        study_run(file, tmp_path, console=Console(quiet=True))
    assert study_run(file, tmp_path, console=Console(quiet=True))["num_done"] == 1
    assert not list((tmp_path / "failures").iterdir())


def test_cells_that_fail_end_with_their_reason(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no room")

    monkeypatch.setattr("qdora.study.runner.train_run", fail)
    with pytest.raises(
        RunFailure, match=r"4 of 4 cells failed; the first is .*RuntimeError: no room\. .*Fix: .*--retry-failed"
    ):
        study_run(write_study(root, retries=0), tmp_path, console=Console(file=io.StringIO()))


def test_the_command_checks_before_it_runs(root: Path, tmp_path: Path) -> None:
    runner, file = CliRunner(), str(write_study(root))
    found = runner.invoke(app, ["study", file, "--dry-run", "--json", "--shard", "2/3"])
    assert found.exit_code == 0, found.output
    shown = json.loads(found.stdout)
    assert [cell["is_trained"] for cell in shown["cells"]] == [False]
    assert shown["notes"] == [
        "This grid cannot have a winner: lora has one value of train.lr, so it is not tuned; dora has one value of "
        "train.lr, so it is not tuned; lora and dora have only 1 of 3 (compare.min_seeds) seeds in common. It gives "
        "scores and intervals."
    ]
    assert "This grid cannot have a winner" in found.stderr
    for options, text in (
        (["--shard", "4/3"], "--shard: must be I/N"),
        (["--jobs", "2", "--shard", "1/2"], "--jobs: is not used with --shard"),
        (["--cluster", "local"], "are used only with --jobs"),
    ):
        found = runner.invoke(app, ["study", file, *options])
        assert found.exit_code == 2
        assert text in found.output
    with pytest.raises(UserError, match="no such file or directory"):
        study_run(write_study(root, settings={"model.source": "./nowhere"}), tmp_path)


def test_jobs_are_started_with_the_same_study(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []
    monkeypatch.setattr(study_verb, "submit_jobs", lambda *a, **k: started.append((a, k)) or [])
    found = CliRunner().invoke(
        app, ["study", str(write_study(root)), "--dir", str(tmp_path), "--jobs", "3", "--job-option", "timeout_min=9"]
    )
    assert found.exit_code == 0, found.output
    ((command, directory, count), options) = started[0]
    assert command[1:4] == ["-m", "qdora.cli", "study"]
    assert (directory, count, options) == (tmp_path, 3, {"cluster": "slurm", "parameters": {"timeout_min": 9}})


@pytest.mark.parametrize("seconds, text", [(5, "5 s"), (99, "99 s"), (200, "3 min"), (7500, "2 h 05 min")])
def test_times_in_words(seconds: float, text: str) -> None:
    assert in_words(seconds) == text


def test_arms_can_be_compared_on_the_test_split(root: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"compare": {"split": "test", "num_resamples": 100}, "bases": False}
    with pytest.raises(UserError, match=r"compare\.split: sums has no test split"):
        study_run(write_study(root, **options), tmp_path)
    options["settings"] = {"data.mix": [{"task": "demo/facts"}], "eval.limit": 3, "data.max_length": 256}
    found = study_run(write_study(root, **options), tmp_path, console=Console(file=io.StringIO()))
    assert found["num_done"] == 2
    report = read_report(tmp_path)
    (row,) = report.tables["comparisons"]
    assert (row["num_examples"], row["winner"]) == (3, "")
    for cell in read_index(tmp_path)["cells"]:
        assert (tmp_path / "cells" / cell["key"] / "eval/final-test.json").is_file()


def test_the_test_split_of_the_evaluated_tasks_compares_and_stays(root: Path, tmp_path: Path) -> None:
    mix = [{"task": "demo/facts"}, {"task": "demo/odd"}, {"source": str(root / "data/sums.jsonl")}]
    common = {"data.mix": mix, "eval.limit": 3, "data.max_length": 256, "eval.tasks": ["demo/facts"]}
    compare = {"split": "test", "num_resamples": 100}
    file = write_study(root, compare=compare, bases=False, settings=common)
    study_run(file, tmp_path, console=Console(file=io.StringIO()))  # sums, which only trains, needs no test split
    (row,) = read_report(tmp_path).tables["comparisons"]
    assert row["num_examples"] == 3  # of demo/facts alone, as for the tuning
    cell = tmp_path / "cells" / read_index(tmp_path)["cells"][0]["key"]
    evaluate_target(str(cell), EvalOptions(split="test", limit=2), console=Console(quiet=True))
    assert read_report(tmp_path).tables["comparisons"] == [row]


def test_a_real_study_is_reported(done: Path) -> None:
    report = read_report(done)
    assert len(report.tables["arms"]) == 4
    assert {row["repair_reason"] for row in report.tables["arms"]} <= {"not trained", "", NOTHING_LOST}
    assert report.verdict[0].startswith("No winner in 1 comparisons of NLL")


NOTHING_LOST = "compression caused no significant loss"


def test_cells_share_their_pruned_base(root: Path) -> None:
    prune = {"base.prune.method": "magnitude", "base.prune.sparsity": 0.5}
    base = {"half": {"base.quant": "nf4", **prune}}
    adapter = {"lora": {"adapter.kind": "lora"}, "dora": {"adapter.kind": "dora"}}
    file = write_study(root, product={"base": base, "adapter": adapter, "train.seed": [0]})
    study_run(file, root / "pruned", console=Console(file=io.StringIO()))
    made = list((root / "pruned/shared/bases").glob("*/base/model.safetensors"))
    assert len(made) == 1
    cells = list((root / "pruned/cells").glob("*/base/model.safetensors"))
    assert len(cells) == 3  # both adapters, and the base by itself
    assert all(cell.samefile(made[0]) for cell in cells)
