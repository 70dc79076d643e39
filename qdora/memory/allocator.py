"""glibc's allocator, told to keep large blocks."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_KEEP_BYTES = 1 << 30


def keep_freed_memory() -> bool:
    """Stop glibc from giving blocks below 1 GiB back to the system at every free.

    A training step frees and takes the same large buffers over and over; by default each one is mapped anew and every
    page of it faults. Dequantising a 4096 x 4096 weight into a fresh buffer takes several times as long for that.
    Peak memory does not change, memory after the peak stays with the process.

    Returns:
        False where there is no glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _KEEP_BYTES)) and bool(mallopt(_M_TRIM_THRESHOLD, _KEEP_BYTES))
