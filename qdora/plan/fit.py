"""The plan of a recipe for a memory budget: its largest micro-batches, and what to change until it fits."""

from __future__ import annotations

import logging
import math
from bisect import bisect_left
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from heapq import nlargest
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from qdora.data.batches import IGNORED, StepLoader
from qdora.data.mix import Mix
from qdora.data.sources import make_loader, micro_batch_tokens, num_steps_of
from qdora.errors import HubFailure, UserError
from qdora.files.console import errors_only
from qdora.files.machine import available_memory_bytes, cpu_has_bfloat16, held_memory_bytes
from qdora.memory.stream import NUM_SLOTS
from qdora.model.adapter_file import describe_adapter, selected_modules
from qdora.model.attention import context_length
from qdora.model.build_model import DTYPES, Compute, find_source, keeps_scales
from qdora.model.checkpoint import tied_weights
from qdora.model.experts import stacks
from qdora.model.inject import is_linear, linear_layers
from qdora.model.load import block_list, load_config, quantization_of, with_quant
from qdora.model.source import ModelSource
from qdora.plan import plan as parts
from qdora.plan.fake_step import Step, empty_model, run_step
from qdora.plan.plan import (
    ASSUMED,
    Change,
    DeviceKind,
    MicroBatchShape,
    Moment,
    Plan,
    Work,
    of_card,
    public_shapes,
)
from qdora.quant.kernels import Routing, planned_on
from qdora.recipe.recipe_file import override
from qdora.recipe.section import parse_size, with_settings
from qdora.recipe.settings import Recipe
from qdora.train.distributed import CAN_DIVIDE, Processes
from qdora.train.loss import auto_chunk

logger = logging.getLogger("qdora")

MOST_STEPS = 20_000  # steps whose sizes are compared; a plan says so if the run has more
# workload(recipe) -> its largest micro-batches (at least one), and the most that a step has
Workload = Callable[[Recipe], tuple[list[MicroBatchShape], int]]


