"""The budget of a run, before anything of its model is loaded: refused over it, or changed to keep to it."""

from __future__ import annotations

import logging

import torch

from qdora.config import Recipe
from qdora.data.loader import StepLoader
from qdora.doctor import available_memory_bytes
from qdora.errors import UserError
from qdora.memory.plan import Plan
from qdora.sizes import parse_size
from qdora.verbs.assemble import Compute, micro_batch_tokens
from qdora.verbs.plan_memory import planned
from qdora.verbs.plan_workload import Workload
from qdora.verbs.show_plan import over_budget

logger = logging.getLogger("qdora")


def within_budget(
    recipe: Recipe, compute: Compute, workload: Workload, *, force: bool = False
) -> tuple[Recipe, Plan | None]:
    """The recipe as it may be run, and its plan; both as they were and None without a budget.

    Args:
        recipe: The run.
        compute: Where it is to run.
        workload: Its micro-batches.
        force: Only warn where the plan is over the budget.
    Returns:
        With budget auto, the recipe with the changes that it needs to fit.
    Raises:
        UserError: Over the budget; what to change is said.
    """
    asked = recipe.memory.budget
    if asked is None:
        return recipe, None
    budget = free_bytes(compute.device) if asked == "auto" else parse_size(asked)
    changed, plan = planned(recipe, budget, None, "cuda" if compute.device.type == "cuda" else "cpu", workload)
    if plan.fits:
        return recipe, plan
    if asked == "auto" and any(change.neutral and change.peak_bytes <= budget for change in plan.changes):
        for change in plan.changes:
            logger.info("memory.budget auto: %s.", change.setting)
        return changed, plan
    if not force:
        raise UserError(over_budget(plan))
    logger.warning("%s", over_budget(plan))
    return recipe, plan


def free_bytes(device: torch.device) -> int:
    """What a new process can take on a device.

    Raises:
        UserError: Where the system does not say.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    available = available_memory_bytes()
    if available is None:
        raise UserError("memory.budget: 'auto', but this system does not say what is free, allowed: a size.")
    return available


def apply_micro_batch_(loader: StepLoader, recipe: Recipe) -> None:
    """Let a loader cut micro-batches of the recipe's size; its steps stay what they are."""
    loader.micro_batch_tokens = micro_batch_tokens(recipe)
