"""The memory plan: its numbers against a counted run of the real step, and a shortened model against the whole one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen2Config

from qdora.data.batching import MicroBatch
from qdora.data.build_data import make_loader, num_steps_of, read_data, tokenized_mix
from qdora.model.adapter_file import save_adapter
from qdora.model.inject import inject
from qdora.plan import memory_plan
from qdora.plan import plan_contents as parts
from qdora.plan.block_pattern import BlockPattern, extrapolated, find_pattern
from qdora.plan.memory_plan import plan
from qdora.plan.plan_contents import DeviceKind, MicroBatchShape, Moment, Plan
from qdora.plan.workload import assumed_workload, largest_shapes, not_exceeded, workload_of_data
from qdora.recipe.recipe_file import recipe_from
from qdora.recipe.settings import Recipe
from tests import tiny_tokenizer

SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


def a_recipe(**changes: Any) -> Recipe:
    document: dict[str, Any] = {
        "model": {"source": "org/model", "dtype": "bfloat16"},
        "adapter": {"rank": 4},
        "data": {"mix": [{"source": "org/data"}], "max_length": 64},
        "train": {"steps": 2, "batch": 4, "micro_batch_tokens": 128},
    }
    for name, value in changes.items():
        section, _, key = name.partition("__")
        if key:
            document.setdefault(section, {})[key] = value
        else:
            document[section] = value
    return recipe_from(document)


def a_config(**changes: Any) -> PreTrainedConfig:
    return LlamaConfig(**(SIZES | {"num_hidden_layers": 10} | changes))


def drawn_and_whole(
    recipe: Recipe, device_kind: DeviceKind, monkeypatch: pytest.MonkeyPatch, config: PreTrainedConfig | None = None
) -> tuple[Plan, Plan]:
    """The plan extrapolated from few blocks, and the one in which all blocks are measured."""
    config = config or a_config()
    drawn = plan(recipe, config=config, device_kind=device_kind)
    monkeypatch.setattr(memory_plan, "find_pattern", lambda signatures: None)
    memory_plan._latest.clear()  # else it would be the same plan
    return drawn, plan(recipe, config=config, device_kind=device_kind)


def assert_extrapolated(drawn: Plan, whole: Plan) -> None:
    found = {(moment.phase, moment.block): moment.by_component for moment in whole.moments}
    assert len(drawn.moments) < len(whole.moments)
    for moment in drawn.moments:
        assert found[moment.phase, moment.block] == moment.by_component, moment.name
    assert drawn.peak.num_bytes == whole.peak.num_bytes
    assert drawn.num_trainable == whole.num_trainable


@pytest.mark.parametrize(
    "changes",
    [
        {"adapter": {"rank": 4, "targets": ["down_proj"]}},
        {"memory__checkpointing": False, "base__quant": "none", "adapter": {"kind": "lora", "targets": ["up_proj"]}},
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param(
            {"memory__checkpointing": False, "adapter__kind": "lora", "train__optimizer": "adamw"},
            marks=pytest.mark.slow,
        ),
        pytest.param({"adapter__dropout": 0.1, "data__packing": True, "base__quant": "int8"}, marks=pytest.mark.slow),
        pytest.param({"base__quant": "none", "adapter": {"kind": "full"}}, marks=pytest.mark.slow),
    ],
    ids=["one layer", "one layer, all kept", "checkpointed", "all kept", "dropout, packed", "full"],
)
def test_a_shortened_model_is_extrapolated_to_the_whole(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_extrapolated(*drawn_and_whole(a_recipe(**changes), "cuda", monkeypatch))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kinds", "changes"),
    [
        (["sliding_attention", "full_attention"], {"adapter": {"rank": 4, "targets": ["o_proj"]}}),
        (["full_attention", "sliding_attention"], {}),
        ([*["sliding_attention"] * 3, "full_attention"], {"memory__checkpointing": False}),
    ],
    ids=["one layer", "two", "four, all kept"],
)
def test_blocks_of_several_kinds_are_extrapolated_from_a_pair_of_repetitions(
    kinds: list[str], changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A window that is shorter than the text keeps its mask."""
    types = kinds * 6
    sizes = SIZES | {"num_hidden_layers": len(types), "layer_types": types, "sliding_window": 16, "head_dim": 16}
    config = AutoConfig.for_model("gemma3_text", **sizes)
    assert_extrapolated(*drawn_and_whole(a_recipe(**changes), "cuda", monkeypatch, config))


