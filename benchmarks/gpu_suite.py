"""Everything about qdora that only a GPU can show, in one command and one JSON file.

python benchmarks/gpu_suite.py                       all of it, the most important first, in about 15 minutes
python benchmarks/gpu_suite.py --budget-minutes 9    as much as fits; --continue goes on where it ended
python benchmarks/gpu_suite.py --smoke               a dry run on a CPU with tiny shapes

The file, benchmarks/results/gpu_<card>.json, is written after every section. A section that fails or takes too long
leaves what it had found and its last lines, and the next one runs. `failed_checks` names what was wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from gpu import device as on
from gpu.card import nvidia_smi
from gpu.part import Part
from gpu.run_sections import own_command, run_all
from gpu.sections import SECTIONS, run_here
from measure import PACKAGES, RESULTS, commit

from qdora.files.environment import package_versions


def main(arguments: list[str] | None = None) -> int:
    """0 when every section ran and every check held, 2 without a GPU, else 1."""
    args = parsed(arguments)
    if not args.smoke and not torch.cuda.is_available():
        print(on.NO_GPU, file=sys.stderr)
        return 2
    if args.child:
        offline()
        run_here(args.child, Part(args.part, args.seconds), on.pick(args.smoke), smoke=args.smoke)
        return 0
    card = nvidia_smi()
    out = args.out or RESULTS / f"gpu_{slug('smoke' if args.smoke else (card or {}).get('name', 'unknown'))}.json"
    document = started(out, card, args.smoke)
    names = args.sections or list(SECTIONS)
    if args.resume:
        done = {name for name, entry in document["sections"].items() if entry["status"] == "done"}
        names = [name for name in names if name not in done]
    with tempfile.TemporaryDirectory() as folder:
        command = own_command(str(Path(__file__).resolve()), args.smoke)
        run_all(document, out, names, command, seconds=60 * args.budget_minutes, folder=Path(folder))
    bad = [name for name, entry in document["sections"].items() if entry["status"] != "done"]
    print(json.dumps({"file": str(out), "not_done": bad, "failed_checks": document["failed_checks"]}))
    return 1 if bad or document["failed_checks"] else 0


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, metavar="NAME", help=", ".join(SECTIONS))
    parser.add_argument("--budget-minutes", type=float, default=28.0, help="no section is started after these")
    parser.add_argument("--continue", dest="resume", action="store_true", help="leave out what the file has done")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, on the CPU")
    parser.add_argument("--out", type=Path, help="the file; sections in it that are not run again stay")
    for name, kind in (("--child", str), ("--part", Path), ("--seconds", float)):  # a section's own process
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def started(out: Path, card: dict[str, str] | None, smoke: bool) -> dict[str, Any]:
    """Head of the result, with the sections that the file has already if they are of this card."""
    head: dict[str, Any] = {
        "command": "python benchmarks/gpu_suite.py" + (" --smoke" if smoke else ""),
        "commit": commit(),
        "card": None if smoke else card,
        "smoke": smoke,
        "versions": package_versions(PACKAGES),
        "written": time.strftime("%Y-%m-%d"),
        "sections": {},
    }
    if out.is_file():
        before = json.loads(out.read_text())
        same = before.get("smoke") == smoke and (before.get("card") or {}).get("name") == (head["card"] or {}).get(
            "name"
        )
        if not same:
            raise SystemExit(f"gpu_suite: {out} is of another card or a dry run; name another file with --out.")
        head["sections"] = before["sections"]
    return head


def slug(name: str) -> str:
    """A card's name as part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def offline() -> None:
    """Of a section's process: nothing is fetched."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


if __name__ == "__main__":
    sys.exit(main())
