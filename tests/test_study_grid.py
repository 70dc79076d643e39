"""A study file and its cells: every combination once, named by what it runs, and faults in one line each."""

from __future__ import annotations

import itertools
import math
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from qdora.errors import UserError
from qdora.plan.fit import plan
from qdora.recipe.recipe_file import override, recipe_from, settings
from qdora.study import cells, results
from qdora.study.cells import Cell, Cells, Expander, key_of
from qdora.study.grid import label_of, load_study, study_from
from qdora.study.run import study_run
from tests.data_rows import faults_of, says
from tests.fake_study import ADAPTERS, RECIPE, recipe

ROOT = Path(__file__).parent.parent
TWO: dict[str, Any] = {"base.quant": ["none", "nf4"], "adapter": ADAPTERS}
THREE = TWO | {"adapter": ADAPTERS | {"none": {"adapter.kind": "none", "train.steps": 0}}, "train.lr": [1e-4, 3e-4]}
ONE: dict[str, Any] = {"adapter": {"dora": {}}}
LORA = {"adapter.kind": "lora"}
RATES: dict[str, Any] = {"values": [1e-4, 4e-4, 1.6e-3], "steps": 3, "seeds": [100, 101]}


@pytest.fixture
def study(tmp_path: Path) -> Any:
    """Makes the cells of a study that start from the recipe that is never run."""
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))

    def made(**changes: Any) -> Expander:
        document = {"recipe": str(tmp_path / "recipe.yaml"), "product": THREE, "seeds": [0, 1, 2]}
        return Expander(study_from(document | changes))

    return made


def labels(cells: list[Cell], *axes: str) -> list[tuple[str | None, ...]]:
    return [tuple(cell.labels.get(axis) for axis in axes) for cell in cells]


def of_kind(cells: Cells, kind: str) -> list[Cell]:
    return [cell for cell in cells.cells if cell.kind == kind]


def test_every_combination_is_a_cell_of_its_own_and_what_is_not_trained_is_one(study: Any) -> None:
    cells = study(settings={"eval.limit": 9, "train.clip": 0.5}).now()
    trained, bases = of_kind(cells, "trained"), of_kind(cells, "base")
    expected = itertools.product(("none", "nf4"), ("lora", "dora"), ("0.0001", "0.0003"), ("0", "1", "2"))
    assert sorted(labels(trained, "base.quant", "adapter", "train.lr", "seed")) == sorted(expected)
    # One for each base, whatever the seed would have been; the uncompressed one is among them
    assert labels(bases, "base.quant", "adapter") == [("none", "none"), ("nf4", "none")]
    assert cells.cells[:2] == bases
    assert {(cell.recipe.data.seed, cell.recipe.eval.block) for cell in bases} == {(0, None)}
    by_key = {cell.key: cell for cell in cells.cells}
    for cell in trained:
        recipe, seed = cell.recipe, int(cell.labels["seed"])
        assert (recipe.train.seed, recipe.data.seed, recipe.eval.block) == (seed, seed, seed)
        assert (recipe.base.quant, recipe.adapter.kind) == (cell.labels["base.quant"], cell.labels["adapter"])
        assert (f"{recipe.train.lr:g}", recipe.train.clip) == (cell.labels["train.lr"], 0.5)
        assert (recipe.eval.at_start, recipe.eval.limit) == (False, 9)  # the base has a cell of its own
        assert cell.key == key_of(recipe)
        base, dense = by_key[cell.base_key or ""], by_key[cell.dense_key or ""]
        assert (base.recipe.adapter.kind, base.recipe.base, base.recipe.train.steps) == ("none", recipe.base, 0)
        assert dense.recipe.base.quant == "none"
    assert {cell.recipe.eval.block for cell in study().now().cells} == {None}  # all examples are evaluated
    more = study(settings={"eval.limit": 9, "train.clip": 0.5}, seeds=[*range(6)]).now()
    assert by_key.keys() < {cell.key for cell in more.cells}


