"""glibc's allocator: whether freed memory goes back to the system."""

from __future__ import annotations

import ctypes
import sys
from typing import Any

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_KEEP_BYTES = 1 << 30


def keep_freed_memory() -> None:
    """Stop glibc from returning blocks below 1 GiB to the system at every free. Nothing happens without glibc.

    A training step frees and takes the same large buffers over and over. By default each is mapped anew and every page
    faults: dequantising a 4096 x 4096 weight then takes several times as long. Peak memory does not change; after the
    peak the memory stays with the process.
    """
    mallopt = _of_glibc("mallopt")
    if mallopt is not None and mallopt(_M_MMAP_THRESHOLD, _KEEP_BYTES):
        mallopt(_M_TRIM_THRESHOLD, _KEEP_BYTES)


def return_freed_memory() -> None:
    """Return all freed memory to the system once, whatever `keep_freed_memory` set. Nothing happens without glibc."""
    trim = _of_glibc("malloc_trim")
    if trim is not None:
        trim(0)


def _of_glibc(name: str) -> Any:
    """A function of glibc, or None on systems without it."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform.startswith("linux") else None
