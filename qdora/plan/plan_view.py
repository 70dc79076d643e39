"""`qdora plan`, and a memory plan for people: a table with a bar for each component, and a sentence for the rest."""

from __future__ import annotations

import logging
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from rich.bar import Bar
from rich.console import Console
from rich.table import Table

from qdora.data import build_data, mix_plan
from qdora.errors import HubFailure, NoTokenizer, UserError
from qdora.files.console import consoles
from qdora.model.build_model import find_model
from qdora.plan.division import num_sharing, process_lines, process_plans, whole_plans
from qdora.plan.memory_plan import plan
from qdora.plan.plan_contents import DeviceKind, Plan, seconds_text
from qdora.plan.workload import MOST_STEPS, Workload, assumed_workload, workload_of_data
from qdora.recipe.byte_size import parse_size, size_text
from qdora.recipe.recipe_file import missing_files
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
    if recipe.adapter.gates is not None:
        assumed.append("the gates have removed no component yet")
    found = replace(plan(recipe, limit, **shared), assumptions=assumed)
    show_plan(results, found)
    document: dict[str, Any] = {"mix": None if mix is None else asdict(mix), "memory": found.to_dict()}
    if num_processes > 1:
        plan_of = partial(plan, budget=found.budget_bytes, may_change=False, **planning)
        ways = process_plans(whole_plans(recipe, plan_of), num_processes, num_hosts)
        for line in process_lines(ways, num_processes, num_hosts):
            results.print(line, soft_wrap=True)
        document["processes"] = [each.to_dict() for each in ways]
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
