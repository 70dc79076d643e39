"""Recipes: what is read, what is refused and by which words, and that the resolved recipe is the recipe."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from qdora.data.demo import FAMILIES
from qdora.errors import UserError
from qdora.recipe import recipe_file
from qdora.recipe.data_settings import COMMONSENSE_TASKS, DEMO_TASKS, is_path
from qdora.recipe.recipe_file import (
    json_schema,
    load_recipe,
    missing_files,
    override,
    read_yaml,
    recipe_from,
    recipe_names,
    recipe_text,
    resolved_yaml,
    with_overrides,
)
from qdora.recipe.settings import Recipe

TOKEN = "hf_" + "a1B2" * 8
PUBLISHED = ("commonsense-7b-40gb", "commonsense-8b-40gb", "commonsense-13b-40gb", "paper-dora-llama")
SMALL = "{model: {source: builtin}, data: {mix: [{task: demo/howto}]}, train: {steps: 10, batch: 4}}"


def changed(changes: str = "", **sections: Any) -> dict[str, Any]:
    """The smallest recipe with some settings changed, as in `-s train.lr=1; eval.every=2`, or some whole sections."""
    document: dict[str, Any] = yaml.safe_load(SMALL)
    return with_overrides(document, changes.split("; ") if changes else [])[0] | sections


def read(changes: str = "") -> Recipe:
    return recipe_from(changed(changes))


def lines_of(call: Callable[[], Any]) -> list[str]:
    """The lines with which a call is refused; [] where it is not."""
    try:
        call()
    except UserError as error:
        return list(error.faults)
    return []


def faults(data: Any, *overrides: str) -> list[str]:
    return lines_of(lambda: recipe_from(with_overrides(data, overrides)[0], "r.yaml", overrides))


def check(lines: list[str], start: str, words: str = "") -> None:
    """One line with this start and all these words."""
    (line,) = lines
    assert "\n" not in line
    assert line.startswith(start), line
    assert all(word in line for word in words.split()), line


def test_every_shipped_recipe_is_read_and_its_resolved_form_is_the_same_recipe() -> None:
    names = recipe_names()
    assert {"tiny", "quickstart", "own-data", "chat-8b-40gb", *PUBLISHED} <= set(names)
    for name in names:
        recipe = load_recipe(name)
        again = recipe_from(read_yaml(resolved_yaml(recipe), name), name)
        assert again == recipe, name
        assert resolved_yaml(again) == resolved_yaml(recipe), name
        assert re.fullmatch(r"# .*\.", recipe_text(name).splitlines()[0]), name  # `qdora recipes` shows it by itself
    for name in PUBLISHED:
        recipe = load_recipe(name)
        assert recipe.adapter.targets == ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
        assert (recipe.adapter.rank, recipe.adapter.alpha, recipe.adapter.dropout) == (32, 64.0, 0.05)
        train = recipe.train
        assert (train.epochs, train.batch, train.warmup, train.schedule) == (3.0, 16, 100, "linear")
        if name.startswith("commonsense"):
            assert [source.task for source in recipe.data.mix] == list(COMMONSENSE_TASKS)
    assert set(COMMONSENSE_TASKS) == {"boolq", "piqa", "siqa", "hellaswag", "winogrande", "arc_e", "arc_c", "obqa"}
    assert {f"demo/{family}" for family in FAMILIES} == set(DEMO_TASKS)
    assert [source.task for source in load_recipe("quickstart").data.mix] == list(DEMO_TASKS)


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
        ("model:\n  source: [a\nbase: 1\n", "line 3"), ("a: b: c\n", "line 1"), ("a: 1\n---\nb: 2\n", "line 2"),
        ("train:\n  lr: 1\n  lr: 2\n", "line 3 'lr' twice"), ("- a\n- b\n", "got [a, b]"), ("", "got null"),
        ("a: &x {b: 1}\nc: {<<: *x, d: 1, d: 2}\n", "line 2 'd' twice"), ("a: \x07\n", "not YAML"),
        ("a: !!python/object/apply:os.system [ls]\n", "line 1"), ("a: !!bool maybe\n", "not YAML"),
        ("a: !!timestamp x\n", "not YAML"), (f"a: {'9' * 5000}", "not YAML"), ("a: " + "[" * 2000, "not YAML"),
    ],
)  # fmt: skip
def test_yaml_that_cannot_be_read_is_one_line(text: str, words: str) -> None:
    check(lines_of(lambda: read_yaml(text, "r.yaml")), "r.yaml: ", words)


def test_a_recipe_that_cannot_be_read_names_the_nearest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("x: 1")
    (tmp_path / "latin.yaml").write_bytes(b"a: \xff")
    with (tmp_path / "weights.gguf").open("wb") as file:
        file.truncate(2**21)
    for name, end in (("quikstart", "'quickstart'?"), ("mien.yaml", "'mine.yaml'?"), ("no/such/dir.yaml", "."),
                      (".", "."), ("latin.yaml", "."), ("weights.gguf", ".")):  # fmt: skip
        lines = lines_of(partial(load_recipe, name))
        check(lines, f"{name}: ")
        assert lines[0].endswith(end)
    check(lines_of(lambda: recipe_text("quikstart")), "quikstart: ", "'quickstart'?")


@pytest.mark.parametrize(
    "setting, values, words",
    [
        ("adapter.rank", "abc|'16'|0|true|16.0", ""), ("adapter.alpha", "true|.nan|'2'|[1]|0", ""),
        ("adapter.dropout", "1|.nan|-0.1", ""), ("adapter.targets", "[]|q_proj", "all-linear"),
        ("base.double_quant", "1|yes", "boolean"), ("base.block_size", "65", "4096"), ("eval", "3", "got 3"),
        ("base.quant", "nf5", "got 'nf5' 'nf4'?"), ("base.quant", "[nf4]", "got [nf4]"), ("data.mix", "[]", "1"),
        ("train.lr", ".inf|fast|-1e-4", ""), ("train.warmup", "1.0|-1|x", ""), ("train.betas", "[0.9]|0.9", ""),
        ("train.lr_end", "-1e-5", "-1"), ("train.spike", "1", "1"), ("train.seed", f"-1|{2**63}", ""),
        ("train.optimizer", "lion_8bit", "'paged_lion_8bit'?"), ("adapter.kind", "Dora", "'dora'?"),
        ("memory.loss_chunk", "0|true", "'auto'"), ("memory.loss_chunk", "auot", "Did you mean 'auto'?"),
        ("memory.budget", "much", "40GiB 'much'"), ("data.max_length", "1", "2"), ("model.sorce", "x", "'source'?"),
        ("adapter.lr", "1", "unknown 'train.lr'?"), ("adapter.frobnicate", "1", "unknown rank alpha"),
        ("model.source", """7|''|"a\\nb\"""", ""), ("eval.block", "-1", ""), ("adapter.gates", "{mean_rank: 0.5}", ""),
        ("base.prune", "{pattern: unstructered}|{sparsity: 1.0}|{pattern: '2:0'}", ""),
        ("adapter.rank_pattern", "{q_proj: 0}", ""), ("adapter.also_train", "[embed_token]", "'embed_tokens'?"),
        ("interference.examples", "1", "2"), ("data.mix", "[{task: bolq}]|[{source: /x, template: {prompt: a}}]", ""),
    ],
)  # fmt: skip
def test_a_wrong_value_is_named_with_what_is_allowed(setting: str, values: str, words: str) -> None:
    for value in values.split("|"):
        check(faults(changed(f"{setting}={value}")), f"r.yaml: {setting}", words)


