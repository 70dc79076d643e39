"""How far can a base be quantised and pruned before an adapter stops repairing it, and does DoRA go farther than LoRA?

    python benchmarks/study.py DATA [--dir runs/studies/compressed] [--processes 2] [--hours 2.4] [--dry-run]

DATA holds <task>/<split>.parquet in the schema of `qdora guide own-data`. A `qdora study` of grids/compressed.yaml, or
of another --grid. After --hours the processes are interrupted; the same command goes on. When all cells are done, the
report, the grid and the scores of every cell are copied to --out. --report writes the report of the cells that are done
into the study's directory, and copies it only if --out is given. --resume-from OUT goes on in a new --dir from what
was kept there, such as on another machine: DATA must be at the same path. With --report it writes the report anew.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import yaml
from byte_tokenizer import write_model
from measure import facts, parsed
from shared_study import SMOKE_MIX, SMOKE_RATES, dry_run, run_and_keep, study_parser
from tables.compressed import draw_checkpoints
from tables.table import RESULTS

GRIDS = Path(__file__).resolve().parent / "grids"
NAME = "study"


def main() -> None:
    """The study and its report."""
    parser = study_parser(__doc__, NAME, smoke="a random model and few cells")
    parser.add_argument("--grid", type=Path, default=GRIDS / "compressed.yaml")
    parser.set_defaults(dir=Path("runs/studies/compressed"))
    parser.add_argument("--dry-run", action="store_true", help="only print the cells and the time")
    args = parsed(parser)
    args.dir.mkdir(parents=True, exist_ok=True)
    document = yaml.safe_load(args.grid.read_text(encoding="utf-8"))
    document = smoke_grid(document, args.dir) if args.smoke else with_data(document, args.data)
    if args.dry_run:
        dry_run(args, document)
        return
    grid = args.grid.resolve()
    root = GRIDS.parent.parent
    name = str(grid.relative_to(root)) if grid.is_relative_to(root) else grid.name  # no folders of this machine
    command = f"python benchmarks/study.py DATA --grid {shlex.quote(name)}"
    head = facts(command)
    if args.report and args.resume_from is not None:  # nothing runs: the scores are of the machine that made them
        head = json.loads((args.resume_from / "run.json").read_text()) | {"command": command}
    run_and_keep(args, document, head, NAME)
    if (RESULTS / NAME / "checkpoints.csv").is_file():
        draw_checkpoints(RESULTS / NAME / "checkpoints.svg")


def with_data(document: dict[str, Any], data: Path) -> dict[str, Any]:
    """The study file with the folder of the data in the place of DATA."""
    mix = []
    for source in document["settings"]["data.mix"]:
        key = "path" if "path" in source else "source"
        mix.append(source | {key: str(data.resolve() / Path(source[key]).relative_to("DATA"))})
    return document | {"settings": document["settings"] | {"data.mix": mix}}


def smoke_grid(document: dict[str, Any], directory: Path) -> dict[str, Any]:
    """Two steps of a random model on a few of the bases and adapters, with all rules of the study file."""
    settings = document["settings"] | {
        "model.source": write_model(directory / "model"),
        "data.mix": SMOKE_MIX,
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
    return document | {
        "settings": settings,
        "product": product,
        "seeds": [0, 1, 2],
        "stages": stages,
        "rates": SMOKE_RATES | {"like": {"adapter": {"DoRA, masked": "DoRA"}, "base": {"nf4": "16 bits"}}},
        "compare": document["compare"] | {"primary": {"over": over, "beyond": over | {"minus": {"base": "16 bits"}}}},
    }


if __name__ == "__main__":
    main()
