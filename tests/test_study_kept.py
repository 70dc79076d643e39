"""Every cell that is committed in benchmarks/results/study stays done, whatever settings and digests come later.

A key is a hash of a cell's recipe, with the absolute path of the data, and of the data. kept_keys.json has for each
committed cell the key that it has with the data at /DATA, where no file is. When cells have been added to the results:

    python -m tests.test_study_kept
"""

from __future__ import annotations

import importlib
import json
import lzma
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import yaml

from qdora.study.cells import Cell, Expander
from qdora.study.compare import Results
from qdora.study.grid import load_study
from qdora.study.outlook import planned_cells, stage_times
from qdora.study.study_directory import StudyDirectory

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
RESULTS = BENCHMARKS / "results/study"
KEYS = Path(__file__).with_name("kept_keys.json")


def committed_cells() -> list[dict[str, Any]]:
    """Cells of the archive that have a result."""
    cells = json.loads(lzma.decompress((RESULTS / "scores.json.xz").read_bytes()))["cells"]
    return [each for each in cells if each["result"] is not None]


def study_without_data(grid: Path, folder: Path) -> Expander:
    """The study of a grid with the data at /DATA; its file is written to the folder."""
    document = yaml.safe_load(grid.read_text())
    for source in document["settings"]["data.mix"]:
        source["path"] = f"/{source['path']}"
    (folder / "grid.yaml").write_text(yaml.safe_dump(document, sort_keys=False))
    return Expander(load_study(folder / "grid.yaml"))


@pytest.mark.parametrize(
    "grid",
    [RESULTS / "grid.yaml", pytest.param(BENCHMARKS / "grids/compressed.yaml", marks=pytest.mark.slow)],
    ids=lambda path: path.parent.name,
)
def test_every_committed_cell_is_done(grid: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    cells, keys = committed_cells(), json.loads(KEYS.read_text())
    assert {each["cell"]["key"] for each in cells} == set(keys)
    assert len(cells) >= 194
    text = json.dumps([each["cell"] for each in cells])
    for old, new in keys.items():
        text = text.replace(f'"{old}"', f'"{new}"')
    kept = [each | {"cell": cell} for each, cell in zip(cells, json.loads(text), strict=True)]
    expander = study_without_data(grid, tmp_path)
    unpack = importlib.import_module("study_archive").unpack
    packed = lzma.compress(json.dumps({"cells": kept, "guesses": {}}).encode(), preset=0)
    unpack(packed, tmp_path / "grid.yaml", tmp_path / "study")
    results = Results(StudyDirectory(tmp_path / "study"), expander.study)
    planned = planned_cells(expander, results).cells
    assert {cell.key for cell in planned} >= set(keys.values())
    assert sum(stage.num_done for stage in stage_times(planned, results)) == len(cells)


def main() -> None:
    """Write kept_keys.json."""
    committed = {identity(each["cell"]): each for each in committed_cells()}

    def loss(cell: Cell) -> float:
        scores = committed[identity(cell.record())]["scores"]
        return float(sum(scores["nll"]) / sum(scores["num_answer_tokens"]))

    with TemporaryDirectory() as folder:
        planned = study_without_data(RESULTS / "grid.yaml", Path(folder)).now(loss, lambda _: True)
    found = {identity(cell.record()): cell.key for cell in planned.cells}
    keys = {each["cell"]["key"]: found[name] for name, each in committed.items()}
    assert len(keys) == len(committed) == len(set(keys.values()))
    KEYS.write_text(json.dumps(keys, indent=0) + "\n")


def identity(cell: Mapping[str, Any]) -> str:
    """Kind and labels of a cell."""
    return json.dumps([cell["kind"], cell["labels"]], sort_keys=True)


if __name__ == "__main__":
    main()
