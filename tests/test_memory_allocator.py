"""Freed memory goes back to the system when it is asked to, also where each free keeps it."""

from __future__ import annotations

import multiprocessing
import sys
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

from qdora.memory.allocator import keep_freed_memory, return_freed_memory

PAGE = 4096


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def _measure(end: Connection) -> None:
    keep_freed_memory()
    tensors = [torch.ones(1 << 20) for _ in range(32)]
    tensors.clear()
    kept = resident()
    return_freed_memory()
    end.send(kept - resident())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_freed_memory_is_returned() -> None:
    context = multiprocessing.get_context("fork")  # the settings hold for the rest of a process
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(sender,))
    process.start()
    try:
        assert receiver.poll(60)
        returned = receiver.recv()
    finally:
        process.kill()
        process.join()
    assert returned > 100 << 20  # of 128 MiB that were kept
