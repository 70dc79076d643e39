"""The pruned base of a run: compressed once, kept in the run directory, read from there ever after."""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from qdora.atomic_files import atomic_directory
from qdora.config import Recipe
from qdora.data.encode import encode_batch, special_prefix
from qdora.data.mix import Mix
from qdora.data.tokenize import TokenizedSet
from qdora.errors import UserError
from qdora.evaluation.perplexity import read_texts
from qdora.model.base_cache import fingerprints
from qdora.model.compress import Compression, PruneSettings
from qdora.model.compressed_file import StoredCompression, save_compressed
from qdora.model.source import ModelSource
from qdora.ops.sparsity import pattern_from
from qdora.prune_config import CalibrationConfig, PruneConfig
from qdora.record import RunDirectory
from qdora.train.distributed import Processes
from qdora.verbs.assemble import Compute, load_base
from qdora.verbs.show import bar

logger = logging.getLogger("qdora")

FOLDER = "base"
"""Folder of a run directory that holds its compressed base."""

SharedBases = Callable[[str, Callable[[Path], None]], Path]
"""Of several runs: (key, what fills an empty directory) -> that directory, made by the first run that asks."""


def compress_base(
    recipe: Recipe,
    source: ModelSource,
    compute: Compute,
    calibration: Tensor | None,
    directory: Path,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Prune and quantise the base of a recipe and write it to `directory`; returns what compressed.json says.

    Raises:
        As `load_model` and `Compression`.
    """
    prune = recipe.base.prune
    assert prune is not None
    compression = Compression(prune_settings(prune), calibration)
    model = load_base(recipe, source, compute, progress, placer=compression)
    settings = {"prune": prune.model_dump(mode="json", exclude=set(prune.unused())), "quant": recipe.base.quant}
    record = save_compressed(model, compression.layers, directory, settings)
    logger.info(
        "Pruned %d layers by %s: %.2f %% of their %s weights are zero.",
        len(compression.layers),
        prune.method,
        100 * record["sparsity"],
        f"{record['num_weights']:,}",
    )
    del model
    gc.collect()
    return record


def load_pruned_base(
    recipe: Recipe,
    source: ModelSource,
    compute: Compute,
    directory: Path,
    progress: Callable[[int, int], None] | None = None,
) -> PreTrainedModel:
    """The base as `compress_base` wrote it. Raises as `load_model` and `StoredCompression`."""
    return load_base(recipe, source, compute, progress, placer=StoredCompression(directory))


def base_of_run(
    recipe: Recipe,
    source: ModelSource,
    compute: Compute,
    run: RunDirectory,
    resume: bool,
    processes: Processes,
    console: Console,
    calibration: Tensor | None,
    shared: SharedBases | None = None,
) -> PreTrainedModel:
    """The frozen base; a pruned one is compressed by the first process, and read from its files by all.

    With `shared` it is compressed once for all runs with the same key; each run has the files in its own directory.
    """
    if recipe.base.prune is None:
        with bar(console, "loading the base") as progress:
            return load_base(recipe, source, compute, progress)
    directory = run.inside(FOLDER)

    def compress() -> None:
        if resume and directory.is_dir():
            return
        with bar(console, "pruning the base") as progress:
            if shared is None:
                compress_base(recipe, source, compute, calibration, directory, progress)
                return
            key = compression_key(recipe, source, compute, calibration)

            def make(path: Path) -> None:
                compress_base(recipe, source, compute, calibration, path / FOLDER, progress)

            made = shared(key, make) / FOLDER
        with atomic_directory(directory) as unfinished:
            shutil.copytree(made, unfinished, dirs_exist_ok=True, copy_function=_link_or_copy)

    processes.first(compress)
    with bar(console, "loading the pruned base") as progress:
        return load_pruned_base(recipe, source, compute, directory, progress)


def compression_key(recipe: Recipe, source: ModelSource, compute: Compute, calibration: Tensor | None) -> str:
    """What a compressed base follows from, as 16 hex digits: the model, base.*, the dtype, the calibration tokens."""
    facts = {
        "files": fingerprints(source),
        "base": recipe.base.model_dump(mode="json"),
        "dtype": str(compute.dtype),
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    if calibration is not None:
        digest.update(repr(tuple(calibration.shape)).encode() + calibration.numpy().tobytes())
    return digest.hexdigest()[:16]


def _link_or_copy(source: str, target: str) -> None:
    """The files are only ever replaced, never written to: a second name costs no room."""
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copy2(source, target)


def prune_settings(prune: PruneConfig) -> PruneSettings:
    """A recipe's section as the model package takes it."""
    return PruneSettings(
        method=prune.method,
        pattern=pattern_from(prune.pattern, prune.sparsity),
        group=None if prune.group == "auto" else prune.group,
        order=prune.order,
        damping=prune.damping,
    )


def calibration_tokens(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, mix: Mix, config: PreTrainedConfig
) -> Tensor | None:
    """Pieces of the calibration text, (sequences, length) int64; None where nothing is measured.

    Args:
        recipe: With base.prune.
        tokenizer: Of the model.
        mix: The tokenised training data.
        config: Of the model.
    Raises:
        UserError: Text that is shorter than a piece, or pieces longer than the context.
    """
    prune = recipe.base.prune
    assert prune is not None
    if prune.method == "magnitude":
        return None
    settings = prune.calibration
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    if context is not None and settings.length > context:
        raise UserError(
            f"base.prune.calibration.length: {settings.length} tokens, allowed: at most {context}, the model's context."
        )
    if settings.text == "mix":
        ids = _mix_tokens([part for part in mix.sets if isinstance(part, TokenizedSet)], settings.seed)
    else:
        (ids,) = encode_batch(tokenizer, read_texts([settings.text]))
    return pieces(ids, special_prefix(tokenizer), settings)


def _mix_tokens(sets: Sequence[TokenizedSet], seed: int) -> list[int]:
    """The training examples of all sources in a random order, so that a piece spans several of them."""
    examples = [example for part in sets for example in part.examples]
    order = np.random.default_rng(seed).permutation(len(examples))
    return [int(token) for index in order for token in examples[index].input_ids]


def pieces(ids: Sequence[int], prefix: Sequence[int], settings: CalibrationConfig) -> Tensor:
    """Runs of a text from random places, each behind the tokens with which the model's texts begin.

    Raises:
        UserError: The text is shorter than a piece.
    """
    length = settings.length - len(prefix)
    if length < 1 or len(ids) < length:
        raise UserError(
            f"base.prune.calibration.length: {settings.length} tokens, but the text has {len(ids)}; "
            "allowed: shorter pieces, or more text."
        )
    starts = np.random.default_rng(settings.seed).integers(0, len(ids) - length + 1, settings.sequences)
    return torch.tensor([[*prefix, *ids[start : start + length]] for start in starts], dtype=torch.int64)
