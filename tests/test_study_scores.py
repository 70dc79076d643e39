"""The kept scores of a study: it continues from them, a second program finds its numbers, cells keep their names."""

from __future__ import annotations

import hashlib
import importlib
import json
import lzma
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from qdora.errors import UserError
from qdora.study.cells import Cell, Expander
from qdora.study.grid import load_study
from qdora.study.report import read_report, write_report
from qdora.study.results import Results, StudyDirectory, cells_now, read_index
from qdora.study.run import run_cells
from tests import fake_study
from tests.fake_study import diverging, forget, product

ROOT = Path(__file__).parent.parent
SCRIPT, RESULTS = ROOT / "benchmarks/recompute_study.py", ROOT / "benchmarks/results/study"
LOST = diverging("fp4", "dora", "2")
PRIMARY: dict[str, Any] = {
    "over all": {"over": {"base.quant": ["int8", "nf4", "fp4"]}},
    "beyond 16 bits": {"arm": "dora", "over": {"base.quant": ["nf4"]}, "minus": {"base.quant": "none"}},
}
PRIMARY["beyond 16 bits"]["family"] = "later"
AGAIN = {"base.quant": ["nf4"], "adapter": ["dora"]}
STAGES: list[dict[str, Any]] = [
    {"name": "main"},
    {"name": "moved", "cells": {"base.quant": ["nf4", "fp4"]}, "kind": "transplant"},
    *({"name": kind, "cells": AGAIN, "kind": kind} for kind in ("rescaled", "set_back", "by_layer")),
    {"name": "steps", "cells": AGAIN, "kind": "by_layer", "steps": [1, 2]},
]
WHOLE = {"compare": {"reference": "lora", "primary": PRIMARY}, "stages": STAGES, "nll": LOST}


