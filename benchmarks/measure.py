"""What the benchmarks measure with: timing in turns, peaks, fresh processes, facts about the machine, result files."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from qdora.files.machine import cpu_name, package_versions

RESULTS = Path(__file__).resolve().parent / "results"
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
OFFLINE = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
"""Environment variables of processes."""
Reading = TypeVar("Reading")
PACKAGES = ("qdora", "torch", "transformers", "bitsandbytes", "peft")


def in_turns(functions: Mapping[str, Callable[[], Any]], repeats: int, *, warmup: int = 1) -> dict[str, list[float]]:
    """Seconds of each repeat of each function on the CPU."""

    def seconds_of(function: Callable[[], Any]) -> float:
        began = time.perf_counter()
        function()
        return time.perf_counter() - began

    return alternating({name: partial(seconds_of, each) for name, each in functions.items()}, repeats, warmup=warmup)


def alternating(
    readings: Mapping[str, Callable[[], Reading]], repeats: int, *, warmup: int = 1
) -> dict[str, list[Reading]]:
    """What each function returned in each repeat. They alternate, each round beginning one later: whatever slows the
    machine for a while slows all, and none always follows the same other."""
    names = list(readings)
    found: dict[str, list[Reading]] = {name: [] for name in names}
    for turn in range(-warmup, repeats):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            reading = readings[name]()
            if turn >= 0:
                found[name].append(reading)
    return found


def spread(values: list[float]) -> dict[str, float]:
    if len(values) < 2:
        return {"median": values[0], "lower": values[0], "upper": values[0]}
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "lower": lower, "upper": upper}


def ratio(numerator: list[float], denominator: list[float]) -> dict[str, float]:
    """Spread of the ratios of the same round."""
    return spread([first / second for first, second in zip(numerator, denominator, strict=True)])


def ratios(readings: Mapping[str, list[float]], names: Iterable[str]) -> dict[str, dict[str, float]]:
    """`ratio` by names such as "dora / lora", of those whose sides were measured."""
    pairs = {name: name.split(" / ") for name in names}
    return {name: ratio(readings[a], readings[b]) for name, (a, b) in pairs.items() if {a, b} <= set(readings)}


def facts(command: str) -> dict[str, Any]:
    return {
        "command": command,
        "commit": commit(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name(),
        "num_threads": torch.get_num_threads(),
        "versions": package_versions(PACKAGES),
    }


def commit() -> str | None:
    """Abbreviated commit of this checkout, or None outside one."""
    call = ["git", "-C", str(RESULTS), "rev-parse", "--short", "HEAD"]
    try:
        run = subprocess.run(call, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return run.stdout.strip()


def save(out: Path, result: Mapping[str, Any]) -> None:
    """Write the file, indented; a list of numbers or strings is one line."""
    lists = re.compile(r"\[\n([^][{}]*)\n *\]")
    text = lists.sub(lambda found: "[" + re.sub(r"\n *", " ", found[1]).strip() + "]", json.dumps(result, indent=2))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text + "\n", encoding="utf-8")


def alone(function: Callable[..., Any], *arguments: Any, variables: Mapping[str, str] | None = None) -> Any:
    """What a function of a module returns in a process of its own with more environment variables; its arguments and
    its result go through JSON."""
    file = Path(inspect.getsourcefile(function) or "")
    module = ".".join(file.resolve().relative_to(RESULTS.parent).with_suffix("").parts)
    call = [sys.executable, __file__, module, function.__name__, json.dumps(arguments, default=str)]
    environment = {**os.environ, **(variables or {})}
    run = subprocess.run(call, capture_output=True, text=True, check=False, env=environment)
    if run.returncode != 0:
        raise RuntimeError(f"{' '.join(call[2:])}: exit {run.returncode}\n{run.stderr[-4000:]}")
    return json.loads(run.stdout.splitlines()[-1])


def launch_variables(size: int) -> list[dict[str, str]]:
    """Environment variables that torchrun would set in each of `size` processes of a launch on this machine."""
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = ({"RANK": rank, "LOCAL_RANK": rank} for rank in range(size))
    return [{name: str(value) for name, value in (group | rank).items()} for rank in ranks]


def peak_rss_bytes() -> int:
    """The largest resident set that this process has had, since `reset_peak_rss` if it was called."""
    return status_bytes("VmHWM")


def reset_peak_rss() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def status_bytes(name: str) -> int:
    """An entry of Linux's /proc/self/status: VmRSS, the resident set of this process; VmHWM, its largest."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"this system has no {name} in /proc/self/status")


if __name__ == "__main__":  # `alone`
    print(json.dumps(getattr(importlib.import_module(sys.argv[1]), sys.argv[2])(*json.loads(sys.argv[3]))))
