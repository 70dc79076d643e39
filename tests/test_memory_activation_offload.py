"""Checkpoints in the host's memory: the same gradients, copied as late as they may be, back in time; freed memory."""

from __future__ import annotations

import ctypes
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from qdora.errors import RunFailure
from qdora.memory import activation_offload
from qdora.memory.activation_offload import ActivationOffload
from qdora.memory.allocator import keep_freed_memory, return_freed_memory
from qdora.memory.host_residency import HostResidency
from qdora.model.load import load_model
from qdora.model.source import resolve
from tests import support
from tests.false_gpu import FakeCuda
from tests.support import LateCopies


class LateHost:
    """Copies out only when the tensor is asked back, and destroys what is fetched until it is taken."""

    def __init__(self) -> None:
        self.log: list[tuple[str, int]] = []

    def __call__(self, tensor: Tensor) -> Any:
        number, back = sum(action == "out" for action, _ in self.log), list[Tensor]()
        self.log.append(("out", number))

        def fetch() -> None:
            if not back:
                back.append(torch.full_like(tensor, float("nan")))
                self.log.append(("fetch", number))

        def take() -> Tensor:
            fetch()
            self.log.append(("take", number))
            return back[0].copy_(tensor)

        return SimpleNamespace(fetch=fetch, take=take)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return support.write_source(tmp_path_factory.mktemp("source"))


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activation_offload, "_LEAST_BYTES", 16)


@pytest.mark.parametrize("streamed", [False, True])
def test_gradients_are_the_same(source: Path, streamed: bool) -> None:
    """Each input is fetched while the block behind it computes; a pass that was broken off leaves nothing behind."""
    expected = support.streamed_gradients(support.adapt_streamed(support.resident_model(source)))
    placer = HostResidency(copies=LateCopies) if streamed else None
    model = load_model(resolve(str(source)), quant="nf4", compute_dtype=torch.float32, placer=placer)
    host, sent = LateHost(), [0, 1, 2, 3]  # of five blocks every one but the last
    ActivationOffload(support.adapt_streamed(model), host)
    model.train()
    ids = support.STREAMED_IDS[0]
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward(retain_graph=True)
    backward = [(action, number) for number in reversed(sent) for action in ("fetch", "take")]
    assert host.log == [*(("out", number) for number in sent), *backward]
    with pytest.raises(RunFailure, match="a graph allows only one backward pass"):
        loss.backward()
    model.zero_grad()
    model(input_ids=support.STREAMED_IDS[1])  # no backward pass
    host.log.clear()
    support.assert_equal_tensors(support.streamed_gradients(model), expected)
    assert [number for action, number in host.log if action == "out"] == list(range(12))  # none in the evaluation