def test_components_are_those_of_the_formats() -> None:
    recipe = a_recipe(train__optimizer="adamw")
    config = a_config(num_hidden_layers=3, tie_word_embeddings=False)
    found = plan(recipe, config=config).components
    shapes = [(64, 64), (32, 64), (32, 64), (64, 64), (128, 64), (128, 64), (64, 128)]
    weights = 3 * sum(out * in_ for out, in_ in shapes)
    rows = 3 * sum(out for out, _ in shapes)
    lora = 3 * 4 * sum(out + in_ for out, in_ in shapes)
    assert found[parts.BASE] == weights // 2
    blocks = weights // 64
    nested = 3 * sum(-(-out * in_ // 64 // 256) for out, in_ in shapes)
    assert found[parts.SCALES] == blocks + 4 * nested + 3 * len(shapes) * (256 + 1) * 4
    # Embedding, head and norms in bf16, and the two float32 buffers of the rotary frequencies.
    assert 0 < found[parts.DENSE] - 2 * (2 * 512 * 64 + 7 * 64) <= 2 * 4 * 16
    assert found[parts.ADAPTERS] == 2 * lora + 8 * rows  # bf16 factors; magnitude and ||W||^2 of each row
    # Norm, gain, 1 / m and s g of each row; s g B in bf16; a decoded scale a block.
    assert found[parts.KEPT] == 16 * rows + 2 * 4 * rows + 4 * blocks
    without = plan(a_recipe(train__optimizer="adamw", memory__keep_scales=False), config=config).components
    assert found[parts.KEPT] - without[parts.KEPT] == 4 * blocks
    # Two float32 states a parameter, and the low half of each bf16 one.
    assert found[parts.OPTIMIZER] == 8 * (lora + rows) + 2 * lora
    # Ids and mask of 2 rows of 64 tokens; row, column and target of each label; a step count of each flat tensor.
    assert found[parts.OTHER] == 8 * (2 * 2 * 64 + 3 * 2 * 63) + 2 * 4


@pytest.mark.parametrize("quant", ["nf4", "none"])
def test_a_pruned_base_has_a_bit_for_each_weight_and_stays_where_it_is(quant: str) -> None:
    half = {"method": "magnitude", "sparsity": 0.5}
    base, one = {"base__quant": quant, "adapter__targets": ["q_proj"]}, a_config(num_hidden_layers=1)
    whole = plan(a_recipe(**base), config=one)
    pruned = plan(a_recipe(**base, base__prune=half), config=one)
    masked = plan(a_recipe(**base, base__prune=half, adapter__mask="keep"), config=one)
    shapes = [(64, 64), (32, 64), (32, 64), (64, 64), (128, 64), (128, 64), (64, 128)]
    bits = pruned.num_blocks * sum(out * in_ // 8 for out, in_ in shapes)
    assert {**pruned.components, parts.SLACK: 0} == {**whole.components, parts.MASKS: bits, parts.SLACK: 0}
    assert masked.components[parts.MASKS] == bits
    assert pruned.block_bytes == 0
    assert not any(
        "residency" in change.setting for change in plan(a_recipe(**base, base__prune=half), 1, config=one).changes
    )


def test_a_pattern_is_found_where_it_saves_something() -> None:
    assert find_pattern(["a"] * 9) is None
    assert find_pattern(["a"] * 80) == BlockPattern(0, 1, 80, 0)
    assert find_pattern(["d"] * 3 + ["m"] * 58) == BlockPattern(3, 1, 58, 0)
    six = [*"sssssf"] * 10 + [*"ss"]
    assert find_pattern(six) == BlockPattern(0, 6, 10, 2)
    assert find_pattern([str(index) for index in range(60)]) is None
    pattern = BlockPattern(1, 2, 6, 1)
    assert pattern.num_blocks == 14
    assert pattern.num_kept == 2
    assert pattern.kept(2) == [0, 1, 2, 11, 12, 13]
    assert pattern.kept(3) == [0, 1, 2, 3, 4, 11, 12, 13]
    assert BlockPattern(1, 1, 6, 0).kept(4) == [0, 1, 2, 5, 6]


def test_drawing_out_is_linear_and_needs_the_same_moments() -> None:
    short = [Moment("forward", 0, {"x": 10}), Moment("forward", 3, {"x": 40, "y": 1})]
    longer = [Moment("forward", 0, {"x": 11}), Moment("forward", 4, {"x": 50})]
    found = extrapolated(short, longer, BlockPattern(0, 1, 10, 0))
    assert found == [Moment("forward", 0, {"x": 16}), Moment("forward", 9, {"x": 100, "y": -5})]
    with pytest.raises(ValueError, match="forward of block 4"):
        extrapolated(short, longer[:1], BlockPattern(0, 1, 10, 0))


def test_a_plan_says_what_to_change_cheapest_first() -> None:
    targets = {"adapter__targets": ["q_proj"]}
    recipe = a_recipe(memory__checkpointing=False, train__micro_batch_tokens=256, train__optimizer="adamw", **targets)
    config = a_config(vocab_size=32000, num_hidden_layers=2)
    first = plan(recipe, config=config)
    assert (first.fits, first.changes) == (None, ())
    tight = plan(recipe, first.peak_bytes - 100_000, config=config)
    assert tight.fits is False
    assert len(tight.changes) == 1
    less = plan(recipe, 1, config=config)
    settings = [change.setting for change in less.changes]
    assert "memory.checkpointing=true" in settings
    assert any(setting.startswith("train.micro_batch_tokens=") for setting in settings)
    assert [change.neutral for change in less.changes] == sorted((c.neutral for c in less.changes), reverse=True)
    peaks = [first.peak_bytes, *(change.peak_bytes for change in less.changes)]
    assert peaks == sorted(peaks, reverse=True)


def test_more_than_one_micro_batch_has_gradients_beside_the_activations() -> None:
    targets, config = {"adapter__targets": ["q_proj"]}, a_config(num_hidden_layers=2)
    one, two = (plan(a_recipe(train__batch=batch, **targets), config=config) for batch in (2, 4))
    assert (one.num_micro_batches, two.num_micro_batches) == (1, 2)
    backward = [
        next(m for m in each.moments if (m.phase, m.block) == ("backward", 1)).by_component for each in (one, two)
    ]
    assert backward[0].get(parts.GRADIENTS, 0) < backward[1][parts.GRADIENTS]


def test_a_tied_head_is_the_embedding() -> None:
    recipe, config = a_recipe(adapter__targets=["q_proj"]), a_config(num_hidden_layers=1, tie_word_embeddings=True)
    tied, untied = (plan(recipe, config=each) for each in (config, a_config(num_hidden_layers=1)))
    assert untied.components[parts.DENSE] - tied.components[parts.DENSE] == 2 * 512 * 64


def test_biases_and_other_models_are_planned() -> None:
    config = Qwen2Config(**SIZES, num_hidden_layers=2)
    found = plan(a_recipe(), config=config)
    assert found.num_blocks == 2
    assert isinstance(found, Plan)


def test_assumed_micro_batches() -> None:
    (shape,), count = assumed_workload(a_recipe())
    assert (shape, count) == (MicroBatchShape(2, 64, 126, masked=True, accumulated=True), 2)
    (shape,), count = assumed_workload(a_recipe(train__micro_batch_tokens=64))
    assert (shape, count) == (MicroBatchShape(1, 64, 63, masked=False, accumulated=True), 4)


def a_batch(rows: int, length: int) -> MicroBatch:
    ids = torch.zeros(rows, length, dtype=torch.int64)
    return MicroBatch(ids, torch.ones_like(ids), ids, torch.zeros(rows, dtype=torch.int64), ["mix"], ["0"] * rows)


class Steps:
    """A loader of given micro-batches."""

    def __init__(self, *steps: list[MicroBatch]) -> None:
        self.steps, self.position = steps, 0

    def next_step(self) -> SimpleNamespace:
        self.position += 1
        return SimpleNamespace(micro_batches=self.steps[self.position - 1])


def test_the_longest_example_of_a_long_run_is_planned(tmp_path: Path) -> None:
    lines = [{"prompt": f"{index} + 1 =", "completion": f" {index + 1}"} for index in range(1500)]
    lines[700] = {"prompt": "a b " * 200, "completion": " c d" * 20}
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    recipe = a_recipe(
        data={"mix": [{"source": f"{tmp_path}/x.jsonl"}], "max_length": 2048}, train={"epochs": 1, "batch": 2}
    )
    tokenizer = tiny_tokenizer.make()
    mix = tokenized_mix(recipe, tokenizer, read_data(recipe.data)[0])
    shapes, _ = workload_of_data(recipe, mix, tokenizer)(recipe)
    loader = make_loader(recipe, mix, tokenizer)
    steps = [loader.next_step().micro_batches for _ in range(num_steps_of(recipe, loader))]
    lengths = [max(batch.input_ids.shape[1] for batch in batches) for batches in steps]
    assert max(lengths) > max(lengths[:200])
    assert max(shape.length for shape in shapes) == max(lengths)


def test_scores_of_eager_attention_are_planned_without_a_mask_too() -> None:
    padded = MicroBatchShape(8, 256, 2000, masked=True)
    long = MicroBatchShape(1, 2000, 1990, masked=False)
    assert not_exceeded([padded, long]) == [padded, long]
    assert not_exceeded([padded, replace(long, length=700, num_labels=690)]) == [padded]


def test_gradients_of_earlier_micro_batches_are_there_in_the_later_ones_of_a_step() -> None:
    steps = [[a_batch(4, 9), a_batch(2, 9)], [a_batch(3, 9)], [a_batch(1, 9), a_batch(3, 9), a_batch(1, 4)]]
    found, most = largest_shapes(Steps(*steps), range(3))  # type: ignore[arg-type]
    assert most == 3
    assert found == [
        MicroBatchShape(4, 9, 32, masked=False),
        MicroBatchShape(3, 9, 24, masked=False, accumulated=True),
    ]
    recipe, config = a_recipe(adapter__targets=["q_proj"]), a_config(num_hidden_layers=2)
    few = plan(recipe, config=config, workload=lambda _recipe: ([found[0]], 3))
    more = replace(found[0], accumulated=True)
    many = plan(recipe, config=config, workload=lambda _recipe: ([more], 3))
    assert many.tensor_bytes > few.tensor_bytes


def test_an_adapter_to_go_on_from_has_its_own_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(a_config())
    inject(model, rank=4, targets=["q_proj", "up_proj"], rank_pattern={"up_proj": 8})
    save_adapter(model, tmp_path / "adapter", base_name_or_path="x", revision=None, base_quant={"quant": "none"})
    recipe = a_recipe(
        adapter={"kind": "dora", "resume_from": str(tmp_path / "adapter")},
        base__quant="none",
        memory__checkpointing=False,
    )
    drawn, whole = drawn_and_whole(recipe, "cpu", monkeypatch)
    assert drawn.num_trainable == whole.num_trainable == 10 * (4 * 128 + 64 + 8 * (64 + 128) + 128)
    assert drawn.components == whole.components


@pytest.mark.slow
def test_decoded_scales_are_given_up_before_anything_costs_time() -> None:
    """They take 4 bytes for 64 weights of the adapted layers; a base of 16 bits and a streamed one keep none."""
    config = a_config()
    weights = 10 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128)
    whole = plan(a_recipe(), config=config)
    found = plan(a_recipe(), whole.peak_bytes - 1, config=config)
    assert [(change.setting, change.neutral) for change in found.changes] == [("memory.keep_scales=false", True)]
    saved = whole.tensor_bytes - plan(a_recipe(memory__keep_scales=False), config=config).tensor_bytes
    assert saved == 4 * weights // 64
    for base in ({"base__quant": "none"}, {"base__residency": "host"}):
        assert not any("keep_scales" in change.setting for change in plan(a_recipe(**base), 1, config=config).changes)