@pytest.mark.parametrize(
    "setting, values",
    [
        ("train.warmup", (5, 0, 0.5, 0.0)), ("adapter.dropout", (0.0,)), ("train.seed", (0, 2**63 - 1)),
        ("data.max_length", (2,)), ("adapter.rank", (1,)), ("train.lr_end", (0.0, 2e-4)), ("train.clip", (None,)),
        ("train.checkpoint_every", (None,)), ("train.spike", (1.01,)),
    ],
)  # fmt: skip
def test_the_ends_of_the_ranges_are_allowed(setting: str, values: tuple[Any, ...]) -> None:
    section, key = setting.split(".")
    for value in values:
        found = getattr(getattr(read(f"{setting}={json.dumps(value)}"), section), key)
        assert (found, type(found)) == (value, type(value))


def test_all_faults_come_together_and_null_is_the_default() -> None:
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
    assert read("adapter=null; base={block_size: null, prune: null}; memory={budget: null}") == read()
    check(faults(changed("train=null")), "r.yaml: train: ")


FULL, NONE = "adapter.kind=full; base.quant=none", "adapter.kind=none; train.steps=0"
STREAM, NEVER = "data.mix=[{source: /a, stream: true}]", "eval.at_start=false; eval.at_end=false"
HALF, BEST = "base.prune={method: wanda, sparsity: 0.5}", "eval.every=5; eval.best_by=macro"
MATRICES = "adapter.also_train=[lm_head]; adapter.also_train_rows=all"
GATED, HOST = "adapter.gates={mean_rank: 2}", "base.residency=host"
UNUSED = [  # a recipe, and settings that have no effect in it
    ("", "model.revision=main; base.streamed_blocks=2; adapter.same_scaling=true; adapter.also_train_rows=all; "
         "data.temperature=2.0; data.max_bad_rows=3; data.mix[0].weight=2; data.mix[0].loss_weight=2; "
         "interference.examples=4; data.mix[0].format=text; data.mix[0].path=/x; data.mix[0].revision=a; "
         "train.max_skips=3; eval.block=1; eval.patience=1; eval.best_metric=acc; eval.best_by=macro"),
    ("model.source=/models/x", "model.revision=main"),
    ("model.source=o/m", "model.tokenizer_revision=main"),
    ("model.tokenizer=/t", "model.tokenizer_revision=main"),
    ("base.quant=int8", "base.double_quant=true; base.block_size=64"),
    ("base.quant=none", "base.block_size=128; base.skip=[lm_head]; base.cache=auto"),
    ("base.quant=mxfp4", "base.block_size=128"),
    (HALF, "base.cache=auto; base.prune.damping=0.1"),
    ("base.prune={pattern: '2:4'}", "base.prune.sparsity=0.5; base.prune.group=row"),
    ("base.prune={method: sparsegpt, sparsity: 0.5}", "base.prune.group=row"),
    ("base.prune={method: magnitude, sparsity: 0.5}", "base.prune.calibration={length: 8}"),
    ("adapter.resume_from=/a", "adapter.rank=16; adapter.targets=all-linear; adapter.mask=ignore"),
    (NONE, "adapter.rank=16; adapter.targets=[q]; train.lr_ratio_B=2; data.mix[0].loss_weight=2"),
    ("adapter.kind=magnitude", f"adapter.rank=16; {GATED}; train.lr_ratio_B=2"),
    ("adapter.kind=lora", "train.lr_ratio_magnitude=2"),
    (FULL, "train.lr_ratio_B=2; interference.every=2"),
    (STREAM, "data.validation_fraction=0.1; data.mix[0].limit=5; data.mix[0].revision=main"),
    ("data.mix=[{task: piqa, validation: test}]", "data.validation_fraction=0.1"),
    ("data.mix=[{task: boolq}]", "data.mix[0].stream=true; data.mix[0].columns={a: b}; data.mix[0].chat=true"),
    ("data.mix=[{task: boolq, path: /x}]", "data.mix[0].revision=main"),
    ("data.mix=[{source: /a.jsonl}]",
     "data.mix[0].size=5; data.mix[0].shuffle_window=5; data.mix[0].config=a; data.mix[0].data_files=a; "
     "data.mix[0].path=/x; data.mix[0].split=a"),
    ("data.mix=[{source: /d/*.jsonl}]", "data.mix[0].split=test"),
    ("data.mix=[{source: /x, template: {prompt: a, completion: b}}]", "data.mix[0].format=auto"),
    ("data.mix=[{source: /x, format: sharegpt}]", "data.mix[0].chat=true"),
    ("train.optimizer=paged_lion_8bit; train.schedule=constant", "train.eps=1e-6; train.lr_end=0.0"),
    ("eval.tasks=[]", "eval.limit=3; eval.every=3; eval.method=generate; eval.at_end=true"),
    (NEVER, "eval.limit=3; eval.method=generate; eval.tasks=[demo/howto]"),
    ("memory.checkpointing=false", "memory.offload_activations=true"),
]  # fmt: skip


