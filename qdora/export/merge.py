"""Base and adapter as one checkpoint.

The merge is exact: the base is dequantised in float32, the adapter applied in float32, and the result cast once, each
weight when it is written. Besides the merge on the dequantised base, which is the model that was trained, there are two
others:

    original      m (W + s B A) / ||W + s B A|| on the source's own 16-bit weights W, with the norm of that sum: free of
                  the base's quantisation error, but not the model that the adapter was fitted to
    requantised   the merge quantised to 4 bits again, as a bitsandbytes checkpoint: small, but rounded a second time
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qdora.adapter.layer import AdaptedLinear, FrozenLinear
from qdora.errors import UserError
from qdora.export.write import (
    Source,
    dense_layers,
    dense_weight_sources,
    packed_sources,
    plan_export,
    write_checkpoint,
)
from qdora.files.console import bar
from qdora.files.run_directory import open_run
from qdora.model.build_model import find_source
from qdora.model.checkpoint import load_faults, quantization_config, stored_kind
from qdora.model.inject import adapted_layers, frozen_layers
from qdora.model.load import load_config
from qdora.model.source import ModelSource
from qdora.quant.bnb import FOUR_BIT_KINDS
from qdora.quant.packed import PackedWeight, quantize
from qdora.recipe.options import ExportOptions
from qdora.recipe.recipe_file import load_recipe
from qdora.recipe.section import parse_size
from qdora.recipe.settings import Recipe
from qdora.run.load_run import TrainedRun, load_run
from qdora.run.report import card_files


def write_merge(
    run: Path, directory: Path, options: ExportOptions, dtype: torch.dtype, console: Console
) -> tuple[TrainedRun, dict[str, Any]]:
    """Write the merged model of a run with a model card; returns the running model and what was written."""
    recipe = load_recipe(open_run(run).recipe_file)
    if options.base == "original" and (why := no_original(recipe, find_source(recipe, weights=False))):
        raise UserError(f"--base original: {why}. Fix: use --base dequantized.")
    if options.requantize and (recipe.base.prune is not None or recipe.base.quant not in FOUR_BIT_KINDS):
        got = recipe.base.quant if recipe.base.prune is None else "a pruned base"
        raise UserError(f"--requantize: the base must be in nf4 or fp4, got {got}.")
    trained = load_run(run, step=options.step, original=options.base == "original")
    with bar(console, "merging") as progress:
        written = export_merged(
            trained.model,
            trained.tokenizer,
            directory,
            dtype=dtype,
            requantize=options.requantize,
            max_shard_bytes=parse_size(options.shard_size),
            progress=progress,
            extra_files=card_files(trained.run, recipe, trained.state, form=options.form),
        )
    return trained, written


def no_original(recipe: Recipe, source: ModelSource) -> str:
    """Why a base has no 16-bit weights to merge on; '' if it has."""
    if recipe.base.prune is not None:
        return "the base is pruned, and the source's own weights are not"
    if recipe.base.quant == "none":
        return "the base was not quantised in training"
    if source.is_gguf:
        return f"{source.name} is a GGUF file, not the 16-bit model"
    stored = stored_kind(getattr(load_config(source), "quantization_config", None))
    return "" if stored is None else f"{source.name} is stored in {stored} and has no 16-bit weights"


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
    start = time.perf_counter()
    plan = plan_export(model, dtype)
    num_parameters = sum(torch.Size(spec.shape).numel() for spec in plan.specs.values())
    if requantize:
        packed = {path: layer for path, layer in frozen_layers(model).items() if layer.kind in FOUR_BIT_KINDS}
        classes = {path.removesuffix(".base"): layer.replaces for path, layer in packed.items()}
        if faults := load_faults(model, classes, "--requantize"):
            raise UserError(*faults)
        first = next(layer.packed_weight for layer in packed.values())
        assert first is not None
        plan = plan_export(model, dtype, partial(_requantized, dtype=dtype))
        plan.config.quantization_config = quantization_config(
            first.kind, double_quant=first.nested is not None, dtype=dtype, dense=dense_layers(model)
        )
    return write_checkpoint(plan, tokenizer, directory, **options) | {
        "dtype": str(dtype).removeprefix("torch."),
        "num_merged_layers": len(adapted_layers(model)),
        "num_parameters": num_parameters,
        "seconds": time.perf_counter() - start,
    }


def _requantized(layer: AdaptedLinear | FrozenLinear, *, dtype: torch.dtype) -> Mapping[str, Source]:
    """The merge of a layer in 4 bits; a layer without an adapter keeps the bytes that training used."""
    base = layer.base if isinstance(layer, AdaptedLinear) else layer
    form = base.packed_form
    if form is None:
        return dense_weight_sources(layer)

    def make() -> PackedWeight:
        if isinstance(layer, AdaptedLinear):
            return quantize(layer.merged_weight(), form.kind, form.block_size, form.nested is not None)
        weight = base.packed_weight
        assert weight is not None
        return weight

    return packed_sources(base, make, dtype)
