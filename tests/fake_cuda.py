"""CUDA's streams and events for a CPU, where a copy is over when the call returns: they write down what they order."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor


class FakeCuda:
    """Streams and events in the place of torch's; `log` has their calls and the copies, in order.

    Entries are (stream, what it does, with what). The stream "main" computes; others are "stream 0" and so on, and
    events "event 0" and so on.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[tuple[str, str, str]] = []
        self.current = FakeStream(self, "main")
        self._num_streams = self._num_events = 0
        copy = Tensor.copy_

        def copying(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
            self.log.append((self.current.name, "copies", "" if non_blocking else "and the host waits"))
            return copy(target, source)

        def kept(_: Tensor, stream: FakeStream) -> None:
            self.log.append((stream.name, "uses the memory", ""))

        monkeypatch.setattr(Tensor, "copy_", copying)
        monkeypatch.setattr(Tensor, "record_stream", kept)
        monkeypatch.setattr(torch.cuda, "Stream", self._stream)
        monkeypatch.setattr(torch.cuda, "Event", self._event)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self.current)
        monkeypatch.setattr(torch.cuda, "stream", self._on)

    def read(self) -> list[tuple[str, str, str]]:
        """What was logged since the last call."""
        found, self.log = self.log, []
        return found

    def _stream(self, device: torch.device) -> FakeStream:
        self._num_streams += 1
        return FakeStream(self, f"stream {self._num_streams - 1}")

    def _event(self) -> FakeEvent:
        self._num_events += 1
        return FakeEvent(self, f"event {self._num_events - 1}")

    @contextmanager
    def _on(self, stream: Any) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before


class FakeStream:
    """Without other methods, so that a call of one fails."""

    def __init__(self, cuda: FakeCuda, name: str) -> None:
        self._cuda, self.name = cuda, name

    def wait_stream(self, other: FakeStream) -> None:
        self._cuda.log.append((self.name, "waits for", other.name))

    def wait_event(self, event: FakeEvent) -> None:
        self._cuda.log.append((self.name, "waits for", event.name))


class FakeEvent:
    """Can only be recorded."""

    def __init__(self, cuda: FakeCuda, name: str) -> None:
        self._cuda, self.name = cuda, name

    def record(self, stream: FakeStream) -> None:
        self._cuda.log.append((stream.name, "records", self.name))


class FakeCudart:
    """CUDA's page-locked memory: `locked` has its pieces, address -> bytes, and `log` the calls, in order."""

    class cudaError(IntEnum):
        """Of the driver's answers these two."""

        success = 0
        memory = 2

    def __init__(self, most: int = 1 << 60) -> None:
        self.most, self.locked, self.log = most, dict[int, int](), list[str]()

    def put_in(self, monkeypatch: pytest.MonkeyPatch) -> FakeCudart:
        """In the place of torch's; returns self."""
        monkeypatch.setattr(torch.cuda, "cudart", lambda: self)
        monkeypatch.setattr(torch.cuda, "_cudart", self)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: self.log.append("waits"))
        return self

    def cudaGetErrorString(self, error: cudaError) -> str:
        """As the driver words it."""
        return {0: "no error", 2: "out of memory"}[error]

    def cudaHostRegister(self, address: int, num_bytes: int, flags: int) -> cudaError:
        """Refuses more than `most` bytes in all."""
        assert flags == 0
        if sum(self.locked.values()) + num_bytes > self.most:
            return self.cudaError.memory
        assert address not in self.locked
        self.locked[address] = num_bytes
        self.log.append("locks")
        return self.cudaError.success

    def cudaHostUnregister(self, address: int) -> cudaError:
        """The memory must still be there."""
        assert is_mapped(address)
        del self.locked[address]
        self.log.append("unlocks")
        return self.cudaError.success


def is_mapped(address: int) -> bool:
    """Whether this process has memory there."""
    spans = [line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines()]
    return any(int(start, 16) <= address < int(end, 16) for start, end in spans)
