"""The report of a made-up study: it finds the truth, claims no more, and shows no number that its data have not."""

from __future__ import annotations

import base64
import html
import itertools
import json
import math
import re
import shutil
import statistics
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from rich.console import Console
from scipy import stats
from typer.testing import CliRunner

from qdora.cli import app
from qdora.errors import UserError
from qdora.model.pruning import PrunedLayer
from qdora.recipe.recipe_file import recipe_from
from qdora.study import report_figures
from qdora.study.answer import answer_of, subject_of
from qdora.study.cells import Cell, Expander
from qdora.study.compare import Results
from qdora.study.dot_figure import spans_of
from qdora.study.grid import COLUMNS, load_study, study_from
from qdora.study.outlook import outlooks, planned_cells
from qdora.study.report import _sizes, read_report, report_run, write_report
from qdora.study.report_contents import Report
from qdora.study.report_figures import draw_all
from qdora.study.report_page import html_page, markdown_page, shown_tables
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


def test_the_base_of_a_recipe_is_not_the_uncompressed_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    drawn: list[Any] = []
    monkeypatch.setattr(report_figures, "dot_figure", lambda panels, *_: drawn.extend(panels))
    choices = report_figures._choices(report)
    assert choices is not None
    choices(True)
    named = {base: [dots.name for dots in found] for base, found in drawn[0].rows.items()}
    assert named == {"uncompressed": ["no adapter"], "base of the recipe": ["no adapter", "lora", "dora"]}


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


def test_pareto_arms_are_those_that_nothing_beats(report: Report) -> None:
    points = [(row["total_mib"], row["nll_per_token"], row["pareto"]) for row in rows(report, "arms", kind="trained")]
    for mib, nll, best in points:
        beaten = any(m <= mib and n <= nll and (m, n) != (mib, nll) for m, n, _ in points)
        assert best == (not beaten)
    assert 0 < sum(best for *_, best in points) < len(points)


def test_only_trained_arms_with_the_same_seeds_are_ranked(tmp_path: Path) -> None:
    """Transplants and the only seed on fp4, which has easy examples, are far better than all else."""

    def nll(cell: Cell) -> float:
        is_easy = cell.kind == "transplant" or (cell.kind == "trained" and cell.recipe.base.quant == "fp4")
        return fake_study.truth(cell) - 2.0 * is_easy

    stages = [
        {"name": "main", "cells": {"base.quant": ["none", "nf4"]}},
        {"name": "few", "cells": {"base.quant": "fp4", "seed": 0}},
        {"name": "moved", "cells": {"base.quant": "nf4"}, "kind": "transplant"},
    ]
    product = fake_study.DOCUMENT["product"] | {"base.quant": ["none", "nf4", "fp4"]}
    report = read_report(fake_study.make(tmp_path, nll=nll, product=product, stages=stages, seeds=[0, 1], bases=False))
    ranked = [(row["kind"], row["base.quant"]) for row in report.tables["arms"] if "pareto" in row]
    assert ranked == [("trained", quant) for quant in ("none", "nf4") for _ in ("lora", "dora")]
    assert sum(bool(row.get("pareto")) for row in report.tables["arms"]) >= 1
    draw = report_figures._pareto(report)
    assert draw is not None
    draw(True)
    alike = [row | {"total_mib": 100 + 0.5 * (number % 2)} for number, row in enumerate(report.tables["arms"])]
    assert report_figures._pareto(replace(report, tables=report.tables | {"arms": alike})) is None


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


def test_the_answer_is_a_sentence_for_each_primary_comparison(report: Report, tmp_path: Path) -> None:
    assert report.question == "How far can the base be compressed before lora, and before dora, stops repairing it?"
    assert len(report.answer) == 4
    for row, text in zip(rows(report, "comparisons", role="primary"), report.answer, strict=True):
        assert text.startswith(
            f"base.quant {row['base.quant']}, dora against lora: {row['verdict']}, improvement of dora"
        )
        assert f" {row['improvement']:.4f} (95 % interval {row['lower']:.4f} to {row['upper']:.4f}; 4 seeds; " in text
        if row["verdict"] != "not decided":
            p = row["p_holm"] if row["winner"] else row["p_equivalent_holm"]
            assert text.endswith(f" = {p:.4f}, corrected for 4).")
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