@pytest.mark.parametrize("changes, settings", UNUSED)
def test_a_setting_without_effect_is_refused(changes: str, settings: str) -> None:
    plain = recipe_file.settings(read(changes))
    assert recipe_from(plain) == read(changes)
    for item in settings.split("; "):
        setting = item.partition("=")[0]
        *steps, key = re.findall(r"\w+", setting)
        section: Any = plain
        for step in steps:
            section = section[int(step)] if step.isdecimal() else section[step]
        assert key not in section
        check(faults(changed(f"{changes}; {item}".removeprefix("; "))), f"r.yaml: {setting}: ", "ignored because")


@pytest.mark.parametrize(
    "changes, words",
    [
        ("train.batch=null", "train.tokens_per_step batch null"), ("train.steps=null", "train.steps epochs"),
        ("train.tokens_per_step=512; train.batch=4", "train.tokens_per_step batch 512"),
        ("train.epochs=1; train.steps=3", "train.steps epochs"), ("train.warmup=11", "train.warmup 10 11"),
        ("train.micro_batch_tokens=511", "train.micro_batch_tokens 512 511"),
        ("train.tokens_per_step=512; train.micro_batch_tokens=1024", "train.micro_batch_tokens 512 1024"),
        ("train.lr_end=3e-4", "train.lr_end 0.0002 0.0003"), ("adapter.kind=full", "adapter.kind base.quant nf4"),
        (f"{FULL}; {HALF}", "adapter.kind base.prune"), ("adapter.kind=none", "train.steps 0 10"),
        ("adapter.init=loftq; base.quant=none", "adapter.init loftq"), ("adapter.mask=keep", "adapter.mask base.prune"),
        ("adapter.gates={}", "adapter.gates.mean_rank parameters"),
        ("adapter.gates={mean_rank: 2, parameters: 9}", "adapter.gates.mean_rank parameters"),
        ("adapter.gates={mean_rank: 16}", "adapter.gates.mean_rank adapter.rank 16"),
        ("adapter.gates={mean_rank: 2, warmup: 600}", "adapter.gates.anneal 10"),
        (f"{GATED}; {BEST}", "eval.best_by adapter.gates"),
        ("base.prune={method: wanda}", "base.prune.sparsity unstructured"),
        ("base.prune={pattern: '3:3'}", "base.prune.pattern 3:3"),
        ("base.prune={method: sparsegpt, sparsity: 0.5, order: quantize_first}", "base.prune.order sparsegpt"),
        (f"{HALF}; base.prune.order=quantize_first; base.quant=none", "base.prune.order none"),
        (f"{HALF}; {STREAM}", "base.prune.calibration.text mix"), (f"{HOST}; base.quant=none", "base.residency host"),
        (f"{HOST}; {HALF}", "base.residency host"),
        (f"{HOST}; memory.checkpointing=false", "memory.checkpointing host"),
        ("data.strategy=weights; data.mix=[{task: boolq, weight: 2}, {task: piqa}]", "data.mix[1].weight null"),
        ("data.strategy=temperature", "data.temperature null"), (f"{STREAM}; data.too_long=error", "data.too_long"),
        (f"{STREAM}; train.epochs=1.5", "train.epochs train.steps 1.5"), ("data.mix=[{}]", "data.mix[0].source task"),
        ("data.mix=[{task: piqa, source: org/set}]", "data.mix[0].source task"),
        ("data.mix=[{source: a/x.jsonl}, {source: b/x.jsonl}]", "data.mix[1].name (x)"),
        ("data.mix=[{source: /a.jsonl, stream: true, max_epochs: 2}]", "data.mix[0].size max_epochs"),
        ("data.mix=[{source: /a.jsonl, stream: true}, {source: /b.txt}]", "data.mix[0].size proportional"),
        ("eval.tasks=[fcts]; data.mix=[{task: demo/howto, name: facts}]", "eval.tasks[0] 'facts'?"),
        ("eval.every=5; eval.best_by=mcro", "eval.best_by 'macro'?"),
        (f"{BEST}; data.mix=[{{task: demo/howto, name: macro}}]", "eval.best_by 'macro'"),
        ("model.trust_remote_code=true", "model.trust_remote_code commit"),
        ("model.trust_remote_code=true; model.source=o/m", "model.trust_remote_code commit"),
        ("model.trust_remote_code=true; model.source=o/m; model.revision=main", "model.trust_remote_code commit"),
        *((f"train.parallel=shard; {more}", "train.parallel shard") for more in (
            FULL, MATRICES, HOST, "adapter.init=loftq", "memory.host_embeddings=true")),
        *((f"memory.host_embeddings=true; {more}", "memory.host_embeddings false") for more in (FULL, MATRICES)),
        ("model.add_tokens=[<a>]", "adapter.also_train embed_tokens"),
        (f"model.add_tokens=[<a>]; {NONE}", "model.add_tokens adapter.kind none"),
        (f"model.add_tokens=[<a>]; {HALF}; adapter.also_train=[embed_tokens]", "model.add_tokens base.prune.method"),
        ("adapter.also_train=[embed_tokens]", "adapter.also_train_rows all"),
        (f"model.dtype=float16; {MATRICES}", "model.dtype float16"),
    ],
)  # fmt: skip
def test_settings_that_contradict_each_other_are_refused(changes: str, words: str) -> None:
    setting, _, others = words.partition(" ")
    check(faults(changed(changes)), f"r.yaml: {setting}: ", others)


