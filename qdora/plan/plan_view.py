"""`qdora plan`, and a memory plan for people: as a table with a bar for each component, and as a figure."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.bar import Bar
from rich.console import Console
from rich.table import Table

from qdora.data import build_data, mix_plan
from qdora.errors import HubFailure, NoTokenizer, UserError
from qdora.files.console import consoles
from qdora.files.run_directory import PLAN_FILE, RunDirectory
from qdora.files.svg_figure import svg_file
from qdora.model.build_model import find_model
from qdora.plan.division import ProcessPlan, num_sharing, process_lines, process_plans, whole_plans
from qdora.plan.memory_plan import plan
from qdora.plan.plan_contents import CONSTANTS, GIB, DeviceKind, Plan, seconds_text
from qdora.plan.workload import MOST_STEPS, Workload, assumed_workload, workload_of_data
from qdora.recipe.byte_size import parse_size, size_text
from qdora.recipe.recipe_file import missing_files
from qdora.recipe.section import with_settings
from qdora.recipe.settings import Recipe

logger = logging.getLogger("qdora")

_ROUND_LENGTH = 64


def plan_run(
    recipe: Recipe,
    where: str,
    *,
    budget: str | None = None,
    device_kind: DeviceKind = "cuda",
    figure: Path | None = None,
    console: Console | None = None,
    num_processes: int = 1,
    num_hosts: int = 1,
) -> dict[str, Any]:
    """Read and tokenise the data, count what the run takes from each source, and plan the memory of a step.

    Only the config and the tokenizer of the model are loaded. The plan is also drawn to `figure`, an SVG file.

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
        logger.info("This machine has no GPU: the run is planned for one. --device cpu plans it for this machine.")
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
        for text in mix_plan.mix_warnings(mix):
            logger.warning(text)
        for text in mix_plan.mix_facts(mix):
            logger.info(text)
    planning: dict[str, Any] = {"device_kind": device_kind, "workload": workload, "num_processes": num_processes}
    shared = planning | {"num_sharing": num_sharing(recipe, num_processes, num_processes // num_hosts)}
    assumed += _after_gates(recipe, shared)
    found = replace(plan(recipe, limit, **shared), assumptions=assumed)
    show_plan(results, found)
    if figure is not None:
        draw_plan(found, figure)
    document: dict[str, Any] = {"mix": None if mix is None else asdict(mix), "memory": found.to_dict()}
    least: Plan | ProcessPlan = found
    keeps_length = not any("data.max_length" in change.setting for change in found.changes)
    can_fit = found.fits or (found.changes_fit and keeps_length)
    lines = []
    if num_processes > 1:
        plan_of = partial(plan, budget=found.budget_bytes, may_change=False, **planning)
        ways = process_plans(whole_plans(recipe, plan_of), num_processes, num_hosts)
        lines += process_lines(ways, num_processes, num_hosts, changes_help=found.changes_fit)
        document["processes"] = [each.to_dict() for each in ways]
        least = min(ways, key=lambda each: each.peak_bytes)
        can_fit = can_fit or any(each.fits for each in ways)
    elif recipe.train.divides_base:
        logger.info("train.parallel is %s: --processes N plans a card of N.", recipe.train.parallel)
    if not can_fit and (tight := sequence_line(recipe, found, least)) is not None:
        lines.append(tight)
    for line in lines:
        results.print(line, soft_wrap=True)
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


def _after_gates(recipe: Recipe, planning: Mapping[str, Any]) -> list[str]:
    """For a run with gates: say that the plan has all components, and what the run needs after the last removal."""
    gates = recipe.adapter.gates
    if gates is None:
        return []
    text = "the gates have removed no component yet"
    if gates.mean_rank is None or recipe.adapter.resume_from is not None:
        return [text]
    rank = math.ceil(gates.mean_rank)
    changes = {"rank": rank, "rank_pattern": {}, "same_scaling": False, "gates": None}
    later = plan(with_settings(recipe, adapter=changes), may_change=False, **planning)
    return [f"{text}; if they leave rank {rank} in every layer, the peak is {size_text(later.peak_bytes)}"]


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
    if plan.expert_launches is not None:
        lines.append(
            f"Experts: about {float(f'{plan.expert_launches:.2g}'):,.0f} kernel launches a micro-batch on cards of "
            "compute capability other than 9 and 10 (A100, RTX 4090, RTX 5090)."
        )
    if plan.stored_shape is not None:
        lines.append(f"Model: the shape stored in qdora, from {plan.stored_shape}, because the Hub does not give it.")
    if plan.step_seconds is not None:
        said = seconds_text(plan.step_seconds)
        lines.append(f"Predicted time: {said} per step on one card, at the rates of {plan.rates['name']}.")
    if plan.pageable_bytes:
        lines.append(f"Between updates {size_text(plan.pageable_bytes)} of optimizer states can move to the host.")
    if plan.host_bytes:
        lines.append(f"Pinned host memory: {size_text(plan.host_bytes)}.")
    if plan.embedding_bytes:
        lines.append(f"Host memory that is not pinned: {size_text(plan.embedding_bytes)} for the embedding.")
    lines += [f"Assumed: {text}" for text in plan.assumptions]
    if plan.fits is False:
        lines.append(
            "To fit, change one after the other (cheapest first):"
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


def sequence_line(recipe: Recipe, plan: Plan, card: Plan | ProcessPlan) -> str | None:
    """What would help a card that cannot hold a single sequence; None if its length is not what is too much.

    Args:
        plan: Has the budget and the shape of the micro-batch.
        card: What a card needs.
    """
    shape, budget = plan.shape, plan.budget_bytes
    if budget is None or shape.rows > 1 or card.sequence_bytes < min(budget / 2, card.peak_bytes - budget):
        return None
    left = 1 - (card.peak_bytes - budget) / card.sequence_bytes
    length = int(shape.length * left) // _ROUND_LENGTH * _ROUND_LENGTH
    memory, on_gpu = recipe.memory, plan.device_kind == "cuda"
    helps = [
        (True, "a shorter data.max_length" + (f" (about {length:,} fit)" if length > 0 else "")),
        (not memory.checkpointing, "memory.checkpointing"),
        (on_gpu and not memory.offload_activations, "memory.offload_activations"),
        (memory.loss_chunk == "auto" or memory.loss_chunk > 64, "a smaller memory.loss_chunk"),
    ]
    return (
        f"A sequence of {shape.length:,} tokens takes {size_text(card.sequence_bytes)} on its card, and more cards do "
        f"not divide it: there is no context parallelism. What helps: {', '.join(text for may, text in helps if may)}."
    )


def _verdict(plan: Plan) -> str:
    if plan.budget_bytes is None:
        return ""
    left = plan.budget_bytes - plan.peak_bytes
    said = f"{size_text(left)} left" if left >= 0 else f"{size_text(-left)} too much"
    return f"{'fits' if plan.fits else 'does not fit'} in {size_text(plan.budget_bytes)}: {said}"


def draw_plan(plan: Plan, path: Path) -> None:
    """Draw a plan as an SVG: one row a component, each bar starting where the one before ends, up to the peak."""
    found = plan.components
    with svg_file(path, 8, 0.6 + 0.34 * (len(found) + 1)) as figure:
        axes = figure.add_subplot()
        start = 0.0
        for row, (name, num_bytes) in enumerate(found.items()):
            size = num_bytes / GIB
            axes.barh(row, size, left=start, color="0.6" if name in CONSTANTS else "C0")
            axes.text(start + size, row, f" {size_text(num_bytes)}", va="center", fontsize=8)
            start += size
        axes.set_yticks(range(len(found)), list(found))
        if plan.budget_bytes is not None:
            axes.axvline(plan.budget_bytes / GIB, color="C3", linestyle="--", linewidth=1)
        axes.set_xlim(0, 1.15 * max(start, (plan.budget_bytes or 0) / GIB))
        axes.invert_yaxis()
        axes.set_xlabel("GiB")
        axes.set_title(f"{size_text(plan.peak_bytes)} at the peak: {plan.peak.name}", fontsize=10)


def keep_plan(run: RunDirectory, plan: Plan) -> None:
    """Write a plan into a run directory: plan.json and figures/memory_plan.svg."""
    run.write_json(PLAN_FILE, plan.to_dict())
    draw_plan(plan, run.inside("figures") / "memory_plan.svg")
