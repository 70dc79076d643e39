"""The report of a made-up study: it finds the truth, claims no more, and shows no number that its data have not."""

from __future__ import annotations

import base64
import html
import json
import math
import re
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from rich.console import Console
from typer.testing import CliRunner

from qdora.cli import app
from qdora.errors import UserError
from qdora.model.pruning import PrunedLayer
from qdora.study.grid import COLUMNS, Cell
from qdora.study.report import Report, read_report, report_run, write_report
from qdora.study.scores import half
from qdora.study.study_directory import read_index
from tests import fake_study

NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?:e-?\d+)?(?![\w]|\.\d)")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_study.make(tmp_path_factory.mktemp("study"), generated=True)


@pytest.fixture(scope="module")
def report(made: Path) -> Report:
    return read_report(made)


def rows(report: Report, table: str, **labels: Any) -> list[dict[str, Any]]:
    return [row for row in report.tables[table] if all(row.get(key) == value for key, value in labels.items())]


def compared(report: Report, quant: str, measure: str = "nll_per_token") -> dict[str, Any]:
    (row,) = rows(report, "comparisons", **{"base.quant": quant, "measure": measure})
    return row


def test_the_best_rate_of_each_arm_is_chosen_on_other_examples(report: Report) -> None:
    trained = rows(report, "arms", is_trained=True)
    assert len(trained) == 8
    for row in trained:
        assert row["train.lr"] == "0.0002"
        assert not row["at_edge"]
        assert row["num_examples"] == 60 + 40  # one half of each task
        assert row["num_seeds"] == 4


RATES: dict[str, Any] = {
    "adapter": {"lora": {"adapter.kind": "lora"}, "dora": {"adapter.kind": "dora"}},
    "train.lr": [2e-4, 1e-4],
    "train.seed": [0, 1],
}


def chosen_rates(folder: Path, choose: dict[float, float], compare: dict[float, float]) -> set[str]:
    """The rates that are chosen if every example of a half has the NLL of its rate in `choose` or `compare`."""
    made = fake_study.make(folder, product=RATES)
    for cell in read_index(made)["cells"]:
        file = made / "cells" / cell["key"] / "eval/step-1.json"
        scored = json.loads(file.read_text())["per_example"]
        names = {task: [f"{row['id']}#1" for row in scored if row["task"] == task] for task in fake_study.NUM_EXAMPLES}
        choosing = {(task, name) for task, examples in names.items() for name in half(examples, "choose")}
        rate = float(cell["labels"].get("train.lr", 1e-4))
        for row in scored:
            row["nll"] = (choose if (row["task"], f"{row['id']}#1") in choosing else compare)[rate]
            row["num_answer_tokens"] = 1
        file.write_text(json.dumps({"per_example": scored}))
    return {row["train.lr"] for row in rows(read_report(made), "arms", is_trained=True)}


def test_the_examples_that_compare_have_no_say_in_the_rate(tmp_path: Path) -> None:
    # Over all examples 2e-4 is better (1.5 against 2), on the choosing half 1e-4 is
    assert chosen_rates(tmp_path, {1e-4: 1.0, 2e-4: 2.0}, {1e-4: 3.0, 2e-4: 1.0}) == {"0.0001"}


def test_the_first_of_equally_good_rates_is_chosen(tmp_path: Path) -> None:
    assert chosen_rates(tmp_path, {1e-4: 1.0, 2e-4: 1.0}, {1e-4: 1.0, 2e-4: 1.0}) == {"0.0002"}


@pytest.mark.parametrize("number", [1, 2, 5, 100])
def test_halves_are_disjoint_and_cover_everything(number: int) -> None:
    examples = [f"{index}#1" for index in range(number)]
    chosen, compared_ = half(examples, "choose"), half(examples, "compare")
    assert sorted(chosen + compared_) == sorted(examples)
    assert len(compared_) - len(chosen) in (0, 1)
    assert half([*examples, "more#1"][:number], "choose") == chosen