@pytest.mark.parametrize(
    "changes",
    [
        f"model.source=o/m; model.revision={'0123456789abcdef' * 2}01234567; model.trust_remote_code=true", FULL, NONE,
        "adapter.same_scaling=true; adapter.experts.rank=4", f"base.quant=none; base.skip=[lm_head]; {HALF}",
        "data.strategy=temperature; data.temperature=2", "data.mix=[{source: /a.jsonl.gz, stream: true}]",
        "data.strategy=weights; data.mix=[{task: boolq, weight: 2}, {task: piqa, weight: 0.5}]", "eval.tasks=[]",
        "data.mix=[{source: a/x.jsonl}, {source: b/x.jsonl, name: b}]", "train.lr_ratio_B=16; train.lr_end=2e-4",
        "train.lr_ratio_magnitude=null; adapter.kind=lora", "adapter.resume_from=/a; adapter.dropout=0.1",
        "eval.tasks=[facts]; data.mix=[{task: demo/howto, name: facts}]", "train.micro_batch_tokens=512",
        "train.warmup=10",
    ],
)  # fmt: skip
def test_what_looks_odd_and_is_right(changes: str) -> None:
    assert recipe_from(recipe_file.settings(read(changes))) == read(changes)


def test_defaults_that_depend_on_others() -> None:
    asked = (STREAM, f"{STREAM}; data.too_long=drop", "")
    assert [read(each).data.too_long for each in asked] == ["truncate", "drop", "error"]
    gates = read("adapter.gates={mean_rank: 2, warmup: 7, anneal: 0.25}").adapter.gates
    assert gates is not None
    assert (gates.phases(200), gates.length_fault(12)) == ((7, 50), None)
    assert "at most the 8 steps of the run, got 7 + 2." in (gates.length_fault(8) or "")
    halves = gates.model_copy(update={"warmup": 0.5, "anneal": 0.5})
    assert [halves.phases(num_steps) for num_steps in (7, 3, 1)] == [(4, 3), (2, 1), (0, 1)]


