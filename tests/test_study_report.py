"""The report of a made-up study: it finds the truth, claims no more, and shows no number that its data have not."""

from __future__ import annotations

import base64
import html
import json
import math
import re
import shutil
import statistics
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from rich.console import Console
from scipy import stats
from typer.testing import CliRunner

from qdora.cli import app
from qdora.errors import UserError
from qdora.model.pruning import PrunedLayer
from qdora.study.answer import answer_of, decided_in_words
from qdora.study.cells import Cell, Expander
from qdora.study.compare import Results
from qdora.study.grid import COLUMNS, CompareConfig, load_study, study_from
from qdora.study.outlook import outlooks, planned_cells
from qdora.study.report import read_report, report_run, write_report
from qdora.study.report_contents import Report
from qdora.study.report_figures import draw_all, spans_of
from qdora.study.report_page import markdown_page, shown_tables
from qdora.study.scores import half_of
from qdora.study.study_directory import StudyDirectory, read_index
from tests import fake_study

NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?:e-?\d+)?(?![\w]|\.\d)")


STAGES = [
    {"name": "main"},
    {"name": "moved", "cells": {"base.quant": ["nf4", "fp4"]}, "kind": "transplant"},
    {"name": "by layer", "cells": {"base.quant": ["none", "nf4"], "seed": [0, 1]}, "kind": "by_layer"},
]
GUESSES = {"uniform": math.log(1000), "unigram": 5.0}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = fake_study.make(tmp_path_factory.mktemp("study"), generated=True, stages=STAGES)
    (dense,) = {cell["dense_key"] for cell in read_index(made)["cells"] if cell["kind"] == "base"}
    (made / "shared/guesses" / dense).mkdir(parents=True)
    (made / "shared/guesses" / dense / "guesses.json").write_text(json.dumps(GUESSES))
    return made


@pytest.fixture(scope="module")
def report(made: Path) -> Report:
    return read_report(made)


def rows(report: Report, table: str, **labels: Any) -> list[dict[str, Any]]:
    return [row for row in report.tables[table] if all(row.get(key) == value for key, value in labels.items())]


def compared(report: Report, quant: str, measure: str = "nll_per_token") -> dict[str, Any]:
    (row,) = rows(report, "comparisons", **{"base.quant": quant, "measure": measure})
    return row


def test_each_arm_has_the_rate_of_its_search(report: Report) -> None:
    trained = rows(report, "arms", kind="trained")
    assert len(trained) == 8
    found = {(row["base.quant"], row["adapter"]): row for row in report.tables["rates"]}
    for row in trained:
        searched = found[row["base.quant"], row["adapter"]]
        assert float(row["rate"]) == pytest.approx(2e-4, rel=0.1)
        assert row["rate"] == searched["rate"]
        assert row["rate_is_interior"]
        assert row["num_seeds"] == 4
        assert (searched["num_runs"], searched["num_diverged"]) == (6, 0)


def test_a_rate_at_the_edge_is_told_and_decides_nothing(tmp_path: Path) -> None:
    product = fake_study.DOCUMENT["product"] | {"base.quant": ["nf4"]}
    rates = {"values": [1e-5, 2e-5, 4e-5], "extend": 0}
    row = compared(read_report(fake_study.make(tmp_path, product=product, rates=rates)), "nf4")
    assert row["lower"] > 0
    assert (row["winner"], row["verdict"]) == ("", "not decided")
    assert "the best learning rate of dora (base.quant=nf4), lora (base.quant=nf4) is the smallest or" in row["reason"]


