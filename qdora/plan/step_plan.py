"""The plan of one step of a recipe, from the config of its model: no weights are loaded and no GPU is needed.

One step of the model is run on fake tensors (`fake_step`), and its live bytes are counted. What is streamed, offloaded
or divided among processes is computed from sizes.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedConfig, PreTrainedModel

from qdora.adapter.experts import ExpertLinear
from qdora.adapter.rows import divided_tensors, is_cut_by_rows
from qdora.files.console import errors_only
from qdora.files.environment import cpu_has_bfloat16
from qdora.memory.offload import pages_bytes
from qdora.memory.stream import NUM_SLOTS, Piece, Turns, obstacle
from qdora.model.adapter_file import describe_adapter
from qdora.model.build_model import (
    DTYPES,
    keeps_scales,
    put_adapters,
    recompute_activations,
    set_kept_scales_,
)
from qdora.model.checkpoint import tied_weights
from qdora.model.inject import adapted_layers, adapter_parameters, inject, linear_layers
from qdora.model.load import Quantization, block_list, chosen_layers, layers_to_quantize, quantization_of
from qdora.model.patches import fast_grouped_attention, keep_inplace_outputs_
from qdora.model.peft_config import AdapterDescription
from qdora.model.source import ModelSource
from qdora.model.tokens import extend_vocabulary, train_embeddings
from qdora.plan import plan as parts
from qdora.plan.fake_step import (
    BlockPattern,
    StepRecorder,
    empty_model,
    extrapolated,
    fill_,
    find_pattern,
    keep_blocks_,
    ranks_of_adapter,
    set_unmasked_,
    signature,
    update_bytes,
    without_kernels,
)
from qdora.plan.live_bytes import LiveBytes
from qdora.plan.plan import (
    Cut,
    DeviceKind,
    Division,
    MicroBatchShape,
    Moment,
    Plan,
    Rates,
    Work,
    forward_seconds,
    step_seconds,
)
from qdora.quant.kernels import Routing, planned_on
from qdora.quant.packed import empty_packed
from qdora.recipe.settings import Recipe
from qdora.train.loss import auto_chunk
from qdora.train.optimizer import AdapterOptimizer

_Shape = tuple[tuple[int, ...], torch.dtype]

_Shapes = dict[str, _Shape]


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
            moments = [
                _changed(each, {parts.DENSE: each.by_component.get(parts.DENSE, 0) - embedding_bytes})
                for each in moments
            ]
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
            layer_types = getattr(self.skeleton.config.get_text_config(), "layer_types", None) or [None] * len(found[1])
            signatures = []
            for index, block in enumerate(found[1]):
                path = f"{found[0]}.{index}."
                inside = {name.removeprefix(path): rank for name, rank in ranks.items() if name.startswith(path)}
                kind = layer_types[index] if index < len(layer_types) else None
                signatures.append(signature(block, (kind, *inside.items())))
            pattern = find_pattern(signatures)
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


def division_of(model: PreTrainedModel, wanted: Quantization, dtype: torch.dtype, *, pruned: bool) -> Division | None:
    """The division of a model on the meta device, whose linear layers are not yet replaced; None without blocks."""
    found = block_list(model)
    if found is None:
        return None
    chosen, quantised = chosen_layers(model, wanted), layers_to_quantize(model, wanted)
    shared = {name for pair in tied_weights(model).items() for name in pair}
    layers = linear_layers(model)
    cuts: Counter[Cut] = Counter()
    sizes: dict[str, int] = {}
    for path in (each for each in layers if f"{each}.weight" not in shared):
        own = _cuts(
            layers[path],
            wanted if path in quantised else None,
            dtype,
            dense=parts.BASE if path in chosen else parts.DENSE,
            masked=pruned and path in chosen,
        )
        cuts.update(own)
        sizes[path] = sum(length * num_bytes * count for (_, length, num_bytes), count in own.items())
    prefixes = [f"{found[0]}.{index}." for index in range(len(found[1]))]
    blocks = [sum(size for path, size in sizes.items() if path.startswith(prefix)) for prefix in prefixes]
    tables = [module.weight.shape for module in model.modules() if isinstance(module, nn.Embedding)]
    cuts.update((parts.DENSE, rows, columns * dtype.itemsize) for rows, columns in tables)
    table = sum(shape.numel() * dtype.itemsize for shape in tables)
    head = model.get_output_embeddings()
    head_path = next((path for path, module in layers.items() if module is head), "")
    is_tied = f"{head_path}.weight" in shared
    return Division(
        cuts=dict(cuts),
        block_bytes=max(blocks, default=0),
        blocks_bytes=sum(blocks),
        table_bytes=0 if is_tied else table,
        head_bytes=table if is_tied else sizes.get(head_path, 0),
        tied=is_tied,
    )


def _cuts(
    module: nn.Module, wanted: Quantization | None, dtype: torch.dtype, *, dense: str, masked: bool
) -> Counter[Cut]:
    """The tensors of a layer as `ShardedBase` cuts them; without `wanted` one tensor of the component `dense`."""
    rows, columns = map(int, module.weight.shape)  # type: ignore[arg-type]
    form: Any = torch.empty((rows, columns), dtype=dtype, device="meta")
    if wanted is not None:
        form = empty_packed(wanted.kind, (rows, columns), wanted.block_size, wanted.double_quant, "meta")
    bits = torch.empty(-(-rows * columns // 8), dtype=torch.uint8, device="meta") if masked else None
    components = {"weight": dense, "packed": parts.BASE, "absmax": parts.SCALES, "keep_bits": parts.MASKS}
    found: Counter[Cut] = Counter()
    for name, tensor in divided_tensors(form, bits).items():
        length = rows if is_cut_by_rows(form, masked=masked) else tensor.numel()
        found[components[name], length, tensor.nbytes // length] += 1
    return found
