"""Where the blocks of a finished run's base are when it is loaded again: as in training, as far as this machine can.

The pruned base of a run: compressed once, kept in the run directory, read from there ever after.
"""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from qdora.data.encode import encode_batch, special_prefix
from qdora.data.mix import Mix
from qdora.data.tokenize import TokenizedSet
from qdora.errors import UserError
from qdora.evaluation.perplexity import read_texts
from qdora.files.atomic import atomic_directory
from qdora.files.console import bar
from qdora.files.run_directory import RunDirectory
from qdora.memory.activation_offload import ActivationOffload
from qdora.memory.disk_residency import DiskResidency
from qdora.memory.host_residency import HostResidency, keep_embedding_on_host
from qdora.model.base_cache import BaseCache, default_cache, fingerprints
from qdora.model.build_model import Compute, recompute_activations
from qdora.model.load import Placer, Quantization, load_model
from qdora.model.packed_base import PrunedBase, save_pruned_base
from qdora.model.pruning import Pruner
from qdora.model.source import ModelSource
from qdora.recipe.settings import CalibrationConfig, Recipe
from qdora.train.distributed import Processes, free_host_bytes

logger = logging.getLogger("qdora")

FILE = "residency.json"
"""In a run directory: what memory.budget auto chose in place of the recipe's own setting."""


class _Chosen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    residency: Literal["device", "host", "disk"]
    streamed_blocks: PositiveInt | None
    host_embeddings: bool = False


def keep_residency(run: RunDirectory, given: Recipe, applied: Recipe) -> None:
    """Write down what a start was changed to, or that it was not.

    Args:
        run: Of the run.
        given: Its recipe as the run directory has it.
        applied: As it is run.
    Raises:
        RunFailure: The disk is full or cannot be written.
    """
    file = run.inside(FILE)
    if _chosen(applied) != _chosen(given):
        run.write_json(FILE, _chosen(applied).model_dump())
    elif file.exists():  # of an earlier start
        file.unlink()


def residency_here(run: RunDirectory, recipe: Recipe, device: torch.device, *, differentiated: bool = False) -> Recipe:
    """The recipe with which a run's base can be loaded on a machine that may be of another kind than the run's.

    Args:
        run: The run.
        recipe: Of the run.
        device: Where it is loaded.
        differentiated: Whether gradients will be taken without checkpointing, of which host can take none.
    Returns:
        The recipe with base.residency, base.streamed_blocks and memory.host_embeddings as of the last start; host and
        disk trade places where the machine has or lacks a GPU, and host becomes device where it is to be
        differentiated. Logged.
    Raises:
        UserError: residency.json is damaged.
    """
    chosen = _read(run.inside(FILE)) or _chosen(recipe)
    residency: str = chosen.residency
    if residency != "device":
        residency = "host" if device.type == "cuda" else "disk"
    if residency == "host" and differentiated:
        residency = "device"
    if residency != chosen.residency:
        why = "the whole base is needed at once" if residency == "device" else f"computing on {device.type}"
        logger.info("base.residency: %s in place of %s, %s.", residency, chosen.residency, why)
    blocks = None if residency == "device" else chosen.streamed_blocks
    base = recipe.base.model_copy(update={"residency": residency, "streamed_blocks": blocks})
    memory = recipe.memory.model_copy(update={"host_embeddings": chosen.host_embeddings})
    return recipe.model_copy(update={"base": base, "memory": memory})


def _chosen(recipe: Recipe) -> _Chosen:
    return _Chosen(
        residency=recipe.base.residency,
        streamed_blocks=recipe.base.streamed_blocks,
        host_embeddings=recipe.memory.host_embeddings,
    )


def _read(file: Path) -> _Chosen | None:
    try:
        return _Chosen.model_validate_json(file.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the document"
        raise UserError(f"{file}: is damaged: {where}: {first['msg']}.") from error


NO_GPU = "base.residency: host is for a GPU, and this machine has none that can be used, allowed: device, disk."


def load_base(
    recipe: Recipe,
    source: ModelSource,
    compute: Compute,
    progress: Callable[[int, int], None] | None = None,
    *,
    placer: Placer | None = None,
) -> PreTrainedModel:
    """The frozen base of the recipe; for full fine-tuning every parameter is trainable.

    `placer` is what prunes it (`verbs.pruned_base`), given exactly where the recipe has base.prune. Raises as
    `load_model`.
    """
    assert (recipe.base.prune is None) == (placer is None), "a pruned base is loaded by verbs.pruned_base"
    base, cache = recipe.base, base_cache(recipe, compute, progress)
    if base.residency != "device" and base.quant != "none":
        placer = _away(recipe, compute, cache)
    on_host = recipe.memory.host_embeddings and compute.device.type == "cuda"
    model = load_model(
        source,
        quant=base.quant,
        block_size=base.block_size,
        double_quant=base.double_quant,
        skip=base.skip,
        device=compute.device,
        compute_dtype=compute.dtype,
        attention=recipe.model.attention,
        progress=progress,
        reader=cache,
        placer=placer,
        before_reading=keep_embedding_on_host if on_host else None,
    )
    if recipe.adapter.kind == "full":
        for parameter in model.parameters():
            parameter.requires_grad_(True)
    if recipe.memory.checkpointing:
        recompute_activations(model)
        if recipe.memory.offload_activations and compute.device.type == "cuda":
            ActivationOffload(model)
    return model


def _away(recipe: Recipe, compute: Compute, cache: BaseCache | None) -> Placer:
    """What keeps the blocks of the base where the recipe says. Raises UserError where this machine cannot."""
    base, here = recipe.base, compute.device.type
    if base.residency == "host":
        if here != "cuda":
            raise UserError(NO_GPU)
        return HostResidency(base.streamed_blocks, free_bytes=free_host_bytes)
    assert cache is not None
    return DiskResidency(cache, base.streamed_blocks)


def base_cache(
    recipe: Recipe, compute: Compute, progress: Callable[[int, int], None] | None = None
) -> BaseCache | None:
    """What reads the packed base from where the recipe keeps it; None where it keeps none."""
    base = recipe.base
    on_disk = base.residency == "disk"
    if base.quant == "none" or (base.cache is None and not on_disk):
        return None
    root = default_cache() if base.cache in (None, "auto") else Path(base.cache).expanduser()
    wanted = Quantization(base.quant, base.block_size, base.double_quant, base.skip)
    return BaseCache(root, wanted, compute.device, mapped=on_disk, progress=progress)


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
        As `load_model` and `Pruner`.
    """
    prune = recipe.base.prune
    assert prune is not None
    pruner = Pruner(prune, calibration)
    model = load_base(recipe, source, compute, progress, placer=pruner)
    settings = {"prune": prune.model_dump(mode="json", exclude=set(prune.unused())), "quant": recipe.base.quant}
    record = save_pruned_base(model, pruner.layers, directory, settings)
    logger.info(
        "Pruned %d layers by %s: %.2f %% of their %s weights are zero.",
        len(pruner.layers),
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
    """The base as `compress_base` wrote it. Raises as `load_model` and `PrunedBase`."""
    return load_base(recipe, source, compute, progress, placer=PrunedBase(directory))


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