@pytest.fixture
def archive(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("study_archive")


@pytest.fixture(scope="module")
def whole_study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_study.make(tmp_path_factory.mktemp("whole"), **WHOLE)


def recomputed(folder: Path) -> tuple[int, str]:
    """Exit code and output of the second program, without this project on the path: it needs numpy alone."""
    run = subprocess.run([sys.executable, "-I", str(SCRIPT), str(folder)], capture_output=True, text=True, timeout=200)
    return run.returncode, run.stdout + run.stderr


def assert_same_tables(one: Path, other: Path, *names: str) -> None:
    """To the 1e-7 that rounded scores leave; texts with all digits are left out."""
    found, expected = read_report(one).tables, read_report(other).tables
    for name in names or expected:
        frames = (pd.DataFrame(each[name]) for each in (found, expected))
        frames = (frame.drop(columns="seed_improvements", errors="ignore") for frame in frames)
        pd.testing.assert_frame_equal(*frames, rtol=0, atol=1e-7)


def test_a_study_continues_from_its_scores_and_only_what_lacks_runs(
    archive: Any, whole_study: Path, tmp_path: Path
) -> None:
    made, study = whole_study, whole_study.with_name("study.yaml")
    cells, packed = read_index(made)["cells"], archive.pack(made)
    assert archive.unpack(packed, study, tmp_path / "whole") == len(cells)
    assert_same_tables(tmp_path / "whole", made)
    assert archive.pack(tmp_path / "whole") == packed
    with pytest.raises(UserError, match="must have no results yet"):
        archive.unpack(packed, study, made)
    shutil.copytree(made, tmp_path / "unfinished")
    forget(tmp_path / "unfinished", "3", kind="rescaled")
    archive.unpack(archive.pack(tmp_path / "unfinished"), study, tmp_path / "continued")
    store, expander, ran = StudyDirectory(tmp_path / "continued"), Expander(load_study(study)), set()

    def work(cell: Cell, directory: Path) -> dict[str, Any]:
        ran.add(cell.key)
        return dict(fake_study.work_of(LOST)(cell, directory))

    for _ in range(3):
        run_cells(cells_now(expander, Results(store, expander.study)).cells, store, work)
    # Adapters are not kept, so what leaves one for a cell that lacks runs again
    by_key = {cell["key"]: cell for cell in cells}
    (lost,) = [cell for cell in cells if cell["kind"] == "rescaled" and cell["labels"]["seed"] == "3"]
    assert ran == {lost["key"], lost["adapter_key"], by_key[lost["adapter_key"]]["adapter_key"]}
    assert_same_tables(tmp_path / "continued", made, "comparisons", "repair")


TWO_BASES = {"product": product("none", "nf4")}
OWN_SEEDS = {"own": {"arm": "dora", "over": {"base.quant": "nf4"}, "seeds": [4, 5], "family": "later"}}
MORE = {"stages": [{"name": "main"}, {"name": "more", "cells": {"seed": [0, 1, 2, 3, 4, 5]}}]}
COMPARED = ["improvement", "lower", "upper", "p_seeds", "p_examples", "p_equivalent", "p_holm", "smallest_detectable"]
CHANGED = [("comparisons", "upper", 3e-6), ("comparisons", "verdict", "none"), ("repair", "left", 3e-6)]


@pytest.mark.parametrize(
    "changes, num_primary",
    [
        (WHOLE, 2),
        (TWO_BASES | {"compare": {"reference": "lora", "tasks": "equal"}}, 2),
        (TWO_BASES | {"compare": {"reference": "lora", "metric": "acc_norm"}}, 2),
        (TWO_BASES | MORE | {"compare": {"reference": "lora", "metric": "acc", "primary": OWN_SEEDS, "zone": 0.1}}, 1),
    ],
    ids=["whole", "equal", "acc_norm", "later seeds"],
)
def test_a_second_program_finds_every_number_and_any_that_was_changed(
    archive: Any, whole_study: Path, tmp_path: Path, changes: dict[str, Any], num_primary: int
) -> None:
    made = whole_study if changes is WHOLE else fake_study.make(tmp_path / "made", **changes)
    report = read_report(made)
    write_report(report, tmp_path, "a study")
    (tmp_path / "scores.json.xz").write_bytes(archive.pack(made))
    code, output = recomputed(tmp_path)
    assert code == 0, output
    primary = [row for row in report.tables["comparisons"] if row["role"] == "primary"]
    assert ["without a result" in row["reason"] for row in primary] == [False] * num_primary
    told = pd.DataFrame(report.tables["comparisons"])[COMPARED].notna().sum().sum()
    assert json.loads(output.splitlines()[-1])["numbers"] >= told
    if changes is not WHOLE:
        return
    for file, column, new in CHANGED:
        rows = pd.read_csv(tmp_path / f"{file}.csv")
        row = rows[column].first_valid_index()
        rows.loc[row, column] = new if isinstance(new, str) else rows.loc[row, column] + new
        rows.to_csv(tmp_path / f"{file}.csv", index=False)
    code, output = recomputed(tmp_path)
    assert (code, [column for _, column, _ in CHANGED if f"{column} is" not in output]) == (1, [])


def test_the_pages_say_what_the_committed_scores_do() -> None:
    code, output = recomputed(RESULTS)
    assert code == 0, output
    assert json.loads(output.splitlines()[-1])["numbers"] > 1300


@pytest.mark.parametrize(
    "grid",
    [RESULTS / "grid.yaml", pytest.param(ROOT / "benchmarks/grids/compressed.yaml", marks=pytest.mark.slow)],
    ids=lambda path: path.parent.name,
)
def test_every_committed_cell_keeps_its_name(grid: Path, tmp_path: Path) -> None:
    """With another digest, finished studies would start anew; it also changes when cells are added to the results."""
    document = yaml.safe_load(grid.read_text())  # names are hashes of recipes and data: here of none, at /DATA
    for source in document["settings"]["data.mix"]:
        source["path"] = f"/{source['path']}"
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(document, sort_keys=False))
    archive = json.loads(lzma.decompress((RESULTS / "scores.json.xz").read_bytes()))
    committed = {identity(each["cell"]): each for each in archive["cells"] if each["result"] is not None}

    def loss(cell: Cell) -> float | None:
        scores = committed.get(identity(cell.record()), {}).get("scores")
        return None if scores is None else float(sum(scores["nll"]) / sum(scores["num_answer_tokens"]))

    planned = Expander(load_study(tmp_path / "grid.yaml")).now(loss).cells
    keys = {identity(cell.record()): cell.key for cell in planned}
    names = "\n".join(sorted(keys[name] for name in committed))
    assert len(committed) == 258
    assert hashlib.sha256(names.encode()).hexdigest()[:16] == "fa3dca3d0a893ec2"


def identity(cell: Mapping[str, Any]) -> str:
    """Kind and labels of a cell."""
    return json.dumps([cell["kind"], cell["labels"]], sort_keys=True)
