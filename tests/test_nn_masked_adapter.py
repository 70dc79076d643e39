"""Adapters with masks and gates in files, and whole runs on a pruned base: masks stay zero."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftConfig
from safetensors.torch import load_file
from torch import nn

from qdora.adapter.frozen_linear import FrozenLinear
from qdora.errors import UserError
from qdora.export.export_run import export_run
from qdora.export.options import ExportOptions
from qdora.model.adapter_file import load_adapter, save_adapter
from qdora.model.inject import adapted_layers, inject, replace_module
from qdora.prune.scores import prune_weight
from qdora.quant.sparsity import mask_bits, mask_from_bits, pattern_from
from qdora.rank.differentiable import plain_model
from qdora.rank.update_gradient import update_spectrum
from qdora.run.load_run import load_run
from qdora.run.run import train_run
from tests import support

BASE: dict[str, Any] = {"base_name_or_path": "x", "revision": None, "base_quant": {"quant": "none"}}


def masked_model() -> nn.Module:
    """A tiny Llama whose linear layers but the head are pruned to 2:4."""
    model: nn.Module = support.base_model()
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name != "lm_head":
            pruned = prune_weight(module.weight.data, "magnitude", pattern_from("2:4"))
            replace_module(model, name, FrozenLinear(pruned.weight, None, mask_bits(pruned.keep_mask)))
    return model


def test_masked_adapters_are_saved_and_refused_by_peft(tmp_path: Path) -> None:
    model, again = masked_model(), masked_model()
    support.move_adapters_(inject(model, rank=2, masked=True, generator=torch.Generator().manual_seed(0)))
    save_adapter(model, tmp_path / "a", **BASE)
    loaded = load_adapter(again, tmp_path / "a")
    assert all(layer.masked for layer in loaded.values())
    assert torch.equal(support.logits_of(model), support.logits_of(again))
    with pytest.raises((KeyError, ValueError), match="MASKED"):
        PeftConfig.from_pretrained(str(tmp_path / "a"))
    for call in (
        lambda model: load_adapter(model, tmp_path / "a"),
        lambda model: inject(model, rank=2, masked=True),
    ):
        with pytest.raises(UserError, match=r"keep.* 14 adapted layers were not pruned"):
            call(support.base_model())


def test_files_and_analyses_take_the_gated_factor(tmp_path: Path) -> None:
    """An adapter that is written with gates is read without them, and computes the same."""
    model = support.adapted_model("llama", quant="nf4")
    for number, layer in enumerate(adapted_layers(model).values()):
        layer.add_gate()
        layer.gate.data.copy_(torch.tensor([0.5 + 0.01 * number, 0.0, 1.25]))  # type: ignore[union-attr]
    before = support.logits_of(model)
    save_adapter(model, tmp_path / "adapter", **BASE | {"base_quant": {"quant": "nf4"}})
    again = support.base_model("llama", quant="nf4")
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(support.logits_of(again), before)
    for first, second in zip(adapted_layers(model).values(), adapted_layers(again).values(), strict=True):
        assert np.array_equal(update_spectrum(first).energies, update_spectrum(second).energies)
    with plain_model(model, ["model.layers.0.self_attn.q_proj"], norm="held"):
        torch.testing.assert_close(support.logits_of(model), before, rtol=1e-4, atol=1e-4)


RUNS = [("dora", "nf4", "2:4"), ("dora", "none", "unstructured"), ("lora", "int8", "2:4")]
RUNS += [("magnitude", "nf4", "unstructured")]
SLOW_RUNS = [("dora", "nf4", "unstructured"), ("dora", "none", "2:4"), ("lora", "int8", "unstructured")]
SLOW_RUNS += [("magnitude", "nf4", "2:4")]


@pytest.mark.parametrize(
    "kind, quant, pattern", [*RUNS, *(pytest.param(*run, marks=pytest.mark.slow) for run in SLOW_RUNS)]
)
def test_trained_and_merged_the_zeros_are_those_of_the_pruned_base(
    tmp_path: Path, kind: str, quant: str, pattern: str
) -> None:
    prune: dict[str, Any] = {"method": "magnitude", "pattern": pattern}
    if pattern == "unstructured":
        prune["sparsity"] = 0.6
    adapter: dict[str, Any] = {"adapter__kind": kind, "adapter__mask": "keep"}
    if kind == "magnitude":
        adapter = {"adapter__kind": kind} | {f"adapter__{each}": ... for each in ("rank", "alpha", "dropout")}
    options: dict[str, Any] = {"eval__tasks": [], "eval__limit": ..., "train__checkpoint_every": ..., "train__lr": 1e-2}
    train_run(
        support.tiny_recipe(tmp_path, base__prune=prune, base__quant=quant, **options, **adapter), tmp_path / "run"
    )
    is_audited = (kind, quant, pattern) == RUNS[0]
    result = export_run(tmp_path / "run", tmp_path / "merged", ExportOptions(dtype="float32", audit=is_audited))
    assert result["verification"]["passed"]
    assert result["zeros"] == {"pruned": result["zeros"]["pruned"], "kept": result["zeros"]["pruned"]}
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    layers = adapted_layers(load_run(tmp_path / "run").model)
    assert len(layers) == 14
    for path, layer in layers.items():
        zeros, bits, start = merged[f"{path}.weight"] == 0, layer.base.keep_bits, layer.base.dequantized()
        assert bits is not None
        assert not torch.equal(layer.merged_weight(), start), path
        if kind == "magnitude":
            # Only rows are scaled: every zero of the base is there, those of its quantisation, too.
            assert torch.equal(zeros, start == 0)
            assert not layer.lora_B.any()
        else:
            assert torch.equal(mask_bits(~zeros), bits), path
        keep = mask_from_bits(bits, (start.shape[0], start.shape[1]))
        assert bool(zeros[~keep].all())
        if pattern == "2:4":
            assert int((~zeros).view(-1, 4).sum(1).max()) <= 2
    if not is_audited:
        return
    # The merge is the model; there is no source to merge on, and no plain LoRA that masks.
    forms = result["audit"]["forms"]
    assert forms["merged"]["logits"]["kl_mean"] < 1e-8
    assert forms["base"]["logits"]["kl_mean"] > 1e-6
    assert "pruned" in forms["original"]["why_not"]
    assert "cannot mask B A" in forms["nf4-lora"]["why_not"]
    assert "logits" in forms["requantized"]
    refused: Any
    for refused in ("peft", "nf4-lora"):
        with pytest.raises(UserError, match="cannot mask B A"):
            export_run(tmp_path / "run", tmp_path / refused, ExportOptions(format_=refused))


def test_an_adapter_that_ignores_the_mask_merges_dense_and_says_so(tmp_path: Path) -> None:
    prune = {"method": "magnitude", "pattern": "2:4"}
    recipe = support.tiny_recipe(tmp_path, base__prune=prune, train__steps=2, eval__tasks=[], eval__limit=...)
    train_run(recipe, tmp_path / "run")
    result = export_run(tmp_path / "run", tmp_path / "merged", ExportOptions(dtype="float32", audit=True))
    assert result["zeros"]["kept"] < 0.01 * result["zeros"]["pruned"]
    forms = result["audit"]["forms"]
    assert forms["merged"]["logits"]["kl_mean"] < 1e-8
    assert "why_not" in forms["original"]
    with pytest.raises(UserError, match=r"--requantize: .*pruned.* remove --requantize"):
        export_run(tmp_path / "run", tmp_path / "again", ExportOptions(requantize=True))
