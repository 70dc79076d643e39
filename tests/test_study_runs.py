"""qdora study on a tiny model: cells are whole runs, done once, continued, and evaluated once a base."""

from __future__ import annotations

import errno
import io
import itertools
import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from torch import nn
from typer.testing import CliRunner

from qdora.adapter.layer import FrozenLinear
from qdora.cli import app
from qdora.data.sources import run_examples
from qdora.errors import RunFailure, UserError
from qdora.evaluate.loglikelihood import score_examples
from qdora.evaluate.suite import evaluate, spread
from qdora.model.adapter_file import load_adapter
from qdora.model.inject import adapted_layers, inject, model_size
from qdora.quant.packed import quantize
from qdora.quant.tiles import dense_weight
from qdora.recipe.recipe_file import settings
from qdora.recipe.settings import AdapterConfig
from qdora.run.load_run import load_run
from qdora.study import run as study_module
from qdora.study.report import read_report
from qdora.study.results import StudyDirectory, read_index
from qdora.study.run import study_run
from tests import reference, support

DORA, LORA = {"dora": {"adapter.kind": "dora"}}, {"lora": {"adapter.kind": "lora"}}
FULL = dict.fromkeys(f"adapter.{name}" for name in AdapterConfig.model_fields) | {"adapter.kind": "full"}
OF_NF4 = {"cells": {"base.quant": "nf4"}}
WHOLE: dict[str, Any] = {
    "settings": {"data.validation_fraction": 0.5, "eval.limit": 10},
    "rates": {"values": [1e-4, 1e-3, 1e-2], "seeds": [100], "extend": 0},
    "product": {"base.quant": ["none", "nf4"], "adapter": DORA},
    "stages": [
        {"name": "main"},
        *({"name": kind, "kind": kind, **OF_NF4} for kind in ("transplant", "rescaled", "set_back")),
        {"name": "by_layer", "kind": "by_layer"},
    ],
    "time": {"start": 7200, "step": 1800},
}
ONE: dict[str, Any] = {"product": {"base.quant": ["nf4"], "adapter": DORA}, "bases": False}


def of_recipe(place: Path) -> Any:
    return yaml.safe_load((place / "recipe.yaml").read_text())


def write_study(root: Path, name: str, **document: Any) -> Path:
    """A study of two steps on the tiny model."""
    recipe = support.tiny_recipe(root, train__steps=2, train__checkpoint_every=1, eval__limit=4, eval__at_start=...)
    plain = settings(recipe)
    for key in ("block_size", "double_quant", "skip"):
        del plain["base"][key]
    (root / "recipe.yaml").write_text(yaml.safe_dump(plain))
    file = root / f"{name}.yaml"
    file.write_text(yaml.safe_dump({"recipe": "recipe.yaml", "seeds": [0]} | document))
    return file


def run(file: Path, directory: Path, **options: Any) -> dict[str, Any]:
    return study_run(file, directory, console=Console(file=io.StringIO()), **options)


@pytest.fixture(scope="module")
def done(root: Path) -> Path:
    """A study with every kind of cell that has run."""
    found = run(write_study(root, "whole", **WHOLE), root / "study")
    assert (found["num_waiting"], found["num_done"]) == (0, found["num_cells"])
    return root / "study"


def cells_of(directory: Path, kind: str) -> dict[str, dict[str, Any]]:
    """Label of the base -> record of the only cell of a kind in the stage of that name, with its result."""
    stage = {"trained": "main", "base": "bases"}.get(kind, kind)
    found = [cell for cell in read_index(directory)["cells"] if (cell["kind"], cell["stage"]) == (kind, stage)]
    return {cell["labels"].get("base.quant", "none"): cell | result_of(directory, cell["key"]) for cell in found}


def result_of(directory: Path, key: str) -> dict[str, Any]:
    return StudyDirectory(directory).result(key) or {}


def nll_of(directory: Path, cell: dict[str, Any]) -> list[float]:
    """Scores of a cell, example by example."""
    file = directory / "cells" / cell["key"] / cell["files"]["scores"]
    return [row["nll"] for row in json.loads(file.read_text())["per_example"]]


def evaluated(found: Any) -> Any:
    """Scores of a model that was changed here."""
    examples = run_examples(found.recipe, "validation")
    rows = evaluate(found.model, found.tokenizer, examples, limit=10, block=0).per_example
    return pytest.approx([row["nll"] for row in rows], rel=1e-6)


def row_norm(layer: Any) -> torch.Tensor:
    return dense_weight(layer.base.stored_weight, torch.float64).square().sum(dim=1).sqrt()


