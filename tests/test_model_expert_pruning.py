"""Pruning mixtures of experts: each expert by its own tokens, against float64 on transformers' own model."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from qdora.model import pruning
from qdora.model.experts import stacks
from qdora.model.inject import frozen_layers
from qdora.model.packed_base import PrunedBase, save_pruned_base
from qdora.model.pruning import Pruner
from qdora.ops.expert_tokens import padded_tokens
from qdora.ops.packed import dequantize, quantize
from qdora.recipe.settings import PruneConfig
from tests import checkpoints, reference_prune, tiny_experts

IDS = torch.randint(3, 400, (6, 16), generator=torch.Generator().manual_seed(3))
EXPERTS = 4


def pruned(directory: Path, settings: PruneConfig, **load: Any) -> tuple[Any, Pruner]:
    pruner = Pruner(settings, None if settings.method == "magnitude" else IDS)
    return checkpoints.load(directory, placer=pruner, **load), pruner


def inputs_of_experts(model: Any, block: int) -> dict[str, list[np.ndarray[Any, Any]]]:
    """The tokens of each expert of a block of transformers' Qwen3-MoE, for both projections, by its formula."""
    module = model.model.layers[block].mlp.experts
    seen: list[tuple[Tensor, ...]] = []
    hook = module.register_forward_pre_hook(lambda _, args: seen.append(tuple(each.detach() for each in args)))
    with torch.no_grad():
        model(IDS)
    hook.remove()
    ((hidden, chosen, _),) = seen
    first, second = [], []
    for expert in range(EXPERTS):
        own = hidden[(chosen == expert).any(dim=1)]
        gate, up = (own @ module.gate_up_proj.detach()[expert].T).chunk(2, dim=1)
        first.append(own.numpy())
        second.append((nn.functional.silu(gate) * up).numpy())
    return {"gate_up_proj": first, "down_proj": second}


def put(model: Any, block: int, layers: dict[str, Any]) -> None:
    """Give a block of transformers' model the weights of ours."""
    for path, layer in layers.items():
        if path.startswith(f"model.layers.{block}."):
            name = path if "experts" in path else f"{path}.weight"
            parameter = model.get_parameter(name)
            parameter.data = layer.dequantized(torch.float64).view(parameter.shape)


def test_rows_of_padding_are_no_inputs() -> None:
    tokens = padded_tokens((3, 2, 0))
    assert tokens.counts == (3, 3, 0)
    x, layer = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), nn.Module()
    layer.forward = lambda x, tokens: x
    with pruning._measured({"up": layer}, "wanda") as statistics:
        layer(x, tokens)
    first, second, third = statistics["up"]
    assert first is not None
    assert second is not None
    torch.testing.assert_close(first.sums, x[:3].square().sum(dim=0))
    torch.testing.assert_close(second.sums, x[3:5].square().sum(dim=0))
    assert third is None


