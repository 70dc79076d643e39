"""The report of a made-up study: it finds the truth and claims no more, least of all where cells are missing, wait or
have diverged."""

from __future__ import annotations

import html
import json
import math
import re
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from rich.console import Console
from scipy import stats
from typer.testing import CliRunner

from qdora.cli import app
from qdora.errors import UserError
from qdora.study.cells import Cell
from qdora.study.compare import Arm, named_comparisons
from qdora.study.grid import load_study, study_from
from qdora.study.report import Report, read_report, report_run, write_report
from qdora.study.results import Results, StudyDirectory, half_of, read_index
from tests import fake_study
from tests.fake_study import ADAPTERS, DOCUMENT, LOST, compared, diverging, forget, nll_of, product, rows

NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?:e-?\d+)?(?![\w]|\.\d)")
STAGES = [
    {"name": "main"},
    {"name": "moved", "cells": {"base.quant": ["nf4", "fp4"]}, "kind": "transplant"},
    {"name": "back", "cells": {"base.quant": "nf4", "adapter": "dora"}, "kind": "set_back"},
    {"name": "by layer", "cells": {"base.quant": ["none", "nf4"], "seed": [0, 1]}, "kind": "by_layer"},
    {"name": "by step", "cells": {"base.quant": "nf4", "seed": 2}, "kind": "by_layer", "steps": [1, 2]},
]
ODD = {"base.quant": ["none", "nf4"], "adapter": ADAPTERS | {"odd": {"adapter.kind": "dora", "adapter.rank": 8}}}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_study.make(tmp_path_factory.mktemp("study"), generated=True, stages=STAGES)


@pytest.fixture(scope="module")
def report(made: Path) -> Report:
    return read_report(made)


def test_arms_have_the_rates_of_their_searches_and_sizes(report: Report) -> None:
    trained = rows(report, "arms", kind="trained")
    assert len(trained) == 8
    searches = {(row["base.quant"], row["adapter"]): row for row in report.tables["rates"]}
    for row in trained:
        searched, bits = searches[row["base.quant"], row["adapter"]], fake_study.BITS[row["base.quant"]]
        assert float(row["rate"]) == pytest.approx(2e-4, rel=0.1)
        assert (row["rate"], row["rate_is_interior"], row["num_seeds"]) == (searched["rate"], True, 4)
        assert (searched["num_runs"], searched["num_diverged"]) == (6, 0)
        sizes = [row[name] for name in ("bits_per_weight", "total_mib", "adapter_mib")]
        assert sizes == pytest.approx([bits, bits / 8 + (4096 + 2048) / 2**20, 2048 / 2**20], rel=1e-5)
    # The run whose magnitudes were set back knows how its base was pruned
    assert {row["sparsity"] for row in rows(report, "arms", **{"base.quant": "nf4", "adapter": "dora"})} == {0.25, 0.0}
    assert [row["sparsity"] for row in rows(report, "arms", kind="set_back")] == [0.25]


def test_the_base_of_a_recipe_is_not_the_uncompressed_one(tmp_path: Path) -> None:
    """In a study without an axis of bases neither of the two has a label."""
    made = fake_study.make(tmp_path, product={"adapter": ADAPTERS}, settings={"base.quant": "nf4"}, seeds=[0, 1])
    report = read_report(made)
    bases = {row["is_dense"]: row for row in rows(report, "arms", kind="base")}
    bits = {is_dense: row["bits_per_weight"] for is_dense, row in bases.items()}
    assert bits == pytest.approx({True: 16.0, False: 4.1}, rel=1e-5)
    assert bases[False]["nll_per_token"] - bases[True]["nll_per_token"] == pytest.approx(0.3, abs=0.02)
    assert [row["is_dense"] for row in rows(report, "arms", kind="trained")] == [False, False]
    (damaged,) = (row for row in report.tables["repair"] if "damage_choice" in row)
    assert damaged["damage_choice"] > 0


