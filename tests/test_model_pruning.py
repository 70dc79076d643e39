"""Pruning while loading: which inputs are measured, what comes out, and that it comes back from its files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from qdora.errors import UserError
from qdora.model import packed_base, pruning
from qdora.model.inject import frozen_layers
from qdora.model.load import Quantization
from qdora.model.packed_base import PrunedBase, save_pruned_base
from qdora.model.pruning import Pruner, quantized_layers
from qdora.model.source import resolve
from qdora.nn.frozen_linear import FrozenLinear
from qdora.ops.packed import dequantize, quantize
from qdora.recipe.settings import PruneConfig
from tests import checkpoints, reference_prune, reference_quant

IDS = torch.randint(1, 97, (5, 11), generator=torch.Generator().manual_seed(3))


def pruned_model(directory: Path, settings: PruneConfig, **load: Any) -> tuple[Any, Pruner]:
    pruner = Pruner(settings, None if settings.method == "magnitude" else IDS)
    return checkpoints.load(directory, placer=pruner, **load), pruner


def block_inputs(model: nn.Module, block: int) -> dict[str, np.ndarray]:
    """Inputs of each linear layer of a block, (tokens, in), by a plain forward pass of transformers' own model."""
    found: dict[str, np.ndarray] = {}
    prefix = f"model.layers.{block}."
    hooks = [
        module.register_forward_pre_hook(
            lambda _, args, name=name: found.update({name: args[0].detach().reshape(-1, args[0].shape[-1]).numpy()})
        )
        for name, module in model.named_modules()
        if name.startswith(prefix) and isinstance(module, nn.Linear)
    ]
    with torch.no_grad():
        model(IDS)
    for hook in hooks:
        hook.remove()
    return found


