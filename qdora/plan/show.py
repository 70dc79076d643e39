"""`qdora plan`: the plan of one card as a table, and the ways to use several cards.

    replicate   each card holds the base; once a step the gradients of the adapters are summed over all cards
    shard       each card holds its rows; a block is gathered before each of its two passes of a micro-batch
    hybrid      shard within a machine, replicate across machines

Cards divide the micro-batches of a step. A ring of n cards takes (n - 1) / n of what it gathers through each link once,
and what it sums twice; a machine has one link to the others. Blocks are gathered while others compute.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table

from qdora.data import mix_plan, sources
from qdora.errors import HubFailure, NoTokenizer, UserError
from qdora.files.console import consoles
from qdora.model.build_model import find_model
from qdora.plan import plan as parts
from qdora.plan.fit import (
    MOST_STEPS,
    Workload,
    assumed_workload,
    divided_recipe,
    num_sharing,
    plan,
    workload_of_data,
)
from qdora.plan.plan import PCIE_4, DeviceKind, Plan, of_card, seconds_text, waiting_seconds
from qdora.recipe.recipe_file import missing_files, override
from qdora.recipe.section import parse_size, size_text
from qdora.recipe.settings import Recipe


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

    Of the model only the config and the tokenizer are loaded. `where` names the recipe in errors. Returns "memory" of
    one card (`Plan.to_dict`), with several cards also "processes" (`process_plans`), and "mix" as in mix.json.
    """
    _, results = consoles(console)
    if faults := missing_files(recipe, where):
        raise UserError(*faults)
    try:
        limit = None if budget is None else parse_size(budget)
    except ValueError as error:
        raise UserError(f"--budget: {error}") from None
    mix, workload, assumed = _workload(recipe)
    if mix is not None:
        mix_plan.show_mix(results, mix)
    if recipe.adapter.gates is not None:
        assumed.append("the gates have removed no component yet")
    plan_of = partial(plan, device_kind=device_kind, workload=workload, num_processes=num_processes)
    card_plan = plan_of(
        recipe, limit, num_sharing=num_sharing(recipe, num_processes, num_processes // num_hosts)
    )
    card_plan = replace(card_plan, assumptions=assumed)
    show_plan(results, card_plan)
    document: dict[str, Any] = {"mix": mix, "memory": card_plan.to_dict()}
    if num_processes > 1:
        plans = whole_plans(recipe, partial(plan_of, budget=card_plan.budget_bytes, may_change=False))
        document["processes"] = process_plans(plans, num_processes, num_hosts)
        _show_ways(results, document["processes"], f"each of {num_processes} cards (times are estimates)")
    return document


def _workload(recipe: Recipe) -> tuple[dict[str, Any] | None, Workload, list[str]]:
    """The mix and the micro-batches of the data, and what is assumed without a tokenizer or without the Hub."""
    full = "every micro-batch is full, and all its rows have data.max_length labelled tokens"
    why = "there is no tokenizer"
    try:
        _, tokenizer = find_model(recipe, weights=False)
        why = "the data cannot be read"
        train, _ = sources.read_data(recipe.data)
    except (HubFailure, NoTokenizer) as error:  # anything else a run would refuse, too
        sources.check_local_rows(recipe.data)
        local = any(source.is_local for source in recipe.data.mix)
        unchecked = ["rows of local files were read, but no tokens were counted"] * local
        return None, assumed_workload, [f"{full}, because {why}: {error.faults[0]}", *unchecked]
    mix = sources.tokenized_mix(recipe, tokenizer, train)
    loader = sources.make_loader(recipe, mix, tokenizer)
    num_steps = sources.num_steps_of(recipe, loader)
    assumed = list[str]()
    if loader.streams:
        assumed = [f"{full}, because the data is streamed"]
    elif num_steps > MOST_STEPS:
        assumed = [f"no micro-batch is larger than the largest of the first {MOST_STEPS:,} steps"]
    return mix_plan.plan_mix(loader, num_steps), workload_of_data(recipe, mix, tokenizer), assumed


def show_plan(console: Console, plan: Plan) -> None:
    console.print(f"memory on {plan.device_kind} at the peak: {plan.peak.name}")
    table = Table("component")
    table.add_column("size", justify="right")
    for name, num_bytes in plan.components.items():
        table.add_row(name, size_text(num_bytes))
    table.add_section()
    table.add_row("total", size_text(plan.peak_bytes))
    console.print(table)
    shape, lines = plan.shape, []
    if plan.budget_bytes is not None:
        lines = [f"It {'fits' if plan.fits else 'does not fit'} in {size_text(plan.budget_bytes)}."]
    lines.append(
        f"Micro-batch: {shape.rows} x {shape.length} tokens{', packed' if shape.packed else ''}, {shape.num_labels:,} "
        f"labelled; {plan.num_micro_batches} micro-batches a step. "
        f"{plan.num_blocks} blocks, {plan.num_weights:,} weights, {plan.num_trainable:,} trainable."
    )
    if plan.context_length is not None and plan.longest_row > plan.context_length:
        packed = " (packed rows may, single examples not)" if shape.packed else ""
        context = f"the model's context of {plan.context_length:,}{packed}"
        lines.append(f"Warning: rows of up to {plan.longest_row:,} tokens exceed {context}.")
    if plan.even_routing_bytes is not None:
        lines.append(
            f"Experts: the worse routing is planned; {size_text(plan.even_routing_bytes)} if tokens divide evenly."
        )
    if plan.stored_shape is not None:
        lines.append(
            f"Model: the shape stored in qdora, from {plan.stored_shape}, because the Hub does not give it."
        )
    if plan.step_seconds is not None:
        seconds = seconds_text(plan.step_seconds)
        device, other = plan.rates["name"], ""
        if plan.device_kind == "cuda":
            device = f"one {device}"
            if not torch.cuda.is_available():
                other = " This machine has no GPU; --device cpu plans for a CPU."
        lines.append(f"Estimated time: {seconds} per step on {device}, by a roofline.{other}")
    if plan.compress_seconds is not None:
        lines.append(
            f"Compressing the base: about {seconds_text(plan.compress_seconds)} once, by the same roofline."
        )
    if plan.host_bytes:
        lines.append(f"Host memory: {size_text(plan.host_bytes)} pinned.")
    lines += [f"Assumed: {text}" for text in plan.assumptions]
    if plan.fits is False:
        how = "To fit, change one after the other (cheapest first; times are estimates):"
        lines.append(how if plan.changes else "No known change makes it smaller.")
    for change in plan.changes:
        neutral = "" if change.neutral else "; changes what is trained"
        options = f"-s {change.setting.replace(', ', ' -s ')}"
        lines.append(
            f"  {options}: {size_text(change.peak_bytes)}, {seconds_text(change.step_seconds)}{neutral}"
        )
    for line in lines:
        console.print(line, soft_wrap=True)


Way = Literal["replicate", "shard", "hybrid"]
# Bytes a second of a card's link in each direction within and across machines, 80 % of the stated rate: NVLink 3 (A100:
# 300 GB/s), PCIe 4.0, and networks (12.5 and 3.1 GB/s)
WITHIN: Mapping[str, float] = {"NVLink": 240e9, "PCIe 4": PCIE_4}
ACROSS: Mapping[str, float] = {"100 Gb/s": 10e9, "25 Gb/s": 2.5e9}


def whole_plans(recipe: Recipe, plan_of: Callable[[Recipe], Plan]) -> dict[Way, Plan]:
    """The plans of one card with a whole base: as "replicate", and as "shard" needs it, where possible."""
    shared = divided_recipe(recipe)
    plans: dict[Way, Plan] = {"replicate": plan_of(override(recipe, ["train.parallel=replicate"]))}
    return plans if shared is None else plans | {"shard": plan_of(shared)}


def process_plans(plans: Mapping[Way, Plan], num_processes: int, num_hosts: int = 1) -> list[dict[str, Any]]:
    """The ways to hold the base on so many cards, each on a machine with equally many of them.

    num_sharing: Cards that divide the base. base_bytes: Frozen tensors that a card holds from step to step. wire_bytes:
    What a card receives in a step. step_seconds: Link within a machine, or "A + B" with the one between machines ->
    estimated seconds of a step.
    """
    ways: list[tuple[Way, Plan, int]] = [("replicate", plans["replicate"], 1)]
    if "shard" in plans and plans["shard"].division is not None:
        ways.append(("shard", plans["shard"], num_processes))
        if 1 < num_hosts < num_processes:
            ways.append(("hybrid", plans["shard"], num_processes // num_hosts))
    links = {name: (rate, rate) for name, rate in WITHIN.items()}
    if num_hosts > 1:
        links = {f"{a} + {b}": (WITHIN[a], min(WITHIN[a], ACROSS[b])) for a in WITHIN for b in ACROSS}
    rows = []
    for way, whole, size in ways:
        card, division = of_card(whole, size, num_processes), whole.division
        passes = math.ceil(whole.num_micro_batches / num_processes)
        gradients = 2 * 4 * whole.num_trainable * (num_processes - 1) / num_processes
        blocks = ends = 0.0
        if division is not None:
            share = (size - 1) / size
            blocks, ends = share * division.blocks_bytes, share * (division.table_bytes + division.head_bytes)
        seconds, single = {}, (whole.step_seconds or 0.0) / whole.num_micro_batches
        for name, (inner, slowest) in links.items():
            rate = inner if way == "hybrid" else slowest
            waiting = waiting_seconds(blocks / rate, whole.forward_seconds) + ends / rate
            seconds[name] = passes * (single + waiting) + gradients / slowest
        frozen = (parts.BASE, parts.SCALES, parts.MASKS, parts.DENSE)
        row = {
            "way": way,
            "num_sharing": size,
            "base_bytes": sum(card.moments[-1].by_component.get(name, 0) for name in frozen),
            "wire_bytes": round(passes * (2 * blocks + ends) + gradients),
            "step_seconds": seconds,
        }
        rows.append(
            row | {name: getattr(card, name) for name in ("peak_bytes", "fits", "host_bytes", "num_streamed")}
        )
    return rows


def _show_ways(console: Console, ways: Sequence[Mapping[str, Any]], title: str) -> None:
    table = Table("way", title=title, title_justify="left")
    links = [f"s a step, {link}" for link in ways[0]["step_seconds"]]
    for name in ("peak", "fits", "base", "received a step", "pinned on the host", "streamed", *links):
        table.add_column(name, justify="right")
    for way in ways:
        sizes = [size_text(way[name]) for name in ("base_bytes", "wire_bytes", "host_bytes")]
        fits = {None: "", True: "yes", False: "no"}[way["fits"]]
        times = [seconds_text(seconds) for seconds in way["step_seconds"].values()]
        table.add_row(way["way"], size_text(way["peak_bytes"]), fits, *sizes, str(way["num_streamed"]), *times)
    console.print(table)
