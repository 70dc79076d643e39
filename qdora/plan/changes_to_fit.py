"""What to change in a recipe so that its run fits into the memory budget, cheapest first."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from qdora.data.build_data import micro_batch_tokens
from qdora.errors import UserError
from qdora.memory.stream import NUM_SLOTS
from qdora.model.build_model import keeps_scales
from qdora.plan.plan_contents import SLACK_SHARE, Change, DeviceKind, Plan
from qdora.recipe.recipe_file import override
from qdora.recipe.settings import Recipe

# A change that saves a smaller share of the tensors' bytes is not proposed.
_LEAST_SAVING = 0.002


_Overrides = tuple[str, ...]


def with_changes(
    recipe: Recipe, first: Plan, plan_of: Callable[[Recipe], Plan], seconds_of: Callable[[Recipe], float]
) -> tuple[Recipe, Plan]:
    """Change a recipe until its plan fits: first by neutral changes, then by others, the faster ones first.

    A change is neutral if the trained numbers stay the same, up to rounding. `first` is the recipe's plan, `plan_of`
    plans a changed recipe for the same budget, and `seconds_of` estimates the time of its step without a plan.

    Returns:
        The recipe with the neutral changes that it needed, and `first` with all changes.
    """
    found: list[Change] = []
    changed, now = recipe, first
    fitting = recipe
    for neutral, candidates in zip((True, False), _candidates(recipe, first.device_kind), strict=True):
        options = {each: valid for each in candidates if (valid := _overridden(recipe, each)) is not None}
        for each in sorted(options, key=lambda option: seconds_of(options[option])):
            if now.fits:
                return fitting, replace(first, changes=tuple(found))
            candidate = _overridden(changed, each)
            if candidate is None:
                continue
            plan = plan_of(candidate)
            if plan.tensor_bytes >= now.tensor_bytes * (1 - _LEAST_SAVING):
                continue
            changed, now = candidate, plan
            found.append(Change(", ".join(each), plan.peak_bytes, plan.step_seconds or 0.0, neutral))
            if neutral:
                fitting = changed
        if neutral and not now.fits:
            changed, now, settings = with_streaming(changed, now, plan_of)
            if settings:
                fitting = changed
                found.append(Change(", ".join(settings), now.peak_bytes, now.step_seconds or 0.0, neutral))
    return fitting, replace(first, changes=tuple(found))


def with_streaming(recipe: Recipe, plan: Plan, plan_of: Callable[[Recipe], Plan]) -> tuple[Recipe, Plan, _Overrides]:
    """The recipe with just enough blocks streamed, or all, its plan, and the overrides that do it.

    Nothing is changed if the recipe fits, has no budget, or does not go together with streamed blocks.
    """
    overrides: _Overrides = ()
    while plan.fits is False and (more := _streaming(recipe, plan)):
        streamed = _overridden(recipe, more)
        if streamed is None:
            break
        # The rounding of sizes can leave a little too much; then one more block is streamed
        overrides, recipe = more, streamed
        plan = plan_of(recipe)
    return recipe, plan, overrides


def _overridden(recipe: Recipe, overrides: _Overrides) -> Recipe | None:
    """The changed recipe; None if its settings do not go together, such as a rank below the mean rank of its gates."""
    try:
        return override(recipe, overrides)
    except UserError:
        return None


def _streaming(recipe: Recipe, plan: Plan) -> _Overrides:
    """Overrides that stream as many blocks as it takes to fit, or all; empty if that saves nothing."""
    if not plan.block_bytes:
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
    return (*checkpointing, "base.residency=host", f"base.streamed_blocks={count}")


def _candidates(recipe: Recipe, device_kind: DeviceKind) -> tuple[list[_Overrides], list[_Overrides]]:
    """Overrides that may need less memory: neutral ones, and others. `_overridden` leaves out invalid ones."""
    train, base, adapter, memory, data = recipe.train, recipe.base, recipe.adapter, recipe.memory, recipe.data
    asked, chunk, on_gpu = micro_batch_tokens(recipe), memory.loss_chunk, device_kind == "cuda"
    keeps_embedding = adapter.kind == "full" or (bool(adapter.also_train) and adapter.also_train_rows == "all")
    keeps_embedding |= train.divides_base
    recompute = () if memory.checkpointing else ("memory.checkpointing=true",)
    neutral: list[tuple[bool, _Overrides]] = [
        (tokens < asked and tokens <= (train.tokens_per_step or tokens), (f"train.micro_batch_tokens={tokens}",))
        for tokens in sorted({max(data.max_length, asked // 2), data.max_length})
    ]
    neutral += [
        (base.quant != "none" and keeps_scales(recipe), ("memory.keep_scales=false",)),
        (chunk == "auto" or chunk > 64, ("memory.loss_chunk=64",)),
        (not memory.checkpointing, recompute),
        (on_gpu and not memory.offload_activations, (*recompute, "memory.offload_activations=true")),
        (on_gpu and not memory.host_embeddings and not keeps_embedding, ("memory.host_embeddings=true",)),
    ]
    trains_adapter, short = adapter.kind in ("lora", "dora"), data.max_length // 2
    # Without it a micro-batch could have more of the shorter rows
    fewer = (f"train.micro_batch_tokens={short}",) if short <= (train.tokens_per_step or short) else ()
    experts = adapter.experts.rank or 1
    too_long = ("data.too_long=truncate",) if data.too_long == "error" else ()
    others: list[tuple[bool, _Overrides]] = [
        (train.optimizer in ("adamw", "paged_adamw_32bit"), ("train.optimizer=paged_adamw_8bit",)),
        (train.optimizer == "lion", ("train.optimizer=paged_lion_8bit",)),
        (trains_adapter and base.quant in ("none", "int8"), ("base.quant=nf4",)),
        (base.quant in ("nf4", "fp4") and not base.double_quant, ("base.double_quant=true",)),
        (
            trains_adapter and adapter.resume_from is None and adapter.rank >= 16,
            (f"adapter.rank={adapter.rank // 2}", f"adapter.alpha={adapter.alpha / 2:g}"),
        ),
        (
            trains_adapter and adapter.resume_from is None and experts > 1,
            (f"adapter.experts.rank={experts // 2}",),
        ),
        (data.max_length >= 512, (f"data.max_length={short}", *fewer, *too_long)),
    ]
    return [each for may, each in neutral if may], [each for may, each in others if may]
