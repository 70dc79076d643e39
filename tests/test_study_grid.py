"""A study file and its cells: every combination once, named by what it runs, and faults in one line each."""

from __future__ import annotations

import itertools
import math
import os
import random
import re
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from qdora.errors import UserError
from qdora.recipe.recipe_file import override, recipe_from, settings
from qdora.study import cell_key
from qdora.study.cell_key import key_of
from qdora.study.cells import Cell, Expander, equal_in_words
from qdora.study.compare import Results, cannot_decide
from qdora.study.grid import label_of, load_study, study_from
from qdora.study.runner import notes_on, study_run
from qdora.study.study_directory import StudyDirectory
from tests import study_worker

ADAPTERS = {
    "none": {"adapter.kind": "none", "train.steps": 0},
    "lora": {"adapter.kind": "lora"},
    "dora": {"adapter.kind": "dora", "adapter.rank": 8},
}


def study(tmp_path: Path, **changes: Any) -> list[Cell]:
    document = {
        "recipe": str(write_recipe(tmp_path)),
        "product": {
            "base.quant": ["none", "nf4"],
            "adapter": ADAPTERS,
            "train.lr": [1e-4, 3e-4],
        },
        "seeds": [0, 1, 2],
    }
    return Expander(study_from(document | changes)).now().cells


def write_recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(study_worker.DOCUMENT))
    return path


def labels(cells: list[Cell], *axes: str) -> set[tuple[str | None, ...]]:
    return {tuple(cell.labels.get(axis) for axis in axes) for cell in cells}


def test_every_combination_is_a_cell_and_what_is_not_trained_is_one(tmp_path: Path) -> None:
    cells = study(tmp_path)
    trained = [cell for cell in cells if cell.is_trained]
    expected = set(itertools.product(("none", "nf4"), ("lora", "dora"), ("0.0001", "0.0003"), ("0", "1", "2")))
    assert labels(trained, "base.quant", "adapter", "train.lr", "seed") == expected
    assert len(trained) == len(expected)
    bases = [cell for cell in cells if cell.kind == "base"]
    # one for each base, whatever the seed would have been; the uncompressed one is among them
    assert labels(bases, "base.quant", "adapter") == {("none", "none"), ("nf4", "none")}
    assert len(bases) == 2
    assert cells[:2] == bases


def test_a_seed_decides_initial_values_data_and_examples_together(tmp_path: Path) -> None:
    cells = [cell for cell in study(tmp_path, settings={"eval.limit": 9}) if cell.is_trained]
    assert len(cells) == 2 * 2 * 2 * 3
    for cell in cells:
        recipe, seed = cell.recipe, int(cell.labels["seed"])
        assert (recipe.train.seed, recipe.data.seed, recipe.eval.block) == (seed, seed, seed)
    bases = [cell for cell in study(tmp_path, settings={"eval.limit": 9}) if not cell.is_trained]
    assert {(cell.recipe.data.seed, cell.recipe.eval.block) for cell in bases} == {(0, None)}
    assert {cell.recipe.eval.block for cell in study(tmp_path)} == {None}  # all examples are evaluated


def test_more_seeds_change_no_cell(tmp_path: Path) -> None:
    few, many = (
        study(tmp_path, settings={"eval.limit": 9}),
        study(tmp_path, settings={"eval.limit": 9}, seeds=[*range(6)]),
    )
    assert {cell.key for cell in few} < {cell.key for cell in many}


def test_an_axis_can_have_initial_values_of_its_own(tmp_path: Path) -> None:
    other = {"lora": {"adapter.kind": "lora"}, "other": {"adapter.kind": "lora", "train.seed": 100}}
    cells = study(tmp_path, product={"base.quant": ["nf4"], "adapter": other}, settings={"eval.limit": 9})
    found = {(c.labels["adapter"], c.recipe.train.seed, c.recipe.data.seed, c.recipe.eval.block) for c in cells[2:]}
    assert found == {("lora", n, n, n) for n in range(3)} | {("other", 100 + n, n, n) for n in range(3)}