def expected_masks(directory: Path, *, quant: str | None, first: bool = False) -> tuple[dict[str, np.ndarray], Any]:
    """Wanda, block by block in float64, on transformers' model; each block's result goes in before the next one."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64)
    if getattr(model.config, "attn_logit_softcapping", None):
        model.set_attn_implementation("eager")  # older releases of transformers choose another one, which caps nothing
    masks = {}
    for block in range(2):
        names = list(block_inputs(model, block))
        original = {name: model.get_submodule(name).weight.detach().clone() for name in names}
        if first:
            for name in names:
                model.get_submodule(name).weight.data = dequantize(quantize(original[name].float(), quant)).double()
        inputs = block_inputs(model, block)
        for name in names:
            weight = model.get_submodule(name).weight.data
            scores = np.abs(weight.numpy()) * np.sqrt((inputs[name] ** 2).sum(0))
            masks[name] = reference_prune.keep_mask(scores, "row", 0.5)
            pruned = weight * torch.from_numpy(masks[name])
            if quant and not first:
                pruned = dequantize(quantize(pruned.float(), quant)).double()
            model.get_submodule(name).weight.data = pruned
    return masks, model


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma2", "gemma3", "llama-tied-biased"])
@pytest.mark.parametrize("quant, order", [("none", "prune_first"), ("nf4", "prune_first"), ("nf4", "quantize_first")])
def test_each_block_is_measured_on_what_the_pruned_ones_compute(
    tmp_path: Path, architecture: str, quant: str, order: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pruning, "_TOKENS_AT_ONCE", 22)  # two of the five sequences at a time
    checkpoints.checkpoint(tmp_path, checkpoints.CONFIGS[architecture])
    settings = PruneConfig(method="wanda", sparsity=0.5, order=order)
    model, pruner = pruned_model(tmp_path, settings, quant=quant, compute_dtype=torch.float64)
    masks, expected = expected_masks(tmp_path, quant=quant.replace("none", "") or None, first=order == "quantize_first")
    layers = frozen_layers(model)
    assert layers.keys() == masks.keys() == pruner.layers.keys()
    assert len(masks) == 14
    num_disagree = 0
    for name, mask in masks.items():
        keep = layers[name].keep_mask()
        # Sums in float32 and float64 may part two weights of a row that are worth the same up to rounding.
        disagree = keep != torch.from_numpy(mask)
        assert int(disagree.sum()) <= 2, name
        num_disagree += int(disagree.sum())
        wide = layers[name].dequantized(torch.float64)
        target = expected.get_submodule(name).weight.data
        torch.testing.assert_close(wide[~disagree], target[~disagree], rtol=1e-6, atol=1e-7)
        assert not wide[~keep].any()
        report = pruner.layers[name]
        assert report.num_pruned == int((~mask).sum()) == report.num_weights // 2
        assert report.num_zeros == int((wide == 0).sum())
    with torch.no_grad():
        bound = 1e-5 if num_disagree == 0 else 0.1
        torch.testing.assert_close(model(IDS).logits, expected(IDS).logits, rtol=bound, atol=bound)
    assert num_disagree <= 2
    assert not any("forward" in vars(module) for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize("pattern", ["2:4", "4:8", "rows", "columns", "unstructured"])
def test_every_rule_on_a_whole_model(tmp_path: Path, method: str, pattern: str) -> None:
    checkpoints.checkpoint(tmp_path, checkpoints.CONFIGS["qwen2"])
    settings = PruneConfig(method=method, pattern=pattern, sparsity=None if ":" in pattern else 0.25)
    model, pruner = pruned_model(tmp_path, settings, quant="nf4")
    for name, layer in frozen_layers(model).items():
        keep = layer.keep_mask()
        assert keep is not None
        assert not layer.dequantized()[~keep].any(), name
        share = 1 - float(keep.float().mean())
        assert share == pytest.approx(0.5 if ":" in pattern else 0.25, abs=0.02), name
        if ":" in pattern:
            of = int(pattern[-1])
            assert bool((keep.view(len(keep), -1, of).sum(2) == of // 2).all())
    assert pruner.layers.keys() == frozen_layers(model).keys()
    assert bool(checkpoints.logits(model).isfinite().all())


def test_sparsegpt_disturbs_the_outputs_least(tmp_path: Path) -> None:
    checkpoints.checkpoint(tmp_path, checkpoints.CONFIGS["llama"])
    dense = checkpoints.load(tmp_path)
    many = torch.randint(1, 97, (40, 24), generator=torch.Generator().manual_seed(4))
    losses = {}
    for method in ("magnitude", "wanda", "sparsegpt"):
        pruner = Pruner(PruneConfig(method=method, sparsity=0.5), None if method == "magnitude" else many)
        model = checkpoints.load(tmp_path, placer=pruner)
        first = "model.layers.0.self_attn.q_proj"
        with torch.no_grad():
            x = dense.model.layers[0].input_layernorm(dense.model.embed_tokens(many)).view(-1, 64)
            change = dense.get_submodule(first).weight - model.get_submodule(first).dequantized()
            losses[method] = float((x @ change.T).square().sum())
    # Random inputs have columns of about the same size, so Wanda and magnitude are about the same here.
    assert losses["sparsegpt"] < 0.9 * min(losses["wanda"], losses["magnitude"])


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_pruning_what_was_quantised_keeps_its_scales_and_codes(tmp_path: Path, kind: str) -> None:
    checkpoints.checkpoint(tmp_path, checkpoints.CONFIGS["llama"])
    plain = frozen_layers(checkpoints.load(tmp_path, quant=kind))
    pruned = frozen_layers(
        pruned_model(tmp_path, PruneConfig(method="magnitude", sparsity=0.5, order="quantize_first"), quant=kind)[0]
    )
    for name, layer in plain.items():
        before, after = layer.packed_weight, pruned[name].packed_weight
        assert before is not None
        assert after is not None
        assert torch.equal(before.absmax, after.absmax)
        keep = pruned[name].keep_mask()
        assert torch.equal(pruned[name].dequantized(), layer.dequantized() * keep)


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_errors_of_quantising_alone(tmp_path: Path, kind: str) -> None:
    checkpoints.checkpoint(tmp_path, checkpoints.CONFIGS["llama"])
    found = quantized_layers(resolve(str(tmp_path)), Quantization(kind, 32, False, ("lm_head", "down_proj")))
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert len(found) == 12
    for path, layer in found.items():
        weight = model.get_submodule(path).weight.detach().numpy().astype(np.float32)
        if kind == "int8":
            codes, scales = map(np.array, reference_quant.quantize_int8(weight))
            dense = codes.astype(np.float64) * scales[:, None] / 127
        else:
            codes, scales = reference_quant.quantize_4bit(weight.ravel(), kind, 32)
            dense = np.array(reference_quant.dequantize_4bit(codes, scales, kind, 32)).reshape(weight.shape)
        expected = np.linalg.norm(dense - weight) / np.linalg.norm(weight)
        assert layer["relative_error"] == pytest.approx(expected, rel=1e-5)
        assert (layer["kind"], layer["shape"], layer["num_pruned"]) == (kind, list(weight.shape), 0)
    assert quantized_layers(resolve(str(tmp_path)), Quantization("none", 64, False, ())) == {}


def test_skipped_layers_stay_dense_and_whole(tmp_path: Path) -> None:
    checkpoints.checkpoint(tmp_path, checkpoints.CONFIGS["llama"])
    settings = PruneConfig(method="wanda", sparsity=0.5)
    for quant in ("none", "nf4"):
        model, pruner = pruned_model(tmp_path, settings, quant=quant, skip=("lm_head", "down_proj"))
        assert len(pruner.layers) == 12
        stored = AutoModelForCausalLM.from_pretrained(tmp_path)
        for index in range(2):
            name = f"model.layers.{index}.mlp.down_proj"
            assert type(model.get_submodule(name)) is nn.Linear
            assert torch.equal(model.get_submodule(name).weight, stored.get_submodule(name).weight)


@pytest.mark.parametrize("quant", ["none", "nf4", "int8"])
@pytest.mark.parametrize("architecture", ["llama-tied-biased", "gemma3"])
def test_a_pruned_base_comes_back_bit_for_bit(tmp_path: Path, quant: str, architecture: str) -> None:
    checkpoints.checkpoint(tmp_path / "model", checkpoints.CONFIGS[architecture])
    model, pruner = pruned_model(tmp_path / "model", PruneConfig(method="sparsegpt", sparsity=0.5), quant=quant)
    record = save_pruned_base(model, pruner.layers, tmp_path / "base", key="0", settings={"method": "sparsegpt"})
    assert record == json.loads((tmp_path / "base/compressed.json").read_text())
    assert record["sparsity"] == 0.5
    assert set(record["layers"]) == set(pruner.layers)
    again = checkpoints.load(tmp_path / "model", quant=quant, placer=PrunedBase(tmp_path / "base"))
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert any(name.endswith("keep_bits") for name in before)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(checkpoints.logits(model), checkpoints.logits(again))


def test_a_pruned_base_in_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_base, "_PRUNED_FILE_BYTES", 10_000)
    checkpoints.checkpoint(tmp_path / "model", checkpoints.CONFIGS["llama"])
    model, pruner = pruned_model(tmp_path / "model", PruneConfig(method="magnitude", sparsity=0.5), quant="nf4")
    save_pruned_base(model, pruner.layers, tmp_path / "base", key="0", settings={})
    assert len(list((tmp_path / "base").glob("model-*.safetensors"))) > 3
    again = checkpoints.load(tmp_path / "model", quant="nf4", placer=PrunedBase(tmp_path / "base"))
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    (tmp_path / "base/copy.safetensors").write_bytes((tmp_path / "base/model-00000.safetensors").read_bytes())
    with pytest.raises(UserError, match=r"model-00000\.safetensors: is damaged: tensor '.*' is in another file, too"):
        PrunedBase(tmp_path / "base")


def test_a_missing_mask_is_an_error(tmp_path: Path) -> None:
    checkpoints.checkpoint(tmp_path / "model", checkpoints.CONFIGS["llama"])
    model, pruner = pruned_model(tmp_path / "model", PruneConfig(method="magnitude", sparsity=0.5), quant="nf4")
    save_pruned_base(model, pruner.layers, tmp_path / "base", key="0", settings={})
    file = tmp_path / "base/model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.0.self_attn.q_proj.keep_bits"]
    save_file(tensors, file)
    with pytest.raises(UserError, match=r"q_proj\.keep_bits: cannot be read: the tensor is missing"):
        checkpoints.load(tmp_path / "model", quant="nf4", placer=PrunedBase(tmp_path / "base"))


def test_a_cast_of_the_model_leaves_the_mask_alone() -> None:
    weight = torch.randn(3, 16)
    bits = torch.arange(6, dtype=torch.uint8)
    layer = FrozenLinear(weight, None, bits).to(torch.bfloat16)
    assert torch.equal(layer.keep_bits, bits)
    assert layer.keep_mask().shape == (3, 16)


def test_what_is_wrong_is_named(tmp_path: Path) -> None:
    checkpoints.checkpoint(tmp_path / "model", checkpoints.CONFIGS["llama"])
    with pytest.raises(ValueError, match="pruning by wanda needs calibration text"):
        Pruner(PruneConfig(method="wanda", sparsity=0.5))
    said = r"^base\.prune\.pattern: model\.layers\.0\..*_proj: pattern 3:7 needs in_features divisible by 7, got \d+\. "
    with pytest.raises(UserError, match=said + r"\d+ layers do not fit\. Fix: .* base\.skip\.$"):
        pruned_model(tmp_path / "model", PruneConfig(method="magnitude", pattern="3:7"))
    with pytest.raises(UserError, match=r"holds no packed base \(compressed\.json is missing"):
        PrunedBase(tmp_path / "model")
    model, pruner = pruned_model(tmp_path / "model", PruneConfig(method="magnitude", sparsity=0.5), quant="nf4")
    save_pruned_base(model, pruner.layers, tmp_path / "base", key="0", settings={})
    with pytest.raises(UserError, match=r"down_proj is not a layer that this model and recipe prune"):
        checkpoints.load(
            tmp_path / "model", quant="nf4", skip=["lm_head", "down_proj"], placer=PrunedBase(tmp_path / "base")
        )
    file = tmp_path / "base/compressed.json"
    good = json.loads(file.read_text())
    file.write_text(json.dumps({**good, "format": 9}))
    with pytest.raises(UserError, match=r"is damaged: format: Input should be 1 \(got \'9\'\)"):
        PrunedBase(tmp_path / "base")
    name = "model.layers.0.self_attn.q_proj"
    good["layers"][name]["block_size"] = 128
    file.write_text(json.dumps(good))
    with pytest.raises(UserError, match=rf"{name}\.weight: cannot be read"):
        checkpoints.load(tmp_path / "model", quant="nf4", placer=PrunedBase(tmp_path / "base"))
    file.write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        PrunedBase(tmp_path / "base")
