"""The second program finds the numbers of a report anew, and any that was changed."""

from __future__ import annotations

import csv
import json
import lzma
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qdora.study.cells import Cell
from qdora.study.report import read_report, write_report
from tests import fake_study

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "benchmarks/recompute_study.py"
PRIMARY = {
    "over all": {"over": {"base.quant": ["int8", "nf4", "fp4"]}},
    "beyond 16 bits": {"arm": "dora", "over": {"base.quant": ["nf4"]}, "minus": {"base.quant": "none"}},
}


def kept(folder: Path, **changes: Any) -> Path:
    """The report and the packed scores of a made-up study."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        from shared_study import SCORES_FILE, packed_scores
    finally:
        sys.path.pop(0)
    made = fake_study.make(folder / "made", **changes)
    write_report(read_report(made), folder / "kept", "a study")
    (folder / "kept" / SCORES_FILE).write_bytes(packed_scores(made))
    return folder / "kept"


def recomputed(folder: Path) -> subprocess.CompletedProcess[str]:
    """Without this project on the path: it must not need it."""
    return subprocess.run([sys.executable, "-I", str(SCRIPT), str(folder)], capture_output=True, text=True, timeout=120)


def diverging(cell: Cell) -> float:
    """One compared run of fp4 has diverged."""
    is_lost = cell.kind == "trained" and cell.labels["base.quant"] == "fp4" and cell.labels["seed"] == "2"
    return float("nan") if is_lost and cell.labels["adapter"] == "dora" else fake_study.truth(cell)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return kept(tmp_path_factory.mktemp("kept"), compare={"reference": "lora", "primary": PRIMARY}, nll=diverging)


def test_it_imports_numpy_alone() -> None:
    lines = SCRIPT.read_text().splitlines()
    imported = {line.split()[1].partition(".")[0] for line in lines if line.startswith(("import ", "from "))}
    assert imported - set(sys.stdlib_module_names) == {"numpy"}


def test_it_agrees(folder: Path) -> None:
    run = recomputed(folder)
    assert run.returncode == 0, run.stdout + run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["numbers"] == 2 * 8 + 4 * 6 + 6 * 3  # primary comparisons, all others, damage left of three bases
    assert found["largest_difference"] < 1e-6


@pytest.mark.parametrize(
    "compare",
    [
        {"reference": "lora", "tasks": "equal"},
        {"reference": "lora", "metric": "choice_nll"},
        {"reference": "lora", "metric": "acc", "zone": 0.1},
    ],
)
def test_it_agrees_in_other_metrics_and_weights(tmp_path: Path, compare: dict[str, Any]) -> None:
    product = fake_study.DOCUMENT["product"] | {"base.quant": ["none", "nf4"]}
    run = recomputed(kept(tmp_path, product=product, compare=compare))
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize(
    "file, column, row",
    [("comparisons.csv", "improvement", 0), ("comparisons.csv", "p_equivalent", 3), ("repair.csv", "left_upper", -1)],
)
def test_it_finds_a_number_that_was_changed(folder: Path, tmp_path: Path, file: str, column: str, row: int) -> None:
    for each in ("comparisons.csv", "repair.csv", "scores.json.xz"):
        (tmp_path / each).write_bytes((folder / each).read_bytes())
    with (tmp_path / file).open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    known = [each for each in rows if each[column] and each.get("measure", "nll_per_token") == "nll_per_token"]
    known[row][column] = repr(float(known[row][column]) + 3e-6)
    with (tmp_path / file).open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    run = recomputed(tmp_path)
    assert run.returncode == 1
    assert f"{column} is" in run.stdout


def test_it_finds_a_score_that_was_changed(folder: Path, tmp_path: Path) -> None:
    for each in ("comparisons.csv", "repair.csv"):
        (tmp_path / each).write_bytes((folder / each).read_bytes())
    document = json.loads(lzma.decompress((folder / "scores.json.xz").read_bytes()))
    cells = [each for each in document["cells"] if each["cell"]["kind"] == "trained" and each["scores"]]
    cells[0]["scores"]["nll"] = [value + 0.01 for value in cells[0]["scores"]["nll"]]
    (tmp_path / "scores.json.xz").write_bytes(lzma.compress(json.dumps(document).encode()))
    assert recomputed(tmp_path).returncode == 1
