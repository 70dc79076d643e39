"""Compressing while loading: each layer and expert by the tokens that reach it; and packed bases on disk."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from qdora.adapter.expert_product import padded_tokens
from qdora.errors import UserError
from qdora.model import store
from qdora.model.inject import frozen_layers
from qdora.model.load import Quantization
from qdora.model.store import BaseCache, compressed_layers
from qdora.prune import compressor as pruning
from qdora.quant.packed import dequantize, quantize
from qdora.recipe.settings import BaseWeightsConfig, PruneConfig
from tests import reference_prune, support
from tests.support import CHECKPOINT_CONFIGS, checkpoint, checkpoint_logits, load_checkpoint, one_file_checkpoint

IDS = torch.randint(3, 97, (5, 16), generator=torch.Generator().manual_seed(3))
PAIR = ("gate_up", "down")
Array = np.ndarray[Any, Any]


def write(directory: Path, name: str) -> Path:
    config = support.CHECKPOINT_CONFIGS.get(name)
    return support.write_mixture(directory, name) if config is None else support.checkpoint(directory, config)


def pruned(
    directory: Path,
    method: Any,
    pattern: str = "unstructured",
    order: Any = "prune_first",
    sparsity: float = 0.5,
    **load: Any,
) -> tuple[Any, dict[str, Any]]:
    share = None if ":" in pattern else sparsity
    base = BaseWeightsConfig(prune=PruneConfig(method=method, pattern=pattern, sparsity=share, order=order))
    return support.compressed(directory, base, None if method == "magnitude" else IDS, **load)


def inputs_of(model: Any, block: int, paths: Iterable[str]) -> dict[str, list[Array]]:
    """Tokens (tokens, in) of each linear layer, and of each expert of Qwen3-MoE by its formula, in a forward pass."""
    found: dict[str, list[Array]] = {}
    routed: list[tuple[Tensor, ...]] = []
    hooks = [
        model.get_submodule(path).register_forward_pre_hook(
            lambda _, args, path=path: found.update({path: [args[0].detach().flatten(0, -2).numpy()]})
        )
        for path in paths
        if "experts" not in path
    ]
    experts = getattr(model.model.layers[block].mlp, "experts", None)
    if experts is not None:
        hooks.append(experts.register_forward_pre_hook(lambda _, args: routed.append(args[:2])))
    with torch.no_grad():
        model(IDS)
    for hook in hooks:
        hook.remove()
    for hidden, chosen in routed:
        gate_up, down = (found.setdefault(f"model.layers.{block}.mlp.experts.{name}_proj", []) for name in PAIR)
        for expert, weight in enumerate(experts.gate_up_proj.detach()):
            own = hidden[(chosen == expert).any(dim=1)].detach()
            gate, up = (own @ weight.T).chunk(2, dim=1)
            assert len(own) > 8
            gate_up.append(own.numpy())
            down.append((nn.functional.silu(gate) * up).numpy())
    return found


def expected(method: str, pattern: str, weight: Array, tokens: Array) -> tuple[Array, Array]:
    """The mask of a layer or expert, and its weights."""
    n_of_m = (2, 4) if pattern == "2:4" else None
    if method == "sparsegpt":
        share: dict[str, Any] = {"n_of_m": n_of_m} if n_of_m else {"sparsity": 0.5}
        target, keep = reference_prune.obs(weight, tokens.T @ tokens, 0.01, block=128, **share)
        return keep, target
    scores = np.abs(weight) if method == "magnitude" else np.abs(weight) * np.sqrt((tokens**2).sum(0))
    keep = reference_prune.keep_mask(scores, n_of_m or ("tensor" if method == "magnitude" else "row"), 0.5)
    return keep, weight * keep


def quantised(weight: Tensor, quant: str) -> Tensor:
    return dequantize(quantize(weight.flatten(0, -2).float(), quant)).double().view(weight.shape)


@pytest.mark.parametrize(
    "name, method, pattern, quant, order",
    [
        ("llama", "magnitude", "unstructured", "nf4", "prune_first"),
        ("qwen2", "wanda", "unstructured", "none", "prune_first"),
        ("gemma2", "wanda", "unstructured", "nf4", "quantize_first"),
        ("gemma3", "wanda", "2:4", "nf4", "prune_first"),
        ("llama-tied-biased", "sparsegpt", "unstructured", "none", "prune_first"),
        ("qwen3_moe", "wanda", "unstructured", "none", "prune_first"),
        ("qwen3_moe", "wanda", "2:4", "nf4", "prune_first"),
        ("qwen3_moe", "wanda", "unstructured", "nf4", "quantize_first"),
        ("qwen3_moe", "sparsegpt", "unstructured", "none", "prune_first"),
        ("qwen3_moe", "sparsegpt", "2:4", "nf4", "prune_first"),
    ],
)
def test_each_block_is_pruned_by_what_the_pruned_ones_before_it_compute(
    tmp_path, monkeypatch, name, method, pattern, quant, order
):
    monkeypatch.setattr(pruning, "_TOKENS_AT_ONCE", 32)  # two of the five sequences at a time
    write(tmp_path, name)
    model, reports = pruned(tmp_path, method, pattern, order, quant=quant, compute_dtype=torch.float64)
    layers = frozen_layers(model)
    assert layers.keys() == reports.keys()
    assert len(layers) == (12 if name == "qwen3_moe" else 14)
    eager = {"experts_implementation": "eager"} if name == "qwen3_moe" else {"attn_implementation": "eager"}
    library = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64, **eager)
    is_exact = method != "sparsegpt"
    for block in range(2):
        own = {path: layer for path, layer in layers.items() if path.startswith(f"model.layers.{block}.")}
        weights = {path: library.get_parameter(path if "experts" in path else f"{path}.weight") for path in own}
        original = {path: weight.detach().clone() for path, weight in weights.items()}
        if order == "quantize_first":
            for weight in weights.values():
                weight.data = quantised(weight, quant)
        inputs = inputs_of(library, block, own)
        for path, layer in own.items():
            shape = (len(inputs[path]), -1, weights[path].shape[-1])
            before, wide = weights[path].detach().view(shape), layer.dequantized(torch.float64).view(shape)
            keep, found, report = layer.keep_mask().view(shape).numpy(), wide.numpy(), reports[path]
            assert not found[~keep].any()
            assert report["num_pruned"] == (~keep).sum() == report["num_weights"] // 2
            assert report["num_zeros"] == (found == 0).sum()
            change = (wide - original[path].view(shape)).norm() / original[path].norm()
            assert report["relative_error"] == pytest.approx(float(change), rel=1e-5)
            if is_exact or path.endswith(("q_proj", "gate_up_proj", "down_proj")):
                pairs = list(zip(before.numpy(), inputs[path], strict=True))[: None if is_exact else 1]
                masks, targets = map(np.stack, zip(*(expected(method, pattern, *each) for each in pairs), strict=True))
                # Sums in float32 and float64 may part two weights of a row that are worth the same up to rounding.
                agree = keep[: len(masks)] == masks
                assert (~agree).sum(axis=(1, 2)).max() <= (2 if is_exact else 0.01 * masks[0].size), path
                if is_exact and quant != "none" and order == "prune_first":
                    targets = quantised(torch.from_numpy(targets), quant).numpy()
                if is_exact:
                    np.testing.assert_allclose(found[agree], targets[agree], rtol=1e-6, atol=1e-7)
                elif quant == "none":
                    rows = agree.all(axis=2)
                    np.testing.assert_allclose(found[:1][rows], targets[rows], rtol=2e-3, atol=2e-4)
            weights[path].data = wide.reshape(weights[path].shape)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, library(IDS).logits, rtol=1e-4, atol=1e-4)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_rows_of_padding_are_no_inputs():
    tokens = padded_tokens((3, 2, 0))
    assert tokens.counts == (3, 3, 0)
    x, layer = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), nn.Module()
    layer.forward = lambda x, tokens: x
    with pruning._measured({"up": layer}, products=False) as statistics:
        layer(x, tokens)
    first, second, third = statistics["up"]
    assert first is not None
    assert second is not None
    torch.testing.assert_close(first.sums, x[:3].square().sum(dim=0))
    torch.testing.assert_close(second.sums, x[3:5].square().sum(dim=0))
    assert third is None


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_an_expert_without_tokens_is_pruned_by_magnitude(tmp_path, method, caplog):
    source = support.mixture("gpt_oss")
    source.model.layers[0].mlp.router.bias.data[2] = -100.0
    source.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING, logger="qdora"):
        model, _ = pruned(tmp_path, method, quant="none")
    told = [each for each in caplog.messages if "no calibration token" in each]
    assert len(told) == 2
    assert all("reached experts 2 (1 of 4); they are pruned by magnitude" in each for each in told)
    weights = source.model.layers[0].mlp.experts.gate_up_proj.detach().mT.numpy()
    keep = frozen_layers(model)["model.layers.0.mlp.experts.gate_up_proj"].keep_mask().view(weights.shape).numpy()
    by_magnitude = [
        (keep[index] == reference_prune.keep_mask(np.abs(weights[index]), group, 0.5)).all()
        for group in ["row" if method == "wanda" else "tensor"]
        for index in (1, 2)
    ]
    assert by_magnitude == [False, True]


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_pruning_what_was_quantised_keeps_its_codes(tmp_path, kind):
    write(tmp_path, "llama")
    after = frozen_layers(pruned(tmp_path, "magnitude", order="quantize_first", quant=kind)[0])
    for name, layer in frozen_layers(support.load_checkpoint(tmp_path, quant=kind)).items():
        assert torch.equal(layer.stored_weight.absmax, after[name].stored_weight.absmax)  # type: ignore[union-attr]
        assert torch.equal(after[name].dequantized(), layer.dequantized() * after[name].keep_mask())


def test_what_is_wrong_is_named(tmp_path):
    write(tmp_path / "model", "llama")
    said = r"^base\.prune\.pattern: model\.layers\.0\..*_proj: pattern 3:7 needs in_features divisible by 7, got \d+\. "
    with pytest.raises(UserError, match=said + r"Fix: .* base\.skip\.$"):
        pruned(tmp_path / "model", "magnitude", "3:7", quant="nf4")
    with pytest.raises(UserError, match=r"compressed\.json: missing"):
        compressed_layers(tmp_path / "model")


# --- the packed base of a source: the same model from it, and every way in which it can be a wrong one

UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("source"), CHECKPOINT_CONFIGS["llama-tied-biased"])


def cached(
    source: Path, root: Path, quant: str = "nf4", block_size: int = 64, double_quant: bool = True
) -> tuple[PreTrainedModel, Path]:
    """A model by way of the cache in `root`, and the directory of its base."""
    cache = BaseCache(root, Quantization(quant, block_size, double_quant, ("lm_head",)), torch.device("cpu"))
    model = load_checkpoint(source, quant=quant, block_size=block_size, double_quant=double_quant, reader=cache)
    assert cache.directory is not None
    return model, cache.directory


def same(first: PreTrainedModel, second: PreTrainedModel) -> bool:
    ours, theirs = (dict([*m.named_parameters(), *m.named_buffers()]) for m in (first, second))
    assert ours.keys() == theirs.keys()
    return all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in ours)


@pytest.mark.parametrize(
    ("config", "quant", "double_quant"),
    [("llama-tied-biased", quant, True) for quant in ("nf4", "fp4", "int8", "nf3", "int2")]
    + [("qwen2", "nf4", False), ("gemma3", "nf4", True)],
)
def test_second_start_reads_no_weight_of_the_source(tmp_path, config, quant, double_quant, monkeypatch):
    source = checkpoint(tmp_path / "source", CHECKPOINT_CONFIGS[config])
    plain = load_checkpoint(source, quant=quant, double_quant=double_quant)
    first, directory = cached(source, tmp_path, quant, double_quant=double_quant)
    assert same(first, plain)
    monkeypatch.setattr(store, "tensors_of_source", None)
    second, again = cached(source, tmp_path, quant, double_quant=double_quant)
    assert again == directory
    assert same(second, plain)
    shutil.rmtree(directory)  # what is loaded holds no mapping of the files
    assert torch.equal(checkpoint_logits(second), checkpoint_logits(plain))


def test_other_settings_and_other_weights_have_a_place_of_their_own(source, tmp_path):
    settings: list[dict[str, Any]] = [{}, {"block_size": 32}, {"double_quant": False}, {"quant": "fp4"}]
    found = {cached(source, tmp_path, **each)[1] for each in settings}
    file, tensors = one_file_checkpoint(tmp_path / "changed", CHECKPOINT_CONFIGS["llama-tied-biased"])
    found.add(cached(tmp_path / "changed", tmp_path)[1])  # the same weights in one file
    times = file.stat()
    save_file({**tensors, UP: tensors[UP] + 1}, file, metadata={"format": "pt"})
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))  # seen by its bytes alone
    model, directory = cached(tmp_path / "changed", tmp_path)
    found.add(directory)
    assert len(found) == 6
    assert same(model, load_checkpoint(tmp_path / "changed", quant="nf4"))


def test_a_place_that_cannot_be_written_and_a_damaged_file_are_named(source, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/.*: cannot be written: .* base\.cache"):
        cached(source, tmp_path / "file")
    _, directory = cached(source, tmp_path)
    file = min(directory.iterdir())
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(UserError, match=rf"base\.cache: {directory} is damaged\. Fix: delete it\."):
        cached(source, tmp_path)
