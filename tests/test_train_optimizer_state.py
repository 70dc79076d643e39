"""States of the optimizers: they survive a resume bit for bit, stay paged, and what does not fit is refused."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, get_args

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.optim.optimizer import Optimizer8bit
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

from qdora.errors import RunFailure
from qdora.ops.planned_device import planned_on
from qdora.plan.live_bytes import LiveBytes
from qdora.train import flat_group
from qdora.train import optimizer as optimizer_module
from qdora.train.flat_group import OptimizerName, widened_state
from qdora.train.optimizer import AdapterOptimizer

NAMES = get_args(OptimizerName)
PAGED = [name for name in NAMES if name.startswith("paged")]


def parameters(dtype: torch.dtype = torch.bfloat16, *, columns: int = 1500, device: str = "cpu") -> dict[str, Any]:
    """Matrices with 8-bit states and one too small for them, and a magnitude long enough for them."""
    generator = torch.Generator().manual_seed(0)
    values = {
        "up.lora_A": torch.randn(4, columns, generator=generator).to(dtype),
        "up.lora_B": torch.randn(3, 4, generator=generator).to(dtype),
        "up.magnitude": torch.rand(5000, generator=generator) + 0.5,
    }
    return {key: nn.Parameter(value.to(device)) for key, value in values.items()}


def train(optimizer: AdapterOptimizer, *, first: int, steps: int, without: Sequence[str] = ()) -> None:
    for step in range(first, first + steps):
        for seed, (key, p) in enumerate(optimizer.parameters.items()):
            if key in without:
                continue
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + seed)).to(p.device)
        optimizer.step(1e-3)
        optimizer.zero_grad()


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
        assert torch.equal(one.master(key), two.master(key)), key
    states = saved(one), saved(two)
    assert states[0].keys() == states[1].keys()
    for key in states[0]:
        assert torch.equal(states[0][key], states[1][key]), key


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_state_survives_a_round_trip_bit_for_bit(name: Any, dtype: torch.dtype) -> None:
    whole, first = (AdapterOptimizer(parameters(dtype), name=name) for _ in range(2))
    train(whole, first=0, steps=6)
    train(first, first=0, steps=3)
    second = resumed(first, name)
    assert_same(first, second)
    train(second, first=3, steps=3)
    assert_same(whole, second)


@pytest.mark.parametrize("name", NAMES)
def test_only_matrices_have_8_bit_states(name: Any) -> None:
    optimizer = AdapterOptimizer(parameters(), name=name)
    train(optimizer, first=0, steps=1)
    states = {key: tensor.dtype for key, tensor in saved(optimizer).items() if tensor.numel() > 1}
    small = {key for key, dtype in states.items() if dtype == torch.uint8}
    moments = {"paged_adamw_8bit": ["state1", "state2"], "paged_lion_8bit": ["state1"]}.get(name, [])
    assert small == {f"state/up.lora_A/{moment}" for moment in moments}
    assert any(key.startswith("state/up.magnitude/") for key in states)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("unreached", [["up.lora_A"], ["up.lora_B"], ["up.magnitude"], [*parameters()]], ids=str)
def test_a_parameter_may_get_its_first_gradient_after_a_resume(
    name: Any, dtype: torch.dtype, unreached: list[str]
) -> None:
    """An expert that no token has reached yet, an unused branch; the last case was saved before its first step."""
    whole, first = (AdapterOptimizer(parameters(dtype), name=name) for _ in range(2))
    train(whole, first=0, steps=3, without=unreached)
    train(first, first=0, steps=2, without=unreached)
    second = resumed(first, name)
    assert_same(first, second)
    train(second, first=2, steps=1, without=unreached)
    for optimizer in (whole, second):
        train(optimizer, first=3, steps=2)
    assert_same(whole, second)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_state_that_waited_for_its_gradient_is_that_of_an_optimizer_that_began_then(
    name: Any, dtype: torch.dtype
) -> None:
    """Steps without a gradient, before it and after a resume, are not counted as Adam's."""
    key = "up.lora_A"
    waiting = AdapterOptimizer(parameters(dtype), name=name)
    train(waiting, first=0, steps=3, without=[key])
    waiting = resumed(waiting, name)
    alone = AdapterOptimizer({key: parameters(dtype)[key]}, name=name)
    for optimizer in (waiting, alone):
        train(optimizer, first=3, steps=3)
    assert torch.equal(waiting.master(key), alone.master(key))