@pytest.mark.parametrize("search", [True, False])
def test_the_examples_that_find_rates_do_not_compare(tmp_path: Path, search: bool) -> None:
    """A cell of the search and one of the comparison, whose examples of each half are worth 1 and 2."""
    changes: dict[str, Any] = {} if search else {"rates": None, "settings": {"train.lr": 2e-4}}
    made = fake_study.make(tmp_path, product=fake_study.DOCUMENT["product"] | {"base.quant": ["nf4"]}, **changes)
    for cell in read_index(made)["cells"]:
        file = made / "cells" / cell["key"] / "eval/step-1.json"
        scored = json.loads(file.read_text())["per_example"]
        for row in scored:
            row |= {"nll": 1.0 if half_of(f"{row['id']}#1") == "choose" else 2.0, "num_answer_tokens": 1}
        file.write_text(json.dumps({"per_example": scored}))
    report = read_report(made)
    numbers = {row["nll_per_token"] for row in rows(report, "arms", kind="trained")}
    assert len(numbers) == 1
    assert numbers.pop() == pytest.approx(2.0 if search else 1.5, abs=0.0 if search else 0.1)
    results = Results(StudyDirectory(made), study_from(fake_study.DOCUMENT | changes | {"recipe": "demo"}))
    losses = [results.loss(cell["key"]) for cell in read_index(made)["cells"] if cell["kind"] == "rate"]
    assert set(losses) == ({1.0} if search else set())


@pytest.mark.parametrize("number", [1, 2, 5, 200])
def test_halves_are_disjoint_and_do_not_depend_on_what_else_is_evaluated(number: int) -> None:
    halves = [half_of(f"{index}#1") for index in range(number)]
    assert halves == [half_of(f"{index}#2") for index in range(number)]  # a repeated id stays in its half
    assert abs(halves.count("choose") - number / 2) <= 3 * math.sqrt(number) / 2


def test_better_equivalent_and_not_decided(report: Report) -> None:
    row = compared(report, "nf4")
    assert (row["winner"], row["verdict"]) == ("dora", "dora is better")
    assert 0 < row["lower"] < 0.05 < row["upper"]
    assert row["p_holm"] < 0.05 < row["p_equivalent_holm"]
    verdicts = {quant: compared(report, quant)["verdict"] for quant in ("none", "int8", "fp4")}
    assert set(verdicts.values()) <= {"no difference above 0.02", "not decided"}
    for quant, said in verdicts.items():
        other = compared(report, quant)
        assert other["winner"] == ""
        assert (other["p_equivalent_holm"] < 0.05) == (said != "not decided")
        assert max(abs(other["lower"]), abs(other["upper"])) < 0.02 or said == "not decided"
        assert other["smallest_detectable"] > other["half_width"] > 0
    number = list(verdicts.values()).count("not decided")
    assert number < 3
    pattern = (
        rf"NLL \(nats per token\): dora is better in 1 of 4 comparisons; in {3 - number} of 4 comparisons the arms "
        r"differ by less than 0\.02"
    )
    if number:
        pattern += rf"; {number} of 4 are not decided, differences below [-0-9. to]+ could not have been seen"
    pattern += r"\."
    assert re.fullmatch(pattern, report.verdict[0]), report.verdict[0]
    (sentence,) = [
        text for text in report.verdict if text.startswith("base.quant nf4: dora against lora: dora is better")
    ]
    assert f"improvement of dora over lora in NLL (nats per token): {row['improvement']:.4f}, interval " in sentence


def test_a_verdict_needs_a_small_p_after_the_correction(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made, tmp_path / "study")
    index = json.loads((made / "study.json").read_text())
    row = compared(read_report(made), "nf4")
    raw = max(row["p_seeds"], row["p_examples"])
    assert row["p_holm"] == pytest.approx(4 * raw)
    index["study"]["compare"]["alpha"] = 2 * raw  # small enough by itself, not among so many comparisons
    (tmp_path / "study/study.json").write_text(json.dumps(index))
    row = compared(read_report(tmp_path / "study"), "nf4")
    assert (row["winner"], row["verdict"], row["reason"]) == ("", "not decided", "")


