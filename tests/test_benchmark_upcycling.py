"""A mixture made from a dense model: its parts, its training, and what is summed up of the adapters on it."""

from __future__ import annotations

import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2MoeForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from tests.test_benchmarks import smoke

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import upcycled_mixture
from expert_upcycling_summary import summary
from upcycled_mixture import expert_load, trained, unbound_forward, upcycled

IDS = torch.randint(3, 90, (3, 11), generator=torch.Generator().manual_seed(1))


def dense() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        rms_norm_eps=1e-3,
        rope_parameters={"rope_type": "default", "rope_theta": 123.0},
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).double().eval().requires_grad_(False)


def mixture() -> Qwen2MoeForCausalLM:
    model = upcycled(dense(), IDS).eval()
    model.config._experts_implementation = "eager"  # transformers' grouped product takes no float64
    return model


def test_all_parts_together_compute_the_dense_model(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = dense()(IDS).logits
    some = mixture()
    monkeypatch.setattr(upcycled_mixture, "TOP_K", 4)
    whole = mixture()
    for layer in whole.model.layers:
        layer.mlp.gate.weight.detach().zero_()  # equal weights
    torch.testing.assert_close(whole(IDS).logits, expected, rtol=1e-6, atol=1e-8)  # the router computes in float32
    off = (some(IDS).logits - expected).norm() / expected.norm()
    assert 1e-4 < off < 0.3
    assert some.lm_head.weight is some.model.embed_tokens.weight


def test_experts_are_the_neurons_that_contribute_least_in_groups_of_a_kind() -> None:
    mlp = dense().model.layers[0].mlp
    mlp.down_proj.weight *= torch.linspace(3.0, 1.0, 40)  # neurons in the order of what they contribute
    generator = torch.Generator().manual_seed(2)
    kinds = torch.randn(4, 24, generator=generator, dtype=torch.float64)
    for neuron in range(20, 40):
        mlp.gate_proj.weight[neuron] = mlp.up_proj.weight[neuron] = 0.05 * kinds[neuron % 4]
    inputs = kinds[torch.arange(64) % 4] + 0.1 * torch.randn(64, 24, generator=generator, dtype=torch.float64)
    mlp.gate_proj.weight[:20] = mlp.up_proj.weight[:20] = inputs[:20]
    parts = upcycled_mixture.divided(mlp, inputs)
    assert sorted(parts.shared.tolist()) == list(range(20))
    groups = {frozenset(group) for group in parts.experts.tolist()}
    assert groups == {frozenset(range(20 + kind, 40, 4)) for kind in range(4)}
    chosen = (inputs @ parts.router.T).argmax(dim=1)
    assert [int(parts.experts[expert][0]) % 4 for expert in chosen] == [token % 4 for token in range(64)]


def test_unbound_experts_have_the_gradients_of_indexed_ones() -> None:
    ALL_EXPERTS_FUNCTIONS.register("unbound", unbound_forward)
    found = {}
    for name in ("eager", "unbound"):
        model = mixture()
        model.config._experts_implementation = name
        model(input_ids=IDS, labels=IDS).loss.backward()
        found[name] = {path: parameter.grad for path, parameter in model.named_parameters()}
    for path, expected in found["eager"].items():
        torch.testing.assert_close(found["unbound"][path], expected, rtol=1e-9, atol=1e-12, msg=path)


def test_training_moves_mlps_and_routers_alone() -> None:
    model = mixture().float()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    losses = trained(model, IDS, steps=40, rows_per_step=2, lr=2e-2)
    assert losses[-1] < losses[0] - 0.2
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {name for name in before if ".mlp." in name}
    assert len(moved) == 2 * (3 + 3 + 1)
    load = expert_load(model, IDS)
    assert [sum(block) for block in load] == pytest.approx([1.0, 1.0])
    assert max(map(max, load)) <= 0.5  # an expert gets a token at most once, and two of them get it


def test_summary() -> None:
    def cell(*nlls: float) -> dict[str, Any]:
        scores = {"one": {"nll": list(nlls[:2]), "tokens": [1, 3]}, "two": {"nll": list(nlls[2:]), "tokens": [2, 2]}}
        return {"nll_per_token": 0.0, "scores": scores}

    run = {"num_trainable": 5, "num_examples": 8, "num_tokens": 80, "seconds": 1.0, "losses": []}
    tests = {
        "left": [cell(1.0, 2.0, 3.0, 5.0), cell(1.5, 2.5, 3.0, 4.0), cell(1.0, 3.0, 2.0, 4.0)],
        "right": [cell(2.0, 4.0, 4.0, 6.0), cell(2.0, 3.0, 5.0, 6.0), cell(3.0, 3.0, 3.0, 6.0)],
    }
    arms = {
        arm: {"rates": {}, "lr": "1", "runs": {str(seed): {**run, "test": each} for seed, each in enumerate(found)}}
        for arm, found in tests.items()
    }
    result = summary({"base": cell(4.0, 4.0, 4.0, 4.0), "arms": arms}, ("one", "two"))
    assert result["base"]["nll"] == {"one": 2.0, "two": 2.0, "average": 2.0}
    assert result["arms"]["left"]["nll"] == pytest.approx({"one": 11 / 12, "two": 21 / 12, "average": 32 / 24})
    differences = result["differences"]["left - right"]
    assert differences["average"]["value"] == pytest.approx(-(3 + 2 + 1 + 4 + 2 + 3) / 24)
    one = differences["one"]
    seeds = [-3 / 4, -1 / 4, -2 / 4]
    half = 4.302652729911275 * statistics.stdev(seeds) / math.sqrt(3)  # Student's t with 2 degrees of freedom
    assert (one["seeds_lower"], one["seeds_upper"]) == pytest.approx((-0.5 - half, -0.5 + half))
    assert one["lower"] < one["seeds_lower"]  # other examples may differ, too


@pytest.mark.slow
def test_smoke(tmp_path: Path) -> None:
    work = tmp_path / "work"
    result = smoke(tmp_path, "expert_upcycling.py", "--dir", str(work))
    nll = result["mixture"]["nll"]
    assert set(nll) == {"dense", "untrained", "trained", "trained_nf4"}
    assert nll["untrained"] == pytest.approx(nll["dense"], rel=0.1)
    assert nll["trained"] != nll["untrained"]
    arms = result["arms"]
    trainable = {arm: found["num_trainable"] for arm, found in arms.items()}
    assert trainable["both"] == trainable["experts"] + trainable["attention"]
    assert all(found["num_tokens"] == arms["both"]["num_tokens"] for found in arms.values()), "other examples"
    assert len(set(arms["both"]["num_tokens"])) == 2, "each seed has an order of its own"
    assert list(result["differences"]) == [
        *(f"{arm} - base" for arm in arms),
        "experts - attention",
        "experts - both",
        "attention - both",
    ]
    # What is done is not done again, and the rates were tried with the first seed alone.
    trained_at = {file: file.stat().st_mtime_ns for file in work.rglob("*.json")}
    assert len([file for file in trained_at if file.name == "training.json"]) == 3 * (2 + 1)
    assert len([file for file in trained_at if file.name == "test.json"]) == 3 * 2 + 1
    again = smoke(tmp_path, "expert_upcycling.py", "--dir", str(work))
    assert again == result
    assert {file: file.stat().st_mtime_ns for file in trained_at} == trained_at
    assert json.loads((work / "sizes.json").read_text()) == result["settings"]