@pytest.mark.parametrize("name", NAMES)
def test_all_states_exist_before_the_first_step(name: Any) -> None:
    """Memory that does not suffice for them fails at the start, not in step 1."""
    optimizer = AdapterOptimizer(parameters(), name=name)
    before = {key: (t.shape, t.dtype) for key, t in optimizer.state_tensors().items()}
    assert {key.split("/")[1] for key in before if key.startswith("state/")} == parameters().keys()
    train(optimizer, first=0, steps=1)
    assert {key: (t.shape, t.dtype) for key, t in optimizer.state_tensors().items()} == before


def test_out_of_memory_for_the_states_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_args: Any, **_options: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore.")

    monkeypatch.setattr(Optimizer8bit, "get_state_buffer", fail)
    text = r"^out of memory while making the states of lion for 11,012 parameters \(CUDA .* 2.00 GiB.\). Fix: .*rank"
    with pytest.raises(RunFailure, match=text):
        AdapterOptimizer(parameters(), name="lion")


# --- paged states


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
    monkeypatch.setattr(optimizer_module, "can_page", lambda parameter: True)
    monkeypatch.setattr(flat_group, "_FREE_PAGES", [])
    monkeypatch.setattr(bnb.functional, "get_paged", get_paged)
    monkeypatch.setattr(bnb.functional, "prefetch_tensor", prefetch_tensor)
    return seen


@pytest.mark.parametrize("name", PAGED)
def test_states_stay_paged_over_a_resume(
    name: Any, pages: dict[str, list[Any]], caplog: pytest.LogCaptureFixture
) -> None:
    num_moments = 1 if "lion" in name else 2
    first = AdapterOptimizer(parameters(columns=30_000), name=name)
    train(first, first=0, steps=2)
    assert len(pages["made"]) == num_moments
    pages["made"].clear()
    second = resumed(first, name)
    large = {key: t for key, t in second.state("up.lora_A").items() if key.startswith("state")}
    assert len(large) == num_moments
    for tensor, page in zip(large.values(), pages["made"], strict=True):
        assert getattr(tensor, "is_paged", False)
        assert tensor.data_ptr() == page.data_ptr()
        assert tensor.count_nonzero() > 0
    assert_same(first, second)
    pages["moved"].clear()
    train(second, first=2, steps=1)
    train(first, first=2, steps=1)
    assert_same(first, second)
    assert pages["moved"][:num_moments] == [page.data_ptr() for page in pages["made"]]
    # A second load goes into the same pages
    second.load_state_tensors(saved(first))
    assert len(pages["made"]) == num_moments
    assert not caplog.records  # nothing to warn of


class Run:
    """An optimizer in a cycle, as in a run: only the garbage collector finds it."""

    def __init__(self, name: Any, columns: int) -> None:
        self.me = self
        self.optimizer = AdapterOptimizer(parameters(columns=columns), name=name)
        train(self.optimizer, first=0, steps=1)


@pytest.mark.parametrize("name", PAGED)
def test_pages_of_twenty_runs_are_those_of_one(name: Any, pages: dict[str, list[Any]]) -> None:
    """A smaller run in between takes none either. Every state begins at zero, whatever was in its page."""
    masters, held = [], set[int]()
    for columns in [*(20 * [30_000]), 27_000, 30_000]:
        run = Run(name, columns)
        masters.append(run.optimizer.master("up.lora_A"))
        held.add(sum(page.nbytes for page in pages["made"]))
        del run
    assert len(held) == 1
    assert held.pop() > 0
    assert all(torch.equal(masters[0], other) for other in masters if other.shape == masters[0].shape)


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
    del second


@pytest.mark.parametrize("name", PAGED)
def test_small_parameters_are_paged_together(name: Any, pages: dict[str, list[Any]]) -> None:
    """bitsandbytes pages tensors of 100,000 elements or more, which no factor of a small model is."""
    shapes = {f"{layer}.{part}": (8, 5000) for layer in range(4) for part in ("lora_A", "lora_B")}
    optimizer = AdapterOptimizer({key: nn.Parameter(torch.ones(shape)) for key, shape in shapes.items()}, name=name)
    states = [state for key in shapes for state in optimizer.state(key).items()]
    assert all(getattr(value, "is_paged", False) for moment, value in states if moment in flat_group.MOMENTS)
    assert len(pages["made"]) == (1 if "lion" in name else 2)
    train(optimizer, first=0, steps=1)
    assert len(pages["moved"]) == len(pages["made"])


