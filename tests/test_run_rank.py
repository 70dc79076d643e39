"""qdora rank: spectra of a run's layers against matrices formed in the test, and recipes that train."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from qdora.analysis.update_gradient import gradient_spectra, update_spectrum
from qdora.cli import app
from qdora.errors import UserError
from qdora.model.inject import adapted_layers
from qdora.recipe.recipe_file import load_recipe
from qdora.run.load_run import load_run
from qdora.run.rank import RankSettings, rank_run
from qdora.run.train import train_run
from tests import tiny_curvature, tiny_run
from tests.tiny_curvature import LAYERS


def quiet() -> Console:
    return Console(file=io.StringIO(), width=130)


@pytest.mark.figures
def test_curvature_gives_a_recipe_that_trains(whole: Path, root: Path) -> None:
    patterns = ("model.layers.1.self_attn.k_proj", "model.layers.1.mlp.down_proj")
    asked = RankSettings(layers=patterns, budget="60%", max_rank=6, examples=2, eigenvalues=10)
    document = rank_run(whole, asked, console=quiet())
    assert json.loads((whole / "rank/curvature.json").read_text())["layers"] == document["layers"]
    assert (document["norm"], document["num_examples"]) == ("attached", 2)
    assert len(document["layers"]) == 2
    for layer in document["layers"].values():
        spectrum, found = layer["spectrum"], layer["components"]
        assert (spectrum["curvature"], spectrum["norm"], layer["rank_of_run"]) == ("hessian", "attached", 4)
        assert len(spectrum["eigenvalues"]) == 10
        assert spectrum["size"] == 4 * layer["parameters_per_rank"]
        assert max(spectrum["residuals"]) < 1e-2 * abs(spectrum["eigenvalues"][0])
        assert spectrum["num_matvecs"] > 10 + 10  # the search and the residuals
        assert layer["energies"] == sorted(found["worths"], reverse=True)[:6]
        assert len(found["worths"]) == 4 + 6
        assert 0 < max(found["curvature_errors"]) < max(found["curvatures"])
        assert layer["total_energy"] >= sum(layer["energies"])
    ranks = {name: layer["rank"] for name, layer in document["layers"].items()}
    used = sum(rank * document["layers"][name]["parameters_per_rank"] for name, rank in ranks.items())
    assert used == document["num_parameters"] <= document["budget"]
    assert document["budget"] == document["num_parameters_of_run"] * 6 // 10
    recipe = load_recipe(document["recipe"])
    assert recipe.adapter.rank_pattern == document["fragment"]["adapter.rank_pattern"]
    assert recipe.adapter.same_scaling
    assert recipe.model.dtype == load_recipe(whole / "recipe.yaml").model.dtype
    train_run(recipe, root / "reranked", console=quiet())
    layers = adapted_layers(load_run(root / "reranked").model)
    assert {name: layer.rank for name, layer in layers.items()} == dict.fromkeys(layers, 4) | ranks
    assert {layer.scaling for layer in layers.values()} == {2.0}
    assert len(document["figures"]) == 3
    for figure in document["figures"]:
        assert Path(figure).read_text().startswith("<?xml")
    map_ = Path(document["figures"][1]).read_text()
    assert "mlp.down_proj" in map_


def test_draws_come_near_the_exact_curvature(whole: Path) -> None:
    exact, drawn = (
        rank_run(whole, RankSettings(layers=["down_proj"], max_rank=3, examples=4, draws=draws), console=quiet())
        for draws in (0, 64)
    )
    assert (exact["draws"], drawn["draws"]) == (0, 64)
    for name, layer in exact["layers"].items():
        found, right = drawn["layers"][name]["components"], layer["components"]
        assert found["slopes"] == right["slopes"]
        assert right["curvature_errors"] == [0.0] * len(right["sizes"])
        off = np.subtract(found["curvatures"], right["curvatures"]) / found["curvature_errors"]
        assert np.abs(off).max() < 4.5


@pytest.mark.parametrize("masked", [False, True])
def test_the_update_and_the_gradient_are_those_of_the_formed_matrices(masked: bool) -> None:
    model = tiny_curvature.adapted(masked=masked)
    layers = adapted_layers(model)
    batches = tiny_curvature.batches()
    found = gradient_spectra(model, list(LAYERS), batches, 5, norm="held")
    weights = {}
    for name, layer in layers.items():
        base = layer.base.dequantized(torch.float64)
        product = (layer.alpha / layer.rank) * layer.lora_B.detach() @ layer.lora_A.detach()
        keep = tiny_curvature.keep_mask(product.shape) if masked else torch.ones(product.shape, dtype=torch.bool)
        product = product * keep
        assert layer.magnitude is not None
        gain = layer.magnitude.detach() / (base + product).square().sum(1).sqrt()
        expected = torch.linalg.svdvals(gain[:, None] * product).square().numpy()[: layer.rank]
        if masked:
            with pytest.raises(ValueError, match="an adapter without a mask"):
                update_spectrum(layer)
        else:
            np.testing.assert_allclose(update_spectrum(layer).energies, expected, rtol=1e-9)
        weights[name] = (base + product, gain, keep)
    plain = tiny_curvature.base("llama")
    total = torch.zeros((), dtype=torch.float64)
    moved = {name: weight.clone().requires_grad_(True) for name, (weight, *_) in weights.items()}
    patched = {f"{name}.weight": weights[name][1][:, None] * moved[name] for name in moved}
    count = 0
    for batch in batches:
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        logits = torch.func.functional_call(plain, patched, kwargs=inputs).logits[:, :-1]
        total = total + torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), batch.labels[:, 1:].flatten(), reduction="sum"
        )
        count += int((batch.labels[:, 1:] != -100).sum())
    gradients = torch.autograd.grad(total / count, list(moved.values()))
    for name, gradient in zip(moved, gradients, strict=True):
        values = torch.linalg.svdvals(gradient * weights[name][2]).square().numpy()
        np.testing.assert_allclose(found[name].energies, values[:5], rtol=1e-6, atol=1e-12 * values[0])
        assert found[name].total == pytest.approx(values.sum(), rel=1e-6)
        assert found[name].cost == sum(gradient.shape)


@pytest.mark.parametrize(
    "asked",
    [
        RankSettings(method="svd", budget="50%"),
        RankSettings(method="svd", threshold=0.5),
        RankSettings(method="gradient", max_rank=9, examples=4),
    ],
    ids=["svd", "threshold", "gradient"],
)
def test_rivals_keep_to_what_was_asked(whole: Path, asked: RankSettings) -> None:
    document = rank_run(whole, asked, console=quiet())
    assert load_recipe(document["recipe"]).adapter.rank_pattern == document["fragment"]["adapter.rank_pattern"]
    ranks = [layer["rank"] for layer in document["layers"].values()]
    if asked.threshold is not None:
        assert ranks == [layer["effective_rank"] for layer in document["layers"].values()]
        return
    own = document["num_parameters_of_run"]
    assert document["num_parameters"] <= document["budget"] == (own // 2 if asked.method == "svd" else own)
    assert document["num_parameters"] > 0.97 * document["budget"]
    assert min(ranks) >= 1
    assert max(ranks) <= (4 if asked.method == "svd" else 9)


def test_faults(whole: Path, root: Path) -> None:
    for asked, message in [
        (
            RankSettings(method="curvatur"),
            r"--method: got 'curvatur', must be one of curvature, svd, gradient, gates\. .*curvature",
        ),
        (RankSettings(curvature="fisher"), "--curvature: got 'fisher', must be one of hessian, gauss_newton"),
        (RankSettings(norm="none"), "--norm: got 'none', must be one of attached, held"),
        (
            RankSettings(method="svd", budget="50%", norm="held"),
            "--norm: is used only with --method curvature, got --method svd",
        ),
        (
            RankSettings(method="svd", budget="50%", examples=3),
            "--examples: is used only with --method curvature or gradient, got --method svd",
        ),
        (
            RankSettings(method="gradient", eigenvalues=4),
            "--eigenvalues: is used only with --method curvature, got --method gradient",
        ),
        (RankSettings(curvature="hessian"), "--curvature: is used only with --eigenvalues"),
        (RankSettings(eigenvalues=0, curvature="hessian"), "--curvature: is used only with --eigenvalues"),
        (
            RankSettings(method="gradient", draws=4),
            "--draws: is used only with --method curvature, got --method gradient",
        ),
        (RankSettings(draws=7), r"--draws: got 7, must be 0 \(exact\) or at least 8"),
        (RankSettings(draws=-1), r"--draws: got -1, must be 0 \(exact\) or at least 8"),
        (RankSettings(method="svd"), r"--budget: got 100% \(default\), must be less than 100%"),
        (
            RankSettings(method="gates", budget="50%"),
            "--budget: is used only with --method curvature or svd or gradient, got --method gates",
        ),
        (RankSettings(method="gates", norm="held"), "--norm: is used only with --method curvature, got --method gates"),
        (RankSettings(method="gates"), r"has no gates\. Fix: name a run with adapter\.gates"),
        (RankSettings(budget="50%", threshold=0.5), "--threshold: is not used with --budget"),
        (RankSettings(threshold=1.5), "--threshold: got 1.5, must be above 0 and at most 1"),
        (RankSettings(budget="half"), "--budget: got 'half', must be a number of parameters"),
        (RankSettings(budget="inf%"), "--budget: got 'inf%', must be a number of parameters"),
        (RankSettings(method="svd", budget="1"), "must be at least 1,568 parameters for rank 1 everywhere"),
        (RankSettings(layers=["q_prj"]), r"--layers: 'q_prj' matches no adapted layer; must be .*q_proj"),
    ]:
        with pytest.raises(UserError, match=message):
            rank_run(whole, asked, console=quiet())
    train_run(tiny_run.recipe(root, adapter__kind="lora", train__steps=1), root / "lora", console=quiet())
    with pytest.raises(UserError, match="--norm: is not used with LoRA, which has no norm"):
        rank_run(root / "lora", RankSettings(norm="held"), console=quiet())
    found = rank_run(
        root / "lora", RankSettings(layers=["k_proj"], max_rank=2, examples=2, eigenvalues=3), console=quiet()
    )
    asked = RankSettings(layers=["v_proj"], max_rank=2, examples=2)
    short = rank_run(root / "lora", asked, console=quiet())
    assert {layer["spectrum"]["norm"] for layer in found["layers"].values()} == {"none"}
    assert all("spectrum" not in layer for layer in short["layers"].values())


def test_layers_left_out_keep_their_scaling(root: Path) -> None:
    """Those of a rank_pattern without same_scaling have alpha / their own rank."""
    run = root / "patterned"
    recipe = tiny_run.recipe(root, adapter__rank_pattern={"k_proj": 2}, train__steps=1)
    train_run(recipe, run, console=quiet())
    before = {name: (layer.rank, layer.alpha) for name, layer in adapted_layers(load_run(run).model).items()}
    asked = RankSettings(method="gradient", layers=["v_proj", "down_proj"], max_rank=9, examples=2)
    document = rank_run(run, asked, console=quiet())
    assert any(layer["rank"] != layer["rank_of_run"] for layer in document["layers"].values())
    train_run(load_recipe(document["recipe"]), root / "patterned-again", console=quiet())
    after = adapted_layers(load_run(root / "patterned-again").model)
    left_out = set(before) - set(document["layers"])
    assert len(left_out) == 10
    assert {name: (after[name].rank, after[name].alpha) for name in left_out} == {n: before[n] for n in left_out}


def test_a_masked_run(root: Path) -> None:
    prune = {"method": "magnitude", "pattern": "unstructured", "sparsity": 0.5}
    run = root / "masked"
    train_run(tiny_run.recipe(root, base__prune=prune, adapter__mask="keep", train__steps=2), run, console=quiet())
    with pytest.raises(UserError, match=r"--method svd: with adapter\.mask keep"):
        rank_run(run, RankSettings(method="svd", budget="50%"), console=quiet())
    for method in ("gradient", "curvature"):
        asked = RankSettings(method=method, layers=["k_proj"], max_rank=4, examples=2)
        document = rank_run(run, asked, console=quiet())
        assert load_recipe(document["recipe"]).adapter.mask == "keep"
        assert all(layer["energies"][0] > 0 for layer in document["layers"].values())


def test_the_command_prints_one_document(whole: Path) -> None:
    done = CliRunner().invoke(app, ["rank", str(whole), "--method", "svd", "--budget", "60%", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["method"] == "svd"
    wrong = CliRunner().invoke(app, ["rank", str(whole), "--method", "svd"])
    assert wrong.exit_code == 2


def test_the_loaded_run_is_float32(whole: Path) -> None:
    model: Any = load_run(whole, widened=True).model
    assert model.get_input_embeddings().weight.dtype == torch.float32
