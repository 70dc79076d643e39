"""The memory plan: live bytes and components against counts by hand, a shortened model against the whole one."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen2Config

from qdora.data.batching import MicroBatch
from qdora.data.build_data import make_loader, num_steps_of, read_data, tokenized_mix
from qdora.model.adapter_file import save_adapter
from qdora.model.inject import inject
from qdora.plan import memory_plan
from qdora.plan import plan_contents as parts
from qdora.plan.block_pattern import BlockPattern, extrapolated, find_pattern
from qdora.plan.live_bytes import LiveBytes
from qdora.plan.memory_plan import plan
from qdora.plan.plan_contents import DeviceKind, MicroBatchShape, Moment, Plan
from qdora.plan.workload import assumed_workload, largest_shapes, not_exceeded, workload_of_data
from qdora.quant.packed import empty_packed
from qdora.recipe.recipe_file import recipe_from
from qdora.recipe.settings import Recipe
from tests import support

SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
SHAPES = [(64, 64), (32, 64), (32, 64), (64, 64), (128, 64), (128, 64), (64, 128)]
"""(out, in) of the linear layers of a block."""


def a_recipe(**changes: Any) -> Recipe:
    document: dict[str, Any] = {
        "model": {"source": "org/model", "dtype": "bfloat16"},
        "adapter": {"rank": 4},
        "data": {"mix": [{"source": "org/data"}], "max_length": 64},
        "train": {"steps": 2, "batch": 4, "micro_batch_tokens": 128},
    }
    for name, value in changes.items():
        section, _, key = name.partition("__")
        if not key:
            document[section] = value
        elif value is ...:
            del document[section][key]
        else:
            document.setdefault(section, {})[key] = value
    return recipe_from(document)


def a_config(**changes: Any) -> PreTrainedConfig:
    return LlamaConfig(**(SIZES | {"num_hidden_layers": 10} | changes))


@pytest.fixture(params=["real", "fake"])
def live(request: pytest.FixtureRequest) -> Iterator[LiveBytes]:
    """A counter that is active, on tensors of both kinds."""
    with FakeTensorMode() if request.param == "fake" else contextlib.nullcontext(), LiveBytes() as counter:
        yield counter


def test_a_storage_counts_once_with_its_size_until_its_last_view_dies(live: LiveBytes) -> None:
    first = torch.empty(100)
    alias = first.view(10, 10)[3:].detach()
    del first
    assert live.live_bytes == 400
    half = alias.to(torch.bfloat16)  # 70 elements of 2 bytes
    assert live.live_bytes == 540
    del alias
    assert live.live_bytes == 140
    del half
    assert (live.live_bytes, live.peak_bytes) == (0, 540)
    total, other = torch.zeros(8, 8), torch.ones(8, 8)
    live.reset_peak()
    total.add_(other)
    torch.mm(total, other, out=total)
    total[2:4].copy_(other[:2])
    assert live.live_bytes == live.peak_bytes == 512  # writes in place are no new memory
    buffer = torch.empty(0)
    torch.mm(total, other, out=buffer)  # resized by the operation
    assert live.live_bytes == 768
    buffer.untyped_storage().resize_(0)  # as sharded training does; no operation of torch's
    assert live.live_bytes == 512
    values, indices = torch.empty(6, 5).sort()  # 30 float32 and 30 int64, the input gone
    pieces = torch.split(values, 2)
    assert live.live_bytes == 512 + 360
    del values, indices
    assert live.live_bytes == 512 + 120
    live.register(torch.empty(100, device="meta") + 1.0, "other")
    del pieces
    assert live.live_bytes == 512


class _Workspace(torch.autograd.Function):
    """Doubles; needs 5 times its input while it runs forward, 9 times backward, and saves what nobody else holds."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        torch.empty(5 * x.numel())
        ctx.save_for_backward(torch.empty(3 * x.numel()))
        return 2 * x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        torch.empty(9 * grads[0].numel())
        return 2 * grads[0]


def test_what_autograd_saves_lives_until_the_backward_pass(live: LiveBytes) -> None:
    x = torch.ones(25, requires_grad=True)  # 100 bytes
    y = _Workspace.apply(x)  # type: ignore[no-untyped-call]
    assert (live.peak_bytes, live.live_bytes) == (100 + 500, 100 + 300 + 100)
    ones = torch.ones(25)
    live.reset_peak()
    assert live.peak_bytes == 600
    y.backward(ones)
    assert live.peak_bytes == 600 + 900
    assert live.live_bytes == 400  # x, y, ones, the gradient; what was saved is gone
    del y, ones
    kept = checkpoint(lambda x: x.sin().exp(), x, use_reentrant=False)
    assert live.live_bytes == 300  # the checkpoint keeps its input only
    del kept


