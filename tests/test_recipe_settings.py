"""Recipes: what is read, what is refused and by which words, and that the resolved recipe is the recipe."""

from __future__ import annotations

import copy
import glob
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from qdora.data.demo import FAMILIES
from qdora.data.source_files import files_of
from qdora.errors import UserError
from qdora.recipe.data_settings import COMMONSENSE_TASKS, DEMO_TASKS, is_path
from qdora.recipe.recipe_file import (
    apply_overrides,
    json_schema,
    load_recipe,
    missing_files,
    override,
    read_yaml,
    recipe_from,
    recipe_names,
    recipe_text,
    resolved_yaml,
)
from qdora.recipe.recipe_file import settings as settings_of
from qdora.recipe.settings import Recipe

TOKEN = "hf_" + "a1B2" * 8
PUBLISHED = ("commonsense-7b-40gb", "commonsense-8b-40gb", "commonsense-13b-40gb", "paper-dora-llama")


def minimal(**sections: Any) -> dict[str, Any]:
    """The smallest recipe, with some sections in place of its own."""
    small = {
        "model": {"source": "builtin"},
        "data": {"mix": [{"task": "demo/howto"}]},
        "train": {"steps": 10, "batch": 4},
    }
    return {**small, **sections}


def section(name: str, **values: Any) -> dict[str, Any]:
    """A minimal recipe with some values set in one of its sections."""
    data = minimal()
    return {**data, name: {**data.get(name, {}), **values}}


def changed(changes: dict[str, Any]) -> dict[str, Any]:
    """A minimal recipe with some dotted settings changed; ... takes one out."""
    data = minimal()
    for setting, value in changes.items():
        *steps, key = re.findall(r"\w+", setting)
        here: Any = data
        for step in steps:
            here = here[int(step)] if step.isdecimal() else here.setdefault(step, {})
        here[key] = copy.deepcopy(value)
        if value is ...:
            del here[key]
    return data


def faults(data: Any, *overrides: str) -> list[str]:
    """The lines that a recipe is refused with; [] where it is accepted."""
    try:
        recipe_from(apply_overrides(data, overrides) if overrides else data, "r.yaml", overrides)
    except UserError as error:
        return list(error.faults)
    return []


def check(lines: list[str], words: str) -> None:
    """One line that names all these words; the first is the setting."""
    (line,) = lines
    assert "\n" not in line
    first, *others = words.split()
    assert line.startswith(f"r.yaml: {first}: "), line
    assert all(word in line for word in others), line


# --- shipped recipes


def test_every_shipped_recipe_is_read_and_its_resolved_form_is_the_same_recipe() -> None:
    names = recipe_names()
    assert {"tiny", "quickstart", "own-data", "chat-8b-40gb", *PUBLISHED} <= set(names)
    for name in names:
        recipe = load_recipe(name)
        again = recipe_from(read_yaml(resolved_yaml(recipe), name), name)
        assert again == recipe, name
        assert resolved_yaml(again) == resolved_yaml(recipe), name
        headline = recipe_text(name).splitlines()[0]
        assert headline.startswith("# "), name
        assert headline.endswith("."), name  # `qdora recipes` shows it by itself


def test_paper_recipes_hold_the_published_settings() -> None:
    for name in PUBLISHED:
        recipe = load_recipe(name)
        assert recipe.adapter.targets == ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
        assert (recipe.adapter.rank, recipe.adapter.alpha, recipe.adapter.dropout) == (32, 64.0, 0.05)
        assert (recipe.train.epochs, recipe.train.batch, recipe.train.warmup) == (3.0, 16, 100)
        assert recipe.train.schedule == "linear"
        if name.startswith("commonsense"):
            assert [source.task for source in recipe.data.mix] == list(COMMONSENSE_TASKS)


def test_tasks_are_those_of_the_papers_and_those_that_ship() -> None:
    assert set(COMMONSENSE_TASKS) == {"boolq", "piqa", "siqa", "hellaswag", "winogrande", "arc_e", "arc_c", "obqa"}
    assert {f"demo/{family}" for family in FAMILIES} == set(DEMO_TASKS)
    assert [source.task for source in load_recipe("quickstart").data.mix] == list(DEMO_TASKS)


# --- YAML


