"""Gates: each rule against its definition; in runs the budget is kept, nothing jumps, and a resume changes nothing."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from scipy.optimize import minimize_scalar
from torch import nn

from qdora.adapter import gates as hard_concrete
from qdora.adapter.layer import AdaptedLinear, FrozenLinear
from qdora.errors import UserError
from qdora.model.inject import adapted_layers, adapter_parameters
from qdora.recipe.settings import GateConfig
from qdora.run.run import train_run
from qdora.train import gates as gate_rules
from qdora.train.distributed import Processes
from qdora.train.gates import Gates
from qdora.train.optimizer import AdapterOptimizer
from tests import support
from tests.support import ADAPTER, UNEVALUATED, assert_resumes, same_tensors, training_lines

RANK, NUM_LAYERS = 6, 14
QUICK: dict[str, Any] = {**UNEVALUATED, "adapter__rank": RANK}
each_mode = pytest.mark.parametrize("mode", ["l1", "hard_concrete"])


def wide(values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def drawn(log_alpha: float, u: float) -> float:
    """arXiv 1712.01312, eq. 10 and 11, with numbers of its section 4."""
    s = 1 / (1 + math.exp(-(math.log(u) - math.log(1 - u) + log_alpha) / (2 / 3)))
    return min(1.0, max(0.0, s * 1.2 - 0.1))


def test_hard_concrete_values_slopes_and_probabilities() -> None:
    generator = np.random.default_rng(0)
    for log_alpha in (-5.0, -1.0, 0.0, 0.3, 2.5, 6.0):
        u = generator.uniform(1e-4, 1 - 1e-4, 400)
        values = [drawn(log_alpha, each) for each in u]
        la = torch.full((400,), log_alpha, dtype=torch.float64)
        got = hard_concrete.gate_value(la, torch.tensor(u))
        np.testing.assert_allclose(got.numpy(), values, rtol=1e-10, atol=1e-14)
        slopes = [(drawn(log_alpha + 1e-6, each) - drawn(log_alpha - 1e-6, each)) / 2e-6 for each in u]
        np.testing.assert_allclose(hard_concrete.gate_slope(la, torch.tensor(u)).numpy(), slopes, atol=1e-7)
        # z > 0 where u is above the one u at which s = 1 / 12
        edge = 1 / (1 + math.exp(log_alpha - (2 / 3) * math.log(1 / 11)))
        assert drawn(log_alpha, edge * (1 - 1e-6)) == 0.0 < drawn(log_alpha, edge * (1 + 1e-6))
        assert float(hard_concrete.probability_on(la)[0]) == pytest.approx(1 - edge, rel=1e-9)
    # Without a draw it is exactly 0 and 1 at its ends
    on = math.log(1.1 / 0.1)
    ends = hard_concrete.gate_value(wide([-on - 1e-6, -on + 1e-3, 0.0, on - 1e-3, on + 1e-6])).tolist()
    assert [ends[0], ends[2], ends[4]] == [0.0, pytest.approx(0.5), 1.0]
    assert 0.0 < ends[1] < 1e-3
    assert 1.0 - 1e-3 < ends[3] < 1.0


def test_the_budget_is_full_in_warm_up_and_falls_to_its_end() -> None:
    gates: Any = SimpleNamespace(full=100, target=20, num_warmup=4, num_anneal=10)
    found = [Gates.allowed_cost(gates, step) for step in range(20)]
    assert found[:5] == [100] * 5
    assert found[9] == 20 + 80 * 0.5**3
    assert found[14:] == [20] * 6
    assert found == sorted(found, reverse=True)


CASES = st.lists(
    st.tuples(st.integers(0, 3), st.floats(0, 1), st.booleans(), st.integers(1, 5)), min_size=1, max_size=14
)


@given(CASES, st.floats(0, 60))
@settings(max_examples=200, deadline=None)
def test_surplus_takes_the_lowest(components: list[tuple[int, float, bool, int]], allowed: float) -> None:
    layer = torch.tensor([each[0] for each in components])
    order, cost = wide([each[1] for each in components]), wide([float(each[3]) for each in components])
    alive = torch.tensor([each[2] for each in components])
    going = gate_rules.surplus(order, cost, layer, alive, allowed)
    # One after the other, from the lowest of those that may go, as long as the rest is too much; a layer's best stays
    best = {
        max(((layer == n) & alive).nonzero().squeeze(1).tolist(), key=lambda index: float(order[index]))
        for n in set(layer[alive].tolist())
    }
    left, expected = float(cost[alive].sum()), set()
    for index in sorted(set(alive.nonzero().squeeze(1).tolist()) - best, key=lambda i: (float(order[i]), i)):
        if left <= allowed:
            break
        left -= float(cost[index])
        expected.add(index)
    assert set(going.nonzero().squeeze(1).tolist()) == expected


def test_the_proximal_step_is_the_minimum_in_adams_metric() -> None:
    """And a component dies at its penalty, no earlier."""
    generator = np.random.default_rng(1)
    values, sizes = generator.normal(size=30), generator.uniform(0.01, 2.0, 30)
    cost = generator.uniform(0.5, 3.0, 30)
    penalty = 0.4
    chosen = torch.arange(30) % 3 != 0
    given = torch.tensor(values), torch.tensor(sizes), torch.tensor(cost)
    got = gate_rules.proximal_step(*given, penalty, chosen)
    deaths = gate_rules.death_penalty(*given)
    for index in range(30):
        c, p, w = values[index], sizes[index], cost[index]

        def objective(z: float, c: float = c, p: float = p, w: float = w) -> float:
            return penalty * w * abs(z) + (z - c) ** 2 / (2 * p)

        ends = sorted((0.0, c * 1.5))
        expected = minimize_scalar(objective, bounds=ends, method="bounded", options={"xatol": 1e-10}).x
        best = 0.0 if objective(0.0) <= objective(expected) else expected
        assert float(got[index]) == pytest.approx(best if chosen[index] else c, abs=1e-6)
        everything, death = torch.ones(30, dtype=torch.bool), float(deaths[index])
        assert gate_rules.proximal_step(*given, death * (1 + 1e-9), everything)[index] == 0
        assert gate_rules.proximal_step(*given, death * (1 - 1e-6), everything)[index] != 0


def test_the_shift_is_the_nearest_distribution_that_keeps_the_budget() -> None:
    """Of all q with sum(q w) = budget the KL divergence to p is least where logit(q) = logit(p) + t w, with one t."""
    log_alpha, cost = wide([-1.0, 0.5, 2.0, -0.2]), wide([1.0, 2.0, 1.5, 0.5])
    alive = torch.tensor([True, True, True, False])
    found = gate_rules.shifted_to_budget(log_alpha, cost, alive, 1.7)
    assert found[3] == log_alpha[3]
    p, q = (hard_concrete.probability_on(each)[:3].numpy() for each in (log_alpha, found))
    assert float((q * cost[:3].numpy()).sum()) == pytest.approx(1.7, abs=1e-9)
    shift = (np.log(q / (1 - q)) - np.log(p / (1 - p))) / cost[:3].numpy()
    np.testing.assert_allclose(shift, shift[0], rtol=1e-9)
    for unreachable in (0.0, 100.0):
        ends = gate_rules.shifted_to_budget(
            wide([0.3, -2.0]), wide([1.0, 1.0]), torch.tensor([True, True]), unreachable
        )
        assert ends.abs().tolist() == [gate_rules.LARGEST_LOGIT] * 2


@each_mode
def test_a_run_ends_with_its_budget_in_the_adapter_and_resumes(root: Path, tmp_path: Path, mode: str) -> None:
    run = tmp_path / "whole"
    gates = {"mode": mode, "mean_rank": 2, "warmup": 2, "anneal": 5, "shrink_every": 3}
    recipe = support.tiny_recipe(root, **QUICK, train__steps=9, adapter__gates=gates)
    train_run(recipe, run)
    ranks = [line["gates"]["mean_rank"] for line in training_lines(run)]
    assert ranks[:2] == [RANK] * 2, "nothing is removed in warm-up"
    assert ranks == sorted(ranks, reverse=True)
    assert ranks[6:] == [2.0] * 3
    tensors = load_file(run / ADAPTER)
    found = [tensor.shape[0] for name, tensor in tensors.items() if name.endswith("lora_A.weight")]
    assert len(found) == NUM_LAYERS
    assert sum(found) == 2 * NUM_LAYERS
    assert min(found) >= 1
    assert len(set(found)) > 1, "layers differ"
    parameters = sum(t.numel() for name, t in tensors.items() if ".lora_A" in name or ".lora_B" in name)
    assert parameters == training_lines(run)[-1]["gates"]["num_parameters"]
    # The scaling of every layer is still that of the recipe
    layers = json.loads((run / "adapter/qdora.json").read_text())["layers"].values()
    assert [layer["scaling"] for layer in layers] == pytest.approx([8.0 / RANK] * NUM_LAYERS)
    # Without surplus it starts like an ungated run; gates are not in the norm
    train_run(support.tiny_recipe(root, **QUICK, train__steps=1), tmp_path / "plain")
    plain, first = training_lines(tmp_path / "plain")[0], training_lines(run)[0]
    assert (first["loss"], first["gradient_norm"]) == (plain["loss"], plain["gradient_norm"])
    # Stopped between two removals, with dead components in place
    assert_resumes(recipe, run, tmp_path / "run", stop_at=4, step=9)
    same_tensors(*(each / "checkpoints/step-9/gates.safetensors" for each in (run, tmp_path / "run")))


def pieces(name: Any = "adamw", quant: str | None = None, dtype: Any = torch.float32, **settings: Any) -> Any:
    """A tiny model with gates and an optimizer that has made steps."""
    model = support.adapted_model("llama", quant=quant, rank=8, dtype=dtype)
    asked = GateConfig(**{"mean_rank": 3, "warmup": 1, "anneal": 2, "shrink_every": 3, **settings})
    gates = Gates(adapted_layers(model), asked, num_steps=10, seed=0)
    optimizer = AdapterOptimizer(adapter_parameters(model), name=name)
    return model, gates, optimizer


def loss_of(model: Any) -> float:
    with torch.no_grad():
        return float(model(input_ids=support.LM_IDS, labels=support.LM_IDS, use_cache=False).loss)


def step(model: Any, gates: Gates, optimizer: AdapterOptimizer, number: int) -> None:
    gates.begin(number)
    model(input_ids=support.LM_IDS, labels=support.LM_IDS, use_cache=False).loss.backward()
    optimizer.step(1e-3)
    optimizer.zero_grad()
    gates.end(number, True, optimizer, Processes())


@each_mode
@pytest.mark.parametrize(
    ("budget", "num_applied"),
    [
        ({"mean_rank": 1.5, "shrink_every": 1}, 10),
        ({"mean_rank": 3.9}, 10),
        ({"mean_rank": None, "parameters": 4900, "shrink_every": 1}, 10),
        ({"mean_rank": 3, "anneal": 9, "warmup": 1}, 9),
        ({"mean_rank": 3, "anneal": 9, "warmup": 1}, 0),
    ],
)
def test_the_budget_is_reached_within_2_percent(mode: str, budget: dict[str, Any], num_applied: int) -> None:
    """Also where the last steps are left out, or all of them."""
    model, gates, optimizer = pieces(**{"mode": mode, "warmup": 2, "anneal": 6} | budget)
    before = optimizer.state_tensors()
    for number in range(10):
        if number < num_applied:
            step(model, gates, optimizer, number)
        else:
            gates.begin(number)
            gates.end(number, False, optimizer, Processes())
    layers = adapted_layers(model).values()
    if "parameters" in budget:
        wanted, reached = 4900, sum(layer.lora_A.numel() + layer.lora_B.numel() for layer in layers)
    else:
        wanted, reached = budget["mean_rank"], sum(len(layer.lora_A) for layer in layers) / NUM_LAYERS
    assert 0.98 * wanted <= reached <= wanted
    assert min(layer.rank for layer in layers) >= 1
    assert gates.parameters == []
    assert all(layer.gate is None for layer in layers), "what is left is an ordinary adapter"
    assert np.isfinite(loss_of(model))
    assert before.keys() == optimizer.state_tensors().keys()


def state_of(gates: Gates, optimizer: AdapterOptimizer) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Copies of the gates, and of the optimizer's masters and states."""
    values = {path: layer.gate.detach().clone() for path, layer in gates.layers.items() if layer.gate is not None}
    states = {key: tensor.clone() for key, tensor in optimizer.state_tensors().items()}
    return values, {key: support.master(optimizer, key) for key in optimizer.parameters}, states


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["adamw", "paged_adamw_8bit", "lion"])
def test_removal_and_folding_keep_the_loss_and_the_states_of_what_stays(name: Any, dtype: torch.dtype) -> None:
    """Folded: averages of the gradient by B diag(c) are the old ones over c, and over c^2."""
    model, gates, optimizer = pieces(name, dtype=dtype, anneal=5, shrink_every=99)
    for number in range(3):
        step(model, gates, optimizer, number)
    loss, (values, masters, states) = loss_of(model), state_of(gates, optimizer)
    gates.remove_dead(optimizer)
    assert loss_of(model) == pytest.approx(loss, rel=1e-6 if dtype == torch.float32 else 1e-2)
    num_cut = 0
    for path, layer in adapted_layers(model).items():
        keep = values[path] != 0
        num_cut += int((~keep).sum())
        for part, dim in (("lora_A", 0), ("lora_B", 1)):
            key, index = f"{path}.{part}", keep.nonzero().squeeze(1)
            assert torch.equal(support.master(optimizer, key), masters[key].index_select(dim, index))
            for state, tensor in optimizer.state_tensors().items():
                of_factor = state.startswith(f"state/{key}/") and tensor.shape == layer.get_parameter(part).shape
                if of_factor and tensor.dtype == torch.float32:
                    assert torch.equal(tensor, states[state].index_select(dim, index)), state
        assert torch.equal(support.master(optimizer, f"{path}.magnitude"), masters[f"{path}.magnitude"])
    assert 0 < num_cut == NUM_LAYERS * (8 - gates.mean_rank)
    step(model, gates, optimizer, 3)  # training goes on
    gates.remove_dead(optimizer)
    logits, (values, _, states) = support.logits_of(model), state_of(gates, optimizer)
    gates._fold(optimizer)
    assert gates.is_over
    assert torch.equal(support.logits_of(model), logits)
    after, checked = optimizer.state_tensors(), 0
    moments = {"exp_avg": 1, "exp_avg_sq": 2, "state1": 1, "state2": 2}
    for key, before in states.items():
        path, _, part = key.removeprefix("state/").rpartition("/")
        layer, _, factor = path.rpartition(".")
        if key.startswith("state/") and factor == "lora_B" and part in moments:
            assert before.dtype == torch.float32  # matrices below 4,096 elements
            torch.testing.assert_close(after[key], before / values[layer] ** moments[part], rtol=1e-6, atol=0)
            checked += 1
        elif not key.startswith("residual/") or not key.endswith("lora_B"):
            assert torch.equal(after[key], before), key
    assert checked >= NUM_LAYERS
    assert any((gate != 1).any() for gate in values.values())
    step(model, gates, optimizer, 4)
    assert np.isfinite(loss_of(model))


