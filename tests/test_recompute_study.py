"""The second program finds the numbers of a report anew, and any that was changed."""

from __future__ import annotations

import csv
import importlib
import json
import lzma
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qdora.study.cells import Cell
from qdora.study.page import write_report
from qdora.study.report import read_report
from qdora.study.study_directory import read_index
from tests import fake_study

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "benchmarks/recompute_study.py"
PRIMARY = {
    "over all": {"over": {"base.quant": ["int8", "nf4", "fp4"]}},
    "beyond 16 bits": {"arm": "dora", "over": {"base.quant": ["nf4"]}, "minus": {"base.quant": "none"}},
}


def kept(folder: Path, made: Path) -> Path:
    """The report and the packed scores of a study's directory."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        from study_archive import SCORES_FILE, pack
    finally:
        sys.path.pop(0)
    write_report(read_report(made), folder / "kept", "a study")
    (folder / "kept" / SCORES_FILE).write_bytes(pack(made))
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
    stages = [{"name": "main"}, {"name": "moved", "cells": {"base.quant": ["nf4", "fp4"]}, "kind": "transplant"}]
    compare = {"reference": "lora", "primary": PRIMARY}
    root = tmp_path_factory.mktemp("kept")
    return kept(root, fake_study.make(root / "made", compare=compare, stages=stages, nll=diverging))


def test_it_imports_numpy_alone() -> None:
    lines = SCRIPT.read_text().splitlines()
    imported = {line.split()[1].partition(".")[0] for line in lines if line.startswith(("import ", "from "))}
    assert imported - set(sys.stdlib_module_names) == {"numpy"}


def test_it_agrees(folder: Path) -> None:
    run = recomputed(folder)
    assert run.returncode == 0, run.stdout + run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    # Primary comparisons, all others; on three bases what is left, of a transplant, repaired, and its share, and the
    # damage of these bases; both primary comparisons by task: NLL of two, accuracies of the one that has choices
    in_metric, in_others = 2 * 9 + 4 * 7, 3 * (2 + 4) * 7
    assert found["numbers"] == in_metric + in_others + 6 * 12 + 3 * 3 + 2 * (2 + 1 + 1) * 4
    assert found["largest_difference"] < 1e-6
    with (folder / "repair.csv").open(newline="") as stream:
        assert sum(bool(row["repaired_share_upper"]) for row in csv.DictReader(stream)) == 4


@pytest.mark.parametrize(
    "compare",
    [
        {"reference": "lora", "tasks": "equal"},
        {"reference": "lora", "metric": "acc_norm"},
        {"reference": "lora", "metric": "acc", "zone": 0.1},
    ],
)
def test_it_agrees_in_other_metrics_and_weights(tmp_path: Path, compare: dict[str, Any]) -> None:
    product = fake_study.DOCUMENT["product"] | {"base.quant": ["none", "nf4"]}
    run = recomputed(kept(tmp_path, fake_study.make(tmp_path / "made", product=product, compare=compare)))
    assert run.returncode == 0, run.stdout + run.stderr


def test_it_agrees_on_intervals_with_later_seeds(tmp_path: Path) -> None:
    later = [0, 1, 2, 3, 4, 5]
    stages = [{"name": "main"}, {"name": "more", "cells": {"seed": later}}]
    stages.append({"name": "moved", "cells": {"base.quant": ["nf4"], "seed": later}, "kind": "transplant"})
    product = fake_study.DOCUMENT["product"] | {"base.quant": ["none", "nf4"]}
    made = fake_study.make(tmp_path / "made", product=product, stages=stages)
    folder = kept(tmp_path, made)
    run = recomputed(folder)
    assert run.returncode == 0, run.stdout + run.stderr
    with (folder / "comparisons.csv").open(newline="") as stream:
        assert {row["num_seeds"] for row in csv.DictReader(stream)} == {"6"}
    document = json.loads(lzma.decompress((folder / "scores.json.xz").read_bytes()))
    document["study"]["seeds"] = later  # as if all six had been planned
    (folder / "scores.json.xz").write_bytes(lzma.compress(json.dumps(document).encode()))
    assert recomputed(folder).returncode == 1


@pytest.mark.parametrize(
    "file, column, row",
    [
        ("comparisons.csv", "improvement", 0),
        ("comparisons.csv", "p_equivalent", 3),
        ("comparisons.csv", "smallest_detectable", 0),
        ("repair.csv", "left_upper", -1),
        ("repair.csv", "repaired_share_lower", 0),
    ],
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


def test_labels_that_share_the_cells_of_others_are_not_lacking(tmp_path: Path) -> None:
    """`same` is `nf4` by another name, so it has no cells. The comparison `alone` has nothing to compare."""
    bases = {"nf4": {"base.quant": "nf4"}, "same": {"base.quant": "nf4", "base.block_size": 64}}
    bases["fp4"] = {"base.quant": "fp4"}
    over = {"over all": {}, "named": {"base": ["nf4", "same"]}, "alone": {"base": "same"}}
    compare = {"reference": "lora", "zone": 0.2, "primary": {name: {"over": each} for name, each in over.items()}}
    product = {"base": bases, "adapter": fake_study.DOCUMENT["product"]["adapter"]}
    made = fake_study.make(tmp_path / "made", product=product, compare=compare, bases=False)
    rows = read_report(made).tables["comparisons"]
    primary = [row for row in rows if row["role"] == "primary"]
    assert [(row["comparison"], row["reason"]) for row in primary] == [("over all", ""), ("named", "")]
    assert all(row["verdict"] != "not decided" for row in primary)
    run = recomputed(kept(tmp_path, made))
    assert run.returncode == 0, run.stdout + run.stderr


def test_a_verdict_over_fewer_bases_than_were_asked_for_is_found(tmp_path: Path) -> None:
    """All runs of lora on nf4 failed, and all of fp4 diverged."""

    def nll(cell: Cell) -> float:
        return float("nan") if cell.kind == "trained" and "fp4" in cell.labels.values() else fake_study.truth(cell)

    product = fake_study.DOCUMENT["product"] | {"base.quant": ["int8", "nf4", "fp4"]}
    primary = {quant: {"over": {"base.quant": [quant]}} for quant in ("int8", "fp4")} | {"over all": {}}
    compare = {"reference": "lora", "primary": primary, "zone": 0.2}
    made = fake_study.make(tmp_path / "made", product=product, compare=compare, nll=nll, bases=False)
    for cell in read_index(made)["cells"]:
        if cell["kind"] == "trained" and {"nf4", "lora"} <= set(cell["labels"].values()):
            (made / "results" / f"{cell['key']}.json").unlink()
    folder = kept(tmp_path, made)
    run = recomputed(folder)
    assert run.returncode == 0, run.stdout + run.stderr
    file = folder / "comparisons.csv"
    with file.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    told = {row["comparison"]: row["verdict"] for row in rows if row["role"] == "primary"}
    assert told == {"int8": "no difference above 0.2", "fp4": "not decided", "over all": "not decided"}
    for name in ("fp4", "over all"):
        other = [row | ({"verdict": "dora is better"} if row["comparison"] == name else {}) for row in rows]
        with file.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows(other)
        run = recomputed(folder)
        assert run.returncode == 1
        assert f"{name}, dora: the verdict is 'dora is better', recomputed 'not decided'" in run.stdout


def test_a_report_of_an_unfinished_study_replaces_the_kept_one_only_if_asked_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    program, shared = importlib.import_module("study"), importlib.import_module("shared_study")
    kept_in: list[tuple[Path, str]] = []
    monkeypatch.setattr(shared, "run_cells", lambda *_, **__: True)
    monkeypatch.setattr(shared, "report_run", lambda _: None)
    monkeypatch.setattr(shared, "keep", lambda _, out, head: kept_in.append((out, head["command"])))
    grid = tmp_path / "a grid.yaml"  # outside of the repository
    grid.write_text("settings: {data.mix: []}\n")
    where = ["study.py", str(tmp_path), "--grid", str(grid), "--dir", str(tmp_path / "runs")]
    for options in (["--report"], ["--report", "--out", str(tmp_path / "out")], []):
        monkeypatch.setattr(sys, "argv", [*where, *options])
        program.main()
    command = "python benchmarks/study.py DATA --grid 'a grid.yaml'"
    assert kept_in == [(tmp_path / "out", command), (ROOT / "benchmarks/results/study", command)]


def test_what_is_kept_says_how_many_cells_are_done(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    made = tmp_path / "study"
    shutil.copytree(folder.parent / "made/study", made)
    shutil.copytree(folder, made / "report")
    (made / "grid.yaml").write_text("settings: {data.mix: []}\n")
    cells = read_index(made)["cells"]
    next((made / "results").glob("*.json")).unlink()
    importlib.import_module("shared_study").keep(made, tmp_path / "out", {"command": "x"})
    told = json.loads((tmp_path / "out/run.json").read_text())
    assert (told["cells_done"], told["cells"]) == (len(cells) - 1, len(cells))


@pytest.mark.parametrize(
    "page, old, new",
    [
        ("README.md", "", ""),
        ("README.md", "at most 0.016 bit", "at most 0.017 bit"),
        ("benchmarks/README.md", "| +0.056 (+0.045 to +0.066) |", "| +0.056 (+0.046 to +0.066) |"),
        ("benchmarks/README.md", "DoRA and LoRA are equivalent in NLL", "DoRA and LoRA differ by 0.01 in NLL"),
    ],
)
def test_the_pages_say_what_the_committed_scores_do(tmp_path: Path, page: str, old: str, new: str) -> None:
    files = ["README.md", "benchmarks/README.md", "benchmarks/recompute_study.py"]
    files += [f"benchmarks/results/{name}.json" for name in ("student_rerun", "real_data")]
    names = ("comparisons.csv", "tasks.csv", "repair.csv", "scores.json.xz")
    for file in (*files, *(f"benchmarks/results/study/{name}" for name in names)):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / file, tmp_path / file)
    assert old in (tmp_path / page).read_text()
    (tmp_path / page).write_text((tmp_path / page).read_text().replace(old, new, 1))
    command = [sys.executable, "-I", str(tmp_path / "benchmarks/recompute_study.py")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert run.returncode == (1 if old else 0), run.stdout + run.stderr
    assert json.loads(run.stdout.splitlines()[-1])["numbers"] > 1600


def test_it_finds_a_score_that_was_changed(folder: Path, tmp_path: Path) -> None:
    for each in ("comparisons.csv", "repair.csv"):
        (tmp_path / each).write_bytes((folder / each).read_bytes())
    document = json.loads(lzma.decompress((folder / "scores.json.xz").read_bytes()))
    cells = [each for each in document["cells"] if each["cell"]["kind"] == "trained" and each["scores"]]
    cells[0]["scores"]["nll"] = [value + 0.01 for value in cells[0]["scores"]["nll"]]
    (tmp_path / "scores.json.xz").write_bytes(lzma.compress(json.dumps(document).encode()))
    assert recomputed(tmp_path).returncode == 1