@pytest.mark.parametrize("search", [True, False])
def test_the_examples_that_find_rates_do_not_compare(tmp_path: Path, search: bool) -> None:
    """Examples of each half are worth 1 and 2."""
    changes: dict[str, Any] = {} if search else {"rates": None, "settings": {"train.lr": 2e-4}}
    made = fake_study.make(tmp_path, product=product("nf4"), **changes)
    for file in made.glob("cells/*/eval/step-1.json"):
        scored = json.loads(file.read_text())["per_example"]
        for row in scored:
            row |= {"nll": 1.0 if half_of(f"{row['id']}#1") == "choose" else 2.0, "num_answer_tokens": 1}
        file.write_text(json.dumps({"per_example": scored}))
    (number,) = {row["nll_per_token"] for row in rows(read_report(made), "arms", kind="trained")}
    assert number == pytest.approx(2.0 if search else 1.5, abs=0.0 if search else 0.1)
    halves = [half_of(f"{index}#1") for index in range(200)]
    assert halves == [half_of(f"{index}#2") for index in range(200)]  # a repeated id stays in its half
    assert abs(halves.count("choose") - 100) <= 3 * math.sqrt(200) / 2


def test_better_equivalent_and_not_decided(report: Report) -> None:
    row = compared(report, "nf4")
    assert (row["winner"], row["verdict"]) == ("dora", "dora is better")
    assert 0 < row["lower"] < 0.05 < row["upper"]
    assert row["p_holm"] < 0.05 < row["p_equivalent_holm"]
    others = [compared(report, quant) for quant in ("none", "int8", "fp4")]
    assert {row["winner"] for row in others} == {""}
    assert [row["verdict"] for row in others].count("not decided") < 3
    for row in others:
        assert row["verdict"] == ("no difference above 0.02" if row["p_equivalent_holm"] < 0.05 else "not decided")
        assert max(abs(row["lower"]), abs(row["upper"])) < 0.02 or row["verdict"] == "not decided"
        assert row["smallest_detectable"] > row["half_width"] > 0


def test_a_later_comparison_has_its_own_seeds_reference_and_family(tmp_path: Path) -> None:
    later = {"arm": "odd", "reference": "dora", "over": {"base.quant": "nf4"}, "seeds": [4, 5, 6], "family": "later"}
    made = fake_study.make(
        tmp_path,
        product={"base.quant": ["nf4"], "adapter": ODD["adapter"]},
        stages=[{"name": "main"}, {"name": "more", "cells": {"adapter": ["dora", "odd"], "seed": [4, 5, 6]}}],
        compare={"reference": "lora", "primary": {"all": {"arm": "dora"}, "odd": later}, "spread": 0.03},
        bases=False,
    )
    report = read_report(made)
    assert [text.partition(":")[0] for text in report.answer] == ["all", "odd"]
    both = rows(report, "comparisons", role="primary")
    assert [(row["num_seeds"], row["num_tests"], row["reference"]) for row in both] == [(4, 1, "lora"), (3, 1, "dora")]
    assert both[1]["half_width_planned"] == pytest.approx(stats.t.ppf(0.975, 2) * 0.03 / math.sqrt(3))
    others = rows(report, "comparisons", role="exploratory", measure="nll_per_token")
    assert sorted(row["comparison"] for row in others) == ["dora against lora", "odd against lora"]
    assert {(row["verdict"], row["winner"]) for row in others} == {("exploratory", "")}
    forget(made, "odd", "5")
    (row,) = rows(read_report(made), "comparisons", comparison="odd", role="primary")
    assert (row["num_seeds"], row["num_missing"], row["verdict"]) == (2, 1, "not decided")


def test_what_is_damaged_left_and_repaired(report: Report) -> None:
    damage = {row["base.quant"]: row for row in rows(report, "repair", adapter="no adapter")}
    assert list(damage) == ["int8", "nf4", "fp4"]
    assert 0 < damage["fp4"]["damage_choice_lower"] < damage["fp4"]["damage_choice"]
    assert not rows(report, "repair", **{"base.quant": "none", "adapter": "dora"})
    found = {(row["base.quant"], row["adapter"]): row for row in report.tables["repair"] if row["adapter"] in ADAPTERS}
    assert {arm for arm, row in found.items() if "magnitudes" in row} == {("nf4", "dora")}
    assert {quant for (quant, _), row in found.items() if "transplant" not in row} == {"int8"}
    for (quant, arm), row in found.items():
        lost, moved = LOST[quant] - (0.05 if (quant, arm) == ("nf4", "dora") else 0.0), 2 * LOST[quant]
        assert row["left"] == pytest.approx(lost, abs=0.02)
        if quant != "int8":
            assert (row["transplant"], row["repaired"]) == pytest.approx((moved, moved - lost), abs=0.02)
            assert row["repaired_share_lower"] < row["repaired_share"] < row["repaired_share_upper"]


