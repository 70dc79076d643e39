"""Recipes: what is accepted, what each fault says, and that the resolved recipe is the recipe."""

from __future__ import annotations

import glob
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qdora.data.demo import FAMILIES
from qdora.data.source_files import files_of
from qdora.errors import UserError, nearest_path
from qdora.recipe.data_settings import COMMONSENSE_TASKS, DEMO_TASKS, TASKS, is_path
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
from qdora.recipe.section import in_yaml
from qdora.recipe.settings import Recipe
from qdora.study.grid import study_from

TOKEN = "hf_" + "a1B2" * 8


def minimal(**sections: Any) -> dict[str, Any]:
    """The smallest recipe, with some sections in place of its own."""
    small = {
        "model": {"source": "builtin"},
        "data": {"mix": [{"task": "demo/howto"}]},
        "train": {"steps": 10, "batch": 4},
    }
    return {**small, **sections}


STREAMED = minimal(data={"mix": [{"source": "/a", "stream": True, "size": 9}], "too_long": "drop"})


def faults(data: Any, *overrides: str) -> list[str]:
    """The lines that a recipe is refused with; [] where it is accepted."""
    try:
        recipe_from(apply_overrides(data, overrides) if overrides else data, "r.yaml", overrides)
    except UserError as error:
        return list(error.faults)
    return []


def section(name: str, **values: Any) -> dict[str, Any]:
    """A minimal recipe with some values set in one of its sections."""
    data = minimal()
    return {**data, name: {**data.get(name, {}), **values}}


# --- shipped recipes


def test_every_shipped_recipe_is_read_and_its_resolved_form_is_the_same_recipe() -> None:
    names = recipe_names()
    sized = ["chat-8b-40gb", *(f"commonsense-{size}-40gb" for size in ("13b", "7b", "8b"))]
    large = ["gpt-oss-20b-24gb", "llama-405b-8x80gb", "llama-70b-2x24gb", "llama-70b-40gb", "llama-8b-8gb"]
    qwen = ["qwen-32b-24gb", "qwen3-30b-a3b-24gb", "qwen3-30b-a3b-8gb"]
    assert names == [*sized, *large, "own-data", "paper-dora-llama", "quickstart", *qwen, "tiny"]
    for name in names:
        recipe = load_recipe(name)
        again = recipe_from(read_yaml(resolved_yaml(recipe), name), name)
        assert again == recipe, name
        assert resolved_yaml(again) == resolved_yaml(recipe), name
        assert resolved_yaml(recipe).startswith("model:\n  source: "), name
        headline = recipe_text(name).splitlines()[0]
        assert headline.startswith("# "), name
        assert headline.endswith("."), name  # `qdora recipes` shows it by itself


def test_paper_recipes_hold_the_published_settings() -> None:
    commonsense = ("commonsense-7b-40gb", "commonsense-8b-40gb", "commonsense-13b-40gb")
    for name in (*commonsense, "paper-dora-llama"):
        recipe = load_recipe(name)
        assert recipe.adapter.targets == ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
        assert (recipe.adapter.rank, recipe.adapter.alpha, recipe.adapter.dropout) == (32, 64.0, 0.05)
        assert (recipe.train.epochs, recipe.train.batch, recipe.train.warmup) == (3.0, 16, 100)
        assert recipe.train.schedule == "linear"
    for name in commonsense:
        assert [source.task for source in load_recipe(name).data.mix] == list(COMMONSENSE_TASKS)


def test_the_chat_recipe_learns_assistant_turns_and_validates_on_a_split_of_its_own() -> None:
    recipe = load_recipe("chat-8b-40gb")
    (source,) = recipe.data.mix
    assert source.format == "messages"
    assert source.validation not in (None, source.split)
    assert recipe.data.loss_on == "answer"


def test_demo_tasks_are_the_families_that_ship() -> None:
    assert {f"demo/{family}" for family in FAMILIES} == set(DEMO_TASKS)
    assert [source.task for source in load_recipe("quickstart").data.mix] == list(DEMO_TASKS)


def test_defaults_without_a_choice_of_mine() -> None:
    recipe = recipe_from(minimal())
    assert recipe.base.quant == "nf4"
    assert recipe.base.block_size == 64
    assert recipe.adapter.kind == "dora"
    assert recipe.train.clip == 1.0
    assert recipe.trackers == ()
    with pytest.raises(Exception, match="frozen"):
        recipe.train.lr = 1.0  # type: ignore[misc]


# --- types of single fields


@pytest.mark.parametrize(
    "text, value",
    [("1e-4", 1e-4), ("0.0001", 1e-4), ("1.0e-4", 1e-4), ("1", 1.0), ("'1e-4'", 1e-4), ("2E-5", 2e-5)],
)
def test_numbers_as_people_write_them(text: str, value: float) -> None:
    data = read_yaml(f"lr: {text}", "r.yaml")
    lr = recipe_from(section("train", **data)).train.lr
    assert lr == value
    assert type(lr) is float


@pytest.mark.parametrize(
    "where, key, value, allowed",
    [
        ("adapter", "rank", "abc", "a whole number, 1 or more"),
        ("adapter", "rank", "16", "a whole number, 1 or more"),
        ("adapter", "rank", 0, "a whole number, 1 or more"),
        ("adapter", "rank", True, "a whole number, 1 or more"),
        ("adapter", "rank", 16.0, "a whole number, 1 or more"),
        ("adapter", "rank", None, "a whole number, 1 or more"),
        ("adapter", "alpha", True, "a finite number above 0"),
        ("adapter", "alpha", math.nan, "a finite number above 0"),
        ("adapter", "alpha", [1], "a finite number above 0"),
        ("adapter", "dropout", 1, "a number, at least 0 and below 1"),
        ("adapter", "dropout", "nan", "a number, at least 0 and below 1"),
        ("adapter", "targets", [], "all-linear, or a list of layer names"),
        ("adapter", "targets", "q_proj", "all-linear, or a list of layer names"),
        ("adapter", "targets", [1], "all-linear, or a list of layer names"),
        ("base", "double_quant", 1, "true or false"),
        ("base", "double_quant", "yes", "true or false"),
        ("base", "block_size", 65, "16, 32, 64, 128, 256, 512, 1024, 2048 or 4096"),
        ("base", "quant", "nf5", "nf4, fp4, int8, mxfp4, int4, nf3, nf2, none. Did you mean 'nf4'?"),
        ("base", "quant", ["nf4"], "nf4, fp4, int8, mxfp4, int4, nf3, nf2, none."),
        ("train", "lr", math.inf, "a finite number above 0"),
        ("train", "lr", "fast", "a finite number above 0"),
        ("train", "lr", -1e-4, "a finite number above 0"),
        ("train", "warmup", 1.0, "a whole number of steps, or a share of the run below 1"),
        ("train", "warmup", -1, "a whole number of steps, or a share of the run below 1"),
        ("train", "betas", [0.9], "two numbers, at least 0 and below 1"),
        ("train", "betas", 0.9, "two numbers, at least 0 and below 1"),
        ("train", "lr_ratio_B", 0, "a finite number above 0"),
        ("train", "lr_ratio_magnitude", "x", "a finite number above 0"),
        ("train", "lr_end", -1e-5, "a finite number, 0 or more"),
        ("adapter", "kind", "Dora", "Did you mean 'dora'?"),
        ("train", "optimizer", "lion_8bit", "Did you mean 'paged_lion_8bit'?"),
        ("train", "betas", [0.9, 1.0], "two numbers, at least 0 and below 1"),
        ("train", "seed", -1, "a whole number from 0 to 2^63 - 1"),
        ("train", "seed", 2**63, "a whole number from 0 to 2^63 - 1"),
        ("train", "micro_batch_tokens", "auot", "auto, or a whole number of tokens. Did you mean 'auto'?"),
        ("memory", "loss_chunk", "auot", "auto, or a whole number of tokens. Did you mean 'auto'?"),
        ("memory", "loss_chunk", 0, "auto, or a whole number of tokens"),
        ("memory", "loss_chunk", True, "auto, or a whole number of tokens"),
        ("train", "optimizer", "paged_adamw", "Did you mean 'paged_adamw_8bit'?"),
        ("data", "max_length", 1, "a whole number of tokens, 2 or more"),
        ("model", "source", 7, "text of one line"),
        ("model", "source", "a\nb", "text of one line"),
        ("model", "source", "", "text of one line"),
    ],
)
def test_a_wrong_value_says_what_is_allowed(where: str, key: str, value: Any, allowed: str) -> None:
    (line,) = faults(section(where, **{key: value}))
    assert line.startswith(f"r.yaml: {where}.{key}: not valid, got {in_yaml(value)}, allowed: ")
    assert allowed in line
    assert "\n" not in line


