"""Base and adapter as one checkpoint, or as a bitsandbytes checkpoint and a LoRA.

A merge is exact: the base is dequantised in float32, the adapter applied in float32, and the result cast once, each
weight when it is written. Besides the merge on the dequantised base, which is the model that was trained, there are two
others:

    original      m (W + s B A) / ||W + s B A|| on the source's own 16-bit weights W, with the norm of that sum: free of
                  the base's quantisation error, but not the model that the adapter was fitted to
    requantised   the merge quantised to 4 bits again, as a bitsandbytes checkpoint: small, but rounded a second time

nf4-lora loses nothing in 4 bits: the gain goes into the block scales, and the rest is plain LoRA.

    y = g (x W^T + s (x A^T) B^T) + bias = x (g W)^T + s (x A^T) (g B)^T + bias

If no block of W crosses from one row into the next, g W has the same 4-bit codes as W, and the block scales of row i
times g_i. So the model becomes a bitsandbytes checkpoint and a LoRA adapter of the same rank, which any program that
serves QLoRA can run. Each scale and each entry of g B is rounded once, to float32: double quantisation would round each
scale to 8 bits.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

from qdora.adapter.layer import AdaptedLinear, FrozenLinear
from qdora.errors import UserError, first_few, refuse
from qdora.export.write import Layer, base_of, dense_layers, merged, plan_export, write_checkpoint
from qdora.files.atomic import json_bytes
from qdora.files.console import bar
from qdora.files.tensor_file import write_tensors
from qdora.model.adapter_file import CONFIG_FILE, WEIGHTS_FILE, adapter_config, factor_tensors
from qdora.model.build_model import find_source
from qdora.model.checkpoint import load_faults, taken_for_experts, tied_weights
from qdora.model.inject import adapted_layers, frozen_layers
from qdora.model.load import layers_to_quantize, load_config, quantization_of, skeleton
from qdora.model.quantised import form_of_config
from qdora.model.source import ADAPTER_DIRECTORY, ModelSource
from qdora.quant.bnb import BNB_KINDS, FOUR_BIT_KINDS
from qdora.quant.codebooks import MXFP4
from qdora.quant.packed import PackedWeight, block_scales, empty_packed, quantize
from qdora.quant.tiles import Weight
from qdora.recipe.options import ExportOptions
from qdora.recipe.recipe_file import recipe_of_run
from qdora.recipe.section import parse_size
from qdora.recipe.settings import Recipe
from qdora.run.load_run import TrainedRun, load_run


def write_merge(
    run: Path, directory: Path, options: ExportOptions, dtype: torch.dtype, console: Console
) -> tuple[TrainedRun, dict[str, Any]]:
    """Write the merged model of a run; returns the running model and what was written."""
    recipe = recipe_of_run(run)
    if options.base == "original" and (why := no_original(recipe, find_source(recipe, weights=False))):
        raise UserError(f"--base original: {why}. Fix: use --base dequantized.")
    if options.requantize and (recipe.base.prune is not None or recipe.base.quant not in FOUR_BIT_KINDS):
        got = recipe.base.quant if recipe.base.prune is None else "a pruned base"
        raise UserError(f"--requantize: the base must be in nf4 or fp4, got {got}.")
    trained = load_run(run, step=options.step, original=options.base == "original")
    return trained, write_form(
        export_merged, trained, directory, options, console, dtype=dtype, requantize=options.requantize
    )


def write_form(
    export: Callable[..., dict[str, Any]],
    trained: TrainedRun,
    directory: Path,
    options: ExportOptions,
    console: Console,
    **more: Any,
) -> dict[str, Any]:
    """`export` of a loaded run into shards of --shard-size, with a progress bar."""
    size = parse_size(options.shard_size)
    with bar(console, "writing the checkpoint") as progress:
        return export(
            trained.model, trained.tokenizer, directory, max_shard_bytes=size, progress=progress, **more
        )


def no_original(recipe: Recipe, source: ModelSource) -> str:
    """Why a base has no 16-bit weights to merge on; '' if it has."""
    if recipe.base.prune is not None:
        return "the base is pruned, and the source's own weights are not"
    if recipe.base.quant == "none":
        return "the base was not quantised in training"
    if source.is_gguf:
        return f"{source.name} is a GGUF file, not the 16-bit model"
    stored = form_of_config(load_config(source))["quant"]
    return "" if stored == "none" else f"{source.name} is stored in {stored} and has no 16-bit weights"


def export_merged(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    directory: Path,
    *,
    dtype: torch.dtype = torch.float16,
    requantize: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Write a model as a transformers checkpoint in `dtype`; returns what was written, as JSON.

    With `requantize` the layers of a base in nf4 or fp4 are quantised again. `options` are those of `write_checkpoint`.
    """
    if requantize:
        if faults := load_faults(_classes(model), "--requantize"):
            raise UserError(*faults)
        written = export_bnb(model, tokenizer, directory, _requantized, dtype=dtype, **options)
    else:
        written = write_checkpoint(plan_export(model, dtype), tokenizer, directory, **options)
    return written | {
        "dtype": str(dtype).removeprefix("torch."),
        "num_merged_layers": len(adapted_layers(model)),
    }


def _requantized(layer: Layer) -> Weight:
    """The merge of a layer in 4 bits; a layer without an adapter keeps the bytes that training used."""
    form = base_of(layer).stored_weight
    if isinstance(form, Tensor):
        return merged(layer)
    if isinstance(layer, FrozenLinear):
        return form
    return quantize(layer.merged_weight(), form.kind, form.block_size, form.nested_absmax is not None)


def _classes(model: PreTrainedModel) -> list[str]:
    """Of each quantised layer in the model's code."""
    return [layer.replaces for layer in frozen_layers(model).values() if layer.kind != "dense"]