def nll_of(made: Path, cell: dict[str, Any], half: str) -> float:
    """NLL per answer token of a cell on one half of its examples, from its file alone."""
    scored = json.loads((made / "cells" / cell["key"] / "eval/step-1.json").read_text())["per_example"]
    kept = [row for row in scored if half_of(f"{row['id']}#1") == half]
    return float(sum(row["nll"] for row in kept) / sum(row["num_answer_tokens"] for row in kept))


def test_an_improvement_is_the_mean_of_the_seeds_by_hand(made: Path, report: Report) -> None:
    """From the files of the cells alone: tokens weight the tasks, half of the examples compare."""
    scores: dict[tuple[str, str], float] = {}
    for cell in read_index(made)["cells"]:
        if cell["kind"] == "trained" and cell["labels"]["base.quant"] == "nf4":
            scores[cell["labels"]["adapter"], cell["labels"]["seed"]] = nll_of(made, cell, "compare")
    differences = [scores["lora", seed] - scores["dora", seed] for seed in "0123"]
    row = compared(report, "nf4")
    mean = sum(differences) / 4
    half = stats.t.ppf(0.975, 3) * math.sqrt(sum((each - mean) ** 2 for each in differences) / 3 / 4)
    found = (row["improvement"], row["lower"], row["upper"])
    assert found == pytest.approx((mean, mean - half, mean + half), rel=1e-9)
    assert row["seed_improvements"] == "; ".join(
        f"{seed}: {each:.9g}" for seed, each in zip("0123", differences, strict=True)
    )


PRIMARY = {
    "over all": {"over": {"base.quant": ["int8", "nf4", "fp4"]}},
    "beyond 16 bits": {"arm": "dora", "over": {"base.quant": ["nf4"]}, "minus": {"base.quant": "none"}},
}


def test_primary_comparisons_are_averages_and_differences_over_bases_seed_by_seed(tmp_path: Path) -> None:
    report = read_report(fake_study.make(tmp_path, compare={"reference": "lora", "primary": PRIMARY}))
    by_seed = {
        row["comparison"] if row["role"] == "primary" else row["base.quant"]: [
            float(text.partition(": ")[2]) for text in row["seed_improvements"].split("; ")
        ]
        for row in report.tables["comparisons"]
        if row["measure"] == "nll_per_token"
    }
    for seed in range(4):
        over = sum(by_seed[quant][seed] for quant in ("int8", "nf4", "fp4")) / 3
        assert by_seed["over all"][seed] == pytest.approx(over, abs=1e-8)
        assert by_seed["beyond 16 bits"][seed] == pytest.approx(by_seed["nf4"][seed] - by_seed["none"][seed], abs=1e-8)
    roles = {row["comparison"]: row["role"] for row in rows(report, "comparisons", measure="nll_per_token")}
    assert roles == {"over all": "primary", "beyond 16 bits": "primary", "dora against lora": "exploratory"}
    assert {row["verdict"] for row in rows(report, "comparisons", role="exploratory")} == {"exploratory"}
    assert {row["winner"] for row in rows(report, "comparisons", role="exploratory")} == {""}
    (row,) = rows(report, "comparisons", comparison="beyond 16 bits", role="primary")
    assert row["p_holm"] <= 2 * max(row["p_seeds"], row["p_examples"])  # two primary ones, however many there are


def test_what_is_left_and_what_is_repaired(report: Report) -> None:
    for quant, lost in fake_study.LOST.items():
        for arm in ("lora", "dora"):
            (row,) = rows(report, "repair", **{"base.quant": quant, "adapter": arm})
            if quant == "none":
                assert row["repair_reason"] == "the base is not compressed"
                continue
            lost -= 0.05 if (quant, arm) == ("nf4", "dora") else 0.0
            assert row["left"] == pytest.approx(lost, abs=0.02)
            assert row["left_lower"] < row["left"] < row["left_upper"]
            if quant == "int8":
                assert row["repair_reason"] == "no adapter was transplanted"
                continue
            moved = 2 * fake_study.LOST[quant]
            assert row["transplant"] == pytest.approx(moved, abs=0.02)
            assert row["repaired"] == pytest.approx(moved - lost, abs=0.02)
            assert row["repaired_share"] == pytest.approx((moved - lost) / moved, abs=0.1)
            assert row["repaired_share_lower"] < row["repaired_share"] < row["repaired_share_upper"]


