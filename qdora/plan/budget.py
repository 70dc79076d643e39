"""A run against its `memory.budget`, before anything is loaded: it starts, is changed, or is refused."""

from __future__ import annotations

import logging
from typing import Any

import torch

from qdora.errors import UserError
from qdora.files.environment import available_memory_bytes, held_memory_bytes
from qdora.model.build_model import Compute
from qdora.plan.division import divided_recipe, num_sharing
from qdora.plan.memory_plan import fit_recipe
from qdora.plan.plan_contents import CONTEXT_BYTES, NCCL_BYTES, DeviceKind, Plan, over_budget
from qdora.plan.workload import Workload
from qdora.recipe.byte_size import parse_size
from qdora.recipe.settings import Recipe
from qdora.train.distributed import CAN_DIVIDE, Processes

logger = logging.getLogger("qdora")


def within_budget(
    recipe: Recipe, compute: Compute, workload: Workload, *, force: bool = False, processes: Processes = Processes()
) -> tuple[Recipe, Plan | None]:
    """Check a run against `memory.budget`; returns the recipe that runs, and its plan (None without a budget).

    With train.parallel auto the recipe has shard if the base fits divided and not whole. With budget auto it has the
    neutral changes that it needs to fit. Over the budget: a warning with `force`, else UserError, which says what to
    change.

    Args:
        processes: Those of the run, which all call this; budget auto is what the fullest of their devices has free.
    """
    asked, parallel = recipe.memory.budget, recipe.train.parallel
    if asked is None:
        return recipe, None
    budget = min(processes.gather(free_bytes(compute.device, processes.size))) if asked == "auto" else parse_size(asked)
    kind: DeviceKind = "cuda" if compute.device.type == "cuda" else "cpu"
    options: dict[str, Any] = {"device_kind": kind, "workload": workload, "dtype": compute.dtype}
    options["num_processes"] = processes.size
    sharing = num_sharing(recipe, processes.size, processes.num_here)
    changed, plan = fit_recipe(recipe, budget, num_sharing=sharing, **options)
    if plan.fits:
        return recipe, plan
    if parallel == "auto" and CAN_DIVIDE and processes.size > 1 and (shared := divided_recipe(recipe)) is not None:
        _, divided = fit_recipe(shared, budget, num_sharing=processes.size, **options)
        if divided.fits:
            logger.info("train.parallel auto: shard, since the whole base does not fit.")
            return shared, divided
    if asked == "auto" and any(change.neutral and change.peak_bytes <= budget for change in plan.changes):
        for change in plan.changes:
            logger.info("memory.budget auto: %s.", change.setting)
        return changed, fit_recipe(changed, budget, num_sharing=sharing, **options)[1]
    if not force:
        raise UserError(over_budget(plan))
    logger.warning("%s", over_budget(plan, forced=True))
    return recipe, plan


def free_bytes(device: torch.device, num_processes: int = 1) -> int:
    """Bytes of a device that a plan may count.

    A plan counts the whole process, so what this one already holds is no loss. CUDA does not say how much that is: on a
    GPU the context is neither free nor left out of the plan, and a run gets less than it could take. With several
    processes NCCL has taken the buffers of their first group, so what a plan counts for these is added to what is free.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0]) + (NCCL_BYTES if num_processes > 1 else 0)
    return available_memory_bytes() + min(held_memory_bytes(), CONTEXT_BYTES["cpu"])
