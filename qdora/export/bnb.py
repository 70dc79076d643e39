"""Export as a bitsandbytes checkpoint: a base as it is held, or a trained QDoRA model in 4 bits without loss.

For the latter the gain goes into the block scales, and the rest is plain LoRA.

    y = g (x W^T + s (x A^T) B^T) + bias = x (g W)^T + s (x A^T) (g B)^T + bias

If no block of W crosses from one row into the next, g W has the same 4-bit codes as W, and the block scales of row i
times g_i. So the model becomes a bitsandbytes checkpoint and a LoRA adapter of the same rank, which any program that
serves QLoRA can run. Each scale and each entry of g B is rounded once, to float32.

The scales are written in float32: double quantisation would round each of them to 8 bits.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qdora.adapter.layer import AdaptedLinear, FrozenLinear
from qdora.errors import UserError, first_few
from qdora.export.write import (
    Source,
    dense_layers,
    dense_weight_sources,
    packed_sources,
    plan_export,
    write_checkpoint,
)
from qdora.files.atomic import json_bytes
from qdora.files.tensor_file import write_tensors
from qdora.model.adapter_file import CONFIG_FILE, WEIGHTS_FILE, adapter_config, factor_tensors
from qdora.model.checkpoint import load_faults, quantization_config, stored_kind, taken_for_experts
from qdora.model.inject import adapted_layers, frozen_layers
from qdora.model.load import layers_to_quantize, load_config, quantization_of, skeleton
from qdora.model.multimodal import all_paths
from qdora.model.source import ADAPTER_DIRECTORY, ModelSource
from qdora.quant.bnb import BNB_KINDS, FOUR_BIT_KINDS
from qdora.quant.codebooks import MXFP4
from qdora.quant.packed import PackedWeight, block_scales
from qdora.recipe.settings import Recipe


def export_bnb(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    directory: Path,
    *,
    dtype: torch.dtype | None = None,
    published_as: str | None = None,
    adapted: bool = True,
    **options: Any,
) -> dict[str, Any]:
    """Write a bitsandbytes checkpoint of the scaled base, and the LoRA that belongs on it under `adapter/`.

    lora_A is as it is stored, lora_B = g B in float32. What is not quantised is in `dtype`; default: the model's own,
    which rounds nothing. `published_as` is the Hub id of `directory`, for the adapter's file; without it the file names
    no base. A model that is not `adapted` is written as it is held, also in int8. `options` are those of
    `write_checkpoint`. Returns what was written, as JSON.
    """
    start = time.perf_counter()
    dtype = dtype or model.dtype
    if adapted:
        check_foldable(model, dtype)
    layers = adapted_layers(model)
    gains = {layer: gain.float() for layer in layers.values() if (gain := layer.merged_gain()) is not None}
    plan = plan_export(model, dtype, partial(_packed_base, gains=gains if adapted else None, dtype=dtype))
    first = next(layer for layer in frozen_layers(model).values() if layer.kind in BNB_KINDS)
    nested = not adapted and hasattr(first, "nested_code")
    plan.config.quantization_config = quantization_config(
        first.kind, double_quant=nested, dtype=dtype, dense=dense_layers(model)
    )
    written = write_checkpoint(plan, tokenizer, directory, **options)
    written |= {"kind": first.kind, "block_size": first.block_size, "dtype": str(dtype).removeprefix("torch.")}
    if not adapted:
        return written
    config = adapter_config(
        layers,
        all_paths(model),
        base_name_or_path=published_as,
        revision=None,
        as_parameters=taken_for_experts(model, layers),
    )
    config["use_dora"] = False

    def scaled_B(layer: AdaptedLinear) -> Tensor:
        b = layer.stored_B()
        return b.float() * gains[layer].unsqueeze(-1) if layer in gains else b

    tensors = factor_tensors(model, scaled_B)
    adapter = directory / ADAPTER_DIRECTORY
    adapter.mkdir()
    write_tensors(adapter / WEIGHTS_FILE, dict(sorted(tensors.items())))
    (adapter / CONFIG_FILE).write_bytes(json_bytes(config, indent=2))
    return written | {
        "adapter": ADAPTER_DIRECTORY,
        "num_folded_layers": len(gains),
        "num_adapted_layers": len(layers),
        "num_adapter_bytes": sum(tensor.nbytes for tensor in tensors.values()),
        "seconds": time.perf_counter() - start,
    }


def _packed_base(
    layer: AdaptedLinear | FrozenLinear, *, gains: Mapping[AdaptedLinear, Tensor] | None, dtype: torch.dtype
) -> Mapping[str, Source]:
    """The tensors of a layer's base, its rows times the gain."""
    base = layer.base if isinstance(layer, AdaptedLinear) else layer
    gain = gains.get(layer) if gains and isinstance(layer, AdaptedLinear) else None

    def scaled(values: Tensor, rows: slice = slice(None)) -> Tensor:
        return values if gain is None else values * gain.reshape(-1, 1)[rows]  # not in place: it may be the model's

    if base.kind == "dense":
        sources = dense_weight_sources(base)
        if gain is None:
            return sources
        dense = sources["weight"]
        read = dense.rows
        rows = None if read is None else lambda some: scaled(read(some).float(), some)
        return {"weight": Source(dense.shaped.float(), lambda: scaled(dense.make().float()), rows=rows)}

    def make() -> PackedWeight:
        weight = base.packed_weight
        assert weight is not None
        if gains is None:
            return weight
        scales = scaled(block_scales(weight).reshape(base.out_features, -1)).reshape(-1)
        return replace(weight, absmax=scales, nested=None)

    return packed_sources(base, make, dtype, double_quant=gains is None)