def test_bases_exclusions_equal_combinations_and_initial_values_of_an_axis(study: Any) -> None:
    product = {"base.quant": ["nf4", "int8"], "adapter": {"dora": {}}}
    bases = of_kind(study(product=product).now(), "base")
    assert sorted(cell.recipe.base.quant for cell in bases) == ["int8", "nf4", "none"]
    assert len(study(product=product, bases=False, seeds=[0, 1]).now().cells) == 4
    cells = study(product=TWO, bases=False, exclude=[{"base.quant": "none", "adapter": ["dora"]}]).now().cells
    assert {*labels(cells, "base.quant", "adapter")} == {("none", "lora"), ("nf4", "lora"), ("nf4", "dora")}
    bare = {"adapter.kind": "none", "train.steps": 0}
    product = {"adapter": {"bare": bare, "lora": LORA}}
    cells = study(product=product, seeds=[0, 1], settings={"base.quant": "none"}).now().cells
    assert [cell.labels["adapter"] for cell in cells] == ["bare", "lora", "lora"]
    with pytest.raises(UserError, match=r"adapter=again\): is the same recipe as \(adapter=lora\)"):
        study(product={"adapter": {"lora": LORA, "again": LORA}})
    product = {"base.quant": ["nf4"], "adapter": {"lora": LORA, "other": LORA | {"train.seed": 100}}}
    cells = of_kind(study(product=product, settings={"eval.limit": 9}).now(), "trained")
    found = {(c.labels["adapter"], c.recipe.train.seed, c.recipe.data.seed, c.recipe.eval.block) for c in cells}
    assert found == {("lora", n, n, n) for n in range(3)} | {("other", 100 + n, n, n) for n in range(3)}
    mix = [{"source": "a.jsonl", "loss_weight": 2.0}, {"source": "b.jsonl"}]
    cells = study(product={"adapter": {"lora": LORA}}, settings={"data.mix": mix}).now().cells
    assert {(cell.is_trained, cell.recipe.data.mix[0].loss_weight) for cell in cells} == {(True, 2.0), (False, None)}


def test_stages_are_parts_of_the_product_in_their_order_and_add_seeds(study: Any) -> None:
    stages = [
        {"name": "first", "cells": {"adapter": "dora", "seed": [4, 5]}},
        {"name": "second", "cells": {"base.quant": ["nf4"]}},
        {"name": "reserve", "cells": {"base.quant": "nf4", "seed": [2, 3]}},
        {"name": "moved", "cells": {"base.quant": "nf4", "adapter": "dora", "seed": [4]}, "kind": "transplant"},
    ]
    cells = of_kind(study(product=TWO, stages=stages).now(), "trained")
    found = [(cell.stage, *each) for cell, each in zip(cells, labels(cells, *TWO, "seed"), strict=True)]
    # Every arm has a seed before any has the next one
    first = [("first", quant, "dora", seed) for seed in "45" for quant in ("none", "nf4")]
    second = [("second", "nf4", arm, seed) for seed in "012" for arm in ("lora", "dora")]
    assert found == [*first, *second, ("reserve", "nf4", "lora", "3"), ("reserve", "nf4", "dora", "3")]


def learnt(**best: float) -> Any:
    """Losses of a search that is over, with the best rate of each adapter."""
    return lambda cell: abs(math.log(cell.recipe.train.lr / best[cell.recipe.adapter.kind]))


SEARCHED: dict[str, Any] = {"product": TWO, "rates": RATES, "settings": {"train.steps": 9}}
BOTH = learnt(lora=4e-4, dora=1.6e-3)


def trained(*of_seeds: float | None) -> Any:
    """Losses of a search that is over, and of trained cells with these seeds."""
    return lambda cell: BOTH(cell) if cell.kind == "rate" else of_seeds[int(cell.labels["seed"])]


def test_arms_wait_for_their_rates_which_runs_with_seeds_of_their_own_find(study: Any) -> None:
    made = study(**SEARCHED)
    search = [(c.recipe.train.steps, c.recipe.train.seed, c.stage) for c in of_kind(made.now(), "rate")]
    # A short run of every value for every arm on every base
    assert search == [(3, 100, "rates, short runs")] * 4 * 3
    assert (of_kind(made.now(), "trained"), made.now().num_waiting) == ([], {"main": 4 * 3})
    end = made.now(BOTH)
    full = [cell.recipe for cell in end.cells if cell.stage == "rates"]
    assert {(r.train.steps, r.train.seed, r.data.seed) for r in full} == {(9, 100, 100), (9, 101, 101)}
    trained = of_kind(end, "trained")
    assert {*labels(trained, "adapter", "train.lr")} == {("lora", "0.0004"), ("dora", "0.0016")}
    assert {(cell.recipe.train.seed, cell.recipe.train.steps) for cell in trained} == {(0, 9), (1, 9), (2, 9)}
    assert all(cell.is_interior and cell.recipe.train.lr == float(cell.labels["train.lr"]) for cell in trained)
    assert end.num_waiting == {}


