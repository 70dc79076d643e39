"""qdora plan: what a run will need and what it will see of its data, without loading the model."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from qdora.config import Recipe
from qdora.data.mix_plan import MixPlan, plan_mix
from qdora.errors import UserError
from qdora.memory.plan import DeviceKind
from qdora.recipe_file import missing_files
from qdora.sizes import parse_size, size_text
from qdora.verbs.assemble import find_model, make_loader, num_steps_of, read_data, tokenized_mix
from qdora.verbs.plan_memory import plan
from qdora.verbs.plan_workload import Workload, assumed_workload, workload_of_data
from qdora.verbs.show import default_console, show_mix
from qdora.verbs.show_plan import draw_plan, show_plan


def plan_run(
    recipe: Recipe,
    where: str,
    *,
    budget: str | None = None,
    device_kind: DeviceKind = "cuda",
    figure: Path | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Read and tokenise the data where it can be read, count what each step takes, and plan the memory of a step.

    Of the model only the config and the tokenizer are loaded.

    Args:
        recipe: The run.
        where: Its name in error lines.
        budget: A size such as 40GiB; None: the recipe's own.
        device_kind: Where the run is to be.
        figure: An SVG to draw the plan to.
        console: Where the tables are shown; standard error by default.
    Returns:
        JSON values: "memory" as `Plan.to_dict`, and "mix" as in mix.json of a run, or null where the data could not be
        read.
    Raises:
        UserError: What `train_run` refuses about the data or the model's config; a budget that is no size.
    """
    console = console or default_console()
    faults = missing_files(recipe, where)
    if faults:
        raise UserError(*faults)
    try:
        limit = None if budget is None else parse_size(budget)
    except ValueError as error:
        raise UserError(f"--budget: {error}") from None
    mix, workload, assumed = _workload(recipe)
    if mix is not None:
        show_mix(console, mix)
    assumed += _after_gates(recipe, device_kind, workload)
    found = replace(plan(recipe, limit, device_kind=device_kind, workload=workload), assumptions=assumed)
    show_plan(console, found)
    if figure is not None:
        draw_plan(found, figure)
    return {"mix": None if mix is None else mix.to_dict(), "memory": found.to_dict()}


def _after_gates(recipe: Recipe, device_kind: DeviceKind, workload: Workload) -> list[str]:
    """What a run with gates needs after the last removal: the plan itself is of all components."""
    gates = recipe.adapter.gates
    if gates is None:
        return []
    text = "all components, as before adapter.gates removes any"
    if gates.mean_rank is None or recipe.adapter.resume_from is not None:
        return [text]
    rank = math.ceil(gates.mean_rank)
    changes = {"rank": rank, "rank_pattern": {}, "same_scaling": False, "gates": None}
    adapter = recipe.adapter.model_copy(update=changes)
    later = plan(recipe.model_copy(update={"adapter": adapter}), device_kind=device_kind, workload=workload)
    return [f"{text}; with rank {rank} in all layers, as it may be at the end, {size_text(later.peak_bytes)}"]


def _workload(recipe: Recipe) -> tuple[MixPlan | None, Workload, list[str]]:
    """The mix and the micro-batches of the data; where it cannot be read, what is assumed."""
    full = "every micro-batch is full of rows of data.max_length, all of their tokens labelled"
    try:
        _, tokenizer = find_model(recipe, weights=False)
        train, _ = read_data(recipe.data)
    except UserError as error:
        return None, assumed_workload, [f"{full}, since the data cannot be read: {error.faults[0]}"]
    mix = tokenized_mix(recipe, tokenizer, train)
    loader = make_loader(recipe, mix, tokenizer)
    found = plan_mix(mix, loader, num_steps_of(recipe, loader))
    return found, workload_of_data(recipe, mix, tokenizer), [f"{full}: the data is streamed"] if loader.streams else []
