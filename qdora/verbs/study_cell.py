"""One cell of a study: train (or only evaluate) a recipe, and keep what the comparison needs."""

from __future__ import annotations

import gc
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from qdora.model.compress import quantized_layers
from qdora.model.load import Quantization
from qdora.record import RunDirectory
from qdora.study.grid import Cell
from qdora.study.runner import Work, once
from qdora.study.store import StudyDirectory
from qdora.verbs.assemble import find_model
from qdora.verbs.evaluate import evaluate_target
from qdora.verbs.pruned_base import SharedBases
from qdora.verbs.selection import adapter_step
from qdora.verbs.train import train_run

_COMPRESSED = "base/compressed.json"


def cell_work(split: str, store: StudyDirectory) -> Work:
    """The work of a cell; with split "test" its adapter is also evaluated on the test examples.

    Pruned bases are made once in the study's directory and shared by all cells that start from the same one.
    """

    def work(cell: Cell, directory: Path) -> dict[str, Any]:
        try:
            return _run(cell, directory, split, partial(once, store, "bases"))
        finally:  # the next cell loads a model of its own
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    return work


def _run(cell: Cell, directory: Path, split: str, shared_bases: SharedBases) -> dict[str, Any]:
    quiet = Console(quiet=True)
    run = RunDirectory(directory)
    resume = run.recipe_file.is_file() and run.has_begun
    summary = train_run(cell.recipe, directory, resume=resume, console=quiet, shared_bases=shared_bases)
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
        "compression": _compression(run, cell),
    }


def _compression(run: RunDirectory, cell: Cell) -> dict[str, Any] | None:
    """What pruning left of every layer, where the base was pruned; of a base by itself also what quantising left."""
    file = run.inside(_COMPRESSED)
    if file.is_file():
        found: dict[str, Any] = json.loads(file.read_bytes())
        return found
    base = cell.recipe.base
    if cell.is_trained or base.quant == "none":
        return None
    wanted = Quantization(base.quant, base.block_size, base.double_quant, base.skip)
    layers = quantized_layers(find_model(cell.recipe)[0], wanted)
    return {"layers": layers} if layers else None
