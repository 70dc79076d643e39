"""Plans with blocks that are not on the device: sizes by hand, and as many of them proposed as it takes to fit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from qdora.errors import UserError
from qdora.memory import activation_offload
from qdora.memory.activation_offload import PinnedPages, pages_bytes
from qdora.memory.host_residency import HostResidency
from qdora.model.inject import adapted_layers
from qdora.model.load import Quantization, load_model
from qdora.model.source import resolve
from qdora.plan import plan_contents as parts
from qdora.plan.changes_to_fit import with_changes
from qdora.plan.fake_step import empty_model
from qdora.plan.live_bytes import LiveBytes
from qdora.plan.memory_plan import StreamedBlocks, plan, streamed_blocks, with_offloaded, with_streamed
from qdora.plan.plan_contents import MicroBatchShape, Moment, Plan
from qdora.recipe.recipe_file import recipe_from
from qdora.recipe.settings import Recipe
from tests import tiny, tiny_streamed
from tests.test_memory_host_residency import LateCopies

HIDDEN, INNER, KV, NUM_BLOCKS = 64, 128, 32, 10
CONFIG = LlamaConfig(
    vocab_size=512,
    hidden_size=HIDDEN,
    intermediate_size=INNER,
    num_hidden_layers=NUM_BLOCKS,
    num_attention_heads=4,
    num_key_value_heads=2,
)
WEIGHTS = [HIDDEN * HIDDEN, KV * HIDDEN, KV * HIDDEN, HIDDEN * HIDDEN, *(3 * [INNER * HIDDEN])]
CODES = sum(WEIGHTS) // 2
# Double quantisation: a byte for 64 weights, a float32 for 256 of those, the code book and the offset.
SCALES = sum(each // 64 + 4 * -(-each // 64 // 256) + 4 * 256 + 4 for each in WEIGHTS)


def blocks(count: int | None) -> StreamedBlocks:
    model = empty_model(CONFIG, tiny.source(), torch.bfloat16, "sdpa")
    return streamed_blocks(model, Quantization("nf4", 64, True, ("lm_head",)), count)


def a_recipe(**base: Any) -> Recipe:
    return recipe_from(
        {
            "model": {"source": "org/model", "dtype": "bfloat16"},
            "base": base,
            "adapter": {"rank": 4, "targets": ["q_proj"]},
            "data": {"mix": [{"source": "org/data"}], "max_length": 64},
            "train": {"steps": 2, "batch": 1, "micro_batch_tokens": 64},
            "memory": {"loss_chunk": 64},
        }
    )


@pytest.mark.parametrize("count", [1, 3, None])
def test_sizes_are_those_of_the_formats(count: int | None) -> None:
    found, number = blocks(count), count or NUM_BLOCKS
    assert (found.num_streamed, found.codes, found.scales) == (number, number * CODES, number * SCALES)
    # A piece starts each tensor at a multiple of 256 bytes.
    assert CODES + SCALES <= found.block_bytes < CODES + SCALES + 7 * 5 * 256
    assert found.block_bytes % 256 == 0
    assert found.host_bytes == number * found.block_bytes


def test_more_blocks_than_the_model_has() -> None:
    with pytest.raises(UserError, match=r"base\.streamed_blocks: must be at most the model's 10 blocks, got 11"):
        blocks(NUM_BLOCKS + 1)


def test_a_plan_has_the_streamed_blocks_in_their_slots_alone() -> None:
    whole, streamed = (
        plan(recipe, config=CONFIG) for recipe in (a_recipe(), a_recipe(residency="host", streamed_blocks=7))
    )
    assert whole.host_bytes == 0
    assert streamed.host_bytes == blocks(7).host_bytes
    expected = dict(whole.components)
    # No layer keeps decoded scales: of the ten that are adapted, four bytes for 64 weights.
    expected[parts.KEPT] -= NUM_BLOCKS * 4 * (HIDDEN * HIDDEN // 64)
    expected[parts.BASE] -= 7 * CODES
    expected[parts.SCALES] -= 7 * SCALES
    expected[parts.STREAMING] = 2 * whole.block_bytes
    found = dict(streamed.components)
    assert found.pop(parts.SLACK) < expected.pop(parts.SLACK)
    assert found == expected
    assert whole.step_seconds is not None
    assert streamed.step_seconds is not None
    assert streamed.step_seconds >= whole.step_seconds


def test_a_counted_run_saves_what_the_plan_says(tmp_path: Path) -> None:
    source = tiny_streamed.write_source(tmp_path, hidden_size=256, intermediate_size=512, head_dim=64)
    peaks = []
    for placer in (None, HostResidency(4, copies=LateCopies)):
        with LiveBytes() as live:
            model = load_model(resolve(str(source)), quant="nf4", compute_dtype=torch.float32, placer=placer)
            tiny_streamed.adapt(model)
            for layer in adapted_layers(model).values():
                layer.keeps_scales = False  # as in a run with a streamed base
            live.reset_peak()
            tiny_streamed.gradients(model)
            peaks.append(live.peak_bytes)
    sizes = streamed_blocks(empty_model(model.config, tiny.source(), torch.float32, "sdpa"), tiny_streamed.WANTED, 4)
    saved = sizes.codes + sizes.scales - 2 * sizes.block_bytes
    # The layers of a base that has just been quantised share one code book of 1 KiB; a piece holds one for each.
    saved -= 4 * 7 * 1024
    assert peaks[0] - peaks[1] == saved


def test_checkpoints_on_the_host_leave_three_on_the_device() -> None:
    each = 3000
    keeps = [Moment("forward", block, {parts.CHECKPOINTS: (block + 1) * each, parts.BASE: 7}) for block in range(5)]
    found, host = with_offloaded([*keeps, Moment("update", None, {parts.BASE: 7})], 5)
    assert [moment.by_component.get(parts.CHECKPOINTS, 0) for moment in found] == [3000, 6000, 9000, 9000, 9000, 0]
    assert all(moment.by_component[parts.BASE] == 7 for moment in found)
    assert host == 16 << 20  # 4 pages of 2 MiB, which are taken 8 at a time


@pytest.mark.parametrize("num_bytes, count", [(3000, 4), (16 << 20, 31), (17_203_200, 31), ((16 << 20) + 1, 3), (1, 0)])
def test_planned_pinned_memory_is_what_the_pages_take(
    num_bytes: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = []

    def pinned(size: int) -> torch.Tensor:
        taken.append(size)
        return torch.empty(size, dtype=torch.uint8, device="meta")

    monkeypatch.setattr(activation_offload, "_pinned", pinned)
    pages = PinnedPages()
    for _ in range(count):
        pages.take(num_bytes)
    assert pages_bytes(num_bytes, count) == sum(taken)


def planned(budget: int, others: int) -> tuple[Recipe, Plan, list[Recipe]]:
    """Changes for a model that has its base and `others` bytes of other things, with the real sizes of its blocks."""
    asked: list[Recipe] = []
    sizes = blocks(None)
    before = {parts.BASE: sizes.codes, parts.SCALES: sizes.scales, parts.OTHER: others}
    shape = MicroBatchShape(1, 64, 63, masked=False)
    common = {"block_bytes": sizes.block_bytes, "num_blocks": NUM_BLOCKS, "budget_bytes": budget, "step_seconds": 1.0}
    moments = [Moment("forward", 0, before)]
    first = Plan(device_kind="cuda", moments=moments, shape=shape, num_micro_batches=1, **common)  # type: ignore[arg-type]

    def plan_of(recipe: Recipe) -> Plan:
        asked.append(recipe)
        if recipe.base.residency == "device":
            return first
        away = blocks(recipe.base.streamed_blocks)
        return replace(first, moments=with_streamed(first.moments, away))

    changed, found = with_changes(a_recipe(), first, plan_of, lambda _recipe: 1.0)
    return changed, found, asked


def test_as_many_blocks_are_proposed_as_it_takes() -> None:
    budget = parts.CONTEXT_BYTES["cuda"] + 5 * (CODES + SCALES) + 100_000
    changed, found, _ = planned(budget, 0)
    (change,) = [each for each in found.changes if "residency" in each.setting]
    assert change.neutral
    assert change.peak_bytes <= budget
    count = changed.base.streamed_blocks
    assert count is not None
    assert change.setting == f"base.residency=host, base.streamed_blocks={count}"
    # The slots take two blocks, so seven away are what five in all leave room for, and the next ones for the rest.
    fewer = blocks(count - 1)
    others = budget - parts.CONTEXT_BYTES["cuda"]
    left = (NUM_BLOCKS - count + 1) * (CODES + SCALES) + 2 * fewer.block_bytes
    assert left * (1 + parts.SLACK_SHARE["cuda"]) > others


def test_all_blocks_where_even_that_is_too_little() -> None:
    changed, found, asked = planned(parts.CONTEXT_BYTES["cuda"], 10**9)
    assert changed.base.streamed_blocks == NUM_BLOCKS
    assert found.changes[0].peak_bytes > parts.CONTEXT_BYTES["cuda"]
    assert len(asked) < 12
