"""What to change in a recipe so that its run fits into the memory budget, cheapest first."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from qdora.data.build_data import micro_batch_tokens
from qdora.memory.streaming import NUM_SLOTS
from qdora.plan.plan_contents import SLACK_SHARE, Change, DeviceKind, Plan
from qdora.recipe.recipe_file import override
from qdora.recipe.settings import Recipe

# A change that saves a smaller share of the tensors' bytes is not proposed.
_LEAST_SAVING = 0.002


@dataclass(frozen=True)
class _Candidate:
    settings: tuple[str, ...]
    neutral: bool


def with_changes(
    recipe: Recipe, first: Plan, plan_of: Callable[[Recipe], Plan], seconds_of: Callable[[Recipe], float]
) -> tuple[Recipe, Plan]:
    """Change a recipe until its plan fits: first by neutral changes, then by others, the faster ones first.

    A change is neutral if the trained numbers stay the same, up to rounding. `first` is the recipe's plan, `plan_of`
    plans a changed recipe for the same budget, and `seconds_of` predicts the time of its step without a plan.

    Returns:
        The recipe with the neutral changes that it needed, and `first` with all changes.
    """
    found: list[Change] = []
    changed, now = recipe, first
    fitting = recipe
    for neutral in (True, False):
        options = [each for each in _candidates(recipe, first.device_kind) if each.neutral is neutral]
        for each in sorted(options, key=lambda option: seconds_of(override(recipe, option.settings))):
            if now.fits:
                return fitting, replace(first, changes=tuple(found))
            candidate = override(changed, each.settings)
            plan = plan_of(candidate)
            if plan.tensor_bytes >= now.tensor_bytes * (1 - _LEAST_SAVING):
                continue
            changed, now = candidate, plan
            found.append(Change(", ".join(each.settings), plan.peak_bytes, plan.step_seconds or 0.0, neutral))
            if neutral:
                fitting = changed
        if neutral and not now.fits:
            changed, now, settings = _with_streaming(changed, now, plan_of)
            if settings:
                fitting = changed
                found.append(Change(", ".join(settings), now.peak_bytes, now.step_seconds or 0.0, neutral))
    return fitting, replace(first, changes=tuple(found))


def _with_streaming(
    recipe: Recipe, plan: Plan, plan_of: Callable[[Recipe], Plan]
) -> tuple[Recipe, Plan, tuple[str, ...]]:
    """The recipe with just enough blocks streamed, its plan, and the overrides that do it."""
    overrides: tuple[str, ...] = ()
    while not plan.fits and (more := _streaming(recipe, plan)):
        # The rounding of sizes can leave a little too much; then one more block is streamed
        overrides, recipe = more, override(recipe, more)
        plan = plan_of(recipe)
    return recipe, plan, overrides


def _streaming(recipe: Recipe, plan: Plan) -> tuple[str, ...]:
    """Overrides that stream as many blocks as it takes to fit, or all; empty if that saves nothing."""
    residency = "host" if plan.device_kind == "cuda" else "disk"
    if not plan.block_bytes or recipe.base.residency not in ("device", residency):
        return ()
    least = plan.block_bytes * (1 + SLACK_SHARE[plan.device_kind])
    excess = plan.peak_bytes - (plan.budget_bytes or 0)
    before, slots = (recipe.base.streamed_blocks or plan.num_blocks), 0
    if recipe.base.residency == "device":
        before, slots = 0, NUM_SLOTS
    count = min(before + slots + math.ceil(excess / least), plan.num_blocks)
    if count <= max(before, slots):
        return ()
    checkpointing = () if recipe.memory.checkpointing else ("memory.checkpointing=true",)
    return (*checkpointing, f"base.residency={residency}", f"base.streamed_blocks={count}")


def _candidates(recipe: Recipe, device_kind: DeviceKind) -> list[_Candidate]:
    """Overrides that may need less memory, each valid by itself."""
    found = []

    def offer(*settings: str, neutral: bool) -> None:
        found.append(_Candidate(settings, neutral))

    longest, asked = recipe.data.max_length, micro_batch_tokens(recipe)
    smaller = {max(longest, asked // 2), longest}
    for tokens in sorted(smaller):
        if tokens < asked and tokens <= (recipe.train.tokens_per_step or tokens):
            offer(f"train.micro_batch_tokens={tokens}", neutral=True)
    chunk = recipe.memory.loss_chunk
    if chunk == "auto" or chunk > 64:
        offer("memory.loss_chunk=64", neutral=True)
    if not recipe.memory.checkpointing:
        offer("memory.checkpointing=true", neutral=True)
    if device_kind == "cuda" and not recipe.memory.offload_activations:
        before = () if recipe.memory.checkpointing else ("memory.checkpointing=true",)
        offer(*before, "memory.offload_activations=true", neutral=True)
    if device_kind == "cuda" and not recipe.memory.host_embeddings and recipe.adapter.kind != "full":
        offer("memory.host_embeddings=true", neutral=True)
    trains_adapter = recipe.adapter.kind in ("lora", "dora")
    if recipe.train.optimizer in ("adamw", "paged_adamw_32bit"):
        offer("train.optimizer=paged_adamw_8bit", neutral=False)
    if recipe.train.optimizer == "lion":
        offer("train.optimizer=paged_lion_8bit", neutral=False)
    if trains_adapter and recipe.base.quant in ("none", "int8"):
        offer("base.quant=nf4", neutral=False)
    if recipe.base.quant in ("nf4", "fp4") and not recipe.base.double_quant:
        offer("base.double_quant=true", neutral=False)
    if trains_adapter and recipe.adapter.resume_from is None and recipe.adapter.rank >= 16:
        offer(f"adapter.rank={recipe.adapter.rank // 2}", f"adapter.alpha={recipe.adapter.alpha / 2:g}", neutral=False)
    if recipe.data.max_length >= 512:
        short = recipe.data.max_length // 2
        fewer = [f"train.micro_batch_tokens={short}"] if recipe.train.micro_batch_tokens != "auto" else []
        too_long = ["data.too_long=truncate"] if recipe.data.too_long == "error" else []
        offer(f"data.max_length={short}", *fewer, *too_long, neutral=False)
    return found
