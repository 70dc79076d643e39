"""Recipes: what is read, what is refused and by which words, and that the resolved recipe is the recipe."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import partial, reduce
from typing import Any

import pytest
import yaml

from qdora.data.demo import FAMILIES
from qdora.errors import UserError
from qdora.recipe import recipe_file
from qdora.recipe.data_settings import COMMONSENSE_TASKS, DEMO_TASKS, is_path
from qdora.recipe.recipe_file import (
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
    return with_overrides(document, changes.split("; ") if changes else []) | sections


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
    return lines_of(lambda: recipe_from(with_overrides(data, overrides), "r.yaml", overrides))


def check(lines: list[str], start: str, words: str = "") -> None:
    """One line with this start and all these words."""
    (line,) = lines
    assert "\n" not in line
    assert line.startswith(start), line
    assert all(word in line for word in words.split()), line


def test_every_shipped_recipe_is_read_and_its_resolved_form_is_the_same_recipe():
    for name in recipe_names():
        recipe = load_recipe(name)
        again = recipe_from(read_yaml(resolved_yaml(recipe), name), name)
        assert again == recipe, name
        assert resolved_yaml(again) == resolved_yaml(recipe), name
        assert re.fullmatch(r"# .*\.", recipe_text(name).splitlines()[0]), name  # `qdora recipes` shows it by itself
    for name in PUBLISHED:
        recipe = load_recipe(name)
        adapter, train = recipe.adapter, recipe.train
        assert adapter.targets == ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
        assert (adapter.rank, adapter.alpha, adapter.dropout) == (32, 64.0, 0.05)
        assert (train.epochs, train.batch, train.warmup, train.schedule) == (3.0, 16, 100, "linear")
        if name.startswith("commonsense"):
            assert [source.task for source in recipe.data.mix] == list(COMMONSENSE_TASKS)
    assert set(COMMONSENSE_TASKS) == {"boolq", "piqa", "siqa", "hellaswag", "winogrande", "arc_e", "arc_c", "obqa"}
    assert {f"demo/{family}" for family in FAMILIES} == set(DEMO_TASKS)
    assert [source.task for source in load_recipe("quickstart").data.mix] == list(DEMO_TASKS)


@pytest.mark.parametrize(
    "text, value",
    [
        ("1e-4", 1e-4), ("-1.5e+3", -1500.0), (".5", 0.5), ("1.", 1.0), ("-7", -7), (".inf", math.inf), ("'1'", "1"),
        ("2:4", "2:4"), ("0100", "0100"), ("1_000", "1_000"), ("on", "on"), ("No", "No"), ("true", True), ("~", None),
        ("", None), ("2024-05-01", "2024-05-01"), ("1e", "1e"), ("{<<: {b: 1, c: 2}, b: 3}", {"b": 3, "c": 2}),
    ],
)  # fmt: skip
def test_values_are_those_of_yaml_1_2(text, value):
    found = read_yaml(f"a: {text}", "r.yaml")["a"]
    assert (found, type(found)) == (value, type(value))


def test_yaml_that_cannot_be_read_is_one_line():
    for text, words in (
        ("model:\n  source: [a\nbase: 1\n", "line 3"), ("a: b: c\n", "line 1"), ("a: 1\n---\nb: 2\n", "line 2"),
        ("train:\n  lr: 1\n  lr: 2\n", "line 3 'lr' twice"), ("- a\n- b\n", "got [a, b]"), ("", "got null"),
        ("a: !!python/object/apply:os.system [ls]\n", "line 1"),
    ):  # fmt: skip
        check(lines_of(partial(read_yaml, text, "r.yaml")), "r.yaml: ", words)


def test_a_recipe_that_cannot_be_read_names_the_nearest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"a: \xff")
    with (tmp_path / "weights.gguf").open("wb") as file:
        file.truncate(2**21)
    for name, words in (("quikstart", "'quickstart'?"), (".", "directory"),
                        ("latin.yaml", "decode"), ("weights.gguf", "YAML")):  # fmt: skip
        check(lines_of(partial(load_recipe, name)), f"{name}: ", words)


@pytest.mark.parametrize(
    "setting, values, words",
    [
        ("adapter.rank", "'16'|0|true|16.0", ""), ("adapter.alpha", "true|.nan|'2'|0", ""), ("eval", "3", "got 3"),
        ("adapter.dropout", "1|.nan|-0.1", ""), ("adapter.targets", "[]|q_proj", "all-linear"),
        ("base.double_quant", "1", "boolean"), ("base.block_size", "65", "4096"), ("data.mix", "[]", "1"),
        ("base.quant", "nf5", "got 'nf5' 'nf4'"), ("train.lr", ".inf|-1e-4", ""), ("train.warmup", "1.0|-1|x", ""),
        ("train.lr_end", "-1e-5", "-1"), ("train.spike", "1", "1"), ("train.seed", f"-1|{2**63}", ""),
        ("memory.loss_chunk", "0|true", "'auto'"), ("memory.loss_chunk", "auot", "'auto'"),
        ("memory.budget", "much", "40GiB 'much'"), ("data.max_length", "1", "2"), ("model.sorce", "x", "'source'?"),
        ("adapter.lr", "1", "unknown"), ("adapter.frobnicate", "1", "unknown"),
        ("model.source", """7|''|"a\\nb\"""", ""), ("eval.block", "-1", ""), ("adapter.gates", "{mean_rank: 0.5}", ""),
        ("base.prune", "{pattern: unstructered}|{sparsity: 1.0}|{pattern: '2:0'}", ""),
        ("adapter.rank_pattern", """{q_proj: 0}|{"a\\nb": 0}""", ""), ("interference.examples", "1", "2"),
        ("data.mix", "[{task: bolq}]|[{source: /x, template: {prompt: a}}]", ""),
    ],
)  # fmt: skip
def test_a_wrong_value_is_named_with_what_is_allowed(setting, values, words):
    for value in values.split("|"):
        check(faults(changed(f"{setting}={value}")), f"r.yaml: {setting}", words)


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
    ("base.quant=int8", "base.method=gptq"), ("base.quant=mxfp4", "base.method=gptq"),
    ("", "base.clip=true; base.calibration={length: 8}"),
    (f"{HALF}; base.method=gptq", "base.calibration={length: 8}; base.cache=auto"),
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
def test_a_setting_without_effect_is_refused(changes, settings):
    plain = recipe_file.settings(read(changes))
    assert recipe_from(plain) == read(changes)
    for item in settings.split("; "):
        setting = item.partition("=")[0]
        *steps, key = re.findall(r"\w+", setting)
        section = reduce(lambda section, step: section[int(step) if step.isdecimal() else step], steps, plain)
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
        ("adapter.kind=full", "adapter.kind base.quant auto"),
        (f"{FULL}; {HALF}", "adapter.mask keep base.prune"), ("adapter.kind=none", "train.steps 0 10"),
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
        (f"{HALF}; base.method=gptq; base.prune.order=quantize_first", "base.prune.order gptq"),
        (f"{HOST}; base.quant=none", "base.residency host"),
        (f"{HOST}; {HALF}", "base.residency host"),
        (f"{HOST}; memory.checkpointing=false", "memory.checkpointing host"),
        ("data.strategy=weights; data.mix=[{task: boolq, weight: 2}, {task: piqa}]", "data.mix[1].weight null"),
        ("data.strategy=weights; data.mix=[{task: boolq, weight: 0}]", "data.mix[0].weight above 0"),
        ("data.strategy=temperature", "data.temperature null"), (f"{STREAM}; data.too_long=error", "data.too_long"),
        (f"{STREAM}; train.epochs=1.5", "train.epochs train.steps 1.5"), ("data.mix=[{}]", "data.mix[0].source task"),
        ("data.mix=[{task: piqa, source: org/set}]", "data.mix[0].source task"),
        ("data.mix=[{source: a/x.jsonl}, {source: b/x.jsonl}]", "data.mix[1].name (x)"),
        ("model.trust_remote_code=true", "model.trust_remote_code commit"),
        ("model.trust_remote_code=true; model.source=o/m; model.revision=main", "model.trust_remote_code commit"),
        *((f"train.parallel=shard; {more}", "train.parallel shard") for more in (
            FULL, MATRICES, HOST, "adapter.init=loftq")),
        ("model.add_tokens=[<a>]", "adapter.also_train embed_tokens"),
        (f"model.add_tokens=[<a>]; {NONE}", "model.add_tokens adapter.kind none"),
        (f"model.add_tokens=[<a>]; {HALF}; adapter.also_train=[embed_tokens]", "model.add_tokens base.prune.method"),
        ("adapter.also_train=[embed_tokens]", "adapter.also_train_rows all"),
        (f"model.dtype=float16; {MATRICES}", "model.dtype float16"),
    ],
)  # fmt: skip
def test_settings_that_contradict_each_other_are_refused(changes, words):
    setting, _, others = words.partition(" ")
    check(faults(changed(changes)), f"r.yaml: {setting}: ", others)