@pytest.mark.parametrize(
    "before, overrides, after",
    [
        ("", "train.lr=1e-4", "{train: {steps: 10, batch: 4, lr: 0.0001}}"),
        ("", "data.mix[0].limit=5", "{data: {mix: [{task: demo/howto, limit: 5}]}}"),
        ("", "train.steps=7; train.steps=8; train.clip=null", "{train: {steps: 8, batch: 4, clip: null}}"),
        ("eval.limit=3", "eval.limit=", "{}"), ("base.prune=null", "base.prune.sparsity=0.5",
                                                "{base: {prune: {sparsity: 0.5}}}"),
        ("adapter.rank=4", "adapter.kind=none; adapter.rank=null; train.steps=0",
         "{adapter: {kind: none}, train: {steps: 0, batch: 4}}"),
        ("", "train.epochs=2; train.tokens_per_step=512", "{train: {epochs: 2, tokens_per_step: 512}}"),
        ("train.epochs=2", "train.steps=null", "{train: {epochs: 2, batch: 4}}"),
        ("data.mix=[{source: o/n, data_files: {train: a, test: [b, d]}}]", "data.mix[0].data_files.test[1]=c",
         "{data: {mix: [{source: o/n, data_files: {train: a, test: [b, c]}}]}}"),
    ],
)  # fmt: skip
def test_overrides(before: str, overrides: str, after: str) -> None:
    document = changed(before)
    recipe = recipe_from(with_overrides(document, overrides.split("; "))[0])
    assert document == changed(before)
    assert recipe == recipe_from(yaml.safe_load(SMALL) | yaml.safe_load(after))
    again = override(load_recipe("tiny"), ["train.tokens_per_step=512", "adapter.rank=null"])
    assert (again.train.batch, again.train.tokens_per_step, again.adapter.rank) == (None, 512, 16)


