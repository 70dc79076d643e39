"""A study file and its cells: every combination once, named by what it runs, and faults in one line each."""

from __future__ import annotations

import itertools
import os
import random
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
from qdora.study.cell_key import key_of
from qdora.study.compare import cannot_win
from qdora.study.grid import Cell, equal_in_words, expand, label_of, load_study, study_from
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
            "train.lr": ["1e-4", 3e-4],
            "train.seed": [0, 1, 2],
        },
    }
    return expand(study_from(document | changes))


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
    assert labels(trained, "base.quant", "adapter", "train.lr", "train.seed") == expected
    assert len(trained) == len(expected)
    bases = [cell for cell in cells if not cell.is_trained]
    # one for each base, whatever the learning rate and the seed would have been; the uncompressed one is among them
    assert labels(bases, "base.quant", "adapter") == {("none", "none"), ("nf4", "none")}
    assert len(bases) == 2
    assert cells[:2] == bases


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


def test_bases_are_added_where_the_grid_has_none(tmp_path: Path) -> None:
    product = {"base.quant": ["nf4", "int8"], "adapter": {"dora": {}}}
    cells = study(tmp_path, product=product)
    assert sorted(cell.recipe.base.quant for cell in cells if not cell.is_trained) == ["int8", "nf4", "none"]
    assert len(study(tmp_path, product=product, bases=False)) == 2


def test_exclude_leaves_out_and_include_adds(tmp_path: Path) -> None:
    product = {"base.quant": ["none", "nf4"], "adapter": {"lora": {"adapter.kind": "lora"}, "dora": {}}}
    cells = study(tmp_path, product=product, bases=False, exclude=[{"base.quant": "none", "adapter": ["dora"]}])
    assert labels(cells, "base.quant", "adapter") == {("none", "lora"), ("nf4", "lora"), ("nf4", "dora")}
    include = [{"base.quant": ["fp4", "int8"], "adapter": "dora"}, {"base.quant": "none", "adapter": "lora"}]
    cells = study(tmp_path, product=product, bases=False, exclude=[{"adapter": "lora"}], include=include)
    assert labels(cells, "base.quant", "adapter") == {
        ("none", "dora"),
        ("nf4", "dora"),
        ("fp4", "dora"),
        ("int8", "dora"),
        ("none", "lora"),
    }
    with pytest.raises(UserError, match="exclude leaves no cell"):
        study(tmp_path, product=product, exclude=[{"adapter": ["lora", "dora"]}])


def test_combinations_with_equal_recipes_are_named(tmp_path: Path) -> None:
    same = {"adapter.kind": "lora"}
    bare = {"adapter.kind": "none", "train.steps": 0}
    product = {"adapter": {"bare": bare, "bare again": bare, "lora": same, "lora again": same}, "train.seed": [0, 1]}
    cells = study(tmp_path, product=product, settings={"base.quant": "none"})
    assert [cell.labels["adapter"] for cell in cells] == ["bare", "lora", "lora"]
    assert cells[0].equal == ({"adapter": "bare again"},)  # its seeds are one cell on purpose
    assert [cell.equal for cell in cells[1:]] == [
        ({"adapter": "lora again", "train.seed": seed},) for seed in ("0", "1")
    ]
    text = equal_in_words([cell.record() for cell in cells]) or ""
    assert text.startswith("3 combinations have the same recipe as another one.")
    assert "adapter=lora again, train.seed=1 is adapter=lora, train.seed=1" in text
    assert equal_in_words([cell.record() for cell in study(tmp_path)]) is None


def test_versions_are_not_numbers_and_a_value_given_twice_is_refused(tmp_path: Path) -> None:
    product = {"adapter": {"dora": {}}, "model.revision": ["1.10", "1.1"]}
    cells = study(tmp_path, product=product, bases=False)
    assert {cell.labels["model.revision"]: cell.recipe.model.revision for cell in cells} == {
        "1.10": "1.10",
        "1.1": "1.1",
    }
    with pytest.raises(UserError, match=r"product\.train\.lr: has the value 0\.0001 twice"):
        study(tmp_path, product={"adapter": {"dora": {}}, "train.lr": ["1e-4", 2e-4, 0.0001]})


def test_settings_hold_for_all_cells(tmp_path: Path) -> None:
    cells = study(tmp_path, settings={"train.steps": 7, "eval.limit": 3}, product={"adapter": {"dora": {}}})
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


def test_a_huge_file_is_sampled(tmp_path: Path) -> None:
    file = tmp_path / "huge.jsonl"
    plain = recipe_from(study_worker.DOCUMENT | {"data": {"mix": [{"source": str(file)}]}})
    keys = set()
    for size, place in ((2 * 2**30, None), (2 * 2**30, 2 * 2**30 - 5), (2 * 2**30 + 1, None)):
        with file.open("wb") as stream:
            stream.truncate(size)  # takes no room on the disk
            if place is not None:
                stream.seek(place)
                stream.write(b"x")
        keys.add(key_of(plain))
    assert len(keys) == 3