@pytest.mark.parametrize("key", ["data.seed", "eval.block"])
def test_what_the_seeds_decide_is_not_set(tmp_path: Path, key: str) -> None:
    with pytest.raises(UserError, match=rf"{key}: is decided by seeds\. Fix: remove it"):
        study(tmp_path, settings={key: 3, "eval.limit": 9})


def test_calibration_examples_that_the_seeds_draw_are_refused(tmp_path: Path) -> None:
    pruned = {"base.prune.method": "wanda", "base.prune.sparsity": 0.5, "data.mix": [{"source": "a.jsonl", "limit": 9}]}
    with pytest.raises(UserError, match=r"calibration\.text: mix is not the same for all seeds.*Fix: remove limit"):
        study(tmp_path, settings=pruned)
    assert study(tmp_path, settings=pruned | {"base.prune.method": "magnitude"})
    assert study(tmp_path, settings=pruned | {"data.mix": [{"source": "a.jsonl"}]})


def test_a_cell_runs_what_its_labels_say_and_names_its_bases(tmp_path: Path) -> None:
    by_key = {cell.key: cell for cell in study(tmp_path)}
    for cell in by_key.values():
        assert cell.recipe.base.quant == cell.labels["base.quant"]
        assert cell.key == key_of(cell.recipe)
        if cell.is_trained:
            assert f"{cell.recipe.train.lr:g}" == cell.labels["train.lr"]
            assert cell.recipe.adapter.rank == (8 if cell.labels["adapter"] == "dora" else 16)
            assert not cell.recipe.eval.at_start  # the base has a cell of its own
        base, dense = by_key[cell.base_key or ""], by_key[cell.dense_key or ""]
        assert (base.recipe.adapter.kind, base.recipe.base) == ("none", cell.recipe.base)
        assert dense.recipe.base.quant == "none"


TWO = {"base.quant": ["none", "nf4"], "adapter": {"lora": {"adapter.kind": "lora"}, "dora": {"adapter.kind": "dora"}}}


def test_stages_are_parts_of_the_product_in_their_order(tmp_path: Path) -> None:
    stages = [
        {"name": "first", "cells": {"adapter": "dora", "seed": [4, 5]}},
        {"name": "second", "cells": {"base.quant": ["nf4"]}},
    ]
    cells = [cell for cell in study(tmp_path, product=TWO, stages=stages) if cell.is_trained]
    found = [(cell.stage, *(cell.labels[axis] for axis in ("base.quant", "adapter", "seed"))) for cell in cells]
    # Every arm has a seed before any has the next one.
    first = [("first", quant, "dora", seed) for seed in "45" for quant in ("none", "nf4")]
    assert found == [*first, *(("second", "nf4", arm, seed) for seed in "012" for arm in ("lora", "dora"))]


def test_a_later_stage_adds_the_seeds_that_an_earlier_one_did_not_have(tmp_path: Path) -> None:
    stages = [
        {"name": "main", "cells": {"seed": [0, 1]}},
        {"name": "reserve", "cells": {"base.quant": "nf4", "seed": [1, 2]}},
        {"name": "moved", "cells": {"base.quant": "nf4", "seed": [2]}, "kind": "transplant"},
    ]
    cells = [cell for cell in study(tmp_path, product=TWO, stages=stages) if cell.is_trained]
    found = [(cell.stage, *(cell.labels[axis] for axis in ("base.quant", "adapter", "seed"))) for cell in cells]
    main = [("main", quant, arm, seed) for seed in "01" for quant in ("none", "nf4") for arm in ("lora", "dora")]
    assert found == [*main, ("reserve", "nf4", "lora", "2"), ("reserve", "nf4", "dora", "2")]


def learnt(truth: dict[str, float]) -> Any:
    """Losses of a search that is over, with the best rate of each adapter."""
    return lambda cell: abs(math.log(cell.recipe.train.lr / truth[cell.recipe.adapter.kind]))


RATES: dict[str, Any] = {"values": [1e-4, 4e-4, 1.6e-3], "steps": 3, "seeds": [100, 101]}


def expander(tmp_path: Path, **changes: Any) -> Expander:
    document = {"recipe": str(write_recipe(tmp_path)), "product": TWO, "rates": RATES, "settings": {"train.steps": 9}}
    return Expander(study_from(document | changes))


