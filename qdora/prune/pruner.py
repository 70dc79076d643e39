"""Pruning a base while it is loaded, block by block: read, measure, prune, quantise, run.

One forward pass of the model on the calibration text drives it. When it reaches a block, the block's weights are read,
and its inputs are run through it to measure the inputs of its linear layers. These layers are pruned and quantised, and
the inputs are run through the block once more, so that the next block is measured on what the pruned blocks compute.
Memory holds one dense block at a time.
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qdora.adapter.expert_product import ExpertTokens
from qdora.adapter.experts import BareExperts
from qdora.adapter.layer import evaluation_mode
from qdora.errors import UserError, first_few, first_line
from qdora.model.checkpoint import Stored, StoredPacked
from qdora.model.load import (
    Loading,
    Quantization,
    layers_to_quantize,
    load_config,
    place_all,
    place_frozen,
    skeleton,
    tensors_of_source,
    tie_and_move_buffers,
)
from qdora.model.source import ModelSource
from qdora.model.store import PrunedLayer, layer_record
from qdora.prune.scores import InputStatistics, check_shape, mask_by_scores, pattern_from, prune_weight
from qdora.quant.packed import dequantize, mask_bits, quantize, zero_packed
from qdora.quant.tiles import Weight, dense_weight
from qdora.recipe.settings import PruneConfig

log = logging.getLogger("qdora")

# Calibration tokens per forward pass of a block; bounds its activations.
_TOKENS_AT_ONCE = 4096


class Pruner:
    """A `Placer` that prunes the linear layers of the blocks.

    `calibration` holds token ids (sequences, length) for methods that measure inputs, None for magnitude. After the
    load `layers` holds path -> counts and error of each pruned layer.
    """

    def __init__(self, settings: PruneConfig, calibration: Tensor | None = None) -> None:
        if (calibration is None) != (settings.method == "magnitude"):
            need = "takes no" if settings.method == "magnitude" else "needs"
            raise ValueError(f"pruning by {settings.method} {need} calibration text.")
        self.settings, self.calibration = settings, calibration
        self.layers: dict[str, PrunedLayer] = {}

    @torch.no_grad()
    def __call__(self, load: Loading) -> None:
        """Read every stored tensor and put it into the model.

        Raises UserError if the checkpoint is quantised, the model's blocks are not found, or a weight's shape does not
        fit the pattern.
        """
        packed = [name for name, item in load.stored.items() if isinstance(item, StoredPacked)]
        if packed:
            raise UserError(
                f"base.prune: the checkpoint is already quantised (e.g. {packed[0]}). "
                "Fix: name the model in full precision."
            )
        path, blocks = _decoder_blocks(load.model)
        self._check_shapes(load, path)
        # The tensors are read in several passes, whose counts are added up.
        count, total, progress = itertools.count(1), len(load.stored), load.progress or (lambda _done, _total: None)
        load = replace(load, progress=lambda _done, _total: progress(next(count), total))
        outside = {name: item for name, item in load.stored.items() if not name.startswith(f"{path}.")}
        place_all(replace(load, stored=outside))
        tie_and_move_buffers(load.model, load.device)
        task = _PruningTask(self, load)
        of_block = [
            {name: item for name, item in load.stored.items() if name.startswith(f"{path}.{index}.")}
            for index in range(len(blocks))
        ]
        if self.calibration is None:
            for tensors in of_block:
                task.place_unpruned(tensors)
                task.prune(tensors, {})
            return
        for block, tensors in zip(blocks, of_block, strict=True):
            block.forward = functools.partial(task.through_block, block, tensors)
        inner = getattr(load.model, load.model.base_model_prefix, load.model)  # without the head
        with evaluation_mode(load.model):
            inner(input_ids=self.calibration.to(load.device), use_cache=False)
        left = [index for index, block in enumerate(blocks) if "forward" in vars(block)]
        assert not left, f"blocks {left} were never reached"

    def _check_shapes(self, load: Loading, blocks: str) -> None:
        """Raise UserError, before anything is read, if layers of the blocks cannot have the pattern."""
        pattern = pattern_from(self.settings.pattern, self.settings.sparsity)
        faults = []
        for path in sorted(load.layers):
            item = load.stored.get(f"{path}.weight")
            if item is not None and path.startswith(f"{blocks}."):
                try:
                    check_shape(pattern, (item.shape[0], item.shape[-1]), path)
                except ValueError as error:
                    faults.append(first_line(error))
        if faults:
            more = f" {len(faults)} layers do not fit." if len(faults) > 1 else ""
            fix = "Fix: choose another pattern, or leave such layers out with base.skip."
            raise UserError(f"base.prune.pattern: {faults[0]}{more} {fix}")


def _decoder_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Path and list of the model's blocks, whether they can be checkpointed (`load.block_list`) or not."""
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return path, module
    raise UserError(
        f"base.prune: {model.config.model_type} has no list of its {count} blocks. Fix: name a model that is one list "
        "of decoder blocks (Llama, Qwen, Gemma, Mistral, Phi, ...)."
    )