def test_warmup_tells_steps_from_share() -> None:
    for given_, kind in ((5, int), (0, int), (0.5, float), ("1e-1", float)):
        warmup = recipe_from(section("train", warmup=given_)).train.warmup
        assert type(warmup) is kind


# --- faults of a file, all at once


def test_all_faults_of_a_file_come_together_with_the_nearest_names() -> None:
    text = """
model: {sorce: builtin}
adapter: {rnak: 8, alpha: true}
data: {mix: [{task: bolq}, {task: piqa, source: x.jsonl}, 3]}
train: {steps: 3, epochs: 1, batch: 2}
eval: 3
lr: 1e-4
trackers: [wandbb]
"""
    ranks = "kind, rank, alpha, rank_stabilized, dropout, targets, experts, init, rank_pattern, same_scaling, gates"
    ranks += ", dtype, mask, also_train, also_train_rows, resume_from"
    names = ", ".join(TASKS)
    models = "source, revision, tokenizer, tokenizer_revision, add_tokens, trust_remote_code, attention, dtype"
    keys = (
        "task, source, path, format, chat, columns, template, split, validation, weight, loss_weight, limit, "
        "max_epochs, stream, size, shuffle_window, name, revision, config, data_files"
    )
    source = recipe_schema("ModelConfig")["properties"]["source"]["description"]
    assert sorted(faults(read_yaml(text, "r.yaml"))) == sorted(
        [
            f"r.yaml: model.source: missing, allowed: {source}",
            f"r.yaml: model.sorce: unknown key, allowed: {models}. Did you mean 'source'?",
            f"r.yaml: adapter.rnak: unknown key, allowed: {ranks}. Did you mean 'rank'?",
            "r.yaml: adapter.alpha: not valid, got true, allowed: a finite number above 0.",
            f"r.yaml: data.mix[0].task: not valid, got 'bolq', allowed: {names}. Did you mean 'boolq'?",
            "r.yaml: data.mix[1]: exactly one of task and source must be set, got both.",
            f"r.yaml: data.mix[2]: not a section, got 3, allowed: {keys}.",
            "r.yaml: train.steps: exactly one of steps and epochs must be set, got both.",
            "r.yaml: eval: not a section, got 3, allowed: tasks, limit, block, method, every, at_start, at_end, "
            "best_by, best_metric, patience.",
            "r.yaml: lr: unknown key, allowed: model, base, adapter, data, train, eval, interference, memory, trackers."
            " Did you mean 'train.lr'?",
            "r.yaml: trackers[0]: not valid, got 'wandbb', allowed: tensorboard, trackio, wandb, mlflow."
            " Did you mean 'wandb'?",
        ]
    )


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("train.learning_rate", "lr"),
        ("train.max_steps", "steps"),
        ("adapter.r", "rank"),
        ("adapter.lora_alpha", "alpha"),
        ("train.max_seq_length", "data.max_length"),
        ("lora_r", "adapter.rank"),
        ("sequence_len", "data.max_length"),
        ("train.gradient_accumulation_steps", "batch"),
        ("train.load_in_4bit", "base.quant"),
        ("train.report_to", "trackers"),
        ("base_model", "model.source"),
        ("eval.eval_steps", "every"),
        ("train.max_skip", "max_skips"),
        ("seed", "train.seed"),
        ("max_samples", "data.mix[].limit"),
        ("data.mix[0].max_samples", "limit"),
        ("train.iters", "steps"),
        ("lora_target_linear", "adapter.targets"),
        ("bf16", "model.dtype"),
        ("evals_per_epoch", "eval.every"),
    ],
)
def test_names_of_other_trainers_are_understood(given: str, meant: str) -> None:
    with pytest.raises(UserError) as raised:
        load_recipe("tiny", [f"{given}=8"])
    assert raised.value.faults[0].endswith(f". Did you mean '{meant}'?")


def test_options_of_the_command_line_and_values_of_other_trainers_are_understood() -> None:
    for key, option in (("output_dir", "--run-dir"), ("train.resume_from_checkpoint", "--resume")):
        with pytest.raises(UserError, match=rf"\. Did you mean the option {option} of qdora train\?$"):
            load_recipe("tiny", [f"{key}=x"])
    with pytest.raises(UserError, match=r"train\.schedule: .* Did you mean 'constant'\?$"):
        load_recipe("tiny", ["train.schedule=constant_with_warmup"])