@pytest.mark.parametrize(
    "text, value",
    [
        ("1e-4", 1e-4), ("2E5", 2e5), ("-1.5e+3", -1500.0), (".5", 0.5), ("1.", 1.0), ("0.0001", 1e-4), ("1", 1),
        ("-7", -7), (".inf", math.inf), ("'1e-4'", "1e-4"), ("2:4", "2:4"), ("190:20:30", "190:20:30"),
        ("0100", "0100"), ("-010", "-010"), ("1_000", "1_000"), ("on", "on"), ("off", "off"), ("yes", "yes"),
        ("No", "No"), ("true", True), ("False", False), ("~", None), ("null", None), ("", None),
        ("2024-05-01", "2024-05-01"), ("1e", "1e"), ("e5", "e5"), ("[a, 1e2]", ["a", 100.0]),
        ("{<<: {b: 1, c: 2}, b: 3}", {"b": 3, "c": 2}), ("!!str 7", "7"),
    ],
)  # fmt: skip
def test_values_are_those_of_yaml_1_2(text: str, value: Any) -> None:
    found = read_yaml(f"a: {text}", "r.yaml")["a"]
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    "text, words",
    [
        ("model:\n  source: [a\nbase: 1\n", "line 3"),
        ("a: b: c\n", "line 1"),
        ("train:\n  lr: 1\n  lr: 2\n", "line 3|'lr' is given twice"),
        ("a: &x {b: 1}\nc: {<<: *x, d: 1, d: 2}\n", "line 2|'d' is given twice"),
        ("", "got null"),
        ("- a\n- b\n", "got [a, b]"),
        ("a: 1\n---\nb: 2\n", "line 2"),
        ("a: !!python/object/apply:os.system [ls]\n", "line 1"),
        ("a: \x07\n", "not YAML"),
        ("a: !!bool maybe\n", "not YAML"),
        ("a: !!timestamp x\n", "not YAML"),
        (f"a: {'9' * 5000}", "not YAML"),
        ("a: " + "[" * 2000, "not YAML"),
    ],
)
def test_yaml_that_cannot_be_read_is_one_line(text: str, words: str) -> None:
    with pytest.raises(UserError) as raised:
        read_yaml(text, "r.yaml")
    (line,) = raised.value.faults
    assert line.startswith("r.yaml: ")
    assert all(word in line for word in words.split("|")), line


@pytest.mark.parametrize(
    "text", ["1e4", "1e-4", "0100", "2:4", "off", "null", "1.5", "~", "2024-05-01", "a\u2028b", "=", "x: y"]
)
def test_text_that_looks_like_something_else_is_read_back(text: str) -> None:
    recipe = recipe_from(section("data", mix=[{"source": "/x", "name": text, "columns": {text: text}}]))
    assert recipe_from(read_yaml(resolved_yaml(recipe), "resolved")) == recipe


def test_a_recipe_that_cannot_be_read_names_the_nearest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("x: 1")
    (tmp_path / "latin.yaml").write_bytes(b"a: \xff")
    with (tmp_path / "weights.gguf").open("wb") as file:
        file.truncate(2**21)
    for name, end in (("quikstart", "'quickstart'?"), ("mien.yaml", "'mine.yaml'?"), ("no/such/dir.yaml", "."),
                      (".", "."), ("latin.yaml", "."), ("weights.gguf", ".")):  # fmt: skip
        with pytest.raises(UserError) as raised:
            load_recipe(name)
        (line,) = raised.value.faults
        assert line.startswith(f"{name}: ")
        assert line.endswith(end)
    with pytest.raises(UserError, match=r"quikstart: no such recipe.*'quickstart'\?"):
        recipe_text("quikstart")


# --- single fields


@pytest.mark.parametrize(
    "setting, value, words",
    [
        *(("adapter.rank", value, "") for value in ("abc", "16", 0, True, 16.0)),
        *(("adapter.alpha", value, "") for value in (True, math.nan, "2", [1], 0)),
        *(("adapter.dropout", value, "") for value in (1, math.nan, -0.1)),
        ("adapter.targets", [], "all-linear"),
        ("adapter.targets", "q_proj", "all-linear"),
        *(("base.double_quant", value, "boolean") for value in (1, "yes")),
        ("base.block_size", 65, "4096"),
        ("base.quant", "nf5", "got 'nf5' 'nf4'?"),
        ("base.quant", ["nf4"], "got [nf4]"),
        *(("train.lr", value, "") for value in (math.inf, "fast", -1e-4)),
        *(("train.warmup", value, "") for value in (1.0, -1, "x")),
        *(("train.betas", value, "") for value in ([0.9], 0.9)),
        ("train.lr_ratio_B", 0, "0"),
        ("train.lr_end", -1e-5, "-1"),
        ("train.spike", 1, "1"),
        ("adapter.kind", "Dora", "'dora'?"),
        ("adapter.mask", "kep", "'keep'?"),
        ("train.optimizer", "lion_8bit", "'paged_lion_8bit'?"),
        *(("train.seed", value, "") for value in (-1, 2**63)),
        *(("memory.loss_chunk", value, "'auto'") for value in ("auot", 0, True)),
        ("memory.loss_chunk", "auot", "Did you mean 'auto'?"),
        ("memory.budget", "much", "40GiB 'much'"),
        ("data.max_length", 1, "2"),
        ("data.mix", [], "1"),
        *(("model.source", value, "") for value in (7, "a\nb", "")),
        ("model.sorce", "x", "unknown 'source'?"),
        ("adapter.lr", 1, "unknown 'train.lr'?"),
        ("adapter.frobnicate", 1, "unknown rank alpha"),
        ("eval", 3, "got 3"),
        ("base.prune", {"pattern": "unstructered"}, ""),
        ("base.prune", {"sparsity": 1.0}, ""),
        ("adapter.gates", {"mean_rank": 0.5}, ""),
        ("adapter.rank_pattern", {"q_proj": 0}, ""),
        ("data.mix", [{"task": "bolq"}], ""),
        ("data.mix", [{"source": "/x", "template": {"prompt": "a"}}], ""),
    ],
)
def test_a_wrong_value_is_named_with_what_is_allowed(setting: str, value: Any, words: str) -> None:
    (line,) = faults(changed({setting: value}))
    assert line.startswith(f"r.yaml: {setting}"), line
    assert "\n" not in line
    assert all(word in line for word in words.split()), line


