"""Gates in whole runs: the budget is kept, nothing jumps when components are removed, and a resume changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from qdora.errors import Interrupted, UserError
from qdora.model.adapter_file import describe_adapter
from qdora.model.inject import adapted_layers, adapter_parameters
from qdora.nn.adapted_linear import AdaptedLinear
from qdora.nn.frozen_linear import FrozenLinear
from qdora.recipe.settings import GateConfig
from qdora.run.train import train_run
from qdora.train.distributed import Processes
from qdora.train.gates import Gates
from qdora.train.optimizer import AdapterOptimizer
from tests import tiny_adapted, tiny_run
from tests.run_files import assert_same_run, stop_after, trained

RANK = 6
NUM_LAYERS = 14
QUICK: dict[str, Any] = {"eval__at_start": False, "eval__at_end": False, "eval__limit": ..., "adapter__rank": RANK}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gates")


def gated(root: Path, steps: int = 12, changes: dict[str, Any] | None = None, **gates: Any) -> Any:
    """A recipe of a run with gates; every step may remove components."""
    asked = {"warmup": 2, "anneal": 6, "shrink_every": 1, **gates}
    return tiny_run.recipe(root, **{**QUICK, "train__steps": steps, "adapter__gates": asked, **(changes or {})})


@pytest.fixture(scope="module", params=["l1", "hard_concrete"])
def uninterrupted(root: Path, request: pytest.FixtureRequest) -> tuple[Any, Path]:
    recipe = gated(root, steps=9, mode=request.param, mean_rank=2, anneal=5, shrink_every=3)
    train_run(recipe, root / request.param)
    return recipe, root / request.param


def test_a_run_ends_with_its_budget_in_the_adapter(uninterrupted: tuple[Any, Path]) -> None:
    _, run = uninterrupted
    ranks = [line["gates"]["mean_rank"] for line in trained(run)]
    assert ranks[:2] == [RANK] * 2, "nothing is removed in warm-up"
    assert ranks == sorted(ranks, reverse=True)
    assert ranks[6:] == [2.0] * 3
    tensors = load_file(run / "adapter/adapter_model.safetensors")
    found = [tensor.shape[0] for name, tensor in tensors.items() if name.endswith("lora_A.weight")]
    assert len(found) == NUM_LAYERS
    assert sum(found) == 2 * NUM_LAYERS
    assert min(found) >= 1
    assert len(set(found)) > 1, "layers differ"
    parameters = sum(t.numel() for name, t in tensors.items() if ".lora_A" in name or ".lora_B" in name)
    assert parameters == trained(run)[-1]["gates"]["num_parameters"]
    # The scaling of every layer is still that of the recipe
    scalings = describe_adapter(run / "adapter").scalings
    assert scalings is not None
    assert list(scalings.values()) == pytest.approx([8.0 / RANK] * NUM_LAYERS)


def test_without_surplus_a_gated_run_starts_like_an_ungated_one(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[list[float]] = []
    take = Gates.take_gradient
    monkeypatch.setattr(Gates, "take_gradient", lambda gates, values: (read.append(values), take(gates, values)))
    train_run(gated(root, steps=8, mean_rank=2), tmp_path / "gated")
    assert len(read) == 8, "with the numbers of each step"
    assert any(read[1]), "B is no longer 0"
    train_run(tiny_run.recipe(root, **{**QUICK, "train__steps": 8}), tmp_path / "plain")
    first, second = (trained(tmp_path / name)[0] for name in ("gated", "plain"))
    assert first["loss"] == second["loss"]
    assert first["gradient_norm"] == second["gradient_norm"], "gates are not in it"


@pytest.mark.parametrize("stop_at", [pytest.param(1, marks=pytest.mark.slow), 4, 8])
def test_resumed_equals_uninterrupted_bit_for_bit(
    uninterrupted: tuple[Any, Path], tmp_path: Path, stop_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In warm-up, between two removals with dead components in place, and after the last."""
    recipe, whole = uninterrupted
    stop_after(monkeypatch, stop_at)
    with pytest.raises(Interrupted):
        train_run(recipe, tmp_path / "run")
    monkeypatch.undo()
    torch.manual_seed(999)
    train_run(recipe, tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", whole, step=9)
    first, second = (load_file(run / "checkpoints/step-9/gates.safetensors") for run in (tmp_path / "run", whole))
    assert all(torch.equal(first[name], second[name]) for name in first)


def pieces(name: Any = "adamw", quant: str | None = None, dtype: Any = torch.float32, **settings: Any) -> Any:
    """A tiny model with gates and an optimizer that has made steps."""
    model = tiny_adapted.adapted("llama", quant=quant, rank=8, dtype=dtype)
    asked = GateConfig(**{"mean_rank": 3, "warmup": 1, "anneal": 2, "shrink_every": 3, **settings})
    gates = Gates(adapted_layers(model), asked, num_steps=10, seed=0)
    optimizer = AdapterOptimizer(adapter_parameters(model), name=name)
    return model, gates, optimizer


def backward(model: Any) -> torch.Tensor:
    loss = model(input_ids=tiny_adapted.IDS, labels=tiny_adapted.IDS, use_cache=False).loss
    loss.backward()
    return loss.detach()


def loss_of(model: Any) -> float:
    with torch.no_grad():
        return float(model(input_ids=tiny_adapted.IDS, labels=tiny_adapted.IDS, use_cache=False).loss)


def step(model: Any, gates: Gates, optimizer: AdapterOptimizer, number: int) -> None:
    gates.begin(number)
    backward(model)
    optimizer.step(1e-3)
    optimizer.zero_grad()
    gates.end(number, True, optimizer, Processes())


@pytest.mark.parametrize("mode", ["l1", "hard_concrete"])
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


@pytest.mark.parametrize("name", ["adamw", "paged_adamw_8bit", "paged_adamw_32bit", "lion", "paged_lion_8bit"])
def test_removal_keeps_the_loss_and_the_states_of_what_stays(name: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, gates, optimizer = pieces(name, anneal=5)
    remove = Gates.remove_dead
    seen: dict[str, Any] = {}

    def spy(self: Gates, given: AdapterOptimizer) -> None:
        seen["loss"] = loss_of(model)
        seen["gates"] = {path: layer.gate.detach().clone() for path, layer in self.layers.items()}
        seen["masters"] = {key: given.master(key) for key in given.parameters}
        seen["states"] = {key: tensor.clone() for key, tensor in given.state_tensors().items()}
        remove(self, given)

    monkeypatch.setattr(Gates, "remove_dead", spy)
    for number in range(3):
        step(model, gates, optimizer, number)
    assert loss_of(model) == pytest.approx(seen["loss"], rel=1e-6)
    num_cut = 0
    for path, layer in adapted_layers(model).items():
        keep = seen["gates"][path] != 0
        num_cut += int((~keep).sum())
        for part, dim in (("lora_A", 0), ("lora_B", 1)):
            key = f"{path}.{part}"
            index = keep.nonzero().squeeze(1)
            assert torch.equal(optimizer.master(key), seen["masters"][key].index_select(dim, index))
            for state, tensor in optimizer.state_tensors().items():
                if not state.startswith(f"state/{key}/"):
                    continue
                before = seen["states"][state]
                if tensor.shape == layer.get_parameter(part).shape and tensor.dtype == torch.float32:
                    assert torch.equal(tensor, before.index_select(dim, index)), state
        assert torch.equal(optimizer.master(f"{path}.magnitude"), seen["masters"][f"{path}.magnitude"])
    assert 0 < num_cut == NUM_LAYERS * (8 - gates.mean_rank)
    step(model, gates, optimizer, 3)  # training goes on
    assert np.isfinite(loss_of(model))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["adamw", "paged_adamw_8bit", "lion"])
def test_at_the_end_gates_are_folded_into_the_factor_and_its_averages(
    name: Any, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit the same function; averages of the gradient by B diag(c): the old ones over c, and over c^2."""
    model, gates, optimizer = pieces(name, dtype=getattr(torch, dtype))
    fold = Gates._fold
    seen: dict[str, Any] = {}

    def spy(self: Gates, given: AdapterOptimizer) -> None:
        seen["logits"] = tiny_adapted.logits(model)
        seen["gates"] = {path: layer.gate.detach().clone() for path, layer in self.layers.items()}
        seen["states"] = {key: tensor.clone() for key, tensor in given.state_tensors().items()}
        fold(self, given)

    monkeypatch.setattr(Gates, "_fold", spy)
    for number in range(3):
        step(model, gates, optimizer, number)
    assert torch.equal(tiny_adapted.logits(model), seen["logits"])
    after = optimizer.state_tensors()
    moments = {"exp_avg": 1, "exp_avg_sq": 2, "state1": 1, "state2": 2}
    checked = 0
    for key, before in seen["states"].items():
        path, _, part = key.removeprefix("state/").rpartition("/")
        layer, _, factor = path.rpartition(".")
        if key.startswith("state/") and factor == "lora_B" and part in moments:
            assert before.dtype == torch.float32  # matrices below 4,096 elements
            torch.testing.assert_close(after[key], before / seen["gates"][layer] ** moments[part], rtol=1e-6, atol=0)
            checked += 1
        elif not key.startswith("residual/") or not key.endswith("lora_B"):
            assert torch.equal(after[key], before), key
    assert checked >= NUM_LAYERS
    assert any((gate != 1).any() for gate in seen["gates"].values())
    step(model, gates, optimizer, 3)


def test_8_bit_states_are_cut_to_within_their_quantisation() -> None:
    """Above 4,096 elements bitsandbytes keeps codes: what stays differs by at most their spacing, 1.6 % of a block's
    largest number and less near 0."""
    from qdora.train.flat_group import widened_state

    key = "layer.lora_A"
    parameter = nn.Parameter(torch.randn(12, 1000, generator=torch.Generator().manual_seed(0)))
    optimizer = AdapterOptimizer({key: parameter}, name="paged_adamw_8bit")
    for seed in range(3):
        parameter.grad = torch.randn(12, 1000, generator=torch.Generator().manual_seed(seed))
        optimizer.step(1e-3)
    before = widened_state(optimizer.state(key), torch.device("cpu"))
    assert optimizer.state(key)["state1"].dtype == torch.uint8
    kept = torch.tensor([0, 3, 4, 7, 11])
    parameter.data = parameter.data[kept]
    optimizer.cut_({key: (kept, 0)})
    after = widened_state(optimizer.state(key), torch.device("cpu"))
    assert optimizer.state(key)["step"] == 3
    assert after.keys() == {"state1", "state2"}
    for name in ("state1", "state2"):
        wanted = before[name][kept]
        assert after[name].shape == (5, 1000)
        assert float((after[name] - wanted).abs().max()) <= 0.02 * float(wanted.abs().max())
    fresh = AdapterOptimizer({key: nn.Parameter(parameter.detach().clone())}, name="paged_adamw_8bit")
    fresh.load_state_tensors(optimizer.state_tensors())  # as a resumed run does
    kept = torch.tensor([1, 2])  # below 4,096 elements: 32 bits, from 8
    parameter.data = parameter.data[kept]
    optimizer.cut_({key: (kept, 0)})
    small = widened_state(optimizer.state(key), torch.device("cpu"))
    assert optimizer.state(key)["state1"].dtype == torch.float32
    assert torch.equal(small["state1"], after["state1"][kept])


def test_a_removal_frees_parameters_states_and_gradients() -> None:
    model, gates, optimizer = pieces(mean_rank=2)

    def num_bytes() -> int:
        held = [*optimizer.parameters.values(), *optimizer.state_tensors().values(), *gates.parameters]
        return sum({id(each): each.nbytes() for each in (tensor.untyped_storage() for tensor in held)}.values())

    for number in range(2):
        step(model, gates, optimizer, number)
    before = num_bytes()
    step(model, gates, optimizer, 2)
    removed = {layer.in_features + layer.out_features: 0 for layer in gates.layers.values()}
    for layer in gates.layers.values():
        removed[layer.in_features + layer.out_features] += 8 - layer.rank
    assert sum(removed.values()) == 6 * NUM_LAYERS
    # float32: a factor's entries and their two averages; and all gates
    factors = sum(4 * count * 3 * size for size, count in removed.items())
    assert before - num_bytes() == factors + 4 * 8 * NUM_LAYERS
    backward(model)
    for key, parameter in optimizer.parameters.items():
        assert parameter.grad is not None
        assert parameter.grad.shape == parameter.shape, key


@pytest.mark.parametrize("mode", ["l1", "hard_concrete"])
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


def test_a_gate_that_the_loss_does_not_need_goes_first() -> None:
    """A component whose B is 0 throughout has no gradient: L1 removes it, and no other with this budget."""
    model, gates, optimizer = pieces(mode="l1", mean_rank=7, warmup=2, anneal=6, lr=0.05)
    layers = adapted_layers(model)
    for number in range(8):
        with torch.no_grad():
            for layer in layers.values():
                if layer.rank == 8:
                    layer.lora_B[:, 3] = 0.0
        step(model, gates, optimizer, number)
    for path, died in gates.died.items():
        assert [component for component, after in enumerate(died) if after is not None] == [3], path


@pytest.mark.parametrize("mode", ["l1", "hard_concrete"])
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


@settings(deadline=None)
@given(st.floats(0, 1, exclude_max=True), st.floats(0, 1, exclude_min=True), st.integers(1, 5000))
def test_shares_that_fit_into_a_run_fit_in_steps(warmup: float, share: float, num_steps: int) -> None:
    """Also where both are rounded up, as halves of 1,003 steps are."""
    for first, second in ((warmup, share * (1 - warmup)), (0.5, 0.5)):
        if 0 < second < 1 and first + second <= 1:
            asked = GateConfig(mean_rank=2, warmup=first, anneal=second)
            assert asked.length_fault(num_steps) is None
            steps = asked.phases(num_steps)
            assert steps[1] >= 1
            for phase, exact in zip(steps, (first * num_steps, second * num_steps), strict=True):
                assert abs(phase - exact) <= 1.5


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


PLANTED = [1, 2, 3, 6]


def planted_run(mode: str, seed: int) -> tuple[list[int], float]:
    """Four layers learn updates of these ranks from rank 8 each, with a budget of as many components: ranks, loss."""
    generator = torch.Generator().manual_seed(seed)
    layers, targets = {}, {}
    for number, rank in enumerate(PLANTED):
        weight = torch.randn(24, 32, generator=generator) * 0.2
        update = torch.randn(24, rank, generator=generator) @ torch.randn(rank, 32, generator=generator) * 0.08
        name = str(number)
        options: dict[str, Any] = {"rank": 8, "alpha": 8.0, "dtype": torch.float32, "generator": generator}
        layers[name], targets[name] = AdaptedLinear(FrozenLinear(weight), kind="lora", **options), weight + update
    settings = GateConfig(mode=mode, mean_rank=sum(PLANTED) / 4, warmup=0.3, anneal=0.5)
    gates = Gates(layers, settings, num_steps=300, seed=seed)
    optimizer = AdapterOptimizer(adapter_parameters(nn.ModuleDict(layers)))
    for number in range(300):
        gates.begin(number)
        x = torch.randn(64, 32, generator=generator)
        losses = [(layer(x) - x @ targets[name].T).square().mean() for name, layer in layers.items()]
        total = float(sum(each.item() for each in losses))
        for each in losses:
            each.backward()
        del losses, each
        optimizer.step(1e-2)
        optimizer.zero_grad()
        gates.end(number, True, optimizer, Processes())
    return [layer.rank for layer in layers.values()], total


@pytest.mark.parametrize("seed", [0, 1])
def test_l1_finds_planted_ranks_exactly(seed: int) -> None:
    ranks, loss = planted_run("l1", seed)
    assert ranks == PLANTED
    assert loss < 1e-4


def test_hard_concrete_comes_nearer_to_planted_ranks_than_one_rank_everywhere() -> None:
    found = [planted_run("hard_concrete", seed)[0] for seed in (0, 1)]
    away = [sum(abs(rank - wanted) for rank, wanted in zip(ranks, PLANTED, strict=True)) for ranks in found]
    assert max(away) < sum(abs(3 - wanted) for wanted in PLANTED)
