"""The tables of studies tell what the reports have decided, and no more."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from qdora.study.cells import Cell
from qdora.study.page import write_report
from qdora.study.report import read_report
from tests import fake_study

ROOT = Path(__file__).parent.parent
BASES = {
    "16 bits": {"base.quant": "none", "base.block_size": None, "base.double_quant": None},
    "nf4": {"base.quant": "nf4"},
}
KINDS = {"lora": {"adapter.kind": "lora"}, "dora": {"adapter.kind": "dora"}}


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, ModuleType]:
    """The modules of the tables, which read `tmp_path` as the folder of results."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    found = {
        name: importlib.import_module(f"tables.{name}")
        for name in ("table", "study", "compressed", "ranks", "combined", "failed")
    }
    monkeypatch.setattr(found["table"], "RESULTS", tmp_path)
    return found


def result(folder: Path, name: str, more: dict[str, Any] | None = None, **changes: Any) -> list[dict[str, Any]]:
    """A report of a made-up study in the folder of results; returns its comparisons."""
    made = folder / f"made {len(list(folder.glob('made *')))}"
    report = read_report(fake_study.make(made, **changes))
    write_report(report, folder / name, name)
    (folder / name / "run.json").write_text(
        json.dumps({"command": "python x.py", "answer": report.answer} | (more or {}))
    )
    return report.tables["comparisons"]