@pytest.mark.parametrize(
    "items, words",
    [
        ("adapter.rnak=3", "-s: adapter.rnak unknown 'rank'?"), ("adapter.rank=0", "-s: adapter.rank 0"),
        ("data.mix[9].limit=3", "-s data.mix[9].limit"), ("data.mix.0.limit=5", "-s data.mix.0.limit"),
        ("train.steps.x=1", "-s train.steps.x"), ("train.lr=[", "-s train.lr=[ YAML"), ("x", "-s key=value"),
        ("=3", "-s key=value"), ("train=5", "-s: train 5"), ("train=null", "-s: train"),
        ("train.epochs=1; train.steps=3", "-s: train.steps epochs"), ("data.mix=[a.jsonl]", "-s: data.mix[0] a.jsonl"),
        ("data={mix: [{task: boolq, limit: 0}]}", "-s: data.mix[0].limit 0"),
    ],
)  # fmt: skip
def test_a_wrong_override_is_named(items: str, words: str) -> None:
    check(faults(changed(), *items.split("; ")), "-s", words)
    check(faults(changed("train.lr_ratio_B=-1"), "train.lr=1e-3"), "r.yaml: train.lr_ratio_B: ")


def test_paths_start_at_the_file_and_in_overrides_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    document = changed(model={"source": "m.gguf"}, base={"cache": "bases"}, data={"mix": mix, "cache": "tokens"})
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
    missing = {
        "model.source": folder / "m.gguf", "adapter.resume_from": here / "run" / "adapter",
        "data.mix[0].source": folder / "chat.jsonl", "data.mix[0].validation": tmp_path / "val.jsonl",
        "data.mix[5].validation": parts.validation,
    }  # fmt: skip
    found = missing_files(recipe, "r.yaml")
    assert found == [f"r.yaml: {key}: no such file or directory, got {path}." for key, path in missing.items()]
    (tmp_path / "chat.jsonl").touch()
    for path, there in (("chta.jsonl", "chat.jsonl"), ("recipse/x.jsonl", "recipes"), ("chat.jsonl*x", "")):
        (tmp_path / "r.yaml").write_text(yaml.safe_dump(changed(data={"mix": [{"source": path}]})))
        [line] = missing_files(load_recipe(tmp_path / "r.yaml"), "r.yaml")
        assert line.endswith(f". Did you mean '{there}'?" if there else f"got {tmp_path / path}.")


