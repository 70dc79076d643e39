"""What a run with gates leaves: exports of every form, ranks as a recipe, a plan before it."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from transformers import AutoModelForCausalLM

from qdora.errors import UserError
from qdora.export.export_run import export_run
from qdora.export.options import ExportOptions
from qdora.files.run_directory import RunDirectory
from qdora.model.inject import adapted_layers
from qdora.plan.memory_plan import plan
from qdora.plan.plan_view import plan_run
from qdora.recipe.recipe_file import load_recipe
from qdora.run.load_run import load_run
from qdora.run.rank import RankSettings, rank_faults, rank_run, ranks_of_gates
from qdora.run.train import train_run
from tests import tiny_adapted, tiny_run

GATES = {"mean_rank": 2.0, "warmup": 2, "anneal": 4, "shrink_every": 2, "lr": 0.05}


def quiet() -> Console:
    return Console(file=io.StringIO(), width=130)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gates")


@pytest.fixture(scope="module", params=["l1", "hard_concrete"])
def run(root: Path, request: pytest.FixtureRequest) -> Path:
    changes: dict[str, Any] = {"adapter__gates": {**GATES, "mode": request.param}, "train__steps": 8}
    changes |= {
        "eval__at_start": False,
        "eval__at_end": False,
        "eval__limit": ...,
        "adapter__rank": 6,
        "base__block_size": 16,
    }
    train_run(tiny_run.recipe(root, **changes), root / request.param, console=quiet())
    return root / request.param


def test_merged_and_nf4_lora_equal_the_running_model(run: Path, tmp_path: Path) -> None:
    merged = export_run(run, tmp_path / "merged", ExportOptions(dtype="float32"))["verification"]
    assert merged["passed"]
    assert merged["exported_vs_running"]["max_logit_difference"] < 1e-4
    assert export_run(run, tmp_path / "nf4", ExportOptions(format_="nf4-lora"))["verification"]["passed"]


def test_peft_reads_the_ranks_and_computes_the_same(run: Path, root: Path, tmp_path: Path) -> None:
    export_run(run, tmp_path / "peft", ExportOptions(format_="peft"))
    config = json.loads((tmp_path / "peft/adapter_config.json").read_text())
    layers = adapted_layers(load_run(run).model)
    assert len({layer.rank for layer in layers.values()}) > 1
    assert config["rank_pattern"]
    assert config["alpha_pattern"]
    original = load_run(run, original=True).model
    base = AutoModelForCausalLM.from_pretrained(root / "model", dtype=torch.float32)
    theirs = PeftModel.from_pretrained(base, tmp_path / "peft").eval()
    for path, layer in layers.items():
        module = theirs.base_model.model.get_submodule(path)
        assert module.r["default"] == layer.rank
        assert module.scaling["default"] == pytest.approx(8.0 / 6, rel=1e-12)
    ids = tiny_adapted.IDS % 300
    torch.testing.assert_close(tiny_adapted.logits(theirs, ids), tiny_adapted.logits(original, ids), atol=2e-4, rtol=0)


@pytest.mark.figures
def test_ranks_as_a_recipe_that_trains_and_a_map(run: Path, root: Path, tmp_path: Path) -> None:
    layers = adapted_layers(load_run(run).model)
    document = rank_run(run, RankSettings(method="gates"), console=quiet())
    assert json.loads((run / "rank/gates.json").read_text()) == json.loads(json.dumps(document))
    assert {name: layer["rank"] for name, layer in document["layers"].items()} == {n: x.rank for n, x in layers.items()}
    for layer in document["layers"].values():
        gone = [step for step in layer["removed_after"] if step is not None]
        assert len(layer["removed_after"]) == layer["rank_of_run"] == 6
        assert len(gone) == 6 - layer["rank"]
        assert all(2 < step <= 6 for step in gone)
    sizes = {name: layer.in_features + layer.out_features for name, layer in layers.items()}
    assert document["num_parameters"] == sum(layer.rank * sizes[name] for name, layer in layers.items())
    recipe = load_recipe(document["recipe"])
    assert recipe.adapter.gates is None
    assert recipe.adapter.rank_pattern == document["fragment"]["adapter.rank_pattern"]
    train_run(recipe, tmp_path / "again", console=quiet())
    again = adapted_layers(load_run(tmp_path / "again").model)
    assert {name: layer.rank for name, layer in again.items()} == {name: layer.rank for name, layer in layers.items()}
    assert [layer.scaling for layer in again.values()] == pytest.approx([8.0 / 6] * len(again), rel=1e-12)
    assert Path(document["figures"][0]).read_text().startswith("<?xml")
    half = rank_run(run, RankSettings(method="gates"), step=6, console=quiet())
    assert half["num_parameters"] == document["num_parameters"], "after the anneal nothing changes"


def test_layers_of_different_scalings_are_no_recipe(run: Path, root: Path) -> None:
    """A recipe has one alpha: a layer that has shrunk from rank 4 to 2 would be retrained with twice its scaling."""
    pattern: dict[str, Any] = {"adapter__gates": GATES, "adapter__rank": 6, "adapter__rank_pattern": {"q_proj": 4}}
    (fault,) = rank_faults(run, tiny_run.recipe(root, **pattern), RankSettings(method="gates"))
    assert "adapter.rank_pattern without adapter.same_scaling: the layers started with different scalings" in fault
    same = tiny_run.recipe(root, **pattern, adapter__same_scaling=True)
    assert not rank_faults(run, same, RankSettings(method="gates"))
    fragment = ranks_of_gates(RunDirectory(run), same, None)["fragment"]
    assert fragment["adapter.same_scaling"]


def test_a_run_goes_on_from_a_shrunk_adapter_with_gates_of_its_own(run: Path, root: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {f"adapter__{key}": ... for key in ("rank", "alpha")}
    changes |= {"adapter__resume_from": str(run / "adapter"), "eval__at_start": False, "eval__at_end": False}
    changes |= {"eval__limit": ...}
    recipe = tiny_run.recipe(root, **changes, adapter__gates={**GATES, "mean_rank": 1.5})
    summary = train_run(recipe, tmp_path / "next", console=quiet())
    layers = adapted_layers(load_run(tmp_path / "next").model).values()
    left = sum(layer.rank * (layer.in_features + layer.out_features) + layer.out_features for layer in layers)
    assert summary["num_trainable"] == left, "of the adapter that has been saved"
    assert sum(layer.rank for layer in layers) == 1.5 * len(layers)
    assert [layer.scaling for layer in layers] == pytest.approx([8.0 / 6] * len(layers), rel=1e-12)
    with pytest.raises(UserError, match=r"adapter\.gates\.mean_rank: got 2, must be at least 1 .* less than 2 "):
        train_run(tiny_run.recipe(root, **changes, adapter__gates=GATES), tmp_path / "none", console=quiet())


def test_a_plan_counts_the_gates(tmp_path: Path) -> None:
    asked = tiny_run.one_layer_recipe(tmp_path, adapter__gates=GATES, train__steps=8, adapter__rank=6)
    without = tiny_run.one_layer_recipe(tmp_path, train__steps=8, adapter__rank=6)
    gated, plain = (plan(each) for each in (asked, without))
    assert gated.num_trainable == plain.num_trainable
    assert 0 < gated.tensor_bytes - plain.tensor_bytes < 0.05 * plain.tensor_bytes
    said = plan_run(asked, "r.yaml", console=quiet())["memory"]["assumptions"]
    assert "the gates have removed no component yet" in said