@pytest.mark.parametrize("value, kind", [(5, int), (0, int), (0.5, float), (0.0, float)])
def test_a_warmup_is_steps_or_a_share(value: float, kind: type) -> None:
    assert type(recipe_from(section("train", warmup=value)).train.warmup) is kind


def test_all_faults_come_together() -> None:
    text = """
model: {sorce: builtin}
adapter: {rnak: 8, alpha: true}
data: {mix: [{task: bolq}, 3]}
trackers: [wandbb]
lr: 1e-4
"""
    lines = faults(read_yaml(text, "r.yaml"))
    expected = {
        "model.source": "", "model.sorce": "'source'?", "adapter.rnak": "'rank'?", "adapter.alpha": "true",
        "data.mix[0].task": "'boolq'?", "data.mix[1]": "3", "train": "", "trackers[0]": "'wandb'?", "lr": "'train.lr'?",
    }  # fmt: skip
    assert sorted(line.split(": ")[1] for line in lines) == sorted(expected)
    assert all(expected[line.split(": ")[1]] in line for line in lines)


def test_null_is_the_default() -> None:
    recipe = recipe_from(minimal(adapter=None, base={"block_size": None, "prune": None}, memory={"budget": None}))
    assert recipe == recipe_from(minimal())
    assert recipe_from(section("train", clip=None, checkpoint_every=None)).train.clip is None
    assert [line.split(": ")[1] for line in faults(minimal(train=None))] == ["train"]


# --- settings beside each other

STREAM = [{"source": "/a", "stream": True}]
HALF = {"method": "wanda", "sparsity": 0.5}
SPARSE = {"method": "sparsegpt", "sparsity": 0.5}
MIX = "data.mix"
UNUSED: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {"model.revision": "main"}),
    ({"model.source": "/models/x"}, {"model.revision": "main"}),
    ({"model.source": "o/m"}, {"model.tokenizer_revision": "main"}),
    ({"model.tokenizer": "/t"}, {"model.tokenizer_revision": "main"}),
    ({"base.quant": "int8"}, {"base.double_quant": True, "base.block_size": 64}),
    ({"base.quant": "none"}, {"base.block_size": 128, "base.skip": ["lm_head"], "base.cache": "auto"}),
    ({"base.quant": "mxfp4"}, {"base.block_size": 128}),
    ({"base.prune": HALF}, {"base.cache": "auto", "base.prune.damping": 0.1}),
    ({}, {"base.streamed_blocks": 2}),
    ({"base.prune": {"pattern": "2:4"}}, {"base.prune.sparsity": 0.5, "base.prune.group": "row"}),
    ({"base.prune": SPARSE}, {"base.prune.group": "row"}),
    ({"base.prune": {**HALF, "method": "magnitude"}}, {"base.prune.calibration": {"length": 8}}),
    ({"adapter.resume_from": "/a"}, {"adapter.rank": 16, "adapter.targets": "all-linear", "adapter.mask": "ignore"}),
    ({"adapter.kind": "none", "train.steps": 0}, {"adapter.rank": 16, "adapter.targets": ["q"]}),
    ({"adapter.kind": "none", "train.steps": 0}, {"train.lr_ratio_B": 2, "data.mix[0].loss_weight": 2}),
    ({"adapter.kind": "magnitude"}, {"adapter.rank": 16, "adapter.gates": {"mean_rank": 2}, "train.lr_ratio_B": 2}),
    ({"adapter.kind": "lora"}, {"train.lr_ratio_magnitude": 2}),
    ({"adapter.kind": "full", "base.quant": "none"}, {"train.lr_ratio_B": 2, "interference.every": 2}),
    ({}, {"adapter.same_scaling": True, "adapter.also_train_rows": "all", "data.temperature": 2.0}),
    ({}, {"data.max_bad_rows": 3, "data.mix[0].weight": 2, "data.mix[0].loss_weight": 2, "interference.examples": 4}),
    ({MIX: STREAM}, {"data.validation_fraction": 0.1, "data.mix[0].limit": 5, "data.mix[0].revision": "main"}),
    ({MIX: [{"task": "piqa", "validation": "test"}]}, {"data.validation_fraction": 0.1}),
    ({MIX: [{"task": "boolq"}]}, {"data.mix[0].stream": True, "data.mix[0].columns": {"a": "b"}}),
    ({MIX: [{"task": "boolq"}]}, {"data.mix[0].chat": True}),
    ({MIX: [{"task": "boolq", "path": "/x"}]}, {"data.mix[0].revision": "main"}),
    ({}, {f"data.mix[0].{key}": value for key, value in {"format": "text", "path": "/x", "revision": "a"}.items()}),
    ({MIX: [{"source": "/a.jsonl"}]}, {"data.mix[0].size": 5, "data.mix[0].shuffle_window": 5}),
    ({MIX: [{"source": "/a.jsonl"}]}, {"data.mix[0].config": "a", "data.mix[0].data_files": "a"}),
    ({MIX: [{"source": "/a.jsonl"}]}, {"data.mix[0].path": "/x", "data.mix[0].split": "a"}),
    ({MIX: [{"source": "/d/*.jsonl"}]}, {"data.mix[0].split": "test"}),
    ({MIX: [{"source": "/x", "template": {"prompt": "a", "completion": "b"}}]}, {"data.mix[0].format": "auto"}),
    ({MIX: [{"source": "/x", "format": "sharegpt"}]}, {"data.mix[0].chat": True}),
    ({"train.optimizer": "paged_lion_8bit", "train.schedule": "constant"}, {"train.eps": 1e-6, "train.lr_end": 0.0}),
    ({}, {"train.max_skips": 3, "eval.block": 1, "eval.patience": 1, "eval.best_metric": "acc"}),
    ({"eval.tasks": []}, {"eval.limit": 3, "eval.every": 3, "eval.method": "generate", "eval.at_end": True}),
    ({"eval.at_start": False, "eval.at_end": False}, {"eval.limit": 3, "eval.method": "generate"}),
    ({"eval.at_start": False, "eval.at_end": False}, {"eval.tasks": ["demo/howto"]}),
    ({}, {"eval.best_by": "macro"}),
    ({"memory.checkpointing": False}, {"memory.offload_activations": True}),
]