def test_damage_is_of_the_choices_without_training(report: Report) -> None:
    damage = {row["base.quant"]: row for row in rows(report, "repair", adapter="no adapter")}
    assert list(damage) == ["none", "int8", "nf4", "fp4"]
    assert "damage_choice" not in damage["none"]
    assert damage["int8"]["damage_choice"] < damage["nf4"]["damage_choice"] < damage["fp4"]["damage_choice"]
    assert damage["nf4"]["damage_choice_lower"] > 0
    assert damage["nf4"]["weight_error"] == pytest.approx(0.01)  # the mean of the layers: 0, 0.01, 0.02


def test_an_answer_without_format_is_not_a_wrong_one(report: Report) -> None:
    (lora,) = rows(report, "arms", **{"base.quant": "nf4", "adapter": "lora", "kind": "trained"})
    (dora,) = rows(report, "arms", **{"base.quant": "nf4", "adapter": "dora", "kind": "trained"})
    assert lora["unparsable"] == pytest.approx(0.5, abs=0.15)
    assert dora["unparsable"] == 0
    assert lora["right"] == dora["right"] == pytest.approx(0.25, abs=0.1)  # what is right is right in both
    assert compared(report, "nf4", "unparsable")["improvement"] == pytest.approx(0.5, abs=0.15)
    assert compared(report, "nf4", "unparsable")["verdict"] == "exploratory"


def test_pareto_arms_are_those_that_nothing_beats(report: Report) -> None:
    points = [(row["total_mib"], row["nll_per_token"], row["pareto"]) for row in report.tables["arms"]]
    for mib, nll, best in points:
        beaten = any(m <= mib and n <= nll and (m, n) != (mib, nll) for m, n, _ in points)
        assert best == (not beaten)
    assert 0 < sum(best for *_, best in points) < len(points)


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
    assert "2 of 22 cells have no result; 2 of them failed" in report.verdict[1]
    row = compared(report, "nf4")
    assert (row["num_seeds"], row["num_missing"], row["winner"]) == (3, 2, "")
    assert row["reason"] == "2 cells have no result"


def test_cells_that_wait_are_counted(tmp_path: Path) -> None:
    product = fake_study.DOCUMENT["product"] | {"base.quant": ["nf4"]}
    report = read_report(fake_study.make(tmp_path, fail="1001", product=product))  # no search can end
    assert rows(report, "arms", kind="trained") == []
    assert report.verdict[1] == "8 more cells wait for a learning rate or an adapter."


def test_a_rate_that_diverges_is_the_worst_and_vetoes_no_winner(tmp_path: Path) -> None:
    def nll(cell: Cell) -> float:
        diverges = cell.kind == "rate" and cell.recipe.train.lr == 4e-4 and cell.recipe.train.seed == 1001
        return math.nan if diverges else fake_study.truth(cell)

    report = read_report(fake_study.make(tmp_path, nll=nll))
    assert {row["reason"] for row in rows(report, "cells", status="diverged")} == {"loss nan"}
    assert "8 of 80 trainings diverged, 0 of them in the comparison" in report.verdict[1]
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
    assert "1 of 20 trainings diverged, 1 of them in the comparison" in report.verdict[1]