def test_what_is_a_path() -> None:
    paths = ("/x", "./x", "../x", "~/x", ".", "x.jsonl", "a/b.gguf", "a/b/c", "with blank")
    names = ("gpt2", "org/name", "Qwen/Qwen2.5-7B", "meta-llama/Llama-2-7b-hf")
    assert [each for each in (*paths, *names) if is_path(each)] == [*paths]


def test_access_tokens_are_refused_and_never_repeated() -> None:
    for changes in (f"model.source={TOKEN}", f"model.hf_token={TOKEN}", f"model.{TOKEN}=1",
                    f"data.mix=[{{source: x.jsonl, name: a {TOKEN} b}}]", f"adapter.targets=[q_proj, {TOKEN}]",
                    f"adapter.rank_pattern={{{TOKEN}: 3}}"):  # fmt: skip
        (line,) = faults(changed(changes))
        assert "holds an access token" in line
        assert TOKEN[:12] not in line
    items = (f"adapter.rank_pattern.{TOKEN}=3", f"{TOKEN}=1", TOKEN, f"model.x=[{TOKEN}")
    calls: list[Callable[[str], Any]] = [load_recipe, recipe_text, partial(read_yaml, where="r.yaml")]
    refused = [faults(changed(), item) for item in items]
    refused += [lines_of(partial(call, f"{TOKEN}: 1\n{TOKEN}: 2")) for call in calls]
    assert all(refused)
    assert TOKEN not in str(refused)