def test_arms_wait_for_their_rates_which_runs_with_seeds_of_their_own_find(tmp_path: Path) -> None:
    made = expander(tmp_path)
    begin = made.now()
    search = [cell for cell in begin.cells if cell.kind == "rate"]
    assert len(search) == 4 * 3  # a short run of every value for every arm on every base
    assert {(cell.recipe.train.steps, cell.recipe.train.seed, cell.stage) for cell in search} == {
        (3, 100, "rates, short runs")
    }
    assert not [cell for cell in begin.cells if cell.kind == "trained"]
    assert begin.num_waiting == {"main": 4 * 3}
    end = made.now(learnt({"lora": 4e-4, "dora": 1.6e-3}))
    full = [cell for cell in end.cells if cell.stage == "rates"]
    assert {cell.recipe.train.steps for cell in full} == {9}
    assert {(cell.recipe.train.seed, cell.recipe.data.seed) for cell in full} == {(100, 100), (101, 101)}
    trained = [cell for cell in end.cells if cell.kind == "trained"]
    assert labels(trained, "adapter", "train.lr") == {("lora", "0.0004"), ("dora", "0.0016")}
    assert {cell.recipe.train.seed for cell in trained} == {0, 1, 2}
    assert all(cell.is_interior and cell.recipe.train.lr == float(cell.labels["train.lr"]) for cell in trained)
    assert end.num_waiting == {}


def test_arms_can_take_the_rate_of_others(tmp_path: Path) -> None:
    made = expander(tmp_path, rates=RATES | {"like": {"base.quant": {"nf4": "none"}}})
    end = made.now(learnt({"lora": 4e-4, "dora": 1e-4}))
    assert labels([cell for cell in end.cells if cell.kind == "rate"], "base.quant") == {("none",)}
    trained = [cell for cell in end.cells if cell.kind == "trained"]
    assert labels(trained, "base.quant", "adapter", "train.lr") == {
        (quant, adapter, rate)
        for quant in ("none", "nf4")
        for adapter, rate in (("lora", "0.0004"), ("dora", "0.0001"))
    }


def test_an_arm_can_have_rates_of_its_own(tmp_path: Path) -> None:
    rates = RATES | {"of": {"adapter": {"dora": [1e-3, 2e-3, 4e-3]}}}
    end = expander(tmp_path, rates=rates).now(learnt({"lora": 4e-4, "dora": 2e-3}))
    tried = {cell.recipe.train.lr for cell in end.cells if cell.kind == "rate" and cell.recipe.adapter.kind == "dora"}
    assert tried == {1e-3, 2e-3, 4e-3}
    trained = [cell for cell in end.cells if cell.kind == "trained"]
    assert labels(trained, "adapter", "train.lr") == {("lora", "0.0004"), ("dora", "0.002")}


def test_an_arm_that_diverges_at_every_rate_waits_for_nothing(tmp_path: Path) -> None:
    def loss(cell: Cell) -> float:
        return math.inf if cell.recipe.adapter.kind == "dora" else cell.recipe.train.lr

    found = expander(tmp_path).now(loss)
    assert {cell.recipe.adapter.kind for cell in found.cells if cell.kind == "trained"} == {"lora"}
    assert found.num_waiting == {}
    rows = {(row["base.quant"], row["adapter"]): row for row in found.search_rows()}
    assert rows["nf4", "dora"]["rate"] is None
    assert rows["nf4", "dora"]["num_diverged"] == 5  # three values, and two below them


def test_the_test_split_compares_and_the_validation_split_finds_rates(tmp_path: Path) -> None:
    mix = [{"source": "a.jsonl"}, {"task": "piqa", "path": str(tmp_path)}]
    changes = {"settings": {"data.mix": mix, "eval.tasks": ["piqa"]}, "compare": {"split": "test"}}
    for cell in expander(tmp_path, **changes).now(learnt({"lora": 4e-4, "dora": 4e-4})).cells:
        wanted = None if cell.kind == "rate" else "test"
        assert [source.validation for source in cell.recipe.data.mix] == [None, wanted], cell.kind


