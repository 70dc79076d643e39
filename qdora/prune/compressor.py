"""Compressing a base while it is loaded, block by block: read, measure, prune, quantise, write, run.

One forward pass on the calibration text drives it. Each block's weights are read, its inputs are run through it to
measure its linear layers, these are pruned and quantised, and the inputs are run through once more. Memory holds one
block at a time.
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from qdora.adapter.expert_product import ExpertTokens
from qdora.adapter.layer import FrozenLinear, evaluation_mode
from qdora.errors import first_few
from qdora.model.checkpoint import Stored
from qdora.model.load import Loading, blocks_of, place_all, place_frozen, tie_and_move_buffers
from qdora.model.store import BaseWriter
from qdora.prune.grid import Grid, fitted_scales
from qdora.prune.scores import (
    DAMPING,
    InputStatistics,
    check_finite,
    check_shape,
    mask_by_scores,
    pattern_from,
    sweep,
)
from qdora.quant.codebooks import code_values
from qdora.quant.packed import dequantize, mask_bits, pack, quantize, stored_scales, zero_packed
from qdora.quant.tiles import Weight, dense_weight
from qdora.recipe.settings import BaseWeightsConfig

log = logging.getLogger("qdora")

# Calibration tokens per forward pass of a block; bounds its activations.
_TOKENS_AT_ONCE = 4096
_Statistics = list[InputStatistics | None]
"""Of a layer, one for each of its experts; None where no calibration token came."""


class Compressor:
    """A `Placer` that prunes and quantises the linear layers of the blocks as `base` says, and hands each block to
    `writer`; the model keeps none of them. `calibration` holds token ids (sequences, length), None if no inputs are
    measured."""

    def __init__(self, base: BaseWeightsConfig, writer: BaseWriter, calibration: Tensor | None = None) -> None:
        self.base, self.writer, self.calibration = base, writer, calibration
        prune = base.prune
        self.pattern = None if prune is None else pattern_from(prune.pattern, prune.sparsity)

    @torch.no_grad()
    def __call__(self, load: Loading) -> None:
        """Read every stored tensor once, write the compressed layers."""
        path, blocks = blocks_of(load.model, "base.prune and base.method gptq: must be off")
        for name in sorted(load.layers):  # before anything is read
            item = load.stored.get(f"{name}.weight")
            if item is not None and self.pattern is not None and name.startswith(f"{path}."):
                check_shape(self.pattern, (item.shape[0], item.shape[-1]), name)
        # The tensors are read in several passes, whose counts are added up.
        count, total = itertools.count(1), len(load.stored)
        progress = load.progress or (lambda _done, _total: None)
        load = replace(load, progress=lambda _done, _total: progress(next(count), total))
        outside = {name: item for name, item in load.stored.items() if not name.startswith(f"{path}.")}
        place_all(replace(load, stored=outside))
        tie_and_move_buffers(load.model, load.device)
        for index, block in enumerate(blocks):
            tensors = {name: item for name, item in load.stored.items() if name.startswith(f"{path}.{index}.")}
            if self.calibration is not None:
                block.forward = functools.partial(self._through_block, load, index, block, tensors)
            elif not self.writer.finished(index, _paths(load, tensors)):
                self._place_others(load, tensors)
                self._compress(load, index, tensors, {})
                block.to_empty(device="meta")
        if self.calibration is not None:
            with evaluation_mode(load.model):
                load.model.base_model(input_ids=self.calibration.to(load.device), use_cache=False)

    def _through_block(
        self,
        load: Loading,
        index: int,
        block: nn.Module,
        tensors: Mapping[str, Stored],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        del block.forward  # back to the class's own
        self._place_others(load, tensors)
        paths = _paths(load, tensors)
        if finished := self.writer.finished(index, paths):  # by a start that was interrupted
            place_all(replace(load, stored=finished))
        else:
            weights, prune = {f"{path}.weight": tensors[f"{path}.weight"] for path in paths}, self.base.prune
            is_first = prune is not None and prune.order == "quantize_first"
            wanted = load.wanted if is_first else replace(load.wanted, kind="none")
            place_all(replace(load, stored=weights, wanted=wanted, progress=None))
            layers = {path: load.model.get_submodule(path) for path in paths}
            with _measured(layers, self.base.corrects) as statistics:
                for part in _parts(args, kwargs):
                    block(*part[0], **part[1])
            self._compress(load, index, tensors, statistics)
        outputs = [block(*part[0], **part[1]) for part in _parts(args, kwargs)]
        block.to_empty(device="meta")
        if isinstance(outputs[0], Tensor):
            return torch.cat(outputs)
        return (torch.cat([output[0] for output in outputs]), *outputs[0][1:])

    def _place_others(self, load: Loading, tensors: Mapping[str, Stored]) -> None:
        compressed = {f"{path}.weight" for path in _paths(load, tensors)}
        place_all(
            replace(load, stored={name: item for name, item in tensors.items() if name not in compressed})
        )

    def _compress(
        self, load: Loading, index: int, tensors: Mapping[str, Stored], statistics: dict[str, _Statistics]
    ) -> None:
        layers, records = dict[str, FrozenLinear](), dict[str, dict[str, Any]]()
        stacks, is_plain = dict[int, list[str]](), self.base.method == "gptq" and self.pattern is None
        for place, path in enumerate(_paths(load, tensors)):
            found, width = statistics.get(path, [None]), tensors[f"{path}.weight"].shape[-1]
            # GPTQ rounds layers with the same inputs in one sweep, unless a block lies in two of them.
            shared = (
                is_plain and len(found) == 1 and found[0] is not None and width % load.wanted.block_size == 0
            )
            stacks.setdefault(id(found) if shared else place, []).append(path)
        for paths in stacks.values():
            values: list[Any] = [tensors[f"{path}.weight"].read().to(load.device) for path in paths]
            parts = getattr(load.model.get_submodule(paths[0]), "num_experts", 1)
            measured = statistics.pop(paths[0], [None] * parts)
            done = self._compressed(load, values, measured, f"{', '.join(paths)}.weight")
            for path, value, (weight, mask) in zip(paths, values, done, strict=True):
                layers[path] = place_frozen(load.model, path, weight, None if mask is None else mask_bits(mask))
                records[path] = _record(value, weight, mask)
                load.progress(1, 1)  # type: ignore[misc]
            del values, value, measured, done, weight, mask
        if layers:
            self.writer.write(index, layers, records)

    def _compressed(
        self, load: Loading, values: Sequence[Tensor], measured: _Statistics, name: str
    ) -> list[tuple[Weight, Tensor | None]]:
        """Form and keep mask of a weight, or of several whose rows GPTQ rounds together."""
        prune, wanted, pattern = self.base.prune, load.wanted, self.pattern
        form, double_quant = (wanted.kind, wanted.block_size), wanted.double_quant
        by_gptq = self.base.method == "gptq"
        value = values[0] if len(values) == 1 else torch.cat(list(values))
        missing = [str(index) for index, found in enumerate(measured) if found is None]
        if missing and self.calibration is not None:
            experts = f"{first_few(missing, 8)} ({len(missing)} of {len(measured)})"
            how = "rounded" if prune is None else "pruned by magnitude"
            log.warning("%s: no calibration token reached experts %s; they are %s.", name, experts, how)
            # Equal statistics prune by magnitude, and move no error.
            blank = InputStatistics(value.shape[1], load.device, self.base.corrects)
            measured = [found or blank for found in measured]
        # Corrected weights are not rounded to the file's dtype before they are quantised.
        kept, device = value.float() if self.base.corrects else value, value.device
        del value  # of several weights a copy
        parts, masks = kept.chunk(len(measured)), list[Tensor]()
        for part, found in zip(parts, measured, strict=True):
            check_finite(part, found, name)
        if prune is not None and pattern is not None and not prune.corrects:
            seen = parts
            if prune.order == "quantize_first":
                packed = quantize(values[0], *form, double_quant, name=name)
                seen = dequantize(packed).chunk(len(measured))
            masks = [
                mask_by_scores(prune.method, part, found if prune.measures else None, pattern, prune.group)
                for part, found in zip(seen, measured, strict=True)
            ]
            mask, pattern = torch.cat(masks), None
            if prune.order == "quantize_first":
                return [(zero_packed(packed, mask), mask)]
            kept = kept.masked_fill(~mask, 0)
        if self.base.corrects:
            known, grid, done = cast(list[InputStatistics], measured), None, []
            if by_gptq:
                squares = torch.stack([found.column_squares for found in known])
                absmax = fitted_scales(kept, squares, *form, clip=self.base.clips)
                own_scales = torch.split(absmax, [-(-each.numel() // wanted.block_size) for each in values])
                stored = torch.cat([stored_scales(each, double_quant) for each in own_scales])
                grid = Grid(*form, stored, code_values(wanted.kind, device))
            damping = DAMPING if prune is None else prune.damping
            for index, (part, found) in enumerate(zip(parts, known, strict=True)):
                own_grid = None if grid is None else replace(grid, first=index * part.numel())
                own_mask = masks[index] if masks else None
                done.append(sweep(part, found, pattern, own_mask, own_grid, damping=damping, name=name))
            kept, mask = (torch.cat(each) for each in zip(*done, strict=True))
            if by_gptq:
                codes = zip(torch.split(kept, [len(each) for each in values]), own_scales, strict=True)
                keep_mask = None if prune is None else mask
                return [(pack(part, each, *form, double_quant), keep_mask) for part, each in codes]
        if wanted.kind == "none":
            return [(kept.to(load.compute_dtype), mask)]
        return [(quantize(kept, *form, double_quant, name=name), mask)]


def _paths(load: Loading, tensors: Mapping[str, Stored]) -> list[str]:
    """Of the layers among a block's tensors."""
    return [path for name in tensors if (path := name.removesuffix(".weight")) in load.layers]


