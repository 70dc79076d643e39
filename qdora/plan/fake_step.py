"""A training step on fake tensors: the real layers, loss and optimizer run, and the live bytes of each part are noted.

Models repeat a block, or a short sequence of blocks (such as five with a sliding window, one without). Live bytes are
linear in the number of repetitions, so two models that differ by one repetition give the bytes for any number.
"""

from __future__ import annotations

import copy
import gc
import inspect
import math
import sys
from collections.abc import Hashable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from qdora.adapter.norms import refresh
from qdora.model.attention import attention_of, fast_grouped_attention, replaced, weights_unread
from qdora.model.build_model import put_adapters, recompute_activations
from qdora.model.checkpoint import tied_weights
from qdora.model.inject import (
    adapted_layers,
    adapter_parameters,
    frozen_like,
    keep_zeros_,
    linear_layers,
    replace_module,
)
from qdora.model.load import (
    LEFT_DENSE,
    block_list,
    chosen_layers,
    dense_dtype,
    layers_to_quantize,
    quantization_of,
    skeleton,
    tie_,
)
from qdora.model.multimodal import not_loaded
from qdora.model.source import ModelSource
from qdora.model.tokens import extend_vocabulary
from qdora.plan import plan as parts
from qdora.plan.live_bytes import LiveBytes
from qdora.plan.plan import DeviceKind, MicroBatchShape, Moment
from qdora.quant.kernels import planned_on
from qdora.quant.packed import PackedWeight, empty_packed
from qdora.quant.tiles import Weight
from qdora.recipe.settings import OptimizerName, Recipe
from qdora.train.loss import head_nll, proposals, tapped
from qdora.train.optimizer import AdapterOptimizer, groups_of

Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]  # of the trainable parameters
Step = tuple[list[Moment], Shapes]

# Least number of blocks on either side of the inserted repetitions, rounded up to whole periods: the first block (its
# input needs no gradient) and the last one (the loss follows) differ from the others.
_KEPT_BLOCKS = 2


def run_step(recipe: Recipe, model: PreTrainedModel, shape: MicroBatchShape, kind: DeviceKind) -> Step:
    """Moments of a step, and the shapes of the trainable parameters. `model` is on the meta device, not changed."""
    blocks, pattern, adapter = block_list(model), None, recipe.adapter
    # Paths and patterns over them may name single blocks
    if blocks is not None and not any("." in name for name in (*adapter.targets, *adapter.rank_pattern)):
        kinds = getattr(model.config.get_text_config(), "layer_types", None) or []
        signatures: list[Hashable] = []
        for index, block in enumerate(blocks[1]):
            sizes = tuple(
                (name, tuple(weight.shape), weight.dtype) for name, weight in block.named_parameters()
            )
            dense = tuple(name for name, module in block.named_modules() if hasattr(module, LEFT_DENSE))
            signatures.append((sizes, dense, kinds[index] if index < len(kinds) else None))
        pattern = find_pattern(signatures)
    if pattern is None or blocks is None:
        moments, shapes = _measured(recipe, model, None, shape)
    else:
        short, shapes = _measured(recipe, model, pattern.kept(pattern.num_kept), shape)
        longer, _ = _measured(recipe, model, pattern.kept(pattern.num_kept + 1), shape)
        moments, shapes = extrapolated(short, longer, pattern), _repeated(shapes, blocks[0], pattern)
    if shapes:
        moments[-1] = moments[-1].changed({parts.UPDATE: update_bytes(shapes, recipe.train.optimizer, kind)})
    return moments, shapes