def assumed_workload(recipe: Recipe) -> tuple[list[MicroBatchShape], int]:
    """A micro-batch of rows of data.max_length with every token labelled, and the number of them in a step."""
    longest = recipe.data.max_length
    step_rows = recipe.train.batch or max(1, -(-(recipe.train.tokens_per_step or 1) // longest))
    rows = min(max(1, micro_batch_tokens(recipe) // longest), step_rows)
    packed, count = recipe.data.packing, max(1, -(-step_rows // rows))
    return [MicroBatchShape(rows, longest, rows * (longest - 1), packed or rows > 1, packed, count > 1)], count


def workload_of_data(recipe: Recipe, mix: Mix, tokenizer: Any) -> Workload:
    """The workload of tokenised data. With other data settings, or streamed data, full micro-batches are assumed."""
    positions: dict[tuple[int, int | None, int | None], list[int]] = {}  # plans differ in other things, mostly

    def workload(changed: Recipe) -> tuple[list[MicroBatchShape], int]:
        loader = make_loader(changed, mix, tokenizer)
        if changed.data != recipe.data or loader.streams:
            return assumed_workload(changed)
        key = num_steps_of(changed, loader), changed.train.batch, changed.train.tokens_per_step
        if key not in positions:  # the first steps, those with the longest examples, and the fullest
            steps = loader.step_sizes(min(key[0], MOST_STEPS))
            longest = nlargest(50, steps, key=lambda step: step.longest)
            fullest = nlargest(50, steps, key=lambda step: step.num_tokens)
            positions[key] = sorted({step.position for step in (*steps[:100], *longest, *fullest)})
        return largest_shapes(loader, positions[key])

    return workload


def largest_shapes(loader: StepLoader, positions: Iterable[int]) -> tuple[list[MicroBatchShape], int]:
    """The largest shapes of the steps at these positions (`not_exceeded`) and the longest one, and the most
    micro-batches of a step."""
    shapes: set[MicroBatchShape] = set()
    most = 1
    for position in positions:
        loader.position = position
        batches = loader.next_step().micro_batches
        most = max(most, len(batches))
        for index, batch in enumerate(batches):
            packed, num_labels = batch.packing is not None, int((batch.labels[:, 1:] != IGNORED).sum())
            masked = packed or not bool(batch.attention_mask.all())  # transformers leaves out a mask of ones
            rows, length = batch.input_ids.shape
            shapes.add(MicroBatchShape(rows, length, max(num_labels, 1), masked, packed, index > 0))
    longest = max(shapes, key=lambda shape: shape.length)  # for the warning of rows beyond the context
    return [*dict.fromkeys([*not_exceeded(shapes), longest])], most


def not_exceeded(shapes: Iterable[MicroBatchShape]) -> list[MicroBatchShape]:
    """The shapes that no other one equals or exceeds in all of tokens, squared lengths, labels, masks and gradients."""

    def sizes(shape: MicroBatchShape) -> tuple[int, ...]:
        scores = shape.rows * shape.length**2  # of eager attention; sdpa has a mask of that size
        flags = shape.masked, shape.packed, shape.accumulated
        return shape.num_tokens, scores, scores * shape.masked, shape.num_labels, *flags

    largest: list[MicroBatchShape] = []
    for shape in sorted(shapes, key=sizes, reverse=True):
        if not any(all(a >= b for a, b in zip(sizes(other), sizes(shape), strict=True)) for other in largest):
            largest.append(shape)
    return largest


@dataclass
class Planner:
    """A model on the meta device, which stays as it is, and the steps that were run on fake tensors."""

    model: PreTrainedModel
    dtype: torch.dtype  # of the activations
    device_kind: DeviceKind
    steps: dict[tuple[object, ...], Step] = field(default_factory=dict)

    def step(self, recipe: Recipe, shape: MicroBatchShape, routing: Routing) -> Step:
        memory = recipe.memory
        if recipe.adapter.resume_from is not None:  # as that one, whose values are not read
            held = describe_adapter(Path(recipe.adapter.resume_from))
            modules = selected_modules(self.model, held)
            ranks = {path: held.rank_of(path) for path, module in modules.items() if is_linear(module)}
            recipe = with_settings(
                recipe, adapter={"resume_from": None, "targets": list(ranks), "rank_pattern": ranks}
            )
        key = (
            recipe.base.model_dump_json(exclude={"residency", "streamed_blocks"}),
            recipe.adapter.model_dump_json(),
            (memory.checkpointing, memory.loss_chunk, keeps_scales(recipe)),
            (recipe.train.optimizer, len(recipe.model.add_tokens)),
            (shape, routing),
        )
        if key not in self.steps:
            with errors_only(), planned_on(self.device_kind, routing), torch.random.fork_rng(devices=[]):
                self.steps[key] = run_step(recipe, self.model, shape, self.device_kind)
        return self.steps[key]

    def work(self, recipe: Recipe, num_trainable: int) -> Work:
        """What a step with this many trainable parameters computes and moves."""
        model: Any = self.model
        blocks, base, memory = block_list(model), recipe.base, recipe.memory
        config = model.config.get_text_config()
        linear, met, top_k = 0, 0.0, getattr(config, "num_experts_per_tok", 1)
        for layer in linear_layers(model if blocks is None else blocks[1]).values():
            size = int(layer.weight.numel())  # type: ignore[operator]
            linear += size
            met += size * top_k / getattr(layer, "num_experts", top_k)
        heads = getattr(config, "num_attention_heads", 1)
        head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
        streamed_bytes, chunk = 0, memory.loss_chunk
        if base.residency != "device":
            streamed = parts.streamed_blocks(model, quantization_of(base), base.streamed_blocks)
            streamed_bytes = streamed.num_streamed * streamed.block_bytes
        return Work(
            num_linear=linear,
            share_met=met / max(linear, 1),
            num_head=config.vocab_size * config.hidden_size,
            head_chunk=auto_chunk(config.vocab_size, self.dtype.itemsize) if chunk == "auto" else chunk,
            num_trainable=num_trainable,
            attention_width=config.num_hidden_layers * heads * head_size,
            quantised=base.quant != "none",
            checkpointing=memory.checkpointing,
            full=recipe.adapter.kind == "full",
            streamed_bytes=streamed_bytes,
        )

    def plan(self, recipe: Recipe, shape: MicroBatchShape, num_micro_batches: int, routing: Routing) -> Plan:
        """The plan of a step. What is streamed or offloaded is computed from sizes."""
        base, model, rates = recipe.base, self.model, ASSUMED[self.device_kind]
        quantization, num_blocks = quantization_of(base), len((block_list(model) or ("", []))[1])
        moments, shapes = self.step(recipe, shape, routing)
        work = self.work(recipe, sum(math.prod(size) for size, _ in shapes.values()))
        sizes: dict[str, Any] = {"host_bytes": 0}
        if base.residency != "device":
            streamed = parts.streamed_blocks(model, quantization, base.streamed_blocks)
            moments = parts.with_streamed(moments, streamed)
            sizes = {"num_streamed": streamed.num_streamed, "host_bytes": streamed.host_bytes}
        if recipe.memory.offload_activations:
            moments, pinned = parts.with_offloaded(moments, num_blocks)
            sizes["host_bytes"] += pinned
        if base.measured is not None:
            once, sizes["compress_seconds"] = parts.compression(model, base, work, rates, self.dtype)
            dense = moments[0].by_component.get(parts.DENSE, 0)
            moments = [Moment("compression", None, {parts.DENSE: dense, parts.CALIBRATION: once}), *moments]
        if self.device_kind == "cuda" and num_blocks and base.quant != "none" and base.prune is None:
            sizes["block_bytes"] = parts.streamed_blocks(model, quantization, None).block_bytes
        tied = tied_weights(model)  # parameters of their own on the meta device
        with errors_only():
            division = parts.division_of(model, quantization, self.dtype, pruned=base.prune is not None)
        return Plan(
            device_kind=self.device_kind,
            moments=moments,
            shape=shape,
            num_micro_batches=num_micro_batches,
            num_blocks=num_blocks,
            num_trainable=work.num_trainable,
            num_weights=sum(weight.numel() for name, weight in model.named_parameters() if name not in tied),
            step_seconds=work.step_seconds(shape, num_micro_batches, rates) if shapes else None,
            forward_seconds=work.forward_seconds(shape, rates),
            rates=asdict(rates),
            division=division,
            **sizes,
        )


_planners: dict[tuple[object, ...], Planner] = {}  # the last one: the cells of a study have one model


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
    dtype: torch.dtype | None = None,
) -> Plan:
    """What one of `num_processes` cards needs, by component, and what to change if that is over the budget.

    `budget` is in bytes, or a size such as "40GiB" (default memory.budget, unless that is auto). Without `config` only
    config.json is read; a model that the Hub does not give may be in `public_shapes`. `num_sharing` cards divide the
    base.
    """
    if budget is None and recipe.memory.budget != "auto":
        budget = recipe.memory.budget
    limit = parse_size(budget) if isinstance(budget, str) else budget
    public, context = None, None
    source = ModelSource("directory", Path(recipe.model.source), recipe.model.source)
    if config is None:
        try:
            source = find_source(recipe, weights=False)
            config = load_config(source)
            context = context_length(config)
        except HubFailure:
            public = public_shapes().get(recipe.model.source)
            if public is None:
                raise
            config, context = public.config(), public.context
    recipe = with_quant(recipe, config)
    name, attention = recipe.model.dtype, recipe.model.attention
    if name == "auto":
        name = "bfloat16" if device_kind == "cuda" or cpu_has_bfloat16() else "float32"
    dtype = dtype or DTYPES[name]
    key = type(config), config.to_json_string(use_diff=False), source, device_kind, dtype, attention
    if key not in _planners:
        _planners.clear()
        with errors_only():
            _planners[key] = Planner(empty_model(config, source, dtype, attention), dtype, device_kind)
    planner = _planners[key]

    def plan_of(changed: Recipe) -> Plan:
        shapes, count = workload(changed)

        def card(shape: MicroBatchShape, routing: Routing) -> Plan:
            return of_card(planner.plan(changed, shape, count, routing), num_sharing, num_processes)

        plans = [card(shape, "skewed") for shape in shapes]
        # Of the slowest shape: with less memory another shape has the peak, and the times would not compare.
        seconds = max(plans, key=lambda each: each.step_seconds or 0.0).step_seconds
        most = max(plans, key=lambda each: each.peak_bytes)
        even_bytes = None
        if stacks(planner.model):
            even = card(most.shape, "even")
            most, even_bytes = max(most, even, key=lambda each: each.peak_bytes), even.peak_bytes
        return replace(
            most,
            recipe=changed,
            budget_bytes=limit,
            step_seconds=seconds,
            even_routing_bytes=even_bytes,
            longest_row=max(shape.length for shape in shapes),
            context_length=context,
        )

    def seconds_of(changed: Recipe) -> float:
        shapes, count = workload(changed)
        work = planner.work(changed, first.num_trainable)
        return max(work.step_seconds(shape, count, ASSUMED[device_kind]) for shape in shapes)

    first = plan_of(recipe)
    if first.fits is False and may_change:
        fitting, first = with_changes(recipe, first, plan_of, seconds_of)
        first = replace(first, recipe=fitting)
    return first if public is None else replace(first, stored_shape=public.source)


_Overrides = tuple[str, ...]


def with_changes(
    recipe: Recipe, first: Plan, plan_of: Callable[[Recipe], Plan], seconds_of: Callable[[Recipe], float]
) -> tuple[Recipe, Plan]:
    """Change a recipe until its plan fits: first by neutral changes, then by others, the faster ones first.

    `first` is the recipe's plan; `seconds_of` estimates the time of a step without a plan. Returns the recipe with the
    neutral changes that it needed, and `first` with all changes.
    """
    changes, changed, now, fitting = list[Change](), recipe, first, recipe
    for neutral, candidates in zip((True, False), _candidates(recipe, first.device_kind), strict=True):
        options = {
            each: valid for each in candidates if (valid := _overridden(recipe, each)) and valid != recipe
        }
        ordered = sorted(options, key=lambda option: seconds_of(options[option]))
        for overrides in [*ordered, None] if neutral else ordered:
            if now.fits:
                break
            least = 0.0 if overrides is None else 0.002 * now.tensor_bytes  # a smaller saving is not proposed
            if overrides is None:  # at last
                overrides = _streaming(changed, now, plan_of)
            candidate = _overridden(changed, overrides)
            if candidate is None or now.tensor_bytes - (plan := plan_of(candidate)).tensor_bytes <= least:
                continue
            changed, now = candidate, plan
            changes.append(Change(", ".join(overrides), plan.peak_bytes, plan.step_seconds or 0.0, neutral))
            fitting = changed if neutral else fitting
    return fitting, replace(first, changes=tuple(changes))


def _streaming(recipe: Recipe, plan: Plan, plan_of: Callable[[Recipe], Plan]) -> _Overrides:
    """The overrides that stream just enough blocks, or all; () if no block can be streamed."""

    def streaming(count: int) -> _Overrides:
        recompute = () if recipe.memory.checkpointing else ("memory.checkpointing=true",)
        return (*recompute, "base.residency=host", f"base.streamed_blocks={count}")

    def fits(count: int) -> bool:
        return bool(plan_of(override(recipe, streaming(count))).fits)

    counts = range(NUM_SLOTS + 1, plan.num_blocks + 1)
    if not plan.block_bytes or not counts or _overridden(recipe, streaming(plan.num_blocks)) is None:
        return ()
    return streaming(counts[bisect_left(counts[:-1], True, key=fits)])


def _overridden(recipe: Recipe, overrides: _Overrides) -> Recipe | None:
    try:
        return override(recipe, overrides)
    except UserError:  # settings that do not go together, such as a rank below the mean rank of the gates
        return None


def _candidates(recipe: Recipe, device_kind: DeviceKind) -> tuple[list[_Overrides], list[_Overrides]]:
    """Overrides that may need less memory: neutral ones, up to rounding, and others; some are invalid, or change
    nothing."""
    train, base, adapter, data = recipe.train, recipe.base, recipe.adapter, recipe.data
    asked, longest, in_step = micro_batch_tokens(recipe), data.max_length, train.tokens_per_step or math.inf
    tokens = sorted({max(longest, asked // 2), longest})
    recompute = () if recipe.memory.checkpointing else ("memory.checkpointing=true",)
    neutral: list[_Overrides] = [
        *((f"train.micro_batch_tokens={each}",) for each in tokens if each < asked and each <= in_step),
        ("memory.keep_scales=false",),
        ("memory.loss_chunk=64",),
        recompute,
        (*recompute, "memory.offload_activations=true") if device_kind == "cuda" else (),
    ]
    rule = train.optimizer.removeprefix("paged_").partition("_")[0]
    has_adapter = adapter.kind in ("lora", "dora")
    others: list[_Overrides] = [
        (f"train.optimizer=paged_{rule}_8bit",),
        ("base.quant=nf4",) if has_adapter and base.quant in ("none", "int8") else (),
        ("base.double_quant=true",),
    ]
    if has_adapter and adapter.resume_from is None:
        experts = adapter.experts.rank or 1
        if adapter.rank >= 16:
            others.append((f"adapter.rank={adapter.rank // 2}", f"adapter.alpha={adapter.alpha / 2:g}"))
        if experts > 1:
            others.append((f"adapter.experts.rank={experts // 2}",))
    if longest >= 512:
        short = longest // 2
        # Without it a micro-batch could have more of the shorter rows
        fewer = (f"train.micro_batch_tokens={short}",) if short <= in_step else ()
        too_long = ("data.too_long=truncate",) if data.too_long == "error" else ()
        others.append((f"data.max_length={short}", *fewer, *too_long))
    return neutral, others


def num_sharing(recipe: Recipe, num_processes: int, num_here: int) -> int:
    """How many of all processes, or of those on one machine, divide the base; 1: each holds all of it."""
    return {"shard": num_processes, "hybrid": num_here}.get(recipe.train.parallel, 1)


def divided_recipe(recipe: Recipe) -> Recipe | None:
    """The recipe with a base that all processes divide; None if something in it keeps the base whole."""
    recipe = with_settings(recipe, base={"residency": "device", "streamed_blocks": None})
    return _overridden(recipe, ("train.parallel=shard",))


def within_budget(
    recipe: Recipe,
    compute: Compute,
    workload: Workload,
    *,
    force: bool = False,
    processes: Processes = Processes(),
) -> tuple[Recipe, Plan | None]:
    """Check a run against `memory.budget`; returns the recipe that runs, and its plan (None without a budget).

    train.parallel auto becomes shard if the base fits divided and not whole. Budget auto is what the fullest device of
    all `processes` has free; the recipe gets the neutral changes that it needs.
    """
    asked = recipe.memory.budget
    if asked is None:
        return recipe, None
    budget = (
        min(processes.gather(free_bytes(compute.device, processes.size)))
        if asked == "auto"
        else parse_size(asked)
    )
    plan_of = partial(
        plan,
        budget=budget,
        device_kind="cuda" if compute.device.type == "cuda" else "cpu",
        workload=workload,
        dtype=compute.dtype,
        num_processes=processes.size,
    )
    sharing = num_sharing(recipe, processes.size, processes.num_here)
    found = plan_of(recipe, num_sharing=sharing)
    if found.fits:
        return recipe, found
    may_divide = recipe.train.parallel == "auto" and CAN_DIVIDE and processes.size > 1
    if may_divide and (shared := divided_recipe(recipe)) is not None:
        divided = plan_of(shared, num_sharing=processes.size)
        if divided.fits:
            logger.info("train.parallel auto: shard, since the whole base does not fit.")
            return shared, divided
    if asked == "auto" and any(change.neutral and change.peak_bytes <= budget for change in found.changes):
        for change in found.changes:
            logger.info("memory.budget auto: %s.", change.setting)
        return found.recipe, plan_of(found.recipe, num_sharing=sharing)
    if not force:
        raise UserError(parts.over_budget(found))
    logger.warning("--force: %s", parts.over_budget(found))
    return recipe, found


def free_bytes(device: torch.device, num_processes: int = 1) -> int:
    """Bytes of a device that a plan, which counts the whole process, may use: free ones, and what is already held.

    On a GPU CUDA does not say what that is; NCCL has taken the buffers of the first group.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0]) + (parts.NCCL_BYTES if num_processes > 1 else 0)
    return available_memory_bytes() + min(held_memory_bytes(), parts.CONTEXT_BYTES["cpu"])