def test_a_dry_run_tells_cells_and_hours_and_writes_nothing(root: Path, tmp_path: Path) -> None:
    file = str(write_study(root, "whole", **WHOLE))
    found = CliRunner().invoke(app, ["study", file, "--dir", str(tmp_path / "none"), "--dry-run", "--json"])
    assert found.exit_code == 0, found.output
    shown = json.loads(found.stdout)
    hours = {each["stage"]: (each["num_cells"], each["seconds"] / 3600) for each in shown["stages"]}
    counts = {"bases": (2, 2 * 2), "rates": (6, 6 * 3), "main": (2, 2 * 3)}
    assert hours == counts | dict.fromkeys(("transplant", "rescaled", "set_back"), (1, 2)) | {"by_layer": (2, 2 * 2)}
    assert {each["num_done"] for each in shown["stages"]} == {0}
    assert len(shown["cells"]) == shown["num_cells"] == 15
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"settings": {"model.source": "./nowhere"}}, "no such file or directory"),
        ({"compare": {"split": "test"}}, r"compare\.split: sums has no test split"),
    ],
)
def test_what_a_study_lacks_is_told_before_it_runs(root: Path, tmp_path: Path, changes: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        run(write_study(root, "lacking", **ONE | changes), tmp_path)


def test_jobs_are_started_with_the_same_study(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []
    monkeypatch.setattr(study_module, "submit_jobs", lambda *a, **k: started.append((a, k)) or [])
    study = ["study", str(write_study(root, "one", **ONE)), "--dir", str(tmp_path)]
    found = CliRunner().invoke(app, [*study, "--jobs", "3", "--job-option", "timeout_min=9"])
    assert found.exit_code == 0, found.output
    (((_, *command), directory, count), parameters) = started[0]
    assert (command, directory, count) == (["-m", "qdora.cli", *study], tmp_path, 3)
    assert parameters == {"cluster": "slurm", "parameters": {"timeout_min": 9}}


def test_every_cell_is_a_run_and_has_a_result(done: Path) -> None:
    bases, trained = cells_of(done, "base"), cells_of(done, "trained")
    for cell in read_index(done)["cells"]:
        place, result = done / "cells" / cell["key"], result_of(done, cell["key"])
        if cell["kind"] in ("base", "rate", "trained"):
            assert len(nll_of(done, cell | result)) == 2 * 10
            steps = 0 if cell["kind"] == "base" else 2
            assert result["num_steps"] == of_recipe(place)["train"]["steps"] == steps
            assert (place / "adapter").exists() == (cell["kind"] != "base")
            assert (place / "checkpoints").exists() == (cell["kind"] == "trained")  # nothing reads those of rates
    assert not list((done / "claims").glob("*.lock"))
    sizes = {quant: bases[quant]["size"] for quant in ("none", "nf4")}
    assert sizes["none"]["num_linear_bytes"] == 2 * sizes["none"]["num_linear_weights"]
    assert 4.1 < 8 * sizes["nf4"]["num_linear_bytes"] / sizes["nf4"]["num_linear_weights"] < 8
    assert sizes["nf4"]["num_adapter_bytes"] == 0 < trained["nf4"]["size"]["num_adapter_bytes"]
    assert trained["nf4"]["size"]["num_base_bytes"] == sizes["nf4"]["num_base_bytes"]
    rates = {row["base.quant"]: float(row["rate"]) for row in read_index(done)["rates"]}
    assert {quant: of_recipe(done / "cells" / cell["key"])["train"]["lr"] for quant, cell in trained.items()} == rates


def test_adapters_are_evaluated_with_other_bases_and_magnitudes(done: Path) -> None:
    """Against the trained runs, whose adapters and magnitudes are changed here."""
    trained = cells_of(done, "trained")
    moved, rescaled, back = (cells_of(done, kind)["nf4"] for kind in ("transplant", "rescaled", "set_back"))
    keys = (trained["none"]["key"], moved["key"], trained["nf4"]["key"])
    assert (moved["adapter_key"], rescaled["adapter_key"], back["adapter_key"]) == keys
    base = load_run(done / "cells" / trained["nf4"]["key"], base_only=True)
    load_adapter(base.model, done / "cells" / moved["adapter_key"] / "adapter")
    base.model.eval()
    assert nll_of(done, moved) == evaluated(base)
    dense = load_run(done / "cells" / trained["none"]["key"], base_only=True).model
    found = load_run(done / "cells" / moved["key"])
    for path, layer in adapted_layers(found.model).items():
        layer.magnitude.data *= (row_norm(layer) / dense.get_submodule(path).weight.double().norm(dim=1)).float()
        layer.parameters_changed()
    assert nll_of(done, rescaled) == evaluated(found)
    assert nll_of(done, rescaled) != pytest.approx(nll_of(done, moved), rel=1e-5)
    found = load_run(done / "cells" / trained["nf4"]["key"])
    for layer in adapted_layers(found.model).values():
        layer.magnitude.data = row_norm(layer).float()
        layer.parameters_changed()
    assert nll_of(done, back) == evaluated(found)
    (row,) = [row for row in read_report(done).tables["repair"] if "magnitudes" in row]
    assert row["base.quant"] == "nf4"


def test_an_adapter_is_measured_layer_by_layer(done: Path) -> None:
    """Against the trained runs: a model whose one block is that of the base, and loops over a layer's weights."""
    found = cells_of(done, "by_layer")
    assert not any("error_undone" in change for change in found["none"]["changes"].values())
    trained = cells_of(done, "trained")
    ours = load_run(done / "cells" / trained["nf4"]["key"])
    layers = adapted_layers(ours.model)
    told = [(row["base.quant"], row["layer"]) for row in read_report(done).tables["changes"]]
    assert sorted(told) == sorted((quant, path) for quant in ("none", "nf4") for path in layers)
    groups = run_examples(ours.recipe, "validation").values()
    examples = [replace(each, choices=(), gold=None) for some in groups for each in spread(some, 15, 0)]

    def nll() -> float:
        scores = score_examples(ours.model, ours.tokenizer, examples)
        return sum(each.nll for each in scores) / sum(each.num_answer_tokens for each in scores)

    whole = nll()
    assert found["nf4"]["nll"] == pytest.approx(whole, rel=1e-6)
    path, layer = next(iter(layers.items()))
    dense = load_run(done / "cells" / trained["none"]["key"], base_only=True).model
    weights = [layer.merged_weight(torch.float64), dense_weight(layer.base.stored_weight, torch.float64)]
    weights.append(dense.get_submodule(path).weight.double())
    change = found["nf4"]["changes"][path]
    names = ("error_undone", "error_undone_best", "error_cosine")
    expected = reference.error_undone(*(each.detach().numpy() for each in weights), layer.rank)
    assert [change[name] for name in names] == pytest.approx(expected, rel=1e-2, abs=1e-5)
    assert change["error_undone_best"] == pytest.approx(expected[1], rel=1e-4)
    for layer in (layer for path, layer in layers.items() if ".0." in path):
        layer.lora_B.data.zero_()
        layer.magnitude.data = row_norm(layer).float()
        layer.parameters_changed()
    blocks = {each["block"]: each["rise"] for each in found["nf4"]["blocks"]}
    assert blocks[0] == pytest.approx(nll() - whole, abs=1e-6)
    assert max(map(abs, blocks.values())) > 1e-5


def test_checkpoints_of_an_adapter_and_of_full_fine_tuning_are_measured(root: Path, tmp_path: Path) -> None:
    stages = [{"name": "main"}, {"name": "steps", "kind": "by_layer", "steps": [1, 2]}]
    product = {"base.quant": ["none"], "adapter": DORA | {"full": FULL}}
    changes = {"product": product, "stages": stages, "settings": {"train.lr": 0.01}, "bases": False}
    run(write_study(root, "checkpoints", **changes), tmp_path)
    rows = read_report(tmp_path).tables["checkpoints"]
    assert {(row["adapter"], row["step"]) for row in rows} == {(kind, n) for kind in product["adapter"] for n in (1, 2)}
    for cell in (cell for cell in read_index(tmp_path)["cells"] if cell["kind"] == "trained"):
        place, kind = tmp_path / "cells" / cell["key"], cell["labels"]["adapter"]
        scored = json.loads((place / "eval/step-2.json").read_text())["per_example"]
        nll = sum(row["nll"] for row in scored) / sum(row["num_answer_tokens"] for row in scored)
        last = {row["layer"]: row for row in rows if (row["adapter"], row["step"]) == (kind, 2)}
        assert {round(row["nll"] / nll, 6) for row in last.values()} == {1.0}
        path = next(iter(last))
        w, trained = (load_run(place, base_only=only).model.get_submodule(path) for only in (True, False))
        w, v = w.weight.double(), (trained.merged_weight(torch.float64) if kind == "dora" else trained.weight.double())
        turned = (1 - nn.functional.cosine_similarity(v, w, dim=1)).mean().item()
        longer = (v.norm(dim=1) - w.norm(dim=1)).abs().mean().item()
        found = [last[path][f"{name}_change"] for name in ("direction", "length")]
        assert found == pytest.approx([turned, longer], rel=1e-2)


def test_a_finished_study_trains_nothing(done: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study_module, "train_run", None)
    found = run(root / "whole.yaml", done)
    assert found["num_cells"] == found["num_done"] == len(read_index(done)["cells"])


def test_one_line_writes_its_grid_and_ends_with_a_table_and_verdicts(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_study(root, "one", **ONE)
    line = ["study", str(root / "recipe.yaml"), "--seeds", "1", "-s", "train.steps=1", "--dir", str(tmp_path)]
    line += ["--vary", "base.quant=none,nf4", "--vary", "adapter.kind=lora,dora"]
    found = CliRunner().invoke(app, [*line, "--dry-run"])
    assert "can get a verdict: the learning rates are not searched; seeds: 1, at least 3" in found.stdout
    assert (found.stdout[:8], [*tmp_path.iterdir()]) == ("recipe: ", [])
    found = CliRunner().invoke(app, line)
    assert found.exit_code == 0, found.output
    grid = yaml.safe_load((tmp_path / "grid.yaml").read_text())
    assert grid["product"] == {"base.quant": ["none", "nf4"], "adapter.kind": ["lora", "dora"]}
    told = dict.fromkeys(itertools.product(("none", "nf4"), ("no adapter", "lora", "dora")), "")
    for row in (line.split(" | ") for line in found.stdout.splitlines() if re.match(r"\| (none|nf4) ", line)):
        told |= zip(itertools.product([row[0][2:]], ("no adapter", "lora", "dora")), row[2:], strict=True)
        dense = row[0] == "| none"  # the others have few weights for one table of codes
        assert row[1] == "16.00" if dense else 4.13 < float(row[1]) < 8
    index = read_index(tmp_path)
    for cell in index["cells"]:
        file = tmp_path / "cells" / cell["key"] / result_of(tmp_path, cell["key"])["files"]["scores"]
        rows = json.loads(file.read_text())["per_example"]
        nll = sum(row["nll"] for row in rows) / sum(row["num_answer_tokens"] for row in rows)
        place = cell["labels"]["base.quant"], cell["labels"].get("adapter.kind", "no adapter")
        assert told.pop(place).startswith(f"{nll:.3f}")
    assert told == {}
    for words in ("base.quant nf4, dora against lora", "adapter.kind dora, nf4 against none"):
        assert re.search(f"{words}: not decided.* not searched", found.stdout)
    judged = [row for row in read_report(tmp_path).tables["comparisons"] if row["role"] == "primary"]
    assert [row["num_tests"] for row in judged] == [4] * 4
    monkeypatch.setattr(study_module, "train_run", None)
    assert CliRunner().invoke(app, line).stdout == found.stdout
    refused = CliRunner().invoke(app, [*line, "--rates", "1e-4,1e-3,1e-2"])
    assert (refused.exit_code, "grid.yaml: is of other settings" in refused.stderr) == (2, True)


def test_a_cell_that_fails_is_given_up_and_one_that_was_cut_off_continues_from_its_checkpoint(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_study(root, "budget", **ONE, settings={"memory.budget": "10GiB"})
    real, calls = study_module.train_run, []

    def stop(error: BaseException) -> Any:
        def broken(*_: Any, **__: Any) -> None:
            raise error

        return broken

    with monkeypatch.context() as patch:
        patch.setattr(study_module, "train_run", stop(RuntimeError("no room")))
        for _ in range(2):  # the second start does not try again
            with pytest.raises(RunFailure, match=r"1 of 1 cells failed; .*RuntimeError: no room\. .*--retry-failed"):
                run(file, tmp_path / "whole")
        full = stop(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        patch.setattr(study_module, "train_run", full)
        patch.setattr(StudyDirectory, "add_failure", full)
        with pytest.raises(RunFailure, match=r"cannot be written: the disk is full"):
            run(file, tmp_path / "full")
    assert run(file, tmp_path / "whole", retry_failed=True)["num_done"] == 1
    # Killed after the plan, when it begins again, and then in its evaluation
    cuts = [("qdora.run.run.base_of_run", KeyboardInterrupt()), ("qdora.train.evals.evaluate", None), None]

    def cut(recipe: Any, directory: Path, **options: Any) -> Any:
        place = cuts[len(calls)]
        calls.append(options["resume"])
        with monkeypatch.context() as patch:
            if place is not None:
                patch.setattr(place[0], stop(place[1] or RuntimeError("cut")))
            return real(recipe, directory, **options)

    monkeypatch.setattr(study_module, "train_run", cut)
    with pytest.raises(KeyboardInterrupt):
        run(file, tmp_path / "cut")
    assert not list((tmp_path / "cut/failures").iterdir())
    assert run(file, tmp_path / "cut")["num_done"] == 1
    assert calls == [False, False, True]
    whole, continued = (cells_of(tmp_path / name, "trained")["nf4"] for name in ("whole", "cut"))
    assert nll_of(tmp_path / "whole", whole) == nll_of(tmp_path / "cut", continued)
    (failure,) = StudyDirectory(tmp_path / "cut").failures(continued["key"])
    assert failure["reason"] == "RuntimeError: cut"


def test_cells_share_their_pruned_base_and_one_that_diverges_is_done(root: Path, tmp_path: Path) -> None:
    half = {"base.quant": "nf4", "base.prune.method": "magnitude", "base.prune.sparsity": 0.5}
    lost = {"lost": {"adapter.kind": "lora", "train.lr": 1e30}}
    run(write_study(root, "pruned", product={"base": {"half": half}, "adapter": DORA | lost}), tmp_path)
    (made,) = (tmp_path / "shared/bases").glob("*/model-00000.safetensors")
    cells = list((tmp_path / "cells").glob("*/base/model-00000.safetensors"))
    assert len(cells) == 3  # both adapters, and the base by itself
    assert all(cell.samefile(made) for cell in cells)
    index = read_index(tmp_path)["cells"]
    results = {cell["labels"].get("adapter"): result_of(tmp_path, cell["key"]) for cell in index}
    assert results["dora"]["compression"]["sparsity"] == pytest.approx(0.5, abs=0.01)
    assert (results["lost"]["num_vocabulary"], results["lost"]["diverged"][:10]) == (400, "Diverged: ")
    report = read_report(tmp_path)
    assert [row["adapter"] for row in report.tables["cells"] if row["status"] == "diverged"] == ["lost"]


def test_a_study_that_ends_between_two_blocks_of_its_base_goes_on_behind_the_first(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_gptq = {"base.method": "gptq", "base.calibration": {"sequences": 4, "length": 48}}
    file = write_study(root, "gptq", **ONE, settings=by_gptq)
    run(file, tmp_path / "whole")
    written = support.killed_at_second_write(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        run(file, tmp_path / "killed")
    assert run(file, tmp_path / "killed")["num_done"] == 1
    assert len(written) == 3  # a block is made once
    whole, continued = (cells_of(tmp_path / name, "trained")["nf4"] for name in ("whole", "killed"))
    assert nll_of(tmp_path / "whole", whole) == nll_of(tmp_path / "killed", continued)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(10, 6), nn.Linear(6, 10, bias=False)
        self.head.weight = self.embed.weight
        self.q_proj, self.norm = nn.Linear(6, 8), nn.LayerNorm(6)
        self.get_output_embeddings = lambda: self.head


def test_bytes_against_a_count_by_hand() -> None:
    def counted(model: nn.Module) -> list[int]:
        size = model_size(model)
        return [size[f"num_{name}"] for name in ("linear_weights", "linear_bytes", "base_bytes", "adapter_bytes")]

    model, others = Tied(), 2 * (60 + 48 + 8 + 12)  # the head is the embedding, and no linear layer
    assert counted(model) == [48, 96, others, 0]
    inject(model, kind="dora", rank=2, alpha=2.0, targets=["q_proj"], dtype=torch.bfloat16)
    assert counted(model) == [48, 96, others, 2 * (2 * 6 + 8 * 2) + 4 * 8]
    model = Tied()
    inject(model, kind="lora", rank=2, alpha=2.0, targets=["head", "q_proj"], dtype=torch.bfloat16)
    assert counted(model) == [48, 96, others, 2 * (2 * 6 + 10 * 2) + 2 * (2 * 6 + 8 * 2)]
    weight = quantize(torch.randn(128, 64), "nf4", block_size=64, double_quant=False)
    model.head = FrozenLinear(weight, torch.zeros(128), torch.zeros(128 * 64 // 8, dtype=torch.uint8))
    # Codes of 4 bits, a float32 scale for every 64 weights, and a bias; no layer's mask counts
    assert counted(model)[:3] == [48, 96, others + 128 * 64 // 2 + 128 * 4 + 2 * 128]
    # 2 bits a code and a float32 scale for every 64 weights
    tight = FrozenLinear(quantize(torch.randn(64, 64), "nf2", block_size=64, double_quant=False))
    assert counted(nn.ModuleDict({"q_proj": tight}))[1] == 64 * 64 * 2 // 8 + 64 * 4
