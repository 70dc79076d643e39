"""A process that runs the cells of a study with trivial work; started by tests, which may kill it.

    python -m tests.study_worker DIRECTORY NUM_CELLS SECONDS_A_CELL

Every start of a cell's work is a line in DIRECTORY/started, so that a test can count them.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

from qdora.recipe.recipe_file import recipe_from
from qdora.recipe.settings import Recipe
from qdora.study.cells import Cell
from qdora.study.runner import run_cells
from qdora.study.study_directory import StudyDirectory

DOCUMENT: dict[str, Any] = {
    "model": {"source": "org/model"},
    "data": {"mix": [{"source": "org/data"}]},
    "train": {"steps": 1, "batch": 7},
}


def recipe(**train: Any) -> Recipe:
    """A valid recipe that is never run."""
    return recipe_from(DOCUMENT | {"train": DOCUMENT["train"] | train})


def cells(number: int) -> list[Cell]:
    """Cells with keys of their own and one recipe."""
    shared = recipe()
    return [Cell(f"{index:016x}", {"train.seed": str(index)}, shared) for index in range(number)]


def main(directory: Path, number: int, seconds: float) -> None:
    """Run them."""

    def work(cell: Cell, path: Path) -> dict[str, Any]:
        with (directory / "started").open("a") as stream:
            stream.write(f"{cell.key} {os.getpid()}\n")
        time.sleep(seconds)
        return {"value": int(cell.key, 16) ** 2}

    run_cells(cells(number), StudyDirectory(directory), work)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
