"""The device of the suite: a GPU, or the CPU for a dry run. Its clock and its memory, behind the same functions."""

from __future__ import annotations

import gc
import resource
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

CARD_40GB_BYTES = int(38.9 * 2**30)
"""What torch may allocate on a 40 GB card: the A100 40GB shows 39.4 GiB, of which a CUDA context takes about 0.5."""
CARD_8GB_BYTES = int(7.2 * 2**30)
"""The same of an 8 GB card."""


@dataclass(frozen=True)
class Sample:
    """Seconds of one call: until the device is done, and until the host has queued its work."""

    seconds: float
    host_seconds: float


NO_GPU = "gpu_suite: torch sees no CUDA device; --smoke runs everything on the CPU with tiny shapes."


def pick(smoke: bool) -> torch.device:
    """The first GPU, or the CPU for a dry run."""
    if smoke:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise SystemExit(NO_GPU)
    return torch.device("cuda", torch.cuda.current_device())


def synchronize(device: torch.device) -> None:
    """Wait until the device has done everything."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(device: torch.device, function: Callable[[], Any], calls: int = 1) -> Sample:
    """Time per call of `calls` calls in a row: on a GPU between two CUDA events, so that the host may run ahead."""
    synchronize(device)
    if device.type != "cuda":
        began = time.perf_counter()
        for _ in range(calls):
            function()
        seconds = (time.perf_counter() - began) / calls
        return Sample(seconds, seconds)
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    began = time.perf_counter()
    first.record()
    for _ in range(calls):
        function()
    last.record()
    host = time.perf_counter() - began
    last.synchronize()
    return Sample(first.elapsed_time(last) / 1000 / calls, host / calls)


def calls_for(device: torch.device, function: Callable[[], Any], seconds: float) -> int:
    """Calls that make a sample of about `seconds`, 1 to 100; warms up as a side effect."""
    timed(device, function, 2)
    return max(1, min(100, round(seconds / max(timed(device, function, 2).seconds, 1e-9))))


def reset_peak(device: torch.device) -> None:
    """Give cached memory back and start the peak anew."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def free(device: torch.device) -> None:
    """Drop what only cycles still hold, as PEFT's layers do, and give cached memory back."""
    gc.collect()
    reset_peak(device)


def held_bytes(device: torch.device) -> int:
    """Bytes allocated now; on a CPU the resident set's peak, which stands in for it in a dry run."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else _peak_resident_bytes()


def peak_bytes(device: torch.device) -> int:
    """Most bytes allocated since `reset_peak`; on a CPU the peak of the process."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _peak_resident_bytes()


def reserved_bytes(device: torch.device) -> int:
    """Most bytes that the allocator took from the card since `reset_peak`: what must fit beside the CUDA context."""
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else _peak_resident_bytes()


def _peak_resident_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def limit_memory(device: torch.device, num_bytes: int) -> float | None:
    """Let torch allocate at most `num_bytes` on the device; returns the share of its memory, None on a CPU.

    bitsandbytes' paged states are not counted: they are managed memory.
    """
    if device.type != "cuda":
        return None
    share = min(1.0, num_bytes / torch.cuda.get_device_properties(device).total_memory)
    torch.cuda.set_per_process_memory_fraction(share, device)
    return share


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device's memory was exhausted, also where a library says so in words."""
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error).lower()


@contextmanager
def host_waits(device: torch.device) -> Iterator[Counter[str]]:
    """Counts, by the line of Python that caused them, the times the host waits for the GPU.

    On a CPU nothing is counted. torch's mode is experimental and does not see every wait; calls of
    `torch.cuda.synchronize`, which it leaves out, are counted here.
    """
    found: Counter[str] = Counter()
    if device.type != "cuda":
        yield found
        return
    wait = torch.cuda.synchronize

    def counted(*args: Any) -> None:
        caller = sys._getframe(1)
        found[_place(caller.f_code.co_filename, caller.f_lineno)] += 1
        wait(*args)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        torch.cuda.synchronize = counted
        try:
            yield found
        finally:
            torch.cuda.synchronize = wait
            torch.cuda.set_sync_debug_mode("default")
    for each in caught:  # a first one only says that the mode is a prototype
        if "called a synchronizing" in str(each.message):
            found[_place(each.filename, each.lineno)] += 1


def _place(file: str, line: int) -> str:
    return f"{Path(file).parent.name}/{Path(file).name}:{line}"
