"""Freed memory goes back to the system when it is asked to, also where each free keeps it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

# In an interpreter of its own: the settings hold for the rest of a process, and the heap that a long one leaves behind
# decides what can be returned. Counted by walking the pages: the counters of /proc/self/statm lag where cores are many.
_RETURNED = """
from qdora.memory.allocator import keep_freed_memory, return_freed_memory

def resident():
    with open("/proc/self/smaps_rollup") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("Rss:"))

keep_freed_memory()
blocks = [bytearray(4 << 20) for _ in range(32)]
above = bytearray(1 << 16)
blocks.clear()
kept = resident()
return_freed_memory()
print(kept - resident())
"""


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="glibc's allocator on Linux")
def test_freed_memory_is_returned() -> None:
    process = subprocess.run([sys.executable, "-c", _RETURNED], capture_output=True, text=True, check=True, timeout=60)
    assert int(process.stdout) > 100 << 20  # of 128 MiB that were kept
