"""Everything about qdora that only a GPU can show, in one command and one JSON file.

python benchmarks/gpu_suite.py --first      what decides most, on a card of 16 GB or more
python benchmarks/gpu_suite.py --continue   all that the file does not have yet
python benchmarks/gpu_suite.py --smoke      a dry run on a CPU with tiny shapes

The file, benchmarks/results/gpu_<card>.json, is written after every section. A section that fails or takes too long
leaves what it had found and its last lines, and the next one runs. `failed_checks` names what was wrong.
benchmarks/README.md says how to run it on a rented machine without the packages.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from gpu.card import nvidia_smi
from gpu.runner import FIRST, SECTIONS, failed_checks, minutes, run_here, run_one
from measure import PACKAGES, RESULTS, commit, smoke_place

from qdora.files.atomic import atomic_write_json
from qdora.files.environment import package_versions


def main(arguments: list[str] | None = None) -> int:
    """0 when every section ran and every check held, 2 without a GPU, else 1."""
    args = parsed(arguments)
    if not args.smoke and not torch.cuda.is_available():
        print("gpu_suite: torch sees no CUDA device; --smoke runs everything on the CPU, tiny.", file=sys.stderr)
        return 2
    if args.child:
        run_here(args.child[0], Path(args.child[1]), float(args.child[2]), smoke=args.smoke)
        return 0
    card = None if args.smoke else nvidia_smi() or {"name": "unknown"}
    name = f"gpu_{re.sub('[^a-z0-9]+', '_', card['name'].lower())}.json" if card else "gpu_suite.json"
    out = args.out or (RESULTS / name if card else smoke_place(name))
    document = started(out, card)
    names = args.sections or list(FIRST if args.first else SECTIONS)
    if args.resume:
        names = [name for name in names if document["sections"].get(name, {}).get("status") != "done"]
    print(f"{len(names)} sections, at most {minutes(names):.0f} minutes on a GPU; results go to {out}", flush=True)
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


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    first, whole = minutes(list(FIRST)), minutes(list(SECTIONS))
    parser.add_argument("--first", action="store_true", help=f"at most {first:.0f} of {whole:.0f} minutes")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, metavar="NAME", help=", ".join(SECTIONS))
    parser.add_argument("--continue", dest="resume", action="store_true", help="leave out what the file has done")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, on the CPU, into a temporary file")
    parser.add_argument("--out", type=Path, help="the file; sections in it that are not run again stay")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)  # a section's own process: name, file, seconds
    return parser.parse_args(arguments)


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


if __name__ == "__main__":
    sys.exit(main())