def test_what_was_studied_is_told_by_the_recipes_of_its_runs(report: Report, made: Path, tmp_path: Path) -> None:
    assert report.subject == "org/model, trained on data: 1 step of 7 examples; 4 seeds."
    mix = [{"task": "piqa", "path": "/data/p"}, {"source": "/data/my texts.jsonl"}, {"source": "/d", "name": "chats"}]
    recipes = [
        recipe_from({"model": {"source": source}, "data": {"mix": mix}, "train": train})
        for source, train in (
            ("builtin", {"steps": 1024, "batch": 1}),
            ("/models/own", {"epochs": 2, "tokens_per_step": 4096}),
        )
    ]
    assert subject_of(recipes, [2, 2, 3]) == (
        "SmolLM2-135M-Instruct.Q4_1.gguf (builtin; its 4-bit weights decoded) or own, trained on piqa, my texts, "
        "chats: 1,024 steps or whole epochs of 1 example or 4,096 tokens; 2 to 3 seeds for each "
        "arm on a base."
    )
    assert subject_of(recipes, [1, 1]).endswith("; 1 seed.")
    write_report(report, tmp_path, "a study")
    for name in ("index.html", "report.md", "facts.csv"):
        assert report.subject in (tmp_path / name).read_text()
    shutil.copytree(made, tmp_path / "older")
    for file in (tmp_path / "older/cells").glob("*/recipe.yaml"):
        file.write_text("model: {an: older form}\n")
    assert read_report(tmp_path / "older").subject == ""


def test_notes_and_captions_tell_of_what_is_there(report: Report) -> None:
    def note_of(table: str, shown: Report) -> str:
        (found,) = (each["note"] for each in shown_tables(shown) if each["name"] == table)
        return str(found)

    assert "transplant: " in note_of("repair", report)
    assert "magnitudes: " not in note_of("repair", report)  # none were set back
    plain = [{k: v for k, v in row.items() if "transplant" not in k} for row in report.tables["repair"]]
    off = [row for row in report.tables["blocks"] if "block_off" in row]
    untrained = [row for row in report.tables["blocks"] if "block_off" not in row]
    without = replace(report, tables=report.tables | {"repair": plain, "blocks": untrained, "changes": []})
    assert "transplant: " not in note_of("repair", without)
    assert "Hollow" in report_figures._left_words(report)
    assert "Hollow" not in report_figures._left_words(without)
    assert "without the adapter of one block" in report_figures._depth_words(report)
    assert report_figures._depth_words(without) == (
        "By block: the relative error of the hidden states of untrained bases. Colours: bases."
    )
    trained = replace(report, tables=report.tables | {"blocks": off})
    assert report_figures._depth_words(trained).startswith("By block: the rise of the NLL without the adapter of one")
    pruned = [row | {"sparsity": 0.5} for row in report.tables["arms"]]
    assert "zeros are stored" not in report_figures._bytes_words(report)
    assert "zeros are stored" in report_figures._bytes_words(replace(report, tables=report.tables | {"arms": pruned}))


def test_the_damage_before_the_repair_is_beside_what_is_left(report: Report) -> None:
    draw = report_figures._damage_left(report)
    assert draw is not None
    marked = [line for axes in draw(True).axes for line in axes.lines if line.get_marker() in ("o", "s")]
    for is_hollow, column in ((False, "left"), (True, "transplant")):
        own = {float(line.get_xdata()[0]) for line in marked if (line.get_markerfacecolor() == "white") == is_hollow}
        assert own == {row[column] for row in report.tables["repair"] if column in row}


def test_ticks_of_small_changes_do_not_run_into_one_another(report: Report) -> None:
    (one, *_) = report.tables["changes"]
    bases = [one | {"base.quant": f"base {base}"} for base in range(3)]
    changes = [row | {"layer": f"{step}", "direction_change": 1e-4 * step} for row in bases for step in range(13)]
    draw = report_figures._changes(replace(report, tables=report.tables | {"changes": changes}))
    assert draw is not None
    for wide in (True, False):
        figure = draw(wide)
        figure.canvas.draw()
        for axes in figure.axes:
            low, high = axes.get_xlim()
            labels = [label for label in axes.get_xticklabels() if low <= label.get_position()[0] <= high]
            boxes = [label.get_window_extent() for label in labels]
            assert len(boxes) >= 3
            assert all(left.x1 < right.x0 for left, right in itertools.pairwise(boxes))


