"""Studies whose cells are made up: scores with a truth that is known, written as runs write theirs, or trivial work.

    python -m tests.fake_study DIRECTORY NUM_CELLS SECONDS_A_CELL

runs cells with trivial work; tests start it and may kill it. Every start of a cell is a line in DIRECTORY/started.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from qdora.recipe.recipe_file import recipe_from
from qdora.recipe.settings import Recipe
from qdora.study.cells import Cell, Expander
from qdora.study.grid import load_study
from qdora.study.report import Report
from qdora.study.results import Results, StudyDirectory, cells_now, half_of, read_index
from qdora.study.run import Work, run_cells

RECIPE: dict[str, Any] = {
    "model": {"source": "org/model"},
    "data": {"mix": [{"source": "org/data"}]},
    "train": {"steps": 1, "batch": 7},
}
"""A valid recipe that is never run."""
NUM_EXAMPLES = {"piqa": 120, "sums": 80}
BITS = {"none": 16.0, "int8": 8.1, "nf4": 4.1, "fp4": 4.2}
LOST = {"none": 0.0, "int8": 0.01, "nf4": 0.1, "fp4": 0.4}
"""NLL per token that compressing costs after training. A transplanted adapter loses twice as much."""

ADAPTERS = {"lora": {"adapter.kind": "lora"}, "dora": {"adapter.kind": "dora"}}
DOCUMENT: dict[str, Any] = {
    "recipe": "recipe.yaml",
    "product": {"base.quant": [*LOST], "adapter": ADAPTERS},
    "seeds": [0, 1, 2, 3],
    "rates": {"values": [1e-4, 2e-4, 4e-4]},
    "compare": {"reference": "lora"},
    "retries": 0,
}
Truth = Callable[[Cell], float]
"""NLL per token of a cell, but for noise."""


def recipe(**train: Any) -> Recipe:
    return recipe_from(RECIPE | {"train": RECIPE["train"] | train})


def product(*quants: str) -> dict[str, Any]:
    """LoRA and DoRA on these bases."""
    return {"base.quant": [*quants], "adapter": ADAPTERS}


def truth(cell: Cell) -> float:
    """DoRA is 0.05 better than LoRA on nf4, the same on all else; 2e-4 is the best rate of both."""
    lost = LOST[cell.recipe.base.quant]
    if cell.kind == "base":
        return 2.0 + 3 * lost
    if cell.kind == "transplant":
        return 1.7 + 2 * lost
    value = 1.7 + lost
    if cell.recipe.adapter.kind == "dora" and cell.recipe.base.quant == "nf4":
        value -= 0.05
    return value + 0.04 * float(np.log2(cell.recipe.train.lr / 2e-4)) ** 2


def make(folder: Path, *, nll: Truth = truth, generated: bool = False, fail: str | None = None, **changes: Any) -> Path:
    """Run the made-up study; returns its directory. A cell whose truth is NaN has diverged.

    With `generated` there are also answers: DoRA names a choice in all of them, the others in half. A cell with the
    label `fail` fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    (folder / "study.yaml").write_text(yaml.safe_dump(DOCUMENT | changes, sort_keys=False))
    study = load_study(folder / "study.yaml")
    store = StudyDirectory(folder / "study", retries=study.retries)
    expander = Expander(study)
    results = Results(store, expander.study)
    num_cells = -1
    while len(cells := cells_now(expander, results).cells) > num_cells:
        num_cells = len(cells)
        run_cells(cells, store, work_of(nll, generated=generated, fail=fail))
    return folder / "study"


def diverging(*labels: str, kinds: tuple[str, ...] = ("trained",), nll: Truth = truth) -> Truth:
    """The truth, but cells of these kinds that have all these labels have diverged."""
    return lambda cell: math.nan if cell.kind in kinds and {*labels} <= {*cell.labels.values()} else nll(cell)


def forget(made: Path, *labels: str, kind: str = "trained") -> None:
    """Remove the results of the cells of a kind that have all these labels."""
    for cell in read_index(made)["cells"]:
        if cell["kind"] == kind and {*labels} <= {*cell["labels"].values()}:
            (made / "results" / f"{cell['key']}.json").unlink()


def work_of(nll: Truth = truth, *, generated: bool = False, fail: str | None = None) -> Work:
    """The work of a made-up cell; see `make`."""

    def work(cell: Cell, directory: Path) -> dict[str, Any]:
        if fail in cell.labels.values():
            raise RuntimeError("out of memory")
        value = nll(cell)
        if np.isnan(value):
            return {"diverged": "loss nan", "num_vocabulary": 1000}
        if cell.kind == "by_layer":
            return _measured_by_layer(cell)
        return _work(cell, directory, value, generated)

    return work