@pytest.mark.parametrize(
    "changes",
    [
        f"model.source=o/m; model.revision={'0123456789abcdef' * 2}01234567; model.trust_remote_code=true", FULL, NONE,
        "adapter.same_scaling=true; adapter.experts.rank=4", f"base.quant=none; base.skip=[lm_head]; {HALF}",
        "data.mix=[{source: a/x.jsonl}, {source: b/x.jsonl, name: b}]", "adapter.resume_from=/a; adapter.dropout=0.1",
        "train.micro_batch_tokens=512; train.warmup=10; train.lr_end=2e-4",
        "train.lr_ratio_magnitude=null; adapter.kind=lora",
        "eval.tasks=[facts]; data.mix=[{task: demo/howto, name: facts}]",
        "train.warmup=0; adapter.dropout=0.0; train.seed=0; data.max_length=2; adapter.rank=1; train.lr_end=0.0",
        f"train.warmup=0.5; train.seed={2**63 - 1}; train.clip=null; train.checkpoint_every=null; train.spike=1.01",
    ],
)  # fmt: skip
def test_what_looks_odd_or_is_the_end_of_a_range_is_right(changes):
    assert recipe_from(recipe_file.settings(read(changes))) == read(changes)


def test_defaults_that_depend_on_others():
    asked = (STREAM, f"{STREAM}; data.too_long=drop", "")
    assert [read(each).data.too_long for each in asked] == ["truncate", "drop", "error"]
    gates = read("adapter.gates={mean_rank: 2, warmup: 7, anneal: 0.25}").adapter.gates
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
def test_overrides(before, overrides, after):
    document = changed(before)
    recipe = recipe_from(with_overrides(document, overrides.split("; ")))
    assert document == changed(before)
    assert recipe == recipe_from(yaml.safe_load(SMALL) | yaml.safe_load(after))
    assert read("adapter=null; base={block_size: null, prune: null}; memory={budget: null}") == read()
    again = override(load_recipe("tiny"), ["train.tokens_per_step=512", "adapter.rank=null"])
    assert (again.train.batch, again.train.tokens_per_step, again.adapter.rank) == (None, 512, 16)