def test_a_transplant_waits_for_the_adapter_of_the_uncompressed_base(tmp_path: Path) -> None:
    stages = [
        {"name": "main", "cells": {"adapter": "dora"}},
        {"name": "moved", "cells": {"base.quant": "nf4", "adapter": "dora", "seed": [0, 1]}, "kind": "transplant"},
    ]
    made = expander(tmp_path, stages=stages)
    assert made.now().num_waiting == {"main": 6, "moved": 2}
    found = made.now(learnt({"dora": 4e-4}))
    assert (found.num_waiting, len(found.cells)) == ({"moved": 2}, 2 + 2 * (3 + 6) + 6)
    found = made.now(learnt({"dora": 4e-4}), lambda cell: cell.labels["seed"] == "0" or None)
    assert found.num_waiting == {"moved": 1}
    found = made.now(learnt({"dora": 4e-4}), lambda cell: cell.labels["seed"] == "0")  # the other one diverged
    assert found.num_waiting == {}
    cells = made.now(learnt({"dora": 4e-4}), lambda _: True).cells
    moved = [cell for cell in cells if cell.kind == "transplant"]
    by_key = {cell.key: cell for cell in cells}
    assert len(moved) == 2
    for cell in moved:
        source = by_key[cell.adapter_key or ""]
        assert (source.recipe.base.quant, source.recipe.adapter.kind) == ("none", "dora")
        assert source.labels["seed"] == cell.labels["seed"]
        assert (cell.recipe.base.quant, cell.recipe.train.steps, cell.recipe.eval.at_start) == ("nf4", 0, True)
        assert cell.key not in (source.key, cell.base_key, key_of(cell.recipe))
    with pytest.raises(UserError, match="stage moved: the study does not train this arm on the uncompressed base"):
        expander(tmp_path, stages=[{"name": "main", "cells": {"base.quant": "nf4"}}, stages[1]])


def test_magnitudes_are_rescaled_in_the_transplant_of_the_same_arm(tmp_path: Path) -> None:
    moved = {"name": "moved", "cells": {"base.quant": "nf4", "adapter": "dora"}, "kind": "transplant"}
    stages = [{"name": "main"}, moved, moved | {"name": "rescaled", "kind": "rescaled"}]
    cells = expander(tmp_path, stages=stages).now(learnt({"lora": 4e-4, "dora": 4e-4}), lambda _: True).cells
    by_key = {cell.key: cell for cell in cells}
    found = [(by_key[cell.adapter_key or ""].kind, cell.labels["seed"]) for cell in cells if cell.kind == "rescaled"]
    assert found == [("transplant", seed) for seed in "012"]
    with pytest.raises(UserError, match="stage rescaled: the study does not transplant this arm"):
        expander(tmp_path, stages=[stages[0], stages[2]])


def test_magnitudes_are_set_back_in_the_adapter_of_the_same_arm(tmp_path: Path) -> None:
    stages = [{"name": "main"}, {"name": "back", "cells": {"adapter": "dora"}, "kind": "set_back"}]
    made = expander(tmp_path, stages=stages)
    cells = made.now(learnt({"lora": 4e-4, "dora": 4e-4}), lambda _: True).cells
    by_key = {cell.key: cell for cell in cells}
    back = [cell for cell in cells if cell.kind == "set_back"]
    assert len(back) == 2 * 3
    for cell in back:
        source = by_key[cell.adapter_key or ""]
        assert cell.labels.items() < source.labels.items()  # which has its rate, too
    for stage, fault in (
        ({"cells": {"adapter": "lora"}}, "adapter.kind must be dora, got lora"),
        ({"cells": {"adapter": "dora"}}, "the study does not train this arm"),
    ):
        stages = [{"name": "main", "cells": {"adapter": "lora"}}, {"name": "back", "kind": "set_back", **stage}]
        with pytest.raises(UserError, match=f"stage back: {fault}"):
            expander(tmp_path, stages=stages)