def test_a_winner_is_called_where_there_is_one_and_nowhere_else(report: Report) -> None:
    row = compared(report, "nf4")
    assert row["winner"] == "dora"
    assert row["lower"] < 0.05 < row["upper"]
    assert row["lower"] > 0
    for quant in ("none", "int8", "fp4"):
        assert compared(report, quant)["winner"] == "", quant
        assert compared(report, quant)["reason"]
    first = "1 of 4 comparisons of NLL (nats per token) have a winner: dora in 1."
    assert report.verdict[0] == f"{first} The other 3 have no winner."
    assert "comparisons of share of right answers" in report.verdict[1]
    (sentence,) = [
        text for text in report.verdict if text.startswith("base.quant nf4: dora beats lora") and "NLL" in text
    ]
    assert f"improvement of dora over lora in NLL (nats per token): {row['improvement']:.4f}, interval " in sentence


def test_a_winner_needs_a_small_p_after_the_correction(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made, tmp_path / "study")
    index = json.loads((made / "study.json").read_text())
    row = compared(read_report(made), "nf4")
    raw = max(row["p_examples"], row["p_t"])
    assert row["winner"] == "dora"
    assert raw < 2 * raw < row["p_holm"]
    index["study"]["compare"]["alpha"] = 2 * raw  # small enough by itself, not among so many comparisons
    (tmp_path / "study/study.json").write_text(json.dumps(index))
    row = compared(read_report(tmp_path / "study"), "nf4")
    assert row["winner"] == ""
    assert row["reason"] == f"p = {row['p_holm']:.4f} after Holm's correction"


def test_repair_is_of_what_compressing_lost(report: Report) -> None:
    for quant, lost in fake_study.LOST.items():
        for arm in ("lora", "dora"):
            (row,) = rows(report, "arms", **{"base.quant": quant, "adapter": arm})
            if quant == "none":
                assert math.isnan(row["repair"])
                assert row["repair_reason"] == "the base is not compressed"
                continue
            gain = 0.3 + 0.5 * lost + (0.05 if (quant, arm) == ("nf4", "dora") else 0)
            if quant != "int8":  # 0.01 against noise of that size
                assert row["repair"] == pytest.approx(gain / lost, rel=0.1)
                assert row["repair_lower"] < row["repair"] < row["repair_upper"]


def test_nothing_is_repaired_where_nothing_was_lost(tmp_path: Path) -> None:
    # Compression even helps a little: without any difference, one draw in 40 would look like a loss
    made = fake_study.make(tmp_path, nll=lambda cell: 2.0 if cell.recipe.base.quant == "none" else 1.99)
    (row,) = rows(read_report(made), "arms", **{"base.quant": "nf4", "adapter": "dora"})
    assert row["repair_reason"] == "compression caused no significant loss"


def test_an_answer_without_format_is_not_a_wrong_one(report: Report) -> None:
    (lora,) = rows(report, "arms", **{"base.quant": "nf4", "adapter": "lora"})
    (dora,) = rows(report, "arms", **{"base.quant": "nf4", "adapter": "dora"})
    assert lora["unparsable"] == pytest.approx(0.5, abs=0.15)
    assert dora["unparsable"] == 0
    assert lora["right"] == dora["right"] == pytest.approx(0.25, abs=0.1)  # what is right is right in both
    assert compared(report, "nf4", "unparsable")["winner"] == "dora"
    assert compared(report, "nf4", "right")["winner"] == ""


def test_pareto_arms_are_those_that_nothing_beats(report: Report) -> None:
    points = [(row["total_mib"], row["nll_per_token"], row["pareto"]) for row in report.tables["arms"]]
    for mib, nll, best in points:
        beaten = any(m <= mib and n <= nll and (m, n) != (mib, nll) for m, n, _ in points)
        assert best == (not beaten)
    assert 0 < sum(best for *_, best in points) < len(points)


REFUSALS = [
    ({"product": {**fake_study.DOCUMENT["product"], "train.seed": [0, 1]}}, "2 seeds, but at least 3 are needed"),
    ({"product": {**fake_study.DOCUMENT["product"], "train.lr": [2e-4]}}, "at least one of the two arms was not tuned"),
    (
        {"product": {**fake_study.DOCUMENT["product"], "train.lr": [1e-4, 2e-4]}},
        "is the smallest or largest that was tried",
    ),
    ({"exclude": [{"adapter": "lora", "train.seed": [0, 1]}]}, "2 seeds, but at least 3 are needed"),
]