def check_foldable(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """UserError with the reasons why the gain cannot go into block scales without loss."""
    layers, frozen = adapted_layers(model), frozen_layers(model)
    kinds = {layer.kind for layer in frozen.values()} - {"dense"}
    faults, of_transformers = [], list[str]()
    if not layers:
        faults.append("the run has no LoRA or DoRA adapter")
    elif any(layer.masked for layer in layers.values()):
        faults.append("plain LoRA cannot mask B A (adapter.mask: keep)")
    elif not kinds & set(FOUR_BIT_KINDS):
        faults.append(f"the base must be in nf4 or fp4 (got {', '.join(sorted(kinds)) or 'full precision'})")
    else:
        for path, layer in frozen.items():
            if layer.kind in FOUR_BIT_KINDS and layer.in_features % layer.block_size:
                size = f"in_features {layer.in_features} is no multiple of the block size {layer.block_size}"
                faults.append(f"{path.removesuffix('.base')}: {size}")
        faults += [
            f"{path} is a DoRA layer on a dense weight, which needs --dtype float32"
            for path, layer in layers.items()
            if layer.magnitude is not None and layer.base.kind == "dense" and dtype != torch.float32
        ]
        for path in sorted(taken_for_experts(model, layers)):
            if layers[path].base.kind != "dense":  # PEFT can name a dense one by its weight
                faults.append(f"PEFT takes {path} for an expert")
        classes = {path.removesuffix(".base"): each.replaces for path, each in frozen.items() if each.kind != "dense"}
        of_transformers = load_faults(model, classes, "--format nf4-lora")
    faults = [f"--format nf4-lora: {fault}. Fix: use --format merged." for fault in faults] + of_transformers
    if faults:
        raise UserError(*faults)


def check_loadable(recipe: Recipe, source: ModelSource) -> None:
    """UserError with the reasons why transformers could not load the base as a bitsandbytes checkpoint."""
    base, config = recipe.base, load_config(source)
    if base.quant not in BNB_KINDS:
        text = f"must be {', '.join(BNB_KINDS)} in a checkpoint of bitsandbytes, got {base.quant}"
        raise UserError(f"base.quant: {text}. Fix: set base.cache in a recipe, which keeps such a base.")
    if (stored := stored_kind(getattr(config, "quantization_config", None))) not in (None, MXFP4):
        raise UserError(f"base.quant: {source.name} is quantised already, in {stored}.")
    vars(config).pop("quantization_config", None)
    model = skeleton(config, source, torch.float32, "auto", torch.device("cpu"))
    chosen = layers_to_quantize(model, quantization_of(base))
    modules: dict[str, Any] = {path: model.get_submodule(path) for path in sorted(chosen)}
    classes = {path: type(module).__name__ for path, module in modules.items()}
    faults = load_faults(model, classes, "base.quant", "leave them dense with base.skip=[lm_head,experts]")
    size, why = base.block_size, "bitsandbytes on a CPU misreads rows that begin inside a block"
    crossing = [path for path, module in modules.items() if base.has_blocks and module.in_features % size]
    if crossing:
        faults.append(f"base.block_size: must divide the inputs of {first_few(crossing)}, got {size}: {why}.")
    if faults:
        raise UserError(*faults)
