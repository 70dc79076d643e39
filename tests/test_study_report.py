"""The report of a made-up study: it finds the truth, claims no more, and shows no number that its data have not."""

from __future__ import annotations

import html
import json
import math
import re
import shutil
import statistics
from collections import Counter
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from rich.console import Console
from scipy import stats
from typer.testing import CliRunner

from qdora.cli import app
from qdora.errors import UserError
from qdora.model.pruning import PrunedLayer
from qdora.study import figures
from qdora.study.compare import Results
from qdora.study.grid import COLUMNS, study_from
from qdora.study.page import Report, write_report
from qdora.study.report import _TableRows, read_report, report_run
from qdora.study.scores import half_of
from qdora.study.study_directory import StudyDirectory, read_index
from tests import fake_study
from tests.fake_study import compared, nll_of, rows

NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?:e-?\d+)?(?![\w]|\.\d)")


STAGES = [
    {"name": "main"},
    {"name": "moved", "cells": {"base.quant": ["nf4", "fp4"]}, "kind": "transplant"},
    {"name": "by layer", "cells": {"base.quant": ["none", "nf4"], "seed": [0, 1]}, "kind": "by_layer"},
    {"name": "by step", "cells": {"base.quant": "nf4", "seed": 2}, "kind": "by_layer", "steps": [1, 2]},
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


def test_the_base_of_a_recipe_is_not_the_uncompressed_one(tmp_path: Path) -> None:
    """In a study without an axis of bases neither of the two has a label."""
    product = {"adapter": fake_study.DOCUMENT["product"]["adapter"]}
    made = fake_study.make(tmp_path, product=product, settings={"base.quant": "nf4"}, seeds=[0, 1])
    report = read_report(made)
    bases = {row["is_dense"]: row for row in rows(report, "arms", kind="base")}
    bits = {is_dense: row["bits_per_weight"] for is_dense, row in bases.items()}
    assert bits == pytest.approx({True: 16.0, False: 4.1}, rel=1e-5)
    assert bases[False]["nll_per_token"] - bases[True]["nll_per_token"] == pytest.approx(0.3, abs=0.02)
    trained = rows(report, "arms", kind="trained")
    assert [row["is_dense"] for row in trained] == [False, False]
    (damaged,) = (row for row in report.tables["repair"] if "damage_choice" in row)
    assert damaged["damage_choice"] > 0


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
    assert list(verdicts.values()).count("not decided") < 3


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


PRIMARY: dict[str, dict[str, Any]] = {
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
    assert not rows(report, "repair", **{"base.quant": "none", "adapter": "dora"})
    for quant, lost in fake_study.LOST.items():
        for arm in ("lora", "dora") if quant != "none" else ():
            (row,) = rows(report, "repair", **{"base.quant": quant, "adapter": arm})
            lost -= 0.05 if (quant, arm) == ("nf4", "dora") else 0.0
            assert row["left"] == pytest.approx(lost, abs=0.02)
            assert row["left_lower"] < row["left"] < row["left_upper"]
            if quant == "int8":  # no adapter was transplanted
                assert not {"transplant", "repaired", "repaired_share"} & set(row)
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
    assert damage["fp4"]["damage_choice_lower"] > 0
    assert damage["nf4"]["weight_error"] == pytest.approx(0.01)  # the mean of the layers: 0, 0.01, 0.02


def test_an_answer_without_format_is_not_a_wrong_one(report: Report) -> None:
    (lora,) = rows(report, "arms", **{"base.quant": "nf4", "adapter": "lora", "kind": "trained"})
    (dora,) = rows(report, "arms", **{"base.quant": "nf4", "adapter": "dora", "kind": "trained"})
    assert lora["unparsable"] == pytest.approx(0.5, abs=0.15)
    assert dora["unparsable"] == 0
    assert lora["right"] == dora["right"] == pytest.approx(0.25, abs=0.1)  # what is right is right in both
    assert compared(report, "nf4", "unparsable")["improvement"] == pytest.approx(0.5, abs=0.15)
    assert compared(report, "nf4", "unparsable")["verdict"] == "exploratory"


def test_the_answer_is_a_sentence_for_each_primary_comparison(report: Report, tmp_path: Path) -> None:
    assert len(report.answer) == 4
    for row, text in zip(rows(report, "comparisons", role="primary"), report.answer, strict=True):
        assert text.startswith(
            f"base.quant {row['base.quant']}, dora against lora: {row['verdict']}, improvement of dora"
        )
        assert f" {row['improvement']:.4f} (95 % interval {row['lower']:.4f} to {row['upper']:.4f}; 4 seeds; " in text
        if row["verdict"] != "not decided":
            p = row["p_holm"] if row["winner"] else row["p_equivalent_holm"]
            assert text.endswith(f" = {p:.4f}, corrected for 4).")
        else:
            assert f"differences below {row['smallest_detectable']:.2g} " in text
    families = {name: each | ({"family": "later"} if "beyond" in name else {}) for name, each in PRIMARY.items()}
    compare = {"reference": "lora", "primary": families, "spread": 0.03}
    primary = read_report(fake_study.make(tmp_path, compare=compare, seeds=[0, 1, 2]))
    assert [text.partition(":")[0] for text in primary.answer] == ["over all", "beyond 16 bits"]
    for row in rows(primary, "comparisons", role="primary"):
        assert (row["num_tests"], row["p_holm"]) == (1, max(row["p_seeds"], row["p_examples"]))  # of its own family
        assert row["half_width_planned"] == pytest.approx(stats.t.ppf(0.975, 2) * 0.03 / math.sqrt(3))


def test_a_later_comparison_has_its_own_seeds_and_reference(tmp_path: Path) -> None:
    adapters = fake_study.DOCUMENT["product"]["adapter"] | {"odd": {"adapter.kind": "dora", "adapter.rank": 8}}
    later = {"arm": "odd", "reference": "dora", "over": {"base.quant": "nf4"}, "seeds": [4, 5, 6], "family": "later"}
    made = fake_study.make(
        tmp_path,
        product={"base.quant": ["nf4"], "adapter": adapters},
        stages=[{"name": "main"}, {"name": "more", "cells": {"adapter": ["dora", "odd"], "seed": [4, 5, 6]}}],
        compare={"reference": "lora", "primary": {"over all": {"arm": "dora"}, "odd": later}, "zone": 0.2},
        bases=False,
    )
    (row,) = rows(read_report(made), "comparisons", comparison="odd", role="primary")
    cells = {(cell["labels"]["adapter"], cell["labels"]["seed"]): cell for cell in read_index(made)["cells"][18:]}
    gains = [
        nll_of(made, cells["dora", seed], "compare") - nll_of(made, cells["odd", seed], "compare") for seed in "456"
    ]
    half = stats.t.ppf(0.975, 2) * statistics.stdev(gains) / math.sqrt(3)
    found = (row["improvement"], row["half_width"], row["num_seeds"], row["reference"])
    assert found == (pytest.approx(statistics.mean(gains)), pytest.approx(half), 3, "dora")
    (made / "results" / f"{cells['odd', '5']['key']}.json").unlink()
    (row,) = rows(read_report(made), "comparisons", comparison="odd", role="primary")
    assert (row["num_missing"], row["verdict"]) == (1, "not decided")


def test_a_primary_comparison_is_told_in_accuracy_and_on_each_task(made: Path, report: Report) -> None:
    row, by_task = compared(report, "nf4", "acc"), compared(report, "nf4", "nll_by_task")
    assert (row["zone"], by_task["zone"]) == (0.01, 0.02)
    found = rows(report, "tasks", **{"base.quant": "nf4", "measure": "nll_per_token"})
    assert {each["task"] for each in found} == set(fake_study.NUM_EXAMPLES)
    assert by_task["improvement"] == pytest.approx(statistics.mean(each["improvement"] for each in found))
    whole = sum(each["weight"] * each["improvement"] for each in found)
    assert compared(report, "nf4")["improvement"] == pytest.approx(whole, abs=2e-3)  # the weights differ by seed
    (choices,) = rows(report, "tasks", **{"base.quant": "nf4", "measure": "acc"})  # one task has choices
    assert choices["improvement"] == row["improvement"]


def test_a_cell_that_evaluates_another_run_has_the_sparsity_of_that_run() -> None:
    size = {"num_linear_bytes": 16, "num_linear_weights": 8, "num_base_bytes": 2**20, "num_adapter_bytes": 0}
    known = {
        "run": {"size": size, "compression": {"sparsity": 0.5}},
        "set back": {"size": size, "compression": None},
        "plain": {"size": size, "compression": None},
    }
    results: Any = SimpleNamespace(result=known.get)
    table = _TableRows(results, [], {"set back": "run"})
    found = {key: table.sizes(key)["sparsity"] for key in known}
    assert found == {"run": 0.5, "set back": 0.5, "plain": 0.0}


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
    guesses = {row["guess"]: row.get("nll", row.get("acc")) for row in report.tables["guesses"]}
    assert guesses == GUESSES | {"choice": 0.5}  # piqa's two choices
    off = [row for row in report.tables["blocks"] if "block_off" in row]
    assert {(row["base.quant"], row["adapter"], row["seed"]) for row in off} == {
        (quant, kind, seed) for quant in ("none", "nf4") for kind in ("lora", "dora") for seed in "01"
    }
    undone = [row for row in report.tables["changes"] if "error_undone" in row]
    assert {row["base.quant"] for row in undone} == {"nf4"}
    assert {(row["layer"], row["block"]) for row in undone} == {
        (f"layers.{block}.{name}", block) for block in (0, 1) for name in ("q_proj", "o_proj")
    }


def numbers_of(text: str) -> set[str]:
    return set(NUMBER.findall(text))


def test_every_number_of_the_page_is_in_the_data_beside_it(report: Report, tmp_path: Path) -> None:
    write_report(report, tmp_path, "a study")
    known = [95.0, 0.0]  # 95 % intervals; right of 0
    known += [len(report.tables["cells"]), *Counter(row["status"] for row in report.tables["cells"]).values()]
    texts = "a study"
    frames = [pd.read_csv(file, dtype={"train.lr": str}) for file in sorted(tmp_path.glob("*.csv"))]
    assert len(frames) == 13
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
    page = write_report(report, tmp_path, "a <study> & more")[0].read_text()
    assert "<title>a &lt;study&gt; &amp; more</title>" in page
    assert page.count('src="data:image/svg+xml;base64,') == 3
    assert not re.search(r"<script|(?:src|href)=[\"'](?!data:image/svg)|@import|url\(", page)


def test_the_figures_show_the_tables(report: Report) -> None:
    left = rows(report, "repair", **{"base.quant": "fp4"})[1:]
    (axis,) = figures._damage(left, report.axes, report.compare).axes
    points = [line for line in axis.lines if line.get_marker() in ("o", "s")]
    for face, column in (({"white"}, "transplant"), (set(figures._COLORS), "left")):
        xs = {np.asarray(line.get_xdata())[0] for line in points if line.get_markerfacecolor() in face}
        assert xs == {row[column] for row in left}
    pairs = [dict(compared(report, quant)) for quant in fake_study.LOST]
    pairs[0] |= {"lower": -9.0, "upper": 9.0, "num_seeds": 2}  # too few seeds for a verdict
    (axis,) = figures._differences(pairs, report.axes, report.compare).axes
    low, high = axis.get_xlim()
    drawn = {np.asarray(line.get_xdata())[0] for line in axis.lines if line.get_marker() == "s"}
    assert drawn == {row["improvement"] for row in pairs}
    assert -1 < low < min(row["lower"] for row in pairs[1:])
    assert max(row["upper"] for row in pairs[1:]) < high < 1
    panels = figures._curves(report.tables["curves"], report.axes, report.compare).axes
    assert [axis.get_title() for axis in panels if axis.get_visible()] == list(fake_study.LOST)
    lines = {np.asarray(line.get_ydata())[-1] for axis in panels for line in axis.lines}
    assert lines == {row["training_loss"] for row in report.tables["curves"] if row["step"] == fake_study.STEPS}


def test_a_layer_outside_of_the_blocks_has_no_block(made: Path, tmp_path: Path) -> None:
    """Such as an adapted head."""
    shutil.copytree(made, tmp_path / "study")
    (key, *_) = [cell["key"] for cell in read_index(made)["cells"] if cell["kind"] == "by_layer"]
    file = tmp_path / "study/results" / f"{key}.json"
    result = json.loads(file.read_text())
    result["changes"]["lm_head"] = result["changes"]["layers.0.q_proj"]
    file.write_text(json.dumps(result))
    changes = read_report(tmp_path / "study").tables["changes"]
    assert [row["layer"] for row in changes if row["block"] is None] == ["lm_head"]


@pytest.mark.slow
def test_the_same_study_gives_the_same_files(made: Path, tmp_path: Path) -> None:
    first, second = (write_report(read_report(made), tmp_path / name, "study") for name in "ab")
    assert [file.read_bytes() for file in first] == [file.read_bytes() for file in second]


def test_the_command(made: Path, tmp_path: Path) -> None:
    found = CliRunner().invoke(app, ["report", str(made), "--out", str(tmp_path / "out"), "--json"])
    assert found.exit_code == 0, found.output
    document = json.loads(found.stdout)
    assert Path(document["page"]).is_file()
    assert len(document["answer"]) == 4
    found = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert found.exit_code == 2
    assert "is not a run (it has no recipe.yaml) or a study (no study.json). Fix: name a directory" in found.output


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
    with pytest.raises(UserError, match=r"no cell has scores\. Fix: run 'qdora study'"):
        report_run(made, console=Console(quiet=True))
