"""One cell of a study: train (or only evaluate) a recipe, and keep what the comparison needs."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from qdora.record import RunDirectory
from qdora.study.grid import Cell
from qdora.study.runner import Work
from qdora.verbs.evaluate import evaluate_target
from qdora.verbs.selection import adapter_step
from qdora.verbs.train import train_run

_COMPRESSED = "base/compressed.json"


def cell_work(split: str) -> Work:
    """The work of a cell; with split "test" its adapter is also evaluated on the test examples."""

    def work(cell: Cell, directory: Path) -> dict[str, Any]:
        try:
            return _run(cell, directory, split)
        finally:  # the next cell loads a model of its own
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    return work


def _run(cell: Cell, directory: Path, split: str) -> dict[str, Any]:
    quiet = Console(quiet=True)
    run = RunDirectory(directory)
    resume = run.recipe_file.is_file() and run.has_begun
    summary = train_run(cell.recipe, directory, resume=resume, console=quiet)
    step = (adapter_step(run) or summary["num_steps"]) if cell.is_trained else 0
    files = {"validation": run.evaluation_file(step)}
    if split == "test":
        evaluate_target(str(directory), split="test", console=quiet)
        files["test"] = run.inside("eval", f"{'final' if cell.is_trained else 'base'}-test.json")
    generated = run.inside("eval", f"step-{step}-generated.json")
    if generated.is_file():
        files["generated"] = generated
    return {
        "num_steps": summary["num_steps"],
        "final_loss": summary["final_loss"],
        "num_trainable": summary["num_trainable"] if cell.is_trained else 0,
        "size": summary["size"],
        "files": {name: str(file.relative_to(directory)) for name, file in files.items()},
        "compression": _compression(run),
    }


def _compression(run: RunDirectory) -> dict[str, Any] | None:
    """What pruning left of every layer, where the base was pruned."""
    file = run.inside(_COMPRESSED)
    found: dict[str, Any] | None = json.loads(file.read_bytes()) if file.is_file() else None
    return found