def test_bases_are_added_where_the_grid_has_none(tmp_path: Path) -> None:
    product = {"base.quant": ["nf4", "int8"], "adapter": {"dora": {}}}
    cells = study(tmp_path, product=product)
    assert sorted(cell.recipe.base.quant for cell in cells if not cell.is_trained) == ["int8", "nf4", "none"]
    assert len(study(tmp_path, product=product, bases=False, seeds=[0, 1])) == 4


def test_exclude_leaves_out(tmp_path: Path) -> None:
    product = {"base.quant": ["none", "nf4"], "adapter": {"lora": {"adapter.kind": "lora"}, "dora": {}}}
    cells = study(tmp_path, product=product, bases=False, exclude=[{"base.quant": "none", "adapter": ["dora"]}])
    assert labels(cells, "base.quant", "adapter") == {("none", "lora"), ("nf4", "lora"), ("nf4", "dora")}
    with pytest.raises(UserError, match="exclude leaves no cell"):
        study(tmp_path, product=product, exclude=[{"adapter": ["lora", "dora"]}])


def test_combinations_with_equal_recipes_are_named(tmp_path: Path) -> None:
    same = {"adapter.kind": "lora"}
    bare = {"adapter.kind": "none", "train.steps": 0}
    product = {"adapter": {"bare": bare, "bare again": bare, "lora": same, "lora again": same}}
    cells = study(tmp_path, product=product, seeds=[0, 1], settings={"base.quant": "none"})
    assert [cell.labels["adapter"] for cell in cells] == ["bare", "lora", "lora"]
    assert cells[0].equal == ({"adapter": "bare again"},)  # its seeds are one cell on purpose
    assert [cell.equal for cell in cells[1:]] == [({"adapter": "lora again", "seed": seed},) for seed in ("0", "1")]
    text = equal_in_words([cell.record() for cell in cells]) or ""
    assert text.startswith("3 combinations have the same recipe as another one.")
    assert "adapter=lora again, seed=1 is adapter=lora, seed=1" in text
    assert equal_in_words([cell.record() for cell in study(tmp_path, product=TWO)]) is None


def test_versions_are_not_numbers_and_a_value_given_twice_is_refused(tmp_path: Path) -> None:
    product = {"adapter": {"dora": {}}, "model.revision": ["1.10", "1.1"]}
    cells = study(tmp_path, product=product, bases=False)
    assert {cell.labels["model.revision"]: cell.recipe.model.revision for cell in cells} == {
        "1.10": "1.10",
        "1.1": "1.1",
    }
    with pytest.raises(UserError, match=r"product\.train\.lr: has the value 0\.0001 twice"):
        study(tmp_path, product={"adapter": {"dora": {}}, "train.lr": [1e-4, 2e-4, 0.0001]})


def test_settings_hold_for_all_cells(tmp_path: Path) -> None:
    cells = study(tmp_path, settings={"train.steps": 7, "eval.limit": 3}, product={"adapter": {"dora": {}}}, seeds=[0])
    assert [cell.recipe.train.steps for cell in cells] == [0, 0, 7]
    assert {cell.recipe.eval.limit for cell in cells} == {3}


@hypothesis_settings(deadline=None)
@given(st.randoms(use_true_random=False), st.sampled_from(["1e-4", "1.0e-4", "0.0001"]))
def test_the_key_is_of_what_is_run_and_not_of_how_it_is_written(shuffle: random.Random, lr: str) -> None:
    plain = settings(override(study_worker.recipe(), [f"train.lr={lr}"]))
    items = list(plain.items())
    shuffle.shuffle(items)
    assert key_of(recipe_from(dict(items))) == key_of(study_worker.recipe(lr=1e-4))
    assert key_of(study_worker.recipe(lr=2e-4)) != key_of(study_worker.recipe(lr=1e-4))


@pytest.mark.parametrize(
    "setting, is_decisive",
    [
        ("train.log_every=7", False),
        ("train.checkpoint_every=3", False),
        ("trackers=[tensorboard]", False),
        ("memory.budget=40GiB", False),
        ("memory.loss_chunk=64", False),
        ("base.residency=device", False),
        ("train.seed=7", True),
        ("train.spike=3.0", True),
        ("eval.limit=3", True),
        ("adapter.rank=2", True),
    ],
)
def test_the_key_is_of_what_decides_the_result(setting: str, is_decisive: bool) -> None:
    plain = study_worker.recipe()
    assert (key_of(override(plain, [setting])) != key_of(plain)) == is_decisive


