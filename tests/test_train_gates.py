"""Gates: each rule against its definition; in runs the budget is kept, nothing jumps, and a resume changes nothing."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from scipy.optimize import minimize, minimize_scalar
from torch import nn

from qdora.adapter import gate as hard_concrete
from qdora.adapter.adapted_linear import AdaptedLinear
from qdora.adapter.frozen_linear import FrozenLinear
from qdora.errors import UserError
from qdora.model.adapter_file import describe_adapter
from qdora.model.inject import adapted_layers, adapter_parameters
from qdora.recipe.settings import GateConfig
from qdora.run.run import train_run
from qdora.train import gates as gate_rules
from qdora.train.distributed import Processes
from qdora.train.gates import Gates
from qdora.train.optimizer import AdapterOptimizer
from tests import support
from tests.support import ADAPTER, assert_resumes, training_lines

RANK = 6
NUM_LAYERS = 14
QUICK: dict[str, Any] = {"eval__at_start": False, "eval__at_end": False, "eval__limit": ..., "adapter__rank": RANK}
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
    found = [gate_rules.allowed_cost(step, 100, 20, 4, 10) for step in range(20)]
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
    generator = np.random.default_rng(1)
    values, sizes = generator.normal(size=30), generator.uniform(0.01, 2.0, 30)
    cost = generator.uniform(0.5, 3.0, 30)
    penalty = 0.4
    chosen = torch.arange(30) % 3 != 0
    got = gate_rules.proximal_step(torch.tensor(values), torch.tensor(sizes), torch.tensor(cost), penalty, chosen)
    for index in range(30):
        c, p, w = values[index], sizes[index], cost[index]

        def objective(z: float, c: float = c, p: float = p, w: float = w) -> float:
            return penalty * w * abs(z) + (z - c) ** 2 / (2 * p)

        ends = sorted((0.0, c * 1.5))
        expected = minimize_scalar(objective, bounds=ends, method="bounded", options={"xatol": 1e-10}).x
        best = 0.0 if objective(0.0) <= objective(expected) else expected
        assert float(got[index]) == pytest.approx(best if chosen[index] else c, abs=1e-6)


def test_a_component_dies_at_its_penalty_and_no_earlier() -> None:
    values, sizes, cost = wide([0.5, -2.0, 1.0]), wide([0.1, 0.2, 3.0]), wide([1.0, 2.0, 1.0])
    deaths = gate_rules.death_penalty(values, sizes, cost)
    everything = torch.ones(3, dtype=torch.bool)
    for index, penalty in enumerate(deaths.tolist()):
        assert gate_rules.proximal_step(values, sizes, cost, penalty * (1 + 1e-9), everything)[index] == 0
        assert gate_rules.proximal_step(values, sizes, cost, penalty * (1 - 1e-6), everything)[index] != 0
    # A gate divided by t has a gradient t times as large, so Adam's sqrt(v) is, too: the worth stays
    shared = [gate_rules.death_penalty(wide([0.8 / t]), wide([0.01 / (0.03 * t)]), wide([1.0])) for t in (1.0, 1e-3)]
    assert shared[0].item() == pytest.approx(shared[1].item())


def test_the_shift_is_the_nearest_distribution_that_keeps_the_budget() -> None:
    """Against a constrained minimisation of the KL divergence between the on-probabilities."""
    log_alpha, cost = wide([-1.0, 0.5, 2.0, -0.2]), wide([1.0, 2.0, 1.5, 0.5])
    alive = torch.tensor([True, True, True, False])
    p = hard_concrete.probability_on(log_alpha)[:3].numpy()
    w = cost[:3].numpy()
    allowed = 1.7
    found = gate_rules.shifted_to_budget(log_alpha, cost, alive, allowed)
    q = hard_concrete.probability_on(found)[:3].numpy()
    assert float((q * w).sum()) == pytest.approx(allowed, abs=1e-9)
    assert found[3] == log_alpha[3]

    def divergence(x: np.ndarray) -> float:
        return float((x * np.log(x / p) + (1 - x) * np.log((1 - x) / (1 - p))).sum())

    best = minimize(
        divergence, p, bounds=[(1e-6, 1 - 1e-6)] * 3, constraints={"type": "eq", "fun": lambda x: x @ w - allowed}
    )
    np.testing.assert_allclose(q, best.x, atol=1e-3)
    for unreachable in (0.0, 100.0):
        ends = gate_rules.shifted_to_budget(
            wide([0.3, -2.0]), wide([1.0, 1.0]), torch.tensor([True, True]), unreachable
        )
        assert ends.abs().tolist() == [gate_rules.LARGEST_LOGIT] * 2


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gates")


@pytest.fixture(scope="module", params=["l1", "hard_concrete"])
def uninterrupted(root: Path, request: pytest.FixtureRequest) -> tuple[Any, Path]:
    gates = {"mode": request.param, "mean_rank": 2, "warmup": 2, "anneal": 5, "shrink_every": 3}
    recipe = support.tiny_recipe(root, **QUICK, train__steps=9, adapter__gates=gates)
    train_run(recipe, root / request.param)
    return recipe, root / request.param


def test_a_run_ends_with_its_budget_in_the_adapter(root: Path, uninterrupted: tuple[Any, Path], tmp_path: Path) -> None:
    _, run = uninterrupted
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
    scalings = describe_adapter(run / "adapter").scalings
    assert scalings is not None
    assert list(scalings.values()) == pytest.approx([8.0 / RANK] * NUM_LAYERS)
    # Without surplus it starts like an ungated run; gates are not in the norm
    train_run(support.tiny_recipe(root, **QUICK, train__steps=1), tmp_path / "plain")
    plain, first = training_lines(tmp_path / "plain")[0], training_lines(run)[0]
    assert (first["loss"], first["gradient_norm"]) == (plain["loss"], plain["gradient_norm"])


@pytest.mark.parametrize("stop_at", [pytest.param(1, marks=pytest.mark.slow), 4, 8])
def test_resumed_equals_uninterrupted(uninterrupted: tuple[Any, Path], tmp_path: Path, stop_at: int) -> None:
    """In warm-up, between two removals with dead components in place, and after the last."""
    recipe, whole = uninterrupted
    assert_resumes(recipe, whole, tmp_path / "run", stop_at=stop_at, step=9)
    first, second = (load_file(run / "checkpoints/step-9/gates.safetensors") for run in (tmp_path / "run", whole))
    assert all(torch.equal(first[name], second[name]) for name in first)


def pieces(name: Any = "adamw", quant: str | None = None, dtype: Any = torch.float32, **settings: Any) -> Any:
    """A tiny model with gates and an optimizer that has made steps."""
    model = support.adapted_model("llama", quant=quant, rank=8, dtype=dtype)
    asked = GateConfig(**{"mean_rank": 3, "warmup": 1, "anneal": 2, "shrink_every": 3, **settings})
    gates = Gates(adapted_layers(model), asked, num_steps=10, seed=0)
    optimizer = AdapterOptimizer(adapter_parameters(model), name=name)
    return model, gates, optimizer


def backward(model: Any) -> torch.Tensor:
    loss = model(input_ids=support.LM_IDS, labels=support.LM_IDS, use_cache=False).loss
    loss.backward()
    return loss.detach()


def loss_of(model: Any) -> float:
    with torch.no_grad():
        return float(model(input_ids=support.LM_IDS, labels=support.LM_IDS, use_cache=False).loss)


def step(model: Any, gates: Gates, optimizer: AdapterOptimizer, number: int) -> None:
    gates.begin(number)
    backward(model)
    optimizer.step(1e-3)
    optimizer.zero_grad()
    gates.end(number, True, optimizer, Processes())


@each_mode
@pytest.mark.parametrize("budget", [{"mean_rank": 1.5}, {"mean_rank": 3.9}, {"mean_rank": None, "parameters": 4900}])
def test_the_budget_is_reached_within_2_percent(mode: str, budget: dict[str, Any]) -> None:
    model, gates, optimizer = pieces(mode=mode, **budget, warmup=2, anneal=6, shrink_every=1)
    for number in range(10):
        step(model, gates, optimizer, number)
    layers = adapted_layers(model).values()
    if "parameters" in budget:
        wanted, reached = 4900, sum(layer.lora_A.numel() + layer.lora_B.numel() for layer in layers)
    else:
        wanted, reached = budget["mean_rank"], sum(len(layer.lora_A) for layer in layers) / NUM_LAYERS
    assert 0.98 * wanted <= reached <= wanted
    assert min(layer.rank for layer in layers) >= 1
    assert gates.parameters == []
    assert all(layer.gate is None for layer in layers), "what is left is an ordinary adapter"


def state_of(gates: Gates, optimizer: AdapterOptimizer) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Copies of the gates, and of the optimizer's masters and states."""
    values = {path: layer.gate.detach().clone() for path, layer in gates.layers.items() if layer.gate is not None}
    states = {key: tensor.clone() for key, tensor in optimizer.state_tensors().items()}
    return values, {key: optimizer.master(key) for key in optimizer.parameters}, states


