"""A training step on fake tensors: the real layers, loss and optimizer run, and the live bytes of each part are noted.

The model is made from its config: every tensor has its shape, dtype and component, but no memory. Models repeat a
block, or a short sequence of blocks (such as five with a sliding window, one without). The live bytes of a step are
linear in the number of repetitions, so two measurements, of models that differ by one repetition, give the bytes for
any number.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from qdora.adapter.frozen_linear import FrozenLinear
from qdora.adapter.prepared_gains import prepare_gains
from qdora.model.adapter_file import selected_modules
from qdora.model.attention import attention_of
from qdora.model.checkpoint import tied_weights
from qdora.model.inject import adapted_layers, adapter_parameters, frozen_like, is_linear, linear_layers, replace_module
from qdora.model.load import Quantization, block_list, chosen_layers, dense_dtype, layers_to_quantize, skeleton
from qdora.model.multimodal import not_loaded
from qdora.model.patches import replaced
from qdora.model.peft_config import AdapterDescription
from qdora.model.source import ModelSource
from qdora.plan import plan as parts
from qdora.plan.live_bytes import LiveBytes
from qdora.plan.plan import DeviceKind, MicroBatchShape, Moment
from qdora.quant.packed import PackedWeight, empty_packed
from qdora.quant.planned_device import planned_on
from qdora.quant.tiles import Weight
from qdora.train.loss import head_nll, proposed_form, tapped, tapped_routers
from qdora.train.optimizer import AdapterOptimizer, OptimizerName, groups_of

# Least number of blocks on either side of the place where repetitions are inserted, rounded up to whole periods. The
# first block of a model (its input needs no gradient) and the last one (the loss follows) differ from the others and
# must not be repeated. With a period of 2 or more, one period on each side is enough.
_KEPT_BLOCKS = 2

# Most blocks of another kind at the start (such as 1 to 3 dense ones before mixtures of experts).
_LONGEST_PREFIX = 8


@dataclass(frozen=True)
class BlockPattern:
    """prefix + period * repetitions + suffix, in numbers of blocks."""

    prefix: int
    period: int
    repetitions: int
    suffix: int

    @property
    def num_blocks(self) -> int:
        """Blocks of the whole model."""
        return self.prefix + self.period * self.repetitions + self.suffix

    @property
    def num_kept(self) -> int:
        """Repetitions of the shorter model that is measured."""
        return _num_kept(self.period)

    def kept(self, repetitions: int) -> list[int]:
        """Numbers of the blocks of a model with this many repetitions, without the others in the middle."""
        front = self.prefix + (repetitions - self.num_kept // 2) * self.period
        back = self.suffix + self.num_kept // 2 * self.period
        return [*range(front), *range(self.num_blocks - back, self.num_blocks)]

    @property
    def insertion(self) -> int:
        """Number of blocks before the place where repetitions are inserted."""
        return self.prefix + self.num_kept // 2 * self.period


def _num_kept(period: int) -> int:
    return 2 * -(-_KEPT_BLOCKS // period)


def signature(block: nn.Module, kind: Any) -> Hashable:
    """Equal for blocks that need the same bytes: classes, shapes and dtypes inside them, and the attention's `kind`."""
    modules = tuple((name, type(each).__name__) for name, each in block.named_modules())
    parameters = tuple((name, tuple(each.shape), each.dtype) for name, each in block.named_parameters())
    return modules, parameters, kind


