"""AdamW and Lion on bf16 storage: no update is lost, the papers' arithmetic; states that resume, page and shrink."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, get_args

import bitsandbytes as bnb
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from qdora.adapter.algebra import nearest_bfloat16
from qdora.recipe.settings import OptimizerName
from qdora.train import optimizer as flat_group
from qdora.train.optimizer import AdapterOptimizer, join_float32, split_float32_, widened_state
from tests import reference, support

NAMES = get_args(OptimizerName)
PAGED = [name for name in NAMES if name.startswith("paged")]
FINITE = st.floats(-(2.0**127), 2.0**127, width=32, allow_nan=False)
each_name = pytest.mark.parametrize("name", NAMES)
each_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
each_paged = pytest.mark.parametrize("name", PAGED)


@settings(deadline=None, max_examples=200)
@given(hnp.arrays(np.float32, hnp.array_shapes(min_dims=0, max_dims=2, max_side=5), elements=FINITE))
def test_split_and_join_is_exact_and_the_high_half_is_the_nearest_bf16(values: np.ndarray) -> None:
    """Bit for bit, also of -0.0 and of denormals."""
    master = torch.from_numpy(np.array(values))
    high, low = torch.empty(master.shape, dtype=torch.bfloat16), torch.empty(master.shape, dtype=torch.int16)
    split_float32_(master.clone(), high, low)
    assert torch.equal(join_float32(high, low).view(torch.int32), master.view(torch.int32))
    assert torch.equal(high, nearest_bfloat16(master))
    # Nearest: the error is at most half the distance of neighbouring bf16 numbers, a power of two per binade.
    for value, rounded in zip(master.flatten().tolist(), high.double().flatten().tolist(), strict=True):
        exponent = max(math.frexp(value)[1] - 1, -126) if value else -126
        assert abs(rounded - value) <= 2.0 ** (exponent - 7) / 2 or math.isinf(rounded)


def parameters(
    dtype: torch.dtype = torch.bfloat16, *, columns: int = 1500, device: str = "cpu"
) -> dict[str, nn.Parameter]:
    """Two matrices that get 8-bit states, one too small for them, and a magnitude that is long enough for them."""
    generator = torch.Generator().manual_seed(0)
    values = {
        "up.lora_A": (torch.randn(4, columns, generator=generator) * 0.02).to(dtype),
        "up.lora_B": (torch.randn(1500, 4, generator=generator) * 0.02).to(dtype),
        "up.magnitude": torch.rand(5008, generator=generator) + 0.5,
        "down.lora_B": (torch.randn(3, 4, generator=generator) * 0.02).to(dtype),
    }
    return {key: nn.Parameter(value.to(device)) for key, value in values.items()}


def train(
    optimizer: AdapterOptimizer, *, steps: int, lr: float = 1e-3, first: int = 0, without: Sequence[str] = ()
) -> dict[str, list[np.ndarray]]:
    """Steps `first` to `first + steps` of random gradients, the same for the same step; returns them."""
    used: dict[str, list[np.ndarray]] = {key: [] for key in optimizer.parameters}
    for step in range(first, first + steps):
        for seed, (key, p) in enumerate(optimizer.parameters.items()):
            if key not in without:
                rng = np.random.default_rng(1000 * step + seed)
                used[key].append(rng.normal(size=tuple(p.shape)).astype(np.float32))
                p.grad = torch.from_numpy(used[key][-1]).to(p.device)
        optimizer.step(lr)
        optimizer.zero_grad()
    return used


def expected(name: str, start: Tensor, grads: list[np.ndarray], **settings: Any) -> np.ndarray:
    rule = reference.lion if "lion" in name else reference.adamw
    return rule(start.detach().double().numpy(), [g.astype(np.float64) for g in grads], **settings)


@each_name
def test_follows_the_paper_in_float64_whatever_the_storage(name: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a rate for each kind of parameter. Masters of bf16 storage are those of float32 storage, bit for bit; those
    of parameters that are updated one by one are those of parameters updated together."""
    short, long, other = parameters(), parameters(torch.float32), parameters()
    with torch.no_grad():
        for key in short:
            long[key].copy_(short[key].float())
    start = {key: p.detach().clone() for key, p in short.items()}
    ratios = {"magnitude": 0.5}
    settings: dict[str, Any] = {"name": name, "weight_decay": 0.1, "lr_ratios": ratios}
    together, wide = (AdapterOptimizer(p, **settings) for p in (short, long))
    monkeypatch.setattr(flat_group, "_GROUP_ELEMENTS", 6000)
    alone = AdapterOptimizer(other, **settings)
    small = [["down.lora_B"]] if "8bit" in name else []
    matrices = ["up.lora_A", "up.lora_B", *([] if small else ["down.lora_B"])]
    assert sorted(list(group.parameters) for group in together._groups) == sorted([matrices, *small, ["up.magnitude"]])
    assert [list(group.parameters) for group in alone._groups] == [[key] for key in alone.parameters]
    for optimizer in (together, wide, alone):
        grads = train(optimizer, steps=60, lr=5e-5)
    for key, p in short.items():
        master = support.master(together, key)
        assert torch.equal(master, support.master(wide, key))
        assert torch.equal(master, support.master(alone, key))
        assert torch.equal(long[key].detach(), master)
        assert torch.equal(p.detach(), master if key == "up.magnitude" else nearest_bfloat16(master))
        rate = 5e-5 * ratios.get(key.rpartition(".")[2], 1.0)
        wanted = expected(name, start[key], grads[key], lr=rate, decay=0.0 if key == "up.magnitude" else 0.1)
        error = np.abs(master.double().numpy() - wanted).max()
        if "8bit" in name and key in ("up.lora_A", "up.lora_B"):
            assert error > 1e-6  # the states are rounded, see the next test
        else:
            assert error < 4e-6, key
    before = {key: (p._version, p.detach().clone()) for key, p in short.items()}
    train(together, first=60, steps=1, without=["up.lora_A"])
    for key, p in short.items():  # a row norm is kept until the version changes
        version, value = before[key]
        assert (p._version > version) == (key != "up.lora_A")
        assert torch.equal(p, value) == (key == "up.lora_A")


