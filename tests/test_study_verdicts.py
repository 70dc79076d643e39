"""What a report decides: no more than its data show, and nothing where cells are missing, wait or have diverged."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from qdora.study.cells import Cell
from qdora.study.compare import Arm, Results, named_comparisons
from qdora.study.grid import load_study, study_from
from qdora.study.report import read_report
from qdora.study.scores import half_of
from qdora.study.study_directory import StudyDirectory, read_index
from tests import fake_study
from tests.fake_study import ADAPTERS, DOCUMENT, compared, diverging, forget, nll_of, product, rows

NF4 = {"product": product("nf4")}
NO_WINNER = {"winner": "", "verdict": "not decided"}
DORA = {"winner": "dora", "verdict": "dora is better"}
OVER_BOTH = {"over both": {"arm": "dora", "over": {"base.quant": ["nf4", "fp4"]}}}
ON_TEST = {"reference": "lora", "split": "test"}


def gains(*of_seeds: float) -> dict[str, Any]:
    """A study on nf4 in which dora gains so much with each seed."""

    def nll(cell: Cell) -> float:
        gain = of_seeds[cell.recipe.train.seed] if cell.kind == "trained" and cell.recipe.adapter.kind == "dora" else 0
        return 2.0 - gain + 0.04 * abs(math.log2(cell.recipe.train.lr / 2e-4))

    return NF4 | {"nll": nll, "seeds": [*range(len(of_seeds))]}


ONE_SEED = dict.fromkeys(("lower", "p_seeds", "p_equivalent"), math.nan)
BOTH_DIVERGED = {"improvement": 0.0, "num_diverged": 8, "p_equivalent": math.nan}
AT_EDGE = "the best learning rate of dora (base.quant=nf4), lora (base.quant=nf4) is the smallest or largest"
TWO_BASES = {"product": product("none", "nf4", "fp4"), "compare": {"reference": "lora", "primary": OVER_BOTH}}
CASES: list[tuple[str, dict[str, Any], dict[str, Any], str, str]] = [
    # 3 rates with 2 seeds and 4 seeds of each arm, the base and the uncompressed one
    ("edge", NF4 | {"rates": {"values": [1e-5, 2e-5, 4e-5], "extend": 0}}, NO_WINNER, AT_EDGE, "22 cells: 22 done"),
    ("two seeds", NF4 | {"seeds": [0, 1]}, NO_WINNER, "there are 2 seeds, but at least 3", ""),
    ("one seed", NF4 | {"seeds": [0]}, NO_WINNER | ONE_SEED, "there is 1 seed, but at least 3", ""),
    ("no search", NF4 | {"rates": None}, NO_WINNER, "the learning rates were not searched", ""),
    ("a base lacks", TWO_BASES | {"forget": ("fp4", "dora")}, NO_WINNER, "no result for base.quant=fp4", ""),
    ("one example", NF4 | {"compare": ON_TEST, "num_sums": 1}, NO_WINNER | {"p_examples": math.nan}, "example", ""),
    ("both diverged", NF4 | {"nll": diverging()}, NO_WINNER | BOTH_DIVERGED, "", "8 diverged"),
    ("diverged", NF4 | {"nll": diverging("dora", "1")}, NO_WINNER | {"num_diverged": 1}, "", "1 diverged"),
    ("failed", NF4 | {"fail": "3"}, NO_WINNER | {"num_missing": 2}, "2 cells have no result", "20 done, 2 failed"),
    ("signs agree", gains(0.02, 0.4, 0.05, 1.5), NO_WINNER | {"num_seeds": 4}, "", ""),
    ("a seed disagrees", gains(0.4, 0.5, 0.45, 0.5, 0.4, 0.45, 0.5, -0.05), DORA | {"num_seeds": 8}, "", ""),
    ("rate diverged", NF4 | {"nll": diverging("0.0004", "1001", kinds=("rate",))}, DORA, "", "2 diverged"),
]


@pytest.mark.parametrize("changes, expected, reason, status", [case[1:] for case in CASES], ids=[c[0] for c in CASES])
def test_what_a_comparison_says(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    expected: dict[str, Any],
    reason: str,
    status: str,
) -> None:
    monkeypatch.setitem(fake_study.NUM_EXAMPLES, "sums", changes.get("num_sums", 80))
    made = fake_study.make(tmp_path, **{key: changes[key] for key in changes if key not in ("num_sums", "forget")})
    if "forget" in changes:
        forget(made, *changes["forget"])
    report = read_report(made)
    (row,) = rows(report, "comparisons", role="primary")
    assert {name: row[name] for name in expected} == pytest.approx(expected, nan_ok=True)
    assert reason in row["reason"]
    assert bool(reason) == bool(row["reason"])
    assert status in report.status
    assert row["winner"] == "" or row["p_holm"] < 0.05 < row["p_equivalent_holm"]


@pytest.mark.parametrize("is_named", [False, True])
def test_p_values_are_corrected_for_all_primary_comparisons_also_for_those_without_a_result(
    tmp_path: Path, is_named: bool
) -> None:
    primary = {quant: {"arm": "dora", "over": {"base.quant": [quant]}} for quant in ("nf4", "fp4")}
    compare = {"reference": "lora", "primary": primary if is_named else None}
    made = fake_study.make(tmp_path, product=product("nf4", "fp4"), compare=compare, bases=False)
    late = {name: rows(read_report(made), "comparisons", role="primary")[0][name] for name in ("p_seeds", "p_holm")}
    forget(made, "fp4", "dora")
    (row,) = rows(read_report(made), "comparisons", role="primary")
    larger = max(row["p_seeds"], row["p_examples"])
    assert {name: row[name] for name in late} == late
    assert (row["num_tests"], row["p_holm"]) == (2, pytest.approx(2 * larger))
    assert row["winner"] == "dora"
    index = json.loads((made / "study.json").read_text())
    index["study"]["compare"]["alpha"] = 1.5 * larger  # small enough by itself, not among two
    (made / "study.json").write_text(json.dumps(index))
    (row,) = rows(read_report(made), "comparisons", role="primary")
    assert (row["winner"], row["verdict"], row["reason"]) == ("", "not decided", "")


@pytest.mark.parametrize(
    "asked, lacking",
    [
        ({"over": {}}, ["base.quant=fp4"]),  # where the stages train both arms: not int8
        ({"over": {"base.quant": ["nf4"]}}, []),
        ({"over": {"base.quant": ["nf4", "int8"]}}, ["base.quant=int8"]),
        ({"over": {"base.quant": "nf4"}, "minus": {}}, ["base.quant=fp4"]),
        ({"over": {"base.quant": "nf4"}, "minus": {"base.quant": ["fp4", "none"]}}, ["base.quant=fp4"]),
    ],
)
def test_contexts_that_a_primary_comparison_lacks(asked: dict[str, Any], lacking: list[str]) -> None:
    stages = [{"name": "main", "cells": {"base.quant": ["none", "nf4", "fp4"]}}]
    stages.append({"name": "map", "cells": {"base.quant": "int8", "adapter": "lora"}})
    study = study_from(DOCUMENT | {"stages": stages, "compare": {"reference": "lora", "primary": {"it": asked}}})
    trained: dict[str, Any] = {"kind": "trained", "rate": "", "is_interior": True, "seeds": {"0": "key"}}
    trained |= {"num_missing": 0, "base_key": None, "dense_key": None}
    arms = [Arm(context={"base.quant": quant}, name=name, **trained) for quant in ("none", "nf4") for name in ADAPTERS]
    assert [each.lacking for each in named_comparisons(arms, study, []) if each.family] == [lacking]


@pytest.mark.parametrize("lost", [["none"], ["none", "fp4"], ["fp4"]])
def test_what_is_left_needs_a_measured_run_on_the_uncompressed_base(tmp_path: Path, lost: list[str]) -> None:
    nll = diverging("dora", lost[0], nll=diverging("dora", lost[-1]))
    report = read_report(fake_study.make(tmp_path, nll=nll, product=product("none", "fp4")))
    left = [row["left"] for row in rows(report, "repair", adapter="dora", **{"base.quant": "fp4"})]
    assert (left == []) == ("none" in lost)
    assert all(each > 4 for each in left)  # a uniform guess among 1,000 tokens


ODD = {"base.quant": ["none", "nf4"], "adapter": ADAPTERS | {"odd": {"adapter.kind": "dora", "adapter.rank": 8}}}
NOTHING = "There is nothing to compare"


@pytest.mark.parametrize(
    "changes, trained, searches, words",
    [
        # Three rates, and two below them
        (
            NF4 | {"nll": diverging("dora", kinds=("rate", "trained"))},
            {"lora"},
            {("lora", True, True, 0), ("dora", True, False, 5)},
            NOTHING,
        ),
        (
            NF4
            | {"nll": diverging("0.0004", "1000", kinds=("rate",)), "fail": "1001"}
            | {"rates": DOCUMENT["rates"] | {"steps": 1}},
            set(),
            {("lora", False, False, 1), ("dora", False, False, 1)},
            "; 8 more wait",
        ),
        # The reference is that of the study file, not the first arm with a result
        (
            {"nll": diverging("lora", kinds=("rate", "trained")), "product": ODD, "compare": {}},
            {"dora", "odd"},
            {("lora", True, False, 5), ("dora", True, True, 0), ("odd", True, True, 0)},
            NOTHING,
        ),
    ],
    ids=["diverged", "unfinished", "reference"],
)
def test_arms_without_a_rate_are_not_compared(
    tmp_path: Path, changes: dict[str, Any], trained: set[str], searches: set[tuple[Any, ...]], words: str
) -> None:
    report = read_report(fake_study.make(tmp_path, **changes))
    assert {row["adapter"] for row in rows(report, "arms", kind="trained")} == trained
    assert report.tables["comparisons"] == []
    told = {
        (row["adapter"], row["is_done"], row["rate"] is not None, row["num_diverged"]) for row in report.tables["rates"]
    }
    assert told == searches
    assert words in " ".join([*report.answer, report.status])


def test_seeds_that_only_a_stage_names_narrow_an_interval_by_the_spread_of_the_first_ones(tmp_path: Path) -> None:
    def nll(cell: Cell) -> float:
        wobbles = cell.kind == "trained" and cell.recipe.adapter.kind == "dora" and cell.recipe.base.quant == "fp4"
        return fake_study.truth(cell) + (0.1 * (-1) ** cell.recipe.train.seed if wobbles else 0.0)

    stages = [{"name": "main"}, {"name": "more", "cells": {"base.quant": "fp4", "seed": [4, 5]}}]
    made = fake_study.make(tmp_path, nll=nll, stages=stages, product=product("nf4", "fp4"))
    report = read_report(made)
    assert {quant: compared(report, quant)["num_seeds"] for quant in ("nf4", "fp4")} == {"nf4": 4, "fp4": 6}
    wide = compared(report, "fp4")
    found = [float(text.partition(": ")[2]) for text in wide["seed_improvements"].split("; ")]
    of_first = statistics.stdev(found[:4]) / math.sqrt(6)  # Stein's two-stage procedure
    assert wide["half_width"] == pytest.approx(stats.t.ppf(0.975, 3) * of_first, rel=1e-6)
    # Levels have the same seeds in all arms
    assert {row["num_seeds"] for row in rows(report, "arms", kind="trained")} == {4}
    (arm,) = rows(report, "arms", **{"base.quant": "fp4", "adapter": "lora", "kind": "trained"})
    cells = [cell for cell in read_index(made)["cells"] if cell["kind"] == "trained"]
    cells = [cell for cell in cells if {"fp4", "lora"} <= set(cell["labels"].values())]
    first = [nll_of(made, cell, "compare") for cell in cells if cell["labels"]["seed"] in "0123"]
    assert (len(cells), arm["nll_per_token"]) == (6, pytest.approx(statistics.mean(first), rel=1e-12))
    forget(made, "4")
    forget(made, "5")
    row = compared(read_report(made), "fp4")  # while they are open
    assert (row["num_seeds"], row["num_missing"], row["reason"]) == (4, 0, "")


def test_the_best_rate_of_an_accuracy_is_that_of_the_highest_on_the_half_that_chooses(tmp_path: Path) -> None:
    """1e-4 answers the most questions, 4e-4 the fewest."""
    made = fake_study.make(
        tmp_path,
        nll=lambda cell: 2.0 + 0.4 * abs(math.log2(cell.recipe.train.lr / 1e-4)) if cell.is_trained else 2.0,
        product=product("nf4"),
        rates={"values": [5e-5, 1e-4, 2e-4, 4e-4]},
        compare={"metric": "acc", "reference": "lora"},
    )
    report = read_report(made)
    assert {row["rate"] for row in report.tables["rates"]} == {"0.0001"}
    assert {row["rate"] for row in rows(report, "arms", kind="trained")} == {"0.0001"}
    results = Results(StudyDirectory(made), load_study(tmp_path / "study.yaml"))
    searched = [cell["key"] for cell in read_index(made)["cells"] if cell["kind"] == "rate"]
    assert len(searched) == 4 * 2 * 2
    for key in searched:
        scored = json.loads((made / "cells" / key / "eval/step-1.json").read_text())["per_example"]
        right = [row["acc"] for row in scored if "acc" in row and half_of(f"{row['id']}#1") == "choose"]
        assert results.loss(key) == pytest.approx(-sum(right) / len(right), rel=1e-12)
