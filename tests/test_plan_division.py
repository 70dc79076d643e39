"""Plans of a base that is not whole on the device: divided among processes, or with blocks streamed from the host."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rich.console import Console
from transformers import AutoConfig, LlamaConfig
from typer.testing import CliRunner

from qdora.cli import app
from qdora.errors import UserError
from qdora.memory.stream import HostResidency
from qdora.model.inject import adapted_layers
from qdora.model.load import Quantization, load_model
from qdora.model.source import resolve
from qdora.plan import plan as parts
from qdora.plan.fake_step import empty_model
from qdora.plan.fit import plan, with_changes
from qdora.plan.live_bytes import LiveBytes
from qdora.plan.plan import (
    CONTEXT_BYTES,
    SLACK_SHARE,
    Division,
    MicroBatchShape,
    Moment,
    Plan,
    StreamedBlocks,
    division_of,
    of_card,
    streamed_blocks,
    with_offloaded,
    with_streamed,
)
from qdora.plan.show import ACROSS, plan_run, process_plans
from qdora.recipe.recipe_file import resolved_yaml
from qdora.recipe.settings import Recipe
from qdora.train.distributed import Processes
from tests import support
from tests.support import LateCopies, write
from tests.test_plan_memory import SHAPES, SIZES, a_recipe

GIB = 2**30
QUIET = Console(quiet=True)
NF4 = Quantization("nf4", 64, True, ("lm_head",))
NUM_BLOCKS = 10
CONFIG = LlamaConfig(**(SIZES | {"num_hidden_layers": NUM_BLOCKS}))
CODES = sum(out * in_ for out, in_ in SHAPES) // 2
# Double quantisation: a byte for 64 weights, a float32 for 256 of those, the code book and the offset.
SCALES = sum(out * in_ // 64 + 4 * -(-out * in_ // 64 // 256) + 4 * 256 + 4 for out, in_ in SHAPES)
SMALL: dict[str, Any] = {"adapter__targets": ["q_proj"], "memory__loss_chunk": 64}
SMALL |= {"train__batch": 1, "train__micro_batch_tokens": 64}


def as_planned(rank: int, source: Path) -> None:
    model = empty_model(AutoConfig.from_pretrained(source), support.config_source(), torch.float32, "sdpa")
    division = division_of(model, NF4, torch.float32, pruned=False)
    with support.dividing_processes() as processes:
        whole, sharded = support.load_sharded(source), support.load_sharded(source, processes)
        small = support.num_resident_bytes(whole) - sum(division.held(1).values())
        support.adapt_sharded(sharded)
        received = bytes_received(sharded, processes)
        held = support.num_resident_bytes(sharded) - support.num_adapter_bytes(sharded)
        assert held == small + sum(division.held(processes.size).values())
        wanted = 2 * division.blocks_bytes + division.table_bytes + division.head_bytes
        assert received == pytest.approx((processes.size - 1) / processes.size * wanted, rel=0.03)  # and padding


def bytes_received(model: Any, processes: Processes) -> float:
    """By torch's gathering, in the two passes of a micro-batch."""
    support.train_plainly(model, processes, num_steps=1)
    counts: list[float] = []
    real = dist.all_gather_single

    def counted(output: torch.Tensor, *args: Any, **options: Any) -> Any:
        counts.append(output.nbytes * (processes.size - 1) / processes.size)
        return real(output, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_gather_single", counted)
        patch.setattr(support, "LENGTHS", (7,) * processes.size)
        support.train_plainly(model, processes, num_steps=1)
    return sum(counts)


@support.needs_division
@pytest.mark.parametrize(("family", "size"), [("qwen3", 3), pytest.param("llama", 2, marks=pytest.mark.slow)])
def test_processes_hold_and_receive_what_is_planned(root, family, size):
    """To the byte what each holds, with torch's padding."""
    assert support.run_processes(size, as_planned, write(root / family, family)) == [""] * size


@pytest.mark.parametrize("base", [{}, {"quant": "none"}, {"prune": {"method": "magnitude", "pattern": "2:4"}}])
def test_what_is_divided_is_in_the_plan(tmp_path, base):
    """Component by component: what a card holds in the plan, and what of it is cut."""
    recipe = support.one_layer_recipe(tmp_path, **{f"base__{name}": value for name, value in base.items()})
    found = plan(recipe, device_kind="cpu")
    division, held = found.division, found.moments[-1].by_component
    whole = division.held(1)
    for part in (parts.BASE, parts.MASKS):
        assert whole.get(part, 0) == held.get(part, 0)
    assert 0 < whole[parts.DENSE] < held[parts.DENSE]
    assert held[parts.DENSE] - whole[parts.DENSE] < 0.05 * held[parts.DENSE]  # norms, and the rotary frequencies


def a_plan(**changes: Any) -> Plan:
    """Two blocks of 1,000 divided bytes each, a table and a head of 100 rows of 4 bytes."""
    cuts = {(parts.BASE, 100, 16): 1, (parts.SCALES, 100, 4): 1, (parts.DENSE, 100, 4): 2}
    resident = {parts.BASE: 1600, parts.SCALES: 400, parts.DENSE: 850}
    moments = [
        Moment("forward", 0, resident | {parts.FORWARD: 70}),
        Moment("loss", None, resident | {parts.LOSS: 500}),
        Moment("backward", 1, resident | {parts.BACKWARD: 600}),
        Moment("update", None, resident),
    ]
    options: dict[str, Any] = {"num_micro_batches": 6, "num_blocks": 2, "num_trainable": 1000, "step_seconds": 36.0}
    options |= {"division": Division(cuts, 1000, 2000, 400, 400, tied=False), "forward_seconds": 2.0}
    options |= {"shape": MicroBatchShape(1, 8, 7, masked=False), "moments": moments}
    return Plan(device_kind="cuda", **options | changes)


def test_a_divided_card_holds_its_rows_and_what_is_gathered():
    found = of_card(a_plan(), 3, 1).moments
    assert [moment.phase for moment in found] == ["forward", "forward", "loss", "loss", "backward", "update"]
    # The table, and what it is gathered into; three blocks; a block, the head and what it is gathered into; the head
    gathered = [2 * 400, 3 * 1000, 1000 + 2 * 400, 400, 3 * 1000, 0]
    assert [moment.by_component.get(parts.GATHERED, 0) for moment in found] == gathered
    kept = {parts.BASE: 34 * 16, parts.SCALES: 34 * 4, parts.DENSE: 50 + 2 * 34 * 4}
    assert all(kept.items() <= moment.by_component.items() for moment in found)
    assert found[2].by_component.get(parts.LOSS) is None
    assert (found[3].by_component[parts.LOSS], found[4].by_component[parts.BACKWARD]) == (500, 600)
    assert of_card(a_plan(), 1, 1) == a_plan()


def test_each_of_several_gpus_has_buffers_of_nccl():
    """A GiB for each group: of all, and with hybrid of a machine and across machines."""
    alone = a_plan()
    assert of_card(alone, 1, 2).components == {**alone.components, "NCCL buffers": GIB}
    assert of_card(alone, 1, 1) == alone
    on_cpus = replace(alone, device_kind="cpu")
    assert of_card(on_cpus, 1, 2).components == on_cpus.components
    bytes_of = {"replicate": alone, "shard": of_card(alone, 4, 1), "hybrid": of_card(alone, 2, 1)}
    ways = process_plans({"replicate": alone, "shard": alone}, 4, num_hosts=2)
    groups = {each["way"]: (each["peak_bytes"] - bytes_of[each["way"]].peak_bytes) / GIB for each in ways}
    assert groups == {"replicate": 1, "shard": 1, "hybrid": 3}


def test_bytes_and_times_by_hand():
    given = a_plan(budget_bytes=10**12)
    found = process_plans({"replicate": given, "shard": given}, 4, num_hosts=2)
    gradients = 2 * 4 * 1000 * 3 // 4
    # Six micro-batches on four cards: two for some. Each gathers the blocks twice, the table and the head once.
    more = [0, 2 * 3 * (2 * 2000 + 400 + 400) // 4, 2 * 1 * (2 * 2000 + 400 + 400) // 2]
    assert [each["wire_bytes"] for each in found] == [gradients + each for each in more]
    slow = "NVLink + 25 Gb/s"
    assert found[0]["step_seconds"][slow] == pytest.approx(2 * 6.0 + gradients / ACROSS["25 Gb/s"])
    assert found[1]["step_seconds"][slow] == pytest.approx(12.0, rel=1e-4)  # a thousand bytes take no time
    assert process_plans({"replicate": given, "shard": given}, 4)[1]["step_seconds"].keys() == {"NVLink", "PCIe 4"}
    # A hundred seconds to gather all, of which the forward pass hides 20 and the backward pass 40
    blocks = round(100.0 * 2 * ACROSS["25 Gb/s"])  # half of it is received
    sizes: dict[str, Any] = {"num_blocks": 20, "num_micro_batches": 2, "step_seconds": 120.0, "num_trainable": 0}
    division = Division({}, blocks // 20, blocks, 0, 0, tied=False)
    given = a_plan(division=division, forward_seconds=20.0, **sizes)
    seconds = process_plans({"replicate": given, "shard": given}, 2, num_hosts=2)[1]["step_seconds"]
    assert seconds["PCIe 4 + 25 Gb/s"] == pytest.approx(60 + (100 - 20) + (100 - 40))
    assert seconds["PCIe 4 + 100 Gb/s"] == pytest.approx(60 + (25 - 20))


def test_the_command_plans_for_several_cards(tmp_path):
    """A recipe that divides its base is planned divided, without the scales that a card with a whole base keeps."""
    recipe, divides = (support.one_layer_recipe(tmp_path, train__parallel=way) for way in ("auto", "shard"))
    one, two = (plan_run(recipe, "r.yaml", console=QUIET, num_processes=count)["memory"] for count in (1, 2))
    assert two["peak_bytes"] == one["peak_bytes"] + GIB
    options: dict[str, Any] = {"console": QUIET, "num_processes": 2, "device_kind": "cpu"}
    either, sharded = (plan_run(each, "r.yaml", **options) for each in (recipe, divides))
    assert [each["way"] for each in either["processes"]] == ["replicate", "shard"]
    peaks = [each["memory"]["peak_bytes"] for each in (either, sharded)]
    assert peaks == [each["peak_bytes"] for each in either["processes"]]
    assert sharded["processes"] == either["processes"]
    file = tmp_path / "recipe.yaml"
    file.write_text(resolved_yaml(recipe))
    command = ["plan", str(file), "--device", "cpu", "--processes", "4", "--json", "--hosts"]
    done = CliRunner().invoke(app, [*command, "2"])
    assert done.exit_code == 0, done.output
    found = {each["way"]: each["base_bytes"] for each in json.loads(done.stdout)["processes"]}
    assert found["replicate"] > found["hybrid"] > found["shard"]
    done = CliRunner().invoke(app, [*command, "3"])
    assert (done.exit_code, "--hosts: got 3, must divide --processes (4)." in done.output) == (2, True)


def blocks(count: int | None) -> StreamedBlocks:
    return streamed_blocks(empty_model(CONFIG, support.config_source(), torch.bfloat16, "sdpa"), NF4, count)


@pytest.mark.parametrize("count", [1, 3, None])
def test_sizes_are_those_of_the_formats(count):
    found, number = blocks(count), count or NUM_BLOCKS
    assert (found.num_streamed, found.codes, found.scales) == (number, number * CODES, number * SCALES)
    # A piece starts each tensor at a multiple of 256 bytes.
    assert CODES + SCALES <= found.block_bytes < CODES + SCALES + 7 * 5 * 256
    assert (found.block_bytes % 256, found.host_bytes) == (0, number * found.block_bytes)
    with pytest.raises(UserError, match=r"base\.streamed_blocks: must be at most the model's 10 blocks, got 11"):
        blocks(NUM_BLOCKS + 1)


def test_a_plan_has_the_streamed_blocks_in_their_slots_alone():
    away = {"base__residency": "host", "base__streamed_blocks": 3}
    config = LlamaConfig(**SIZES, num_hidden_layers=4)
    whole, streamed = (plan(a_recipe(**SMALL, **more), config=config) for more in ({}, away))
    assert (whole.host_bytes, streamed.host_bytes) == (0, blocks(3).host_bytes)
    expected = dict(whole.components)
    # No layer keeps decoded scales: of the four that are adapted, four bytes for 64 weights.
    expected[parts.KEPT] -= 4 * 4 * (64 * 64 // 64)
    expected[parts.BASE] -= 3 * CODES
    expected[parts.SCALES] -= 3 * SCALES
    expected[parts.STREAMING] = 2 * whole.block_bytes
    found = dict(streamed.components)
    assert found.pop(parts.SLACK) < expected.pop(parts.SLACK)
    assert found == expected
    assert (streamed.step_seconds or 0) >= (whole.step_seconds or 1)


def test_a_counted_run_saves_what_the_plan_says(tmp_path):
    source = support.write_source(tmp_path, hidden_size=256, intermediate_size=512, head_dim=64)
    peaks = []
    for placer in (None, None, HostResidency(4, copies=LateCopies)):  # the first of a process makes what is kept
        with LiveBytes() as live:
            model = load_model(resolve(str(source)), quant="nf4", compute_dtype=torch.float32, placer=placer)
            support.adapt_streamed(model)
            for layer in adapted_layers(model).values():
                layer.keeps_scales = False  # as in a run with a streamed base
            live.reset_peak()
            support.streamed_gradients(model)
            peaks.append(live.peak_bytes)
    sizes = streamed_blocks(
        empty_model(model.config, support.config_source(), torch.float32, "sdpa"), support.STREAMED_QUANTIZATION, 4
    )
    # The layers of a base that has just been quantised share one code book of 1 KiB; a piece holds one for each.
    assert peaks[1] - peaks[2] == sizes.codes + sizes.scales - 2 * sizes.block_bytes - 4 * 7 * 1024


def test_checkpoints_on_the_host_leave_three_on_the_device():
    keeps = [Moment("forward", block, {parts.CHECKPOINTS: (block + 1) * 3000, parts.BASE: 7}) for block in range(5)]
    found, host = with_offloaded([*keeps, Moment("update", None, {parts.BASE: 7})], 5)
    assert [moment.by_component.get(parts.CHECKPOINTS, 0) for moment in found] == [3000, 6000, 9000, 9000, 9000, 0]
    assert all(moment.by_component[parts.BASE] == 7 for moment in found)
    assert host == 4 * 4096  # in powers of two


@pytest.mark.parametrize("others", [0, 10**9])
def test_as_many_blocks_are_proposed_as_it_takes_or_all(others):
    """For a model of the real sizes of its blocks and `others` bytes of other things."""
    context, asked, sizes = CONTEXT_BYTES["cuda"], list[Recipe](), blocks(None)
    budget = context + (5 * (CODES + SCALES) + 100_000 if others == 0 else 0)
    before = {parts.BASE: sizes.codes, parts.SCALES: sizes.scales, parts.OTHER: others}
    options: dict[str, Any] = {"block_bytes": sizes.block_bytes, "num_blocks": NUM_BLOCKS, "step_seconds": 1.0}
    first = a_plan(moments=[Moment("forward", 0, before)], budget_bytes=budget, num_micro_batches=1, **options)

    def plan_of(recipe: Recipe) -> Plan:
        asked.append(recipe)
        if recipe.base.residency == "device":
            return first
        return replace(first, moments=with_streamed(first.moments, blocks(recipe.base.streamed_blocks)))

    changed, found = with_changes(a_recipe(**SMALL), first, plan_of, lambda _recipe: 1.0)
    (change,) = [each for each in found.changes if "residency" in each.setting]
    count = changed.base.streamed_blocks or 0
    assert change.setting == f"base.residency=host, base.streamed_blocks={count}"
    assert (change.neutral, change.peak_bytes <= budget) == (True, others == 0)
    if others:
        assert (count, len(asked) < 12) == (NUM_BLOCKS, True)
        return
    # The slots take two blocks, so seven away are what five in all leave room for, and the next ones for the rest.
    left = (NUM_BLOCKS - count + 1) * (CODES + SCALES) + 2 * blocks(count - 1).block_bytes
    assert left * (1 + SLACK_SHARE["cuda"]) > budget - context