def export_bnb(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    directory: Path,
    weight_of: Callable[[Layer], Weight] = lambda layer: base_of(layer).stored_weight,
    *,
    dtype: torch.dtype,
    double_quant: bool = True,
    **options: Any,
) -> dict[str, Any]:
    """Write a model as a bitsandbytes checkpoint, by default without its adapters: with the bytes that it holds, also
    in int8. `weight_of` gives the weight of each layer, packed where its base is."""
    plan = plan_export(model, dtype, weight_of, packed=True, double_quant=double_quant)
    first = next(layer for layer in frozen_layers(model).values() if layer.kind in BNB_KINDS)
    nested = double_quant and hasattr(first, "nested_code")
    blocks = {
        "bnb_4bit_quant_type": first.kind,
        "bnb_4bit_use_double_quant": nested,
        "bnb_4bit_compute_dtype": dtype,
    }
    form: dict[str, Any] = {"load_in_8bit": True} if first.kind == "int8" else {"load_in_4bit": True, **blocks}
    plan.config.quantization_config = BitsAndBytesConfig(
        **form, llm_int8_skip_modules=dense_layers(model)
    ).to_dict()
    facts = {"kind": first.kind, "block_size": first.block_size, "dtype": str(dtype).removeprefix("torch.")}
    return write_checkpoint(plan, tokenizer, directory, **options) | facts


def export_nf4_lora(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    directory: Path,
    *,
    dtype: torch.dtype | None = None,
    published_as: str | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Write a bitsandbytes checkpoint of the scaled base, and the LoRA that belongs on it under `adapter/`.

    lora_A is as it is stored, lora_B = g B in float32. What is not quantised is in `dtype`; default: the model's own,
    which rounds nothing. `published_as` is the Hub id of `directory`, for the adapter's file; without it the file names
    no base. `options` are those of `write_checkpoint`. Returns what was written, as JSON.
    """
    dtype = dtype or model.dtype
    check_foldable(model, dtype)
    layers = adapted_layers(model)
    gains: dict[Any, Tensor] = {
        layer: gain.float().unsqueeze(-1)
        for layer in layers.values()
        if (gain := layer.merged_gain()) is not None
    }

    def scaled(layer: Layer) -> Weight:
        weight = base_of(layer).stored_weight
        if isinstance(weight, Tensor):
            weight = merged(base_of(layer))
            return weight * gains[layer].reshape(-1, 1).to(weight.device) if layer in gains else weight
        scales = block_scales(weight)
        if layer in gains:  # not in place: it may be the model's
            scales = (scales.reshape(weight.shape[0], -1) * gains[layer].reshape(-1, 1)).reshape(-1)
        return PackedWeight(weight.kind, weight.shape, weight.block_size, weight.packed, scales)

    def scaled_B(layer: AdaptedLinear) -> Tensor:
        b = layer.stored_B()
        return b.float() * gains[layer] if layer in gains else b

    written = export_bnb(model, tokenizer, directory, scaled, dtype=dtype, double_quant=False, **options)
    config = adapter_config(model, published_as, None, use_dora=False)
    adapter = directory / ADAPTER_DIRECTORY
    adapter.mkdir()
    write_tensors(adapter / WEIGHTS_FILE, dict(sorted(factor_tensors(model, scaled_B).items())))
    (adapter / CONFIG_FILE).write_bytes(json_bytes(config, indent=2))
    return written | {
        "adapter": ADAPTER_DIRECTORY,
        "num_folded_layers": len(gains),
        "num_adapted_layers": len(layers),
    }


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
        of_transformers = load_faults(_classes(model), "--format nf4-lora")
    faults = [f"--format nf4-lora: {fault}. Fix: use --format merged." for fault in faults] + of_transformers
    if faults:
        raise UserError(*faults)


def check_loadable(recipe: Recipe, source: ModelSource, dtype: torch.dtype) -> tuple[int, int]:
    """UserError with the reasons why transformers could not load the base as a bitsandbytes checkpoint.

    Returns the bytes of its quantised layers, and of its other parameters in `dtype`.
    """
    base, config = recipe.base, load_config(source)
    if base.quant not in BNB_KINDS:
        text = f"must be {', '.join(BNB_KINDS)} in a checkpoint of bitsandbytes, got {base.quant}"
        raise UserError(f"base.quant: {text}. Fix: set base.cache in a recipe, which keeps such a base.")
    stored = form_of_config(config)["quant"]
    if stored not in ("none", MXFP4):
        raise UserError(f"base.quant: {source.name} is quantised already, in {stored}.")
    model = skeleton(config, source)
    chosen = layers_to_quantize(model, quantization_of(base))
    modules: dict[str, Any] = {path: model.get_submodule(path) for path in sorted(chosen)}
    classes = [type(module).__name__ for module in modules.values()]
    faults = load_faults(classes, "base.quant", "leave them dense with base.skip=[lm_head,experts]")
    size, why = base.block_size, "bitsandbytes on a CPU misreads rows that begin inside a block"
    crossing = [path for path, module in modules.items() if base.has_blocks and module.in_features % size]
    if crossing:
        faults.append(f"base.block_size: must divide the inputs of {first_few(crossing)}, got {size}: {why}.")
    refuse(faults)
    form = base.block_size, base.double_quant, "meta"
    packed = sum(empty_packed(base.quant, each.weight.shape, *form).num_bytes for each in modules.values())
    apart = {f"{path}.weight" for path in modules} | tied_weights(model).keys()
    dense = sum(each.numel() for name, each in model.named_parameters() if name not in apart)
    return packed, dense * dtype.itemsize