def test_registered_tensors_and_labels_tell_what_is_alive_at_the_peak(live: LiveBytes) -> None:
    with live.label("ignored"):
        frozen = nn.BatchNorm1d(4).requires_grad_(False)  # 16 float32 and one int64
    other = LiveBytes()
    with other:
        frozen.weight.view(2, 2).mul_(2.0)
        assert other.live_bytes == 0
        other.register([*frozen.parameters(), *frozen.buffers(), frozen.bias.view(2, 2)], "base")
        assert other.live_bytes == other.peak_bytes == 16 * 4 + 8
        other.register(frozen.bias, "adapter")
        assert other.live_by_label == {"base": 56, "adapter": 16}
    del frozen
    assert (other.live_bytes, other.live_by_label) == (0, {})
    with live.label("base"):
        base = torch.empty(100)
        with live.label("adapter"):
            adapter = torch.empty(10)
        base2 = torch.empty(1)
    kept, large = torch.empty(3), []
    with contextlib.suppress(ValueError), live.label("workspace"):
        large.append(torch.empty(50))
        raise ValueError
    peak = {"base": 404, "adapter": 40, "other": 12, "workspace": 200}
    assert live.peak_by_label == peak
    del large
    after = torch.empty(2)  # a label ends with its block, also by an error
    assert live.live_by_label == {"base": 404, "adapter": 40, "other": 20}
    assert live.peak_by_label == peak
    del base, base2, adapter, kept, after
    assert live.live_by_label == {}


def test_packed_tensors_and_real_inputs_of_a_fake_operation() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = torch.empty(100)
    with LiveBytes() as live:
        picked = fake[torch.arange(10)]  # 40 bytes, fake
        assert (live.live_bytes, picked.nbytes) == (40, 40)
        live.register(torch.ones(2, 2).to_sparse(), "passed over")
    with FakeTensorMode(), LiveBytes() as live:
        packed = empty_packed("nf4", (64, 128))
        # Half a byte a weight; a byte for each of 128 blocks, one nested scale, 256 of the code book, one offset.
        assert live.live_bytes == packed.num_bytes == 4096 + 128 + 4 + 1024 + 4


def assert_extrapolated(
    recipe: Recipe, config: PreTrainedConfig, device_kind: DeviceKind, monkeypatch: pytest.MonkeyPatch
) -> Plan:
    """The plan extrapolated from few blocks is that in which all blocks are measured; returns it."""
    drawn = plan(recipe, config=config, device_kind=device_kind)
    monkeypatch.setattr(memory_plan, "find_pattern", lambda signatures: None)
    memory_plan._latest.clear()  # else it would be the same plan
    whole = plan(recipe, config=config, device_kind=device_kind)
    found = {(moment.phase, moment.block): moment.by_component for moment in whole.moments}
    assert len(drawn.moments) < len(whole.moments)
    for moment in drawn.moments:
        assert found[moment.phase, moment.block] == moment.by_component, moment.name
    assert (drawn.peak.num_bytes, drawn.num_trainable) == (whole.peak.num_bytes, whole.num_trainable)
    return drawn


