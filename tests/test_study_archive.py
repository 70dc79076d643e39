"""A study goes on in a new directory from the scores that were kept: with the same report, and without the runs."""

from __future__ import annotations

import importlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from qdora.errors import UserError
from qdora.study.cells import Cell, Expander
from qdora.study.compare import Results
from qdora.study.grid import load_study
from qdora.study.page import Report
from qdora.study.report import read_report
from qdora.study.runner import run_cells
from qdora.study.study_directory import StudyDirectory, read_index
from qdora.study.upcoming import cells_now
from tests import fake_study

ROOT = Path(__file__).parent.parent
GUESSES = {"uniform": 6.9, "unigram": 4.2}


@pytest.fixture
def archive(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("study_archive")


def diverging(cell: Cell) -> float:
    is_lost = cell.kind == "trained" and cell.labels["base.quant"] == "fp4" and cell.labels["seed"] == "2"
    return float("nan") if is_lost else fake_study.truth(cell)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished study with every kind of cell, diverged runs and guesses."""
    dora = {"base.quant": ["nf4"], "adapter": ["dora"]}
    again = [{"name": kind, "cells": dora, "kind": kind} for kind in ("transplant", "rescaled", "set_back", "by_layer")]
    again.append({"name": "steps", "cells": dora | {"adapter": ["lora"]}, "kind": "by_layer", "steps": [1, 2]})
    made = fake_study.make(tmp_path_factory.mktemp("made"), stages=[{"name": "main"}, *again], nll=diverging)
    dense = next(cell["dense_key"] for cell in read_index(made)["cells"] if cell["kind"] == "base")
    folder = StudyDirectory(made).shared("guesses", dense)
    folder.mkdir(parents=True)
    (folder / "guesses.json").write_text(json.dumps(GUESSES))
    return made


def test_a_study_with_generated_answers_goes_on_without_them(archive: ModuleType, tmp_path: Path) -> None:
    product = fake_study.DOCUMENT["product"] | {"base.quant": ["nf4"]}
    made = fake_study.make(tmp_path / "made", product=product, generated=True)
    archive.unpack(archive.pack(made), tmp_path / "made/study.yaml", tmp_path / "study")
    whole, kept = (read_report(folder).tables["comparisons"] for folder in (made, tmp_path / "study"))
    assert {row["measure"] for row in whole} - {row["measure"] for row in kept} == {"right", "unparsable"}


def same(found: Report, expected: Report, name: str) -> bool:
    """Whether a table is the same, to the 1e-7 that rounded scores leave."""
    return _rows(found, name, lambda value: value) == _rows(
        expected, name, lambda value: pytest.approx(value, abs=1e-7, nan_ok=True)
    )


def _rows(report: Report, name: str, number: Callable[[float], Any]) -> list[dict[str, Any]]:
    def shown(value: Any) -> Any:
        if isinstance(value, str):
            return re.sub(r"-?\d+\.\d{7,}", lambda match: f"{float(match[0]):.6f}", value)
        return number(value) if isinstance(value, float) else value

    return [{key: shown(value) for key, value in row.items()} for row in report.tables[name]]


def test_the_report_stays_the_same(archive: ModuleType, made: Path, tmp_path: Path) -> None:
    before = read_report(made)
    number = archive.unpack(archive.pack(made), made.parent / "study.yaml", tmp_path / "study")
    after = read_report(tmp_path / "study")
    assert number == sum(row["status"] in ("done", "diverged") for row in before.tables["cells"])
    assert all(before.tables.values())
    for name in before.tables:
        assert same(after, before, name), name
    assert archive.pack(tmp_path / "study") == archive.pack(made)


@pytest.mark.parametrize(
    "kinds",
    [("trained", "transplant", "rescaled", "set_back", "by_layer"), ("rescaled",)],
)
def test_what_is_missing_runs_and_nothing_else(
    archive: ModuleType, made: Path, tmp_path: Path, kinds: tuple[str, ...]
) -> None:
    unfinished = tmp_path / "unfinished"
    shutil.copytree(made, unfinished)
    of_seed = [cell for cell in read_index(made)["cells"] if cell["labels"].get("seed") == "3"]
    lost = {cell["key"] for cell in of_seed if cell["kind"] in kinds}
    for key in lost:
        (unfinished / "results" / f"{key}.json").unlink()
    archive.unpack(archive.pack(unfinished), made.parent / "study.yaml", tmp_path / "study")
    store, ran = StudyDirectory(tmp_path / "study"), set()

    def work(cell: Cell, directory: Path) -> dict[str, Any]:
        ran.add(cell.key)
        return dict(fake_study.work_of(diverging)(cell, directory))

    expander = Expander(load_study(made.parent / "study.yaml"))
    results = Results(store, expander.study)
    for _ in range(3):  # cells that lay an adapter on another base come after it, and rescaled ones after these
        run_cells(cells_now(expander, results).cells, store, work)
    # Adapters are not kept, so what leaves one for a cell that is left runs again
    sources = {cell["adapter_key"] for cell in of_seed if cell["key"] in lost} - {None}
    sources |= {cell["adapter_key"] for cell in of_seed if cell["key"] in sources} - {None}
    assert sources
    assert ran == lost | sources
    assert same(read_report(tmp_path / "study"), read_report(made), "comparisons")


def test_a_directory_with_results_and_another_study_are_refused(
    archive: ModuleType, made: Path, tmp_path: Path
) -> None:
    packed = archive.pack(made)
    with pytest.raises(UserError, match="must have no results yet"):
        archive.unpack(packed, made.parent / "study.yaml", made)
    (tmp_path / "recipe.yaml").write_text((made.parent / "recipe.yaml").read_text())
    other = fake_study.DOCUMENT | {"settings": {"train.clip": 0.5, "eval.limit": 7}}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(other))
    with pytest.raises(UserError, match="no cell of the archive is in this study"):
        archive.unpack(packed, tmp_path / "study.yaml", tmp_path / "study")
