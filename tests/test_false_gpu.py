"""The false GPU sees what a GPU would be asked, and computes what the CPU computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

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
    (lambda x: bool((x > 100).any()), "_local_scalar_dense"),
    (lambda x: x.tolist(), "_to_copy"),
    (lambda x: x.cpu(), "_to_copy"),
    (lambda x: x.to("cpu").numpy(), "_to_copy"),
    (lambda x: (x > 0).nonzero(), "nonzero"),
    (lambda x: x[x > 0], "index"),
    (lambda x: x.masked_select(x > 0), "masked_select"),
    (lambda x: torch.equal(x, x), "equal"),
    (lambda x: x.repeat_interleave(torch.ones(8, dtype=torch.int64, device=x.device), dim=1), "repeat_interleave"),
    (lambda x: torch.tensor([1.0, 2.0], device=x.device), "_to_copy"),
    (lambda x: X.to(x.device), "_to_copy"),
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


@on_false_gpu
def test_bytes_live_until_the_last_view_dies(gpu):
    before = gpu.live_bytes
    x = torch.zeros(100, device=gpu.device)
    view = x[10:].detach()
    del x
    assert gpu.live_bytes == before + 400
    del view
    assert gpu.live_bytes == before
    assert gpu.peak_bytes >= before + 400