@pytest.mark.parametrize("metric", ["nll_per_token", "acc"])
def test_names_of_points_stand_apart_beside_their_points(report: Report, metric: str) -> None:
    """Many bases of nearly the same size and quality, and one far off."""
    (one, *_) = rows(report, "arms", kind="trained")
    places = {f"base {number}": (100 + number % 3, 3.0 + 0.001 * number) for number in range(16)} | {"far": (140, 4.0)}
    ranked = one | {"pareto": True}
    arms = [ranked | {"base.quant": name, "total_mib": x, metric: y} for name, (x, y) in places.items()]
    compare = report.compare.model_copy(update={"metric": metric})
    draw = report_figures._pareto(replace(report, compare=compare, tables=report.tables | {"arms": arms}))
    assert draw is not None
    for wide in (True, False):
        figure = draw(wide)
        figure.canvas.draw()
        (axes,) = figure.axes
        boxes = {text.get_text(): text.get_window_extent() for text in axes.texts if text.get_text()}
        assert set(boxes) == set(places)
        assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes.values(), 2))
        for name, is_right in (("far", True), ("base 0", False)):
            x, _ = axes.transData.transform(places[name])
            assert 5 < (x - boxes[name].x1 if is_right else boxes[name].x0 - x) < 30
        x, y = axes.transData.transform(places["far"])
        assert abs(y - (boxes["far"].y0 + boxes["far"].y1) / 2) < 2


def test_a_cell_that_evaluates_another_run_has_the_sparsity_of_that_run() -> None:
    size = {"num_linear_bytes": 16, "num_linear_weights": 8, "num_base_bytes": 2**20, "num_adapter_bytes": 0}
    known = {
        "run": {"size": size, "compression": {"sparsity": 0.5}},
        "set back": {"size": size, "compression": None},
        "plain": {"size": size, "compression": None},
    }
    results: Any = SimpleNamespace(result=known.get)
    runs = {"set back": "run"}
    found = {key: _sizes([key], results, runs)["sparsity"] for key in known}
    assert found == {"run": 0.5, "set back": 0.5, "plain": 0.0}


def test_what_is_not_decided_says_beside_it_what_was_not_seen_or_why(report: Report) -> None:
    row = compared(report, "nf4") | {"comparison": "over all", "winner": "", "verdict": "not decided"}

    def told(**changes: Any) -> str:
        (sentence,) = answer_of([row | changes], [], "NLL")
        return sentence

    assert told().endswith(f"; differences below {row['smallest_detectable']:.2g} could not have been seen).")
    assert told(reason="there are 2 seeds; x").endswith("; 4 seeds; there are 2 seeds; x).")
    single = told(lower=math.nan, upper=math.nan, num_seeds=1, reason="there is 1 seed")
    size = f"improvement of dora over lora in NLL {row['improvement']:.4f}"
    assert single == f"over all: not decided, {size} (1 seed; there is 1 seed)."
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
    for number, is_told in ((1000, True), (1001, False)):
        rates = [report.tables["rates"][0] | {"num_runs": step} for step in range(number)]
        longer = replace(report, tables=report.tables | {"rates": rates})
        page = html_page(longer, shown_tables(longer), "a study")
        assert ("The rows are many and stand in the data files alone." in page) == (not is_told)
        assert (">999</td>" in page) == is_told


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


