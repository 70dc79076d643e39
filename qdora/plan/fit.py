"""The plan of a recipe for a memory budget: the largest of its micro-batches, and what to change until it fits.

`plan` predicts; `within_budget` starts, changes or refuses a run before anything is loaded. Micro-batches are those of
the data if it can be read, else full ones.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from heapq import nlargest
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from qdora.data.batches import IGNORED, MicroBatch, StepLoader
from qdora.data.build_data import make_loader, micro_batch_tokens, num_steps_of
from qdora.data.mix import Mix
from qdora.errors import HubFailure, UserError
from qdora.files.environment import available_memory_bytes, held_memory_bytes
from qdora.memory.stream import NUM_SLOTS, check_host_embedding
from qdora.model.build_model import (
    Compute,
    find_source,
    keeps_scales,
)
from qdora.model.experts import stacks
from qdora.model.load import load_config
from qdora.model.source import ModelSource
from qdora.plan.plan import (
    ASSUMED,
    CONTEXT_BYTES,
    NCCL_BYTES,
    SLACK_SHARE,
    Change,
    DeviceKind,
    MicroBatchShape,
    Plan,
    PublicShape,
    Rates,
    of_card,
    over_budget,
    public_shapes,
)
from qdora.plan.step_plan import _known, _StepPlan
from qdora.recipe.recipe_file import override
from qdora.recipe.section import parse_size, with_settings
from qdora.recipe.settings import Recipe
from qdora.train.distributed import CAN_DIVIDE, Processes
from qdora.train.loss import check_router_loss

MOST_STEPS = 20_000

"""Steps whose sizes are compared; a plan says so if the run has more."""

_NUM_FIRST, _NUM_LARGE = 100, 50

"""Steps that are made: those at the beginning, and of each kind of large ones."""

Workload = Callable[[Recipe], tuple[list[MicroBatchShape], int]]

"""workload(recipe) -> its largest micro-batches (at least one), and the most that a step has."""


def assumed_workload(recipe: Recipe) -> tuple[list[MicroBatchShape], int]:
    """A micro-batch of rows of data.max_length with every token labelled, and the number of them in a step."""
    longest = recipe.data.max_length
    step_rows = recipe.train.batch or max(1, -(-(recipe.train.tokens_per_step or 1) // longest))
    rows = min(max(1, micro_batch_tokens(recipe) // longest), step_rows)
    packed = recipe.data.packing
    count = max(1, -(-step_rows // rows))
    masked = packed or rows > 1
    return [MicroBatchShape(rows, longest, rows * (longest - 1), masked, packed, accumulated=count > 1)], count


def workload_of_data(recipe: Recipe, mix: Mix, tokenizer: Any) -> Workload:
    """The workload of tokenised data. `mix` belongs to `recipe.data`; for a recipe with other data settings, and for
    streamed data, full micro-batches are assumed.
    """

    known: dict[tuple[int, int | None, int | None], list[int]] = {}  # plans differ in other things, mostly

    def workload(changed: Recipe) -> tuple[list[MicroBatchShape], int]:
        loader = make_loader(changed, mix, tokenizer)
        if changed.data != recipe.data or loader.streams:
            return assumed_workload(changed)
        steps = num_steps_of(changed, loader), changed.train.batch, changed.train.tokens_per_step
        if steps not in known:
            known[steps] = telling_steps(loader, steps[0])
        return largest_shapes(loader, known[steps])

    return workload


def telling_steps(loader: StepLoader, num_steps: int) -> list[int]:
    """Positions of the steps that a plan examines: the first, those with the longest examples, and the fullest."""
    steps = loader.step_sizes(min(num_steps, MOST_STEPS))
    longest = nlargest(_NUM_LARGE, steps, key=lambda step: step.longest)
    fullest = nlargest(_NUM_LARGE, steps, key=lambda step: step.num_tokens)
    return sorted({step.position for step in chain(steps[:_NUM_FIRST], longest, fullest)})


def largest_shapes(loader: StepLoader, positions: Iterable[int]) -> tuple[list[MicroBatchShape], int]:
    """The largest shapes of the steps at these positions (`not_exceeded`), and the most micro-batches of a step."""
    found: set[MicroBatchShape] = set()
    most = 1
    for position in positions:
        loader.position = position
        batches = loader.next_step().micro_batches
        most = max(most, len(batches))
        found.update(shape_of(batch, accumulated=index > 0) for index, batch in enumerate(batches))
    return not_exceeded(found), most


def shape_of(batch: MicroBatch, *, accumulated: bool) -> MicroBatchShape:
    """The shape of a micro-batch; `accumulated` if it is not the first of its step."""
    rows, length = batch.input_ids.shape
    num_labels = int((batch.labels[:, 1:] != IGNORED).sum())
    packed = batch.packing is not None
    # An unpadded batch has a mask of ones, which transformers leaves out.
    masked = packed or not bool(batch.attention_mask.all())
    return MicroBatchShape(rows, length, max(num_labels, 1), masked, packed=packed, accumulated=accumulated)


def not_exceeded(shapes: Iterable[MicroBatchShape]) -> list[MicroBatchShape]:
    """The shapes that no other one equals or exceeds in all of tokens, squared lengths, labels, masks and gradients."""

    def sizes(shape: MicroBatchShape) -> tuple[int, ...]:
        return (
            shape.num_tokens,
            shape.rows * shape.length**2,  # the scores of eager attention
            shape.rows * shape.length**2 * shape.masked,  # the mask of sdpa
            shape.num_labels,
            int(shape.masked),
            int(shape.packed),
            int(shape.accumulated),
        )

    kept: list[MicroBatchShape] = []
    for shape in sorted(shapes, key=sizes, reverse=True):
        mine = sizes(shape)
        if not any(all(a >= b for a, b in zip(sizes(other), mine, strict=True)) for other in kept):
            kept.append(shape)
    return kept


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


def plan(
    recipe: Recipe,
    budget: int | str | None = None,
    *,
    config: PreTrainedConfig | None = None,
    device_kind: DeviceKind = "cuda",
    workload: Workload = assumed_workload,
    num_processes: int = 1,
    num_sharing: int = 1,
    may_change: bool = True,
) -> Plan:
    """What a run needs, by component, and what to change if that is over the budget.

    Args:
        budget: Bytes, or a size such as "40GiB" (default: the recipe's `memory.budget`, unless that is auto).
        config: Config of the model (default: read from `model.source`; from the Hub only config.json). For a model that
            the Hub does not give it is made from `public_shapes`, if that has the model; `Plan.stored_shape` says so.
        device_kind: Device of the run; this machine need not have it.
        workload: The micro-batches of a recipe; the one that needs the most memory counts (default: full ones).
        num_processes: Processes of the run, each on a card of its own; the plan is that of one card.
        num_sharing: Processes that divide the base; 1: each holds all of it.
        may_change: Look for changes if the plan is over the budget.
    Raises UserError for a model or setting that a run would refuse, too.
    """
    if budget is None and recipe.memory.budget != "auto":
        budget = recipe.memory.budget
    limit = parse_size(budget) if isinstance(budget, str) else budget
    shape = _stored_shape(recipe) if config is None else None
    if shape is not None:
        config = shape.config()
    options: dict[str, Any] = {"device_kind": device_kind, "workload": workload, "config": config}
    options |= {"num_processes": num_processes, "num_sharing": num_sharing, "may_change": may_change}
    _, found = fit_recipe(recipe, limit, **options)
    return found if shape is None else replace(found, stored_shape=shape.source, context=shape.context)


def _stored_shape(recipe: Recipe) -> PublicShape | None:
    """The stored shape of the recipe's model if there is one and the Hub does not give the model."""
    shape = public_shapes().get(recipe.model.source)
    if shape is not None:
        try:
            find_source(recipe, weights=False)
        except HubFailure:
            return shape
    return None


def fit_recipe(
    recipe: Recipe,
    budget: int | None,
    *,
    config: PreTrainedConfig | None = None,
    device_kind: DeviceKind,
    workload: Workload,
    num_processes: int = 1,
    num_sharing: int = 1,
    may_change: bool = True,
    rates: Rates | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Recipe, Plan]:
    """The recipe with the neutral changes that it needs to fit, and its plan. The arguments are those of `plan`.

    Args:
        rates: Rates of the device (default: the assumed ones).
        dtype: What the run computes in, if its device is known (default: the recipe's; auto is bfloat16 on a GPU).
    """
    rates = rates or ASSUMED[device_kind]
    source = ModelSource("directory", Path(recipe.model.source), recipe.model.source)
    if config is None:
        source = find_source(recipe, weights=False)
        config = load_config(source)
    check_router_loss(recipe, config)
    known = _known(config, source, device_kind)
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    if recipe.memory.host_embeddings and device_kind == "cuda":
        check_host_embedding(known.model(torch.bfloat16, recipe.model.attention))

    def step_plans(changed: Recipe) -> list[_StepPlan]:
        shapes, count = workload(changed)
        return [_StepPlan(changed, known, shape, count, rates, run_dtype=dtype) for shape in shapes]

    def plan_of(changed: Recipe) -> Plan:
        plans = [of_card(each.plan(), num_sharing, num_processes) for each in step_plans(changed)]
        # Of the slowest shape: with less memory another shape has the peak, and the times would not compare.
        seconds = max((each.step_seconds for each in plans if each.step_seconds is not None), default=None)
        most = max(plans, key=lambda each: each.peak_bytes)
        even_bytes = None
        if stacks(known.model(torch.bfloat16, recipe.model.attention)):
            step = _StepPlan(changed, known, most.shape, most.num_micro_batches, rates, run_dtype=dtype, routing="even")
            even = of_card(step.plan(), num_sharing, num_processes)
            most, even_bytes = max(most, even, key=lambda each: each.peak_bytes), even.peak_bytes
        found = replace(most, budget_bytes=budget, step_seconds=seconds, even_routing_bytes=even_bytes)
        return replace(found, context=context)

    def seconds_of(changed: Recipe) -> float:
        return max(each.seconds(first.num_trainable) for each in step_plans(changed))

    first = plan_of(recipe)
    if first.fits is not False or not may_change:
        return recipe, first
    return with_changes(recipe, first, plan_of, seconds_of)


def num_sharing(recipe: Recipe, num_processes: int, num_here: int) -> int:
    """How many processes divide the base of a recipe, of all and of those on one machine; 1: each holds all of it."""
    return {"shard": num_processes, "hybrid": num_here}.get(recipe.train.parallel, 1)


def divided_recipe(recipe: Recipe) -> Recipe | None:
    """The recipe with a base that all processes divide; None if something in it keeps the base whole."""
    try:
        return override(_all_on_device(recipe), ["memory.host_embeddings=false", "train.parallel=shard"])
    except UserError:
        return None


def _all_on_device(recipe: Recipe) -> Recipe:
    return with_settings(recipe, base={"residency": "device", "streamed_blocks": None})


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