def recipe_schema(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json_schema()["$defs"][name]
    return found


def test_missing_sections_say_what_they_hold() -> None:
    lines = faults({"model": {"source": "builtin"}})
    assert [line.split(": missing")[0] for line in lines] == ["r.yaml: data", "r.yaml: train"]
    assert "a section of mix, strategy, temperature" in lines[0]
    assert faults([1]) == [
        "r.yaml: not a section, got [1], "
        "allowed: model, base, adapter, data, train, eval, interference, memory, trackers."
    ]


@pytest.mark.parametrize(
    "text, expected",
    [
        ("model:\n  source: [a\nbase: 1\n", "r.yaml: line 3: not YAML: "),
        ("a: b: c\n", "r.yaml: line 1: not YAML: mapping values are not allowed here."),
        ("model:\n\tsource: x\n", "r.yaml: line 2: not YAML: "),
        ("train:\n  lr: 1\n  steps: 2\n  lr: 2\n", "r.yaml: line 4: key 'lr' is given twice."),
        ("model: {source: x}\ndata: {}\nmodel: {}\n", "r.yaml: line 3: key 'model' is given twice."),
        ("", "r.yaml: empty, allowed: the sections model, base,"),
        ("# only a comment\n", "r.yaml: empty, "),
        ("- a\n- b\n", "r.yaml: not a mapping, got [a, b], allowed: the sections"),
        ("just words", "r.yaml: not a mapping, got 'just words', "),
        ("a: 1\n---\nb: 2\n", "r.yaml: line 2: not YAML: but found another document."),
        ("a: !!python/object/apply:os.system [ls]\n", "r.yaml: line 1: not YAML: could not determine a constructor"),
        ("a: 2024-13-45\n", "r.yaml: not a value: month must be in 1..12."),
        ("a: \x07\n", "r.yaml: not YAML: "),
        ("a: !!bool maybe\n", "r.yaml: not YAML: a tag such as !!bool stands before a value of another kind."),
        ("a: !!timestamp x\n", "r.yaml: not YAML: a tag such as !!bool stands before a value of another kind."),
        ("a: " + "[" * 2000, "r.yaml: nested too deeply."),
    ],
)
def test_yaml_that_cannot_be_read_is_one_line(text: str, expected: str) -> None:
    with pytest.raises(UserError) as raised:
        read_yaml(text, "r.yaml")
    assert len(raised.value.faults) == 1
    assert str(raised.value).startswith(expected)
    assert "\n" not in str(raised.value)


def test_two_keys_given_twice_are_two_lines() -> None:
    with pytest.raises(UserError) as raised:
        read_yaml("a: 1\na: 2\nb:\n  - {c: 1, c: 2}\n", "r.yaml")
    assert raised.value.faults == ("r.yaml: line 2: key 'a' is given twice.", "r.yaml: line 4: key 'c' is given twice.")


def test_aliases_that_go_in_circles_are_a_fault_not_a_hang() -> None:
    text = "model: &a {source: builtin, tokenizer: [*a, *a, *a]}"
    with pytest.raises(UserError, match=r"^r.yaml: line 1: an alias stands inside the value that it repeats\.$"):
        read_yaml(text, "r.yaml")


@pytest.mark.timeout(20)  # pydantic, repr and the search for access tokens would write all values out
def test_aliases_to_aliases_are_counted_before_they_are_written_out() -> None:
    levels = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    levels += [f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]" for level in range(1, 10)]
    expected = r"^r.yaml: holds too many values, with its aliases written out at most 100,000\.$"
    with pytest.raises(UserError, match=expected):
        read_yaml("\n".join(levels), "r.yaml")
    assert len(read_yaml("\n".join(levels[:4]), "r.yaml")) == 4


@pytest.mark.timeout(20)  # PyYAML would need minutes
def test_a_recipe_that_is_too_long_is_refused_before_it_is_parsed(tmp_path: Path) -> None:
    long = tmp_path / "long.yaml"
    long.write_text("# comment\n" * 400_000)
    for name in (str(long), "/dev/zero"):
        with pytest.raises(
            UserError, match=f"^{name}: too long for a recipe, allowed: at most 256 KiB; must be a YAML"
        ):
            load_recipe(name)
    with pytest.raises(UserError, match=r"^r.yaml: too long, allowed: at most 256 KiB\.$"):
        read_yaml("# comment\n" * 400_000, "r.yaml")


def test_missing_files_name_the_nearest_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("x: 1")
    (tmp_path / "latin.yaml").write_bytes(b"a: \xff")
    names = ", ".join(recipe_names())
    for name, expected in (
        ("quikstart", f"quikstart: no such file; must be a YAML file, or one of {names}. Did you mean 'quickstart'?"),
        ("mien.yaml", f"mien.yaml: no such file; must be a YAML file, or one of {names}. Did you mean 'mine.yaml'?"),
        ("no/such/dir.yaml", f"no/such/dir.yaml: no such file; must be a YAML file, or one of {names}."),
        (".", f".: is a directory; must be a YAML file, or one of {names}."),
        ("latin.yaml", f"latin.yaml: byte 3 is not UTF-8 text; must be a YAML file, or one of {names}."),
        ("a\0b", f"a b: no such file; must be a YAML file, or one of {names}."),
    ):
        with pytest.raises(UserError) as raised:
            load_recipe(name)
        assert str(raised.value) == expected
    with pytest.raises(UserError, match=r"quikstart: no such recipe, must be one of .* Did you mean 'quickstart'\?"):
        recipe_text("quikstart")


# --- a setting that would be ignored, and contradictions


@pytest.mark.parametrize(
    "where, values, key",
    [
        ("base", {"quant": "int8", "double_quant": True}, "double_quant"),
        ("base", {"quant": "int8", "block_size": 64}, "block_size"),
        ("base", {"quant": "none", "block_size": 128}, "block_size"),
        ("base", {"quant": "none", "skip": ["lm_head"]}, "skip"),
        ("adapter", {"resume_from": "/a", "rank": 16}, "rank"),
        ("adapter", {"resume_from": "/a", "alpha": 1}, "alpha"),
        ("adapter", {"resume_from": "/a", "targets": "all-linear"}, "targets"),
        ("adapter", {"resume_from": "/a", "same_scaling": True}, "same_scaling"),
        ("adapter", {"same_scaling": True}, "same_scaling"),
        ("adapter", {"same_scaling": False, "rank_pattern": {}}, "same_scaling"),
        ("model", {"source": "builtin", "revision": "main"}, "revision"),
        ("model", {"source": "/models/x", "revision": "main"}, "revision"),
        ("model", {"source": "model.gguf", "revision": "main"}, "revision"),
        ("model", {"source": "o/m", "tokenizer_revision": "main"}, "tokenizer_revision"),
        ("model", {"source": "o/m", "tokenizer": "/models/x", "tokenizer_revision": "main"}, "tokenizer_revision"),
        ("data", {"temperature": 2.0}, "temperature"),
        ("data", {"mix": [{"task": "boolq", "weight": 2.0}]}, "mix[0].weight"),
        ("data", {"mix": [{"task": "boolq", "weight": 2.0}], "strategy": "equal"}, "mix[0].weight"),
        ("data", {"mix": [{"task": "boolq", "stream": True}], "too_long": "drop"}, "mix[0].stream"),
        ("data", {"mix": [{"source": "/a.jsonl", "size": 5}]}, "mix[0].size"),
        ("data", {"mix": [{"source": "/a.jsonl", "shuffle_window": 5}]}, "mix[0].shuffle_window"),
        ("data", {"mix": [{"source": "/a", "stream": True, "limit": 5}], "too_long": "drop"}, "mix[0].limit"),
        (
            "data",
            {"mix": [{"source": "/a", "stream": True}], "too_long": "drop", "validation_fraction": 0.1},
            "validation_fraction",
        ),
        ("data", {"mix": [{"task": "boolq", "format": "choices"}]}, "mix[0].format"),
        ("data", {"mix": [{"task": "demo/howto", "format": "commonsense170k"}]}, "mix[0].format"),
        ("data", {"mix": [{"task": "demo/howto", "path": "/x"}]}, "mix[0].path"),
        ("data", {"mix": [{"task": "demo/howto", "revision": "main"}]}, "mix[0].revision"),
        ("data", {"mix": [{"task": "boolq", "path": "/x", "revision": "main"}]}, "mix[0].revision"),
        ("data", {"mix": [{"source": "org/set", "path": "/x"}]}, "mix[0].path"),
        ("data", {"mix": [{"source": "/x/set", "revision": "main"}]}, "mix[0].revision"),
        ("data", {"mix": [{"source": "x.jsonl", "split": "train"}]}, "mix[0].split"),
        ("data", {"mix": [{"task": "piqa", "validation": "test"}], "validation_fraction": 0.1}, "validation_fraction"),
        ("train", {"optimizer": "lion", "eps": 1e-8}, "eps"),
        ("train", {"optimizer": "paged_lion_8bit", "eps": 1e-6}, "eps"),
        ("train", {"schedule": "constant", "lr_end": 0.0}, "lr_end"),
        ("eval", {"tasks": [], "limit": 3}, "limit"),
        ("eval", {"tasks": [], "every": 3}, "every"),
        ("eval", {"tasks": [], "method": "generate"}, "method"),
        ("eval", {"at_start": False, "at_end": False, "method": "generate"}, "method"),
        ("eval", {"tasks": [], "at_end": True}, "at_end"),
        ("eval", {"at_start": False, "at_end": False, "limit": 3}, "limit"),
        ("eval", {"at_start": False, "at_end": False, "tasks": ["boolq"]}, "tasks"),
        *[
            ("adapter", {"kind": "none", key: value}, key)
            for key, value in (
                ("rank", 16),
                ("alpha", 1.0),
                ("rank_stabilized", False),
                ("dropout", 0.0),
                ("targets", "all-linear"),
                ("init", "kaiming"),
                ("rank_pattern", {}),
                ("same_scaling", True),
                ("dtype", "float32"),
                ("resume_from", "/a"),
            )
        ],
    ],
)
def test_a_setting_that_would_be_ignored_is_a_fault(where: str, values: dict[str, Any], key: str) -> None:
    lines = faults(section(where, **values))
    matching = [line for line in lines if line.startswith(f"r.yaml: {where}.{key}: would be ignored because ")]
    assert len(matching) == 1, lines
    assert matching[0].endswith("Fix: remove it (in an override: set it to null).")
    without = {name: value for name, value in values.items() if name != key}
    if "mix" not in key and values.get("kind") != "none":
        assert faults(section(where, **without)) == []


def test_experts_of_another_rank_can_have_the_same_scaling() -> None:
    assert faults(section("adapter", same_scaling=True, experts={"rank": 4})) == []


@pytest.mark.parametrize(
    "data, expected",
    [
        (
            section("train", batch=None),
            "train.tokens_per_step: exactly one of tokens_per_step and batch must be set, got neither.",
        ),
        (
            section("train", tokens_per_step=512),
            "train.tokens_per_step: exactly one of tokens_per_step and batch must be set, got both.",
        ),
        (section("train", steps=None), "train.steps: exactly one of steps and epochs must be set, got neither."),
        (section("train", warmup=11), "train.warmup: must be at most train.steps (10), got 11."),
        (
            section("train", micro_batch_tokens=511),
            "train.micro_batch_tokens: must be at least data.max_length (512), got 511.",
        ),
        (
            section("train", batch=None, tokens_per_step=512, micro_batch_tokens=1024),
            "train.micro_batch_tokens: must be at most train.tokens_per_step (512), got 1024.",
        ),
        (
            section("train", lr_end=3e-4),
            "train.lr_end: must be at most train.lr (0.0002), got 0.0003.",
        ),
        (
            section("train", lr_ratio_B=16, lr_ratio_magnitude=1) | {"adapter": {"kind": "lora"}},
            "train.lr_ratio_magnitude: would be ignored because adapter.kind lora has no magnitudes, got 1.0. Fix: ",
        ),
        (
            section("train", lr_ratio_B=16) | {"adapter": {"kind": "full"}, "base": {"quant": "none"}},
            "train.lr_ratio_B: would be ignored because adapter.kind full has no adapter, got 16.0. Fix: remove it",
        ),
        (
            section("adapter", kind="full"),
            "adapter.kind: full needs base.quant none, since it trains 16-bit weights, got nf4.",
        ),
        (
            section("adapter", kind="none"),
            "train.steps: must be 0 with adapter.kind none, which trains nothing, got 10.",
        ),
        (
            section("data", strategy="weights", mix=[{"task": "boolq", "weight": 2}, {"task": "piqa"}]),
            "data.mix[1].weight: must be a number above 0 with data.strategy weights, got null.",
        ),
        (
            section("data", mix=[{"source": "/a", "stream": True}], too_long="error"),
            "data.too_long: must be truncate, drop or split with a stream, which is not read before training, got",
        ),
        (
            {**STREAMED, "train": {"epochs": 1.5, "batch": 4}},
            "train.epochs: must be null with a stream, whose length is not known, got 1.5. Fix: set train.steps.",
        ),
        (
            section("data", strategy="temperature"),
            "data.temperature: must be a finite number above 0 with data.strategy temperature, got null.",
        ),
        (section("data", mix=[]), "data.mix: must have at least one source, got []."),
        (section("data", mix=[{}]), "data.mix[0]: exactly one of task and source must be set, got neither."),
        (
            section("data", mix=[{"source": "a/x.jsonl"}, {"source": "b/x.jsonl"}]),
            "data.mix[1].name: must differ from that of mix[0], got 'x'.",
        ),
        (
            section("eval", tasks=["fcts"]) | {"data": {"mix": [{"task": "demo/howto", "name": "facts"}]}},
            "eval.tasks[0]: must be a source of the mix, got 'fcts', allowed: facts. Did you mean 'facts'?",
        ),
        (
            section("eval", every=5, best_by="macro") | {"data": {"mix": [{"task": "demo/howto", "name": "macro"}]}},
            "eval.best_by: must not be both the average and the name of a source, got 'macro'.",
        ),
        (section("model", source="o/m", trust_remote_code=True), "model.trust_remote_code: runs code from the Hub"),
        (
            section("model", source="o/m", revision="main", trust_remote_code=True),
            "model.trust_remote_code: runs code from the Hub, so model.revision must be the 40 hex digits of a commit "
            "of a Hub id, got 'main' of 'o/m'.",
        ),
        (section("model", trust_remote_code=True), "model.trust_remote_code: runs code from the Hub"),
        (
            {**minimal(), "trackers": ["wandb", "wandb"]},
            "trackers: must name each tracker once, got [wandb, wandb].",
        ),
    ],
)
def test_contradictions(data: dict[str, Any], expected: str) -> None:
    lines = faults(data)
    assert len(lines) == 1, lines
    assert lines[0].startswith(f"r.yaml: {expected}")


@pytest.mark.parametrize(
    "data",
    [
        section("model", source="o/m", revision="0123456789abcdef" * 2 + "01234567", trust_remote_code=True),
        {**section("adapter", kind="full"), "base": {"quant": "none"}},
        {**section("adapter", kind="none"), "train": {"steps": 0, "batch": 1}},
        section("data", strategy="temperature", temperature=2),
        STREAMED,
        section("data", strategy="weights", mix=[{"task": "boolq", "weight": 2}, {"task": "piqa", "weight": 0.5}]),
        section("data", mix=[{"source": "a/x.jsonl"}, {"source": "b/x.jsonl", "name": "b"}]),
        section("train", checkpoint_every=1000, log_every=1000),
        section("train", clip=None),
        section("train", lr_ratio_B=16, lr_ratio_magnitude=0.5, lr_end=2e-4),
        section("train", lr_ratio_B=16, lr_ratio_magnitude=None) | {"adapter": {"kind": "lora"}},
        section("train", optimizer="lion", betas=[0.95, 0.98], schedule="constant"),
        section("eval", tasks=["facts"]) | {"data": {"mix": [{"task": "demo/howto", "name": "facts"}]}},
        section("eval", tasks=[]),
        section("adapter", resume_from="/a", dropout=0.1),
        section("model", revision=None, tokenizer=None),
    ],
)
def test_what_looks_odd_and_is_right(data: dict[str, Any]) -> None:
    assert faults(data) == []
    recipe = recipe_from(data)
    assert recipe_from(settings_of(recipe)) == recipe


# --- overrides


def test_overrides_reach_sections_lists_and_tables() -> None:
    recipe = load_recipe(
        "tiny",
        [
            "train.lr=1e-4",
            "data.mix[0].limit=5",
            "memory.checkpointing=false",
            "memory.loss_chunk=256",
            "adapter.rank_pattern.model.layers.0.q_proj=8",
            "adapter.targets=all-linear",
            "train.clip=null",
            "train.steps=7",
            "train.steps=8",
            "eval.limit=",
            "trackers=[wandb]",
        ],
    )
    assert recipe.train.lr == 1e-4
    assert recipe.data.mix[0].limit == 5
    assert recipe.memory.checkpointing is False
    assert recipe.memory.loss_chunk == 256
    assert recipe.adapter.rank_pattern == {"model.layers.0.q_proj": 8}
    assert recipe.adapter.targets == "all-linear"
    assert recipe.train.clip is None
    assert recipe.train.steps == 8
    assert recipe.eval.limit is None
    assert recipe.trackers == ("wandb",)


def test_null_takes_a_setting_out_so_that_another_can_be_chosen() -> None:
    swap = ["adapter.kind=none", "adapter.rank=null", "adapter.alpha=", "adapter.targets=null", "train.steps=0"]
    assert load_recipe("tiny", swap).adapter.kind == "none"
    assert load_recipe("tiny", ["train.steps=null", "train.epochs=2"]).train.epochs == 2.0
    recipe = override(load_recipe("tiny"), ["train.batch=null", "train.tokens_per_step=512"])
    assert (recipe.train.batch, recipe.train.tokens_per_step) == (None, 512)
    ranks = recipe_from(section("adapter", rank_pattern={"q_proj": 2, "v_proj": 3}))
    assert override(ranks, ["adapter.rank_pattern.q_proj=null"]).adapter.rank_pattern == {"v_proj": 3}
    assert override(ranks, ["data.template_kwargs.tools=null"]).data.template_kwargs == {"tools": None}


def test_an_override_inside_a_section_that_is_null_makes_the_section() -> None:
    recipe = recipe_from(apply_overrides(section("base", prune=None), ["base.prune.sparsity=0.5"]))
    assert recipe.base.prune is not None
    assert recipe.base.prune.sparsity == 0.5


def test_faults_of_overrides_name_the_override() -> None:
    wrong = ["adapter.rnak=3", "data.mix[9].limit=3", "x", "train.lr=[", "train.lr.x=1", "data.mix[0]x=1", "=3"]
    with pytest.raises(UserError) as raised:
        load_recipe("tiny", wrong)
    expected = [
        "-s adapter.rnak=3: unknown key, allowed: kind, rank,",
        "-s data.mix[9].limit=3: the index must be below the number of entries (2), got [9].",
        "-s x: must be key=value",
        "-s train.lr=[: not YAML: ",
        "-s train.lr.x=1: there is nothing called x inside it.",
        "-s data.mix[0]x=1: must be key=value",
        "-s =3: must be key=value",
    ]
    assert len(raised.value.faults) == len(expected)
    for line, start in zip(raised.value.faults, expected, strict=True):
        assert line.startswith(start)
    assert faults(minimal(), "adapter.rank=0") == [
        "-s: adapter.rank: not valid, got 0, allowed: a whole number, 1 or more."
    ]
    # a fault of the file in a setting whose name only begins like that of an override
    [fault] = faults(section("train", steps=1, batch=4, lr_ratio_B=-1), "train.lr=1e-3")
    assert fault.startswith("r.yaml: train.lr_ratio_B: not valid, got -1")
    [fault] = faults(minimal(), "data={mix: [{task: boolq, limit: 0}]}")
    assert fault.startswith("-s: data.mix[0].limit: not valid, got 0")


def test_a_section_replaced_behind_one_of_its_settings_is_a_fault_of_the_recipe() -> None:
    [missing] = faults(minimal(), "train.steps=3", "train.batch=8", "train=null")
    assert missing.startswith("-s: train: missing, allowed: a section of steps, ")
    for value in ("5", "[1]"):
        [fault] = faults(minimal(), "train.steps=3", f"train={value}")
        assert fault.startswith(f"-s: train: not a section, got {value}, allowed: steps, ")


def test_an_override_inside_a_setting_that_is_a_text_a_list_or_a_table() -> None:
    hub = {"source": "org/name", "data_files": {"train": "a.jsonl", "test": "b.jsonl"}, "validation": "test"}
    data = section("data", mix=[hub])
    assert not faults(data, "data.mix[0].data_files.train=c.jsonl")
    changed = recipe_from(apply_overrides(data, ["data.mix[0].data_files.train=c.jsonl"])).data.mix[0]
    assert changed.data_files == {"train": "c.jsonl", "test": "b.jsonl"}
    listed = section("data", mix=[{**hub, "data_files": ["a.jsonl", "b.jsonl"], "validation": None}])
    changed = recipe_from(apply_overrides(listed, ["data.mix[0].data_files[1]=c.jsonl"])).data.mix[0]
    assert changed.data_files == ("a.jsonl", "c.jsonl")
    none = section("data", mix=[{"source": "org/name"}])
    changed = recipe_from(apply_overrides(none, ["data.mix[0].data_files.train=c.jsonl"])).data.mix[0]
    assert changed.data_files == {"train": "c.jsonl"}
    assert faults(data, "data.mix[0].data_files[0]=c") == [
        "-s data.mix[0].data_files[0]=c: there is nothing called [0] inside it."
    ]


def test_overrides_do_not_change_what_they_are_given() -> None:
    data = minimal()
    apply_overrides(data, ["train.steps=3", "data.mix[0].limit=1"])
    recipe_from(section("data", mix=[{"source": "./x.jsonl"}]))
    assert data == minimal()


def test_an_override_replaces_the_setting_that_excludes_it() -> None:
    epochs = section("train", steps=None, epochs=2, batch=4)
    found = recipe_from(apply_overrides(epochs, ["train.steps=5", "train.tokens_per_step=64"])).train
    assert (found.steps, found.epochs, found.tokens_per_step, found.batch) == (5, None, 64, None)
    assert faults(epochs, "train.steps=5", "train.epochs=1") == [
        "-s: train.steps: exactly one of steps and epochs must be set, got both."
    ]
    assert recipe_from(apply_overrides(epochs, ["train.steps=null"])).train.epochs == 2


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


def test_the_name_of_a_chat_template_is_told_to_be_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    [line] = missing_files(load_recipe("tiny", ["data.chat_template=chatml"]), "tiny")
    got = f"no such file or directory, got {tmp_path / 'chatml'}, allowed: a file with a template (Jinja), or null"
    assert line == f"tiny: data.chat_template: {got} for the tokenizer's own."


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
    assert files_of(Path(pattern.source), "train") == [folder / "data" / f"{name}.jsonl" for name in ("test", "train")]
    assert (split.source, split.split) == (str(folder / "data"), "test")
    assert (single.source, single.validation) == (str(folder / "data" / "train.jsonl"), f"{escaped}/data/te?t.jsonl")
    assert (one.source, recipe.data.cache) == (str(folder / "data" / "[x].jsonl"), str(folder / "new[1]"))
    assert missing_files(recipe, "r.yaml") == []
    monkeypatch.chdir(tmp_path)
    assert recipe_from(read_yaml(resolved_yaml(recipe), "resolved")) == recipe


@pytest.mark.parametrize("space", "\u00a0\u3000\u202f")
def test_a_path_with_any_space_starts_at_the_file(space: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(
        yaml.safe_dump(section("data", mix=[{"source": f"a{space}b.jsonl"}]), allow_unicode=True), encoding="utf-8"
    )
    assert load_recipe(tmp_path / "r.yaml").data.mix[0].source == str(tmp_path / f"a{space}b.jsonl")


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


# --- pruning


@pytest.mark.parametrize(
    "prune, message",
    [
        ({"pattern": "3:3"}, "base.prune.pattern: n must be below m, got '3:3'."),
        ({"pattern": "unstructered"}, "allowed: unstructured, 2:4, 4:8, rows, columns, or another n:m. Did you mean"),
        ({"method": "wanda"}, "base.prune.sparsity: must be set for pattern unstructured: a share of zeros below 1."),
        ({"pattern": "2:4", "sparsity": 0.5}, "base.prune.sparsity: would be ignored because base.prune.pattern 2:4"),
        ({"sparsity": 1.0}, "base.prune.sparsity: not valid, got 1.0, allowed: a number, at least 0 and below 1"),
        (
            {"sparsity": 0.5, "damping": 0.1},
            "base.prune.damping: would be ignored because only base.prune.method",
        ),
        ({"pattern": "2:4", "group": "row"}, "base.prune.group: would be ignored because base.prune.pattern 2:4"),
        (
            {"method": "sparsegpt", "sparsity": 0.5, "order": "quantize_first"},
            "base.prune.order: must be prune_first with sparsegpt, which changes the kept weights, got quantize_first.",
        ),
        (
            {"method": "magnitude", "sparsity": 0.5, "calibration": {"length": 8}},
            "calibration: would be ignored because base.prune.method magnitude needs no calibration, got {length: 8}.",
        ),
    ],
)
def test_pruning_that_means_nothing(prune: dict[str, Any], message: str) -> None:
    (line,) = faults(section("base", prune=prune))
    assert message in line


def test_values_are_shown_as_a_recipe_has_them() -> None:
    shown = {
        "null": None,
        "true": True,
        "'true'": "true",
        "[q_proj, 'true', 'a: b', '', 1.5, null]": ("q_proj", "true", "a: b", "", 1.5, None),
        "{enable_thinking: false, a: [1, {b: c}]}": {"enable_thinking": False, "a": [1, {"b": "c"}]},
        "2024-05-01": yaml.safe_load("2024-05-01"),
    }
    assert [in_yaml(value) for value in shown.values()] == list(shown)
    cycle: list[Any] = []
    cycle.append(cycle)
    assert in_yaml(cycle) == "[[[[[[...]]]]]]"


def test_pruning_and_the_other_sections() -> None:
    half = {"method": "wanda", "sparsity": 0.5}
    (line,) = faults(minimal(base={"quant": "none", "prune": half}, adapter={"kind": "full"}))
    assert line.startswith(
        "r.yaml: adapter.kind: must be dora, lora, magnitude or none with base.prune, since full would fill the zeros, "
        "got full."
    )
    (line,) = faults(minimal(base={"quant": "none", "prune": {**half, "order": "quantize_first"}}))
    assert line.startswith("r.yaml: base.prune.order: must be prune_first with base.quant none, got quantize_first.")
    (line,) = faults({**STREAMED, "base": {"prune": half}})
    assert line.startswith(
        "r.yaml: base.prune.calibration.text: must be a text file with a streamed source, which has no random places"
    )
    assert faults(minimal(base={"quant": "none", "skip": ["lm_head", "o_proj"], "prune": half})) == []


def test_n_of_m_needs_no_quotes() -> None:
    for text in ("2:4", "4:8", "1:12", "'2:4'"):
        recipe = recipe_from(read_yaml(f"base: {{prune: {{pattern: {text}}}}}", "r") | minimal())
        assert recipe.base.prune is not None
        assert recipe.base.prune.pattern == text.strip("'")
        assert recipe_from(read_yaml(resolved_yaml(recipe), "again")) == recipe


def test_colons_make_no_numbers_to_base_60() -> None:
    found = read_yaml("a: 2:4\n2:4: [1:30.5, 190:20:30]\nb: 24\nc: -1.5\nd: 0x1f\n", "r")
    assert found == {"a": "2:4", "2:4": ["1:30.5", "190:20:30"], "b": 24, "c": -1.5, "d": 31}
    # nor to base 8
    assert read_yaml("a: 0100\nb: -010\nc: 0\nd: 0.5\ne: 10", "r") == {
        "a": "0100",
        "b": "-010",
        "c": 0,
        "d": 0.5,
        "e": 10,
    }


def test_a_comment_is_no_value() -> None:
    with pytest.raises(UserError, match=r"-s data\.mix\[0\]\.name=#1: # begins a comment, so there is no value"):
        apply_overrides({"data": {"mix": [{"task": "demo/facts"}]}}, ["data.mix[0].name=#1"])
    assert apply_overrides({}, ["train.clip=null  # off"])["train"]["clip"] is None


def test_a_calibration_file_is_looked_for_beside_the_recipe(tmp_path: Path) -> None:
    prune = {"sparsity": 0.5, "calibration": {"text": "some/text.txt"}}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(section("base", prune=prune)))
    recipe = load_recipe(str(tmp_path / "r.yaml"))
    assert recipe.base.prune is not None
    assert recipe.base.prune.calibration.text == str(tmp_path / "some/text.txt")
    assert missing_files(recipe, "r.yaml") == [
        f"r.yaml: base.prune.calibration.text: no such file or directory, got {tmp_path}/some/text.txt."
    ]


# --- schema and start-up


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ({"gates": {}}, "adapter.gates.mean_rank: exactly one of mean_rank and parameters must be set, got neither."),
        (
            {"gates": {"mean_rank": 2, "parameters": 9}},
            "adapter.gates.mean_rank: exactly one of mean_rank and parameters must be set, got both.",
        ),
        ({"gates": {"mean_rank": 0.5}}, "adapter.gates.mean_rank: not valid, got 0.5, allowed: a finite number, 1 or"),
        (
            {"gates": {"mean_rank": 16}},
            "adapter.gates.mean_rank: must be less than adapter.rank, so that components are removed, got 16.",
        ),
        ({"gates": {"mean_rank": 2, "anneal": 0}}, "adapter.gates.anneal: must be above 0, got 0."),
        (
            {"gates": {"mean_rank": 2, "warmup": 0.6}},
            "adapter.gates.anneal: anneal and warmup together must be at most 1, got 0.5 and 0.6.",
        ),
        (
            {"gates": {"mean_rank": 2, "warmup": 600}},
            "adapter.gates.anneal: warmup and anneal together must be at most the 10 steps of the run, got 600 + ",
        ),
        ({"gates": {"mean_rank": 2, "mode": "l0"}}, "adapter.gates.mode: not valid, got 'l0', allowed: l1, hard_"),
        ({"gates": {"mean_rank": 2}, "kind": "magnitude"}, "adapter.gates: would be ignored because adapter.kind mag"),
    ],
)
def test_gates_that_mean_nothing(adapter: dict[str, Any], message: str) -> None:
    (line,) = faults(minimal(adapter=adapter))
    assert message in line