def find_pattern(signatures: Sequence[Hashable]) -> BlockPattern | None:
    """The pattern with the fewest blocks to measure; None if leaving blocks out saves nothing."""
    total = len(signatures)
    best, cost = None, total
    for prefix in range(min(total, _LONGEST_PREFIX + 1)):
        rest = signatures[prefix:]
        for period in range(1, len(rest) // 3 + 1):  # two periods are kept at least, and one is inserted
            repetitions, suffix = divmod(len(rest), period)
            measured = 2 * (prefix + _num_kept(period) * period + suffix) + period
            if repetitions <= _num_kept(period):
                continue
            if measured < cost and all(rest[at] == rest[at - period] for at in range(period, len(rest))):
                best, cost = BlockPattern(prefix, period, repetitions, suffix), measured
    return best


def keep_blocks_(model: Any, path: str, kept: Sequence[int]) -> None:
    """Keep only these blocks in a model, and their entries in every list of its config with one entry a block."""
    blocks = model.get_submodule(path)
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


def extrapolated(short: Sequence[Moment], longer: Sequence[Moment], pattern: BlockPattern) -> list[Moment]:
    """Extrapolate the moments of the whole model from those with `num_kept` repetitions and one more, in the order of
    a step.

    The repetitions in between have no moments: their live bytes lie between those of their neighbours. ValueError if
    the two do not have the same moments.
    """
    more = pattern.repetitions - pattern.num_kept
    found = {(moment.phase, moment.block): moment.by_component for moment in longer}
    drawn = []
    for moment in short:
        behind = moment.block is not None and moment.block >= pattern.insertion
        block = moment.block + pattern.period if behind and moment.block is not None else moment.block
        if (moment.phase, block) not in found:
            raise ValueError(f"no {moment.phase} of block {block} in the longer model")
        other = found[moment.phase, block]
        names = dict.fromkeys([*moment.by_component, *other])
        by_component = {
            name: moment.by_component.get(name, 0) + more * (other.get(name, 0) - moment.by_component.get(name, 0))
            for name in names
        }
        place = moment.block + more * pattern.period if behind and moment.block is not None else moment.block
        drawn.append(Moment(moment.phase, place, {name: size for name, size in by_component.items() if size}))
    return drawn


_UNMASKED = "sdpa_without_padding"


def empty_model(config: PreTrainedConfig, source: ModelSource, dtype: torch.dtype, attention: str) -> PreTrainedModel:
    """A model with its parameters on the meta device; `config` is not changed. UserError if it is not a causal LM.

    `dtype` is that of the activations. flash_attention_2 needs a GPU and is planned as auto: as sdpa, which keeps the
    same tensors, or as eager, which keeps more, where the model needs what sdpa does not compute.
    """
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    planned = "auto" if attention == "flash_attention_2" else attention
    return skeleton(config, source, dtype, planned, torch.device("cpu"))


def fill_(
    model: PreTrainedModel, wanted: Quantization, dtype: torch.dtype, live: LiveBytes, *, pruned: bool = False
) -> None:
    """Replace meta tensors by fake ones, as `load_model` does by real ones; call it within a FakeTensorMode.

    With `pruned`, every linear layer that is not skipped gets a mask.
    """
    layers = chosen_layers(model, wanted) if pruned else layers_to_quantize(model, wanted)
    whole = wanted.kind == "none"
    linear = {f"{name}.weight" for name in linear_layers(model)} if whole else set()
    head: Any = model.get_output_embeddings()

    def empty(name: str, like: Tensor) -> Tensor:
        kept = dense_dtype(model, name, dtype) if like.is_floating_point() else like.dtype
        return torch.empty(like.shape, dtype=kept)

    for name in sorted(layers):
        module: Any = model.get_submodule(name)
        shape = tuple(module.weight.shape)
        with live.label(parts.BASE):
            weight: Weight = (
                empty(f"{name}.weight", module.weight)
                if whole
                else empty_packed(wanted.kind, shape, wanted.block_size, wanted.double_quant)
            )
        if isinstance(weight, PackedWeight):
            live.register([tensor for part, tensor in weight.tensors().items() if part != "packed"], parts.SCALES)
        with live.label(parts.MASKS):
            bits = torch.empty(-(-shape[0] * shape[1] // 8), dtype=torch.uint8) if pruned else None
        with live.label(parts.DENSE):
            bias = None if module.bias is None else empty(f"{name}.bias", module.bias)
        replace_module(model, name, frozen_like(module, weight, bias, bits))
    tied = tied_weights(model)
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if name in tied:
            continue
        module, leaf = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        with live.label(parts.BASE if name in linear and module is not head else parts.DENSE):
            made = empty(name, parameter)
        setattr(module, leaf, nn.Parameter(made, requires_grad=False))
    for target, origin in tied.items():
        module, leaf = model.get_submodule(target.rpartition(".")[0]), target.rpartition(".")[2]
        setattr(module, leaf, model.get_parameter(origin))
    for module in model.modules():
        for leaf, buffer in module._buffers.items():
            if buffer is not None and not isinstance(module, FrozenLinear):
                with live.label(parts.DENSE):
                    module._buffers[leaf] = torch.empty(buffer.shape, dtype=buffer.dtype)


def set_unmasked_(model: PreTrainedModel) -> None:
    """Let sdpa run without a mask. transformers leaves it out if nothing is padded, which fake tensors cannot show.

    A sliding window that is shorter than the text keeps its mask. Other attention implementations are not changed.
    """
    if attention_of(model) == "sdpa":
        AttentionInterface.register(_UNMASKED, sdpa_attention_forward)
        AttentionMaskInterface.register(_UNMASKED, _mask_of_window)
        # transformers warns of parts of a config whose module it does not find.
        text: Any = model.get_decoder() if not_loaded(model) else model
        text.set_attn_implementation(_UNMASKED)


def _mask_of_window(*args: Any, local_size: int | None = None, **kwargs: Any) -> Tensor | None:
    if local_size is None or kwargs["kv_length"] < local_size:
        return None
    mask: Tensor | None = sdpa_mask(*args, local_size=local_size, **kwargs)
    return mask


def ranks_of_adapter(
    adapter: AdapterDescription, model: PreTrainedModel, kept: Sequence[int] | None = None
) -> dict[str, int]:
    """Path of a layer in a shortened model -> rank of its adapter in the whole model; only layers that have one.

    `kept` are the numbers of its blocks in the whole model (None: all).
    """
    blocks = block_list(model)

    def original(path: str) -> str:
        if blocks is None or kept is None or not path.startswith(f"{blocks[0]}."):
            return path
        index, dot, rest = path.removeprefix(f"{blocks[0]}.").partition(".")
        return f"{blocks[0]}.{kept[int(index)]}{dot}{rest}"

    selected = selected_modules(model, adapter, original)
    return {path: adapter.rank_of(original(path)) for path, module in selected.items() if is_linear(module)}


@contextmanager
def without_kernels(model: nn.Module) -> Iterator[None]:
    """Inside, linear attention runs transformers' own code of the gated delta rule: a kernel takes no fake tensors."""
    with ExitStack() as stack:
        for file in {sys.modules[type(module).__module__] for module in model.modules()}:
            stack.enter_context(replaced(file, "torch_chunk_gated_delta_rule", inspect.unwrap))
        yield


class StepRecorder:
    """Runs steps of a model on fake tensors, with its adapters, and notes the peak of each part, by component.

    `live` is the active counter, inside an active FakeTensorMode and `planned_on`. With `checkpointing` only the inputs
    of the blocks are kept for the backward pass. With `router_loss` the loss includes that of the routers.
    """

    def __init__(
        self,
        model: Any,
        blocks: Sequence[nn.Module],
        live: LiveBytes,
        *,
        checkpointing: bool,
        router_loss: bool = False,
    ) -> None:
        self.model, self.blocks, self.live, self._router_loss = model, blocks, live, router_loss
        self.parameters = adapter_parameters(model)
        self.moments: list[Moment] = []
        self._kept_as = parts.CHECKPOINTS if checkpointing else parts.FORWARD
        self._now: tuple[str, int | None] = ("forward", None)
        self._recording = False
        for parameter in self.parameters.values():
            parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                lambda each: live.register(each.grad, parts.GRADIENTS)
            )
        for index, block in enumerate(blocks):
            block.register_forward_pre_hook(self._entering(index), with_kwargs=True)

    def record(self, optimizer: AdapterOptimizer, shape: MicroBatchShape, chunk: int | None) -> None:
        """Record a later step: optimizer states, gradients of an earlier micro-batch and norms already exist."""
        layers = adapted_layers(self.model).values()
        with self.live.label(parts.KEPT):
            for layer in layers:
                layer.gain(self.model.dtype)
                layer.operands(self.model.dtype)
        # The parameters have just been updated, so that the gains are taken anew.
        torch.autograd.graph.increment_version(list(self.parameters.values()))
        self.live.register(optimizer.state_tensors().values(), parts.OPTIMIZER)
        with self._part("gains", None, parts.KEPT):
            prepare_gains(layers)
        if shape.accumulated:
            self._make_gradients()
        self._gradient(shape, chunk)
        with self._part("update", None, parts.UPDATE):
            pass

    def _make_gradients(self) -> None:
        """Gradients, as an earlier micro-batch leaves them."""
        for parameter in self.parameters.values():
            parameter.grad = torch.empty(parameter.shape, dtype=parameter.grad_dtype or parameter.dtype)
            self.live.register(parameter.grad, parts.GRADIENTS)

    def _gradient(self, shape: MicroBatchShape, chunk: int | None) -> None:
        """One micro-batch forward and backward."""
        with self.live.label(parts.OTHER):
            inputs, rows, columns, targets = fake_batch(shape)
        head = self.model.get_output_embeddings()
        with self._part("forward", None, parts.FORWARD), ExitStack() as stack:
            tap = stack.enter_context(tapped(head, rows, columns, probing=False))
            router_tap = stack.enter_context(tapped_routers(self.model)) if self._router_loss else None
            self._recording = True
            self.model(**inputs, use_cache=False)
            self._recording = False
        with self._part("loss", None, parts.LOSS):
            loss = head_nll(head, tap.hidden, targets, proposed_form(self.model.config), chunk).sum() / len(targets)
            if router_tap is not None:
                loss = loss + router_tap.loss(torch.ones_like(inputs["input_ids"]))
                router_tap.logits = ()
        with self._part("backward", len(self.blocks) - 1 if self.blocks else None, parts.BACKWARD):
            loss.backward()  # type: ignore[no-untyped-call]
            del loss, tap

    @contextmanager
    def _part(self, phase: str, block: int | None, label: str) -> Iterator[None]:
        self.live.reset_peak()
        self._now = phase, block
        with self.live.label(label):
            yield
        self._note()

    def _note(self) -> None:
        self.moments.append(Moment(*self._now, dict(self.live.peak_by_label)))
        self.live.reset_peak()

    def _entering(self, index: int) -> Any:
        """A hook at the start of a block ends the moment before it; the hook of the input ends its backward pass."""

        def enter(_block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not self._recording:  # a checkpoint is being recomputed
                return
            hidden: Tensor = args[0] if args else kwargs["hidden_states"]
            self.live.register(hidden, self._kept_as)
            self._note()
            self._now = "forward", index
            if hidden.requires_grad and index > 0:
                hidden.register_hook(lambda _gradient: leave())  # type: ignore[no-untyped-call]

        def leave() -> None:
            self._note()
            self._now = "backward", index - 1

        return enter


def fake_batch(shape: MicroBatchShape) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor]:
    """The model's inputs for a micro-batch, and rows, columns and targets of its labelled positions."""
    ids = torch.zeros(shape.rows, shape.length, dtype=torch.int64)
    inputs = {"input_ids": ids}
    if shape.packed:
        inputs["position_ids"] = torch.zeros_like(ids)
    elif shape.masked:
        inputs["attention_mask"] = torch.zeros_like(ids)
    rows, columns, targets = (torch.zeros(shape.num_labels, dtype=torch.int64) for _ in range(3))
    return inputs, rows, columns, targets


def update_bytes(
    shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]], name: OptimizerName, device_type: DeviceKind
) -> int:
    """Peak bytes of an update beside parameters, gradients and states.

    `shapes` has the shape and dtype of every trainable parameter of the whole model.
    """
    # Groups are updated one after the other, so the largest group of matrices and the largest of vectors suffice.
    sizes = {path: torch.Size(shape).numel() for path, (shape, _) in shapes.items()}
    largest: dict[bool, list[str]] = {}
    for keys, kind in groups_of(shapes, name):
        if sum(map(sizes.__getitem__, keys)) > sum(map(sizes.__getitem__, largest.get(kind.is_matrix, []))):
            largest[kind.is_matrix] = keys
    chosen = tuple((path, *shapes[path]) for keys in largest.values() for path in keys)
    return _peak_of_update(chosen, name, device_type)


@lru_cache(maxsize=8)  # one update serves all micro-batches and most of the changes that a plan tries
def _peak_of_update(
    shapes: tuple[tuple[str, tuple[int, ...], torch.dtype], ...], name: OptimizerName, device_type: DeviceKind
) -> int:
    with planned_on(device_type), FakeTensorMode(), LiveBytes() as live:
        parameters = {path: nn.Parameter(torch.empty(shape, dtype=dtype)) for path, shape, dtype in shapes}
        optimizer = AdapterOptimizer(parameters, name=name)
        for parameter in parameters.values():
            parameter.grad = torch.empty(parameter.shape, dtype=torch.float32)
        live.reset_peak()
        optimizer.scale_gradients_(optimizer.gradient_norm())
        optimizer.step(1e-4)
        workspace: int = live.peak_bytes - live.live_bytes
    return workspace