def test_recipes_of_old_runs_are_read_where_what_left_changed_nothing(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    interference = "data.mix=[{task: demo/howto}, {task: demo/cause}]; interference={every: 20, examples: 16}"
    for changes in (interference, "train.compile=false", "base={residency: disk, streamed_blocks: 1}"):
        file.write_text(yaml.safe_dump(changed(changes)))
        recipe = load_recipe(file)
        assert (recipe.train.steps, recipe.base.residency, recipe.base.streamed_blocks) == (10, "device", None)
    for changes in ("interference={gradients: pcgrad}", "interference={loss_weights: progress}", "train.compile=true"):
        file.write_text(yaml.safe_dump(changed(changes)))
        with pytest.raises(UserError, match="unknown key"):
            load_recipe(file)


def test_every_field_is_described_in_the_schema() -> None:
    schema = json.loads(json.dumps(json_schema()))
    sections = {"Recipe": schema, **schema["$defs"]}
    fields = [(name, field) for name, each in sections.items() for field in each["properties"].items()]
    assert len(fields) > 60
    for name, (field, content) in fields:
        assert content.get("description") or "$ref" in content, f"{name}.{field}"
    assert schema["additionalProperties"] is False


names_ = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1, max_size=12) | (
    st.sampled_from(["1e4", "1e-4", "0100", "2:4", "off", "null", "1.5", "~", "2024-05-01", "a\u2028b", "=", "x: y"])
)
positive = st.floats(min_value=1e-300, max_value=1e300, allow_nan=False)
whole = st.integers(min_value=1, max_value=10**6)
share = st.floats(min_value=0, max_value=1, exclude_max=True)
VALUES: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "base": {"quant": st.sampled_from(["fp4", "nf4"]), "skip": st.lists(names_, max_size=3)},
    "adapter": {"alpha": positive, "rank_pattern": st.dictionaries(names_, whole, max_size=3)},
    "train": {
        "steps": st.just(10), "batch": whole, "lr": positive, "warmup": st.integers(0, 10) | share,
        "betas": st.tuples(share, share).map(list), "clip": st.none() | positive, "checkpoint_every": whole | st.none(),
    },
    "memory": {"budget": st.sampled_from(["auto", "40GiB"]), "loss_chunk": st.just("auto") | whole},
    "data": {
        "mix": st.lists(names_, min_size=1, max_size=3, unique=True).map(
            lambda names: [{"source": f"/{name}", "name": name, "columns": {name: name}} for name in names]
        )
    },
}  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(st.fixed_dictionaries({}, optional={name: st.fixed_dictionaries(each) for name, each in VALUES.items()}))
def test_a_resolved_recipe_is_read_back_exactly(sections: dict[str, Any]) -> None:
    document = changed(**sections)
    assume(not faults(document))
    recipe = recipe_from(document)
    text = resolved_yaml(recipe)
    again = recipe_from(read_yaml(text, "resolved"), "resolved")
    assert again == recipe == override(recipe, [])
    assert resolved_yaml(again) == text
    for section, values in sections.items():  # what was given is what is held, to the last bit
        for key, value in values.items():
            if not isinstance(value, dict | list):
                found = getattr(getattr(again, section), key)
                assert (found, type(found)) == (value, type(value))


json_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=100, deadline=None)
@example("adapter", {"rank_pattern": {"a\nb": 0}, "\n": 1}, None, "")
@given(
    st.sampled_from(sorted(Recipe.model_fields)),
    json_like,
    json_like,
    st.text(st.characters(codec="utf-8"), max_size=40) | st.text(":-[]{}&*!|>'\"%@#,? \nab1", max_size=40),
)
def test_anything_is_accepted_or_refused_in_single_lines(name: str, value: Any, inner: Any, text: str) -> None:
    keys = getattr(Recipe.model_fields[name].annotation, "model_fields", ["x"])
    lines = faults(changed(**{name: value})) + faults(changed(**{name: dict.fromkeys(keys, inner)}))
    lines += lines_of(lambda: read_yaml(text, "r.yaml"))
    items = lines_of(lambda: with_overrides(changed(), [text, f"train.lr={text}"]))
    assert all(line.startswith("r.yaml: ") for line in lines)
    assert all(line.startswith("-s ") for line in items)
    assert "\n" not in "".join([*lines, *items])


def test_an_override_drops_what_it_disables(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "own.yaml"
    file.write_text(yaml.safe_dump(changed("base={block_size: 128, double_quant: false}")))
    with caplog.at_level(logging.INFO, "qdora"):
        recipe = load_recipe(file, ["base.quant=none"])
    assert (recipe.base.quant, recipe.base.model_fields_set) == ("none", {"quant"})
    dropped = [
        f"base.{key} is dropped from the recipe: base.quant none" for key in ("block_size 128", "double_quant false")
    ]
    assert [text for text, words in zip(caplog.messages, dropped, strict=True) if not text.startswith(words)] == []
    assert load_recipe(file).base.block_size == 128
    both = ["base.quant=none", "base.block_size=64"]
    assert any("-s: base.block_size: would be ignored" in line for line in lines_of(lambda: load_recipe(file, both)))
    file.write_text(yaml.safe_dump(changed("base={block_size: 128, quant: none}")))
    assert len(lines_of(lambda: load_recipe(file, ["train.lr=1e-3"]))) == 1