def test_gates_and_the_best_step() -> None:
    (line,) = faults(minimal(adapter={"gates": {"mean_rank": 2}}, eval={"every": 5, "best_by": "macro"}))
    assert "eval.best_by: must be null with adapter.gates, since the best step may be before the budget" in line


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


def some(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=fields)


@st.composite
def prunes(draw: st.DrawFn, quant: str) -> dict[str, Any]:
    """base.prune, or nothing."""
    method = draw(st.sampled_from([None, "magnitude", "wanda", "sparsegpt"]))
    if method is None:
        return {}
    pattern = draw(st.sampled_from(["unstructured", "2:4", "1:8", "rows", "columns"]))
    groups = some(group=st.sampled_from(["auto", "tensor", "row"])) if pattern == "unstructured" else some()
    text = some(text=st.just("mix") | names_.map("/{}".format), sequences=whole, length=whole, seed=whole)
    orders = ["prune_first", *(["quantize_first"] if quant != "none" and method != "sparsegpt" else [])]
    return {
        "prune": {
            "method": method,
            "pattern": pattern,
            **({} if ":" in pattern else {"sparsity": draw(share)}),
            **(draw(some(damping=positive)) if method == "sparsegpt" else draw(groups)),
            **(draw(some(calibration=text)) if method != "magnitude" else {}),
            **draw(some(order=st.sampled_from(orders))),
        }
    }