@pytest.mark.parametrize("free, reason", [(1 << 20, "too little is free"), (1 << 40, "CUDA error: out of memory")])
def test_pinned_memory_that_is_not_there_is_one_line(free: int, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the limit of its container a process would be ended without a word."""

    def refused(*_: Any, **__: Any) -> Tensor:
        assert free > 16 << 20
        raise RuntimeError("CUDA error: out of memory\nmore lines")

    monkeypatch.setattr(activation_offload, "available_memory_bytes", lambda: free)
    monkeypatch.setattr(torch, "empty", refused)
    with pytest.raises(RunFailure, match=rf"refuses 16 MiB of pinned host memory \({reason}\)\.$"):
        activation_offload.PinnedPages().take(5)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    monkeypatch.setattr(activation_offload, "_PAGE_BYTES", 1 << 10)
    return FakeCuda(monkeypatch)


@pytest.fixture
def pinned(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """`CudaHost` on a CPU; the bytes of each pinned allocation. What is allocated is full of rubbish."""
    sizes: list[int] = []
    empty = torch.empty

    def fake(*args: Any, pin_memory: bool = False, **options: Any) -> Tensor:
        made = empty(*args, **options)
        made.view(-1).view(torch.uint8).fill_(171)
        if pin_memory:
            sizes.append(made.nbytes)
        return made

    monkeypatch.setattr(torch, "empty", fake)
    return sizes


def test_pinned_memory_is_the_largest_need_and_not_that_of_every_shape(pinned: list[int]) -> None:
    """200 micro-batches of 70 shapes, four blocks each."""
    generator = torch.Generator().manual_seed(0)
    host = activation_offload.CudaHost(torch.device("cpu"))
    need = 0
    for number in range(200):
        rows, width = 1 + number % 7, 8 * (1 + (number // 7) % 10)  # (rows, 32, width) in bf16
        inputs = [torch.randn(rows, 32, width, generator=generator).bfloat16() for _ in range(4)]
        inputs[2] = inputs[2].transpose(0, 1)  # not contiguous
        need = max(need, sum(each.nbytes for each in inputs))
        away = [host(each) for each in inputs]
        for sent, kept in zip(reversed(away), reversed(inputs), strict=True):
            assert torch.equal(sent.take(), kept)
    assert need <= sum(pinned) <= 2 * need


@pytest.mark.usefixtures("pinned")
def test_copies_wait_for_the_computation_and_the_computation_for_them(cuda: FakeCuda) -> None:
    """In three pages: out once the input is computed and back in call order; what is taken has arrived."""
    kept = torch.arange(600, dtype=torch.float32)
    away = activation_offload.CudaHost(torch.device("cpu"))(kept)
    side = "stream 0"
    assert cuda.read() == [(side, "waits for", "main"), *[(side, "copies", "")] * 3, (side, "records", "event 0")]
    away.fetch()
    assert cuda.read() == [(side, "waits for", "main"), *[(side, "copies", "")] * 3, (side, "records", "event 1")]
    away.fetch()
    assert cuda.read() == []
    assert torch.equal(away.take(), kept)
    assert cuda.read() == [("main", "waits for", "event 1"), ("main", "waits for", "event 0")]
    del away
    assert cuda.read() == []


@pytest.mark.usefixtures("pinned")
def test_memory_is_given_away_behind_the_copy_that_reads_it(cuda: FakeCuda) -> None:
    """However far the host runs ahead, two inputs are held, and an earlier one is dropped after its copy's end."""
    host, held, away = activation_offload.CudaHost(torch.device("cpu")), list[Any](), list[Any]()
    for number in range(5):
        tensor = torch.full((256,), float(number))
        held.append(weakref.ref(tensor.untyped_storage()))
        away.append(host(tensor))
        del tensor
        alive = [index for index, each in enumerate(held) if each() is not None]
        assert alive == list(range(max(0, number - 1), number + 1))
        waited = [entry[2] for entry in cuda.read() if entry[0] == "main"]
        assert waited == ([f"event {2 * (number - 2)}"] if number >= 2 else [])  # a tensor has an event for each way
    for number in reversed(range(5)):
        assert torch.equal(away[number].take(), torch.full((256,), float(number)))


def test_a_pass_that_was_broken_off_gives_its_pages_back(pinned: list[int], cuda: FakeCuda) -> None:
    host = activation_offload.CudaHost(torch.device("cpu"))
    for _ in range(100):
        away = [host(torch.ones(256)) for _ in range(8)]
        away[-1].fetch()
        cuda.read()
        del away
        assert ("main", "waits for") in [entry[:2] for entry in cuda.read()]  # for the one that was coming back
    assert sum(pinned) == 8 << 10


def test_freed_memory_is_kept_and_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    """In malloc.h M_MMAP_THRESHOLD is -3, M_TRIM_THRESHOLD -1."""
    calls: list[tuple[int, ...]] = []
    options = {name: lambda *given: calls.append(given) or 1 for name in ("mallopt", "malloc_trim")}
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(ctypes, "CDLL", lambda _name: SimpleNamespace(**options))
    keep_freed_memory()
    return_freed_memory()
    assert calls == [(-3, 1 << 30), (-1, 1 << 30), (0,)]