def _measured_by_layer(cell: Cell) -> dict[str, Any]:
    """Two blocks of two layers, of which the second matters more, and a head."""
    change = {"direction": 0.01, "magnitude": 0.001, "length": 0.002}
    if cell.recipe.base.quant != "none" and not cell.steps:
        change |= {"error_undone": 0.1, "error_undone_best": 0.3, "error_cosine": 0.2}
    names = [f"layers.{block}.{name}" for block in (0, 1) for name in ("q_proj", "o_proj")]
    changes, sizes = dict.fromkeys([*names, "lm_head"], change), ("linear_weights", "linear_bytes", "base_bytes")
    found = {"num_steps": 0, "final_loss": None, "num_trainable": 0, "compression": None, "nll": 2.0}
    found["size"] = {f"num_{name}": 1 for name in (*sizes, "adapter_bytes")}
    if cell.steps:
        checkpoints = [{"step": step, "nll": 2.0, "changes": changes} for step in cell.steps]
        return found | {"checkpoints": checkpoints, "changes": {}, "blocks": []}
    return found | {"changes": changes, "blocks": [{"block": block, "rise": 0.1 * (block + 1)} for block in (0, 1)]}


def _work(cell: Cell, directory: Path, nll: float, generated: bool) -> dict[str, Any]:
    draw = np.random.default_rng(int(cell.key, 16))
    is_base, quant = cell.kind == "base", cell.recipe.base.quant
    of_seed = 0.0 if is_base else np.random.default_rng(cell.recipe.train.seed).normal(scale=0.05)
    scored, answers = [], []
    for task, number in NUM_EXAMPLES.items():
        examples = np.random.default_rng(len(task))  # the same in all cells: how hard each example is
        tokens, hard = examples.integers(1, 6, number), examples.exponential(size=number)
        losses = nll + of_seed + hard - 1.0 + draw.normal(scale=0.05, size=number)
        for index, loss in enumerate(losses.tolist()):
            row = {"task": task, "id": str(index), "nll": loss * int(tokens[index])}
            row["num_answer_tokens"] = int(tokens[index])
            if task == "piqa":
                row |= {"acc": float(hard[index] < 1.2 - nll / 4), "acc_norm": float(hard[index] < 1.6 - nll / 3)}
                row |= {"gold": 0, "loglikelihoods": [-loss, -2.0]}
                formatted = cell.recipe.adapter.kind == "dora" or index % 2 == 0
                outcome = "unparsable" if not formatted else "right" if index % 4 == 0 else "wrong"
                answers.append({"task": task, "id": str(index), "outcome": outcome})
            scored.append(row)
    (directory / "eval").mkdir(parents=True, exist_ok=True)
    files = {"scores": "eval/step-1.json"} | ({"generated": "eval/generated.json"} if generated else {})
    for file, found in zip(files.values(), (scored, answers), strict=False):
        (directory / file).write_text(json.dumps({"per_example": found}))
    num_bytes = int(BITS[quant] * 2**17)
    size = {"num_linear_weights": 2**20, "num_linear_bytes": num_bytes, "num_base_bytes": num_bytes + 4096}
    compression: dict[str, Any] = {"base": {"sparsity": 0.0}, "trained": {"sparsity": 0.25}}
    return {
        "num_steps": 1,
        "final_loss": nll,
        "num_trainable": 10,
        "size": size | {"num_adapter_bytes": 2048 * cell.is_trained},
        "files": files,
        "compression": compression.get(cell.kind) if quant == "nf4" else None,
    }


def rows(report: Report, table: str, **labels: Any) -> list[dict[str, Any]]:
    """Rows of a table with these labels."""
    return [row for row in report.tables[table] if all(row.get(key) == value for key, value in labels.items())]


def compared(report: Report, quant: str, measure: str = "nll_per_token") -> dict[str, Any]:
    """The comparison of the arms on a base."""
    (row,) = rows(report, "comparisons", **{"base.quant": quant, "measure": measure})
    return row


def nll_of(made: Path, cell: dict[str, Any], half: str) -> float:
    """NLL per answer token of a cell on one half of its examples, from its file alone."""
    scored = json.loads((made / "cells" / cell["key"] / "eval/step-1.json").read_text())["per_example"]
    kept = [row for row in scored if half_of(f"{row['id']}#1") == half]
    return float(sum(row["nll"] for row in kept) / sum(row["num_answer_tokens"] for row in kept))


def numbered(number: int) -> list[Cell]:
    """Cells with keys of their own and one recipe."""
    shared = recipe()
    return [Cell(f"{index:016x}", {"train.seed": str(index)}, shared) for index in range(number)]


def run_numbered(directory: Path, number: int, seconds: float) -> None:
    """Run them: the result of each is the square of its number."""

    def work(cell: Cell, path: Path) -> dict[str, Any]:
        with (directory / "started").open("a") as stream:
            stream.write(f"{cell.key} {os.getpid()}\n")
        time.sleep(seconds)
        return {"value": int(cell.key, 16) ** 2}

    run_cells(numbered(number), StudyDirectory(directory), work)


if __name__ == "__main__":
    run_numbered(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