@st.composite
def recipes(draw: st.DrawFn) -> dict[str, Any]:
    """Recipes that are right, with any subset of the fields set."""
    quant = draw(st.sampled_from(["nf4", "fp4", "int8", "none"]))
    block = (
        some(block_size=st.sampled_from([64, 4096]), double_quant=st.booleans()) if quant in ("nf4", "fp4") else some()
    )
    prune = draw(prunes(quant))
    skip = some(skip=st.lists(names_, max_size=3)) if quant != "none" or prune else some()
    kind = draw(st.sampled_from(["dora", "lora", *(["full"] if quant == "none" and not prune else [])]))
    adapter = some(
        rank=whole,
        alpha=positive,
        rank_stabilized=st.booleans(),
        dropout=share,
        targets=st.just("all-linear") | st.lists(names_, min_size=1, max_size=3),
        rank_pattern=st.dictionaries(names_, whole, max_size=3),
    )
    if draw(st.booleans()):
        pattern = st.dictionaries(names_, whole, min_size=1, max_size=3)
        adapter = st.fixed_dictionaries({"rank_pattern": pattern, "same_scaling": st.booleans()})
    strategy = draw(st.sampled_from(["proportional", "equal", "temperature", "weights"]))
    labels = draw(st.lists(names_, min_size=1, max_size=3, unique=True))
    tasks = st.sampled_from(TASKS).map(lambda task: {"task": task})
    mix = [
        {
            **draw(tasks | names_.map(lambda name: {"source": f"/{name}"})),
            "name": label,
            **draw(some(limit=whole, max_epochs=positive)),
        }
        for label in labels
    ]
    if strategy == "weights":
        mix = [{**source, "weight": draw(positive)} for source in mix]
    data = {"mix": mix, "strategy": strategy, **({"temperature": draw(positive)} if strategy == "temperature" else {})}
    length = draw(st.sampled_from([{"steps": 50}, {"epochs": 2.5}]))
    size = draw(st.sampled_from([{"batch": 3}, {"tokens_per_step": 4096, "micro_batch_tokens": 1024}]))
    course = draw(st.sampled_from([{}, {"schedule": "constant"}, {"schedule": "cosine", "lr_end": 1e-300}]))
    rates = some(lr_ratio_B=positive, **({"lr_ratio_magnitude": positive} if kind == "dora" else {}))
    train = some(
        lr=positive,
        optimizer=st.sampled_from(["adamw", "lion", "paged_lion_8bit"]),
        warmup=st.integers(0, 50) | share,
        clip=st.none() | positive,
        betas=st.tuples(share, share).map(list),
        seed=st.integers(0, 2**63 - 1),
        checkpoint_every=whole | st.none(),
    )
    chosen = {"every": st.just(7), "best_by": st.just("macro") | st.just(labels[0]), "patience": whole}
    best = st.fixed_dictionaries(
        chosen, optional={"best_metric": st.sampled_from(["nll_per_token", "acc", "acc_norm"])}
    )
    return {
        "model": {"source": draw(st.just("builtin") | st.just("org/name")), **draw(some(tokenizer=st.just("org/tok")))},
        "base": {"quant": quant, **draw(block), **draw(skip), **prune},
        "adapter": {"kind": kind, **(draw(adapter) if kind != "full" else {})},
        "data": data,
        "train": {**length, **size, **draw(train), **course, **(draw(rates) if kind != "full" else {})},
        **draw(
            some(eval=some(tasks=st.just([labels[0]]), limit=whole, every=whole) | best, trackers=st.just(["wandb"]))
        ),
        **draw(
            some(
                memory=some(
                    budget=st.sampled_from(["auto", "40GiB", "500 MB"]),
                    checkpointing=st.booleans(),
                    loss_chunk=st.just("auto") | whole,
                )
            )
        ),
    }


