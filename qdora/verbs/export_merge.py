"""Base and adapter of a run as one dense checkpoint, streamed where no model has to be in memory for it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from qdora.config import Recipe
from qdora.errors import UserError
from qdora.model.export import ExportResult, export_merged
from qdora.model.export_streamed import StreamedMerge, check_merge, export_streamed
from qdora.model.load import Quantization
from qdora.recipe_file import load_recipe
from qdora.record import RunDirectory, open_run
from qdora.verbs.assemble import choose_compute, find_model
from qdora.verbs.card import card_files
from qdora.verbs.export_options import ExportOptions
from qdora.verbs.show import bar
from qdora.verbs.trained import TrainedRun, load_run, trained_state


@dataclass(frozen=True)
class WrittenMerge:
    """A merge on disk, and how to get the model that it is compared with."""

    result: ExportResult
    run: Path
    step: int | None
    original: bool
    loaded: TrainedRun | None

    def load(self) -> TrainedRun:
        """The running model with its adapter, on the base that was merged on; merging did not need it."""
        return self.loaded or load_run(self.run, step=self.step, original=self.original)


def write_merge(
    run: Path, out: Path, options: ExportOptions, dtype: torch.dtype, console: Console, *, with_card: bool
) -> WrittenMerge:
    """Write the merge that is asked for.

    Args:
        run: Run directory.
        out: New or empty directory.
        options: Of the merge: base, requantize, shard_size, step.
        dtype: Of its weights.
        console: For progress.
        with_card: Write the model card and the licence texts beside the weights.
    Raises:
        UserError, RunFailure: As of `export_streamed` and `export_merged`.
    """
    opened = open_run(run)
    recipe = load_recipe(opened.recipe_file)
    where, state = trained_state(opened, recipe, options.step)
    extra = card_files(opened, recipe, state, form=options.form) if with_card else {}
    if recipe.adapter.kind == "full" or recipe.base.prune is not None:
        if options.base is not None or options.requantize:
            why = "adapter.kind full has no adapter to merge" if recipe.base.prune is None else "the base is pruned"
            raise UserError(f"--base, --requantize: {why}; leave them out.")
        trained = load_run(run, step=options.step)
        with bar(console, "writing") as progress:
            result = export_merged(
                trained.model,
                trained.tokenizer,
                out,
                dtype=dtype,
                max_shard_bytes=options.shard_bytes,
                progress=progress,
                extra_files=extra,
            )
        return WrittenMerge(result, run, options.step, False, trained)
    merge, tokenizer = merge_of(opened, recipe, where, options)
    check_merge(merge)
    with bar(console, "merging") as progress:
        result = export_streamed(
            merge,
            tokenizer,
            out,
            dtype=dtype,
            max_shard_bytes=options.shard_bytes,
            progress=progress,
            extra_files=extra,
        )
    return WrittenMerge(result, run, options.step, options.base == "original", None)


def merge_of(
    run: RunDirectory, recipe: Recipe, trained: Path, options: ExportOptions
) -> tuple[StreamedMerge, PreTrainedTokenizerBase]:
    """The merge of a run's adapter (`trained`: from `trained_state`) that is asked for, and the run's tokenizer."""
    source, tokenizer = find_model(recipe)
    adapter = None
    if recipe.adapter.kind != "none":
        adapter = trained if trained == run.adapter else trained / "adapter"
    held = recipe.base
    merge = StreamedMerge(
        source,
        adapter,
        Quantization(held.quant, held.block_size, held.double_quant, tuple(held.skip)),
        choose_compute(recipe.model.dtype).dtype,
        base="original" if options.base == "original" else "dequantized",
        requantize=options.requantize,
    )
    return merge, tokenizer