@dataclass
class _PruningTask:
    """The work in each block; `tensors` are the stored tensors of the block."""

    pruner: Pruner
    load: Loading

    def weights(self, tensors: Mapping[str, Stored]) -> dict[str, Stored]:
        """The weights to prune."""
        names = {f"{path}.weight" for path in self.load.layers}
        return {name: item for name, item in tensors.items() if name in names}

    def place_unpruned(self, tensors: Mapping[str, Stored]) -> None:
        """Put all other tensors in."""
        pruned = self.weights(tensors)
        place_all(replace(self.load, stored={name: item for name, item in tensors.items() if name not in pruned}))

    def through_block(self, block: nn.Module, tensors: Mapping[str, Stored], *args: Any, **kwargs: Any) -> Any:
        """Replaces a block's forward once: prunes the block, then runs it."""
        del block.forward  # back to the class's own
        self.place_unpruned(tensors)
        weights, load = self.weights(tensors), self.load
        dense = replace(load.wanted, kind="none")
        wanted = load.wanted if self.pruner.settings.order == "quantize_first" else dense
        place_all(replace(load, stored=weights, wanted=wanted, progress=None))
        method = cast(Literal["wanda", "sparsegpt"], self.pruner.settings.method)
        paths = [name.rpartition(".")[0] for name in weights]
        with _measured({path: load.model.get_submodule(path) for path in paths}, method) as statistics:
            for part in _parts(args, kwargs):
                block(*part[0], **part[1])
        self.prune(tensors, statistics)
        return _joined([block(*part[0], **part[1]) for part in _parts(args, kwargs)])

    def prune(self, tensors: Mapping[str, Stored], statistics: Mapping[str, list[InputStatistics | None]]) -> None:
        """Prune and quantise the linear layers of a block and put them in."""
        assert self.load.progress is not None
        for name, item in self.weights(tensors).items():
            path = name.rpartition(".")[0]
            value = item.read()
            assert isinstance(value, Tensor)
            layer = self.load.model.get_submodule(path)
            num_parts = layer.num_experts if isinstance(layer, BareExperts) else 1
            measured = statistics.get(path, [None] * num_parts)
            weight, mask = self._pruned(value.to(self.load.device), measured, name)
            place_frozen(self.load.model, path, weight, mask_bits(mask))
            self.pruner.layers[path] = _report(value.to(self.load.device), weight, mask)
            del value, weight, mask
            self.load.progress(1, 1)

    def _pruned(self, value: Tensor, measured: Sequence[InputStatistics | None], name: str) -> tuple[Weight, Tensor]:
        """The pruned weight and its mask; each expert of a stack is pruned by the tokens that it got."""
        settings, wanted = self.pruner.settings, self.load.wanted
        pattern = pattern_from(settings.pattern, settings.sparsity)
        group = None if settings.group == "auto" else settings.group
        if settings.method != "magnitude":
            measured = self._without_gaps(measured, value, name)
        pack = functools.partial(quantize, kind=wanted.kind, block_size=wanted.block_size, name=name)
        if settings.order == "quantize_first":
            packed = pack(value, double_quant=wanted.double_quant)
            parts = zip(dequantize(packed).chunk(len(measured)), measured, strict=True)
            mask = torch.cat([mask_by_scores(dense, found, pattern, group) for dense, found in parts])
            return zero_packed(packed, mask), mask
        # SparseGPT's corrected weights are not rounded to the file's dtype before they are quantised.
        wide = value.float() if settings.method == "sparsegpt" else value
        done = [
            prune_weight(
                part, settings.method, pattern, statistics=found, group=group, damping=settings.damping, name=name
            )
            for part, found in zip(wide.chunk(len(measured)), measured, strict=True)
        ]
        pruned, mask = (torch.cat([each[index] for each in done]) for index in (0, 1))
        if wanted.kind == "none":
            return pruned.to(self.load.compute_dtype), mask
        return pack(pruned, double_quant=wanted.double_quant), mask

    def _without_gaps(
        self, measured: Sequence[InputStatistics | None], value: Tensor, name: str
    ) -> list[InputStatistics]:
        """Equal statistics, which prune by magnitude, for a layer or expert that no calibration token reached."""
        missing = [index for index, found in enumerate(measured) if found is None]
        if missing and len(measured) == 1:
            log.warning("%s: no calibration token reached this layer; it is pruned by magnitude.", name)
        elif missing:
            text = "%s: no calibration token reached experts %s (%d of %d); they are pruned by magnitude."
            log.warning(text, name, first_few([*map(str, missing)], 8), len(missing), len(measured))
        method = cast(Literal["wanda", "sparsegpt"], self.pruner.settings.method)
        return [found or InputStatistics(value.shape[1], method, self.load.device) for found in measured]