def test_an_arm_can_have_the_rate_of_another_and_values_of_its_own(study: Any) -> None:
    more = {"like": {"base.quant": {"nf4": "none"}}, "of": {"adapter": {"dora": [1e-3, 2e-3, 4e-3]}}}
    end = study(**SEARCHED | {"rates": RATES | more}).now(learnt(lora=4e-4, dora=2e-3))
    search = of_kind(end, "rate")
    assert {*labels(search, "base.quant")} == {("none",)}
    assert {cell.recipe.train.lr for cell in search if cell.recipe.adapter.kind == "dora"} == {1e-3, 2e-3, 4e-3}
    expected = {(quant, *arm) for quant in ("none", "nf4") for arm in (("lora", "0.0004"), ("dora", "0.002"))}
    assert {*labels(of_kind(end, "trained"), "base.quant", "adapter", "train.lr")} == expected


def test_the_test_split_compares_and_the_validation_split_finds_rates(study: Any, tmp_path: Path) -> None:
    mix = [{"source": "a.jsonl"}, {"task": "piqa", "path": str(tmp_path)}]
    changes = {"settings": {"data.mix": mix, "eval.tasks": ["piqa"]}, "compare": {"split": "test"}}
    for cell in study(**SEARCHED | changes).now(BOTH).cells:
        wanted = None if cell.kind == "rate" else "test"
        assert [source.validation for source in cell.recipe.data.mix] == [None, wanted], cell.kind


def test_adapters_are_evaluated_again_once_they_are_there(study: Any) -> None:
    of_dora = {"base.quant": "nf4", "adapter": "dora", "seed": [0, 1]}
    kinds = ("transplant", "rescaled", "set_back", "by_layer")
    stages = [{"name": "main"}, *({"name": kind, "kind": kind, "cells": of_dora} for kind in kinds)]
    made = study(**SEARCHED | {"stages": stages})
    assert made.now().num_waiting == {"main": 12} | dict.fromkeys(kinds, 2)
    assert made.now(trained(None, None)).num_waiting == dict.fromkeys(kinds, 2)
    assert made.now(trained(1.0, None)).num_waiting == dict.fromkeys(kinds, 1)
    assert made.now(trained(1.0, math.inf)).num_waiting == {"rescaled": 1}
    cells = made.now(BOTH)
    by_key = {cell.key: cell for cell in cells.cells}
    before = {"transplant": ("trained", "none"), "rescaled": ("transplant", "nf4")}
    for kind in kinds:
        assert [cell.labels["seed"] for cell in of_kind(cells, kind)] == ["0", "1"]
        for cell in of_kind(cells, kind):
            source = by_key[cell.adapter_key or ""]
            assert (source.kind, source.labels["base.quant"]) == before.get(kind, ("trained", "nf4"))
            assert (source.labels["adapter"], source.labels["seed"]) == ("dora", cell.labels["seed"])
            assert (cell.recipe.base.quant, cell.recipe.train.steps, cell.recipe.eval.at_start) == ("nf4", 0, True)
            assert cell.key not in (source.key, cell.base_key, key_of(cell.recipe))
    assert len(by_key) == len(cells.cells)


NO_EFFECT = ["train.log_every=7", "train.checkpoint_every=3", "trackers=[tensorboard]", "memory.budget=40GiB"]
NO_EFFECT += ["memory.loss_chunk=64", "base.residency=device", "train.lr=1.0e-4", "train.lr=0.0001"]
DECISIVE = ["train.seed=7", "train.spike=3.0", "eval.limit=3", "adapter.rank=2", "train.lr=2e-4"]


def test_the_key_is_of_what_decides_the_result_and_not_of_how_it_is_written() -> None:
    plain = recipe(lr=1e-4)
    # As before data.mix[].chat and model.tokenizer_revision. Another key here means that every study starts anew.
    assert key_of(plain) == "9feb6088ae9b4d19"
    assert key_of(recipe_from(dict(reversed(settings(plain).items())))) == key_of(plain)
    assert {key_of(override(plain, [setting])) for setting in NO_EFFECT} == {key_of(plain)}
    assert len({key_of(plain), *(key_of(override(plain, [setting])) for setting in DECISIVE)}) == 1 + len(DECISIVE)
    (source,) = plain.data.mix
    chats = plain.data.model_copy(update={"mix": (source.model_copy(update={"chat": True}),)})
    assert key_of(plain.model_copy(update={"data": chats})) != key_of(plain)
    words = plain.model.model_copy(update={"tokenizer": "org/words"})
    pinned = words.model_copy(update={"tokenizer_revision": "main"})
    assert key_of(plain.model_copy(update={"model": pinned})) != key_of(plain.model_copy(update={"model": words}))


