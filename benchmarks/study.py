"""How far can a base be quantised and pruned before an adapter stops repairing it, and does DoRA go farther than LoRA?

DATA holds <task>/<split>.parquet in the schema of `qdora guide own-data`. A `qdora study` of grids/compressed.yaml, or
of another --grid. After --hours the processes are interrupted; the same command goes on. When all cells are done, the
report, the grid and the scores of every cell are copied to --out. --report writes the report of the cells that are done
into the study's directory, and copies it only if --out is given. --resume-from OUT goes on in a new --dir from what
was kept there, such as on another machine: DATA must be at the same path. With --report it writes the report anew.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml
from byte_tokenizer import write_model
from frame import smoke_place
from measure import RESULTS, facts
from study_archive import SCORES_FILE, hide_places, pack, unpack
from tables.study import draw_checkpoints

from qdora.files.atomic import atomic_write_bytes, atomic_write_json, atomic_write_text
from qdora.study.report import read_report, report_run
from qdora.study.results import StudyDirectory, read_index

GRIDS = Path(__file__).resolve().parent / "grids"
NAME = "study"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?", help="not needed with --smoke")
    parser.add_argument("--grid", type=Path, default=GRIDS / "compressed.yaml")
    parser.add_argument("--model", help="in the place of MODEL, where a grid names one")
    parser.add_argument("--dir", type=Path, default=Path("runs/studies/compressed"))
    parser.add_argument("--out", type=Path, help=f"default: benchmarks/results/{NAME}")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--hours", type=float, help="interrupt the processes after so many")
    parser.add_argument("--report", action="store_true", help="only write DIR/report, of the cells that are done")
    parser.add_argument("--resume-from", type=Path, help="an --out of this study: its cells go into --dir")
    parser.add_argument("--dry-run", action="store_true", help="only print the cells and the time")
    parser.add_argument("--smoke", action="store_true", help="a random model and few cells: shows that it runs")
    args = parser.parse_args()
    if not args.smoke and args.data is None:
        parser.error("DATA is missing")
    args.dir.mkdir(parents=True, exist_ok=True)
    document = yaml.safe_load(args.grid.read_text(encoding="utf-8"))
    document = smoke_grid(document, args.dir) if args.smoke else with_data(document, args.data, args.model)
    call = [sys.executable, "-m", "qdora.cli", "study", str(args.dir / "grid.yaml"), "--dir", str(args.dir)]
    atomic_write_text(args.dir / "grid.yaml", yaml.safe_dump(document, sort_keys=False))
    if args.resume_from is not None:
        take_kept(args.resume_from, args.dir)
    if args.dry_run:
        subprocess.run([*call, "--dry-run"], check=True)
        return
    grid, root = args.grid.resolve(), GRIDS.parent.parent
    name = str(grid.relative_to(root)) if grid.is_relative_to(root) else grid.name  # no folders of this machine
    command = f"python benchmarks/study.py DATA --grid {shlex.quote(name)}{' --model MODEL' * bool(args.model)}"
    head = facts(command)
    if args.report and args.resume_from is not None:  # nothing runs: the scores are of the machine that made them
        head = json.loads((args.resume_from / "run.json").read_text()) | {"command": command}
    if run_cells(call, 0 if args.report else args.processes, args.hours):
        report_run(args.dir)
        if args.out is not None or not args.report:
            keep(args.dir, args.out or (smoke_place(NAME) if args.smoke else RESULTS / NAME), head)
    if (RESULTS / NAME / "checkpoints.csv").is_file():
        draw_checkpoints(RESULTS / NAME / "checkpoints.svg")


def with_data(document: dict[str, Any], data: Path, model: str | None) -> dict[str, Any]:
    """The study file with the folder of the data in the place of DATA, and that of the model in the place of MODEL."""
    mix = []
    for source in document["settings"]["data.mix"]:
        key = "path" if "path" in source else "source"
        mix.append(source | {key: str(data.resolve() / Path(source[key]).relative_to("DATA"))})
    changed = {"data.mix": mix} | ({"model.source": model} if model else {})
    return document | {"settings": document["settings"] | changed}


def smoke_grid(document: dict[str, Any], directory: Path) -> dict[str, Any]:
    """Two steps of a random model on a few of the bases and adapters, with all rules of the study file."""
    settings = document["settings"] | {
        "model.source": write_model(directory / "model"),
        "data.mix": [{"task": "demo/facts"}],
        "train.batch": 4,
        "eval.limit": 2,
    }
    bases, adapters = ["16 bits", "nf4", "Wanda 2:4"], ["LoRA", "DoRA", "DoRA, masked"]
    product = {
        "base": {name: document["product"]["base"][name] for name in bases},
        "adapter": {name: document["product"]["adapter"][name] for name in adapters},
        "length": {"128 steps": {"train.steps": 2}},
    }
    over = {"arm": "DoRA", "over": {"base": bases[1:]}}
    stages = [
        {"name": "main", "cells": {"adapter": ["LoRA", "DoRA"]}},
        {"name": "transplants", "cells": {"base": ["Wanda 2:4"], "adapter": ["LoRA", "DoRA"]}, "kind": "transplant"},
        {"name": "masks", "cells": {"base": ["Wanda 2:4"], "adapter": ["DoRA, masked"]}},
    ]
    rates = {"values": [1e-3, 2e-3, 4e-3], "seeds": [1000], "extend": 0}
    like = {"adapter": {"DoRA, masked": "DoRA"}, "base": {"nf4": "16 bits"}}
    primary = {"over": over, "beyond": over | {"minus": {"base": "16 bits"}}}
    return document | {
        "settings": settings,
        "product": product,
        "seeds": [0, 1, 2],
        "stages": stages,
        "rates": rates | {"like": like},
        "compare": document["compare"] | {"primary": primary},
    }


def take_kept(kept: Path, directory: Path) -> None:
    """Put the cells that `keep` wrote elsewhere into a study's directory, unless it has results."""
    if any((directory / "results").glob("*.json")):
        print(f"{kept} is not read, since {directory} has results")
        return
    if not (kept / SCORES_FILE).is_file():
        raise SystemExit(f"--resume-from {kept}: has no {SCORES_FILE}; it must be an --out of this study.")
    number = unpack((kept / SCORES_FILE).read_bytes(), directory / "grid.yaml", directory)
    print(f"{number} finished cells taken from {kept}")


