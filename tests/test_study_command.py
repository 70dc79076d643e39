"""qdora study on a tiny model: cells are whole runs, done once, gone on with, and evaluated once a base."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from torch import nn
from typer.testing import CliRunner

from qdora.cli import app
from qdora.data.build_data import run_examples
from qdora.errors import RunFailure, UserError
from qdora.evaluation.loglikelihood import score_examples
from qdora.evaluation.suite import evaluate, spread
from qdora.model.adapter_file import load_adapter
from qdora.model.inject import adapted_layers, inject
from qdora.model.model_size import model_size
from qdora.nn.frozen_linear import FrozenLinear
from qdora.ops.packed import quantize
from qdora.ops.tiles import dense_weight
from qdora.recipe.recipe_file import settings
from qdora.recipe.settings import AdapterConfig
from qdora.run.load_run import load_run
from qdora.study import cluster_jobs
from qdora.study import runner as study_verb
from qdora.study.report import read_report
from qdora.study.runner import study_run
from qdora.study.study_directory import StudyDirectory, read_index
from tests import reference, tiny_run


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
        },
        "seeds": [0],
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
    assert [cell["kind"] for cell in cells] == ["base", "base", "trained", "trained"]
    store = StudyDirectory(done)
    for cell in cells:
        run = store.cell(cell["key"])
        assert (run / "recipe.yaml").is_file()
        result = store.result(cell["key"])
        assert result is not None
        scores = json.loads((run / result["files"]["scores"]).read_text())["per_example"]
        assert len(scores) == 3  # 5 % of each task
        assert (run / "adapter").exists() == (cell["kind"] == "trained")
        layers = (result["compression"] or {"layers": {}})["layers"]
        is_quantized_base = cell["kind"] == "base" and "nf4" in cell["labels"].values()
        assert len(layers) == (14 if is_quantized_base else 0)
        assert all(0.05 < layer["relative_error"] < 0.15 for layer in layers.values())
        assert result["num_steps"] == (2 if cell["kind"] == "trained" else 0)
        assert len(list((run / "eval").glob("step-*.json"))) == 1
    assert not list((done / "claims").glob("*.json"))


def test_a_base_has_its_perplexity_and_the_errors_of_its_hidden_states(done: Path) -> None:
    store = StudyDirectory(done)
    bases = {bool(cell["labels"]): cell["key"] for cell in read_index(done)["cells"] if cell["kind"] == "base"}
    dense, nf4 = (store.result(bases[is_compressed]) or {} for is_compressed in (False, True))
    assert "hidden_errors" not in dense
    assert len(nf4["hidden_errors"]) == 2
    assert all(0.01 < error < 0.3 for error in nf4["hidden_errors"])
    assert nf4["hidden_error"] == nf4["hidden_errors"][-1]
    base = load_run(store.cell(bases[True]))
    nll = num_tokens = 0.0
    for examples in run_examples(base.recipe, "validation").values():
        for example in examples:
            ids = torch.tensor([base.tokenizer(example.prompt + example.answer)["input_ids"]])
            logits = base.model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
            nll -= float(logits.gather(1, ids[0, 1:, None]).sum())
            num_tokens += ids.shape[1] - 1
    assert nf4["perplexity"] == pytest.approx(math.exp(nll / num_tokens), rel=1e-5)
    report = read_report(done)
    assert [row["relative_error"] for row in report.tables["blocks"]] == nf4["hidden_errors"]
    (row,) = [row for row in report.tables["repair"] if row["adapter"] == "no adapter" and row["base.quant"] == "nf4"]
    assert (row["perplexity"], row["hidden_error"]) == (nf4["perplexity"], nf4["hidden_error"])


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


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(10, 6), nn.Linear(6, 10, bias=False)
        self.head.weight = self.embed.weight
        self.q_proj, self.norm = nn.Linear(6, 8), nn.LayerNorm(6)

    def get_output_embeddings(self) -> nn.Module:
        return self.head


def test_bytes_against_a_count_by_hand() -> None:
    model = Tied()
    size = model_size(model)
    assert (size.num_linear_weights, size.num_linear_bytes, size.num_adapter_bytes) == (48, 96, 0)
    assert size.num_base_bytes == 2 * (60 + 48 + 8 + 12)
    inject(model, kind="dora", rank=2, alpha=2.0, targets=["q_proj"], dtype=torch.bfloat16)
    size = model_size(model)
    assert size.num_adapter_bytes == 2 * (2 * 6 + 8 * 2) + 4 * 8
    assert size.num_base_bytes == 2 * (60 + 48 + 8 + 12)


def test_a_head_is_no_linear_layer_if_it_is_adapted_or_quantised() -> None:
    model = Tied()
    inject(model, kind="lora", rank=2, alpha=2.0, targets=["head", "q_proj"], dtype=torch.bfloat16)
    size = model_size(model)
    assert (size.num_linear_weights, size.num_linear_bytes) == (48, 96)
    assert size.num_base_bytes == 2 * (60 + 48 + 8 + 12)
    assert size.num_adapter_bytes == 2 * (2 * 6 + 10 * 2) + 2 * (2 * 6 + 8 * 2)
    weight = quantize(torch.randn(128, 64), "nf4", block_size=64, double_quant=False)
    model.head = FrozenLinear(weight, torch.zeros(128), torch.zeros(128 * 64 // 8, dtype=torch.uint8))
    size = model_size(model)
    assert (size.num_linear_weights, size.num_linear_bytes) == (48, 96)
    # codes of 4 bits, a float32 scale for every 64 weights, and a bias; no layer's mask counts
    assert size.num_base_bytes == 2 * (60 + 48 + 8 + 12) + 128 * 64 // 2 + 128 * 4 + 2 * 128


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
    log = (page.parent / "log.txt").read_bytes()
    (page.parent / "log.txt").unlink()  # as in results that were kept without their run
    study_run(root / "study.yaml", done, console=Console(file=io.StringIO()))
    assert not page.exists()
    (page.parent / "log.txt").write_bytes(log)
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
    product = {"base.quant": ["nf4"], "adapter": {"dora": {"adapter.kind": "dora"}}}
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
    product = {"adapter": {"dora": {"adapter.kind": "dora"}}}
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
    found = runner.invoke(app, ["study", file, "--dry-run", "--json", "--dir", str(tmp_path / "none")])
    assert found.exit_code == 0, found.output
    shown = json.loads(found.stdout)
    assert [cell["kind"] for cell in shown["cells"]] == ["base", "base", "trained", "trained"]
    assert shown["notes"] == [
        "This study cannot have a verdict: the learning rates are not searched (rates); there are only 1 of 3 "
        "(compare.min_seeds) seeds. It gives scores and intervals."
    ]
    assert "This study cannot have a verdict" in found.stderr
    assert not (tmp_path / "none").exists()
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
    monkeypatch.setattr(cluster_jobs, "submit_jobs", lambda *a, **k: started.append((a, k)) or [])
    found = CliRunner().invoke(
        app, ["study", str(write_study(root)), "--dir", str(tmp_path), "--jobs", "3", "--job-option", "timeout_min=9"]
    )
    assert found.exit_code == 0, found.output
    ((command, directory, count), options) = started[0]
    assert command[1:4] == ["-m", "qdora.cli", "study"]
    assert (directory, count, options) == (tmp_path, 3, {"cluster": "slurm", "parameters": {"timeout_min": 9}})


def test_arms_can_be_compared_on_the_test_split(root: Path, tmp_path: Path) -> None:
    mix = [{"task": "demo/facts"}, {"task": "demo/odd"}, {"source": str(root / "data/sums.jsonl")}]
    common = {"data.mix": mix, "eval.limit": 3, "data.max_length": 256}
    options: dict[str, Any] = {"compare": {"split": "test"}, "bases": False, "seeds": [0, 1]}
    with pytest.raises(UserError, match=r"compare\.split: sums has no test split"):
        study_run(write_study(root, **options, settings=common), tmp_path)
    # sums, which only trains, needs no test split
    file = write_study(root, **options, settings=common | {"eval.tasks": ["demo/facts"]})
    found = study_run(file, tmp_path, console=Console(file=io.StringIO()))
    assert found["num_done"] == 4
    report = read_report(tmp_path)
    (row,) = [row for row in report.tables["comparisons"] if row["role"] == "primary"]
    assert (row["num_examples"], row["num_seeds"], row["winner"]) == (6, 2, "")  # three of each seed, of facts alone
    ids: dict[str, set[str]] = {}
    for cell in read_index(tmp_path)["cells"]:
        scored = json.loads((tmp_path / "cells" / cell["key"] / "eval/step-2.json").read_text())["per_example"]
        assert ids.setdefault(cell["labels"]["seed"], {row["id"] for row in scored}) == {row["id"] for row in scored}
    assert not ids["0"] & ids["1"]


SEARCH: dict[str, Any] = {
    "settings": {"train.checkpoint_every": None, "data.validation_fraction": 0.5, "eval.limit": 10},
    "rates": {"values": [1e-4, 1e-3, 1e-2], "steps": 1, "seeds": [100], "extend": 0},
    "stages": [
        {"name": "main"},
        {"name": "moved", "cells": {"base.quant": "nf4"}, "kind": "transplant"},
        {"name": "rescaled", "cells": {"base.quant": "nf4"}, "kind": "rescaled"},
        {"name": "back", "cells": {"base.quant": "nf4"}, "kind": "set_back"},
        {"name": "layers", "kind": "by_layer"},
    ],
    "product": {"base.quant": ["none", "nf4"], "adapter": {"dora": {"adapter.kind": "dora"}}},
    "bases": False,
    "time": {"start": 7200, "step": 1800},
    "compare": {"spread": 0.01},
}


def test_rates_are_searched_then_arms_are_trained_and_adapters_transplanted(root: Path, tmp_path: Path) -> None:
    file = write_study(root, **SEARCH)
    found = CliRunner().invoke(app, ["study", str(file), "--dir", str(tmp_path), "--dry-run", "--json"])
    planned = json.loads(found.stdout)
    assert [(each["stage"], each["num_cells"], each["seconds"] / 3600) for each in planned["stages"]] == [
        ("rates, short runs", 6, 6 * 2.5),
        ("rates", 6, 6 * 3),
        ("main", 2, 2 * 3),
        ("moved", 1, 2),
        ("rescaled", 1, 2),
        ("back", 1, 2),
        ("layers", 2, 2 * 2),
    ]
    done = study_run(file, tmp_path, console=Console(file=io.StringIO()))
    assert done["num_waiting"] == 0
    index = read_index(tmp_path)
    by_stage = {stage: [c for c in index["cells"] if c["stage"] == stage] for stage in ("main", "moved")}
    assert [cell["labels"]["base.quant"] for cell in by_stage["main"]] == ["none", "nf4"]
    rates = {row["base.quant"]: row["rate"] for row in index["rates"]}
    for cell in by_stage["main"]:
        recipe = yaml.safe_load((tmp_path / "cells" / cell["key"] / "recipe.yaml").read_text())
        assert recipe["train"]["lr"] == float(rates[cell["labels"]["base.quant"]])
    (moved,) = by_stage["moved"]
    assert moved["adapter_key"] == by_stage["main"][0]["key"]
    scored = json.loads((tmp_path / "cells" / moved["key"] / "eval/step-0.json").read_text())["per_example"]
    base = load_run(tmp_path / "cells" / by_stage["main"][1]["key"], base_only=True)
    load_adapter(base.model, tmp_path / "cells" / moved["adapter_key"] / "adapter")
    base.model.eval()
    examples = run_examples(base.recipe, "validation")
    expected = evaluate(base.model, base.tokenizer, examples, limit=10, block=0).per_example
    assert [row["nll"] for row in scored] == pytest.approx([row["nll"] for row in expected], rel=1e-6)
    check_rescaled(tmp_path, index["cells"])
    check_set_back(tmp_path, index["cells"])
    check_by_layer(tmp_path, index["cells"])
    again = study_run(file, tmp_path, console=Console(file=io.StringIO()))
    assert again["num_done"] == done["num_done"] == done["num_cells"]


def check_rescaled(directory: Path, cells: list[dict[str, Any]]) -> None:
    """Against the transplant, whose magnitudes get the ratio of the row norms of both bases here."""
    (rescaled,) = [cell for cell in cells if cell["kind"] == "rescaled"]
    (moved,) = [cell for cell in cells if cell["kind"] == "transplant"]
    assert rescaled["adapter_key"] == moved["key"]
    (plain,) = [cell for cell in cells if cell["stage"] == "main" and cell["labels"]["base.quant"] == "none"]
    dense = load_run(directory / "cells" / plain["key"], base_only=True).model
    run = load_run(directory / "cells" / moved["key"])
    for path, layer in adapted_layers(run.model).items():
        after, before = dense_weight(layer.base.stored_weight, torch.float64), dense.get_submodule(path).weight.double()
        layer.magnitude.data *= (after.square().sum(1) / before.square().sum(1)).sqrt().float()
        layer.parameters_changed()
    found = evaluate(run.model, run.tokenizer, run_examples(run.recipe, "validation"), limit=10, block=0).per_example
    scored, unscaled = (
        [row["nll"] for row in json.loads((directory / "cells" / file).read_text())["per_example"]]
        for file in (f"{rescaled['key']}/eval/set-back.json", f"{moved['key']}/eval/step-0.json")
    )
    assert scored == pytest.approx([row["nll"] for row in found], rel=1e-6)
    assert scored != pytest.approx(unscaled, rel=1e-5)


def test_checkpoints_of_an_adapter_and_of_full_fine_tuning_are_measured(root: Path, tmp_path: Path) -> None:
    full = dict.fromkeys(f"adapter.{name}" for name in AdapterConfig.model_fields) | {"adapter.kind": "full"}
    product = {"base.quant": ["none"], "adapter": {"dora": {"adapter.kind": "dora"}, "full": full}}
    stages = [{"name": "main"}, {"name": "checkpoints", "kind": "by_layer", "steps": [1, 2]}]
    file = write_study(root, product=product, stages=stages, bases=False, settings={"train.lr": 0.01})
    study_run(file, tmp_path, console=Console(file=io.StringIO()))
    rows = read_report(tmp_path).tables["checkpoints"]
    assert {(row["adapter"], row["step"]) for row in rows} == {
        (kind, step) for kind in ("dora", "full") for step in (1, 2)
    }
    for cell in (cell for cell in read_index(tmp_path)["cells"] if cell["kind"] == "trained"):
        place, kind = tmp_path / "cells" / cell["key"], cell["labels"]["adapter"]
        base, run = load_run(place, base_only=True).model, load_run(place)
        scored = json.loads((place / "eval/step-2.json").read_text())["per_example"]
        nll = sum(row["nll"] for row in scored) / sum(row["num_answer_tokens"] for row in scored)
        last = {row["layer"]: row for row in rows if (row["adapter"], row["step"]) == (kind, 2)}
        assert all(row["nll"] == pytest.approx(nll, rel=1e-6) for row in last.values())
        assert last
        path = next(iter(last))
        w, trained = base.get_submodule(path).weight.double(), run.model.get_submodule(path)
        v = (trained.merged_weight(torch.float64) if kind == "dora" else trained.weight.double()).detach()
        cosines = torch.nn.functional.cosine_similarity(v, w, dim=1)
        assert last[path]["direction_change"] == pytest.approx(float((1 - cosines).mean()), rel=1e-2)
        moved = (v.norm(dim=1) - w.norm(dim=1)).abs().mean()
        assert last[path]["length_change"] == pytest.approx(float(moved), rel=1e-2)


def check_set_back(directory: Path, cells: list[dict[str, Any]]) -> None:
    """Against the trained run, whose layers get the row norms of their bases here."""
    (back,) = [cell for cell in cells if cell["kind"] == "set_back"]
    (source,) = [cell for cell in cells if cell["stage"] == "main" and cell["labels"]["base.quant"] == "nf4"]
    assert back["adapter_key"] == source["key"]
    trained = load_run(directory / "cells" / source["key"])
    layers = adapted_layers(trained.model)
    for layer in layers.values():
        weight = dense_weight(layer.base.stored_weight, torch.float64)
        layer.magnitude.data = weight.square().sum(dim=1).sqrt().float()
        layer.parameters_changed()
    examples = run_examples(trained.recipe, "validation")
    found = evaluate(trained.model, trained.tokenizer, examples, limit=10, block=0).per_example
    scored = json.loads((directory / "cells" / back["key"] / "eval/set-back.json").read_text())["per_example"]
    assert [row["nll"] for row in scored] == pytest.approx([row["nll"] for row in found], rel=1e-6)
    report = read_report(directory)
    told = Counter((row["base.quant"], row["layer"]) for row in report.tables["changes"])
    assert told == Counter((quant, path) for quant in ("none", "nf4") for path in layers)  # by the stage layers, once
    (row,) = [row for row in report.tables["repair"] if "magnitudes" in row]
    assert row["base.quant"] == "nf4"


def check_by_layer(directory: Path, cells: list[dict[str, Any]]) -> None:
    """Against the trained runs: a model whose one block is that of the base, and loops over a layer's weights."""
    found = {}
    for cell in cells:
        if cell["kind"] == "by_layer":
            found[cell["labels"]["base.quant"]] = json.loads((directory / f"results/{cell['key']}.json").read_text())
    assert set(found) == {"none", "nf4"}
    assert not any("error_undone" in change for change in found["none"]["changes"].values())
    (source,) = [cell for cell in cells if cell["stage"] == "main" and cell["labels"]["base.quant"] == "nf4"]
    trained = load_run(directory / "cells" / source["key"])
    layers = adapted_layers(trained.model)
    found_examples = run_examples(trained.recipe, "validation").values()
    examples = [replace(each, choices=(), gold=None) for some in found_examples for each in spread(some, 15, 0)]

    def nll() -> float:
        scores = score_examples(trained.model, trained.tokenizer, examples)
        return sum(each.nll for each in scores) / sum(each.num_answer_tokens for each in scores)

    whole = nll()
    assert found["nf4"]["nll"] == pytest.approx(whole, rel=1e-6)
    path, layer = next(iter(layers.items()))
    (plain,) = [cell for cell in cells if cell["stage"] == "main" and cell["labels"]["base.quant"] == "none"]
    dense = load_run(directory / "cells" / plain["key"], base_only=True)
    changes = found["nf4"]["changes"]
    weights = [layer.merged_weight(torch.float64), dense_weight(layer.base.stored_weight, torch.float64)]
    weights.append(dense.model.get_submodule(path).weight.double())
    undone, best, cosine = reference.error_undone(*(each.detach().numpy() for each in weights), layer.rank)
    assert changes[path]["error_undone"] == pytest.approx(undone, rel=1e-2, abs=1e-5)
    assert changes[path]["error_undone_best"] == pytest.approx(best, rel=1e-4)
    assert changes[path]["error_cosine"] == pytest.approx(cosine, rel=1e-2, abs=1e-5)
    for path, layer in layers.items():
        if ".0." in path:
            assert layer.magnitude is not None
            layer.lora_B.data.zero_()
            weight = dense_weight(layer.base.stored_weight, torch.float64)
            layer.magnitude.data = weight.square().sum(dim=1).sqrt().float()
            layer.parameters_changed()
    blocks = {each["block"]: each["rise"] for each in found["nf4"]["blocks"]}
    assert blocks[0] == pytest.approx(nll() - whole, abs=1e-6)
    assert max(map(abs, blocks.values())) > 1e-5