def test_what_an_override_disables_is_dropped_with_a_line(tmp_path, caplog):
    file = tmp_path / "r.yaml"
    file.write_text(SMALL[:-1] + ", base: {block_size: 128}}")
    caplog.set_level("INFO", "qdora")
    assert load_recipe(file, ["base.quant=none"]).base.quant == "none"
    [line] = caplog.messages
    check([line], "base.block_size 128 is dropped")


@pytest.mark.parametrize(
    "items, words",
    [
        ("adapter.rnak=3", "-s: adapter.rnak unknown 'rank'?"), ("data.mix[9].limit=3", "-s data.mix[9].limit"),
        ("data.mix.0.limit=5", "-s data.mix.0.limit"), ("train.steps.x=1", "-s train.steps.x"), ("x", "-s key=value"),
        ("train.lr=[", "-s train.lr=[ YAML"), ("=3", "-s key=value"), ("train=null", "-s: train"),
        ("train.epochs=1; train.steps=3", "-s: train.steps epochs"),
        ("data={mix: [{task: boolq, limit: 0}]}", "-s: data.mix[0].limit 0"),
    ],
)  # fmt: skip
def test_a_wrong_override_is_named(items, words):
    check(faults(changed(), *items.split("; ")), "-s", words)
    check(faults(changed("train.lr_ratio_B=-1"), "train.lr=1e-3"), "r.yaml: train.lr_ratio_B: ")
    assert len(faults(changed("model.sorce=x; eval.limit=0; lr=1e-4; trackers=[wandbb]"))) == 4  # all together