@pytest.mark.parametrize("changes, setting, value", [(one, key, each[key]) for one, each in UNUSED for key in each])
def test_a_setting_without_effect_is_refused(changes: dict[str, Any], setting: str, value: Any) -> None:
    plain = settings_of(recipe_from(changed(changes)))
    assert recipe_from(plain) == recipe_from(changed(changes))
    *steps, key = re.findall(r"\w+", setting)
    section: Any = plain
    for step in steps:
        section = section[int(step)] if step.isdecimal() else section[step]
    assert key not in section
    check(faults(changed({**changes, setting: value})), f"{setting} ignored because")


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"train.batch": ...}, "train.tokens_per_step batch null"),
        ({"train.tokens_per_step": 512}, "train.tokens_per_step batch 512"),
        ({"train.steps": ...}, "train.steps epochs"),
        ({"train.epochs": 1}, "train.steps epochs"),
        ({"train.warmup": 11}, "train.warmup 10 11"),
        ({"train.micro_batch_tokens": 511}, "train.micro_batch_tokens 512 511"),
        ({"train.batch": ..., "train.tokens_per_step": 512, "train.micro_batch_tokens": 1024},
         "train.micro_batch_tokens 512 1024"),
        ({"train.lr_end": 3e-4}, "train.lr_end 0.0002 0.0003"),
        ({"adapter.kind": "full"}, "adapter.kind base.quant nf4"),
        ({"adapter.kind": "full", "base.quant": "none", "base.prune": HALF}, "adapter.kind base.prune"),
        ({"adapter.kind": "none"}, "train.steps 0 10"),
        ({"adapter.init": "loftq", "base.quant": "none"}, "adapter.init loftq"),
        ({"adapter.mask": "keep"}, "adapter.mask base.prune"),
        ({"adapter.gates": {}}, "adapter.gates.mean_rank parameters"),
        ({"adapter.gates": {"mean_rank": 2, "parameters": 9}}, "adapter.gates.mean_rank parameters"),
        ({"adapter.gates": {"mean_rank": 16}}, "adapter.gates.mean_rank adapter.rank 16"),
        ({"adapter.gates": {"mean_rank": 2, "warmup": 600}}, "adapter.gates.anneal 10"),
        ({"adapter.gates": {"mean_rank": 2}, "eval.every": 5, "eval.best_by": "macro"}, "eval.best_by adapter.gates"),
        ({"base.prune": {"method": "wanda"}}, "base.prune.sparsity unstructured"),
        ({"base.prune": {"pattern": "3:3"}}, "base.prune.pattern 3:3"),
        ({"base.prune": {**SPARSE, "order": "quantize_first"}}, "base.prune.order sparsegpt"),
        ({"base.prune": {**HALF, "order": "quantize_first"}, "base.quant": "none"}, "base.prune.order none"),
        ({"base.prune": HALF, "data.mix": STREAM}, "base.prune.calibration.text mix"),
        ({"base.residency": "host", "base.quant": "none"}, "base.residency host"),
        ({"base.residency": "host", "base.prune": HALF}, "base.residency host"),
        ({"base.residency": "host", "memory.checkpointing": False}, "memory.checkpointing host"),
        ({"data.strategy": "weights", "data.mix": [{"task": "boolq", "weight": 2}, {"task": "piqa"}]},
         "data.mix[1].weight null"),
        ({"data.strategy": "temperature"}, "data.temperature null"),
        ({"data.mix": STREAM, "data.too_long": "error"}, "data.too_long truncate"),
        ({"data.mix": STREAM, "train.epochs": 1.5, "train.steps": ...}, "train.epochs train.steps 1.5"),
        ({"data.mix": [{}]}, "data.mix[0].source task"),
        ({"data.mix": [{"task": "piqa", "source": "org/set"}]}, "data.mix[0].source task"),
        ({"data.mix": [{"source": "a/x.jsonl"}, {"source": "b/x.jsonl"}]}, "data.mix[1].name (x)"),
        ({"data.mix": [{"source": "/a.jsonl", "stream": True, "max_epochs": 2}]}, "data.mix[0].size max_epochs"),
        ({"data.mix": [{"source": "/a.jsonl", "stream": True}, {"source": "/b.txt"}]},
         "data.mix[0].size proportional"),
        ({"eval.tasks": ["fcts"], "data.mix": [{"task": "demo/howto", "name": "facts"}]}, "eval.tasks[0] 'facts'?"),
        ({"eval.every": 5, "eval.best_by": "mcro"}, "eval.best_by 'macro'?"),
        ({"eval.every": 5, "eval.best_by": "macro", "data.mix": [{"task": "demo/howto", "name": "macro"}]},
         "eval.best_by 'macro'"),
        ({"model.source": "o/m", "model.trust_remote_code": True}, "model.trust_remote_code commit"),
        ({"model.source": "o/m", "model.revision": "main", "model.trust_remote_code": True},
         "model.trust_remote_code commit"),
        ({"model.trust_remote_code": True}, "model.trust_remote_code commit"),
        *(({"train.parallel": "shard", **more}, "train.parallel shard") for more in (
            {"adapter.kind": "full", "base.quant": "none"}, {"adapter.init": "loftq"}, {"base.residency": "host"},
            {"adapter.also_train": ["lm_head"], "adapter.also_train_rows": "all"}, {"memory.host_embeddings": True})),
    ],
)  # fmt: skip
def test_settings_that_contradict_each_other_are_refused(changes: dict[str, Any], words: str) -> None:
    check(faults(changed(changes)), words)