@pytest.mark.parametrize(
    "method, pattern, quant, order",
    [
        ("magnitude", "unstructured", "nf4", "prune_first"),
        ("wanda", "unstructured", "none", "prune_first"),
        ("wanda", "2:4", "nf4", "prune_first"),
        ("wanda", "unstructured", "nf4", "quantize_first"),
        ("sparsegpt", "unstructured", "none", "prune_first"),
        ("sparsegpt", "2:4", "nf4", "prune_first"),
    ],
)
def test_each_expert_is_pruned_by_its_own_tokens(
    tmp_path: Path, method: Any, pattern: str, quant: str, order: Any
) -> None:
    tiny_experts.write(tmp_path, "qwen3_moe")
    sparsity = 0.5 if pattern == "unstructured" else None
    settings = PruneConfig(method=method, pattern=pattern, sparsity=sparsity, order=order)
    model, pruner = pruned(tmp_path, settings, quant=quant, compute_dtype=torch.float64)
    layers = frozen_layers(model)
    assert pruner.layers.keys() == layers.keys()
    assert len(stacks(model)) == 4
    library = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64, experts_implementation="eager")
    for block in range(2):
        paths = {name: f"model.layers.{block}.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")}
        original = {name: library.get_parameter(path).detach().clone() for name, path in paths.items()}
        if order == "quantize_first":
            for path, each in [(p, library.get_submodule(p)) for p in layers if f"layers.{block}.self" in p]:
                assert path
                each.weight.data = dequantize(quantize(each.weight.data.float(), quant)).double()
            for name, path in paths.items():
                value = dequantize(quantize(original[name].flatten(0, 1).float(), quant)).double()
                library.get_parameter(path).data = original[name] = value.view(original[name].shape)
        inputs = inputs_of_experts(library, block)
        for name, path in paths.items():
            keep = layers[path].keep_mask().view(original[name].shape).numpy()
            found = layers[path].dequantized(torch.float64).view(original[name].shape).numpy()
            assert not found[~keep].any()
            for expert, tokens in enumerate(inputs[name][: 1 if method == "sparsegpt" else None]):
                assert len(tokens) > 8
                weight = original[name][expert].numpy()
                mask, target = expected(method, pattern, weight, tokens)
                agree = keep[expert] == mask
                assert (~agree).sum() <= (2 if method != "sparsegpt" else 0.01 * mask.size), (path, expert)
                if quant == "none":
                    rows = agree.all(axis=1)
                    np.testing.assert_allclose(found[expert][rows], target[rows], rtol=2e-3, atol=2e-4)
        put(library, block, layers)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, library(IDS).logits, rtol=1e-4, atol=1e-4)


def expected(method: str, pattern: str, weight: Any, tokens: Any) -> tuple[Any, Any]:
    """The mask of an expert, and its weights."""
    n_of_m = (2, 4) if pattern == "2:4" else None
    if method == "sparsegpt":
        share = {"n_of_m": n_of_m} if n_of_m else {"sparsity": 0.5}
        target, keep = reference_prune.obs(weight, tokens.T @ tokens, 0.01, block=128, **share)
        return keep, target
    scores = np.abs(weight) if method == "magnitude" else np.abs(weight) * np.sqrt((tokens**2).sum(0))
    keep = reference_prune.keep_mask(scores, n_of_m or ("tensor" if method == "magnitude" else "row"), 0.5)
    return keep, weight * keep


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_an_expert_without_tokens_is_pruned_by_magnitude(
    tmp_path: Path, method: Any, caplog: pytest.LogCaptureFixture
) -> None:
    source = tiny_experts.make("gpt_oss")
    source.model.layers[0].mlp.router.bias.data[2] = -100.0
    source.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING, logger="qdora"):
        model, _ = pruned(tmp_path, PruneConfig(method=method, sparsity=0.5), quant="none")
    told = [each for each in caplog.messages if "no calibration token" in each]
    assert len(told) == 2
    assert all("reached experts 2 (1 of 4); they are pruned by magnitude" in each for each in told)
    layer = frozen_layers(model)["model.layers.0.mlp.experts.gate_up_proj"]
    weight = source.model.layers[0].mlp.experts.gate_up_proj.detach().mT[2].numpy()
    keep = layer.keep_mask().view(EXPERTS, *weight.shape)[2].numpy()
    group = "row" if method == "wanda" else "tensor"
    assert (keep == reference_prune.keep_mask(np.abs(weight), group, 0.5)).all()
    others = layer.keep_mask().view(EXPERTS, *weight.shape)[1].numpy()
    weight = source.model.layers[0].mlp.experts.gate_up_proj.detach().mT[1].numpy()
    assert (others != reference_prune.keep_mask(np.abs(weight), group, 0.5)).any()


def test_a_pruned_mixture_comes_back_bit_for_bit(tmp_path: Path) -> None:
    tiny_experts.write(tmp_path / "model", "llama4_text")
    model, pruner = pruned(tmp_path / "model", PruneConfig(method="wanda", pattern="2:4"), quant="nf4")
    assert pruner.layers["model.layers.0.feed_forward.experts.down_proj"].sparsity == 0.5
    save_pruned_base(model, pruner.layers, tmp_path / "base", key="0", settings={})
    again = checkpoints.load(tmp_path / "model", quant="nf4", placer=PrunedBase(tmp_path / "base"))
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
