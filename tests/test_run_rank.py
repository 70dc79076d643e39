"""qdora rank: spectra of a run's layers against matrices formed in the test, ranks of gates, and recipes that train."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from qdora.cli import app
from qdora.errors import UserError
from qdora.export.export import export_run
from qdora.files.run_directory import RunDirectory
from qdora.model.inject import adapted_layers
from qdora.plan.fit import plan
from qdora.rank.rank import rank_faults, rank_run, ranks_of_gates
from qdora.recipe.options import ExportOptions, RankSettings
from qdora.recipe.recipe_file import load_recipe
from qdora.run.load_run import load_run
from qdora.run.run import train_run
from tests import support

QUIET = Console(quiet=True)
GATES = {"mean_rank": 2.0, "warmup": 2, "anneal": 4, "shrink_every": 2, "lr": 0.05}
SHORT: dict[str, Any] = {"eval__at_start": False, "eval__at_end": False, "eval__limit": ...}


def retrained(document: dict[str, Any], directory: Path) -> dict[str, Any]:
    """The layers of a run of the recipe that was written."""
    recipe = load_recipe(document["recipe"])
    assert recipe.adapter.rank_pattern == document["fragment"]["adapter.rank_pattern"]
    train_run(recipe, directory, console=QUIET)
    return adapted_layers(load_run(directory).model)


def test_curvature_gives_a_recipe_that_trains(whole, root):
    patterns = ("model.layers.1.self_attn.k_proj", "model.layers.1.mlp.down_proj")
    asked = RankSettings(layers=patterns, budget="60%", max_rank=6, examples=2, eigenvalues=10)
    document = rank_run(whole, asked, console=QUIET)
    assert json.loads((whole / "rank/curvature.json").read_text())["layers"] == document["layers"]
    assert (document["norm"], document["num_examples"], len(document["layers"])) == ("attached", 2, 2)
    for layer in document["layers"].values():
        spectrum, found = layer["spectrum"], layer["components"]
        assert (spectrum["curvature"], spectrum["norm"], layer["rank_of_run"]) == ("hessian", "attached", 4)
        assert (len(spectrum["eigenvalues"]), spectrum["size"]) == (10, 4 * layer["parameters_per_rank"])
        assert max(spectrum["residuals"]) < 1e-2 * abs(spectrum["eigenvalues"][0])
        assert layer["energies"] == sorted(found["worths"], reverse=True)[:6]
        assert len(found["worths"]) == 4 + 6
        assert 0 < max(found["curvature_errors"]) < max(found["curvatures"])
    ranks = {name: layer["rank"] for name, layer in document["layers"].items()}
    used = sum(rank * document["layers"][name]["parameters_per_rank"] for name, rank in ranks.items())
    assert used == document["num_parameters"] <= document["budget"]
    assert document["budget"] == document["num_parameters_of_run"] * 6 // 10
    layers = retrained(document, root / "reranked")
    assert load_recipe(document["recipe"]).adapter.same_scaling
    assert {name: layer.rank for name, layer in layers.items()} == dict.fromkeys(layers, 4) | ranks
    assert {layer.scaling for layer in layers.values()} == {2.0}
    model: Any = load_run(whole, widened=True).model
    assert model.get_input_embeddings().weight.dtype == torch.float32


def test_rivals_keep_to_what_was_asked(whole):
    for asked, budget, most in (
        (RankSettings(method="svd", budget="50%"), 0.5, 4),
        (RankSettings(layers=["k_proj"], max_rank=9, examples=2), 1, 9),
    ):
        found = rank_run(whole, asked, console=QUIET)
        assert found["budget"] == int(budget * found["num_parameters_of_run"])
        assert 0.97 * found["budget"] < found["num_parameters"] <= found["budget"]
        assert {layer["rank"] for layer in found["layers"].values()} <= set(range(1, most + 1))
    done = CliRunner().invoke(app, ["rank", str(whole), "--method", "svd", "--budget", "60%", "--json"])
    assert json.loads(done.stdout)["method"] == "svd", done.output
    assert CliRunner().invoke(app, ["rank", str(whole), "--method", "svd"]).exit_code == 2


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"method": "curvatur"}, "--method: 'curvature', 'svd' got 'curvatur'"),
    ({"curvature": "fisher", "eigenvalues": 3}, "--curvature: 'fisher' 'hessian' 'gauss_newton'"),
    ({"curvature": "gauss_newton"}, "--curvature: --eigenvalues"),
    ({"method": "svd", "budget": "50%", "norm": "held"}, "--norm: only --method curvature, got"),
    ({"method": "svd", "budget": "50%", "examples": 3}, "--examples: only --method curvature, got"),
    ({"method": "gates", "budget": "50%"}, "--budget: only --method curvature or svd, got"),
    ({"draws": 7}, "--draws: got 7, 0 (exact) 8"), ({"draws": -1}, "--draws: greater 0, got -1"),
    ({"method": "svd"}, "--budget: got 100% less than 100%"), ({"method": "gates"}, "no gates adapter.gates"),
    ({"layers": ["q_prj"]}, "--layers: 'q_prj' q_proj"), ({"budget": "half"}, "--budget: 'half'"),
    ({"budget": "inf%"}, "--budget: 'inf%'"),
    ({"method": "svd", "budget": "1"}, "at least 1,568 parameters rank 1"),
]  # fmt: skip


@pytest.mark.parametrize("asked, words", REFUSED)
def test_what_cannot_be_asked_is_refused(whole, asked, words):
    with pytest.raises(UserError) as error:
        rank_run(whole, RankSettings(**asked), console=QUIET)
    assert len(error.value.faults) == 1
    assert all(word in str(error.value) for word in words.split()), error.value


def test_lora_has_no_norm_and_without_draws_the_curvature_is_exact(root):
    run = root / "lora"
    train_run(support.tiny_recipe(root, adapter__kind="lora", train__steps=1), run, console=QUIET)
    for eigenvalues in (3, 0):
        asked = RankSettings(layers=["k_proj"], max_rank=2, examples=2, eigenvalues=eigenvalues, draws=0)
        found = rank_run(run, asked, console=QUIET)["layers"].values()
        assert [layer.get("spectrum", {}).get("norm") for layer in found] == ["none" if eigenvalues else None] * 2
        assert not any(any(layer["components"]["curvature_errors"]) for layer in found)


def test_layers_left_out_keep_their_scaling(root):
    """Those of a rank_pattern without same_scaling have alpha / their own rank."""
    run = root / "patterned"
    train_run(support.tiny_recipe(root, adapter__rank_pattern={"k_proj": 2}, train__steps=1), run, console=QUIET)
    before = {name: (layer.rank, layer.alpha) for name, layer in adapted_layers(load_run(run).model).items()}
    asked = RankSettings(layers=["v_proj", "down_proj"], max_rank=9, examples=2)
    document = rank_run(run, asked, console=QUIET)
    assert any(layer["rank"] != layer["rank_of_run"] for layer in document["layers"].values())
    after, left_out = retrained(document, root / "patterned-again"), set(before) - set(document["layers"])
    assert len(left_out) == 10
    assert {name: (after[name].rank, after[name].alpha) for name in left_out} == {n: before[n] for n in left_out}


def test_a_masked_run(root):
    prune = {"method": "magnitude", "pattern": "unstructured", "sparsity": 0.5}
    run = root / "masked"
    train_run(support.tiny_recipe(root, base__prune=prune, adapter__mask="keep", train__steps=2), run, console=QUIET)
    with pytest.raises(UserError, match=r"--method svd: with adapter\.mask keep"):
        rank_run(run, RankSettings(method="svd", budget="50%"), console=QUIET)
    document = rank_run(run, RankSettings(layers=["k_proj"], max_rank=4, examples=2), console=QUIET)
    assert load_recipe(document["recipe"]).adapter.mask == "keep"
    assert all(layer["energies"][0] > 0 for layer in document["layers"].values())


@pytest.fixture(scope="module")
def gated(root: Path) -> Path:
    changes: dict[str, Any] = SHORT | {"adapter__rank": 6, "base__block_size": 16, "train__steps": 8}
    train_run(support.tiny_recipe(root, **changes, adapter__gates=GATES), root / "gated", console=QUIET)
    return root / "gated"


def test_exports_of_a_gated_run_compute_the_same(gated, root, tmp_path):
    merged = export_run(gated, tmp_path / "merged", ExportOptions(dtype="float32"))["verification"]
    assert merged["passed"]
    assert merged["exported_vs_running"]["max_logit_difference"] < 1e-4
    assert export_run(gated, tmp_path / "nf4", ExportOptions(format="nf4-lora"))["verification"]["passed"]
    export_run(gated, tmp_path / "peft", ExportOptions(format="peft"))
    config = json.loads((tmp_path / "peft/adapter_config.json").read_text())
    original = load_run(gated, original=True).model
    layers = adapted_layers(original)
    assert len({layer.rank for layer in layers.values()}) > 1
    assert config["rank_pattern"]
    assert config["alpha_pattern"]
    base = AutoModelForCausalLM.from_pretrained(root / "model", dtype=torch.float32)
    theirs = PeftModel.from_pretrained(base, tmp_path / "peft").eval()
    for path, layer in layers.items():
        module = theirs.base_model.model.get_submodule(path)
        assert module.r["default"] == layer.rank
        assert module.scaling["default"] == pytest.approx(8.0 / 6, rel=1e-12)
    ids = support.LM_IDS % 300
    torch.testing.assert_close(support.logits_of(theirs, ids), support.logits_of(original, ids), atol=2e-4, rtol=0)


def test_ranks_of_gates_as_a_recipe_that_trains(gated, tmp_path):
    layers = adapted_layers(load_run(gated).model)
    ranks = {name: layer.rank for name, layer in layers.items()}
    document = rank_run(gated, RankSettings(method="gates"), console=QUIET)
    assert json.loads((gated / "rank/gates.json").read_text()) == json.loads(json.dumps(document))
    assert {name: layer["rank"] for name, layer in document["layers"].items()} == ranks
    for layer in document["layers"].values():
        gone = [step for step in layer["removed_after"] if step is not None]
        assert len(layer["removed_after"]) == layer["rank_of_run"] == 6
        assert len(gone) == 6 - layer["rank"]
        assert all(2 < step <= 6 for step in gone)
    sizes = {name: layer.in_features + layer.out_features for name, layer in layers.items()}
    assert document["num_parameters"] == sum(rank * sizes[name] for name, rank in ranks.items())
    assert load_recipe(document["recipe"]).adapter.gates is None
    again = retrained(document, tmp_path / "again")
    assert {name: layer.rank for name, layer in again.items()} == ranks
    assert [layer.scaling for layer in again.values()] == pytest.approx([8.0 / 6] * len(again), rel=1e-12)
    half = rank_run(gated, RankSettings(method="gates"), step=6, console=QUIET)
    assert half["num_parameters"] == document["num_parameters"], "after the anneal nothing changes"


def test_layers_of_different_scalings_are_no_recipe(gated, root):
    """A recipe has one alpha: a layer that has shrunk from rank 4 to 2 would be retrained with twice its scaling."""
    pattern: dict[str, Any] = {"adapter__gates": GATES, "adapter__rank": 6, "adapter__rank_pattern": {"q_proj": 4}}
    (fault,) = rank_faults(gated, support.tiny_recipe(root, **pattern), RankSettings(method="gates"))
    assert "adapter.rank_pattern without adapter.same_scaling" in fault
    same = support.tiny_recipe(root, **pattern, adapter__same_scaling=True)
    assert not rank_faults(gated, same, RankSettings(method="gates"))
    assert ranks_of_gates(RunDirectory(gated), same, None)["fragment"]["adapter.same_scaling"]


def test_a_plan_counts_the_gates(tmp_path):
    gated, plain = (
        plan(support.one_layer_recipe(tmp_path, train__steps=8, adapter__rank=6, **more))
        for more in ({"adapter__gates": GATES}, {})
    )
    assert gated.num_trainable == plain.num_trainable
    assert 0 < gated.tensor_bytes - plain.tensor_bytes < 0.05 * plain.tensor_bytes