@each_mode
def test_between_steps_gates_are_deterministic_and_a_failed_step_leaves_no_draw(mode: str) -> None:
    model, gates, optimizer = pieces(mode=mode, anneal=5)
    for number in range(3):
        step(model, gates, optimizer, number)
    losses = [loss_of(model)]
    for number in (3, 3, 4):  # another attempt at the same step draws the same
        gates.begin(number)
        losses.append(loss_of(model))
    gates.end(4, False, optimizer, Processes())
    before, first, again, other = losses
    assert before == loss_of(model)
    assert first == again
    assert (first != before) == (other != first) == (mode == "hard_concrete")


def test_full_budget_faults() -> None:
    for asked, words in (
        ({"mean_rank": 8.0}, r"mean_rank: got 8, must be at least 1 \(one component a layer\) and less than 8"),
        ({"mean_rank": None, "parameters": 5}, "parameters: got 5, must be at least"),
        ({"mean_rank": None, "parameters": 10**9}, "parameters: got 1,000,000,000, must be at least"),
    ):
        with pytest.raises(UserError, match=words):
            pieces(**asked)[1].check_budget()
    with pytest.raises(UserError, match=r"gates\.anneal: warmup and anneal together must be at most .*got 1 \+ 20\."):
        pieces(anneal=20)


