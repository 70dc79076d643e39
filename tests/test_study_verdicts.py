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
from tests.fake_study import compared, nll_of, rows


def test_a_rate_at_the_edge_is_told_and_decides_nothing(tmp_path: Path) -> None:
    product = fake_study.DOCUMENT["product"] | {"base.quant": ["nf4"]}
    rates = {"values": [1e-5, 2e-5, 4e-5], "extend": 0}
    row = compared(read_report(fake_study.make(tmp_path, product=product, rates=rates)), "nf4")
    assert row["lower"] > 0
    assert (row["winner"], row["verdict"]) == ("", "not decided")
    assert "the best learning rate of dora (base.quant=nf4), lora (base.quant=nf4) is the smallest or" in row["reason"]


def test_a_primary_comparison_of_fewer_bases_than_it_names_decides_nothing(tmp_path: Path) -> None:
    """DoRA has no result on fp4: its cells failed, or every rate diverged."""
    product = fake_study.DOCUMENT["product"] | {"base.quant": ["none", "nf4", "fp4"]}
    compare = {"reference": "lora", "primary": {"over both": {"arm": "dora", "over": {"base.quant": ["nf4", "fp4"]}}}}
    made = fake_study.make(tmp_path, product=product, compare=compare, bases=False)
    for cell in read_index(made)["cells"]:
        if cell["kind"] == "trained" and {"fp4", "dora"} <= set(cell["labels"].values()):
            (made / "results" / f"{cell['key']}.json").unlink()
    (row,) = rows(read_report(made), "comparisons", role="primary")
    assert row["p_holm"] < 0.05  # nf4 alone
    assert (row["winner"], row["verdict"]) == ("", "not decided")
    assert row["reason"] == "an arm has no result for base.quant=fp4"


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
    compare = {"reference": "lora", "primary": {"it": asked}}
    study = study_from(fake_study.DOCUMENT | {"stages": stages, "compare": compare})
    arms = [
        Arm(
            context={"base.quant": quant},
            name=name,
            kind="trained",
            rate="",
            is_interior=True,
            seeds={"0": "key"},
            num_missing=0,
            base_key=None,
            dense_key=None,
        )
        for quant in ("none", "nf4")
        for name in ("lora", "dora")
    ]
    primary = [each for each in named_comparisons(arms, study, []) if each.family]
    assert [each.lacking for each in primary] == [lacking]


def test_arms_that_both_diverge_are_not_equivalent(tmp_path: Path) -> None:
    def nll(cell: Cell) -> float:
        return math.nan if cell.kind == "trained" and cell.recipe.base.quant == "fp4" else fake_study.truth(cell)

    product = fake_study.DOCUMENT["product"] | {"base.quant": ["nf4", "fp4"]}
    row = compared(read_report(fake_study.make(tmp_path, nll=nll, product=product, bases=False)), "fp4")
    assert (row["improvement"], row["num_diverged"], row["verdict"]) == (0.0, 8, "not decided")
    assert math.isnan(row["p_equivalent"])


@pytest.mark.parametrize("lost", [["none"], ["none", "fp4"], ["fp4"]])
def test_what_is_left_needs_a_measured_run_on_the_uncompressed_base(tmp_path: Path, lost: list[str]) -> None:
    def nll(cell: Cell) -> float:
        is_lost = cell.kind == "trained" and cell.recipe.adapter.kind == "dora" and cell.recipe.base.quant in lost
        return math.nan if is_lost else fake_study.truth(cell)

    product = fake_study.DOCUMENT["product"] | {"base.quant": ["none", "fp4"]}
    report = read_report(fake_study.make(tmp_path, nll=nll, product=product))
    found = rows(report, "repair", adapter="dora", **{"base.quant": "fp4"})
    # A uniform guess among 1,000 tokens
    assert [row["left"] > 4 for row in found] == ([] if "none" in lost else [True])