# Mean error of the way after 20 steps plus 5 standard deviations over 20 seeds: 4 x 1500 normal numbers, blocks of 256.
@pytest.mark.parametrize("name, bound", [("paged_adamw_8bit", 0.0172), ("paged_lion_8bit", 0.0654)])
def test_8_bit_states_follow_the_paper_as_far_as_their_rounding_allows(name: Any, bound: float) -> None:
    for seed in range(3):
        start = torch.randn(4, 1500, generator=torch.Generator().manual_seed(seed)) * 0.02
        p = nn.Parameter(start.clone())
        optimizer = AdapterOptimizer({"lora_A": p}, name=name, weight_decay=0.1)
        grads = train(optimizer, steps=1, first=100 * seed)["lora_A"]
        wanted = expected(name, start, grads, lr=1e-3, decay=0.1)
        np.testing.assert_allclose(p.detach().double().numpy(), wanted, atol=1e-7)  # nothing has been rounded yet
        grads += train(optimizer, steps=19, first=100 * seed + 1)["lora_A"]
        way = expected(name, start, grads, lr=1e-3, decay=0.1) - start.double().numpy()
        assert reference.relative_error((p.detach() - start).double().numpy(), way) < bound


@each_name
def test_what_decays_and_what_has_coarse_states(name: Any) -> None:
    """Matrices decay, but for embeddings; vectors do not. Of those only matrices have 8-bit states, if large enough."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"embed.rows": (8, 1024), "head.weight": (64, 128), "up.lora_A": (64, 64), "down.lora_A": (63, 65)}
    shapes |= {"experts.magnitude": (8, 1024), "q_proj.bias": (5000,), "norm.weight": (5000,)}
    params = {key: nn.Parameter(torch.randn(shape, generator=generator)) for key, shape in shapes.items()}
    start = {key: p.detach().clone() for key, p in params.items()}
    optimizer = AdapterOptimizer(params, name=name, weight_decay=0.5, undecayed=["embed.rows", "head.weight"])
    before = {key: (state.shape, state.dtype) for key, state in optimizer.state_tensors().items()}
    for p in params.values():
        p.grad = torch.zeros_like(p)
    optimizer.step(1e-2)
    for key, value in start.items():
        shrunk = 0.995 if key in ("up.lora_A", "down.lora_A") else 1.0
        torch.testing.assert_close(params[key].detach(), value * shrunk, rtol=1e-6, atol=0)
    states = optimizer.state_tensors()
    # All are made at the start, where a lack of memory is told, and not by a step
    assert {key: (state.shape, state.dtype) for key, state in states.items()} == before
    assert {key.split("/")[1] for key in before} == shapes.keys()
    coarse = {key.split("/")[1] for key, (_, dtype) in before.items() if dtype == torch.uint8}
    assert coarse == ({"head.weight", "up.lora_A"} if "8bit" in name else set())  # 64 x 64 = 4,096; 63 x 65 is less


def test_gradients_accumulate_in_float32_and_are_measured_and_scaled_together() -> None:
    params = parameters()
    optimizer = AdapterOptimizer(params, name="adamw")
    assert float(optimizer.gradient_norm()) == 0.0
    optimizer.scale_gradients_(0.5)  # of none
    for _ in range(300):
        sum((p.float() * 0.01).sum() for p in params.values()).backward()  # type: ignore[union-attr]
    for p in params.values():
        assert p.grad is not None
        assert p.grad.dtype == torch.float32
        # bf16 accumulation stalls at 2.56 when 0.01 falls below half a unit in the last place.
        np.testing.assert_allclose(p.grad.numpy(), 3.0, rtol=4e-3)
        p.grad.fill_(2.0)
    count = sum(p.numel() for p in params.values())
    for size in (2, 1):
        assert float(optimizer.gradient_norm()) == pytest.approx(size * math.sqrt(count), rel=1e-6)
        optimizer.scale_gradients_(0.5)


def saved(optimizer: AdapterOptimizer) -> dict[str, Tensor]:
    """What a checkpoint holds: copies, on the CPU."""
    return {key: tensor.cpu().clone() for key, tensor in optimizer.state_tensors().items()}


def resumed(first: AdapterOptimizer, name: Any) -> AdapterOptimizer:
    """Another optimizer on copies of the parameters, with the state of the first."""
    second = AdapterOptimizer({key: nn.Parameter(p.detach().clone()) for key, p in first.parameters.items()}, name=name)
    second.load_state_tensors(saved(first))
    return second


def assert_same(one: AdapterOptimizer, two: AdapterOptimizer) -> None:
    for key in one.parameters:
        assert torch.equal(support.master(one, key), support.master(two, key)), key
    states = saved(one), saved(two)
    assert states[0].keys() == states[1].keys()
    for key in states[0]:
        assert torch.equal(states[0][key], states[1][key]), key


@each_name
@each_dtype
@pytest.mark.parametrize("unreached", [[], ["up.lora_A"], [*parameters()]], ids=["none", "one", "all"])
def test_a_state_survives_a_resume(name: Any, dtype: torch.dtype, unreached: list[str]) -> None:
    """An expert that no token has reached yet, an unused branch; the last case was saved before its first step."""
    whole, first = (AdapterOptimizer(parameters(dtype), name=name) for _ in range(2))
    train(whole, steps=3, without=unreached)
    train(first, steps=2, without=unreached)
    second = resumed(first, name)
    assert_same(first, second)
    train(second, first=2, steps=1, without=unreached)
    for optimizer in (whole, second):
        train(optimizer, first=3, steps=2)
    assert_same(whole, second)
    if "up.lora_A" in unreached:  # steps without a gradient are not counted as Adam's
        alone = AdapterOptimizer({"up.lora_A": parameters(dtype)["up.lora_A"]}, name=name)
        train(alone, first=3, steps=2)
        assert torch.equal(support.master(second, "up.lora_A"), support.master(alone, "up.lora_A"))


def state_of(optimizer: AdapterOptimizer, key: str) -> dict[str, Any]:
    return optimizer._group_of(key).state_of(key)


def is_page(state: Any) -> bool:
    return getattr(state, "is_paged", False)


@pytest.fixture
def pages(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """bitsandbytes as on CUDA, in ordinary memory: pages that it made and never frees, and states that moved."""
    seen: dict[str, list[Any]] = {"made": [], "moved": []}

    def get_paged(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        with _disable_current_modes():
            page: Any = torch.full(shape, 171, dtype=dtype)
        page.is_paged, page.page_deviceid = True, 0
        seen["made"].append(page)
        return page

    def prefetch_tensor(tensor: Any, to_cpu: bool = False) -> None:
        assert tensor.is_paged
        seen["moved"].append(tensor.data_ptr())

    monkeypatch.setattr(flat_group, "can_page", lambda parameter: True)
    monkeypatch.setattr(flat_group, "_FREE_PAGES", [])
    monkeypatch.setattr(bnb.functional, "get_paged", get_paged)
    monkeypatch.setattr(bnb.functional, "prefetch_tensor", prefetch_tensor)
    return seen


@each_paged
def test_states_stay_paged(name: Any, pages: dict[str, list[Any]], caplog: pytest.LogCaptureFixture) -> None:
    """The smaller matrix, too, which bitsandbytes would not page by itself: they lie in one page."""
    num_moments = 1 if "lion" in name else 2
    first = AdapterOptimizer(parameters(columns=30_000), name=name)
    train(first, steps=2)
    assert len(pages["made"]) == num_moments
    pages["made"].clear()
    second = resumed(first, name)
    for key in ("up.lora_A", "up.lora_B"):
        states = [value for moment, value in state_of(second, key).items() if moment in flat_group.MOMENTS]
        assert len(states) == num_moments
        assert all(is_page(value) and value.count_nonzero() > 0 for value in states)
        if key == "up.lora_A":
            assert [value.data_ptr() for value in states] == [page.data_ptr() for page in pages["made"]]
    assert not any(map(is_page, state_of(second, "up.magnitude").values()))
    assert_same(first, second)
    pages["moved"].clear()
    train(second, first=2, steps=1)
    train(first, first=2, steps=1)
    assert_same(first, second)
    assert pages["moved"][:num_moments] == [page.data_ptr() for page in pages["made"]]
    second.load_state_tensors(saved(first))  # into the same pages
    assert len(pages["made"]) == num_moments
    assert not caplog.records  # nothing to warn of


@pytest.mark.parametrize("is_held", [True, False])
def test_a_page_is_free_when_nothing_lies_in_it_and_the_gpu_is_done(
    is_held: bool, pages: dict[str, list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append(int(pages["made"][0][0])))
    first = AdapterOptimizer(parameters(columns=30_000), name="paged_lion_8bit")
    held = first.state_tensors()["state/up.lora_A/state1"].view(-1)[7:9] if is_held else None
    pages["made"][0].fill_(3)
    waits.clear()
    del first
    second = AdapterOptimizer(parameters(columns=30_000), name="paged_lion_8bit")
    assert len(pages["made"]) == (2 if is_held else 1)
    assert waits == ([] if is_held else [3])  # before the page is written
    assert held is None or held.tolist() == [3, 3]
    assert not widened_state(state_of(second, "up.lora_A"), torch.device("cpu"))["state1"].any()  # whatever was in it


@each_paged
def test_a_parameter_that_shrinks_takes_turns_in_two_pages(name: Any, pages: dict[str, list[Any]]) -> None:
    """8-bit codes are made again: what stays differs by at most their spacing, 1.6 % of a block's largest number."""
    key = "up.lora_A"
    optimizer = AdapterOptimizer({key: parameters(columns=40_000)[key]}, name=name)
    train(optimizer, steps=2)
    num_moments = len(pages["made"])
    # Twice above the least size of a page, then below it, and below that of 8-bit states
    removals = [(list(range(39_999)), 1), ([0, 3, 2], 0), ([0, 2], 0), ([5, 9, 1000], 1)]
    for number, (kept, dim) in enumerate(removals):
        before = widened_state(state_of(optimizer, key), torch.device("cpu"))
        low = support.master(optimizer, key).index_select(dim, torch.tensor(kept))
        parameter = optimizer.parameters[key]
        parameter.grad = None
        parameter.data = parameter.data.index_select(dim, torch.tensor(kept))
        optimizer.cut_({key: (torch.tensor(kept), dim)})
        state = state_of(optimizer, key)
        after = widened_state(state, torch.device("cpu"))
        assert torch.equal(support.master(optimizer, key), low)
        for moment in after:
            assert is_page(state[moment]) == (number < 2)
            assert (state[moment].dtype == torch.uint8) == ("8bit" in name and number < 3)
            wanted = before[moment].index_select(dim, torch.tensor(kept))
            close = 0.02 * float(wanted.abs().max()) if "8bit" in name else 0.0
            torch.testing.assert_close(after[moment], wanted, rtol=0, atol=close)
        assert state["step"] == 2 + number
        assert len(pages["made"]) == 2 * num_moments
        train(optimizer, first=2 + number, steps=1)
    assert_same(optimizer, resumed(optimizer, name))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@each_name
def test_on_cuda_states_stay_paged_over_a_resume(name: Any) -> None:
    whole, first = (AdapterOptimizer(parameters(columns=30_000, device="cuda"), name=name) for _ in range(2))
    train(whole, steps=4)
    train(first, steps=2)
    second = resumed(first, name)
    for optimizer in (first, second):
        assert is_page(state_of(optimizer, "up.lora_A").get("state1")) == (name in PAGED)
    train(second, first=2, steps=2)
    assert_same(whole, second)
