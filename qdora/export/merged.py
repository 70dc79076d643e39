"""Base and adapter as one dense checkpoint.

The merge is exact: the base is dequantised in float32, the adapter applied in float32, and the result cast once. The
tensors come from a model in memory or from the files of base and adapter (`streamed_merge`); the bytes are the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qdora.errors import UserError
from qdora.export.checkpoint_writer import MAX_SHARD_BYTES, Progress, WrittenWeights, checkpoint_directory
from qdora.export.options import ExportOptions
from qdora.export.streamed_merge import StreamedMerge, check_merge, open_merge
from qdora.export.tensor_plan import plan_export
from qdora.files.console import bar
from qdora.files.run_directory import RunDirectory, open_run
from qdora.model.build_model import choose_compute, find_model
from qdora.model.inject import adapted_layers
from qdora.model.load import Quantization
from qdora.recipe.recipe_file import load_recipe
from qdora.recipe.settings import Recipe
from qdora.run.load_run import TrainedRun, load_run, trained_state
from qdora.run.model_card import card_files


@dataclass(frozen=True, kw_only=True)
class ExportResult(WrittenWeights):
    """What was written, for export.json."""

    directory: str
    dtype: str
    num_merged_layers: int
    num_parameters: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


def export_merged(
    source: PreTrainedModel | StreamedMerge,
    tokenizer: PreTrainedTokenizerBase | None,
    out_dir: Path,
    *,
    dtype: torch.dtype = torch.float16,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress | None = None,
    extra_files: dict[str, str] | None = None,
) -> ExportResult:
    """Write the merged model as a plain transformers checkpoint.

    An interrupted streamed merge resumes after its last complete shard when it is called again.

    Args:
        source: A model with adapted layers or without (then its dequantised base is written; the model is not changed),
            or files to be merged.
        tokenizer, out_dir, max_shard_bytes, progress, extra_files: See `checkpoint_directory`.
        dtype: float16, bfloat16 or float32, for all float tensors.
    Raises:
        UserError, RunFailure: See `checkpoint_directory` and `open_merge`.
    """
    start = time.perf_counter()
    key = None
    if isinstance(source, StreamedMerge):
        opened = open_merge(source)
        plan, num_layers, num_parameters = opened.plan(dtype), len(opened.adapter), opened.num_parameters()
        key = source.resume_key(plan, dtype, max_shard_bytes)
    else:
        plan, num_layers = plan_export(source, dtype), len(adapted_layers(source))
        num_parameters = sum(torch.Size(item.spec.shape).numel() for item in plan.tensors)
    with checkpoint_directory(
        plan,
        tokenizer,
        out_dir,
        max_shard_bytes=max_shard_bytes,
        progress=progress,
        extra_files=extra_files,
        resume_key=key,
    ) as (_, written):
        pass  # nothing else belongs in the directory
    return ExportResult(
        directory=str(out_dir),
        dtype=str(dtype).removeprefix("torch."),
        num_merged_layers=num_layers,
        num_parameters=num_parameters,
        seconds=time.perf_counter() - start,
        **asdict(written),
    )


def write_merge(
    run: Path, out: Path, options: ExportOptions, dtype: torch.dtype, console: Console, *, with_card: bool
) -> tuple[ExportResult, Callable[[], TrainedRun]]:
    """Write the merged model of a run.

    A pruned base and a fully trained model are loaded; any other merge is streamed.

    Args:
        run: Run directory.
        out: New or empty directory.
        options: base, requantize, shard_size and step.
        dtype: Of the weights.
        console: For progress.
        with_card: Write the model card and the licence texts beside the weights.
    Returns:
        What was written, and a function that gives the running model with its adapter on the base of the merge.
    Raises:
        UserError, RunFailure: See `export_merged`.
    """
    opened = open_run(run)
    recipe = load_recipe(opened.recipe_file)
    where, state = trained_state(opened, recipe, options.step)
    load = cache(partial(load_run, run, step=options.step, original=options.base == "original"))
    source: PreTrainedModel | StreamedMerge
    if recipe.adapter.kind == "full" or recipe.base.prune is not None:
        if options.base is not None or options.requantize:
            why = "adapter.kind full has no adapter to merge" if recipe.base.prune is None else "the base is pruned"
            raise UserError(f"--base, --requantize: not possible, {why}. Fix: remove the options.")
        source, tokenizer = load().model, load().tokenizer
    else:
        source, tokenizer = merge_of(opened, recipe, where, options)
        check_merge(source)
    with bar(console, "merging") as progress:
        result = export_merged(
            source,
            tokenizer,
            out,
            dtype=dtype,
            max_shard_bytes=options.shard_bytes,
            progress=progress,
            extra_files=card_files(opened, recipe, state, form=options.form) if with_card else None,
        )
    return result, load


def merge_of(
    run: RunDirectory, recipe: Recipe, trained: Path, options: ExportOptions
) -> tuple[StreamedMerge, PreTrainedTokenizerBase]:
    """The streamed merge of a run's adapter, and the run's tokenizer; `trained` is from `trained_state`."""
    source, tokenizer = find_model(recipe)
    adapter = None
    if recipe.adapter.kind != "none":
        adapter = trained if trained == run.adapter else trained / "adapter"
    base = recipe.base
    merge = StreamedMerge(
        source,
        adapter,
        Quantization(base.quant, base.block_size, base.double_quant, tuple(base.skip)),
        choose_compute(recipe.model.dtype).dtype,
        base="original" if options.base == "original" else "dequantized",
        requantize=options.requantize,
    )
    return merge, tokenizer