@pytest.mark.parametrize(
    "changes",
    [
        {"model.source": "o/m", "model.revision": "0123456789abcdef" * 2 + "01234567", "model.trust_remote_code": True},
        {"adapter.kind": "full", "base.quant": "none"},
        {"adapter.kind": "none", "train.steps": 0},
        {"adapter.same_scaling": True, "adapter.experts": {"rank": 4}},
        {"base.quant": "none", "base.skip": ["lm_head"], "base.prune": HALF},
        {"data.strategy": "temperature", "data.temperature": 2},
        {"data.mix": STREAM},
        {"data.mix": [{"source": "/a.jsonl.gz", "stream": True}]},
        {"data.strategy": "weights", "data.mix": [{"task": "boolq", "weight": 2}, {"task": "piqa", "weight": 0.5}]},
        {"data.mix": [{"source": "a/x.jsonl"}, {"source": "b/x.jsonl", "name": "b"}]},
        {"train.lr_ratio_B": 16, "train.lr_ratio_magnitude": 0.5, "train.lr_end": 2e-4},
        {"train.lr_ratio_magnitude": None, "adapter.kind": "lora"},
        {"train.optimizer": "lion", "train.betas": [0.95, 0.98], "train.schedule": "constant"},
        {"eval.tasks": ["facts"], "data.mix": [{"task": "demo/howto", "name": "facts"}]},
        {"eval.tasks": []},
        {"adapter.resume_from": "/a", "adapter.dropout": 0.1},
    ],
)
def test_what_looks_odd_and_is_right(changes: dict[str, Any]) -> None:
    recipe = recipe_from(changed(changes))
    assert recipe_from(settings_of(recipe)) == recipe


def test_too_long_is_cut_in_a_stream_unless_the_recipe_says_otherwise() -> None:
    assert recipe_from(changed({"data.mix": STREAM})).data.too_long == "truncate"
    assert recipe_from(changed({"data.mix": STREAM, "data.too_long": "drop"})).data.too_long == "drop"
    assert recipe_from(minimal()).data.too_long == "error"


# --- overrides


@pytest.mark.parametrize(
    "changes, overrides, expected",
    [
        ({}, "train.lr=1e-4", {"train.lr": 1e-4}),
        ({}, "data.mix[0].limit=5", {"data.mix": [{"task": "demo/howto", "limit": 5}]}),
        ({}, "adapter.targets=[q_proj] train.clip=null", {"adapter.targets": ["q_proj"], "train.clip": None}),
        ({}, "adapter.rank_pattern={a.b:3}", {"adapter.rank_pattern": {"a.b": 3}}),
        ({}, "train.steps=7 train.steps=8", {"train.steps": 8}),
        ({"eval.limit": 3}, "eval.limit=", {}),
        ({}, "trackers=[wandb] data.cache=off", {"trackers": ["wandb"], "data.cache": "off"}),
        ({"base.prune": None}, "base.prune.sparsity=0.5", {"base.prune": {"sparsity": 0.5}}),
        ({"adapter.rank": 4}, "adapter.kind=none adapter.rank=null train.steps=0",
         {"adapter.kind": "none", "train.steps": 0}),
        ({}, "train.epochs=2 train.tokens_per_step=512",
         {"train.steps": ..., "train.epochs": 2, "train.batch": ..., "train.tokens_per_step": 512}),
        ({"train.steps": ..., "train.epochs": 2}, "train.steps=null", {"train.steps": ..., "train.epochs": 2}),
        ({"data.mix": [{"source": "o/n", "data_files": {"train": "a", "test": "b"}}]},
         "data.mix[0].data_files.train=c",
         {"data.mix": [{"source": "o/n", "data_files": {"train": "c", "test": "b"}}]}),
        ({"data.mix": [{"source": "o/n", "data_files": ["a", "b"]}]}, "data.mix[0].data_files[1]=c",
         {"data.mix": [{"source": "o/n", "data_files": ["a", "c"]}]}),
    ],
)  # fmt: skip
def test_overrides(changes: dict[str, Any], overrides: str, expected: dict[str, Any]) -> None:
    before = changed(changes)
    items = [item.replace(":", ": ") for item in overrides.split()]
    recipe = recipe_from(apply_overrides(before, items))
    assert before == changed(changes)
    assert recipe == recipe_from(changed(expected))