def test_a_new_setting_leaves_the_keys_of_the_studies_that_do_not_use_it() -> None:
    plain = study_worker.recipe(lr=1e-4)
    # As before data.mix[].chat and model.tokenizer_revision. Another key here means that every study starts anew.
    assert key_of(plain) == "9feb6088ae9b4d19"
    (source,) = plain.data.mix
    chats = plain.data.model_copy(update={"mix": (source.model_copy(update={"chat": True}),)})
    assert key_of(plain.model_copy(update={"data": chats})) != key_of(plain)
    words = plain.model.model_copy(update={"tokenizer": "org/words"})
    pinned = words.model_copy(update={"tokenizer_revision": "main"})
    assert key_of(plain.model_copy(update={"model": pinned})) != key_of(plain.model_copy(update={"model": words}))


def test_the_key_is_of_the_content_of_the_data(tmp_path: Path) -> None:
    rows, folder = tmp_path / "rows.jsonl", tmp_path / "piqa"
    folder.mkdir()
    validation = folder / "validation.jsonl"
    files = [rows, folder / "train.parquet", tmp_path / "held_out.jsonl", validation]
    for file in files:
        file.write_text("1\n")
    mix = [{"source": str(rows), "validation": str(files[2])}, {"task": "piqa", "path": str(folder)}]
    plain = recipe_from(study_worker.DOCUMENT | {"data": {"mix": mix}})
    keys = [key_of(plain)]
    os.utime(rows, (1.0, 1.0))  # only touched
    (folder / "notes.md").write_text("no data")
    assert key_of(plain) == keys[0]
    for file in files:
        file.write_text("2\n")
        keys.append(key_of(plain))
    assert len(set(keys)) == 5
    validation.unlink()
    assert key_of(plain) not in keys


def test_the_key_is_of_all_files_of_folders_and_patterns(tmp_path: Path) -> None:
    held_out = tmp_path / "held_out.jsonl"
    files = [tmp_path / f"{kind}/part-{number}.jsonl" for kind in ("folder", "pattern") for number in range(2)]
    for file in (held_out, *files):
        file.parent.mkdir(exist_ok=True)
        file.write_text("1\n")
    mix = [{"source": str(tmp_path / "folder"), "validation": str(held_out)}, {"source": f"{tmp_path}/pattern/*.jsonl"}]
    plain = recipe_from(study_worker.DOCUMENT | {"data": {"mix": mix}})
    keys = {key_of(plain)}
    for file in (held_out, *files):
        file.write_text("2\n")
        keys.add(key_of(plain))
    assert len(keys) == 6


def test_a_huge_file_is_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cell_key, "_MOST_BLOCKS", 8)
    huge = 16 << 20
    file = tmp_path / "huge.jsonl"
    plain = recipe_from(study_worker.DOCUMENT | {"data": {"mix": [{"source": str(file)}]}})
    keys = set()
    for size, place in ((huge, None), (huge, huge - 5), (huge + 1, None)):
        with file.open("wb") as stream:
            stream.truncate(size)  # takes no room on the disk
            if place is not None:
                stream.seek(place)
                stream.write(b"x")
        keys.add(key_of(plain))
    assert len(keys) == 3


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({}, None),
        ({"rates": None}, "the learning rates are not searched (rates)"),
        ({"seeds": [0, 1]}, "there are only 2 of 3 (compare.min_seeds) seeds"),
        ({"stages": [{"name": "few", "cells": {"seed": 0}}]}, "there are only 1 of 3 (compare.min_seeds) seeds"),
        (
            {"stages": [{"name": name, "cells": {"seed": seeds}} for name, seeds in (("a", [0, 1]), ("b", [2, 3]))]},
            None,
        ),
    ],
)
def test_a_study_that_can_never_give_a_verdict_says_so(
    tmp_path: Path, changes: dict[str, Any], reason: str | None
) -> None:
    found = cannot_decide(study_from({"recipe": "demo", "product": TWO, "rates": RATES} | changes))
    assert found == ([] if reason is None else [reason])