def run_cells(call: list[str], processes: int, hours: float | None) -> bool:
    """`qdora study` in some processes at once, interrupted after `hours`; whether they ended by themselves."""
    started = [subprocess.Popen(call) for _ in range(processes)]
    until = None if hours is None else time.monotonic() + 3600 * hours
    try:
        codes = [each.wait(None if until is None else max(0.0, until - time.monotonic())) for each in started]
    except subprocess.TimeoutExpired:
        for each in started:
            each.terminate()  # a run in its training keeps a checkpoint
        for each in started:
            each.wait()
        print(f"interrupted after {hours} hours; the same command goes on")
        return False
    if any(codes):
        raise SystemExit(f"qdora study ended with {codes}; the same command goes on")
    return True


def keep(directory: Path, out: Path, head: dict[str, Any]) -> None:
    """The report, the grid without the paths of this machine, and all scores; run.json says how many cells are done."""
    if out.exists():
        shutil.rmtree(out)
    shutil.copytree(directory / "report", out)
    document = yaml.safe_load((directory / "grid.yaml").read_text(encoding="utf-8"))
    hide_places(document)
    atomic_write_text(out / "grid.yaml", yaml.safe_dump(document, sort_keys=False))
    index, store = read_index(directory), StudyDirectory(directory, makes=False)
    number = len(index["cells"]) + sum(index["num_waiting"].values())
    cells = {"cells": number, "cells_done": store.num_done({cell["key"] for cell in index["cells"]})}
    atomic_write_json(out / "run.json", head | {"answer": read_report(directory).answer} | cells)
    atomic_write_bytes(out / SCORES_FILE, pack(directory))
    print(f"kept in {out}")


if __name__ == "__main__":
    main()
