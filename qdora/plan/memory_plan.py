"""The memory plan of a recipe, from the config of its model: no weights are loaded and no GPU is needed.

`plan` predicts what a run needs and proposes changes if that is over the budget (`budget` refuses or changes a run). A
plan runs one step of the model on fake tensors (`fake_step`) and counts live bytes.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedConfig, PreTrainedModel

from qdora.adapter.expert_linear import ExpertLinear
from qdora.errors import HubFailure
from qdora.files.console import errors_only
from qdora.files.environment import cpu_has_bfloat16
from qdora.memory.activation_offload import pages_bytes
from qdora.memory.host_residency import Piece, check_host_embedding, obstacle
from qdora.memory.streaming import NUM_SLOTS, Turns
from qdora.model.adapter_file import describe_adapter
from qdora.model.build_model import (
    DTYPES,
    find_source,
    keeps_scales,
    put_adapters,
    recompute_activations,
    set_kept_scales_,
)
from qdora.model.experts import stacks
from qdora.model.grouped_attention import fast_grouped_attention
from qdora.model.inject import adapted_layers, adapter_parameters, inject, linear_layers
from qdora.model.inplace_outputs import keep_inplace_outputs_
from qdora.model.load import Quantization, block_list, layers_to_quantize, load_config, quantization_of
from qdora.model.peft_config import AdapterDescription
from qdora.model.source import ModelSource
from qdora.model.stored_tensors import tied_weights
from qdora.model.trained_embeddings import extend_vocabulary, train_embeddings
from qdora.plan import plan_contents as parts
from qdora.plan.block_pattern import BlockPattern, extrapolated, find_pattern, keep_blocks_, signature
from qdora.plan.changes_to_fit import with_changes
from qdora.plan.division import division_of, of_card
from qdora.plan.fake_step import (
    StepRecorder,
    empty_model,
    fill_,
    ranks_of_adapter,
    set_unmasked_,
    update_bytes,
    without_kernels,
)
from qdora.plan.live_bytes import LiveBytes
from qdora.plan.plan_contents import DeviceKind, MicroBatchShape, Moment, Plan
from qdora.plan.public_shapes import PublicShape, public_shapes
from qdora.plan.step_time import ASSUMED, Rates, Work, forward_seconds, step_seconds
from qdora.plan.workload import Workload, assumed_workload
from qdora.quant.packed import empty_packed
from qdora.quant.planned_device import Routing, planned_on
from qdora.recipe.byte_size import parse_size
from qdora.recipe.settings import Recipe
from qdora.train.loss import auto_chunk, check_router_loss
from qdora.train.optimizer import AdapterOptimizer

_Shape = tuple[tuple[int, ...], torch.dtype]
_Shapes = dict[str, _Shape]


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
    return found if shape is None else replace(found, stored_shape=shape.source)


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
        return replace(most, budget_bytes=budget, step_seconds=seconds, even_routing_bytes=even_bytes)

    def seconds_of(changed: Recipe) -> float:
        return max(each.seconds(first.num_trainable) for each in step_plans(changed))

    first = plan_of(recipe)
    if first.fits is not False or not may_change:
        return recipe, first
    return with_changes(recipe, first, plan_of, seconds_of)


_Step = tuple[list[Moment], _Shapes]
"""The moments of a step, and the shapes of the trainable parameters."""


@dataclass
class _Known:
    """What the plans of a recipe and of its changes share: the model without tensors, and the steps that were run."""

    config: PreTrainedConfig
    source: ModelSource
    device_kind: DeviceKind
    skeletons: dict[tuple[torch.dtype, str], PreTrainedModel] = field(default_factory=dict)
    steps: dict[tuple[object, ...], _Step] = field(default_factory=dict)

    def new_model(self, dtype: torch.dtype, attention: str) -> PreTrainedModel:
        """A model on the meta device, to be changed."""
        with errors_only():
            return empty_model(self.config, self.source, dtype, attention)

    def model(self, dtype: torch.dtype, attention: str) -> PreTrainedModel:
        """The same, to be read only."""
        if (dtype, attention) not in self.skeletons:
            self.skeletons[dtype, attention] = self.new_model(dtype, attention)
        return self.skeletons[dtype, attention]


_latest: dict[tuple[object, ...], _Known] = {}
"""The one used last: the cells of a study have one model, and most of them the same steps."""


def _known(config: PreTrainedConfig, source: ModelSource, device_kind: DeviceKind) -> _Known:
    key = (type(config), config.to_json_string(use_diff=False), source, device_kind)
    if key not in _latest:
        _latest.clear()
        _latest[key] = _Known(config, source, device_kind)
    return _latest[key]


@dataclass
class _StepPlan:
    """Plans a step of a recipe for one shape of micro-batch."""

    recipe: Recipe
    known: _Known
    shape: MicroBatchShape
    num_micro_batches: int
    rates: Rates
    run_dtype: torch.dtype | None = None
    """Dtype of the activations, if the device of the run is known."""
    routing: Routing = "skewed"
    """How the tokens of a mixture divide among its experts; without one it makes no difference."""

    @property
    def device_kind(self) -> DeviceKind:
        """Device of the run."""
        return self.known.device_kind

    @cached_property
    def dtype(self) -> torch.dtype:
        """Dtype of the activations."""
        if self.run_dtype is not None:
            return self.run_dtype
        asked = self.recipe.model.dtype
        if asked == "auto":
            asked = "bfloat16" if self.device_kind == "cuda" or cpu_has_bfloat16() else "float32"
        return DTYPES[asked]

    @cached_property
    def adapter(self) -> AdapterDescription | None:
        """The adapter that the run resumes from."""
        before = self.recipe.adapter.resume_from
        return None if before is None else describe_adapter(Path(before))

    @property
    def skeleton(self) -> PreTrainedModel:
        """The model on the meta device; not to be changed."""
        return self.known.model(self.dtype, self.recipe.model.attention)

    def plan(self) -> Plan:
        """Measure a step and add what is known without one."""
        skeleton = self.skeleton
        found = block_list(skeleton)
        num_blocks = 0 if found is None else len(found[1])
        streamed, embedding_bytes = self._streamed, self._embedding_bytes
        tied = tied_weights(skeleton)  # parameters of their own on the meta device
        weights = sum(each.numel() for name, each in skeleton.named_parameters() if name not in tied)
        moments, shapes = self._step()
        work = self._work(sum(torch.Size(size).numel() for size, _ in shapes.values()))
        if streamed is not None:
            moments = with_streamed(moments, streamed)
        host_bytes = 0 if streamed is None else streamed.host_bytes
        if embedding_bytes:
            moments = without_embedding(moments, embedding_bytes)
            # Rows leave through memory that torch pins, in powers of two: one such block for each length, all together
            # less than twice the longest.
            rows = self.shape.num_tokens * work.row_bytes
            host_bytes += 2 << (rows - 1).bit_length()
        if self.recipe.memory.offload_activations:
            moments, kept = with_offloaded(moments, num_blocks)
            host_bytes += kept
        with errors_only():
            pruned = self.recipe.base.prune is not None
            division = division_of(skeleton, self._wanted, self.dtype, pruned=pruned)
        return Plan(
            device_kind=self.device_kind,
            moments=moments,
            shape=self.shape,
            num_micro_batches=self.num_micro_batches,
            host_bytes=host_bytes,
            embedding_bytes=embedding_bytes,
            block_bytes=self._block_bytes(),
            num_blocks=num_blocks,
            num_trainable=work.num_trainable,
            num_weights=weights,
            step_seconds=self.seconds(work.num_trainable) if shapes else None,
            forward_seconds=forward_seconds(work, self.shape, self.rates),
            rates=asdict(self.rates),
            division=division,
        )

    def _step(self) -> _Step:
        """Run a step, unless one was run already that needs the same of everything."""
        recipe = self.recipe
        base = recipe.base.model_dump_json(exclude={"residency", "streamed_blocks"})
        adapter = recipe.adapter.model_dump_json(), repr(self.adapter)
        memory = recipe.memory.checkpointing, recipe.memory.loss_chunk, keeps_scales(recipe)
        model = self.dtype, recipe.model.attention, len(recipe.model.add_tokens)
        train = recipe.train.optimizer, recipe.train.router_aux_loss > 0
        key = (*model, base, *adapter, *memory, *train, self.shape, self.routing)
        if key not in self.known.steps:
            with errors_only(), planned_on(self.device_kind, self.routing), torch.random.fork_rng(devices=[]):
                self.known.steps[key] = self._run_step()
        moments, shapes = self.known.steps[key]
        return list(moments), shapes

    def _run_step(self) -> _Step:
        found = block_list(self.skeleton)
        pattern = None
        if found is not None:
            ranks = {} if self.adapter is None else ranks_of_adapter(self.adapter, self.skeleton)
            pattern = find_pattern(
                [
                    signature(each, (_attention_kind(self.skeleton, index), _ranks_in(ranks, f"{found[0]}.{index}.")))
                    for index, each in enumerate(found[1])
                ]
            )
        if pattern is None or found is None:
            moments, shapes = self._moments(None)
        else:
            short, few = self._moments(pattern.kept(pattern.num_kept))
            longer, _ = self._moments(pattern.kept(pattern.num_kept + 1))
            moments = extrapolated(short, longer, pattern)
            shapes = _repeated(few, found[0], pattern)
        if shapes:
            workspace = update_bytes(shapes, self.recipe.train.optimizer, self.device_kind)
            moments[-1] = Moment("update", None, {**moments[-1].by_component, parts.UPDATE: workspace})
        return moments, shapes

    @cached_property
    def _streamed(self) -> StreamedBlocks | None:
        base = self.recipe.base
        if base.residency == "device":
            return None
        return streamed_blocks(self.skeleton, self._wanted, base.streamed_blocks)

    @cached_property
    def _embedding_bytes(self) -> int:
        """Bytes of an input embedding on the host; 0 if it is on the device."""
        wanted = self.recipe.memory.host_embeddings and self.device_kind == "cuda"
        if not wanted or obstacle(self.skeleton) is not None:
            return 0
        return int(self.skeleton.get_input_embeddings().weight.numel()) * self.dtype.itemsize

    def _block_bytes(self) -> int:
        """Bytes of the largest block that could be streamed to a GPU; blocks of a pruned base cannot."""
        base = self.recipe.base
        may = self.device_kind == "cuda" and base.quant != "none" and base.prune is None
        if not may or block_list(self.skeleton) is None:
            return 0
        return streamed_blocks(self.skeleton, self._wanted, None).block_bytes

    @property
    def _wanted(self) -> Quantization:
        return quantization_of(self.recipe.base)

    def seconds(self, num_trainable: int) -> float:
        """Estimated time of a step with this many trainable parameters."""
        return step_seconds(self._work(num_trainable), self.shape, self.num_micro_batches, self.rates)

    def _work(self, num_trainable: int) -> Work:
        skeleton: Any = self.skeleton
        found, streamed = block_list(skeleton), self._streamed
        blocks = skeleton if found is None else found[1]
        config = skeleton.config.get_text_config()
        chunk = self.recipe.memory.loss_chunk
        linear, met, top_k = 0, 0.0, getattr(config, "num_experts_per_tok", 1)
        for each in linear_layers(blocks).values():
            size = int(each.weight.numel())  # type: ignore[operator]
            linear += size
            met += size * (top_k / each.num_experts if isinstance(each, ExpertLinear) else 1.0)
        heads = getattr(config, "num_attention_heads", 1)
        head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
        return Work(
            num_linear=linear,
            share_met=met / max(linear, 1),
            num_head=config.vocab_size * config.hidden_size,
            head_chunk=auto_chunk(config.vocab_size, self.dtype.itemsize) if chunk == "auto" else chunk,
            num_trainable=num_trainable,
            attention_width=config.num_hidden_layers * heads * head_size,
            quantised=self.recipe.base.quant != "none",
            checkpointing=self.recipe.memory.checkpointing,
            full=self.recipe.adapter.kind == "full",
            streamed_bytes=0 if streamed is None else streamed.num_streamed * streamed.block_bytes,
            row_bytes=config.hidden_size * self.dtype.itemsize if self._embedding_bytes else 0,
        )

    def _moments(self, kept: list[int] | None) -> _Step:
        """Moments of a step of the model with the blocks `kept`, and the shapes of its trainable parameters."""
        recipe = self.recipe
        gc.collect()
        model = self.known.new_model(self.dtype, recipe.model.attention)
        found = block_list(model)
        if kept is not None and found is not None:
            keep_blocks_(model, found[0], kept)
        with FakeTensorMode(), LiveBytes() as live, without_kernels(model), fast_grouped_attention():
            fill_(model, self._wanted, self.dtype, live, pruned=recipe.base.prune is not None)
            if not self.shape.masked:
                set_unmasked_(model)
            if recipe.adapter.kind == "full":
                model.requires_grad_(True)
            if recipe.memory.checkpointing:
                recompute_activations(model)
            # How many rows are spare is not known without the tokenizer: as if none were.
            size = model.config.get_text_config().vocab_size
            new_tokens = range(size, size + len(recipe.model.add_tokens))
            with live.label(parts.DENSE):
                extend_vocabulary(model, new_tokens)
            with live.label(parts.ADAPTERS):
                self._put_adapters(model, kept, new_tokens)
                for layer in adapted_layers(model).values() if recipe.adapter.gates is not None else ():
                    layer.add_gate()
            keep_inplace_outputs_(model)
            live.reset_peak()
            parameters = adapter_parameters(model)
            if not parameters:
                return [Moment("load", None, live.live_by_label)], {}
            model.train()
            found = block_list(model)
            blocks: Sequence[nn.Module] = [] if found is None else list(found[1])
            recorder = StepRecorder(
                model,
                blocks,
                live,
                checkpointing=recipe.memory.checkpointing,
                router_loss=recipe.train.router_aux_loss > 0,
            )
            chunk = recipe.memory.loss_chunk
            recorder.record(
                AdapterOptimizer(parameters, name=recipe.train.optimizer),
                self.shape,
                None if chunk == "auto" else chunk,
            )
        shapes = {path: (tuple(each.shape), each.dtype) for path, each in parameters.items()}
        return recorder.moments, shapes

    def _put_adapters(self, model: Any, kept: list[int] | None, new_tokens: Sequence[int]) -> None:
        """Put adapters in as a run does, but do not read the values of the adapter that it resumes from."""
        if self.adapter is None:
            put_adapters(model, self.recipe, new_tokens=new_tokens)
            return
        ranks = ranks_of_adapter(self.adapter, model, kept)
        settings = self.recipe.adapter
        inject(
            model,
            kind=self.adapter.kind,
            rank=1,
            dropout=settings.dropout,
            targets=list(ranks),
            rank_pattern=ranks,
            share=next(iter(self.adapter.shares.values()), "none"),  # a run has one for all stacks
            dtype=DTYPES[settings.dtype],
        )
        set_kept_scales_(model, self.recipe)
        if settings.also_train:
            ids = None if settings.also_train_rows == "all" else new_tokens
            train_embeddings(model, settings.also_train, ids, has_new=bool(new_tokens))


@dataclass(frozen=True)
class StreamedBlocks:
    """Sizes of the streamed blocks: bytes of all packed tensors (`codes`, `scales`), of the largest block in one piece,
    and of pinned host memory.
    """

    num_streamed: int
    codes: int
    scales: int
    block_bytes: int
    host_bytes: int


def streamed_blocks(model: PreTrainedModel, wanted: Quantization, num_streamed: int | None) -> StreamedBlocks:
    """Sizes of the streamed blocks of a model on the meta device, whose linear layers are not yet replaced.

    `num_streamed` None is all blocks; UserError if the model has fewer.
    """
    turns = Turns(model, num_streamed)
    pieces = [Piece() for _ in range(len(turns))]
    codes = scales = 0
    for path in layers_to_quantize(model, wanted):
        turn = turns.of(path)
        if turn is None:
            continue
        rows, columns = model.get_submodule(path).weight.shape
        packed = empty_packed(wanted.kind, (rows, columns), wanted.block_size, wanted.double_quant, "meta")
        pieces[turn].add(path, packed)
        codes += packed.packed.nbytes
        scales += packed.num_bytes - packed.packed.nbytes
    sizes = [piece.num_bytes for piece in pieces]
    return StreamedBlocks(len(turns), codes, scales, max(sizes, default=0), sum(sizes))


def with_streamed(moments: Sequence[Moment], streamed: StreamedBlocks) -> list[Moment]:
    """The moments with these blocks off the device: without their bytes, but with the slots."""
    return [
        _changed(
            moment,
            {
                parts.BASE: moment.by_component[parts.BASE] - streamed.codes,
                parts.SCALES: moment.by_component[parts.SCALES] - streamed.scales,
                parts.STREAMING: NUM_SLOTS * streamed.block_bytes,
            },
        )
        for moment in moments
    ]


def without_embedding(moments: Sequence[Moment], num_bytes: int) -> list[Moment]:
    """The moments with the input embedding, of `num_bytes`, on the host."""
    return [_changed(moment, {parts.DENSE: moment.by_component.get(parts.DENSE, 0) - num_bytes}) for moment in moments]


def with_offloaded(moments: Sequence[Moment], num_blocks: int) -> tuple[list[Moment], int]:
    """The moments with checkpoints on the host, and the pinned memory that these take.

    Three checkpoints are on the device: that of the block in its backward pass, the next one, which is being copied,
    and the last one.
    """
    largest = max((moment.by_component.get(parts.CHECKPOINTS, 0) for moment in moments), default=0)
    each = largest // max(num_blocks, 1)
    found = [
        _changed(moment, {parts.CHECKPOINTS: min(moment.by_component.get(parts.CHECKPOINTS, 0), 3 * each)})
        for moment in moments
    ]
    return found, pages_bytes(each, max(num_blocks - 1, 0))


def _changed(moment: Moment, sizes: Mapping[str, int]) -> Moment:
    """A moment with other sizes of some components; components without bytes are left out."""
    merged = {**moment.by_component, **sizes}
    return Moment(moment.phase, moment.block, {name: size for name, size in merged.items() if size})


def _ranks_in(ranks: dict[str, int], block: str) -> tuple[tuple[str, int], ...]:
    return tuple((name.removeprefix(block), rank) for name, rank in ranks.items() if name.startswith(block))


def _repeated(shapes: _Shapes, path: str, pattern: BlockPattern) -> _Shapes:
    """Parameters of the whole model, in its order, from those of the shorter one that was measured."""
    before: list[tuple[str, _Shape]] = []
    repeated: list[tuple[str, _Shape]] = []
    after: list[tuple[str, _Shape]] = []
    first = pattern.insertion - pattern.period
    for name, shape in shapes.items():
        number = name.removeprefix(f"{path}.").partition(".")[0]
        index = int(number) if name.startswith(f"{path}.") else -1
        if first <= index < pattern.insertion:
            repeated.append((name, shape))
        if index >= pattern.insertion or (after and index < 0):
            after.append((name, shape))
        else:
            before.append((name, shape))
    more = range(pattern.repetitions - pattern.num_kept)
    copies = [(f"repetition-{count}.{name}", shape) for count in more for name, shape in repeated]
    return dict([*before, *copies, *after])


def _attention_kind(model: nn.Module, index: int) -> object:
    config = model.config.get_text_config()  # type: ignore[operator,union-attr]
    kinds = getattr(config, "layer_types", None)
    return kinds[index] if kinds and index < len(kinds) else None