def test_a_comparison_that_the_study_file_rules_out_is_told_before_it_runs(tmp_path: Path) -> None:
    product = {"base.quant": ["none", "nf4", "int8"], "adapter": {name: ADAPTERS[name] for name in ("lora", "dora")}}
    stages = [{"name": "main", "cells": {"base.quant": ["none", "nf4"]}}]
    stages.append({"name": "map", "cells": {"base.quant": "int8", "adapter": "lora"}})
    over = {"one": "nf4", "both": ["nf4", "int8"], "none": "int8"}
    primary = {name: {"over": {"base.quant": quants}} for name, quants in over.items()}
    made = expander(tmp_path, product=product, stages=stages, compare={"primary": primary})
    known = Results(StudyDirectory(tmp_path / "absent", retries=0, makes=False), made.study)
    assert notes_on(made, known) == [
        "The comparison 'both' cannot have a verdict: an arm has no cell for base.quant=int8.",
        "The comparison 'none' cannot be made: its labels must name contexts in which lora and one other arm are "
        "trained.",
    ]


@pytest.mark.parametrize(
    "value, label",
    [
        (1e-4, "0.0001"),
        ("1e-4", "0.0001"),
        ("1.10", "1.10"),
        ("nf4", "nf4"),
        ("inf", "inf"),
        (3, "3"),
        (0.12345678, "0.12345678"),
    ],
)
def test_a_label_is_how_the_value_is_read(value: Any, label: str) -> None:
    assert label_of(value) == label
    assert label_of([1, 2]) == "[1, 2]"
    assert label_of(None) == "null"
    assert label_of(True) == "true"


FAULTS = [
    ({"prodct": {}}, "prodct: unknown key", "Did you mean 'product'?"),
    ({"product": {"adapter": {"dora": {}}, "train.lr": 3}}, "product.train.lr", "got 3"),
    ({"product": {"adapter": {"dora": {}}, "train.lr": []}}, "product.train.lr", "got []"),
    (
        {"product": {"adaptr": {"dora": {}}}},
        "compare.arm: must be an axis of the product, got 'adapter'",
        "Did you mean 'adaptr'?",
    ),
    (
        {"exclude": [{"base.qant": "nf4"}]},
        "exclude[0].base.qant: must be an axis, allowed: ",
        "Did you mean 'base.quant'?",
    ),
    ({"exclude": [{"base.quant": "nf5"}]}, "exclude[0].base.quant: must be a value of that axis, got 'nf5'", "'nf4'?"),
    ({"exclude": [{}]}, "exclude[0]: must name an axis", "and its value, got {}"),
    (
        {"stages": [{"name": "a", "cells": {"adapter": "dorra"}}]},
        "stages[0].cells.adapter: must be a value of that axis, got 'dorra'",
        "'dora'?",
    ),
    ({"stages": [{"name": "a", "cells": {"seed": "x"}}]}, "stages[0].cells.seed: must be whole numbers", "got 'x'"),
    ({"stages": [{"name": "a"}, {"name": "a"}]}, "stages[1].name: must be another one for each stage", "'a' twice"),
    ({"seeds": [0, 1, 1]}, "seeds: must be seeds of their own, got 1", "which is also in seeds"),
    (
        {"product": {"adapter": {"dora": {}}}, "rates": {"values": [1, 2, 3], "seeds": [2]}},
        "rates.seeds: must be seeds of their own, got 2",
        "which is also in seeds",
    ),
    ({"product": {"adapter": {"dora": {}}, "seed": [0]}}, "product.seed: is not an axis", "give the seeds in seeds"),
    ({"rates": {"values": [1, 2, 3]}}, "product.train.lr: is not an axis with rates", "remove one of them"),
    (
        {"compare": {"primary": {"all": {"over": {"base.quant": "nf5"}}}}},
        "compare.primary.all.over.base.quant: must be a value of that axis, got 'nf5'",
        "'nf4'?",
    ),
    (
        {"compare": {"reference": "lor"}},
        "compare.reference: must be a value of the axis adapter, got 'lor'",
        "Did you mean 'lora'?",
    ),
    ({"compare": {"metric": "loss"}}, "compare.metric", "got 'loss'"),
    ({"product": {"adapter": {"dora": {}}, "sparsity": {"half": {}}}}, "product.sparsity: is a column", "another name"),
    ({"retries": -1}, "retries", "got -1"),
]


