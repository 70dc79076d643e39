"""Everything about qdora that only a GPU can show, in one command and one JSON file.

The file, benchmarks/results/gpu_<card>.json, is written after every section. A section that fails or takes too long
leaves what it had found and its last lines, and the next one runs. `failed_checks` names what was wrong.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from frame import smoke_place
from gpu.device import CARD_8GB_BYTES, CARD_40GB_BYTES
from gpu.plan import ERROR_LINES, FULL, SMOKE, Part
from gpu.programs import nvidia_smi
from measure import PACKAGES, RESULTS, commit

from qdora.cli.app import let_segments_grow
from qdora.files.atomic import atomic_write_json
from qdora.files.machine import package_versions


@dataclass(frozen=True)
class Section:
    place: str  # "module:function" under gpu, imported in the section's process: a missing package costs it alone
    seconds: int  # after these its process is ended; after two thirds it begins no new case
    arguments: Mapping[str, Any] = field(default_factory=dict)  # of the function, after (part, plan, device)


FIRST = {
    "card": Section("programs:card", 30),
    "tests": Section("programs:tests", 170),
    "host_waits": Section("steps:waits", 40),
    "step_in_turns": Section("steps:in_turns", 120, {"index": 0}),
    "optimizer": Section("steps:optimizers", 40),
    "quickstart": Section("programs:quickstart", 100),
    "step_8b_40gb": Section("steps:on_40gb", 100, {"name": "own_dora", "index": 0}),
}
"""What decides most, for a card of 16 GB or more: ten minutes in all."""

_MODELS = ("own_dora", "peft_dora", "own_lora", "peft_lora")
_8GB = {"size": "middle", "limit": CARD_8GB_BYTES, "num_streamed": 8}
_40GB = {"size": "large", "limit": CARD_40GB_BYTES, "num_streamed": 20}
SECTIONS = FIRST | {
    "step_in_turns_long": Section("steps:in_turns", 300, {"index": 1}),
    "layer_1": Section("layers:run", 120, {"index": 0}),
    **{f"alone_{name}": Section("steps:on_40gb", 180, {"name": name, "index": 1}) for name in _MODELS},
    "layer_2": Section("layers:run", 180, {"index": 1}),
    "streamed_8gb": Section("host_copies:streamed", 150, _8GB),
    "streamed_40gb": Section("host_copies:streamed", 270, _40GB),
    "offloaded": Section("host_copies:offloaded", 150),
    "layer_3": Section("layers:run", 120, {"index": 2}),
}


def main(arguments: list[str] | None = None) -> int:
    """0 when every section ran and every check held, 2 without a GPU, else 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first", action="store_true", help="what decides most, in at most ten minutes")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, metavar="NAME", help=", ".join(SECTIONS))
    parser.add_argument("--continue", dest="resume", action="store_true", help="leave out what the file has done")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, on the CPU, into a temporary file")
    parser.add_argument("--out", type=Path, help="the file; sections in it that are not run again stay")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)  # a section's own process: name, file, seconds
    args = parser.parse_args(arguments)
    if not args.smoke and not torch.cuda.is_available():
        print("gpu_suite: torch sees no CUDA device; --smoke runs everything on the CPU, tiny.", file=sys.stderr)
        return 2
    if args.child:
        run_here(args.child[0], Path(args.child[1]), float(args.child[2]), smoke=args.smoke)
        return 0
    card = None if args.smoke else nvidia_smi() or {"name": "unknown"}
    file = f"gpu_{re.sub('[^a-z0-9]+', '_', card['name'].lower())}.json" if card else "gpu_suite.json"
    out = args.out or (RESULTS / file if card else smoke_place(file))
    document = started(out, card)
    names = args.sections or list(FIRST if args.first else SECTIONS)
    if args.resume:
        names = [name for name in names if document["sections"].get(name, {}).get("status") != "done"]
    minutes = sum(SECTIONS[name].seconds for name in names) / 60
    print(f"{len(names)} sections, at most {minutes:.0f} minutes on a GPU; results go to {out}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(Path(__file__).resolve()), *(["--smoke"] if args.smoke else []), "--child"]
        for name in names:
            print(f"{name} ... ", end="", flush=True)
            entry = run_one(name, command, Path(folder), patience=10.0 if args.smoke else 1.0)
            document["sections"][name] = entry
            document["failed_checks"] = failed_checks(document["sections"])
            atomic_write_json(out, document)
            print(entry["status"], f"({entry['seconds']:.0f} s)", flush=True)
    bad = [name for name, entry in document["sections"].items() if entry["status"] != "done"]
    print(json.dumps({"file": str(out), "not_done": bad, "failed_checks": document["failed_checks"]}))
    return 1 if bad or document["failed_checks"] else 0


def started(out: Path, card: dict[str, str] | None) -> dict[str, Any]:
    """Head of the result, with the sections that the file has already if they are of this card (None: a dry run)."""
    before: dict[str, Any] = json.loads(out.read_text()) if out.is_file() else {"card": card, "sections": {}}
    if (before["card"] or {}).get("name") != (card or {}).get("name"):
        raise SystemExit(f"gpu_suite: {out} is of another card or a dry run; name another file with --out.")
    return {
        "command": " ".join(["python benchmarks/gpu_suite.py", *([] if card else ["--smoke"])]),
        "commit": commit(),
        "card": card,
        "versions": package_versions(PACKAGES),
        "written": time.strftime("%Y-%m-%d"),
        "failed_checks": [],
        "sections": before["sections"],
    }


def run_here(name: str, path: Path, seconds: float, *, smoke: bool) -> None:
    """A section in this process; what it finds is written to the path as it is found."""
    part, section = Part(path, seconds * 2 / 3), SECTIONS[name]
    torch.manual_seed(0)
    module, _, function = section.place.partition(":")
    run = getattr(importlib.import_module(f"gpu.{module}"), function)
    gc.freeze()  # all that was imported: collecting garbage then takes no time to speak of
    device = torch.device("cpu") if smoke else torch.device("cuda", torch.cuda.current_device())
    run(part, SMOKE if smoke else FULL, device, **section.arguments)


def run_one(name: str, command: Sequence[str], folder: Path, patience: float = 1.0) -> dict[str, Any]:
    """A section in a process of its own: status, seconds, what it found up to its end or death, and its last lines. The
    command is followed by the section's name, the path of its file and its seconds, which `patience` multiplies."""
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


if __name__ == "__main__":
    sys.exit(main())
