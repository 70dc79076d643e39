"""Pruning a base while it is loaded, block by block: read, measure, prune, quantise, run.

One forward pass on the calibration text drives it. Each block's weights are read, its inputs are run through it to
measure its linear layers, these are pruned and quantised, and the inputs are run through once more. Memory holds one
dense block at a time.
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel

from qdora.adapter.expert_product import ExpertTokens
from qdora.adapter.experts import BareExperts
from qdora.adapter.layer import evaluation_mode
from qdora.errors import UserError, first_few
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
_Statistics = list[InputStatistics | None]
"""Of a layer, one for each of its experts; None where no calibration token came."""


class Pruner:
    """A `Placer` that prunes the linear layers of the blocks. `calibration` holds token ids (sequences, length), None
    for magnitude. After the load `layers` holds path -> counts and error."""

    def __init__(self, settings: PruneConfig, calibration: Tensor | None = None) -> None:
        self.settings, self.calibration = settings, calibration
        self.pattern = pattern_from(settings.pattern, settings.sparsity)
        self.layers: dict[str, PrunedLayer] = {}

    @torch.no_grad()
    def __call__(self, load: Loading) -> None:
        """Read every stored tensor and put it into the model."""
        if any(isinstance(item, StoredPacked) for item in load.stored.values()):
            raise UserError("base.prune: the checkpoint is already quantised. Fix: name the model in full precision.")
        path, blocks = _decoder_blocks(load.model)
        for name in sorted(load.layers):  # before anything is read
            item = load.stored.get(f"{name}.weight")
            if item is not None and name.startswith(f"{path}."):
                check_shape(self.pattern, (item.shape[0], item.shape[-1]), name)
        # The tensors are read in several passes, whose counts are added up.
        count, total, progress = itertools.count(1), len(load.stored), load.progress or (lambda _done, _total: None)
        load = replace(load, progress=lambda _done, _total: progress(next(count), total))
        outside = {name: item for name, item in load.stored.items() if not name.startswith(f"{path}.")}
        place_all(replace(load, stored=outside))
        tie_and_move_buffers(load.model, load.device)
        of_block = [
            {name: item for name, item in load.stored.items() if name.startswith(f"{path}.{index}.")}
            for index in range(len(blocks))
        ]
        if self.calibration is None:
            for tensors in of_block:
                self._place_others(load, tensors)
                self._prune(load, tensors, {})
            return
        for block, tensors in zip(blocks, of_block, strict=True):
            block.forward = functools.partial(self._through_block, load, block, tensors)
        inner = getattr(load.model, load.model.base_model_prefix, load.model)  # without the head
        with evaluation_mode(load.model):
            inner(input_ids=self.calibration.to(load.device), use_cache=False)

    def _through_block(
        self, load: Loading, block: nn.Module, tensors: Mapping[str, Stored], *args: Any, **kwargs: Any
    ) -> Any:
        del block.forward  # back to the class's own
        self._place_others(load, tensors)
        weights = _weights(load, tensors)
        dense = replace(load.wanted, kind="none")
        wanted = load.wanted if self.settings.order == "quantize_first" else dense
        place_all(replace(load, stored=weights, wanted=wanted, progress=None))
        paths = [name.removesuffix(".weight") for name in weights]
        layers = {path: load.model.get_submodule(path) for path in paths}
        method = cast(Literal["wanda", "sparsegpt"], self.settings.method)
        with _measured(layers, method) as statistics:
            for part in _parts(args, kwargs):
                block(*part[0], **part[1])
        self._prune(load, tensors, statistics)
        outputs = [block(*part[0], **part[1]) for part in _parts(args, kwargs)]
        if isinstance(outputs[0], Tensor):
            return torch.cat(outputs)
        return (torch.cat([output[0] for output in outputs]), *outputs[0][1:])

    def _place_others(self, load: Loading, tensors: Mapping[str, Stored]) -> None:
        pruned = _weights(load, tensors)
        place_all(replace(load, stored={name: item for name, item in tensors.items() if name not in pruned}))

    def _prune(self, load: Loading, tensors: Mapping[str, Stored], statistics: Mapping[str, _Statistics]) -> None:
        assert load.progress is not None
        for name, item in _weights(load, tensors).items():
            path = name.removesuffix(".weight")
            value = item.read()
            assert isinstance(value, Tensor)
            layer, value = load.model.get_submodule(path), value.to(load.device)
            num_parts = layer.num_experts if isinstance(layer, BareExperts) else 1
            weight, mask = self._pruned(load, value, statistics.get(path, [None] * num_parts), name)
            place_frozen(load.model, path, weight, mask_bits(mask))
            self.layers[path] = _report(value, weight, mask)
            del value, weight, mask
            load.progress(1, 1)

    def _pruned(self, load: Loading, value: Tensor, measured: _Statistics, name: str) -> tuple[Weight, Tensor]:
        settings, wanted = self.settings, load.wanted
        group = None if settings.group == "auto" else settings.group
        method = settings.method
        if method != "magnitude":
            missing = [str(index) for index, found in enumerate(measured) if found is None]
            if missing:
                experts = f"experts {first_few(missing, 8)} ({len(missing)} of {len(measured)})"
                which = experts if len(measured) > 1 else "the inputs"
                log.warning("%s: no calibration token reached %s; they are pruned by magnitude.", name, which)
            # Equal statistics prune by magnitude.
            measured = [found or InputStatistics(value.shape[1], method, load.device) for found in measured]
        pack = functools.partial(quantize, kind=wanted.kind, block_size=wanted.block_size, name=name)
        if settings.order == "quantize_first":
            packed = pack(value, double_quant=wanted.double_quant)
            parts = zip(dequantize(packed).chunk(len(measured)), measured, strict=True)
            mask = torch.cat([mask_by_scores(dense, found, self.pattern, group) for dense, found in parts])
            return zero_packed(packed, mask), mask
        # SparseGPT's corrected weights are not rounded to the file's dtype before they are quantised.
        wide = value.float() if method == "sparsegpt" else value
        options: dict[str, Any] = {"group": group, "damping": settings.damping, "name": name}
        parts = zip(wide.chunk(len(measured)), measured, strict=True)
        done = [prune_weight(part, method, self.pattern, statistics=found, **options) for part, found in parts]
        pruned, mask = (torch.cat([each[index] for each in done]) for index in (0, 1))
        if wanted.kind == "none":
            return pruned.to(load.compute_dtype), mask
        return pack(pruned, double_quant=wanted.double_quant), mask


def _weights(load: Loading, tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    return {name: item for name, item in tensors.items() if name in {f"{path}.weight" for path in load.layers}}


def _decoder_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return path, module
    raise UserError(f"base.prune: {model.config.model_type} has no list of its {count} blocks.")


@contextmanager
def _measured(
    layers: Mapping[str, nn.Module], method: Literal["wanda", "sparsegpt"]
) -> Iterator[dict[str, _Statistics]]:
    """Measure the inputs of linear layers within a `with`. Layers that share an input share its statistics."""
    statistics: dict[str, _Statistics] = {}
    last: tuple[Tensor, _Statistics] | None = None

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
    hidden = args[0] if args else kwargs["hidden_states"]
    step = max(1, _TOKENS_AT_ONCE // hidden.shape[1])
    for start in range(0, len(hidden), step):

        def cut(value: Any, some: slice = slice(start, start + step)) -> Any:
            is_cut = isinstance(value, Tensor) and value.ndim > 1 and len(value) == len(hidden)
            return value[some] if is_cut else value

        yield tree_map(cut, (list(args), dict(kwargs)))


def quantized_layers(source: ModelSource, wanted: Quantization) -> dict[str, dict[str, Any]]:
    """Path -> `layer_record` of each linear layer that is quantised without pruning."""
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
    dense, original = dense_weight(weight, torch.float32), value.float()
    norm = float(original.norm())
    return PrunedLayer(
        num_weights=value.numel(),
        num_pruned=0 if mask is None else int((~mask).sum()),
        num_zeros=int((dense == 0).sum()),
        relative_error=float((dense - original).norm()) / norm if norm else 0.0,
        num_packed_bytes=weight.nbytes if isinstance(weight, Tensor) else weight.num_bytes,
    )