def test_answers_choices_and_tasks(report: Report) -> None:
    arms = {row["adapter"]: row for row in rows(report, "arms", kind="trained", **{"base.quant": "nf4"})}
    # What is right is right in both: an answer without format is not a wrong one
    assert arms["lora"]["right"] == arms["dora"]["right"] == pytest.approx(0.25, abs=0.1)
    assert (arms["lora"]["unparsable"], arms["dora"]["unparsable"]) == (pytest.approx(0.5, abs=0.15), 0)
    unparsable, acc, by_task = (compared(report, "nf4", name) for name in ("unparsable", "acc", "nll_by_task"))
    assert (unparsable["improvement"], unparsable["verdict"]) == (pytest.approx(0.5, abs=0.15), "exploratory")
    assert (acc["zone"], by_task["zone"]) == (0.01, 0.02)
    found = rows(report, "tasks", **{"base.quant": "nf4", "measure": "nll_per_token"})
    assert {row["task"] for row in found} == set(fake_study.NUM_EXAMPLES)
    assert by_task["improvement"] == pytest.approx(statistics.mean(row["improvement"] for row in found))
    whole = sum(row["weight"] * row["improvement"] for row in found)
    assert compared(report, "nf4")["improvement"] == pytest.approx(whole, abs=2e-3)  # the weights differ by seed
    (choices,) = rows(report, "tasks", **{"base.quant": "nf4", "measure": "acc"})  # one task has choices
    assert choices["improvement"] == acc["improvement"]


def test_blocks_and_layers(report: Report) -> None:
    off = {(row["base.quant"], row["adapter"], row["seed"]) for row in report.tables["blocks"] if "block_off" in row}
    assert off == {(quant, kind, seed) for quant in ("none", "nf4") for kind in ADAPTERS for seed in "01"}
    changes = [row for row in report.tables["changes"] if "error_undone" in row]
    assert {row["base.quant"] for row in changes} == {"nf4"}
    layers = {(f"layers.{block}.{name}", block) for block in (0, 1) for name in ("q_proj", "o_proj")}
    assert {(row["layer"], row["block"]) for row in changes} == layers | {("lm_head", None)}
    assert {(row["direction_change"], row["magnitude_change"]) for row in changes} == {(0.01, 0.001)}
    (steps,) = {tuple(row["step"] for row in rows(report, "checkpoints", adapter=kind)[::5]) for kind in ADAPTERS}
    assert steps == (1, 2)
    assert {(row["nll"], row["length_change"]) for row in report.tables["checkpoints"]} == {(2.0, 0.002)}


@pytest.mark.figures
def test_the_page_needs_nothing_beside_it_and_every_number_is_in_the_data(
    made: Path, report: Report, tmp_path: Path
) -> None:
    title = "a <study> & more"
    files = write_report(report, tmp_path / "a", title)
    again = write_report(read_report(made), tmp_path / "b", title)
    assert [file.read_bytes() for file in files] == [file.read_bytes() for file in again]
    page = files[0].read_text()
    assert "<title>a &lt;study&gt; &amp; more</title>" in page
    assert page.count('src="data:image/svg+xml;base64,') == 1
    assert not re.search(r"<script|(?:src|href)=[\"'](?!data:image/svg)|@import|url\(", page)
    known = [95.0, 0.0]  # 95 % intervals; right of 0
    known += [len(report.tables["cells"]), *Counter(row["status"] for row in report.tables["cells"]).values()]
    texts = set[str]()
    frames = [pd.read_csv(file, dtype={"train.lr": str}) for file in sorted((tmp_path / "a").glob("*.csv"))]
    assert len(frames) == 9
    for column in (frame[name] for frame in frames for name in frame):
        if column.dtype == object or str(column.dtype) in ("str", "string"):
            texts |= set(NUMBER.findall(" ".join(map(str, column.dropna()))))
        known += pd.to_numeric(column, errors="coerce").dropna().astype(float).tolist()
    body = re.sub(r"<head>.*?</head>", " ", page, flags=re.DOTALL)
    for text in (html.unescape(re.sub(r"<[^>]*>", " ", body)), (tmp_path / "a/report.md").read_text()):
        found = set(NUMBER.findall(text))
        assert len(found) > 100
        for token in found - texts:
            digits = len(token.partition(".")[2])
            assert any(f"{value:.{digits}f}" == token for value in known), token