def test_paths_start_at_the_file_and_in_overrides_here(tmp_path, monkeypatch):
    folder, here = tmp_path / "recipes", tmp_path / "here"
    (folder / "org/local").mkdir(parents=True)
    here.mkdir()
    monkeypatch.chdir(here)
    mix = [  # a source, and what becomes of its two paths
        ({"source": "./chat.jsonl", "validation": "../val.jsonl"}, (folder / "chat.jsonl", tmp_path / "val.jsonl")),
        ({"source": "org/local"}, (folder / "org/local", None)),
        ({"source": "org/on-the-hub", "validation": "test"}, ("org/on-the-hub", "test")),
        ({"source": "org/cut", "validation": "train[95%:]"}, ("org/cut", "train[95%:]")),
        ({"source": "org/parts", "validation": "data/val/part"}, ("org/parts", folder / "data/val/part")),
    ]
    data = {"mix": [*(source for source, _ in mix), {"task": "boolq", "path": "boolq"}], "cache": "tokens"}
    document = changed(model={"source": "m.gguf"}, base={"cache": "bases"}, data=data)
    (folder / "r.yaml").write_text(yaml.safe_dump(document))
    recipe = load_recipe(folder / "r.yaml", ["adapter.resume_from=run/adapter"])
    assert recipe.model.source == str(folder / "m.gguf")
    assert (recipe.base.cache, recipe.data.cache) == (str(folder / "bases"), str(folder / "tokens"))
    plain = load_recipe(folder / "r.yaml", ["base.cache=auto", "data.cache=off"])
    assert (plain.base.cache, plain.data.cache) == ("auto", "off")
    assert recipe.adapter.resume_from == str(here / "run/adapter")
    *sources, task = recipe.data.mix
    expected = [(str(source), validation and str(validation)) for _, (source, validation) in mix]
    assert [(source.source, source.validation) for source in sources] == expected
    assert task.path == str(folder / "boolq")
    assert [source.label for source in recipe.data.mix] == ["chat", "local", "on-the-hub", "cut", "parts", "boolq"]
    # the resolved recipe means the same from anywhere
    (tmp_path / "resolved.yaml").write_text(resolved_yaml(recipe))
    monkeypatch.chdir(tmp_path)
    assert load_recipe("resolved.yaml") == recipe
    missing = ("model.source", "adapter.resume_from", "data.mix[0].source", "data.mix[0].validation",
               "data.mix[4].validation", "data.mix[5].path")  # fmt: skip
    assert [line.split(": ")[1] for line in missing_files(recipe, "r.yaml")] == list(missing)


def test_what_is_a_path():
    paths = ("/x", "./x", "../x", "~/x", ".", "x.jsonl", "a/b.gguf", "a/b/c", "with blank")
    names = ("gpt2", "org/name", "Qwen/Qwen2.5-7B", "meta-llama/Llama-2-7b-hf")
    assert [each for each in (*paths, *names) if is_path(each)] == [*paths]


def test_access_tokens_are_refused_and_never_repeated():
    for changes in (f"model.source={TOKEN}", f"model.{TOKEN}=1", f"adapter.targets=[q_proj, a {TOKEN} b]"):
        (line,) = faults(changed(changes))
        assert "holds an access token" in line
        assert TOKEN[:12] not in line
    calls: list[Callable[[str], Any]] = [load_recipe, partial(read_yaml, where="r.yaml")]
    refused = [faults(changed(), item) for item in (f"{TOKEN}=1", TOKEN, f"model.x=[{TOKEN}")]
    refused += [lines_of(partial(call, f"{TOKEN}: 1\n{TOKEN}: 2")) for call in calls]
    assert all(refused)
    assert TOKEN not in str(refused)


def test_every_field_is_described_in_the_schema():
    schema = Recipe.model_json_schema()
    fields = [field for each in (schema, *schema["$defs"].values()) for field in each["properties"].items()]
    assert len(fields) > 60
    assert not [name for name, content in fields if not (content.get("description") or "$ref" in content)]
    assert schema["additionalProperties"] is False


def test_a_resolved_recipe_is_read_back_exactly():
    """To the last bit of a float, and names that YAML 1.1 or 1.2 reads as something else."""
    names = ["1e4", "1e-4", "0100", "2:4", "off", "null", "1.5", "~", "2024-05-01", "a\u2028b", "=", "x: y", "#", "- é"]
    mix = [{"source": f"/{name}", "name": name, "columns": {name: name}} for name in names]
    adapter = {"alpha": 0.1 + 0.2, "rank_pattern": dict.fromkeys(names, 3)}
    train = {"steps": 10, "batch": 10**6, "lr": 1e-300, "lr_end": 0.0, "betas": [0.9, 1 - 2**-53], "clip": 1e300}
    document = changed(base={"skip": names}, adapter=adapter, train=train, data={"mix": mix})
    recipe = recipe_from(document)
    text = resolved_yaml(recipe)
    again = recipe_from(read_yaml(text, "resolved"), "resolved")
    assert again == recipe == override(recipe, [])
    assert resolved_yaml(again) == text
    for section in ("base", "adapter", "train"):
        for key, value in document[section].items():
            found = getattr(getattr(again, section), key)
            found = list(found) if isinstance(found, tuple) else found
            assert (found, type(found)) == (value, type(value))
