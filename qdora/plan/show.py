"""`qdora plan`: the plan of one card, a table with a bar for each component, and the ways to use several cards.

    replicate   each card holds the base; once a step the gradients of the adapters are summed over all cards
    shard       each card holds its rows; a block is gathered before each of its two passes of a micro-batch
    hybrid      shard within a machine, replicate across machines
    stream      replicate, with blocks in the memory of the card's own host (base.residency)

Cards divide the micro-batches of a step. A ring of n cards takes (n - 1) / n of what it gathers through each link once,
and what it sums twice; a machine has one link to the others. Blocks are gathered while others compute.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from rich.bar import Bar
from rich.console import Console
from rich.table import Table

from qdora.data import build_data, mix_plan
from qdora.errors import HubFailure, NoTokenizer, UserError
from qdora.files.console import consoles
from qdora.model.build_model import find_model, keeps_scales
from qdora.plan import plan as parts
from qdora.plan.fit import (
    MOST_STEPS,
    Workload,
    _all_on_device,
    assumed_workload,
    divided_recipe,
    num_sharing,
    plan,
    with_streaming,
    workload_of_data,
)
from qdora.plan.plan import ASSUMED, PCIE_4, DeviceKind, Plan, of_card, seconds_text, waiting_seconds
from qdora.recipe.byte_size import parse_size, size_text
from qdora.recipe.recipe_file import missing_files, override
from qdora.recipe.settings import Recipe

logger = logging.getLogger("qdora")


def plan_run(
    recipe: Recipe,
    where: str,
    *,
    budget: str | None = None,
    device_kind: DeviceKind = "cuda",
    console: Console | None = None,
    num_processes: int = 1,
    num_hosts: int = 1,
) -> dict[str, Any]:
    """Read and tokenise the data, count what the run takes from each source, and plan the memory of a step.

    Only the config and the tokenizer of the model are loaded.

    Args:
        where: Name of the recipe in error lines.
        budget: A size such as 40GiB (default: that of the recipe).
        num_processes, num_hosts: Cards of the run, and machines that have equally many of them.
    Returns:
        "memory" as `Plan.to_dict`, of one card; with several "processes", a `ProcessPlan.to_dict` for each way; and
        "mix" as in mix.json of a run, or null without a tokenizer or the Hub.
    Raises UserError if the budget is not a size, or `train_run` would refuse the data or the config of the model.
    """
    _, results = consoles(console)
    if device_kind == "cuda" and not torch.cuda.is_available():
        card = ASSUMED["cuda"].name
        logger.info("This machine has no GPU: bytes and seconds are those of an %s. --device cpu plans it here.", card)
    faults = missing_files(recipe, where)
    if faults:
        raise UserError(*faults)
    try:
        limit = None if budget is None else parse_size(budget)
    except ValueError as error:
        raise UserError(f"--budget: {error}") from None
    mix, workload, assumed = _workload(recipe)
    if mix is not None:
        mix_plan.show_mix(results, mix)
    planning: dict[str, Any] = {"device_kind": device_kind, "workload": workload, "num_processes": num_processes}
    shared = planning | {"num_sharing": num_sharing(recipe, num_processes, num_processes // num_hosts)}
    if recipe.adapter.gates is not None:
        assumed.append("the gates have removed no component yet")
    found = replace(plan(recipe, limit, **shared), assumptions=assumed)
    show_plan(results, found)
    longest, context = recipe.data.max_length, found.context
    if context is not None and longest > context:
        results.print(f"data.max_length: {longest:,} tokens are more than the model's context of {context:,}.")
    document: dict[str, Any] = {"mix": None if mix is None else asdict(mix), "memory": found.to_dict()}
    if num_processes > 1:
        plan_of = partial(plan, budget=found.budget_bytes, may_change=False, **planning)
        ways = process_plans(whole_plans(recipe, plan_of), num_processes, num_hosts)
        for line in process_lines(ways, num_processes, num_hosts):
            results.print(line, soft_wrap=True)
        document["processes"] = [asdict(each) for each in ways]
    elif recipe.train.divides_base:
        logger.info("train.parallel is %s: --processes N plans a card of N.", recipe.train.parallel)
    return document


def _workload(recipe: Recipe) -> tuple[mix_plan.MixPlan | None, Workload, list[str]]:
    """The mix and the micro-batches of the data, and what is assumed without a tokenizer or without the Hub."""
    full = "every micro-batch is full, and all its rows have data.max_length labelled tokens"
    try:
        _, tokenizer = find_model(recipe, weights=False)
    except (HubFailure, NoTokenizer) as error:  # anything else a run would refuse, too
        return None, assumed_workload, [f"{full}, because there is no tokenizer: {error.faults[0]}"]
    try:
        train, _ = build_data.read_data(recipe.data)
    except HubFailure as error:
        return None, assumed_workload, [f"{full}, because the data cannot be read: {error.faults[0]}"]
    mix = build_data.tokenized_mix(recipe, tokenizer, train)
    loader = build_data.make_loader(recipe, mix, tokenizer)
    num_steps = build_data.num_steps_of(recipe, loader)
    assumed = []
    if loader.streams:
        assumed = [f"{full}, because the data is streamed"]
    elif num_steps > MOST_STEPS:
        assumed = [f"no micro-batch is larger than the largest of the first {MOST_STEPS:,} steps"]
    found = mix_plan.plan_mix(mix, loader, num_steps)
    return found, workload_of_data(recipe, mix, tokenizer), assumed


def show_plan(console: Console, plan: Plan) -> None:
    """Print the table of components and whether they fit, then the sentences of `plan_lines`."""
    table = Table(title=f"memory on {plan.device_kind} at the peak: {plan.peak.name}", title_justify="left")
    table.add_column("component")
    table.add_column("size", justify="right")
    table.add_column("relative to the largest", justify="left", no_wrap=True)
    largest = max(plan.components.values(), default=1)
    for name, num_bytes in plan.components.items():
        table.add_row(name, size_text(num_bytes), Bar(largest, 0, num_bytes, width=40))
    table.add_section()
    table.add_row("total", size_text(plan.peak_bytes), _verdict(plan))
    console.print(table)
    for line in plan_lines(plan):
        console.print(line, soft_wrap=True)


def plan_lines(plan: Plan) -> list[str]:
    """Micro-batch, a stored shape, time, host memory, assumptions and what to change, one sentence each."""
    shape = plan.shape
    lines = [
        f"Micro-batch: {shape.rows} x {shape.length} tokens{', packed' if shape.packed else ''}, {shape.num_labels:,} "
        f"labelled; {plan.num_micro_batches} micro-batches a step. "
        f"{plan.num_blocks} blocks, {plan.num_weights:,} weights, {plan.num_trainable:,} trainable."
    ]
    if plan.depends_on_routing:
        lines.append(
            f"Experts: {size_text(plan.peak_bytes)} if nearly all tokens choose the same ones, which is planned; "
            f"{size_text(plan.even_routing_bytes or 0)} if tokens divide evenly among them."
        )
    if plan.stored_shape is not None:
        lines.append(f"Model: the shape stored in qdora, from {plan.stored_shape}, because the Hub does not give it.")
    if plan.step_seconds is not None:
        said = seconds_text(plan.step_seconds)
        lines.append(f"Estimated time: {said} per step on one card, by a roofline of {plan.rates['name']}.")
    if plan.host_bytes:
        lines.append(f"Pinned host memory: {size_text(plan.host_bytes)}.")
    if plan.embedding_bytes:
        lines.append(f"Host memory that is not pinned: {size_text(plan.embedding_bytes)} for the embedding.")
    lines += [f"Assumed: {text}" for text in plan.assumptions]
    if plan.fits is False:
        lines.append(
            "To fit, change one after the other (cheapest first; times are estimates):"
            if plan.changes
            else "No known change makes it smaller."
        )
        for change in plan.changes:
            neutral = "" if change.neutral else "; changes what is trained"
            options = f"-s {change.setting.replace(', ', ' -s ')}"
            lines.append(f"  {options}: {size_text(change.peak_bytes)}, {seconds_text(change.step_seconds)}{neutral}")
        if plan.changes and not plan.changes_fit:
            lines.append("  Even with all of these it does not fit.")
    return lines


def _verdict(plan: Plan) -> str:
    if plan.budget_bytes is None:
        return ""
    left = plan.budget_bytes - plan.peak_bytes
    said = f"{size_text(left)} left" if left >= 0 else f"{size_text(-left)} too much"
    return f"{'fits' if plan.fits else 'does not fit'} in {size_text(plan.budget_bytes)}: {said}"


Way = Literal["replicate", "shard", "hybrid", "stream"]

WITHIN: Mapping[str, float] = {"NVLink": 240e9, "PCIe 4": PCIE_4}

ACROSS: Mapping[str, float] = {"100 Gb/s": 10e9, "25 Gb/s": 2.5e9}

"""Bytes a second of a card's link in each direction within and across machines, 80 % of the stated rate: NVLink 3
(A100: 300 GB/s), PCIe 4.0, and networks (12.5 and 3.1 GB/s)."""

_AS_FAST = 1.01

"""Times over each other up to which two ways are as fast: the times are estimates."""


@dataclass(frozen=True, kw_only=True)
class ProcessPlan:
    """A way to hold the base on several cards.

    Attributes:
        num_sharing: Cards that divide the base among them.
        base_bytes: Bytes of frozen tensors that a card holds from step to step.
        wire_bytes: Bytes that a card receives from other cards in a step.
        step_seconds: Link within a machine, or "A + B" with the one between machines -> estimated seconds of a step.
        host_bytes: Pinned host memory of each card.
        num_streamed: Blocks that are streamed to each card.
    """

    way: Way
    num_sharing: int
    peak_bytes: int
    base_bytes: int
    wire_bytes: int
    fits: bool | None
    step_seconds: Mapping[str, float]
    host_bytes: int = 0
    num_streamed: int = 0


@dataclass(frozen=True)
class WholePlans:
    """The plans of one card that `process_plans` starts from; None where a recipe cannot be run in that way.

    Attributes:
        replicate: All blocks on the card.
        divided: As a divided base needs it, but whole.
        stream: With `num_streamed` blocks off the card.
    """

    replicate: Plan
    divided: Plan | None = None
    stream: Plan | None = None
    num_streamed: int = 0


def whole_plans(recipe: Recipe, plan_of: Callable[[Recipe], Plan]) -> WholePlans:
    """The plans of a recipe for each way to hold its base.

    Blocks are streamed as the recipe says, or else as few as make it fit into the budget.
    """
    shared = divided_recipe(recipe)
    recipe = override(recipe, ["train.parallel=replicate"])
    bare = _all_on_device(recipe)
    replicate = found = plan_of(bare)
    stream: Plan | None
    if recipe.base.residency != "device":
        changed, stream = recipe, plan_of(recipe)
    else:
        if replicate.fits is False and replicate.block_bytes and keeps_scales(bare):
            bare = override(bare, ["memory.keep_scales=false"])  # as with streamed blocks
            found = plan_of(bare)
        changed, found, settings = with_streaming(bare, found, plan_of)
        stream = found if settings else None
    return WholePlans(
        replicate=replicate,
        divided=None if shared is None else plan_of(shared),
        stream=stream,
        num_streamed=0 if stream is None else changed.base.streamed_blocks or stream.num_blocks,
    )


def process_plans(plans: WholePlans, num_processes: int, num_hosts: int = 1) -> list[ProcessPlan]:
    """The ways to hold the base on so many cards, each on a machine with equally many of them."""
    found = [_process_plan(plans.replicate, "replicate", 1, num_processes, num_hosts)]
    divisible = plans.divided
    if divisible is not None and divisible.division is not None and num_processes > 1:
        found.append(_process_plan(divisible, "shard", num_processes, num_processes, num_hosts))
        if 1 < num_hosts < num_processes:
            found.append(_process_plan(divisible, "hybrid", num_processes // num_hosts, num_processes, num_hosts))
    if plans.stream is not None:
        streamed = _process_plan(plans.stream, "stream", 1, num_processes, num_hosts)
        found.append(replace(streamed, num_streamed=plans.num_streamed))
    return found


def _process_plan(plan: Plan, way: Way, size: int, num_processes: int, num_hosts: int) -> ProcessPlan:
    found = of_card(plan, size, num_processes)
    division, passes = plan.division, math.ceil(plan.num_micro_batches / num_processes)
    gradients = 2 * 4 * plan.num_trainable * (num_processes - 1) / num_processes
    blocks = ends = 0.0
    if division is not None:
        share = (size - 1) / size
        blocks, ends = share * division.blocks_bytes, share * (division.table_bytes + division.head_bytes)
    links = {name: (rate, rate) for name, rate in WITHIN.items()}
    if num_hosts > 1:
        pairs = [(inner, outer) for inner in WITHIN for outer in ACROSS]
        links = {f"{a} + {b}": (WITHIN[a], min(WITHIN[a], ACROSS[b])) for a, b in pairs}
    seconds = {}
    for name, (inner, slowest) in links.items():
        rate = inner if way == "hybrid" else slowest
        waiting = waiting_seconds(blocks / rate, plan.forward_seconds) + ends / rate
        single = (plan.step_seconds or 0.0) / plan.num_micro_batches
        seconds[name] = passes * (single + waiting) + gradients / slowest
    frozen = (parts.BASE, parts.SCALES, parts.MASKS, parts.DENSE)
    return ProcessPlan(
        way=way,
        num_sharing=size,
        peak_bytes=found.peak_bytes,
        base_bytes=sum(found.moments[-1].by_component.get(each, 0) for each in frozen),
        wire_bytes=round(passes * (2 * blocks + ends) + gradients),
        fits=found.fits,
        step_seconds=seconds,
        host_bytes=found.host_bytes,
    )


def fastest_way(found: Sequence[ProcessPlan], link: str) -> Way | None:
    """The fastest way that fits over a link; None if none fits.

    Of ways that are as fast within 1 %, it is the first: `stream`, which needs memory of the host, comes last.
    """
    able = [each for each in found if each.fits is not False]
    least = min((each.step_seconds[link] for each in able), default=0.0)
    return next((each.way for each in able if each.step_seconds[link] <= _AS_FAST * least), None)


def process_lines(found: list[ProcessPlan], num_processes: int, num_hosts: int) -> list[str]:
    """A line for each way, and which one that fits is fastest, in words."""
    where = f"{num_processes} cards" if num_hosts == 1 else f"{num_processes} cards in {num_hosts} machines"
    lines = [f"On {where}, each card (times are estimates):"]
    for each in found:
        times = ", ".join(f"{seconds_text(seconds)} over {link}" for link, seconds in each.step_seconds.items())
        verdict = "" if each.fits is None else f" ({'fits' if each.fits else 'does not fit'})"
        streamed = f", {each.num_streamed} blocks streamed" if each.num_streamed else ""
        pinned = f"; {size_text(each.host_bytes)} of pinned host memory" if each.host_bytes else ""
        lines.append(
            f"  {each.way}: {size_text(each.peak_bytes)}{verdict}, of which {size_text(each.base_bytes)} base{streamed}"
            f"{pinned}; {size_text(each.wire_bytes)} received from others in a step, which takes {times}."
        )
    best = {link: fastest_way(found, link) for link in found[0].step_seconds}
    if None in best.values():
        return [*lines, "  None of these fits."]
    lines.append(f"  Fastest that fits: {', '.join(f'{way} over {link}' for link, way in best.items())}.")
    if "stream" in best.values():
        lines.append("  stream is train.parallel=replicate with base.residency and base.streamed_blocks.")
    return lines