def test_the_key_is_of_the_content_of_all_data_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["rows.jsonl", "piqa/train.parquet", "held_out.jsonl", "piqa/validation.jsonl"]
    names += [f"{kind}/part-{number}.jsonl" for kind in ("folder", "pattern") for number in range(2)]
    files = [tmp_path / name for name in names]
    for file in files:
        file.parent.mkdir(exist_ok=True)
        file.write_text("1\n")
    mix = [{"source": str(files[0]), "validation": str(files[2])}, {"task": "piqa", "path": str(tmp_path / "piqa")}]
    mix += [{"source": str(tmp_path / "folder")}, {"source": f"{tmp_path}/pattern/*.jsonl"}]
    plain = recipe_from(RECIPE | {"data": {"mix": mix}})
    keys = [key_of(plain)]
    os.utime(files[0], (1.0, 1.0))  # only touched
    (tmp_path / "piqa/notes.md").write_text("no data")
    assert key_of(plain) == keys[0]
    for file in files:
        file.write_text("2\n")
        keys.append(key_of(plain))
    files[3].unlink()
    keys.append(key_of(plain))
    monkeypatch.setattr(cells, "_WHOLE_BYTES", 2**20)  # a huge file is sampled
    huge = 16 << 20
    for size, content in ((huge, b"\0"), (huge, b"x"), (huge + 1, b"\0")):
        with files[0].open("wb") as stream:
            stream.truncate(size)  # takes no room on the disk
            stream.seek(huge // 2)
            stream.write(content)
        keys.append(key_of(plain))
    assert len(set(keys)) == len(keys) == 1 + len(files) + 1 + 3


def test_a_label_is_how_the_value_is_read() -> None:
    values = [1e-4, "1e-4", "1.10", "nf4", "inf", 3, 0.12345678, [1, 2], None, True]
    found = ["0.0001", "0.0001", "1.10", "nf4", "inf", "3", "0.12345678", "[1, 2]", "null", "true"]
    assert list(map(label_of, values)) == found


MIX = {"data.mix": [{"source": "a.jsonl"}, {"task": "piqa"}]}
PRUNED = {"base.prune.method": "wanda", "base.prune.sparsity": 0.5, "data.mix": [{"source": "a.jsonl", "limit": 9}]}
BY_MACRO = {"eval.best_by": "macro", "eval.every": 1}


def again(kind: str, **main: Any) -> dict[str, Any]:
    """A study that trains these cells and evaluates all adapters again."""
    return {"product": TWO, "stages": [{"name": "main", "cells": main}, {"name": "again", "kind": kind}]}


ALL_WRONG: dict[str, Any] = {
    "product": ONE | {"lr": {"a": LORA}, "layer": {"a": {}}},
    "exclude": [{}, {"adaptr": "dora"}, {"adapter": "dorra"}],
    "seeds": [0, 1, 1],
    "rates": RATES | {"seeds": [0], "like": {"adapter": {"x": "y"}}, "of": {"adapter": {"z": [1, 2, 3]}}},
    "stages": [{"name": "a", "cells": {"adapter": "b", "seed": "s"}}, {"name": "a"}],
    "compare": {"reference": "c", "primary": {"all": {"arm": "d", "over": {"lr": "o"}, "minus": {"lr": "m"}}}},
}
FAULTS = (
    "product.layer: is a column|seeds: ... got 1, ... also in seeds|rates.seeds: ... got 0, ... also in seeds|"
    "exclude[1]: adaptr must be an axis|exclude[2]: adapter must be of dora, got 'dorra'|"
    "rates.like: ... got 'x'|rates.of: ... got 'z'|stages[0].cells: adapter ... got 'b'|"
    "stages[0].cells: seed ... got 's'|"
    "compare: ... of dora, got 'c'|compare.primary.all: ... got 'd'|compare.primary.all.over: lr ... got 'o'|"
    "compare.primary.all.minus: lr ... got 'm'"
)


def test_all_faults_of_a_study_file_are_named() -> None:
    found = faults_of(study_from, {"recipe": "demo"} | ALL_WRONG)
    assert [
        words for words, fault in zip(FAULTS.split("|"), found, strict=True) if not says(fault, f"study: {words}")
    ] == []


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"prodct": {}, "retries": -1}, "retries ... got -1 ... prodct: unknown key ... 'product'"),
        ({"product": {"adapter": {"dora": {}}, "train.lr": 3}}, "product.train.lr ... got 3"),
        ({"product": {"adaptr": {"dora": {}}}}, "compare ... adapter must be an axis ... adaptr"),
        ({"exclude": [{"adapter": ["lora", "dora", "none"]}]}, "exclude leaves no cell"),
        ({"stages": [{"name": "a", "cells": {"seed": 4}}], "rates": {"values": [1, 2, 3], "seeds": [4]}}, "got 4"),
        ({"settings": {"data.seed": 3}}, "data.seed ... decided by seeds"),
        ({"settings": {"eval.limit": 9, "eval.block": 3}}, "eval.block ... decided by seeds"),
        ({"product": ONE, "rates": RATES, "settings": {"train.lr": 1}}, "train.lr ... is decided by rates"),
        ({"settings": {"eval.tasks": []}}, "eval.tasks ... at least one task"),
        ({"product": ONE, "settings": PRUNED}, "prune.calibration.text: mix differs by seed ... limit"),
        ({"product": ONE, "settings": MIX | BY_MACRO}, "eval.best_by ... got macro ... compare.split"),
        (again("transplant", **{"base.quant": "nf4"}), "stage again ... train this arm on the uncompressed base"),
        (again("rescaled", adapter="dora"), "stage again ... does not transplant this arm"),
        (again("by_layer", adapter="dora"), "stage again ... does not train this arm"),
        (again("set_back", adapter="lora"), "stage again ... adapter.kind must be dora, got lora"),
        ({"product": TWO | {"base.quant": ["nf5"]}}, "study (base.quant=nf5, adapter=lora): base.quant"),
        ({"product": {"adapter": {"dora": {"adapter.rnk": 3}}}}, "study (adapter=dora): adapter.rnk ... 'rank'?"),
    ],
)
def test_faults(study: Any, changes: dict[str, Any], words: str) -> None:
    assert says(" ".join(faults_of(study, **changes)), words)