def test_l1_finds_planted_ranks_exactly() -> None:
    """Four layers learn updates of these ranks from rank 8 each, with a budget of as many components."""
    planted = [1, 2, 3, 6]
    generator = torch.Generator().manual_seed(0)
    layers, targets = {}, {}
    for number, rank in enumerate(planted):
        weight = torch.randn(24, 32, generator=generator) * 0.2
        update = torch.randn(24, rank, generator=generator) @ torch.randn(rank, 32, generator=generator) * 0.08
        options: dict[str, Any] = {"rank": 8, "alpha": 8.0, "dtype": torch.float32, "generator": generator}
        layers[str(number)] = AdaptedLinear(FrozenLinear(weight), kind="lora", **options)
        targets[str(number)] = weight + update
    gates = Gates(layers, GateConfig(mode="l1", mean_rank=3, warmup=0.3, anneal=0.5), num_steps=300, seed=0)
    optimizer = AdapterOptimizer(adapter_parameters(nn.ModuleDict(layers)))
    for number in range(300):
        gates.begin(number)
        x = torch.randn(64, 32, generator=generator)
        loss: Any = sum((layer(x) - x @ targets[name].T).square().mean() for name, layer in layers.items())
        loss.backward()
        value = float(loss.detach())
        del loss  # and its graph, before parameters shrink
        optimizer.step(1e-2)
        optimizer.zero_grad()
        gates.end(number, True, optimizer, Processes())
    assert [layer.rank for layer in layers.values()] == planted
    assert value < 1e-4
