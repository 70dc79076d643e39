"""Whole runs on mixtures of experts: resumed, pruned, gated, cached, on two processes, exported, analysed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from qdora.adapter.experts import AdaptedExperts
from qdora.errors import UserError
from qdora.export.export import export_run
from qdora.export.write import merged
from qdora.model.inject import adapted_layers
from qdora.model.load import load_model
from qdora.model.source import resolve
from qdora.rank.components import update_spectrum
from qdora.recipe.options import ExportOptions
from qdora.run.load_run import load_run
from qdora.run.run import train_run
from tests import support
from tests.support import assert_close_runs, assert_same_run

QUIET = Console(quiet=True)
IDS = torch.randint(3, 327, (2, 12), generator=torch.Generator().manual_seed(7))
SHORT: dict[str, Any] = {"train__steps": 4, "eval__at_start": False, "eval__at_end": False, "eval__limit": ...}
PRUNE = {"method": "wanda", "pattern": "2:4", "calibration": {"sequences": 2, "length": 16}}
GATES = {"mean_rank": 1.5, "warmup": 1, "anneal": 2, "shrink_every": 1, "lr": 0.05}
NO_FACTORS = {f"adapter__{key}": ... for key in ("rank", "alpha", "dropout", "experts")}


def recipe(root: Path, name: str = "qwen3_moe", **changes: Any) -> Any:
    """Experts of rank 2 beside attention of rank 4."""
    folder = root / name
    if not (folder / "model").exists():
        support.write_mixture(folder / "model", name)
    return support.tiny_recipe(folder, **({"adapter__experts": {"rank": 2}} | SHORT | changes))


def exported(run: Path, out: Path, **options: Any) -> dict[str, Any]:
    found = export_run(run, out, ExportOptions(**{"dtype": "float32"} | options), console=QUIET)
    assert found["verification"]["passed"], found["verification"]["faults"]
    return found


@pytest.fixture(scope="module")
def run(root: Path) -> Path:
    train_run(recipe(root, train__lr=0.02), root / "run", console=QUIET)
    return root / "run"


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS, use_cache=False).logits
    return found


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("qwen3_moe", {"adapter__gates": GATES, "adapter__experts": {"rank": 3}}),
        pytest.param("qwen3_moe", {"base__prune": PRUNE, "adapter__mask": "keep"}, marks=pytest.mark.slow),
        ("gpt_oss", {"adapter__kind": "full", "base__quant": "none", **NO_FACTORS}),
    ],
    ids=["gates", "pruned", "full"],
)
def test_resumed_and_exported(root, tmp_path, name, changes):
    asked, run = recipe(root, name, **changes), tmp_path / "run"
    train_run(asked, tmp_path / "whole", console=QUIET)
    support.train_until(asked, run, 2)
    train_run(asked, run, resume=True, console=QUIET)
    if asked.adapter.kind == "full":
        support.same_tensors(*(each / "adapter/parameters.safetensors" for each in (tmp_path / "whole", run)))
        assert any("experts.down_proj.bias" in name for name in load_file(run / "adapter/parameters.safetensors"))
    else:
        assert_same_run(tmp_path / "whole", run, step=4)
    exported(run, tmp_path / "out")
    if asked.adapter.mask == "keep":
        layers = adapted_layers(load_run(run).model)
        pruned = torch.cat([merged(layer)[~layer.base.keep_mask()] for layer in layers.values()])
        assert len(pruned) > 0
        assert not pruned.any()
    if asked.adapter.gates is not None:
        layers = adapted_layers(load_run(run).model)
        assert sum(layer.rank for layer in layers.values()) == 1.5 * len(layers)
        assert {layer.rank for layer in layers.values() if isinstance(layer, AdaptedExperts)} <= {1, 2, 3}


def test_the_export_runs_elsewhere(run, tmp_path):
    out = tmp_path / "out"
    weights = exported(run, out)["verification"]["weights"]
    assert weights["num_layers"] == 12
    assert weights["num_rows"] > 4 * 60 + 8 * 16, "those of the stacks, too"
    loaded, library = load_run(run), AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    for model in (load_model(resolve(str(out)), quant="none", compute_dtype=torch.float32), library):
        torch.testing.assert_close(logits(model), logits(loaded.model), rtol=0, atol=2e-4)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": 399, "pad_token_id": 0}
    said = [model.generate(IDS, **options) for model in (loaded.model, library)]
    assert torch.equal(*said)
    assert said[0].shape[1] == IDS.shape[1] + 6


def test_what_a_run_leaves_names_the_experts(run, tmp_path):
    layers = {each["path"]: each for each in json.loads((run / "trained.json").read_text())["layers"]}
    name = "model.layers.0.mlp.experts.down_proj"
    stack = adapted_layers(load_run(run).model)[name]
    update = stack.scaling * (stack.lora_B.detach().double() @ stack.lora_A.detach().double())
    expected = float(update.norm() / stack.base.dequantized(torch.float64).norm())
    assert layers[name]["update"] == pytest.approx(expected, rel=1e-3)
    with pytest.raises(UserError, match=r"does not load 4 layers .* ExpertLinear\)\. Fix: use --format merged"):
        export_run(run, tmp_path / "out", ExportOptions(format="nf4-lora"), console=QUIET)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_spectra_of_stacks_are_those_of_the_formed_matrices(tmp_path, kind):
    _, layers = support.adapted_mixture(tmp_path, kind=kind)
    plain = load_model(resolve(str(tmp_path)), quant="none", compute_dtype=torch.float64)
    for name, layer in layers.items():
        if isinstance(layer, AdaptedExperts):
            base = plain.get_submodule(name).weight.detach()
            update = (layer.scaling * (layer.lora_B.detach() @ layer.lora_A.detach())).reshape(base.shape)
            length = (base + update).square().sum(1).sqrt()
            magnitude = length if layer.magnitude is None else layer.magnitude.detach().flatten()
            shown = (magnitude / length)[:, None] * update
            values = [torch.linalg.svdvals(part).square()[:3] for part in support.parts_of_experts(shown, 4)]
            np.testing.assert_allclose(update_spectrum(layer).energies, torch.stack(values).sum(0).numpy(), rtol=1e-8)


HARD = {"adapter__gates": {**GATES, "mode": "hard_concrete"}}


@pytest.mark.parametrize("gates", [{}, pytest.param(HARD, marks=pytest.mark.slow)], ids=["plain", "gates"])
def test_two_processes_train_what_one_does(tmp_path, gates):
    """With so many experts that some are reached by the tokens of one process only."""
    support.mixture("qwen3_moe", num_experts=16).save_pretrained(tmp_path / "model")
    support.tokenizer().save_pretrained(tmp_path / "model")
    exact = {"adapter__dropout": 0.0, "adapter__dtype": "float32", "train__batch": 2}
    settings = support.tiny_recipe(tmp_path, **SHORT | exact | gates, adapter__experts={"rank": 2})
    train_run(settings, tmp_path / "one", console=QUIET)
    assert support.run_processes(2, lambda _rank: train_run(settings, tmp_path / "two")) == ["", ""]
    assert_close_runs(tmp_path / "one", tmp_path / "two")


def test_dense_experts_leave_with_a_base_in_4_bits(root, tmp_path):
    """As LoRA that PEFT reads: the gain is in the dense weights, too, and float32 loses nothing of it.

    Beside a linear layer that weighs the shared expert, which stays dense where others are quantised again.
    """
    run, experts = tmp_path / "dense", {"rank": 2}
    changes: dict[str, Any] = {"base__skip": ["lm_head", "experts"], "train__lr": 0.03, "adapter__experts": experts}
    train_run(recipe(root, "qwen2_moe", **changes), run, console=QUIET)
    with pytest.raises(UserError, match=r"is a DoRA layer on a dense weight, .* --dtype float32"):
        export_run(run, tmp_path / "b", ExportOptions(format="nf4-lora", dtype="bfloat16"), console=QUIET)
    found = exported(run, tmp_path / "out", format="nf4-lora")
    layers = found["verification"]["weights"]["num_layers"]
    assert layers == found["num_adapted_layers"] == found["num_folded_layers"]
    assert found["verification"]["exported_vs_reference"]["kl_mean"] < 1e-8
    exported(run, tmp_path / "again", requantize=True, dtype=None)
    library = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    names = {name: type(module).__name__ for name, module in library.named_modules()}
    assert names["model.layers.0.mlp.shared_expert_gate"] == "Linear"
    assert names["model.layers.0.mlp.shared_expert.up_proj"] == "Linear4bit"


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] * (name not in ("gpt_oss", "deepseek_v3")))
        for name in support.MIXTURES
    ],
)
def test_a_merged_run_of_each_family_runs_in_transformers(root, tmp_path, name):
    train_run(recipe(root, name, train__lr=0.03), tmp_path / "run", console=QUIET)
    export_run(tmp_path / "run", tmp_path / "out", ExportOptions(dtype="float32"), console=QUIET)
    library = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    wanted, base = (logits(load_run(tmp_path / "run", base_only=only).model) for only in (False, True))
    assert float((base - wanted).abs().max()) > 0.01 * float(wanted.std()), "training changed something"
    torch.testing.assert_close(logits(library), wanted, rtol=0, atol=1e-4 * float(wanted.std()))