@pytest.mark.parametrize(
    "values, expected",
    [
        ([0.0, 0.1, 0.2, 9.0], 2),  # one far above
        ([-7.0, 0.1, 0.2, 0.3], 2),  # one far below
        ([0.0, 1.0, 2.0, 3.0], 1),
        ([3.0, 9.0], 1),
        ([0.0, 1.0, 2.0, 4.0], 1),  # one part of a broken axis would be drawn larger than the other
        ([0.5, 0.5], 1),
    ],
)
def test_an_axis_is_broken_where_one_value_is_far_off(values: list[float], expected: int) -> None:
    spans = spans_of(values)
    assert len(spans) == expected
    for value in values:
        assert sum(low < value < high for low, high in spans) == 1
    assert sum(high - low for low, high in spans) < 1.3 * (max(values) - min(values) or 1) / (expected * 2 - 1)


@pytest.mark.parametrize(
    "values, ends",
    [
        ([0.448, 0.488], [(0.0, 0.488)]),  # what lies close together is not drawn apart from 0
        ([-0.3, -0.2], [(-0.3, 0.0)]),
        ([-1.0, 1.0], [(-1.0, 1.0)]),
        ([5.0, 6.0, 40.0], [(0.0, 6.0), (40.0, 40.0)]),
        ([0.5, 1.0, 1.1, 4.3, 7.8], [(0.0, 1.1), (4.3, 7.8)]),  # not at the longest gap, which magnifies less
        ([-40.0, 5.0, 6.0], [(-40.0, -40.0), (0.0, 6.0)]),
    ],
)
def test_an_axis_that_holds_0(values: list[float], ends: list[tuple[float, float]]) -> None:
    spans = spans_of(values, with_zero=True)
    whole = ends[-1][1] - ends[0][0]
    for (low, high), (first, last) in zip(spans, ends, strict=True):
        room = 0.06 * ((last - first) or whole)
        assert (low, high) == (pytest.approx(first - room), pytest.approx(last + room))


def numbers_of(text: str) -> set[str]:
    return set(NUMBER.findall(text))


def test_every_number_of_the_page_is_in_the_data_beside_it(report: Report, tmp_path: Path) -> None:
    write_report(report, tmp_path, "a study")
    known: list[float] = []
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
    for bases, drawn in ([], range(8)), (["16 bits", "base 11"], [*range(7), 11]):
        pairs = [report.tables["comparisons"][0] | {"base.quant": name} for name in bases]
        tables = {"blocks": blocks, "comparisons": pairs, "changes": []}
        early = replace(report, tables=report.tables | tables)
        (depth,) = (each for each in draw_all(early) if each.title == "Where in depth")
        assert [n for n in range(12) if re.search(rf"base {n}\b", depth.wide)] == list(drawn)


def test_the_axis_of_the_differences_is_that_of_intervals_of_enough_seeds(report: Report) -> None:
    row = compared(report, "nf4") | {"lower": -3.0, "upper": 3.0, "num_seeds": 2}
    wide: dict[int, float] = {}
    for number in (2, 3):
        pairs = [compared(report, "none"), row | {"num_seeds": number}]
        draw = report_figures._forest(replace(report, tables=report.tables | {"comparisons": pairs}))
        assert draw is not None
        every = draw(True).axes  # several where the axis is broken
        wide[number] = every[-1].get_xlim()[1]
        arrows = [line.get_marker() for axes in every for line in axes.lines if line.get_marker() in ("<", ">")]
        assert arrows == (["<", ">"] if number == 2 else [])
    assert wide[2] < 0.2 < 3.0 < wide[3]


def test_depth_has_a_colour_for_each_base_and_a_stroke_for_each_arm(report: Report) -> None:
    draw = report_figures._depth(report)
    assert draw is not None
    untrained, off, undone = (axes.lines for axes in draw(True).axes)
    colors = {line.get_color() for line in untrained if len(line.get_xdata())}
    looks = [{(line.get_color(), line.get_linestyle()) for line in part} for part in (off, undone)]
    assert (len(looks[0]), len(looks[1])) == (4, 2)  # lora and dora on two bases, one of them compressed
    assert len({color for color, _ in looks[0]}) == len({stroke for _, stroke in looks[0]}) == 2
    assert {color for color, _ in looks[1]} < {color for color, _ in looks[0]}
    assert colors & {color for color, _ in looks[1]}  # nf4 everywhere
    (legend,) = draw(True).legends
    assert {text.get_text() for text in legend.get_texts()} >= {"nf4", "none", "lora", "dora"}