@pytest.mark.parametrize("name", ["adamw", "paged_adamw_8bit", "paged_adamw_32bit", "lion", "paged_lion_8bit"])
def test_removal_keeps_the_loss_and_the_states_of_what_stays(name: Any) -> None:
    model, gates, optimizer = pieces(name, anneal=5, shrink_every=99)
    for number in range(3):
        step(model, gates, optimizer, number)
    loss, (values, masters, states) = loss_of(model), state_of(gates, optimizer)
    gates.remove_dead(optimizer)
    assert loss_of(model) == pytest.approx(loss, rel=1e-6)
    num_cut = 0
    for path, layer in adapted_layers(model).items():
        keep = values[path] != 0
        num_cut += int((~keep).sum())
        for part, dim in (("lora_A", 0), ("lora_B", 1)):
            key, index = f"{path}.{part}", keep.nonzero().squeeze(1)
            assert torch.equal(optimizer.master(key), masters[key].index_select(dim, index))
            for state, tensor in optimizer.state_tensors().items():
                if (
                    state.startswith(f"state/{key}/")
                    and tensor.shape == layer.get_parameter(part).shape
                    and tensor.dtype == torch.float32
                ):
                    assert torch.equal(tensor, states[state].index_select(dim, index)), state
        assert torch.equal(optimizer.master(f"{path}.magnitude"), masters[f"{path}.magnitude"])
    assert 0 < num_cut == NUM_LAYERS * (8 - gates.mean_rank)
    step(model, gates, optimizer, 3)  # training goes on
    assert np.isfinite(loss_of(model))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["adamw", "paged_adamw_8bit", "lion"])