def test_a_checked_recipe_can_be_changed() -> None:
    recipe = override(load_recipe("tiny"), ["train.tokens_per_step=512", "adapter.rank=null"])
    assert (recipe.train.batch, recipe.train.tokens_per_step, recipe.adapter.rank) == (None, 512, 16)


@pytest.mark.parametrize(
    "item, words",
    [
        ("adapter.rnak=3", "-s: adapter.rnak unknown 'rank'?"),
        ("adapter.rank=0", "-s: adapter.rank 0"),
        ("data.mix[9].limit=3", "-s data.mix[9].limit"),
        ("data.mix.0.limit=5", "-s data.mix.0.limit"),
        ("train.steps.x=1", "-s train.steps.x"),
        ("train.lr=[", "-s train.lr=[ YAML"),
        ("x", "-s key=value"),
        ("=3", "-s key=value"),
        ("train=5", "-s: train 5"),
        ("train=null", "-s: train"),
        ("train.epochs=1 train.steps=3", "-s: train.steps epochs"),
        ("data={mix:[{task:boolq,limit:0}]}", "-s: data.mix[0].limit 0"),
        ("data.mix=[a.jsonl]", "-s: data.mix[0] 'a.jsonl'"),
    ],
)
def test_a_wrong_override_is_named(item: str, words: str) -> None:
    (line,) = faults(minimal(), *(each.replace(":", ": ").replace(",", ", ") for each in item.split()))
    assert line.startswith("-s")
    assert all(word in line for word in words.split()), line


def test_only_faults_in_overridden_settings_begin_with_s() -> None:
    [line] = faults(section("train", lr_ratio_B=-1), "train.lr=1e-3")
    assert line.startswith("r.yaml: train.lr_ratio_B: ")


# --- paths


def test_paths_start_at_the_file_and_in_overrides_at_the_current_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, here = tmp_path / "recipes", tmp_path / "here"
    (folder / "org" / "local").mkdir(parents=True)
    here.mkdir()
    monkeypatch.chdir(here)
    mix = [
        {"source": "./chat.jsonl", "validation": "../val.jsonl"},
        {"source": "org/local"},
        {"source": "org/on-the-hub", "validation": "test"},
        {"task": "boolq", "path": "boolq"},
        {"source": "org/cut", "split": "train[:95%]", "validation": "train[95%:]"},
        {"source": "org/parts", "validation": "data/val/part"},
    ]
    document = section("data", mix=mix, cache="tokens") | {"model": {"source": "m.gguf"}, "base": {"cache": "bases"}}
    (folder / "r.yaml").write_text(yaml.safe_dump(document))
    recipe = load_recipe(folder / "r.yaml", ["adapter.resume_from=run/adapter"])
    assert recipe.model.source == str(folder / "m.gguf")
    assert (recipe.base.cache, recipe.data.cache) == (str(folder / "bases"), str(folder / "tokens"))
    plain = load_recipe(folder / "r.yaml", ["base.cache=auto", "data.cache=off"])
    assert (plain.base.cache, plain.data.cache) == ("auto", "off")
    assert recipe.adapter.resume_from == str(here / "run" / "adapter")
    first, second, third, fourth, cut, parts = recipe.data.mix
    assert (first.source, first.validation) == (str(folder / "chat.jsonl"), str(tmp_path / "val.jsonl"))
    assert second.source == str(folder / "org" / "local")
    assert (third.source, third.validation) == ("org/on-the-hub", "test")
    assert fourth.path == str(folder / "boolq")
    assert (cut.validation, parts.validation) == ("train[95%:]", str(folder / "data" / "val" / "part"))
    assert [source.label for source in recipe.data.mix] == ["chat", "local", "on-the-hub", "boolq", "cut", "parts"]
    # the resolved recipe means the same from anywhere
    (tmp_path / "resolved.yaml").write_text(resolved_yaml(recipe))
    monkeypatch.chdir(tmp_path)
    assert load_recipe("resolved.yaml") == recipe
    (folder / "boolq").mkdir()
    assert missing_files(recipe, "r.yaml") == [
        f"r.yaml: model.source: no such file or directory, got {folder / 'm.gguf'}.",
        f"r.yaml: adapter.resume_from: no such file or directory, got {here / 'run' / 'adapter'}.",
        f"r.yaml: data.mix[0].source: no such file or directory, got {folder / 'chat.jsonl'}.",
        f"r.yaml: data.mix[0].validation: no such file or directory, got {tmp_path / 'val.jsonl'}.",
        f"r.yaml: data.mix[5].validation: no such file or directory, got {parts.validation}.",
    ]