RATES = {
    "adapter": {"lora": {"adapter.kind": "lora"}, "dora": {}},
    "train.lr": [1e-4, 2e-4, 4e-4],
    "train.seed": [0, 1, 2],
}


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({}, None),
        ({"exclude": [{"adapter": "lora", "train.lr": 4e-4}]}, "lora can be tuned to is the smallest or largest"),
        ({"product": RATES | {"train.lr": [1e-4, 2e-4]}}, "at least 3 are needed"),
        ({"product": RATES | {"train.lr": [1e-4]}}, "lora has one value of train.lr, so it is not tuned"),
        ({"product": RATES | {"train.seed": [0, 1]}}, "have only 2 of 3 (compare.min_seeds) seeds in common"),
        ({"exclude": [{"adapter": "dora", "train.lr": 2e-4, "train.seed": 0}]}, "dora can be tuned to is the smallest"),
        ({"product": RATES | {"adapter": {"dora": {}}}}, "no two values of adapter are trained"),
        ({"compare": {"num_resamples": 100, "alpha": 0.005}}, "100 permutations give no p-value below 0.0099"),
    ],
)
def test_a_grid_that_can_never_give_a_winner_says_so(
    tmp_path: Path, changes: dict[str, Any], reason: str | None
) -> None:
    document = {"recipe": str(write_recipe(tmp_path)), "product": RATES} | changes
    checked = study_from(document)
    found = cannot_win([cell.record() for cell in expand(checked)], checked.compare)
    assert bool(found) == (reason is not None)
    assert reason is None or reason in "; ".join(found)


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
    ({"product": {"adapter": {"dora": {}}, "train.lr": 3}}, "product.train.lr", "got 3, allowed: a list of values"),
    ({"product": {"adapter": {"dora": {}}, "train.lr": []}}, "product.train.lr", "allowed: a list of values"),
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
    ({"include": [{"adapter": "dorra"}]}, "include[0].adapter: must be a value of that axis, got 'dorra'", "'dora'?"),
    ({"include": [{}]}, "include[0]: must name an axis", "and its value, got {}"),
    (
        {"compare": {"reference": "lor"}},
        "compare.reference: must be a value of the axis adapter, got 'lor'",
        "Did you mean 'lora'?",
    ),
    (
        {"compare": {"choose": ["train.rl"]}},
        "compare.choose: must be an axis of the product",
        "Did you mean 'train.lr'?",
    ),
    ({"compare": {"seed": "train.lr"}}, "compare: arm, choose and seed must be different axes", "got 'train.lr' twice"),
    ({"compare": {"metric": "loss"}}, "compare.metric: not valid, got 'loss'", "allowed: nll_per_token"),
    ({"product": {"adapter": {"dora": {}}, "sparsity": {"half": {}}}}, "product.sparsity: is a column", "another name"),
    ({"retries": -1}, "retries: not valid, got -1", "0 or more"),
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
    assert "(base.quant=nf5, adapter=lora): -s: base.quant: not valid, got 'nf5'" in text
    assert "(base.quant=nf4, adapter=dora; and 1 more): -s adapter.rnk=3: unknown key" in text
    assert "Did you mean 'rank'?" in text
    with pytest.raises(
        UserError, match=r"eval\.tasks: must name at least one task, since a study compares evaluations"
    ):
        study(tmp_path, settings={"eval.tasks": []})


def test_a_setting_that_uses_all_validation_examples_is_refused_for_halves(tmp_path: Path) -> None:
    product = {"adapter": {"lora": {"adapter.kind": "lora"}}, "train.seed": [0]}
    mix = [{"source": "a.jsonl"}, {"source": "b.jsonl"}]
    settings = {"eval.best_by": "macro", "eval.every": 1, "data.mix": mix}
    with pytest.raises(UserError) as caught:
        study(tmp_path, product=product, settings=settings)
    (fault,) = caught.value.faults
    assert "eval.best_by: uses all validation examples" in fault
    cells = study(tmp_path, product=product, settings=settings, compare={"split": "test"})
    assert sum(cell.is_trained for cell in cells) == 1


def test_seeds_and_tuned_settings_that_change_the_base_are_refused(tmp_path: Path) -> None:
    product = {
        "adapter": {"lora": {"adapter.kind": "lora", "base.quant": "nf4"}},
        "base.block_size": [32, 64],
        "train.seed": [0],
    }
    assert sum(cell.is_trained for cell in study(tmp_path, product=product, compare={"choose": []})) == 2
    with pytest.raises(
        UserError, match=r"train.seed, base.block_size must change only training, but one of them changes the base"
    ):
        study(tmp_path, product=product, compare={"choose": ["base.block_size"]})


def test_a_weight_in_the_loss_is_left_out_where_nothing_is_trained(tmp_path: Path) -> None:
    mix = [{"source": "a.jsonl", "loss_weight": 2.0}, {"source": "b.jsonl"}]
    product = {"adapter": {"lora": {"adapter.kind": "lora"}}, "train.seed": [0]}
    cells = study(tmp_path, product=product, settings={"data.mix": mix})
    assert {(cell.is_trained, cell.recipe.data.mix[0].loss_weight) for cell in cells} == {(True, 2.0), (False, None)}


def test_a_study_file_finds_the_recipe_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_recipe(tmp_path)
    file = tmp_path / "study.yaml"
    file.write_text("recipe: recipe.yaml\nproduct:\n  adapter:\n    dora: {}\n")
    monkeypatch.chdir("/")
    assert len(expand(load_study(file))) == 3
    file.write_text("recipe: demo\nrecipe: demo\n")
    with pytest.raises(UserError, match="line 2: key 'recipe' is given twice"):
        load_study(file)
    with pytest.raises(UserError, match=r"none\.yaml: cannot be read"):
        load_study(tmp_path / "none.yaml")


@pytest.mark.slow
def test_a_thousand_cells_are_checked_in_seconds(tmp_path: Path) -> None:
    began = time.perf_counter()
    product = {
        "adapter": {"dora": {}},
        "train.lr": [index * 1e-6 for index in range(1, 101)],
        "train.seed": [*range(10)],
    }
    assert len(study(tmp_path, product=product)) == 1002
    assert time.perf_counter() - began < 30