@pytest.mark.parametrize("name", ["adamw", "paged_adamw_8bit"])
def test_shrinking_takes_the_memory_of_one_group_at_a_time(name: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it could take more than a step: float32 copies of all averages beside the old and the new states."""
    monkeypatch.setattr(flat_group, "_GROUP_ELEMENTS", 1 << 16)
    taken = []
    for num_layers in (2, 8):
        keys = [f"{layer}.lora_A" for layer in range(num_layers)]
        optimizer = AdapterOptimizer({key: nn.Parameter(torch.ones(16, 4096)) for key in keys}, name=name)
        train(optimizer, first=0, steps=1)
        kept = torch.arange(15)
        for parameter in optimizer.parameters.values():
            parameter.grad = None
            parameter.data = parameter.data.index_select(0, kept)
        with LiveBytes() as live:
            optimizer.cut_(dict.fromkeys(keys, (kept, 0)))
        kept_bytes = sum(each.nbytes for each in optimizer.state_tensors().values())
        taken.append(live.peak_bytes - kept_bytes)
    assert taken[1] <= taken[0] + 2**12, taken


@pytest.mark.parametrize("name", PAGED)
def test_a_parameter_that_shrinks_takes_turns_in_two_pages(name: Any, pages: dict[str, list[Any]]) -> None:
    key = "up.lora_A"
    optimizer = AdapterOptimizer({key: parameters(columns=40_000)[key]}, name=name)
    train(optimizer, first=0, steps=2)
    num_moments = len(pages["made"])
    # Twice above the least size of a page, then below it, and below that of 8-bit states
    removals = [(list(range(39_999)), 1), ([0, 3, 2], 0), ([0, 2], 0), ([5, 9, 1000], 1)]
    for number, (kept, dim) in enumerate(removals):
        before = widened_state(optimizer.state(key), torch.device("cpu"))
        low = optimizer.master(key).index_select(dim, torch.tensor(kept))
        parameter = optimizer.parameters[key]
        parameter.grad = None
        parameter.data = parameter.data.index_select(dim, torch.tensor(kept))
        optimizer.cut_({key: (torch.tensor(kept), dim)})
        state = optimizer.state(key)
        after = widened_state(state, torch.device("cpu"))
        assert torch.equal(optimizer.master(key), low)
        for moment in after:
            assert getattr(state[moment], "is_paged", False) == (number < 2)
            assert (state[moment].dtype == torch.uint8) == ("8bit" in name and number < 3)
            wanted = before[moment].index_select(dim, torch.tensor(kept))
            close = 0.02 * float(wanted.abs().max()) if "8bit" in name else 0.0
            torch.testing.assert_close(after[moment], wanted, rtol=0, atol=close)
        assert state["step"] == 2 + number
        assert len(pages["made"]) == 2 * num_moments
        train(optimizer, first=2 + number, steps=1)
    assert_same(optimizer, resumed(optimizer, name))


@pytest.mark.parametrize("name", PAGED)
def test_pages_do_not_meet_tensors_of_the_gpu(
    name: Any, pages: dict[str, list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pages are tensors of the CPU. Fake tensors refuse to mix devices, and "meta" stands for the GPU."""
    dequantize, seen = flat_group.F.dequantize_blockwise, []

    def on_one_device(codes: Tensor, absmax: Tensor, **more: Any) -> Tensor:
        seen.append({codes.device.type, absmax.device.type})
        found: Tensor = dequantize(codes, absmax=absmax, **more)
        return found

    monkeypatch.setattr(flat_group.F, "dequantize_blockwise", on_one_device)
    key = "up.lora_B"
    with planned_on("cuda"), FakeTensorMode(allow_non_fake_inputs=True):
        parameter = nn.Parameter(torch.empty(30_000, 8, dtype=torch.bfloat16, device="meta"))
        optimizer = AdapterOptimizer({key: parameter}, name=name)
        assert {page.device.type for page in pages["made"]} == {"cpu"}
        parameter.data = torch.empty(30_000, 5, dtype=torch.bfloat16, device="meta")
        optimizer.cut_({key: (torch.arange(5, device="meta"), 1)})
        assert optimizer.state(key)["state1"].device.type == "cpu"
        optimizer.fold_(key, torch.empty(5, device="meta"))
    assert seen == [{"meta"}] * ((2 if "lion" in name else 4) if "8bit" in name else 0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", PAGED)
def test_shrinking_on_cuda_is_that_on_the_cpu(name: Any) -> None:
    key, kept = "up.lora_A", torch.tensor([0, 2, 3])
    found = []
    for device in ("cpu", "cuda"):
        optimizer = AdapterOptimizer({key: parameters(torch.float32, columns=50_000, device=device)[key]}, name=name)
        train(optimizer, first=0, steps=2)
        parameter = optimizer.parameters[key]
        parameter.data = parameter.data.index_select(0, kept.to(device))
        optimizer.cut_({key: (kept.to(device), 0)})
        optimizer.fold_(key, torch.full((50_000,), 0.5, device=device))
        train(optimizer, first=2, steps=2)
        assert getattr(optimizer.state(key)["state1"], "is_paged", False) == (device == "cuda")
        found.append(optimizer.master(key).cpu())
    # 8-bit codes may differ by one where the devices round otherwise; a step is at most about the rate of 1e-3
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-3 if "8bit" in name else 1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", NAMES)
def test_states_stay_paged_over_a_resume_on_cuda(name: Any) -> None:
    whole, first = (AdapterOptimizer(parameters(columns=30_000, device="cuda"), name=name) for _ in range(2))
    train(whole, first=0, steps=4)
    train(first, first=0, steps=2)
    second = resumed(first, name)
    for optimizer in (first, second):
        state = optimizer.state("up.lora_A")
        assert getattr(state.get("state1"), "is_paged", False) == (name in PAGED)
    versions = {key: p._version for key, p in second.parameters.items()}
    train(second, first=2, steps=2)
    assert_same(whole, second)
    assert all(p._version > versions[key] for key, p in second.parameters.items())


def test_without_cuda_a_paged_optimizer_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    for name in NAMES:
        caplog.clear()
        AdapterOptimizer(parameters(), name=name)
        assert all(record.levelno == logging.INFO for record in caplog.records)
        lines = [record.getMessage() for record in caplog.records]
        wanted = f"{name}: no CUDA here, so its states are not paged; the arithmetic is the same."
        assert lines == ([wanted] if name in PAGED else [])


# --- what does not fit


def test_state_of_other_parameters_is_refused() -> None:
    optimizer = AdapterOptimizer(parameters())
    with pytest.raises(ValueError, match=r"residual/up.lora_A is missing; .*state/\S+ is missing"):
        optimizer.load_state_tensors({"state/z/step": torch.zeros(())})
    train(optimizer, first=0, steps=1)
    with pytest.raises(ValueError, match=r"parameters: state/z/step is unknown$"):
        optimizer.load_state_tensors(saved(optimizer) | {"state/z/step": torch.zeros(())})
    with pytest.raises(ValueError, match="float16"):
        AdapterOptimizer({"x": nn.Parameter(torch.zeros(2, 2, dtype=torch.float16))})


@pytest.mark.parametrize("name, moment", [("adamw", "exp_avg"), ("paged_adamw_8bit", "state1"), ("lion", "state1")])
def test_a_missing_mis_shaped_or_foreign_state_is_refused(name: Any, moment: str) -> None:
    optimizer = AdapterOptimizer(parameters(), name=name)
    train(optimizer, first=0, steps=1)
    whole = saved(optimizer)
    place = f"state/up.lora_A/{moment}"
    dtype = str(whole[place].dtype).removeprefix("torch.")
    for changed, fault in (
        ({key: t for key, t in whole.items() if key != place}, f"{place} is missing"),
        (
            whole | {place: torch.zeros(2, 2, dtype=whole[place].dtype)},
            rf"{place} is \(2, 2\) {dtype}, not \(4, 1500\)",
        ),
        (whole | {place: whole[place].to(torch.int16)}, rf"{place} is \(4, 1500\) int16, not \(4, 1500\) {dtype}"),
        (whole | {"state/up.lora_A/absmax3": torch.zeros(2)}, "state/up.lora_A/absmax3 is unknown"),
        ({key: t for key, t in whole.items() if "up.lora_B/" not in key}, r"state/up.lora_B/\w+ is missing"),
        (
            whole | {"residual/up.lora_A": torch.zeros(2, 2)},
            r"residual/up.lora_A is \(2, 2\) float32, not \(4, 1500\) int16",
        ),
    ):
        fresh = AdapterOptimizer(parameters(), name=name)
        with pytest.raises(ValueError, match=f"optimizer state does not fit these parameters: .*{fault}"):
            fresh.load_state_tensors(changed)


def test_the_state_of_another_optimizer_is_refused_with_all_that_is_wrong() -> None:
    other = AdapterOptimizer(parameters(), name="paged_lion_8bit")
    train(other, first=0, steps=1)
    fresh = AdapterOptimizer(parameters(), name="adamw")
    with pytest.raises(ValueError, match=r"exp_avg is missing; .*exp_avg_sq is missing; .*state1 is unknown"):
        fresh.load_state_tensors(saved(other))