def test_at_the_end_gates_are_folded_into_the_factor_and_its_averages(name: Any, dtype: str) -> None:
    """Bit for bit the same function; averages of the gradient by B diag(c): the old ones over c, and over c^2."""
    model, gates, optimizer = pieces(name, dtype=getattr(torch, dtype), anneal=5)
    for number in range(3):
        step(model, gates, optimizer, number)
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
    step(model, gates, optimizer, 3)


@each_mode
def test_between_steps_gates_are_deterministic_and_a_failed_step_leaves_no_draw(mode: str) -> None:
    model, gates, optimizer = pieces(mode=mode, anneal=5)
    for number in range(3):
        step(model, gates, optimizer, number)
    before = loss_of(model)
    gates.begin(3)
    drawn = loss_of(model)
    assert (drawn != before) == (mode == "hard_concrete")
    gates.begin(3)
    assert loss_of(model) == drawn, "another attempt at the same step draws the same"
    gates.begin(4)
    assert (loss_of(model) != drawn) == (mode == "hard_concrete")
    gates.end(4, False, optimizer, Processes())
    assert loss_of(model) == before
    gates.seed = 2**63 - 1
    gates.begin(4)


@each_mode
@pytest.mark.parametrize("num_applied", [0, 9])
def test_a_last_step_that_is_left_out_ends_the_anneal_all_the_same(mode: str, num_applied: int) -> None:
    model, gates, optimizer = pieces(mode=mode, anneal=9)
    for number in range(9):
        if number < num_applied:
            step(model, gates, optimizer, number)
        else:
            gates.begin(number)
            gates.end(number, False, optimizer, Processes())
    before = optimizer.state_tensors()
    gates.begin(9)
    found = gates.end(9, False, optimizer, Processes())
    layers = adapted_layers(model).values()
    assert gates.is_over
    assert all(layer.gate is None for layer in layers), "what is left is an ordinary adapter"
    assert sum(layer.rank for layer in layers) == 3 * NUM_LAYERS
    assert min(layer.rank for layer in layers) >= 1
    assert found["gates"]["mean_rank"] == 3
    assert np.isfinite(loss_of(model))
    assert before.keys() == optimizer.state_tensors().keys()


def test_full_budget_faults() -> None:
    for asked, words in (
        ({"mean_rank": 8.0}, r"mean_rank: got 8, must be at least 1 \(one component a layer\) and less than 8"),
        ({"mean_rank": None, "parameters": 5}, "parameters: got 5, must be at least"),
        ({"mean_rank": None, "parameters": 10**9}, "parameters: got 1,000,000,000, must be at least"),
    ):
        _, gates, _ = pieces(**asked)
        with pytest.raises(UserError, match=words):
            gates.check_budget()
    with pytest.raises(
        UserError,
        match=r"adapter\.gates\.anneal: warmup and anneal together must be at most the \d+ steps .*got 1 \+ 20\.",
    ):
        pieces(anneal=20)


@pytest.mark.parametrize("seed", [0, 1])
def test_l1_finds_planted_ranks_exactly(seed: int) -> None:
    """Four layers learn updates of these ranks from rank 8 each, with a budget of as many components."""
    planted = [1, 2, 3, 6]
    generator = torch.Generator().manual_seed(seed)
    layers, targets = {}, {}
    for number, rank in enumerate(planted):
        weight = torch.randn(24, 32, generator=generator) * 0.2
        update = torch.randn(24, rank, generator=generator) @ torch.randn(rank, 32, generator=generator) * 0.08
        options: dict[str, Any] = {"rank": 8, "alpha": 8.0, "dtype": torch.float32, "generator": generator}
        layers[str(number)] = AdaptedLinear(FrozenLinear(weight), kind="lora", **options)
        targets[str(number)] = weight + update
    asked = GateConfig(mode="l1", mean_rank=sum(planted) / 4, warmup=0.3, anneal=0.5)
    gates = Gates(layers, asked, num_steps=300, seed=seed)
    optimizer = AdapterOptimizer(adapter_parameters(nn.ModuleDict(layers)))
    for number in range(300):
        gates.begin(number)
        x = torch.randn(64, 32, generator=generator)
        loss = sum((layer(x) - x @ targets[name].T).square().mean() for name, layer in layers.items())
        loss.backward()  # type: ignore[union-attr]
        value = float(loss.detach())
        del loss  # and its graph, before parameters shrink
        optimizer.step(1e-2)
        optimizer.zero_grad()
        gates.end(number, True, optimizer, Processes())
    assert [layer.rank for layer in layers.values()] == planted
    assert value < 1e-4