def test_a_folder_with_marks_of_a_pattern_in_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "[proj]*"
    (folder / "data").mkdir(parents=True)
    for name in ("train.jsonl", "test.jsonl", "[x].jsonl"):
        (folder / "data" / name).touch()
    mix = [
        {"source": "data/t*.jsonl"},
        {"source": "./data", "split": "test", "validation": "train"},
        {"source": "data/train.jsonl", "validation": "data/te?t.jsonl"},
        {"source": "data/[x].jsonl", "name": "one file"},
    ]
    (folder / "r.yaml").write_text(yaml.safe_dump(section("data", mix=mix, cache="new[1]")))
    recipe = load_recipe(folder / "r.yaml")
    pattern, split, single, one = recipe.data.mix
    escaped = glob.escape(str(folder))
    assert (pattern.source, pattern.label) == (f"{escaped}/data/t*.jsonl", "t")
    assert files_of(Path(str(pattern.source)), "train") == [
        folder / "data" / f"{name}.jsonl" for name in ("test", "train")
    ]
    assert (split.source, split.split) == (str(folder / "data"), "test")
    assert (single.source, single.validation) == (str(folder / "data" / "train.jsonl"), f"{escaped}/data/te?t.jsonl")
    assert (one.source, recipe.data.cache) == (str(folder / "data" / "[x].jsonl"), str(folder / "new[1]"))
    assert missing_files(recipe, "r.yaml") == []
    monkeypatch.chdir(tmp_path)
    assert recipe_from(read_yaml(resolved_yaml(recipe), "resolved")) == recipe


def test_missing_files_of_a_recipe_name_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "chat.jsonl").touch()
    for path, there in (("chta.jsonl", "chat.jsonl"), ("dta/x.jsonl", "data"), ("chat.jsonl*x", "")):
        document = section("data", mix=[{"source": path}]) | {"model": {"source": "builtin"}}
        (tmp_path / "r.yaml").write_text(yaml.safe_dump(document))
        [line] = missing_files(load_recipe(tmp_path / "r.yaml"), "r.yaml")
        assert line.endswith(f". Did you mean '{there}'?" if there else f"got {tmp_path / path}.")


def test_what_is_a_path() -> None:
    for path in ("/x", "./x", "../x", "~/x", ".", "x.jsonl", "a/b.gguf", "a/b/c", "with blank"):
        assert is_path(path), path
    for name in ("gpt2", "org/name", "Qwen/Qwen2.5-7B", "meta-llama/Llama-2-7b-hf"):
        assert not is_path(name), name


# --- secrets


def test_access_tokens_are_refused_everywhere_and_never_repeated() -> None:
    places = [
        section("model", source=TOKEN),
        section("model", hf_token=TOKEN),
        section("model", **{TOKEN: 1}),
        section("data", mix=[{"source": "x.jsonl", "name": f"a {TOKEN} b"}]),
        {**minimal(), "adapter": {"targets": ["q_proj", TOKEN]}},
        {**minimal(), "adapter": {"rank_pattern": {TOKEN: 3}}},
    ]
    for data in places:
        (line,) = faults(data)
        assert "holds an access token" in line
        assert TOKEN not in line
        assert TOKEN[:12] not in line
    for override_ in (
        f"adapter.rank_pattern.{TOKEN}=3",
        f"model.source={TOKEN}",
        f"{TOKEN}=1",
        f"model.{TOKEN}=1",
        TOKEN,
        f"model.x=[{TOKEN}",
    ):
        lines = faults(minimal(), override_)
        assert lines
        assert TOKEN not in "\n".join(lines)
    for text in (f"a: [{TOKEN}", f"{TOKEN}: 1\n{TOKEN}: 2"):
        with pytest.raises(UserError) as raised:
            read_yaml(text, "r.yaml")
        assert TOKEN not in str(raised.value)
    with pytest.raises(UserError) as raised:
        load_recipe(TOKEN)
    assert TOKEN not in str(raised.value)


# --- schema and start-up


def test_phases_of_gates_in_steps_and_shares() -> None:
    recipe = recipe_from(minimal(adapter={"gates": {"mean_rank": 2, "warmup": 7, "anneal": 0.25}}))
    assert recipe.adapter.gates is not None
    assert recipe.adapter.gates.phases(200) == (7, 50)
    assert recipe.adapter.gates.length_fault(12) is None
    assert "at most the 8 steps of the run, got 7 + 2." in (recipe.adapter.gates.length_fault(8) or "")


def test_every_field_is_described_in_the_schema() -> None:
    schema = json.loads(json.dumps(json_schema()))
    sections = {"Recipe": schema, **schema["$defs"]}
    fields = [(name, field) for name, each in sections.items() for field in each["properties"].items()]
    assert len(fields) > 60
    for name, (field, content) in fields:
        assert content.get("description") or "$ref" in content, f"{name}.{field}"
    assert schema["additionalProperties"] is False


