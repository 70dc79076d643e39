"""What the studies among the benchmarks share: common settings, two passes over one directory, the kept report."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from curvature import write_small_model
from mixed_data import TASKS

from qdora.files.atomic import atomic_write_json, atomic_write_text
from qdora.study.compare import Results, find_arms
from qdora.study.grid import expand, load_study
from qdora.study.report import report_run
from qdora.study.study_directory import StudyDirectory

RATES = (1e-3, 3e-3, 6e-3)
SEEDS = (0, 1, 2)
Run = Callable[[Path, Path], Any]
"""Runs the study of a file in a directory, as `qdora study` does."""


def common_settings(args: argparse.Namespace) -> dict[str, Any]:
    """What all cells share; `args` has data, dir, steps, batch, limit and smoke."""
    if args.smoke:
        mix: list[dict[str, Any]] = [{"task": "demo/facts", "limit": 40}]
        model = write_small_model(args.dir / "model")
    else:
        mix = [{"task": task, "path": str(args.data.resolve() / task), "limit": 2000} for task in TASKS]
        model = "builtin"
    return {
        "model.source": model,
        "data.mix": mix,
        "data.strategy": "equal",
        "data.max_length": 256,
        "data.too_long": "drop",
        "train.steps": args.steps,
        "train.batch": args.batch,
        "eval.limit": args.limit,
        "eval.at_start": False,
        "memory.checkpointing": False,
    }


def two_passes(document: dict[str, Any], directory: Path, run: Run) -> None:
    """Every learning rate with the first seed, then the other seeds of every trained arm at the rate chosen for it.

    Args:
        document: The first pass as a study file, with `RATES` and the first of `SEEDS`.
        directory: Of the study; grid.yaml and report/ are written there.
        run: See `Run`.
    """
    file = directory / "grid.yaml"
    for include in (list, lambda: _other_seeds(directory)):
        atomic_write_text(file, yaml.safe_dump(document | {"include": include()}, sort_keys=False))
        run(file, directory)
    report_run(directory)


def _other_seeds(directory: Path, seeds: Sequence[int] = SEEDS[1:]) -> list[dict[str, Any]]:
    study = load_study(directory / "grid.yaml")
    cells = [cell.record() for cell in expand(study)]
    arms = find_arms(cells, study.compare, Results(StudyDirectory(directory), "validation"))
    return [
        {
            **arm.context,
            study.compare.arm: arm.name,
            "train.lr": float(arm.chosen["train.lr"]),
            "train.seed": list(seeds),
        }
        for arm in arms
        if arm.is_trained
    ]


def keep(directory: Path, out: Path, head: dict[str, Any]) -> None:
    """The report and the grid, without the paths of this machine."""
    if out.exists():
        shutil.rmtree(out)
    shutil.copytree(directory / "report", out)
    document = yaml.safe_load((directory / "grid.yaml").read_text(encoding="utf-8"))
    for source in document["settings"]["data.mix"]:
        if "path" in source:
            source["path"] = f"DATA/{source['task']}"
    atomic_write_text(out / "grid.yaml", yaml.safe_dump(document, sort_keys=False))
    atomic_write_json(out / "run.json", head)
    print(json.dumps(head))