@settings(max_examples=80, deadline=None)
@given(recipes())
def test_resolved_recipe_is_read_back_exactly(data: dict[str, Any]) -> None:
    recipe = recipe_from(data)
    text = resolved_yaml(recipe)
    again = recipe_from(read_yaml(text, "resolved"), "resolved")
    assert again == recipe
    assert resolved_yaml(again) == text
    assert override(recipe, []) == recipe
    # what was given is what is held, to the last bit
    assert recipe.train.lr == data["train"].get("lr", 2e-4)
    assert again.train.warmup == data["train"].get("warmup", 0.05)
    assert type(again.train.warmup) is type(data["train"].get("warmup", 0.05))


@pytest.mark.parametrize("text", ["a\x85b", "\x85", "a\u2028b", " a: \x85 'b'"])
def test_line_ends_of_unicode_in_names_are_read_back(text: str) -> None:
    source = {"source": "/x", "name": text, "columns": {text: text}, "template": {"prompt": text, "completion": "b"}}
    recipe = recipe_from(section("data", mix=[source]))
    assert recipe_from(read_yaml(resolved_yaml(recipe), "resolved")) == recipe


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


def faults_of_data(*mix: dict[str, Any], **data: Any) -> list[str]:
    with pytest.raises(UserError) as error:
        recipe_from(minimal(data={"mix": list(mix), **data}))
    return [fault.removeprefix("recipe: data.") for fault in error.value.faults]


