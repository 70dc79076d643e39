"""What the studies among the benchmarks share: common settings, the run of a study file, the kept report."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from byte_tokenizer import write_model
from frame import smoke_place
from measure import RESULTS
from study_archive import SCORES_FILE, hide_places, pack, unpack

from qdora.files.atomic import atomic_write_bytes, atomic_write_json, atomic_write_text
from qdora.recipe.data_settings import COMMONSENSE_TASKS
from qdora.study.report import read_report, report_run
from qdora.study.study_directory import StudyDirectory, read_index

RATES = {"values": [7e-4, 1.6e-3, 3.6e-3], "seeds": [1000]}
TRAINED_TASKS = tuple(task for task in COMMONSENSE_TASKS if task != "boolq")
"""BoolQ's training questions have no passages, its test questions do."""
SMOKE_RATES = {"values": [1e-3, 2e-3, 4e-3], "seeds": [1000], "extend": 0}
_SMOKE_TASKS = ("demo/facts",)
SMOKE_MIX = [{"task": task} for task in _SMOKE_TASKS]


def common_settings(args: argparse.Namespace, tasks: Sequence[str] | None = None) -> dict[str, Any]:
    """What all cells share; `args` has data, dir, steps, batch, limit and smoke."""
    tasks = tasks or (_SMOKE_TASKS if args.smoke else TRAINED_TASKS)
    place = {} if args.smoke else {task: {"path": str(args.data.resolve() / task)} for task in tasks}
    return {
        "model.source": write_model(args.dir / "model") if args.smoke else "builtin",
        "data.mix": [{"task": task} | place.get(task, {}) for task in tasks],
        "data.strategy": "equal",
        "data.max_length": 256,
        "data.too_long": "drop",
        "train.steps": args.steps,
        "train.batch": args.batch,
        "eval.limit": args.limit,
        "memory.checkpointing": False,
    }


def study_parser(doc: str | None, name: str, *, smoke: str) -> argparse.ArgumentParser:
    """Options of a study that `run_and_keep` runs; to be `parsed`.

    Args:
        doc: The script's docstring.
        name: Of the study's directory and of its kept results.
        smoke: What --smoke takes.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?", help="not needed with --smoke")
    parser.add_argument("--dir", type=Path, default=Path("runs/studies") / name)
    parser.add_argument("--out", type=Path, default=None, help=f"default: benchmarks/results/{name}")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--hours", type=float, default=None, help="interrupt the processes after so many")
    parser.add_argument("--report", action="store_true", help="only write DIR/report, of the cells that are done")
    parser.add_argument(
        "--resume-from", type=Path, default=None, help="an --out of this study: its cells go into --dir"
    )
    parser.add_argument("--smoke", action="store_true", help=f"{smoke}: shows that it runs")
    return parser


def run_and_keep(args: argparse.Namespace, document: dict[str, Any], head: dict[str, Any], name: str) -> None:
    """Run the study, and keep its report if all cells are done; `args` are those of `study_parser`."""
    has_ended = run_asked(args, document)
    if has_ended:
        report_run(args.dir)
    if has_ended and (args.out is not None or not args.report):
        keep(args.dir, args.out or (smoke_place(name) if args.smoke else RESULTS / name), head)


def run_asked(args: argparse.Namespace, document: dict[str, Any]) -> bool:
    """`run_cells` as the options of `study_parser` say, from what was kept elsewhere if they name it."""
    resume_kept(args, document)
    return run_cells(document, args.dir, 0 if args.report else args.processes, hours=args.hours)


def run_cells(document: dict[str, Any], directory: Path, processes: int = 1, *, hours: float | None = None) -> bool:
    """`qdora study` in some processes at once; grid.yaml is written to `directory`.

    After `hours` the processes are interrupted, and then the same call goes on. Returns whether they ended by
    themselves. SystemExit: one failed.
    """
    call = _command(document, directory)
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


def dry_run(args: argparse.Namespace, document: dict[str, Any]) -> None:
    """`qdora study --dry-run`: the cells and the time."""
    resume_kept(args, document)
    subprocess.run([*_command(document, args.dir), "--dry-run"], check=True)


def resume_kept(args: argparse.Namespace, document: dict[str, Any]) -> None:
    """Put what --resume-from names, which `keep` wrote, into --dir, unless it has results. UserError as `unpack`."""
    kept, directory = args.resume_from, args.dir
    if kept is None:
        return
    if any((directory / "results").glob("*.json")):
        print(f"{kept} is not read, since {directory} has results")
        return
    if not (kept / SCORES_FILE).is_file():
        raise SystemExit(f"--resume-from {kept}: has no {SCORES_FILE}; it must be an --out of this study.")
    _command(document, directory)
    number = unpack((kept / SCORES_FILE).read_bytes(), directory / "grid.yaml", directory)
    print(f"{number} finished cells taken from {kept}")


def _command(document: dict[str, Any], directory: Path) -> list[str]:
    file = directory / "grid.yaml"
    atomic_write_text(file, yaml.safe_dump(document, sort_keys=False))
    return [sys.executable, "-m", "qdora.cli", "study", str(file), "--dir", str(directory)]


def keep(directory: Path, out: Path, head: dict[str, Any]) -> None:
    """`keep_scores` with the report and its answer."""
    keep_scores(directory, out, head | {"answer": read_report(directory).answer}, report=directory / "report")


def keep_scores(directory: Path, out: Path, head: dict[str, Any], *, report: Path | None = None) -> None:
    """The grid without the paths of this machine, and all scores; run.json says how many cells are done."""
    if out.exists():
        shutil.rmtree(out)
    if report is None:
        out.mkdir(parents=True)
    else:
        shutil.copytree(report, out)
    document = yaml.safe_load((directory / "grid.yaml").read_text(encoding="utf-8"))
    hide_places(document)
    atomic_write_text(out / "grid.yaml", yaml.safe_dump(document, sort_keys=False))
    index, store = read_index(directory), StudyDirectory(directory, makes=False)
    number = len(index["cells"]) + sum(index["num_waiting"].values())
    cells = {"cells": number, "cells_done": store.num_done({cell["key"] for cell in index["cells"]})}
    atomic_write_json(out / "run.json", head | cells)
    atomic_write_bytes(out / SCORES_FILE, pack(directory))
    print(f"kept in {out}")