@pytest.mark.parametrize("is_named", [False, True])
def test_a_verdict_counts_the_primary_comparisons_that_have_no_result_yet(tmp_path: Path, is_named: bool) -> None:
    product = fake_study.DOCUMENT["product"] | {"base.quant": ["nf4", "fp4"]}
    primary = {quant: {"arm": "dora", "over": {"base.quant": [quant]}} for quant in ("nf4", "fp4")}
    compare = {"reference": "lora", "primary": primary if is_named else None}
    made = fake_study.make(tmp_path, product=product, compare=compare, bases=False)
    whole = {row["comparison"]: row for row in rows(read_report(made), "comparisons", role="primary")}
    if not is_named:
        whole = {"dora against lora": compared(read_report(made), "nf4")}
    for cell in read_index(made)["cells"]:
        if cell["kind"] == "trained" and {"fp4", "dora"} <= set(cell["labels"].values()):
            (made / "results" / f"{cell['key']}.json").unlink()
    (early,) = rows(read_report(made), "comparisons", role="primary")
    late = whole[early["comparison"]]
    assert early["p_seeds"] == late["p_seeds"]
    larger = max(early["p_seeds"], early["p_examples"])
    assert early["p_holm"] == pytest.approx(2 * larger)
    assert early["smallest_detectable"] == pytest.approx(late["smallest_detectable"])