def test_what_a_stream_lacks_is_one_answer_and_its_defaults_run() -> None:
    stream = {"source": "/a.jsonl", "stream": True}
    for mix in ([stream], [stream, {"source": "/b.parquet", "stream": True}]):
        given = [each | ({"size": 9} if len(mix) > 1 else {}) for each in mix]
        assert recipe_from(minimal(data={"mix": given})).data.too_long == "truncate"
    assert recipe_from(minimal(data={"mix": [{"source": "/a.jsonl"}]})).data.too_long == "error"
    asked = recipe_from(minimal(data={"mix": [stream], "too_long": "drop"}))
    assert recipe_from(settings_of(asked)) == asked
    other = stream | {"source": "/c.jsonl", "max_epochs": 2}
    first, second, third = faults_of_data(stream, {"source": "/b.txt"}, other, too_long="error")
    assert first.startswith("too_long: must be truncate, drop or split with a stream")
    assert second.startswith(
        "mix[0].size: must be given for files other than Parquet with data.strategy proportional, got null."
    )
    assert third.startswith(
        "mix[2].size: must be given for files other than Parquet with data.strategy proportional and max_epochs"
    )
    assert faults_of_data(stream | {"max_epochs": 2}) == [
        "mix[0].size: must be given for files other than Parquet with max_epochs, got null."
    ]