def row_of(table: str, start: str) -> list[str]:
    (line,) = [line for line in table.splitlines() if line.startswith(f"| {start} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_study_table_has_the_named_comparisons_and_bases_whose_runs_diverged(
    tables: dict[str, ModuleType], tmp_path: Path
) -> None:
    def nll(cell: Cell) -> float:
        has_diverged = cell.kind == "trained" and (cell.labels["base"], cell.labels["adapter"]) in diverged
        return math.nan if has_diverged else fake_study.truth(cell)

    diverged = [("nf4", "lora"), ("fp4", "lora"), ("fp4", "dora")]
    product = {"base": BASES | {"fp4": {"base.quant": "fp4"}}, "adapter": KINDS}
    primary = {"on both": {"over": {"base": ["16 bits", "nf4"]}}, "on fp4": {"over": {"base": "fp4"}}}
    compare = {"reference": "lora", "primary": primary}
    more = {"cells": 1200, "cells_done": 40}
    pairs = result(tmp_path, "study", more, nll=nll, product=product, compare=compare, seeds=[0, 1, 2], bases=False)
    text = tables["study"].study()
    assert row_of(text, "nf4")[1:3] == ["4.10", "0"]
    assert row_of(text, "fp4")[1:3] == ["–", "–"]
    assert "\nSo far 40 of 1,200 cells are done. NLL in nats" in text
    answer = tables["compressed"].study_primary()
    for pair in pairs:
        if pair["role"] == "primary":
            size = f"improvement of dora over lora in NLL (nats per token) {pair['improvement']:.4f} ("
            assert f"{pair['comparison']}: {pair['verdict']}, {size}" in answer
    assert [line.split(" | ")[1] for line in answer.splitlines()[2:10]] == [*tables["compressed"].MEASURES.values()] * 2


def test_rank_tables_read_the_present_reports(tables: dict[str, ModuleType], tmp_path: Path) -> None:
    def nll(cell: Cell) -> float:
        return 2.0 + (0.3 if cell.labels.get("ranks") == "svd" and cell.kind != "base" else 0.0) + _rate(cell)

    def _rate(cell: Cell) -> float:
        return 0.1 * abs(cell.recipe.train.lr * 5000 - 1) if cell.kind != "base" else 0.0

    ways = {"uniform": {"adapter.rank": 8}, "svd": {"adapter.rank": 9}, "gradient": {"adapter.rank": 10}}
    costs = {"costs_in_seconds": {"scout": 10.0, "svd": 5.0}}
    compare = {"arm": "ranks", "reference": "uniform"}
    result(tmp_path, "rank_methods", costs, nll=nll, product={"ranks": ways}, compare=compare)
    text = tables["ranks"].rank_methods()
    assert row_of(text, "SVD of a trained update")[4].endswith("uniform is better")
    assert row_of(text, "SVD of a trained update")[5] == "1.50 runs"


@pytest.mark.parametrize(
    ("lower", "upper", "is_told"),
    [
        ("-0.046", "0.0085", True),  # not decided, but at most a little better
        ("-0.01", "0.021", False),
        ("0.001", "0.015", False),  # better, by less than the zone
        ("", "", False),  # one seed
    ],
)
def test_ranks_did_not_help_if_none_lowers_the_loss(
    tables: dict[str, ModuleType], tmp_path: Path, lower: str, upper: str, is_told: bool
) -> None:
    (tmp_path / "rank_methods").mkdir()
    rows = ["arm,measure,improvement,lower,upper,zone", f"svd,nll_per_token,0.002,{lower},{upper},0.02"]
    (tmp_path / "rank_methods/comparisons.csv").write_text("\n".join(rows))
    told = tables["ranks"].ranks_that_did_not_help()
    assert bool(told) == is_told
    if told:
        assert told[2].endswith("SVD of a trained update -0.002 (-0.009 to +0.046) nats a token")


def test_combined_against_solo_tells_each_task_and_the_verdict_on_all(
    tables: dict[str, ModuleType], tmp_path: Path
) -> None:
    def row(measure: str, improvement: float, role: str = "exploratory", **more: Any) -> dict[str, Any]:
        ends = {"lower": improvement - 0.01, "upper": improvement + 0.03}
        found = {"measure": measure, "role": role, "improvement": improvement, **ends, "num_seeds": 4, "zone": 0.02}
        return found | {"reason": "", "smallest_detectable": 0.0456, "verdict": "exploratory"} | more

    def scores(alone: float, together: float) -> dict[str, Any]:
        return {"alone": {"nll_per_token": alone, "acc": 0.25}, "combined": {"nll_per_token": together, "acc": 0.5}}

    document = {
        "tasks": ["a", "b"],
        "comparisons": {
            "all tasks": [
                row("nll_per_token", 0.012, "primary", verdict="not decided"),
                row("acc", 0.25),
                row("acc_norm", -0.5),
            ],
            "a": [row("nll_per_token", 0.5), row("acc", 0.25)],
            "b": [row("nll_per_token", -0.25), row("acc", 0.25)],
        },
        "scores": {"all tasks": scores(2.0, 1.988), "a": scores(2.5, 2.0), "b": scores(1.0, 1.25)},
        "rates": {
            name: {"rate": rate, "is_interior": True} for name, rate in zip("ab", ("0.001", "0.002"), strict=True)
        }
        | {"combined": {"rate": "0.003", "is_interior": True}},
        "costs": {
            "combined": [{"seconds": 10.0}, {"seconds": 30.0}],
            "a": [{"seconds": 8.0}, {"seconds": 8.0}],
            "b": [{"seconds": 15.0}, {"seconds": 17.0}],
        },
        "cells": 21,
        "cells_done": 20,
    }
    (tmp_path / "combined_vs_solo").mkdir()
    (tmp_path / "combined_vs_solo/run.json").write_text(json.dumps(document))
    text = tables["combined"].combined_vs_solo()
    gains = "+0.500 (+0.490 to +0.530)", "+25.0 (+24.0 to +28.0)"
    assert row_of(text, "a") == ["a", "2.500", "2.000", gains[0], "25.0", "50.0", gains[1], "0.001"]
    assert row_of(text, "b")[3] == "-0.250 (-0.260 to -0.220)"
    assert "lower by +0.012 (+0.002 to +0.042), not decided: differences below 0.046 could not have been seen" in text
    assert "per character: higher by -50.0 (-51.0 to -47.0) points." in text
    assert "Learning rate of the combined runs: 0.003. So far 20 of 21 runs are done." in text
    assert "took 1.2 times as long" in text


def test_the_study_table_of_one_seed_has_no_interval(tables: dict[str, ModuleType], tmp_path: Path) -> None:
    product, compare = {"base": BASES, "adapter": KINDS}, {"arm": "adapter", "reference": "lora"}
    pairs = result(tmp_path, "study", product=product, compare=compare, seeds=[0])
    assert all(math.isnan(row["p_equivalent"]) and math.isnan(row["lower"]) for row in pairs)
    (pair,) = [row for row in pairs if row["base"] == "nf4" and row["measure"] == "nll_per_token"]
    told = f"dora {pair['improvement']:+.3f}, not decided: {pair['reason']}"
    assert row_of(tables["study"].study(), "nf4")[-1] == told