def test_the_command_and_what_has_no_report(made: Path, tmp_path: Path) -> None:
    found = CliRunner().invoke(app, ["report", str(made), "--out", str(tmp_path / "out"), "--json"])
    document = json.loads(found.stdout)
    assert (found.exit_code, Path(document["page"]).is_file(), len(document["answer"])) == (0, True, 4)
    found = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert found.exit_code == 2
    assert "is not a run (it has no recipe.yaml)" in found.output
    empty = fake_study.make(tmp_path / "empty", product=product("nf4"), rates=None)
    forget(empty)
    forget(empty, kind="base")
    with pytest.raises(UserError, match="no cell has scores"):
        report_run(empty, console=Console(quiet=True))


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
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], str, str]] = {
    # 3 rates with 2 seeds and 4 seeds of each arm, the base and the uncompressed one
    "edge": (NF4 | {"rates": {"values": [1e-5, 2e-5, 4e-5], "extend": 0}}, NO_WINNER, AT_EDGE, "22 cells: 22 done"),
    "two seeds": (NF4 | {"seeds": [0, 1]}, NO_WINNER, "seeds: 2, at least 3", ""),
    "one seed": (NF4 | {"seeds": [0]}, NO_WINNER | ONE_SEED, "seeds: 1, at least 3", ""),
    "no search": (NF4 | {"rates": None}, NO_WINNER, "the learning rates were not searched", ""),
    "a base lacks": (TWO_BASES | {"forget": ("fp4", "dora")}, NO_WINNER, "no result for base.quant=fp4", ""),
    "one example": (NF4 | {"compare": ON_TEST, "num_sums": 1}, NO_WINNER | {"p_examples": math.nan}, "example", ""),
    "both diverged": (NF4 | {"nll": diverging()}, NO_WINNER | BOTH_DIVERGED, "", "8 diverged"),
    "diverged": (NF4 | {"nll": diverging("dora", "1")}, NO_WINNER | {"num_diverged": 1}, "", "1 diverged"),
    "failed": (NF4 | {"fail": "3"}, NO_WINNER | {"num_missing": 2}, "cells without a result: 2", "20 done, 2 failed"),
    "signs agree": (gains(0.02, 0.4, 0.05, 1.5), NO_WINNER | {"num_seeds": 4}, "", ""),
    "a seed disagrees": (gains(0.4, 0.5, 0.45, 0.5, 0.4, 0.45, 0.5, -0.05), DORA | {"num_seeds": 8}, "", ""),
    "rate diverged": (NF4 | {"nll": diverging("0.0004", "1001", kinds=("rate",))}, DORA, "", "2 diverged"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_a_comparison_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    changes, expected, reason, status = CASES[case]
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
    before = rows(read_report(made), "comparisons", role="primary")[0]
    forget(made, "fp4", "dora")
    (row,) = rows(read_report(made), "comparisons", role="primary")
    larger = max(row["p_seeds"], row["p_examples"])
    assert (row["p_holm"], row["num_tests"], row["winner"]) == (before["p_holm"], 2, "dora")
    assert row["p_holm"] == pytest.approx(2 * larger)
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
    assert [each.lacking for each in named_comparisons(arms, study) if each.family] == [lacking]


@pytest.mark.parametrize("lost", [["none"], ["none", "fp4"], ["fp4"]])
def test_what_is_left_needs_a_measured_run_on_the_uncompressed_base(tmp_path: Path, lost: list[str]) -> None:
    nll = diverging("dora", lost[0], nll=diverging("dora", lost[-1]))
    report = read_report(fake_study.make(tmp_path, nll=nll, product=product("none", "fp4")))
    left = [row["left"] for row in rows(report, "repair", adapter="dora", **{"base.quant": "fp4"})]
    assert (left == []) == ("none" in lost)
    assert all(each > 4 for each in left)  # a uniform guess among 1,000 tokens


def no_rate(*labels: str, **changes: Any) -> dict[str, Any]:
    return {"nll": diverging(*labels, kinds=("rate", "trained"))} | changes


ONE_STEP = DOCUMENT["rates"] | {"steps": 1}
UNFINISHED = NF4 | {"nll": diverging("0.0004", "1000", kinds=("rate",)), "fail": "1001", "rates": ONE_STEP}
NOTHING = "There is nothing to compare"


@pytest.mark.parametrize(
    "changes, trained, searches, words",
    [
        # Three rates, and two below them
        (no_rate("dora", **NF4), {"lora"}, {("lora", True, True, 0), ("dora", True, False, 5)}, NOTHING),
        (UNFINISHED, set(), {("lora", False, False, 1), ("dora", False, False, 1)}, "; 8 more wait"),
        # The reference is that of the study file, not the first arm with a result
        (
            no_rate("lora", product=ODD, compare={}),
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
    told = [(row["adapter"], row["is_done"], row["rate"] is not None, row) for row in report.tables["rates"]]
    assert {(*search, row["num_diverged"]) for *search, row in told} == searches
    assert words in " ".join([*report.answer, report.status])


def test_seeds_that_only_a_stage_names_narrow_an_interval_by_the_spread_of_the_first_ones(tmp_path: Path) -> None:
    stages = [{"name": "main"}, {"name": "more", "cells": {"base.quant": "fp4", "seed": [4, 5]}}]
    made = fake_study.make(tmp_path, stages=stages, product=product("nf4", "fp4"))
    report = read_report(made)
    wide = compared(report, "fp4")
    assert (compared(report, "nf4")["num_seeds"], wide["num_seeds"]) == (4, 6)
    found = [float(text.partition(": ")[2]) for text in wide["seed_improvements"].split("; ")]
    of_first = statistics.stdev(found[:4]) / math.sqrt(6)  # Stein's two-stage procedure
    assert wide["half_width"] == pytest.approx(stats.t.ppf(0.975, 3) * of_first, rel=1e-6)
    # Levels have the same seeds in all arms
    arms = rows(report, "arms", kind="trained")
    assert {row["num_seeds"] for row in arms} == {4}
    cells = [cell for cell in read_index(made)["cells"] if cell["kind"] == "trained"]
    cells = [cell for cell in cells if {"fp4", "lora"} <= set(cell["labels"].values())]
    first = [nll_of(made, cell, "compare") for cell in cells if cell["labels"]["seed"] in "0123"]
    (level,) = (row["nll_per_token"] for row in arms if (row["base.quant"], row["adapter"]) == ("fp4", "lora"))
    assert (len(cells), level) == (6, pytest.approx(statistics.mean(first), rel=1e-12))
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
    chosen = [row["rate"] for row in (*report.tables["rates"], *rows(report, "arms", kind="trained"))]
    assert chosen == ["0.0001"] * 4
    results = Results(StudyDirectory(made), load_study(tmp_path / "study.yaml"))
    searched = [cell["key"] for cell in read_index(made)["cells"] if cell["kind"] == "rate"]
    assert len(searched) == 4 * 2 * 2
    scored = json.loads((made / "cells" / searched[0] / "eval/step-1.json").read_text())["per_example"]
    right = [row["acc"] for row in scored if "acc" in row and half_of(f"{row['id']}#1") == "choose"]
    assert results.loss(searched[0]) == pytest.approx(-statistics.mean(right), rel=1e-12)