@pytest.mark.parametrize("changes, reason", REFUSALS)
def test_no_winner_where_the_data_cannot_show_one(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    row = compared(read_report(fake_study.make(tmp_path, **changes)), "nf4")
    assert row["winner"] == ""
    assert reason in row["reason"]


def test_no_winner_where_the_seeds_disagree(tmp_path: Path) -> None:
    def nll(cell: Cell) -> float:
        if not cell.is_trained or cell.recipe.adapter.kind == "lora":
            return fake_study.truth(cell)
        return fake_study.truth(cell) + (0.2 if cell.recipe.train.seed == 3 else -0.2)

    row = compared(read_report(fake_study.make(tmp_path, nll=nll)), "nf4")
    assert row["p_examples"] < 0.05  # of these seeds the examples are sure
    assert row["p_holm"] > 0.05
    assert row["winner"] == ""
    assert "dora is better in 3 of 4 seeds" in row["reason"]
    assert "contains zero" in row["reason"]


def test_failed_cells_are_named_and_call_no_winner(tmp_path: Path) -> None:
    made = fake_study.make(tmp_path, fail="0.0004")
    report = read_report(made)
    failed = rows(report, "cells", status="failed")
    assert len(failed) == 32
    assert {row["reason"] for row in failed} == {"RuntimeError: out of memory"}
    assert "32 of 100 cells have no result; 32 of them failed" in report.verdict[1]
    assert all(row["winner"] == "" for row in report.tables["comparisons"])
    assert "8 cells have no result" in compared(report, "nf4")["reason"]  # four seeds of each of the two arms


def test_a_rate_that_diverges_is_the_worst_and_vetoes_no_winner(tmp_path: Path) -> None:
    def nll(cell: Cell) -> float:
        diverges = cell.is_trained and cell.recipe.train.lr == 4e-4 and cell.recipe.train.seed == 1
        return math.nan if diverges else fake_study.truth(cell)

    report = read_report(fake_study.make(tmp_path, nll=nll))
    assert {row["reason"] for row in rows(report, "cells", status="diverged")} == {"loss nan"}
    assert "8 of 100 cells diverged, which counts as the worst score of all" in report.verdict[1]
    assert all((row["num_missing"], row["at_edge"]) == (0, "") for row in report.tables["comparisons"])
    assert compared(report, "nf4")["winner"] == "dora"


def test_an_arm_that_diverges_at_every_rate_is_not_compared(tmp_path: Path) -> None:
    def nll(cell: Cell) -> float:
        return math.nan if cell.is_trained and cell.recipe.adapter.kind == "dora" else fake_study.truth(cell)

    report = read_report(fake_study.make(tmp_path, nll=nll))
    assert {row["adapter"] for row in rows(report, "arms", is_trained=True)} == {"lora"}
    assert report.tables["comparisons"] == []
    assert "An arm that diverged at every tuned value is not compared" in report.verdict[1]
    with pytest.raises(UserError, match="every finished cell diverged"):
        read_report(fake_study.make(tmp_path / "all", nll=lambda cell: math.nan))


def numbers_of(text: str) -> set[str]:
    return set(NUMBER.findall(text))


def test_every_number_of_the_page_is_in_the_data_beside_it(report: Report, tmp_path: Path) -> None:
    write_report(report, tmp_path, "a study")
    known: list[float] = []
    texts = "a study"
    frames = [pd.read_csv(file, dtype={"train.lr": str}) for file in sorted(tmp_path.glob("*.csv"))]
    assert len(frames) == 5
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
    assert "<title>a &lt;study&gt; &amp; more</title>" in page
    assert 'name="viewport"' in page
    figures = [
        base64.b64decode(text).decode() for text in re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', page)
    ]
    assert len(figures) == 3
    assert all("<svg" in figure and "<text" not in figure for figure in figures)  # letters are paths: no fonts
    assert "<script" not in page
    assert not re.search(r"(?:src|href)=[\"'](?!data:image/svg)|@import|url\(", page)


def test_csv_and_parquet_hold_the_same(report: Report, tmp_path: Path) -> None:
    write_report(report, tmp_path, "study")
    for name, expected in report.tables.items():
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
    assert document["verdict"][0].startswith("1 of 4 comparisons")
    found = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert found.exit_code == 2
    assert "must be a run (with recipe.yaml) or a study (with study.json)" in found.output


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