def test_an_arm_that_diverges_at_every_rate_is_not_compared(tmp_path: Path) -> None:
    def nll(cell: Cell) -> float:
        return math.nan if cell.is_trained and cell.recipe.adapter.kind == "dora" else fake_study.truth(cell)

    product = fake_study.DOCUMENT["product"] | {"base.quant": ["nf4"]}
    report = read_report(fake_study.make(tmp_path, nll=nll, product=product))
    assert {row["adapter"] for row in rows(report, "arms", kind="trained")} == {"lora"}
    assert report.tables["comparisons"] == []
    assert "1 arms diverged at every learning rate that was tried" in report.verdict[2]


def test_an_unfinished_search_is_not_one_that_diverged(tmp_path: Path) -> None:
    def nll(cell: Cell) -> float:
        diverges = cell.kind == "rate" and cell.recipe.train.lr == 4e-4 and cell.recipe.train.seed == 1000
        return math.nan if diverges else fake_study.truth(cell)

    product = fake_study.DOCUMENT["product"] | {"base.quant": ["nf4"]}
    rates = fake_study.DOCUMENT["rates"] | {"steps": 1}
    report = read_report(fake_study.make(tmp_path, nll=nll, fail="1001", product=product, rates=rates))
    assert [(row["rate"], row["num_diverged"]) for row in report.tables["rates"]] == [(None, 1), (None, 1)]
    assert not [text for text in report.verdict if "at every learning rate" in text]


def test_the_search_tells_the_spread_before_anything_is_compared(tmp_path: Path) -> None:
    product = fake_study.DOCUMENT["product"] | {"base.quant": ["nf4"]}
    made = fake_study.make(tmp_path, fail="7", product=product, seeds=[7])  # the only cells that would be compared
    study = load_study(tmp_path / "study.yaml")
    results = Results(StudyDirectory(made), study)
    (found,) = outlooks(planned_cells(Expander(study), results), results)
    losses = {}
    for cell in read_index(made)["cells"]:
        if cell["kind"] == "rate" and cell["labels"]["train.lr"] == "0.0002":
            losses[cell["labels"]["adapter"], cell["labels"]["seed"]] = nll_of(made, cell, "choose")
    differences = [losses["dora", seed] - losses["lora", seed] for seed in ("1000", "1001")]
    assert found.source == "the search for rates"
    assert found.spread == pytest.approx(statistics.stdev(differences), rel=1e-9)


def test_further_seeds_are_run_where_the_interval_is_wide(tmp_path: Path) -> None:
    def nll(cell: Cell) -> float:
        wobble = 0.1 * (-1) ** cell.recipe.train.seed if cell.recipe.adapter.kind == "dora" else 0.0
        return fake_study.truth(cell) + (wobble if cell.recipe.base.quant == "fp4" and cell.kind == "trained" else 0.0)

    more = {"seeds": [4, 5], "half_width": 0.05}
    report = read_report(fake_study.make(tmp_path, nll=nll, more_seeds=more))
    assert {quant: compared(report, quant)["num_seeds"] for quant in fake_study.LOST} == {
        "none": 4,
        "int8": 4,
        "nf4": 4,  # decided, but that has no part in it
        "fp4": 6,
    }


def test_the_answer_has_three_sentences_each_with_its_number(report: Report, tmp_path: Path) -> None:
    assert report.question == "How far can the base be compressed before lora, and before dora, stops repairing it?"
    assert len(report.answer) == 3
    assert report.answer[0] == report.verdict[0]
    left = {row["base.quant"]: row for row in rows(report, "repair", adapter="lora") if "left" in row}
    least, most = (f"{left[quant]['left']:.3f} ({quant})" for quant in ("int8", "fp4"))
    inside = [quant for quant, row in left.items() if row["left_upper"] < 0.02]
    assert report.answer[1] == (
        f"After training, lora is worse than on the uncompressed base by {least} to {most} in NLL (nats per token); "
        f"surely less than 0.02 on {', '.join(inside) or 'no base'}."
    )
    shares = sorted((row["repaired_share"], quant) for quant, row in left.items() if "repaired_share" in row)
    told = " to ".join(f"{share:.2f} ({quant})" for share, quant in shares)
    assert f"makes good a share of {told} of the damage" in report.answer[2]
    compare = {"reference": "lora", "primary": PRIMARY, "spread": 0.03}
    primary = read_report(fake_study.make(tmp_path, compare=compare, seeds=[0, 1, 2]))
    (row,) = rows(primary, "comparisons", comparison="over all", role="primary")
    assert primary.answer[0].startswith("over all: ")
    assert f"by {row['improvement']:.4f} on average (95 % interval {row['lower']:.4f} to" in primary.answer[0]
    assert row["half_width_planned"] == pytest.approx(stats.t.ppf(0.975, 2) * 0.03 / math.sqrt(3))