def test_a_layer_outside_of_the_blocks_has_no_block(made: Path, tmp_path: Path) -> None:
    """Such as an adapted head."""
    shutil.copytree(made, tmp_path / "study")
    (key, *_) = [cell["key"] for cell in read_index(made)["cells"] if cell["kind"] == "by_layer"]
    file = tmp_path / "study/results" / f"{key}.json"
    result = json.loads(file.read_text())
    result["changes"]["lm_head"] = result["changes"]["layers.0.q_proj"]
    file.write_text(json.dumps(result))
    changed = read_report(tmp_path / "study")
    frame = pd.DataFrame(changed.tables["changes"])
    assert frame["block"].isna().sum() == 1
    assert report_figures._depth(changed) is not None


@pytest.mark.slow
@pytest.mark.figures
def test_transplants_are_in_no_figure_as_arms(report: Report) -> None:
    arms = [row for row in report.tables["arms"] if row["kind"] != "transplant"]
    assert len(arms) == len(report.tables["arms"]) - 4
    assert draw_all(report) != draw_all(replace(report, tables=report.tables | {"arms": arms[:-1]}))
    assert draw_all(report) == draw_all(replace(report, tables=report.tables | {"arms": arms}))


def test_csv_files_hold_all_numbers_of_the_tables(report: Report, tmp_path: Path) -> None:
    write_report(report, tmp_path, "study")
    tables = {name: rows for name, rows in report.tables.items() if rows}
    assert set(tables) == set(report.tables)
    for name, expected in tables.items():
        csv, given = pd.read_csv(tmp_path / f"{name}.csv"), pd.DataFrame(expected)
        assert len(csv) == len(given)
        assert list(csv.columns) == list(given.columns)
        for column in given.select_dtypes("number"):
            pd.testing.assert_series_equal(csv[column], given[column], check_dtype=False, rtol=1e-12)


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


def test_no_sentence_is_told_twice(made: Path, report: Report, tmp_path: Path) -> None:
    found = CliRunner().invoke(app, ["report", str(made), "--out", str(tmp_path)])
    shown = " ".join(found.stdout.split())  # lines are broken
    pages = [(tmp_path / name).read_text() for name in ("report.md", "index.html")]
    assert len(report.answer) > 1
    for sentence in {*report.answer, *report.notes}:
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


def test_the_damage_of_a_base_is_a_paired_t_interval_over_its_questions(made: Path, report: Report) -> None:
    """Of the cells' files alone."""
    (base,) = [
        cell for cell in read_index(made)["cells"] if cell["kind"] == "base" and cell["labels"]["base.quant"] == "nf4"
    ]
    right = []
    for key in (base["key"], base["dense_key"]):
        scored = json.loads((made / "cells" / key / "eval/step-1.json").read_text())["per_example"]
        asked = {row["id"]: row["acc_norm"] for row in scored if "gold" in row}
        right.append({name: each for name, each in asked.items() if half_of(f"{name}#1") == "compare"})
    lost = [right[1][name] - right[0][name] for name in right[0]]
    assert 40 < len(lost) < 80
    half = stats.t.ppf(0.975, len(lost) - 1) * statistics.stdev(lost) / math.sqrt(len(lost))
    (row,) = [row for row in rows(report, "repair", adapter="no adapter") if row["base.quant"] == "nf4"]
    found = (row["damage_choice"], row["damage_choice_lower"], row["damage_choice_upper"])
    mean = statistics.mean(lost)
    assert found == pytest.approx((mean, mean - half, mean + half), rel=1e-9)


def test_the_smallest_detectable_difference_has_the_power_at_the_share_of_one_of_four(report: Report) -> None:
    for quant in fake_study.LOST:
        row = compared(report, quant)
        differences = [float(text.partition(": ")[2]) for text in row["seed_improvements"].split("; ")]
        stderr = statistics.stdev(differences) / 2  # four seeds
        critical = stats.t.ppf(1 - 0.05 / 4 / 2, 3)
        power = stats.nct.sf(critical, 3, row["smallest_detectable"] / stderr)
        assert power == pytest.approx(0.8, abs=1e-4)