def test_what_is_refused_for_halves_and_seeds_is_allowed_elsewhere(study: Any) -> None:
    assert study(product=ONE, settings=MIX | BY_MACRO, compare={"split": "test"}).now().cells
    assert study(product=ONE, settings=PRUNED | {"base.prune.method": "magnitude"}).now().cells
    assert study(product=ONE, settings=PRUNED | {"data.mix": [{"source": "a.jsonl"}]}).now().cells


def test_a_study_file_finds_the_recipe_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    file = tmp_path / "study.yaml"
    file.write_text("recipe: recipe.yaml\nseeds: [0]\nproduct:\n  adapter:\n    dora: {}\n")
    monkeypatch.chdir("/")
    assert len(Expander(load_study(file)).now().cells) == 3
    file.write_text(file.read_text() + "exclude: [{adapter: dora}]\n")
    with pytest.raises(UserError, match=r"study\.yaml: exclude leaves no cell"):
        study_run(file, dry_run=True)
    file.write_text("recipe: demo\nrecipe: demo\n")
    with pytest.raises(UserError, match=r"line 2: .*'recipe' is given twice"):
        load_study(file)
    with pytest.raises(UserError, match=r"none\.yaml: must be a YAML file"):
        load_study(tmp_path / "none.yaml")


def test_a_grid_of_the_benchmarks_has_its_cells() -> None:
    cells = results.planned_cells(Expander(load_study(ROOT / "benchmarks/grids/8b.yaml")), None)
    counts = Counter(cell.stage for cell in cells.cells)
    # Models, bases, adapters, seeds
    assert (counts["main"], counts["transplants"], counts["bases"]) == (2 * 8 * 2 * 3, 2 * 7 * 2 * 3, 2 * 8)
    assert cells.num_waiting == {}


@pytest.mark.slow
def test_every_cell_of_the_grid_for_a_card_of_40_gb_fits_it() -> None:
    cells = results.planned_cells(Expander(load_study(ROOT / "benchmarks/grids/8b.yaml")), None).cells
    kinds = {(str(each.recipe.base), each.recipe.model.source, each.recipe.adapter.kind): each.recipe for each in cells}
    plans = [plan(recipe, "40GB", may_change=False) for recipe in kinds.values()]
    assert len(plans) >= 2 * 8 * 2
    assert all(each.peak_bytes <= 37.25 * 2**30 for each in plans)