def test_the_damage_left_is_told_in_the_metric_of_the_study() -> None:
    row = {"adapter": "lora", "base.quant": "nf4", "left": 0.1, "left_upper": 0.2}
    told = answer_of([], [row], ["base.quant"], CompareConfig(metric="acc"), "accuracy")[1]
    expected = (
        "After training, lora is worse than on the uncompressed base by 0.100 (nf4) in accuracy; surely less than"
    )
    assert told == f"{expected} 0.02 on no base."


def test_what_is_not_decided_says_beside_it_what_was_not_seen_or_why(report: Report) -> None:
    row = compared(report, "nf4") | {"comparison": "over all", "winner": "", "verdict": "not decided"}
    seen = f"differences below {row['smallest_detectable']:.2g} could not have been seen."
    assert decided_in_words(row, "NLL").endswith(f"), {seen}")
    assert decided_in_words(row | {"reason": "there are 2 seeds"}, "NLL").endswith("), there are 2 seeds.")
    (table,) = [table for table in shown_tables(report) if table["name"] == "comparisons"]
    first = table["header"][: table["num_first"]]
    place = first.index("verdict")
    assert first[place + 1] == "reason" or "reason" not in table["header"]  # without any reason there is no column
    assert "smallest detectable" in first
    assert "p seeds" in table["header"][table["num_first"] :]  # folded


def test_a_long_table_is_in_its_data_file_alone(report: Report) -> None:
    for number, is_told in ((300, True), (301, False)):
        curves = [{"step": step, "training_loss": 1.0} for step in range(number)]
        longer = replace(report, tables=report.tables | {"curves": curves})
        text = markdown_page(longer, shown_tables(longer), "a study")
        section = text.partition("## Learning curves")[2].partition("\n## ")[0]
        assert ("| step |" in section) == is_told
        assert ("The rows are in [curves.csv](curves.csv)." in section) == (not is_told)


def test_curves_are_means_over_the_seeds(made: Path, report: Report) -> None:
    found = rows(report, "curves", **{"base.quant": "nf4", "adapter": "dora"})
    cells = [cell for cell in read_index(made)["cells"] if cell["kind"] == "trained"]
    own = [c for c in cells if (c["labels"]["base.quant"], c["labels"]["adapter"]) == ("nf4", "dora")]
    losses: dict[int, list[float]] = {}
    for cell in own:
        for text in (made / "cells" / cell["key"] / "metrics.jsonl").read_text().splitlines():
            line = json.loads(text)
            losses.setdefault(line["step"], []).append(line["loss"])
    assert [row["step"] for row in found] == [*range(2, 41, 2)]  # 40 steps in at most 32 points
    for row in found:
        both = losses[row["step"] - 1] + losses[row["step"]]
        assert row["training_loss"] == pytest.approx(statistics.mean(both), rel=1e-12)