@dataclass(frozen=True)
class BlockPattern:
    """prefix + period * repetitions + suffix, in numbers of blocks."""

    prefix: int
    period: int
    repetitions: int
    suffix: int

    @property
    def num_blocks(self) -> int:
        return self.prefix + self.period * self.repetitions + self.suffix

    @property
    def num_kept(self) -> int:
        """Repetitions of the shorter model that is measured."""
        return 2 * -(-_KEPT_BLOCKS // self.period)

    @property
    def insertion(self) -> int:
        """Blocks before the inserted repetitions."""
        return self.prefix + self.num_kept // 2 * self.period

    def kept(self, repetitions: int) -> list[int]:
        """The blocks of a model with this many repetitions."""
        front = self.insertion + (repetitions - self.num_kept) * self.period
        back = self.suffix + self.num_kept // 2 * self.period
        return [*range(front), *range(self.num_blocks - back, self.num_blocks)]


def find_pattern(signatures: Sequence[Hashable]) -> BlockPattern | None:
    """The pattern with the fewest blocks to measure; None if leaving blocks out saves nothing."""
    best, total = None, len(signatures)
    cost = total
    for period in range(1, total // 3 + 1):  # two periods are kept at least, and one is inserted
        others = [index for index in range(period, total) if signatures[index] != signatures[index - period]]
        prefix = others[-1] + 1 - period if others else 0
        repetitions, suffix = divmod(total - prefix, period)
        pattern = BlockPattern(prefix, period, repetitions, suffix)
        measured = 2 * (prefix + pattern.num_kept * period + suffix) + period
        if repetitions > pattern.num_kept and measured < cost:
            best, cost = pattern, measured
    return best


def extrapolated(short: Sequence[Moment], longer: Sequence[Moment], pattern: BlockPattern) -> list[Moment]:
    """The moments of the whole model from those with `num_kept` repetitions and one more.

    Repetitions in between have no moments: their live bytes lie between those of their neighbours.
    """
    more = pattern.repetitions - pattern.num_kept
    by_place = {(moment.phase, moment.block): moment.by_component for moment in longer}
    moments = []
    for moment in short:
        block, last, ours = moment.block, moment.block, moment.by_component
        if block is not None and block >= pattern.insertion:
            block, last = block + pattern.period, block + more * pattern.period
        theirs = by_place[moment.phase, block]
        sizes = {name: ours.get(name, 0) for name in dict.fromkeys([*ours, *theirs])}
        sizes = {name: size + more * (theirs.get(name, 0) - size) for name, size in sizes.items()}
        moments.append(Moment(moment.phase, last, {}).changed(sizes))
    return moments


def _repeated(shapes: Shapes, path: str, pattern: BlockPattern) -> Shapes:
    """Parameters of the whole model from those of the shorter one."""
    blocks = tuple(f"{path}.{index}." for index in range(pattern.insertion - pattern.period, pattern.insertion))
    one = {name: shape for name, shape in shapes.items() if name.startswith(blocks)}
    copies = range(pattern.repetitions - pattern.num_kept)
    return shapes | {f"repetition-{copy}.{name}": shape for copy in copies for name, shape in one.items()}


def empty_model(
    config: PreTrainedConfig, source: ModelSource, dtype: torch.dtype, attention: str
) -> PreTrainedModel:
    """A model with its parameters on the meta device; `dtype` is that of the activations."""
    # It needs a GPU; auto is sdpa, which keeps the same tensors, or eager, which keeps more
    attention = "auto" if attention == "flash_attention_2" else attention
    return skeleton(copy.deepcopy(config), source, dtype, attention)


def _measured(recipe: Recipe, whole: PreTrainedModel, kept: list[int] | None, shape: MicroBatchShape) -> Step:
    """`run_step` of a model with the blocks `kept` (None: all), every one measured."""
    gc.collect()
    model: Any = copy.deepcopy(whole)
    if kept is not None:
        _keep_blocks_(model, kept)
    with FakeTensorMode(), LiveBytes() as live, ExitStack() as stack, fast_grouped_attention():
        # Linear attention runs transformers' own code of the gated delta rule: a kernel takes no fake tensors
        for file in {sys.modules[type(module).__module__] for module in model.modules()}:
            stack.enter_context(replaced(file, "torch_chunk_gated_delta_rule", inspect.unwrap))
        fill_(model, recipe, live)
        if not shape.masked:
            _set_unmasked_(model)
        if recipe.adapter.kind == "full":
            model.requires_grad_(True)
            for path in chosen_layers(model, quantization_of(recipe.base)) if recipe.base.prune else ():
                weight = model.get_parameter(f"{path}.weight")
                with live.label(parts.MASKS):
                    keep_zeros_(weight, torch.empty(-(-weight.numel() // 8), dtype=torch.uint8))
        if recipe.memory.checkpointing:
            recompute_activations(model)
        # How many rows are spare is not known without the tokenizer: as if none were.
        size = model.config.get_text_config().vocab_size
        new_tokens = range(size, size + len(recipe.model.add_tokens))
        with live.label(parts.DENSE):
            extend_vocabulary(model, new_tokens)
        with live.label(parts.ADAPTERS):
            put_adapters(model, recipe, new_tokens=new_tokens)
            for layer in adapted_layers(model).values() if recipe.adapter.gates is not None else ():
                layer.add_gate()
        live.reset_peak()
        parameters = adapter_parameters(model)
        if not parameters:
            return [Moment("loading", None, live.live_by_label)], {}
        with weights_unread(model):
            moments = _record(model.train(), parameters, recipe, shape, live)
    return moments, {path: (tuple(weight.shape), weight.dtype) for path, weight in parameters.items()}


def _keep_blocks_(model: Any, kept: Sequence[int]) -> None:
    """Keep only these blocks in a model, and their entries in every list of its configs with one entry a block."""
    path, blocks = block_list(model)  # type: ignore[misc]
    total = len(blocks)
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, nn.ModuleList([blocks[index] for index in kept]))
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    for config in configs.values():
        for name, value in list(vars(config).items()):
            if isinstance(value, list) and len(value) == total:
                setattr(config, name, [value[index] for index in kept])
        if getattr(config, "num_hidden_layers", None) == total:
            config.num_hidden_layers = len(kept)


def fill_(model: PreTrainedModel, recipe: Recipe, live: LiveBytes) -> None:
    """Replace meta tensors by fake ones, as `load_model` does by real ones; call it within a FakeTensorMode."""
    wanted, pruned, dtype = quantization_of(recipe.base), recipe.base.prune is not None, model.dtype
    layers = chosen_layers(model, wanted) if pruned else layers_to_quantize(model, wanted)
    if recipe.adapter.kind == "full":
        layers = set()
    linear = {f"{name}.weight" for name in linear_layers(model)} if wanted.kind == "none" else set()
    head: Any = model.get_output_embeddings()
    for name in sorted(layers):
        module: Any = model.get_submodule(name)
        shape = tuple(module.weight.shape)
        with live.label(parts.BASE):
            weight: Weight = torch.empty(shape, dtype=dtype)
            if wanted.kind != "none":
                weight = empty_packed(wanted.kind, shape, wanted.block_size, wanted.double_quant)
        if isinstance(weight, PackedWeight):
            live.register(
                [tensor for part, tensor in weight.tensors().items() if part != "packed"], parts.SCALES
            )
        with live.label(parts.MASKS):
            bits = torch.empty(-(-shape[0] * shape[1] // 8), dtype=torch.uint8) if pruned else None
        with live.label(parts.DENSE):
            kind = dense_dtype(model, f"{name}.bias", dtype)
            bias = None if module.bias is None else torch.empty(module.bias.shape, dtype=kind)
        replace_module(model, name, frozen_like(module, weight, bias, bits))
    tied = tied_weights(model)
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if name not in tied:
            path, _, leaf = name.rpartition(".")
            module = model.get_submodule(path)
            with live.label(parts.BASE if name in linear and module is not head else parts.DENSE):
                value = torch.empty(parameter.shape, dtype=dense_dtype(model, name, dtype))
            setattr(module, leaf, nn.Parameter(value, requires_grad=False))
    tie_(model)
    with live.label(parts.DENSE):
        for module in model.modules():
            for leaf, buffer in module._buffers.items():
                if buffer is not None and not isinstance(buffer, FakeTensor):
                    module._buffers[leaf] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _set_unmasked_(model: PreTrainedModel) -> None:
    """Let sdpa run without a mask but that of a sliding window, as transformers does if nothing is padded."""

    def mask_of_window(*args: Any, local_size: int | None = None, **kwargs: Any) -> Any:
        if local_size is None or kwargs["kv_length"] < local_size:
            return None
        return sdpa_mask(*args, local_size=local_size, **kwargs)

    if attention_of(model) == "sdpa":
        AttentionInterface.register("sdpa_without_padding", sdpa_attention_forward)
        AttentionMaskInterface.register("sdpa_without_padding", mask_of_window)
        # transformers warns of parts of a config whose module it does not find.
        text: Any = model.get_decoder() if not_loaded(model) else model
        text.set_attn_implementation("sdpa_without_padding")


def _record(
    model: Any, parameters: dict[str, nn.Parameter], recipe: Recipe, shape: MicroBatchShape, live: LiveBytes
) -> list[Moment]:
    """Moments of a later step: optimizer states, gradients of an earlier micro-batch and norms already exist."""
    moments: list[Moment] = []
    is_forward = False
    blocks = list((block_list(model) or ("", []))[1])
    first, last = (0, len(blocks) - 1) if blocks else (None, None)

    def note(phase: str, block: int | None = None) -> None:
        moments.append(Moment(phase, block, live.peak_by_label))
        live.reset_peak()

    def enter(index: int, _block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Ends the moment before a block; the hook of the block's input ends its backward pass."""
        if not is_forward:  # a checkpoint is being recomputed
            return
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        live.register(hidden, parts.CHECKPOINTS if recipe.memory.checkpointing else parts.FORWARD)
        note("forward", index - 1 if index else None)
        if hidden.requires_grad and index > 0:
            hidden.register_hook(lambda _gradient: note("backward", index))  # type: ignore[no-untyped-call]

    for weight in parameters.values():
        weight.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
            lambda weight: live.register(weight.grad, parts.GRADIENTS)
        )
    for index, block in enumerate(blocks):
        block.register_forward_pre_hook(partial(enter, index), with_kwargs=True)
    optimizer = AdapterOptimizer(parameters, name=recipe.train.optimizer)
    layers = adapted_layers(model).values()
    with live.label(parts.KEPT):
        for layer in layers:
            layer.gain(model.dtype)
    torch.autograd.graph.increment_version(list(parameters.values()))  # updated: the gains are taken anew
    live.register(optimizer.state_tensors().values(), parts.OPTIMIZER)
    live.reset_peak()
    with live.label(parts.KEPT):
        refresh(layers)
    note("norms")
    if shape.accumulated:
        for weight in parameters.values():
            weight.grad = torch.empty(weight.shape, dtype=weight.grad_dtype or weight.dtype)
            live.register(weight.grad, parts.GRADIENTS)
    with live.label(parts.OTHER):
        ids = torch.zeros(shape.rows, shape.length, dtype=torch.int64)
        inputs = {"input_ids": ids}
        if shape.masked:
            inputs["position_ids" if shape.packed else "attention_mask"] = torch.zeros_like(ids)
        rows, columns, targets = (torch.zeros(shape.num_labels, dtype=torch.int64) for _ in range(3))
    head, chunk = model.get_output_embeddings(), recipe.memory.loss_chunk
    with live.label(parts.FORWARD), tapped(head, rows, columns) as tap:
        is_forward = True
        model(**inputs, use_cache=False)
        is_forward = False
    note("forward", last)
    with live.label(parts.LOSS):
        form, size = proposals(model.config)[0], None if chunk == "auto" else chunk
        loss = head_nll(head, tap.hidden, targets, form, size).sum() / len(targets)
    note("loss")
    with live.label(parts.BACKWARD):
        loss.backward()  # type: ignore[no-untyped-call]
        del loss, tap
    note("backward", first)
    del inputs, ids, rows, columns, targets
    live.reset_peak()
    note("update")
    return moments


def update_bytes(shapes: Shapes, name: OptimizerName, device_kind: DeviceKind) -> int:
    """Peak bytes of an update besides parameters, gradients and states.

    Groups are updated one after the other: the largest of matrices and the largest of vectors suffice.
    """
    sizes = {path: math.prod(shape) for path, (shape, _) in shapes.items()}
    largest: dict[bool, list[str]] = {}
    for keys, kind in groups_of(shapes, name):
        if sum(sizes[key] for key in keys) > sum(sizes[key] for key in largest.get(kind.is_matrix, [])):
            largest[kind.is_matrix] = keys
    with planned_on(device_kind), FakeTensorMode(), LiveBytes() as live:
        chosen = {key: shapes[key] for keys in largest.values() for key in keys}
        parameters = {
            key: nn.Parameter(torch.empty(shape, dtype=dtype)) for key, (shape, dtype) in chosen.items()
        }
        optimizer = AdapterOptimizer(parameters, name=name)
        for parameter in parameters.values():
            parameter.grad = torch.empty(parameter.shape, dtype=torch.float32)
        live.reset_peak()
        optimizer.scale_gradients_(optimizer.gradient_norm())
        optimizer.step(1e-4)
        return int(live.peak_bytes - live.live_bytes)