@pytest.mark.slow
def test_shards_take_turns_at_cells_that_wait_for_each_other(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study_verb, "_IDLE_SECONDS", 0.01)
    file = write_study(root, **SEARCH)
    parts = [1, 2, 1, 2, 1, 2, 1, 2]
    found = [study_run(file, tmp_path, shard=f"{part}/2", console=Console(file=io.StringIO())) for part in parts]
    assert found[0]["num_waiting"] > 0  # nobody works on the other part, so this one ends
    assert found[-1]["num_waiting"] == 0
    assert all(StudyDirectory(tmp_path).is_done(cell["key"]) for cell in read_index(tmp_path)["cells"])


def test_guesses_are_left_for_the_report(done: Path) -> None:
    """Counted here from the run of the uncompressed base."""
    (dense,) = [cell["key"] for cell in read_index(done)["cells"] if cell["key"] == cell["dense_key"]]
    found = json.loads((done / "shared/guesses" / dense / "guesses.json").read_text())
    run = load_run(done / "cells" / dense)
    vocabulary = run.model.config.vocab_size
    assert found["uniform"] == pytest.approx(math.log(vocabulary))
    answers: dict[str, list[int]] = {"train": [], "validation": []}
    for split, tokens in answers.items():
        for examples in run_examples(run.recipe, split).values():
            for each in spread(examples, 4 if split == "validation" else None):
                ids = run.tokenizer(each.prompt + each.answer)["input_ids"]
                tokens += ids[len(run.tokenizer(each.prompt.rstrip())["input_ids"]) :]
    counts, total = Counter(answers["train"]), len(answers["train"])
    nll = [-math.log(0.99 * counts[token] / total + 0.01 / vocabulary) for token in answers["validation"]]
    assert found["unigram"] == pytest.approx(sum(nll) / len(nll), rel=1e-6)
    guesses = {row["guess"]: row.get("nll") for row in read_report(done).tables["guesses"]}
    assert guesses["unigram"] == found["unigram"]


def test_a_real_study_is_reported(done: Path) -> None:
    report = read_report(done)
    assert len(report.tables["arms"]) == 4
    assert not re.search(r"\bnan\b|\b1 (seeds|arms|cells)\b", " ".join([*report.answer, report.status]))
    (sentence,) = report.answer
    assert "not decided" in sentence
    assert "(1 seed; " in sentence


def test_cells_share_their_pruned_base(root: Path) -> None:
    prune = {"base.prune.method": "magnitude", "base.prune.sparsity": 0.5}
    base = {"half": {"base.quant": "nf4", **prune}}
    adapter = {"lora": {"adapter.kind": "lora"}, "dora": {"adapter.kind": "dora"}}
    file = write_study(root, product={"base": base, "adapter": adapter})
    study_run(file, root / "pruned", console=Console(file=io.StringIO()))
    made = list((root / "pruned/shared/bases").glob("*/base/model.safetensors"))
    assert len(made) == 1
    cells = list((root / "pruned/cells").glob("*/base/model.safetensors"))
    assert len(cells) == 3  # both adapters, and the base by itself
    assert all(cell.samefile(made[0]) for cell in cells)
