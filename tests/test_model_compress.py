"""Pruning while loading: which inputs are measured, what comes out, and that it comes back from its files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from qdora.errors import UserError
from qdora.model import pruning as compress
from qdora.model.inject import frozen_layers
from qdora.model.load import Quantization
from qdora.model.pruned_file import StoredCompression, save_compressed
from qdora.model.pruning import Compression, PruneSettings, quantized_layers
from qdora.model.source import resolve
from qdora.nn.frozen_linear import FrozenLinear
from qdora.ops.packed import dequantize, quantize
from qdora.ops.sparsity import pattern_from
from tests import checkpoints, reference_prune, reference_quant

IDS = torch.randint(1, 97, (5, 11), generator=torch.Generator().manual_seed(3))
HALF = pattern_from("unstructured", 0.5)


def compressed(directory: Path, settings: PruneSettings, **load: Any) -> tuple[Any, Compression]:
    compression = Compression(settings, None if settings.method == "magnitude" else IDS)
    return checkpoints.load(directory, placer=compression, **load), compression


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
def test_each_block_is_measured_behind_the_compressed_ones(
    tmp_path: Path, architecture: str, quant: str, order: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compress, "_TOKENS_AT_ONCE", 22)  # two of the five sequences at a time
    checkpoints.checkpoint(tmp_path, checkpoints.CONFIGS[architecture])
    settings = PruneSettings("wanda", HALF, order=order)
    model, compression = compressed(tmp_path, settings, quant=quant, compute_dtype=torch.float64)
    masks, expected = expected_masks(tmp_path, quant=quant.replace("none", "") or None, first=order == "quantize_first")
    layers = frozen_layers(model)
    assert layers.keys() == masks.keys() == compression.layers.keys()
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
        report = compression.layers[name]
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
    wanted = pattern_from(pattern, None if ":" in pattern else 0.25)
    model, compression = compressed(tmp_path, PruneSettings(method, wanted), quant="nf4")
    for name, layer in frozen_layers(model).items():
        keep = layer.keep_mask()
        assert keep is not None
        assert not layer.dequantized()[~keep].any(), name
        share = 1 - float(keep.float().mean())
        assert share == pytest.approx(0.5 if ":" in pattern else 0.25, abs=0.02), name
        if ":" in pattern:
            of = int(pattern[-1])
            assert bool((keep.view(len(keep), -1, of).sum(2) == of // 2).all())
    assert compression.layers.keys() == frozen_layers(model).keys()
    assert bool(checkpoints.logits(model).isfinite().all())


def test_sparsegpt_disturbs_the_outputs_least(tmp_path: Path) -> None:
    checkpoints.checkpoint(tmp_path, checkpoints.CONFIGS["llama"])
    dense = checkpoints.load(tmp_path)
    many = torch.randint(1, 97, (40, 24), generator=torch.Generator().manual_seed(4))
    losses = {}
    for method in ("magnitude", "wanda", "sparsegpt"):
        compression = Compression(PruneSettings(method, HALF), None if method == "magnitude" else many)
        model = checkpoints.load(tmp_path, placer=compression)
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
        compressed(tmp_path, PruneSettings("magnitude", HALF, order="quantize_first"), quant=kind)[0]
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
    settings = PruneSettings("wanda", HALF)
    for quant in ("none", "nf4"):
        model, compression = compressed(tmp_path, settings, quant=quant, skip=("lm_head", "down_proj"))
        assert len(compression.layers) == 12
        stored = AutoModelForCausalLM.from_pretrained(tmp_path)
        for index in range(2):
            name = f"model.layers.{index}.mlp.down_proj"
            assert type(model.get_submodule(name)) is nn.Linear
            assert torch.equal(model.get_submodule(name).weight, stored.get_submodule(name).weight)


@pytest.mark.parametrize("quant", ["none", "nf4", "int8"])
@pytest.mark.parametrize("architecture", ["llama-tied-biased", "gemma3"])
def test_a_compressed_base_comes_back_bit_for_bit(tmp_path: Path, quant: str, architecture: str) -> None:
    checkpoints.checkpoint(tmp_path / "model", checkpoints.CONFIGS[architecture])
    model, compression = compressed(tmp_path / "model", PruneSettings("sparsegpt", HALF), quant=quant)
    record = save_compressed(model, compression.layers, tmp_path / "base", {"method": "sparsegpt"})
    assert record == json.loads((tmp_path / "base/compressed.json").read_text())
    assert record["sparsity"] == 0.5
    assert set(record["layers"]) == set(compression.layers)
    again = checkpoints.load(tmp_path / "model", quant=quant, placer=StoredCompression(tmp_path / "base"))
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert any(name.endswith("keep_bits") for name in before)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(checkpoints.logits(model), checkpoints.logits(again))


def test_a_cast_of_the_model_leaves_the_mask_alone() -> None:
    weight = torch.randn(3, 16)
    bits = torch.arange(6, dtype=torch.uint8)
    layer = FrozenLinear(weight, None, bits).to(torch.bfloat16)
    assert torch.equal(layer.keep_bits, bits)
    assert layer.keep_mask().shape == (3, 16)


def test_what_is_wrong_is_named(tmp_path: Path) -> None:
    checkpoints.checkpoint(tmp_path / "model", checkpoints.CONFIGS["llama"])
    with pytest.raises(ValueError, match="exactly where it measures"):
        Compression(PruneSettings("wanda", HALF))
    with pytest.raises(ValueError, match=r"q_proj\.weight: pattern 3:7 needs in_features divisible by 7, got 64"):
        compressed(tmp_path / "model", PruneSettings("magnitude", pattern_from("3:7")))
    with pytest.raises(UserError, match="holds no compressed base"):
        StoredCompression(tmp_path / "model")
    model, compression = compressed(tmp_path / "model", PruneSettings("magnitude", HALF), quant="nf4")
    save_compressed(model, compression.layers, tmp_path / "base", {})
    with pytest.raises(UserError, match=r"down_proj is none that this model and recipe compress"):
        checkpoints.load(
            tmp_path / "model", quant="nf4", skip=["lm_head", "down_proj"], placer=StoredCompression(tmp_path / "base")
        )
    file = tmp_path / "base/compressed.json"
    good = json.loads(file.read_text())
    file.write_text(json.dumps({**good, "format": 9}))
    with pytest.raises(UserError, match="format 9, allowed: 1"):
        StoredCompression(tmp_path / "base")
    name = "model.layers.0.self_attn.q_proj"
    good["layers"][name]["block_size"] = 128
    file.write_text(json.dumps(good))
    with pytest.raises(UserError, match=rf"{name}: cannot be read"):
        checkpoints.load(tmp_path / "model", quant="nf4", placer=StoredCompression(tmp_path / "base"))
    file.write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        StoredCompression(tmp_path / "base")