@contextmanager
def _measured(
    layers: Mapping[str, nn.Module], method: Literal["wanda", "sparsegpt"]
) -> Iterator[dict[str, list[InputStatistics | None]]]:
    """Measure the inputs of linear layers within a `with`: one set of statistics, or one for each expert of a stack.

    Layers that share an input share its statistics; None is an expert without tokens.
    """
    statistics: dict[str, list[InputStatistics | None]] = {}
    last: tuple[Tensor, list[InputStatistics | None]] | None = None

    def record(name: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        nonlocal last
        x = inputs[0]
        tokens: ExpertTokens | None = inputs[1] if len(inputs) > 1 else None
        own = statistics.get(name)
        if last is not None and last[0] is x and (own is None or own is last[1]):
            # The query, key and value layers, and gate and up, read the same tensor.
            statistics[name] = last[1]
            return
        if own is None:
            own = [None] * (1 if tokens is None else len(tokens.counts))
        reached = [(0, x)]
        if tokens is not None:  # an expert's rows of padding, which are no inputs, lie behind its tokens
            experts = ((run.experts[0], run.tokens) for run in tokens.reached)
            reached = [(expert, x[rows][: tokens.routed[expert]]) for expert, rows in experts]
        for index, some in reached:
            found = own[index] or InputStatistics(x.shape[-1], method, x.device)
            found.add(some)
            own[index] = found
        statistics[name] = own
        last = (x, own)

    with ExitStack() as hooks:
        for name, layer in layers.items():
            hooks.enter_context(layer.register_forward_pre_hook(functools.partial(record, name)))
        yield statistics


def _parts(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[tuple[list[Any], dict[str, Any]]]:
    """The arguments of a block for a few sequences at a time; arguments that all sequences share stay whole."""
    hidden = args[0] if args else kwargs["hidden_states"]
    step = max(1, _TOKENS_AT_ONCE // hidden.shape[1])
    for start in range(0, len(hidden), step):
        cut = functools.partial(_cut, count=len(hidden), some=slice(start, start + step))
        yield [cut(value) for value in args], {key: cut(value) for key, value in kwargs.items()}


def _cut(value: Any, *, count: int, some: slice) -> Any:
    if isinstance(value, Tensor):
        return value[some] if value.ndim > 1 and value.shape[0] == count else value
    if isinstance(value, (tuple, list)):
        return type(value)(_cut(item, count=count, some=some) for item in value)
    return value


def _joined(outputs: list[Any]) -> Any:
    """Join the outputs of `_parts`: tensors, or tuples that begin with one."""
    if isinstance(outputs[0], Tensor):
        return torch.cat(outputs)
    return (torch.cat([output[0] for output in outputs]), *outputs[0][1:])


def quantized_layers(source: ModelSource, wanted: Quantization) -> dict[str, dict[str, Any]]:
    """Path -> `layer_record` of each linear layer that is quantised without pruning; one weight is in memory at a time.

    Empty for kind "none" and for a quantised checkpoint. Raises UserError as `load_model`.
    """
    config = load_config(source)
    if wanted.kind == "none" or getattr(config, "quantization_config", None) is not None:
        return {}
    model = skeleton(config, source, torch.float32, "auto", torch.device("cpu"))
    layers, found = layers_to_quantize(model, wanted), {}
    for name, item in tensors_of_source(source, model).items():
        path, _, leaf = name.rpartition(".")
        if leaf == "weight" and path in layers and not isinstance(item, StoredPacked):
            value = item.read()
            assert isinstance(value, Tensor)
            weight = quantize(value, wanted.kind, wanted.block_size, wanted.double_quant, name=name)
            found[path] = layer_record(weight.kind, weight.shape, weight.block_size, _report(value, weight, None))
            del value, weight
    return found


def _report(value: Tensor, weight: Weight, mask: Tensor | None) -> PrunedLayer:
    """`mask` is True for a kept weight; None keeps all."""
    dense, original = dense_weight(weight, torch.float32), value.float()
    norm = float(original.norm())
    return PrunedLayer(
        num_weights=value.numel(),
        num_pruned=0 if mask is None else int((~mask).sum()),
        num_zeros=int((dense == 0).sum()),
        relative_error=float((dense - original).norm()) / norm if norm else 0.0,
        num_packed_bytes=weight.nbytes if isinstance(weight, Tensor) else weight.num_packed_bytes,
    )
