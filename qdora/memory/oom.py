"""Memory that runs out."""

from __future__ import annotations

import ctypes
import gc
import sys
from contextlib import suppress
from typing import Any

import torch

from qdora.errors import RunFailure

# Messages of allocators that raise a plain RuntimeError: torch's on the CPU, and those outside torch's cache on CUDA.
_MESSAGES = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "out of memory",  # of CUDA, its driver, and NCCL for its buffers
    "STATUS_ALLOC_FAILED",  # of cuBLAS and cuDNN
)

_CUBLAS_BYTES = 100 * 10**6  # a handle of cuBLAS with its workspace takes less


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on the GPU or in pageable memory of the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    # RunFailure: a refusal of pinned memory
    if isinstance(error, RunFailure) or not isinstance(error, RuntimeError):
        return False
    if "CUBLAS_STATUS_NOT_INITIALIZED" in str(error):  # of a handle that does not fit, and after other faults
        with suppress(RuntimeError):  # of which some leave a GPU that answers nothing
            return int(torch.cuda.mem_get_info()[0]) < _CUBLAS_BYTES
    return any(message in str(error) for message in _MESSAGES)


def free_memory() -> None:
    """Release what nothing uses; outside the `except` block of an error, which keeps its frames alive."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def keep_freed_memory() -> None:
    """Stop glibc from returning blocks below 1 GiB to the system at every free; else every page of a buffer faults.

    Dequantising a 4096 x 4096 weight would take several times as long.
    """
    trim_threshold, mmap_threshold = -1, -3  # malloc.h
    mallopt = _of_glibc("mallopt")
    if mallopt is not None and mallopt(mmap_threshold, 1 << 30):
        mallopt(trim_threshold, 1 << 30)


def return_freed_memory() -> None:
    """Return all freed memory to the system once."""
    trim = _of_glibc("malloc_trim")
    if trim is not None:
        trim(0)


def _of_glibc(name: str) -> Any:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform.startswith("linux") else None