@pytest.mark.parametrize("changes, where, what", FAULTS)
def test_a_fault_is_one_line_with_its_place(tmp_path: Path, changes: dict[str, Any], where: str, what: str) -> None:
    with pytest.raises(UserError) as caught:
        study(tmp_path, **changes)
    (line,) = caught.value.faults
    assert line.startswith(f"study: {where}")
    assert what in line


def test_a_cell_whose_recipe_is_wrong_is_named(tmp_path: Path) -> None:
    product = {"base.quant": ["nf4", "nf5"], "adapter": {"dora": {"adapter.rnk": 3}, "lora": {"adapter.kind": "lora"}}}
    with pytest.raises(UserError) as caught:
        study(tmp_path, product=product)
    text = str(caught.value)
    assert "study (base.quant=nf5, adapter=dora; and 1 more): base.quant: " in text
    assert "got 'nf5'" in text
    assert "study (base.quant=nf4, adapter=dora; and 1 more): adapter.rnk: unknown key" in text
    assert "-s" not in text
    assert "Did you mean 'rank'?" in text
    with pytest.raises(
        UserError, match=r"^study .*: eval\.tasks: must name at least one task, since a study compares evaluations"
    ):
        study(tmp_path, settings={"eval.tasks": []})


def test_a_setting_that_uses_all_validation_examples_is_refused_for_halves(tmp_path: Path) -> None:
    product = {"adapter": {"lora": {"adapter.kind": "lora"}}}
    mix = [{"source": "a.jsonl"}, {"task": "piqa"}]
    settings = {"eval.best_by": "macro", "eval.every": 1, "data.mix": mix}
    with pytest.raises(UserError) as caught:
        study(tmp_path, product=product, settings=settings)
    (fault,) = caught.value.faults
    assert "eval.best_by: uses all validation examples" in fault
    cells = study(tmp_path, product=product, settings=settings, compare={"split": "test"}, seeds=[0])
    assert sum(cell.is_trained for cell in cells) == 1


def test_a_weight_in_the_loss_is_left_out_where_nothing_is_trained(tmp_path: Path) -> None:
    mix = [{"source": "a.jsonl", "loss_weight": 2.0}, {"source": "b.jsonl"}]
    product = {"adapter": {"lora": {"adapter.kind": "lora"}}}
    cells = study(tmp_path, product=product, settings={"data.mix": mix})
    assert {(cell.is_trained, cell.recipe.data.mix[0].loss_weight) for cell in cells} == {(True, 2.0), (False, None)}


def test_a_study_file_finds_the_recipe_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_recipe(tmp_path)
    file = tmp_path / "study.yaml"
    file.write_text("recipe: recipe.yaml\nseeds: [0]\nproduct:\n  adapter:\n    dora: {}\n")
    monkeypatch.chdir("/")
    assert len(Expander(load_study(file)).now().cells) == 3
    file.write_text("recipe: recipe.yaml\nproduct:\n  adapter:\n    dora: {}\nexclude: [{adapter: dora}]\n")
    with pytest.raises(UserError, match=f"^{re.escape(str(file))}: exclude leaves no cell"):
        study_run(file, dry_run=True)
    file.write_text("recipe: demo\nrecipe: demo\n")
    with pytest.raises(UserError, match=r"line 2: .*'recipe' is given twice"):
        load_study(file)
    with pytest.raises(UserError, match=r"none\.yaml: cannot be read"):
        load_study(tmp_path / "none.yaml")


@pytest.mark.slow
def test_a_thousand_cells_are_checked_in_seconds(tmp_path: Path) -> None:
    began = time.perf_counter()
    product = {
        "adapter": {"dora": {}},
        "train.lr": [index * 1e-6 for index in range(1, 101)],
    }
    assert len(study(tmp_path, product=product, seeds=[*range(10)])) == 1002
    assert time.perf_counter() - began < 30
