"""The sections of the suite, how long each may take on a GPU, and how each runs in a process of its own."""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from gpu import plan as plans
from gpu.device import CARD_8GB_BYTES, CARD_40GB_BYTES
from gpu.part import ERROR_LINES, Part
from qdora.cli.verb import let_segments_grow


@dataclass(frozen=True)
class Section:
    """One part of the suite.

    Attributes:
        place: "module:function" under gpu, imported in the section's process: a missing package costs it alone.
        seconds: After these its process is ended. After two thirds it begins no new case.
        arguments: Of the function, after (part, plan, device).
    """

    place: str
    seconds: int
    arguments: Mapping[str, Any] = field(default_factory=dict)


FIRST = {
    "card": Section("card:run", 30),
    "tests": Section("programs:tests", 110),
    "numerics": Section("numerics:run", 60),
    "host_waits": Section("host_waits:run", 40),
    "step_in_turns": Section("model_step:in_turns", 120, {"index": 0}),
    "optimizer": Section("optimizer_step:run", 40),
    "quickstart": Section("programs:quickstart", 100),
    "step_8b_40gb": Section("model_step:on_40gb", 100, {"name": "own_dora", "index": 0}),
}
"""What decides most, for a card of 16 GB or more: ten minutes in all."""

_MODELS = ("own_dora", "peft_dora", "own_lora", "peft_lora")
_8GB = {"size": "middle", "limit": CARD_8GB_BYTES, "num_streamed": 8}
_40GB = {"size": "large", "limit": CARD_40GB_BYTES, "num_streamed": 20}
SECTIONS = FIRST | {
    "step_in_turns_long": Section("model_step:in_turns", 300, {"index": 1}),
    "layer_1": Section("layer_cost:run", 120, {"index": 0}),
    **{f"alone_{name}": Section("model_step:on_40gb", 180, {"name": name, "index": 1}) for name in _MODELS},
    "profile": Section("kernel_profile:run", 90),
    "layer_2": Section("layer_cost:run", 180, {"index": 1}),
    "streamed_8gb": Section("streamed_step:run", 150, _8GB),
    "streamed_40gb": Section("streamed_step:run", 270, _40GB),
    "offloaded": Section("offloaded_step:run", 150),
    "layer_3": Section("layer_cost:run", 120, {"index": 2}),
    "untested_choices": Section("untested_choices:run", 120),
}


def minutes(names: Sequence[str]) -> float:
    """The most that these sections take."""
    return sum(SECTIONS[name].seconds for name in names) / 60


def run_here(name: str, path: Path, seconds: float, *, smoke: bool) -> None:
    """A section in this process; what it finds is written to the path as it is found."""
    part, section = Part(path, seconds * 2 / 3), SECTIONS[name]
    torch.manual_seed(0)
    module, _, function = section.place.partition(":")
    run = getattr(importlib.import_module(f"gpu.{module}"), function)
    gc.freeze()  # all that was imported: collecting garbage then takes no time to speak of
    device = torch.device("cpu") if smoke else torch.device("cuda", torch.cuda.current_device())
    run(part, plans.SMOKE if smoke else plans.FULL, device, **section.arguments)


def run_one(name: str, command: Sequence[str], folder: Path, patience: float = 1.0) -> dict[str, Any]:
    """A section in a process of its own: status, seconds, what it found up to its end or death, and its last lines.

    Args:
        command: Starts the process when the section's name, the path of its file and its seconds follow.
        folder: For the file and the log.
        patience: Times the section's seconds.
    """
    path, log = folder / f"{name}.json", folder / f"{name}.log"
    seconds, began = patience * SECTIONS[name].seconds, time.monotonic()
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    let_segments_grow(environment)  # as the qdora command does
    options: dict[str, Any] = {"stderr": subprocess.STDOUT, "env": environment, "start_new_session": True}
    with log.open("w") as output:
        process = subprocess.Popen([*command, name, str(path), str(seconds)], stdout=output, **options)
        try:
            code = process.wait(timeout=seconds)
            status = "done" if code == 0 else f"failed: exit {code}"
        except subprocess.TimeoutExpired:
            status = "timed out"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    entry: dict[str, Any] = {"status": status, "seconds": time.monotonic() - began, "result": {}}
    if path.is_file():
        entry["result"] = json.loads(path.read_text())
    if status != "done":
        entry["last_lines"] = log.read_text(errors="replace").splitlines()[-ERROR_LINES:]
    return entry


def failed_checks(sections: Mapping[str, Any]) -> list[str]:
    """Paths of all entries with `ok: false` and of all errors, for the eye that looks at one line."""
    return [path for name, entry in sections.items() for path in _failures(entry["result"], name)]


def _failures(found: Any, path: str) -> Iterator[str]:
    if isinstance(found, dict):
        if found.get("ok") is False or "error" in found:
            yield path
        for key, value in found.items():
            yield from _failures(value, f"{path} / {key}")