@contextmanager
def _measured(layers: Mapping[str, nn.Module], products: bool) -> Iterator[dict[str, _Statistics]]:
    """Measure the inputs of linear layers within a `with`. Layers that share an input share its statistics."""
    statistics: dict[str, _Statistics] = {}
    last: tuple[Tensor, _Statistics] | None = None

    def record(name: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        nonlocal last
        x = inputs[0]
        tokens: ExpertTokens | None = inputs[1] if len(inputs) > 1 else None
        if last is not None and last[0] is x and statistics.get(name, last[1]) is last[1]:
            # The query, key and value layers, and gate and up, read the same tensor.
            statistics[name] = last[1]
            return
        own = statistics.setdefault(name, [None] * (1 if tokens is None else len(tokens.counts)))
        reached = [(0, x)]
        if tokens is not None:  # an expert's rows of padding, which are no inputs, lie behind its tokens
            experts = ((run.experts[0], run.tokens) for run in tokens.reached)
            reached = [(expert, x[rows][: tokens.routed[expert]]) for expert, rows in experts]
        for index, some in reached:
            found = own[index] or InputStatistics(x.shape[-1], x.device, products)
            found.add(some)
            own[index] = found
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


def _record(value: Tensor, weight: Weight, mask: Tensor | None) -> dict[str, Any]:
    """Form, counts and error of a layer. `num_zeros`: also the weights that are quantised to 0. `relative_error`:
    ||W' - W|| / ||W|| (Frobenius norm) of the dense weight W and the result W'."""
    dense, original = dense_weight(weight, torch.float32), value.float()
    norm, num_pruned = float(original.norm()), 0 if mask is None else int((~mask).sum())
    return {
        "kind": "dense" if isinstance(weight, Tensor) else weight.kind,
        "shape": list(value.shape),
        "block_size": 0 if isinstance(weight, Tensor) else weight.block_size,
        "sparsity": num_pruned / value.numel(),
        "num_weights": value.numel(),
        "num_pruned": num_pruned,
        "num_zeros": int((dense == 0).sum()),
        "relative_error": float((dense - original).norm()) / norm if norm else 0.0,
        "num_packed_bytes": weight.nbytes if isinstance(weight, Tensor) else weight.num_bytes,
    }
