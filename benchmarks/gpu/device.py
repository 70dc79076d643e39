"""The device of the suite: a GPU, or the CPU for a dry run. Its clock and its memory, behind the same functions."""

from __future__ import annotations

import gc
import resource
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from measure import alternating, spread

# What torch may allocate on a card: the A100 40GB shows 39.4 GiB, of which a CUDA context takes about 0.5.
CARD_40GB_BYTES, CARD_8GB_BYTES = int(38.9 * 2**30), int(7.2 * 2**30)


class Sample(NamedTuple):
    """Seconds of one call: until the device is done, and until the host has queued its work."""

    seconds: float
    host_seconds: float


def timed(device: torch.device, function: Callable[[], Any], calls: int = 1) -> Sample:
    """Time per call of `calls` calls in a row: the host may run ahead of a GPU."""
    wait = partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    wait()
    began = time.perf_counter()
    for _ in range(calls):
        function()
    host = time.perf_counter() - began
    wait()
    return Sample((time.perf_counter() - began) / calls, host / calls)


def in_turns(
    device: torch.device, functions: Mapping[str, Callable[[], Any]], rounds: int, seconds: float
) -> dict[str, list[Sample]]:
    """Samples of about `seconds` each, 1 to 100 calls (0: of one call), of all functions, which alternate."""
    readings = {}
    for name, function in functions.items():
        timed(device, function, 2)
        calls = max(1, min(100, round(seconds / max(timed(device, function, 2).seconds, 1e-9))))
        readings[name] = partial(timed, device, function, calls)
    return alternating(readings, rounds, warmup=0)


def spreads(samples: Mapping[str, list[Sample]]) -> dict[str, dict[str, float]]:
    """Median and quartiles of the seconds of each, and the median of the host's."""
    return {
        name: spread([each.seconds for each in found])
        | {"host_median": spread([each.host_seconds for each in found])["median"]}
        for name, found in samples.items()
    }


def free(device: torch.device) -> None:
    """Drop what only cycles still hold, as PEFT's layers do, give cached memory back, and start the peak anew."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def memory(device: torch.device) -> dict[str, int]:
    """Bytes held now, the most since `free`, and the most that the allocator took from the card, which must fit beside
    the CUDA context. On a CPU the peak of the resident set stands in for all."""
    if device.type != "cuda":
        return dict.fromkeys(("held", "peak", "reserved"), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    cuda = torch.cuda
    most = {"peak": cuda.max_memory_allocated(device), "reserved": cuda.max_memory_reserved(device)}
    return {"held": cuda.memory_allocated(device)} | most


def limit_memory(device: torch.device, num_bytes: int) -> float | None:
    """Let torch allocate at most `num_bytes` on the device; returns the share of its memory, None on a CPU.

    bitsandbytes' paged states are not counted: they are managed memory.
    """
    if device.type != "cuda":
        return None
    share = min(1.0, num_bytes / torch.cuda.get_device_properties(device).total_memory)
    torch.cuda.set_per_process_memory_fraction(share, device)
    return share


@contextmanager
def host_waits(device: torch.device) -> Iterator[Counter[str]]:
    """Counts, by the line of Python that caused them, the times the host waits for the GPU; nothing on a CPU.

    torch's mode is experimental and does not see every wait; calls of `torch.cuda.synchronize`, which it leaves out,
    are counted here.
    """
    found: Counter[str] = Counter()
    if device.type != "cuda":
        yield found
        return
    wait = torch.cuda.synchronize

    def place(file: str, line: int) -> str:
        return f"{Path(file).parent.name}/{Path(file).name}:{line}"

    def counted(*args: Any) -> None:
        caller = sys._getframe(1)
        found[place(caller.f_code.co_filename, caller.f_lineno)] += 1
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
            found[place(each.filename, each.lineno)] += 1