def test_a_task_with_a_single_example_tells_no_spread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(fake_study.NUM_EXAMPLES, "sums", 1)
    product = fake_study.DOCUMENT["product"] | {"base.quant": ["nf4"]}
    compare = {"reference": "lora", "split": "test"}
    row = compared(read_report(fake_study.make(tmp_path, product=product, compare=compare)), "nf4")
    assert row["p_seeds"] < 0.05
    assert math.isnan(row["p_examples"])
    assert (row["winner"], row["verdict"]) == ("", "not decided")
    assert row["reason"] == "a task has a single example, which tells no spread"


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"seeds": [0, 1]}, "there are 2 seeds, but at least 3 are needed"),
        ({"rates": None}, "the learning rates were not searched"),
    ],
)
def test_no_verdict_where_the_data_cannot_show_one(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    product = fake_study.DOCUMENT["product"] | {"base.quant": ["none", "nf4"]}
    row = compared(read_report(fake_study.make(tmp_path, product=product, **changes)), "nf4")
    assert (row["winner"], row["verdict"], row["reason"]) == ("", "not decided", reason)


def test_seeds_that_agree_in_sign_alone_decide_nothing_and_one_that_does_not_vetoes_nothing(tmp_path: Path) -> None:
    product = fake_study.DOCUMENT["product"] | {"base.quant": ["nf4"]}

    def with_gains(folder: str, gains: tuple[float, ...]) -> dict[str, Any]:
        def nll(cell: Cell) -> float:
            gain = gains[cell.recipe.train.seed] if cell.kind == "trained" and cell.recipe.adapter.kind == "dora" else 0
            return 2.0 - gain + 0.04 * abs(math.log2(cell.recipe.train.lr / 2e-4))

        made = fake_study.make(tmp_path / folder, nll=nll, product=product, seeds=[*range(len(gains))])
        return compared(read_report(made), "nf4")

    agreeing = with_gains("agreeing", (0.02, 0.4, 0.05, 1.5))
    assert agreeing["p_examples"] < 0.001  # of these seeds the examples are sure
    assert (agreeing["verdict"], agreeing["reason"]) == ("not decided", "")
    vetoing = with_gains("vetoing", (0.4, 0.5, 0.45, 0.5, 0.4, 0.45, 0.5, -0.05))
    assert vetoing["winner"] == "dora"


def test_failed_cells_are_named_and_call_no_winner(tmp_path: Path) -> None:
    product = fake_study.DOCUMENT["product"] | {"base.quant": ["nf4"]}
    report = read_report(fake_study.make(tmp_path, fail="3", product=product))
    failed = rows(report, "cells", status="failed")
    assert len(failed) == 2
    assert {row["reason"] for row in failed} == {"RuntimeError: out of memory"}
    assert "20 done, 2 failed" in report.status
    row = compared(report, "nf4")
    assert (row["num_seeds"], row["num_missing"], row["winner"]) == (3, 2, "")
    assert row["reason"] == "2 cells have no result"


def test_cells_that_wait_are_counted(tmp_path: Path) -> None:
    product = fake_study.DOCUMENT["product"] | {"base.quant": ["nf4"]}
    report = read_report(fake_study.make(tmp_path, fail="1001", product=product))  # no search can end
    assert rows(report, "arms", kind="trained") == []
    assert "; 8 more wait" in report.status


def test_a_rate_that_diverges_is_the_worst_and_vetoes_no_winner(tmp_path: Path) -> None:
    def nll(cell: Cell) -> float:
        diverges = cell.kind == "rate" and cell.recipe.train.lr == 4e-4 and cell.recipe.train.seed == 1001
        return math.nan if diverges else fake_study.truth(cell)

    report = read_report(fake_study.make(tmp_path, nll=nll))
    assert {row["reason"] for row in rows(report, "cells", status="diverged")} == {"loss nan"}
    assert {row["rate"] for row in report.tables["rates"]} == {"0.0002"}
    assert all(row["is_interior"] for row in report.tables["rates"])
    assert compared(report, "nf4")["winner"] == "dora"


def test_a_compared_run_that_diverges_has_the_worst_score(tmp_path: Path) -> None:
    def nll(cell: Cell) -> float:
        diverges = cell.kind == "trained" and cell.recipe.adapter.kind == "dora" and cell.recipe.train.seed == 1
        return math.nan if diverges else fake_study.truth(cell)

    product = fake_study.DOCUMENT["product"] | {"base.quant": ["nf4"]}
    report = read_report(fake_study.make(tmp_path, nll=nll, product=product))
    row = compared(report, "nf4")
    assert (row["num_seeds"], row["num_diverged"], row["verdict"]) == (4, 1, "not decided")
    worst = float(row["seed_improvements"].split("; ")[1].partition(": ")[2])
    assert worst == pytest.approx(1.8 - math.log(1000), abs=0.2)  # a uniform guess among 1,000 tokens
    assert "1 diverged" in report.status


def test_an_arm_that_diverges_at_every_rate_is_not_compared(tmp_path: Path) -> None:
    def nll(cell: Cell) -> float:
        return math.nan if cell.is_trained and cell.recipe.adapter.kind == "dora" else fake_study.truth(cell)

    product = fake_study.DOCUMENT["product"] | {"base.quant": ["nf4"]}
    report = read_report(fake_study.make(tmp_path, nll=nll, product=product))
    assert {row["adapter"] for row in rows(report, "arms", kind="trained")} == {"lora"}
    assert report.tables["comparisons"] == []
    assert [(row["adapter"], row["rate"], row["is_done"]) for row in report.tables["rates"]][1] == ("dora", None, True)


def test_an_unfinished_search_is_not_one_that_diverged(tmp_path: Path) -> None:
    def nll(cell: Cell) -> float:
        diverges = cell.kind == "rate" and cell.recipe.train.lr == 4e-4 and cell.recipe.train.seed == 1000
        return math.nan if diverges else fake_study.truth(cell)

    product = fake_study.DOCUMENT["product"] | {"base.quant": ["nf4"]}
    rates = fake_study.DOCUMENT["rates"] | {"steps": 1}
    report = read_report(fake_study.make(tmp_path, nll=nll, fail="1001", product=product, rates=rates))
    assert [(row["rate"], row["num_diverged"]) for row in report.tables["rates"]] == [(None, 1), (None, 1)]
    assert not any(row["is_done"] for row in report.tables["rates"])


def test_seeds_that_only_a_stage_names_narrow_an_interval_by_the_spread_of_the_first_ones(tmp_path: Path) -> None:
    def nll(cell: Cell) -> float:
        wobble = 0.1 * (-1) ** cell.recipe.train.seed if cell.recipe.adapter.kind == "dora" else 0.0
        return fake_study.truth(cell) + (wobble if cell.recipe.base.quant == "fp4" and cell.kind == "trained" else 0.0)

    stages = [{"name": "main"}, {"name": "more", "cells": {"base.quant": "fp4", "seed": [4, 5]}}]
    made = fake_study.make(tmp_path, nll=nll, stages=stages)
    report = read_report(made)
    assert {quant: compared(report, quant)["num_seeds"] for quant in fake_study.LOST} == {
        "none": 4,
        "int8": 4,
        "nf4": 4,
        "fp4": 6,
    }
    wide = compared(report, "fp4")
    found = {text[0]: float(text.partition(": ")[2]) for text in wide["seed_improvements"].split("; ")}
    assert list(found) == [*"012345"]
    assert wide["improvement"] == pytest.approx(statistics.mean(found.values()), rel=1e-6)
    of_first = statistics.stdev([found[seed] for seed in "0123"]) / math.sqrt(6)  # Stein's two-stage procedure
    assert wide["half_width"] == pytest.approx(stats.t.ppf(0.975, 3) * of_first, rel=1e-6)
    assert {row["num_seeds"] for row in rows(report, "arms", kind="trained")} == {4}  # the levels have the same seeds
    (arm,) = rows(report, "arms", **{"base.quant": "fp4", "adapter": "lora", "kind": "trained"})
    cells = [cell for cell in read_index(made)["cells"] if cell["kind"] == "trained"]
    cells = [cell for cell in cells if {"fp4", "lora"} <= set(cell["labels"].values())]
    first = [nll_of(made, cell, "compare") for cell in cells if cell["labels"]["seed"] in "0123"]
    assert (len(cells), arm["nll_per_token"]) == (6, pytest.approx(statistics.mean(first), rel=1e-12))
    for cell in read_index(made)["cells"]:
        if cell["kind"] == "trained" and cell["labels"]["seed"] in ("4", "5"):
            (made / "results" / f"{cell['key']}.json").unlink()
    row = compared(read_report(made), "fp4")  # while they are open
    assert (row["num_seeds"], row["num_missing"], row["reason"]) == (4, 0, "")


def test_the_best_rate_of_an_accuracy_is_that_of_the_highest(tmp_path: Path) -> None:
    """1e-4 answers the most questions, 4e-4 the fewest."""

    def nll(cell: Cell) -> float:
        return 2.0 + 0.4 * abs(math.log2(cell.recipe.train.lr / 1e-4)) if cell.is_trained else 2.0

    product = fake_study.DOCUMENT["product"] | {"base.quant": ["nf4"]}
    made = fake_study.make(
        tmp_path,
        nll=nll,
        product=product,
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


def test_the_reference_is_told_by_the_study_file_and_not_by_what_is_finished(tmp_path: Path) -> None:
    """The first arm diverged with all rates, so no result is left of it."""

    def nll(cell: Cell) -> float:
        return float("nan") if cell.labels.get("adapter") == "lora" else fake_study.truth(cell)

    adapters = fake_study.DOCUMENT["product"]["adapter"] | {"odd": {"adapter.kind": "dora", "adapter.rank": 8}}
    made = fake_study.make(tmp_path, nll=nll, product={"base.quant": ["none", "nf4"], "adapter": adapters}, compare={})
    report = read_report(made)
    assert {row["adapter"] for row in rows(report, "arms", kind="trained")} == {"dora", "odd"}
    assert rows(report, "comparisons") == []  # not odd against dora
    assert len(report.answer) == 1
    assert report.answer[0].startswith("There is nothing to compare: no primary comparison has results of both arms")