def test_guesses_blocks_and_layers_are_told(report: Report) -> None:
    guesses = {row["guess"]: row["nll"] for row in report.tables["guesses"]}
    assert guesses == GUESSES | {"choice": pytest.approx(math.log(2))}  # piqa's two choices
    off = [row for row in report.tables["blocks"] if "block_off" in row]
    assert {(row["base.quant"], row["adapter"], row["seed"]) for row in off} == {
        (quant, kind, seed) for quant in ("none", "nf4") for kind in ("lora", "dora") for seed in "01"
    }
    undone = [row for row in report.tables["changes"] if "error_undone" in row]
    assert {row["base.quant"] for row in undone} == {"nf4"}
    assert {(row["layer"], row["block"]) for row in undone} == {
        (f"layers.{block}.{name}", block) for block in (0, 1) for name in ("q_proj", "o_proj")
    }


@pytest.mark.parametrize(
    "values, expected",
    [
        ([0.0, 0.1, 0.2, 9.0], 2),  # one far above
        ([-7.0, 0.1, 0.2, 0.3], 2),  # one far below
        ([0.0, 1.0, 2.0, 3.0], 1),
        ([0.5, 0.5], 1),
    ],
)
def test_an_axis_is_broken_where_one_value_is_far_off(values: list[float], expected: int) -> None:
    spans = spans_of(values)
    assert len(spans) == expected
    for value in values:
        assert sum(low < value < high for low, high in spans) == 1
    assert sum(high - low for low, high in spans) < 1.3 * (max(values) - min(values) or 1) / (expected * 2 - 1)


def numbers_of(text: str) -> set[str]:
    return set(NUMBER.findall(text))


def test_every_number_of_the_page_is_in_the_data_beside_it(report: Report, tmp_path: Path) -> None:
    write_report(report, tmp_path, "a study")
    known: list[float] = []
    texts = "a study"
    frames = [pd.read_csv(file, dtype={"train.lr": str}) for file in sorted(tmp_path.glob("*.csv"))]
    assert len(frames) == 11
    for frame in frames:
        for column in frame:
            if frame[column].dtype == object or str(frame[column].dtype) in ("str", "string"):
                texts += " " + " ".join(map(str, frame[column].dropna()))
            known += pd.to_numeric(frame[column], errors="coerce").dropna().astype(float).tolist()
    in_texts = numbers_of(texts)
    page = (tmp_path / "index.html").read_text()
    body = re.sub(r"<head>.*?</head>", " ", page, flags=re.DOTALL)
    body = html.unescape(re.sub(r"<[^>]*>", " ", body))
    markdown = (tmp_path / "report.md").read_text()
    for text in (body, markdown):
        found = numbers_of(text)
        assert len(found) > 100
        for token in found - in_texts:
            digits = len(token.partition(".")[2])
            assert any(f"{value:.{digits}f}" == token for value in known), token


@pytest.mark.figures
def test_the_page_needs_nothing_beside_it(report: Report, tmp_path: Path) -> None:
    files = write_report(report, tmp_path, "a <study> & more")
    page = files[0].read_text()
    assert f"<title>{report.question}</title>" in page
    assert "<h2>Data of a &lt;study&gt; &amp; more</h2>" in page
    assert 'name="viewport"' in page
    figures = [
        base64.b64decode(text).decode()
        for text in re.findall(r'src(?:set)?="data:image/svg\+xml;base64,([^"]+)"', page)
    ]
    widths = [float(re.search(r'<svg [^>]*width="([0-9.]+)pt"', figure)[1]) for figure in figures]  # type: ignore[index]
    assert widths == [288.0, 792.0] * len(draw_all(report))  # for a telephone, and for a page
    assert len(widths) == 16
    assert all("<svg" in figure and "<text" not in figure for figure in figures)  # letters are paths: no fonts
    assert "<script" not in page
    assert not re.search(r"(?:src|srcset|href)=[\"'](?!data:image/svg)|@import|url\(", page)