KEPT = {"memory__checkpointing": False}
slow = pytest.mark.slow


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"adapter__targets": ["down_proj"]}, id="one layer"),
        pytest.param(KEPT | {"base__quant": "none", "adapter": {"kind": "lora", "targets": ["up_proj"]}}, id="kept"),
        pytest.param({}, marks=slow, id="checkpointed"),
        pytest.param(KEPT | {"adapter__kind": "lora", "train__optimizer": "adamw"}, marks=slow, id="all kept"),
        pytest.param({"adapter__dropout": 0.1, "data__packing": True, "base__quant": "int8"}, marks=slow, id="packed"),
        pytest.param({"base__quant": "none", "adapter": {"kind": "full"}}, marks=slow, id="full"),
    ],
)
def test_a_shortened_model_is_extrapolated(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert_extrapolated(a_recipe(**changes), a_config(), "cuda", monkeypatch)


@slow
@pytest.mark.parametrize(
    ("kinds", "changes"),
    [("sf", {"adapter__targets": ["o_proj"]}), ("fs", {}), ("sssf", KEPT)],
    ids=["one layer", "two", "four, all kept"],
)
def test_blocks_of_several_kinds(kinds: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A window that is shorter than the text keeps its mask."""
    types = [{"s": "sliding_attention", "f": "full_attention"}[kind] for kind in kinds * 6]
    sizes = SIZES | {"num_hidden_layers": len(types), "layer_types": types, "sliding_window": 16, "head_dim": 16}
    assert_extrapolated(a_recipe(**changes), AutoConfig.for_model("gemma3_text", **sizes), "cuda", monkeypatch)


def test_an_adapter_to_go_on_from_has_its_own_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(a_config())
    inject(model, rank=4, targets=["q_proj", "up_proj"], rank_pattern={"up_proj": 8})
    save_adapter(model, tmp_path / "adapter", base_name_or_path="x", revision=None, base_quant={"quant": "none"})
    adapter = {"kind": "dora", "resume_from": str(tmp_path / "adapter")}
    drawn = assert_extrapolated(a_recipe(adapter=adapter, base__quant="none", **KEPT), a_config(), "cpu", monkeypatch)
    assert drawn.num_trainable == 10 * (4 * 128 + 64 + 8 * (64 + 128) + 128)


def test_a_pattern_is_found_where_it_saves_something() -> None:
    assert find_pattern(["a"] * 9) is None
    assert find_pattern([str(index) for index in range(60)]) is None
    assert find_pattern(["a"] * 80) == BlockPattern(0, 1, 80, 0)
    assert find_pattern(["d"] * 3 + ["m"] * 58) == BlockPattern(3, 1, 58, 0)
    assert find_pattern([*"sssssf"] * 10 + [*"ss"]) == BlockPattern(0, 6, 10, 2)
    pattern = BlockPattern(1, 2, 6, 1)
    assert (pattern.num_blocks, pattern.num_kept) == (14, 2)
    assert (pattern.kept(2), pattern.kept(3)) == ([0, 1, 2, 11, 12, 13], [0, 1, 2, 3, 4, 11, 12, 13])
    assert BlockPattern(1, 1, 6, 0).kept(4) == [0, 1, 2, 5, 6]
    short = [Moment("forward", 0, {"x": 10}), Moment("forward", 3, {"x": 40, "y": 1})]
    longer = [Moment("forward", 0, {"x": 11}), Moment("forward", 4, {"x": 50})]
    found = extrapolated(short, longer, BlockPattern(0, 1, 10, 0))
    assert found == [Moment("forward", 0, {"x": 16}), Moment("forward", 9, {"x": 100, "y": -5})]
    with pytest.raises(ValueError, match="forward of block 4"):
        extrapolated(short, longer[:1], BlockPattern(0, 1, 10, 0))


def test_components_are_those_of_the_formats() -> None:
    recipe = a_recipe(train__optimizer="adamw")
    config = a_config(num_hidden_layers=3, tie_word_embeddings=False)
    found = plan(recipe, config=config).components
    weights, rows = 3 * sum(out * in_ for out, in_ in SHAPES), 3 * sum(out for out, _ in SHAPES)
    lora = 3 * 4 * sum(out + in_ for out, in_ in SHAPES)
    assert found[parts.BASE] == weights // 2
    blocks = weights // 64
    nested = 3 * sum(-(-out * in_ // 64 // 256) for out, in_ in SHAPES)
    assert found[parts.SCALES] == blocks + 4 * nested + 3 * len(SHAPES) * (256 + 1) * 4
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
    tied = plan(recipe, config=a_config(num_hidden_layers=3, tie_word_embeddings=True)).components
    assert found[parts.DENSE] - tied[parts.DENSE] == 2 * 512 * 64
    assert plan(a_recipe(), config=Qwen2Config(**SIZES, num_hidden_layers=2)).num_blocks == 2  # biases


@pytest.mark.parametrize("quant", ["nf4", "none"])
def test_a_pruned_base_has_a_bit_for_each_weight_and_stays_where_it_is(quant: str) -> None:
    half = {"base__prune": {"method": "magnitude", "sparsity": 0.5}}
    base, one = {"base__quant": quant, "adapter__targets": ["q_proj"]}, a_config(num_hidden_layers=1)
    whole, pruned, masked = (
        plan(a_recipe(**base, **more), config=one) for more in ({}, half, half | {"adapter__mask": "keep"})
    )
    bits = sum(out * in_ // 8 for out, in_ in SHAPES)
    assert {**pruned.components, parts.SLACK: 0} == {**whole.components, parts.MASKS: bits, parts.SLACK: 0}
    assert (masked.components[parts.MASKS], pruned.block_bytes) == (bits, 0)
    changes = plan(a_recipe(**base, **half), 1, config=one).changes
    assert not any("residency" in change.setting for change in changes)


def test_a_plan_says_what_to_change_cheapest_first() -> None:
    changes: dict[str, Any] = KEPT | {"train__micro_batch_tokens": 256, "train__optimizer": "adamw"}
    recipe, config = a_recipe(**changes, adapter__targets=["q_proj"]), a_config(vocab_size=32000, num_hidden_layers=2)
    first = plan(recipe, config=config)
    assert (first.fits, first.changes) == (None, ())
    tight = plan(recipe, first.peak_bytes - 100_000, config=config)
    assert (tight.fits, len(tight.changes)) == (False, 1)
    less = plan(recipe, 1, config=config)
    settings = [change.setting for change in less.changes]
    assert "memory.checkpointing=true" in settings
    assert any(setting.startswith("train.micro_batch_tokens=") for setting in settings)
    assert [change.neutral for change in less.changes] == sorted((c.neutral for c in less.changes), reverse=True)
    peaks = [first.peak_bytes, *(change.peak_bytes for change in less.changes)]
    assert peaks == sorted(peaks, reverse=True)


@slow
def test_decoded_scales_are_given_up_before_anything_costs_time() -> None:
    """They take 4 bytes for 64 weights of the adapted layers; a base of 16 bits and a streamed one keep none."""
    config = a_config()
    whole = plan(a_recipe(), config=config)
    found = plan(a_recipe(), whole.peak_bytes - 1, config=config)
    assert [(change.setting, change.neutral) for change in found.changes] == [("memory.keep_scales=false", True)]
    saved = whole.tensor_bytes - plan(a_recipe(memory__keep_scales=False), config=config).tensor_bytes
    assert saved == 4 * 10 * sum(out * in_ for out, in_ in SHAPES) // 64
    for base in ({"base__quant": "none"}, {"base__residency": "host"}):
        assert not any("keep_scales" in change.setting for change in plan(a_recipe(**base), 1, config=config).changes)


def test_assumed_micro_batches_and_their_gradients() -> None:
    (shape,), count = assumed_workload(a_recipe())
    assert (shape, count) == (MicroBatchShape(2, 64, 126, masked=True, accumulated=True), 2)
    (shape,), count = assumed_workload(a_recipe(train__micro_batch_tokens=64))
    assert (shape, count) == (MicroBatchShape(1, 64, 63, masked=False, accumulated=True), 4)
    config = a_config(num_hidden_layers=2)
    one, two = (plan(a_recipe(train__batch=batch, adapter__targets=["q_proj"]), config=config) for batch in (2, 4))
    assert (one.num_micro_batches, two.num_micro_batches) == (1, 2)
    backward = [
        next(m for m in each.moments if (m.phase, m.block) == ("backward", 1)).by_component for each in (one, two)
    ]
    assert backward[0].get(parts.GRADIENTS, 0) < backward[1][parts.GRADIENTS]
    padded, long = MicroBatchShape(8, 256, 2000, masked=True), MicroBatchShape(1, 2000, 1990, masked=False)
    assert not_exceeded([padded, long]) == [padded, long]  # scores of eager attention without a mask, too
    assert not_exceeded([padded, replace(long, length=700, num_labels=690)]) == [padded]


def test_gradients_of_earlier_micro_batches_are_there_in_the_later_ones_of_a_step() -> None:
    def a_batch(rows: int, length: int) -> MicroBatch:
        ids = torch.zeros(rows, length, dtype=torch.int64)
        return MicroBatch(ids, torch.ones_like(ids), ids, torch.zeros(rows, dtype=torch.int64), ["mix"], ["0"] * rows)

    steps = [[a_batch(4, 9), a_batch(2, 9)], [a_batch(3, 9)], [a_batch(1, 9), a_batch(3, 9), a_batch(1, 4)]]
    loader: Any = SimpleNamespace(position=0)
    loader.next_step = lambda: SimpleNamespace(micro_batches=steps[loader.position])
    found, most = largest_shapes(loader, range(3))
    assert most == 3
    assert found == [
        MicroBatchShape(4, 9, 32, masked=False),
        MicroBatchShape(3, 9, 24, masked=False, accumulated=True),
    ]


def test_the_longest_example_of_a_long_run_is_planned(tmp_path: Path) -> None:
    lines = [{"prompt": f"{index} + 1 =", "completion": f" {index + 1}"} for index in range(1500)]
    lines[700] = {"prompt": "a b " * 200, "completion": " c d" * 20}
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = {"mix": [{"source": f"{tmp_path}/x.jsonl"}], "max_length": 2048}
    recipe = a_recipe(data=data, train={"epochs": 1, "batch": 2})
    tokenizer = support.tokenizer()
    mix = tokenized_mix(recipe, tokenizer, read_data(recipe.data)[0])
    shapes, _ = workload_of_data(recipe, mix, tokenizer)(recipe)
    loader = make_loader(recipe, mix, tokenizer)
    steps = [loader.next_step().micro_batches for _ in range(num_steps_of(recipe, loader))]
    lengths = [max(batch.input_ids.shape[1] for batch in batches) for batches in steps]
    assert max(shape.length for shape in shapes) == max(lengths) > max(lengths[:200])
