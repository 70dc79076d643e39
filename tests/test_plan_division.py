"""Plans for several processes: bytes as processes hold and send them, and times by hand."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rich.console import Console
from transformers import AutoConfig
from typer.testing import CliRunner

from qdora.cli import app
from qdora.model.build_model import keeps_scales
from qdora.model.load import Quantization
from qdora.plan import plan_contents as parts
from qdora.plan.division import (
    ACROSS,
    ProcessPlan,
    Way,
    WholePlans,
    divided,
    division_of,
    fastest_way,
    of_card,
    process_lines,
    process_plans,
    whole_plans,
)
from qdora.plan.fake_step import empty_model
from qdora.plan.memory_plan import plan
from qdora.plan.plan_contents import CONTEXT_BYTES, NCCL_BYTES, SLACK_SHARE, Division, MicroBatchShape, Moment, Plan
from qdora.plan.plan_view import plan_run
from qdora.recipe.recipe_file import resolved_yaml
from qdora.recipe.settings import Recipe
from qdora.train.distributed import Processes
from tests import launched, tiny, tiny_run, tiny_sharded
from tests.test_memory_sharded_base import write


def planned(source: Path) -> Division:
    model = empty_model(AutoConfig.from_pretrained(source), tiny.source(), torch.float32, "sdpa")
    found = division_of(model, Quantization("nf4", 64, True, ("lm_head",)), torch.float32, pruned=False)
    assert found is not None
    return found


def as_planned(rank: int, source: Path) -> None:
    division = planned(source)
    with tiny_sharded.launch() as processes:
        whole, sharded = tiny_sharded.load(source), tiny_sharded.load(source, processes)
        small = tiny_sharded.num_resident_bytes(whole) - sum(division.held(1).values())
        tiny_sharded.adapt(sharded)
        received = bytes_received(sharded, processes)
        held = tiny_sharded.num_resident_bytes(sharded) - tiny_sharded.num_adapter_bytes(sharded)
        assert held == small + sum(division.held(processes.size).values())
        wanted = 2 * division.blocks_bytes + division.table_bytes + division.head_bytes
        assert received == pytest.approx((processes.size - 1) / processes.size * wanted, rel=0.03)  # and padding


def bytes_received(model: Any, processes: Processes) -> float:
    """By torch's gathering, in the two passes of a micro-batch."""
    tiny_sharded.train(model, processes, num_steps=1)
    counts: list[float] = []
    real = dist.all_gather_single

    def counted(output: torch.Tensor, *args: Any, **options: Any) -> Any:
        counts.append(output.nbytes * (processes.size - 1) / processes.size)
        return real(output, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_gather_single", counted)
        patch.setattr(tiny_sharded, "LENGTHS", (7,) * processes.size)
        tiny_sharded.train(model, processes, num_steps=1)
    return sum(counts)


@tiny_sharded.needs_division
@pytest.mark.parametrize(("family", "size"), [("qwen3", 3), pytest.param("llama", 2, marks=pytest.mark.slow)])
def test_processes_hold_and_receive_what_is_planned(root: Path, family: str, size: int) -> None:
    """To the byte what each holds, with torch's padding."""
    assert launched.run(size, as_planned, write(root / family, family)) == [""] * size


@pytest.mark.parametrize("base", [{}, {"quant": "none"}, {"prune": {"method": "magnitude", "pattern": "2:4"}}])
def test_what_is_divided_is_in_the_plan(tmp_path: Path, base: dict[str, Any]) -> None:
    """Component by component: what a card holds in the plan, and what of it is cut."""
    recipe = tiny_run.one_layer_recipe(tmp_path, **{f"base__{name}": value for name, value in base.items()})
    found = plan(recipe, device_kind="cpu")
    division, held = found.division, found.moments[-1].by_component
    assert division is not None
    whole = division.held(1)
    assert whole[parts.BASE] == held[parts.BASE]
    assert whole.get(parts.MASKS, 0) == held.get(parts.MASKS, 0)
    assert 0 < whole[parts.DENSE] < held[parts.DENSE]
    assert held[parts.DENSE] - whole[parts.DENSE] < 0.05 * held[parts.DENSE]  # norms, and the rotary frequencies


def a_plan() -> Plan:
    """Two blocks of 1,000 divided bytes each, a table and a head of 100 rows of 4 bytes."""
    cuts = {(parts.BASE, 100, 16): 1, (parts.SCALES, 100, 4): 1, (parts.DENSE, 100, 4): 2}
    division = Division(cuts, 1000, 2000, 400, 400, tied=False)
    resident = {parts.BASE: 1600, parts.SCALES: 400, parts.DENSE: 850}
    moments = [
        Moment("forward", 0, resident | {parts.FORWARD: 70}),
        Moment("loss", None, resident | {parts.LOSS: 500}),
        Moment("backward", 1, resident | {parts.BACKWARD: 600}),
        Moment("update", None, resident),
    ]
    shape = MicroBatchShape(1, 8, 7, masked=False)
    return Plan(
        device_kind="cuda",
        moments=moments,
        shape=shape,
        num_micro_batches=6,
        num_blocks=2,
        num_trainable=1000,
        step_seconds=36.0,
        forward_seconds=2.0,
        division=division,
    )


def test_a_divided_card_holds_its_rows_and_what_is_gathered() -> None:
    found = divided(a_plan(), 3).moments
    assert [moment.phase for moment in found] == ["forward", "forward", "loss", "loss", "backward", "update"]
    assert [moment.by_component.get(parts.GATHERED, 0) for moment in found] == [
        2 * 400,  # the table, and what it is gathered into
        3 * 1000,
        1000 + 2 * 400,  # the head, and what it is gathered into
        400,
        3 * 1000,
        0,
    ]
    kept = {parts.BASE: 34 * 16, parts.SCALES: 34 * 4, parts.DENSE: 50 + 2 * 34 * 4}
    for moment in found:
        assert kept.items() <= moment.by_component.items()
    assert found[2].by_component.get(parts.LOSS) is None
    assert (found[3].by_component[parts.LOSS], found[4].by_component[parts.BACKWARD]) == (500, 600)


def test_each_of_several_gpus_has_buffers_of_nccl(tmp_path: Path) -> None:
    """A GiB for each group: of all, and with hybrid of a machine and across machines."""
    alone = a_plan()
    assert of_card(alone, 1, 2).components == {**alone.components, "NCCL buffers": 2**30}
    assert of_card(alone, 1, 1) == alone
    on_cpus = replace(alone, device_kind="cpu")
    assert of_card(on_cpus, 1, 2).components == on_cpus.components
    ways = process_plans(WholePlans(alone, alone), 4, num_hosts=2)
    bytes_of = {"replicate": alone, "shard": divided(alone, 4), "hybrid": divided(alone, 2)}
    groups = {each.way: (each.peak_bytes - bytes_of[each.way].peak_bytes) / 2**30 for each in ways}
    assert groups == {"replicate": 1, "shard": 1, "hybrid": 3}
    recipe, console = tiny_run.one_layer_recipe(tmp_path), Console(file=io.StringIO())
    one, two = (plan_run(recipe, "r.yaml", console=console, num_processes=count)["memory"] for count in (1, 2))
    assert two["peak_bytes"] == one["peak_bytes"] + 2**30


def test_bytes_and_times_by_hand() -> None:
    given = replace(a_plan(), budget_bytes=10**12)
    replicate, shard, hybrid = process_plans(WholePlans(given, given), 4, num_hosts=2)
    assert [each.way for each in (replicate, shard, hybrid)] == ["replicate", "shard", "hybrid"]
    gradients = 2 * 4 * 1000 * 3 // 4
    assert replicate.wire_bytes == gradients
    # Six micro-batches on four cards: two for some. Each gathers the blocks twice, the table and the head once.
    assert shard.wire_bytes == gradients + 2 * 3 * (2 * 2000 + 400 + 400) // 4
    assert hybrid.wire_bytes == gradients + 2 * 1 * (2 * 2000 + 400 + 400) // 2
    slow = ACROSS["25 Gb/s"]
    assert replicate.step_seconds["NVLink + 25 Gb/s"] == pytest.approx(2 * 6.0 + gradients / slow)
    assert shard.step_seconds["NVLink + 25 Gb/s"] == pytest.approx(12.0, rel=1e-4)  # a thousand bytes take no time
    assert process_plans(WholePlans(given, given), 4)[1].step_seconds.keys() == {"NVLink", "PCIe 4"}
    assert "  Fastest that fits: " in process_lines([replicate, shard, hybrid], 4, 2)[-1]


def test_blocks_that_take_longer_to_gather_than_to_compute_are_waited_for() -> None:
    """A hundred seconds to gather all, of which the forward pass hides 20 and the backward pass 40."""
    blocks = round(100.0 * 2 * ACROSS["25 Gb/s"])  # half of it is received
    division = Division({}, blocks // 20, blocks, 0, 0, tied=False)
    sizes: dict[str, Any] = {"num_blocks": 20, "num_micro_batches": 2, "step_seconds": 120.0, "num_trainable": 0}
    sizes["forward_seconds"] = 20.0
    given = replace(a_plan(), division=division, **sizes)
    found = process_plans(WholePlans(given, given), 2, num_hosts=2)[1].step_seconds
    assert found["PCIe 4 + 25 Gb/s"] == pytest.approx(60 + (100 - 20) + (100 - 40))
    assert found["PCIe 4 + 100 Gb/s"] == pytest.approx(60 + (25 - 20))


GIB = 2**30


def streaming(recipe: Recipe) -> Plan:
    """Eight blocks of a GiB on one of two cards, of whose tensors 5.5 GiB fit; two slots of a GiB if some are streamed,
    else scales."""
    streamed = recipe.base.streamed_blocks or 0
    beside = 2 if streamed or keeps_scales(recipe) else 0
    moments = [Moment("update", None, {parts.BASE: (8 - streamed + beside) * GIB})]
    limit = CONTEXT_BYTES["cuda"] + NCCL_BYTES + round(5.5 * GIB * (1 + SLACK_SHARE["cuda"]))
    sizes: dict[str, Any] = {"num_blocks": 8, "block_bytes": GIB, "budget_bytes": limit, "num_groups": 1}
    return replace(a_plan(), moments=moments, step_seconds=36.0 + streamed, **sizes)


def test_as_few_blocks_are_streamed_as_make_it_fit(tmp_path: Path) -> None:
    asked: list[Recipe] = []

    def plan_of(recipe: Recipe) -> Plan:
        asked.append(recipe)
        return streaming(recipe)

    plans = whole_plans(tiny_run.one_layer_recipe(tmp_path), plan_of)
    assert (plans.replicate.fits, plans.num_streamed) == (False, 5)  # five leave three blocks and two slots
    assert [each.train.parallel for each in asked] == ["replicate"] * 3 + ["shard"]
    found = process_plans(plans, 2)
    assert [(each.way, each.fits, each.num_streamed) for each in found] == [
        ("replicate", False, 0),
        ("shard", False, 0),
        ("stream", True, 5),
    ]
    assert found[2].step_seconds["NVLink"] == pytest.approx(3 * (36.0 + 5) / 6, rel=1e-4)
    assert "  Fastest that fits: stream over NVLink, stream over PCIe 4." in process_lines(found, 2, 1)


def test_of_ways_that_are_as_fast_the_first_is_named() -> None:
    """The times are predictions, and streaming needs memory of the host."""
    cards = {"num_sharing": 1, "peak_bytes": 1, "base_bytes": 1, "wire_bytes": 0}
    seconds: dict[Way, float] = {"replicate": 1.0, "shard": 5.04, "stream": 5.0}
    found = [
        ProcessPlan(way=way, fits=way != "replicate", step_seconds={"NVLink": each}, **cards)
        for way, each in seconds.items()
    ]
    assert fastest_way(found, "NVLink") == "shard"
    slower = replace(found[1], step_seconds={"NVLink": 5.06})
    assert fastest_way([found[0], slower, found[2]], "NVLink") == "stream"
    assert fastest_way(found[:1], "NVLink") is None


def test_the_blocks_that_a_recipe_streams_stay_streamed(tmp_path: Path) -> None:
    base: dict[str, Any] = {"base__quant": "nf4", "base__residency": "host", "base__streamed_blocks": 7}
    recipe = tiny_run.one_layer_recipe(tmp_path, **base)
    plans = whole_plans(recipe, streaming)
    assert plans.num_streamed == 7
    assert plans.replicate.tensor_bytes == 10 * GIB


def test_a_recipe_that_divides_its_base_is_planned_divided(tmp_path: Path) -> None:
    """As one whose ways are compared, without the block scales that a card with a whole base keeps."""
    options: dict[str, Any] = {"device_kind": "cpu", "console": Console(file=io.StringIO()), "num_processes": 2}
    sharded = plan_run(tiny_run.one_layer_recipe(tmp_path, train__parallel="shard"), "r.yaml", **options)
    either = plan_run(tiny_run.one_layer_recipe(tmp_path), "r.yaml", **options)
    assert [each["way"] for each in either["processes"]] == ["replicate", "shard"]
    assert sharded["memory"]["peak_bytes"] == either["processes"][1]["peak_bytes"]
    assert sharded["processes"] == either["processes"]
    assert either["memory"]["peak_bytes"] == either["processes"][0]["peak_bytes"]


def test_the_command_plans_for_several_cards(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(resolved_yaml(tiny_run.one_layer_recipe(tmp_path)))
    runner = CliRunner()
    done = runner.invoke(app, ["plan", str(file), "--device", "cpu", "--processes", "4", "--hosts", "2", "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)["processes"]
    assert [each["way"] for each in found] == ["replicate", "shard", "hybrid"]
    assert found[0]["base_bytes"] > found[2]["base_bytes"] > found[1]["base_bytes"]
    done = runner.invoke(app, ["plan", str(file), "--device", "cpu", "--processes", "4", "--hosts", "3"])
    assert done.exit_code == 2
    assert "--hosts: got 3, must divide --processes (4)." in done.output