@pytest.mark.figures
def test_errors_by_block_are_drawn_of_more_bases_than_colors_before_anything_is_compared(report: Report) -> None:
    blocks = [{"base.quant": f"base {n}", "block": block, "relative_error": 0.1} for n in range(12) for block in (0, 1)]
    for compared, drawn in ([], range(8)), (["16 bits", "base 11"], [*range(7), 11]):
        pairs = [report.tables["comparisons"][0] | {"base.quant": name} for name in compared]
        tables = {"blocks": blocks, "comparisons": pairs, "changes": []}
        early = replace(report, tables=report.tables | tables)
        (depth,) = (each for each in draw_all(early) if each.title == "Where in depth")
        assert [n for n in range(12) if re.search(rf"base {n}\b", depth.wide)] == list(drawn)


@pytest.mark.slow
@pytest.mark.figures
def test_transplants_are_in_no_figure(report: Report) -> None:
    arms = [row for row in report.tables["arms"] if row["kind"] != "transplant"]
    assert len(arms) == len(report.tables["arms"]) - 4
    assert draw_all(report) != draw_all(replace(report, tables=report.tables | {"arms": arms[:-1]}))
    assert draw_all(report) == draw_all(replace(report, tables=report.tables | {"arms": arms}))


def test_csv_and_parquet_hold_the_same(report: Report, tmp_path: Path) -> None:
    write_report(report, tmp_path, "study")
    tables = {name: rows for name, rows in report.tables.items() if rows}
    assert set(tables) == set(report.tables)
    for name, expected in tables.items():
        csv, parquet = pd.read_csv(tmp_path / f"{name}.csv"), pd.read_parquet(tmp_path / f"{name}.parquet")
        assert len(csv) == len(parquet) == len(expected)
        assert list(csv.columns) == list(parquet.columns)
        for column in parquet.select_dtypes("number"):
            pd.testing.assert_series_equal(csv[column], parquet[column], check_dtype=False, rtol=1e-12)


def test_the_same_study_gives_the_same_files(made: Path, tmp_path: Path) -> None:
    first, second = (write_report(read_report(made), tmp_path / name, "study") for name in "ab")
    assert [file.read_bytes() for file in first] == [file.read_bytes() for file in second]


def test_the_command(made: Path, tmp_path: Path) -> None:
    found = CliRunner().invoke(app, ["report", str(made), "--out", str(tmp_path / "out"), "--json"])
    assert found.exit_code == 0, found.output
    document = json.loads(found.stdout)
    assert Path(document["page"]).is_file()
    assert document["verdict"][0].startswith("NLL (nats per token): dora is better in 1 of 4 comparisons")
    found = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert found.exit_code == 2
    assert "must be a run (with recipe.yaml) or a study (with study.json)" in found.output


def test_no_sentence_is_told_twice(made: Path, report: Report, tmp_path: Path) -> None:
    found = CliRunner().invoke(app, ["report", str(made), "--out", str(tmp_path)])
    shown = " ".join(found.stdout.split())  # lines are broken
    pages = [(tmp_path / name).read_text() for name in ("report.md", "index.html")]
    assert len(report.verdict) > 1
    for sentence in {*report.answer, *report.verdict}:
        assert [text.count(sentence) for text in (shown, pages[0], html.unescape(pages[1]))] == [1, 1, 1], sentence


def test_no_column_can_be_an_axis_too(report: Report) -> None:
    """Every column that is not an axis is refused as the name of one."""
    axes = set(fake_study.DOCUMENT["product"])
    columns = {column for table in report.tables.values() for row in table for column in row}
    assert columns - axes - {"prompt", "output"} <= COLUMNS
    layer = {field.name for field in fields(PrunedLayer)} | {"sparsity"}
    assert layer <= COLUMNS


def test_a_study_without_results_has_no_report(tmp_path: Path) -> None:
    made = fake_study.make(tmp_path)
    for file in (made / "results").glob("*.json"):
        file.unlink()
    with pytest.raises(UserError, match=r"no cell is finished yet\. Fix: run 'qdora study' first"):
        report_run(made, console=Console(quiet=True))