def test_reading_a_recipe_imports_no_torch() -> None:
    code = (
        "import sys, qdora.recipe.recipe_file as r, qdora.files.run_directory, qdora.run.doctor;"
        "r.load_recipe('quickstart');"
        "print([m for m in ('torch', 'transformers', 'bitsandbytes', 'datasets', 'numpy') if m in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == "[]"


# --- properties

names_ = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1, max_size=12)
positive = st.floats(min_value=1e-300, max_value=1e300, allow_nan=False)
whole = st.integers(min_value=1, max_value=10**6)
share = st.floats(min_value=0, max_value=1, exclude_max=True)
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "model.tokenizer": st.just("org/tok"),
    "base.quant": st.sampled_from(["fp4", "int8", "none"]),
    "base.block_size": st.sampled_from([64, 4096]),
    "base.skip": st.lists(names_, max_size=3),
    "base.prune": st.sampled_from([HALF, SPARSE, {"pattern": "1:8"}, {**HALF, "method": "magnitude"}]),
    "adapter.kind": st.sampled_from(["lora", "magnitude"]),
    "adapter.rank": whole,
    "adapter.alpha": positive,
    "adapter.dropout": share,
    "adapter.targets": st.lists(names_, min_size=1, max_size=3),
    "adapter.rank_pattern": st.dictionaries(names_, whole, max_size=3),
    "adapter.gates": st.just({"mean_rank": 1}),
    "data.mix": st.lists(names_, min_size=1, max_size=3, unique=True).map(
        lambda names: [{"source": f"/{name}", "name": name, "limit": 3} for name in names]
    ),
    "data.template_kwargs": st.dictionaries(names_, st.booleans() | names_ | st.integers(), max_size=2),
    "train.lr": positive,
    "train.warmup": st.integers(0, 10) | share,
    "train.optimizer": st.sampled_from(["adamw", "lion"]),
    "train.betas": st.tuples(share, share).map(list),
    "train.clip": st.none() | positive,
    "train.seed": st.integers(0, 2**63 - 1),
    "train.schedule": st.sampled_from(["constant", "cosine"]),
    "train.checkpoint_every": whole | st.none(),
    "eval.limit": whole,
    "eval.every": whole,
    "memory.budget": st.sampled_from(["auto", "40GiB", "500 MB"]),
    "memory.loss_chunk": st.just("auto") | whole,
}
some_values = st.sets(st.sampled_from(sorted(VALUES)), max_size=6).flatmap(
    lambda keys: st.fixed_dictionaries({key: VALUES[key] for key in sorted(keys)})
)


@settings(max_examples=150, deadline=None)
@given(some_values)
def test_a_resolved_recipe_is_read_back_exactly(changes: dict[str, Any]) -> None:
    assume(not faults(changed(changes)))
    recipe = recipe_from(changed(changes))
    text = resolved_yaml(recipe)
    again = recipe_from(read_yaml(text, "resolved"), "resolved")
    assert again == recipe
    assert resolved_yaml(again) == text
    assert override(recipe, []) == recipe
    for setting, value in changes.items():  # what was given is what is held, to the last bit
        section, key = setting.split(".")
        if not isinstance(value, dict | list):
            found = getattr(getattr(again, section), key)
            assert (found, type(found)) == (value, type(value))


json_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@example("adapter", {"rank_pattern": {"a\nb": 0}, "\n": 1}, None)
@given(st.sampled_from(sorted(Recipe.model_fields)), json_like, json_like)
def test_any_value_anywhere_is_accepted_or_refused_in_single_lines(name: str, value: Any, inner: Any) -> None:
    keys = Recipe.model_fields[name].annotation
    for given_ in (value, dict.fromkeys(getattr(keys, "model_fields", ["x"]), inner)):
        for line in faults(minimal(**{name: given_})):
            assert line.startswith("r.yaml: ")
            assert "\n" not in line


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(codec="utf-8"), max_size=40) | st.text(":-[]{}&*!|>'\"%@#,? \nab1", max_size=40))
def test_any_text_is_yaml_or_refused(text: str) -> None:
    refused: tuple[str, ...] = ()
    try:
        assert isinstance(read_yaml(text, "r.yaml"), dict)
    except UserError as error:
        refused = error.faults
    assert all(line.startswith("r.yaml: ") and "\n" not in line for line in refused)
    refused = ()
    try:
        apply_overrides(minimal(), [text, f"train.lr={text}"])
    except UserError as error:
        refused = error.faults
    assert all(line.startswith("-s ") and "\n" not in line for line in refused)


@pytest.mark.parametrize(
    "section, harmful",
    [
        ("interference: {every: 20, examples: 16}", "interference: {gradients: pcgrad}"),
        ("interference: {}", "interference: {loss_weights: progress}"),
        ("train: {steps: 3, batch: 4, compile: false}", "train: {steps: 3, batch: 4, compile: true}"),
    ],
)
def test_the_recipe_of_an_old_run_without_the_removed_settings_is_read(
    tmp_path: Path, section: str, harmful: str
) -> None:
    mix = "[{task: demo/howto, split: train}, {task: demo/cause, split: train}]"
    train = "" if "train" in section else "train: {steps: 3, batch: 4}\n"
    for written in (section, harmful):
        (tmp_path / "recipe.yaml").write_text(f"model: {{source: builtin}}\ndata: {{mix: {mix}}}\n{train}{written}\n")
        if written == section:
            assert load_recipe(tmp_path / "recipe.yaml").train.steps == 3
        else:
            with pytest.raises(UserError, match="unknown key"):
                load_recipe(tmp_path / "recipe.yaml")
