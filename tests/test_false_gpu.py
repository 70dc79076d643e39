"""The false GPU sees what a GPU would be asked, and computes what the CPU computes; and choices that a run makes where
torch has a GPU, with torch's answers faked."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qdora.adapter import layer
from qdora.files.machine import environment
from qdora.memory.oom import free_memory
from qdora.memory.stream import HostResidency
from qdora.model import build_model
from qdora.run import base as load_base
from qdora.run import prepare
from qdora.train.checkpoint import random_state, set_random_state
from tests import support
from tests.adapter_numbers import make, results
from tests.false_gpu import TYPE, on_false_gpu

X = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))


@on_false_gpu
def test_an_operation_launches_once_and_views_and_allocations_do_not(gpu):
    x = torch.zeros(6, 8, device=gpu.device)
    gpu.clear()
    y = torch.empty_like(x)
    view = y.view(8, 6).T[2:].unsqueeze(0).detach()
    assert gpu.events == []
    assert view.device.type == TYPE
    torch.add(x, x, out=y)
    y[1:3].mul_(2.0)
    torch.softmax(y.bfloat16(), dim=-1)
    assert [event.operation for event in gpu.events] == ["add", "mul_", "_to_copy", "_softmax"]
    assert [event.num_bytes for event in gpu.events[:2]] == [3 * 6 * 8 * 4, 2 * 2 * 8 * 4]


def views(x: Tensor) -> Tensor:
    y = x.clone()
    y[1:3].add_(x[0]).mul_(3.0)
    y.view(-1)[::5] = 7.0
    y.T[2].copy_(x[:, 1])
    first, second = y.split(4, dim=1)
    first.sub_(second)
    y.data = y.data[1:]
    return torch.cat([y @ x.T, y.sort(dim=1).values[:, :6]])


class Dense(nn.Sequential):
    def __init__(self, recompute: bool) -> None:
        super().__init__(nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, 3))
        self.recompute = recompute

    def forward(self, x: Tensor) -> Any:
        return checkpoint(super().forward, x, use_reentrant=False) if self.recompute else super().forward(x)


@on_false_gpu
def test_values_and_gradients_are_those_of_the_cpu_and_phases_are_told_apart(gpu):
    assert torch.equal(views(X.to(gpu.device)).cpu(), views(X))
    adapters = [make(kind=kind, quant="nf4", in_=8, dtype=torch.float32) for kind in ("lora", "dora")]
    for module in (Dense(False), Dense(True), *adapters):
        with torch.no_grad():
            dy = torch.ones_like(module(X))
        wanted = results(module, X, dy)
        module.to(gpu.device)
        x, dy = X.to(gpu.device), dy.to(gpu.device)
        gpu.clear()
        with gpu.phase("forward"):
            found = results(module, x, dy)
        for name, each in wanted.items():
            torch.testing.assert_close(found[name].cpu(), each, rtol=1e-5, atol=1e-5)
        if isinstance(module, Dense):
            # addmm, silu, addmm; nothing reads the last product again.
            assert gpu.count("launch", "forward") == 3
            assert gpu.count("launch", "recompute") == (2 if module.recompute else 0)
            assert gpu.count("launch", "backward") > 6


WAITS: list[tuple[Callable[[Tensor], Any], str]] = [
    (lambda x: float(x.sum()), "_local_scalar_dense"),
    (lambda x: x.tolist(), "_to_copy"),
    (lambda x: (x > 0).nonzero(), "nonzero"),
    (lambda x: x[x > 0], "index"),
    (lambda x: x.masked_select(x > 0), "masked_select"),
    (lambda x: torch.equal(x, x), "equal"),
    (lambda x: x.repeat_interleave(torch.ones(8, dtype=torch.int64, device=x.device), dim=1), "repeat_interleave"),
    (lambda x: torch.tensor([1.0, 2.0], device=x.device), "_to_copy"),
    (lambda x: X.to(x.device, non_blocking=True), "_to_copy"),  # not pinned
    (lambda x: X.pin_memory().to(x.device), "_to_copy"),  # pinned, but blocking
    (lambda x: x.copy_(X), "copy_"),
    (lambda x: X.clone().copy_(x, non_blocking=True), "copy_"),
]


@on_false_gpu
def test_reading_a_value_waits(gpu):
    for read, name in WAITS:
        x = X.to(gpu.device)
        gpu.clear()
        read(x)
        assert [event.operation for event in gpu.events if event.kind == "wait"] == [name]
        (line,) = gpu.lines("wait")
        assert line.startswith("tests/test_false_gpu.py: ")
        assert "lambda x" in line


@on_false_gpu
def test_what_needs_no_wait(gpu):
    x, mask = X.to(gpu.device), (X > 0).to(gpu.device)
    gpu.clear()
    pinned = X.pin_memory()
    assert pinned.is_pinned()
    there = pinned.to(gpu.device, non_blocking=True)
    back = torch.empty(X.shape, pin_memory=True)
    back.copy_(there, non_blocking=True)
    x[mask] = 0.0
    torch.where(mask, x, there)
    x[torch.arange(3, device=gpu.device)].add_(torch.tensor(2.0))
    x.mul_(1.0 / 3).clamp_(max=2.0)
    assert gpu.lines("wait") == []
    assert gpu.count("copy") == 2
    assert torch.equal(back, X)
    with pytest.raises(RuntimeError, match="on one device"):
        x + X


CUDA = torch.device("cuda")
CARD = SimpleNamespace(name="A100", major=8, minor=0, total_memory=40 << 30, uuid="GPU-1")


@pytest.fixture
def calls(monkeypatch):
    """A card in the place of torch's; what was asked of it to do."""
    made: list[str] = []
    answers = {"device_count": 1, "get_device_properties": CARD, "current_device": 0, "mem_get_info": (5, 9)}
    answers |= {"is_available": True, "get_rng_state": torch.tensor([7], dtype=torch.uint8)}
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: made.append("empty_cache"))
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state: made.append(f"set_rng_state {int(state)}"))
    return made


def test_a_run_computes_on_the_gpu_and_its_checkpoints_have_its_generator(calls, monkeypatch):
    for is_native, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, answer=is_native: answer)
        assert build_model.choose_compute("auto") == build_model.Compute(CUDA, dtype)
    assert environment()["devices"] == [{"name": "A100", "capability": "8.0", "memory_bytes": 40 << 30}]
    assert layer._free_bytes(CUDA) == 5
    assert layer._free_bytes(torch.device("cpu")) is None
    states = random_state()
    assert int(states["cuda"]) == 7
    set_random_state(states)
    free_memory()
    assert calls == ["set_rng_state 7", "empty_cache"]


def test_a_base_goes_where_the_recipe_says(tmp_path, monkeypatch):
    placers: list[Any] = []
    offloaded: list[Any] = []
    monkeypatch.setattr(load_base, "load_model", lambda *_, placer, **__: placers.append(placer) or torch.nn.Module())
    monkeypatch.setattr(load_base, "recompute_activations", lambda model: None)
    monkeypatch.setattr(load_base, "offload_activations", offloaded.append)
    options: dict[str, Any] = {"base__residency": "host", "base__streamed_blocks": 1}
    recipe = support.tiny_recipe(tmp_path, **options, memory__offload_activations=True, memory__checkpointing=True)
    compute = build_model.Compute(CUDA, torch.bfloat16)
    assert prepare._machine_faults(recipe, compute) == []
    load_base.load_base(recipe, support.config_source(), compute)
    (placer,) = placers
    assert isinstance(placer, HostResidency)
    assert placer.num_streamed == 1
    assert len(offloaded) == 1