def test_max_bad_rows_and_compressed_files() -> None:
    [fault] = faults_of_data({"source": "/a.txt"}, max_bad_rows=3)
    assert fault.startswith("max_bad_rows: would be ignored because no source is streamed")
    for name in ("/a.jsonl.gz", "/a.csv", "/a.csv.zst", "/A.TXT.GZ"):
        assert recipe_from(minimal(data={"mix": [{"source": name}]}))
    for name in ("/a.gz", "/a.parquet.gz"):
        [fault] = faults_of_data({"source": name})
        assert fault.startswith(
            "mix[0].source: a compressed file must end in one of .jsonl.gz, .json.gz, .csv.gz, .tsv.gz"
        )
    assert recipe_from(minimal(data={"mix": [{"source": "/a.jsonl.gz", "stream": True, "size": 3}]}))


@pytest.mark.parametrize("given", ["off", "'off'", "false"])
def test_the_cache_of_tokens_can_be_off(given: str) -> None:
    """YAML reads off as false."""
    assert load_recipe("quickstart", [f"data.cache={given}"]).data.cache == "off"


def test_paths_that_no_system_has_are_missing_files(tmp_path: Path) -> None:
    for path in ("é" * 4000, "~nobody_at_all/x"):
        (tmp_path / "r.yaml").write_text(
            json.dumps(minimal(data={"mix": [{"task": "demo/howto"}], "chat_template": path}))
        )
        [line] = missing_files(load_recipe(str(tmp_path / "r.yaml")), "r.yaml")
        assert line.startswith(
            f"r.yaml: data.chat_template: no such file or directory, got {tmp_path / path}, allowed: "
        )


def test_a_path_that_cannot_be_looked_at_has_no_nearest_name(tmp_path: Path) -> None:
    assert nearest_path(tmp_path / ("x" * 300) / "data.jsonl") == ""


@pytest.mark.parametrize(
    "override, end",
    [
        ("data.mix=[a.jsonl]", "Fix: write {source: 'a.jsonl'}."),
        (f"data.mix=[/{'x' * 99}.jsonl]", f"Fix: write {{source: '/{'x' * 99}.jsonl'}}."),
        ("data.mix=[boolq]", "Fix: write {task: 'boolq'}."),
        ("data.mix=[{path: /x/a.jsonl}]", "got neither. Fix: set source to /x/a.jsonl; path is for a task."),
        ("data.mix.0.limit=5", "there is nothing called 0 inside it. It is a list. Fix: write [0]."),
        (
            "data.mix[0].weight=2",
            "because data.strategy is proportional and not weights, got 2.0. Fix: remove it (in an "
            "override: set it to null).",
        ),
    ],
)
def test_a_source_written_as_elsewhere_is_told_how_it_is_written_here(override: str, end: str) -> None:
    [line] = faults(minimal(), override)
    assert line.endswith(end)


def test_a_list_that_is_too_short_is_told_how_many_entries_it_needs() -> None:
    with pytest.raises(UserError, match=r"values: not valid, got \['1e-3'\], allowed: at least 3 entries\.$"):
        study_from(
            {
                "recipe": "demo",
                "product": {"adapter": {"dora": {}, "lora": {"adapter.kind": "lora"}}},
                "rates": {"values": ["1e-3"], "steps": 2},
            }
        )


def test_the_same_data_twice_is_told_so() -> None:
    [line] = faults(minimal(), "data.mix=[{source: a.jsonl}, {source: a.jsonl}]")
    assert line.endswith(
        "must differ from that of mix[0], got 'a'. Both read the same data. Fix: remove one, or set a name."
    )
    [line] = faults(minimal(), "data.mix=[{source: a.jsonl}, {source: x/a.jsonl}]")
    assert line.endswith("must differ from that of mix[0], got 'a'.")
