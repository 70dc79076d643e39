"""The base of a run: loaded to where its recipe keeps it; pruned or quantised by GPTQ once, into the run directory.

recipe.yaml has the commits of a base and of another tokenizer; environment.json has samples of its files, and the
residency, which `memory.budget: auto` may have chosen.
"""

from __future__ import annotations

import gc
import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from qdora.data.mix import Mix
from qdora.data.tokenize import TokenizedSet, encode_batch, special_prefix
from qdora.errors import UserError, first_few
from qdora.evaluate.perplexity import read_texts
from qdora.files.console import Progress
from qdora.files.machine import cache_folder, user_path
from qdora.files.run_directory import RunDirectory
from qdora.memory.shard import ShardedBase
from qdora.memory.stream import HostResidency, offload_activations
from qdora.model.attention import context_length
from qdora.model.build_model import Compute, recompute_activations
from qdora.model.checkpoint import Stored
from qdora.model.inject import keep_zeros_
from qdora.model.load import Placer, load_model, quantization_of
from qdora.model.source import ModelSource
from qdora.model.store import BaseCache, BaseWriter, compressed_key, fingerprints
from qdora.prune.compressor import Compressor
from qdora.recipe.recipe_file import settings
from qdora.recipe.section import with_settings
from qdora.recipe.settings import CalibrationConfig, Recipe
from qdora.train.distributed import free_host_bytes

FOLDER = "base"
"""Folder of a run directory that holds its compressed base."""
REVISIONS = {"source": "revision", "tokenizer": "tokenizer_revision"}
"""Setting of the model section that may name a place on the Hub -> its revision there."""

logger = logging.getLogger("qdora")


def load_base(
    recipe: Recipe,
    source: ModelSource,
    compute: Compute,
    progress: Progress | None = None,
    *,
    compressor: Compressor | None = None,
    compressed: Mapping[str, Stored] | None = None,
    mesh: DeviceMesh | None = None,
) -> PreTrainedModel:
    """The frozen base of the recipe; for full fine-tuning every parameter is trainable.

    With base.prune and by GPTQ `compressor` makes a compressed base, or `compressed` are its layers. `mesh` are the
    processes that divide it.
    """
    base, cache = recipe.base, None
    placer: Placer | None = compressor
    if base.quant != "none" and not base.is_made_once and (root := cache_root(recipe)) is not None:
        cache = BaseCache(root, quantization_of(base), compute.device, progress)
    if mesh is not None and placer is None:
        placer = ShardedBase(mesh)
    elif base.residency == "host" and base.quant != "none" and placer is None:
        placer = HostResidency(base.streamed_blocks, free_bytes=free_host_bytes)
    kept = dict[str, Callable[[], Tensor]]()  # name of a pruned weight that is trained -> reads its mask
    if recipe.adapter.kind == "full" and compressed:
        kept = {name: each.keep_bits for name, each in compressed.items() if each.keep_bits is not None}
        compressed = {name: replace(each, keep_bits=None) for name, each in compressed.items()}
    model = load_model(
        source,
        quant=quantization_of(base).kind,
        block_size=base.block_size,
        double_quant=base.double_quant,
        skip=base.skip,
        device=compute.device,
        compute_dtype=compute.dtype,
        attention=recipe.model.attention,
        progress=progress,
        reader=cache,
        compressed=compressed,
        placer=placer,
    )
    if recipe.adapter.kind == "full":
        model.requires_grad_(True)
        for name, bits in kept.items():
            keep_zeros_(model.get_parameter(name), bits().to(compute.device, copy=True))
    if recipe.memory.checkpointing:
        recompute_activations(model)
        if recipe.memory.offload_activations and compute.device.type == "cuda":
            offload_activations(model)
    return model


def cache_root(recipe: Recipe) -> Path | None:
    """The directory of base.cache."""
    name = recipe.base.cache
    return None if name is None else cache_folder("bases") if name == "auto" else user_path(name)


def compress_base(
    recipe: Recipe,
    source: ModelSource,
    compute: Compute,
    calibration: Tensor | None,
    directory: Path,
    *,
    key: str,
    progress: Progress | None = None,
) -> None:
    """Prune and quantise the base of a recipe and write it to `directory`, unless it is there, whole or in part."""
    if compressed_key(directory) == key:
        return
    base, writer = recipe.base, BaseWriter(directory, key)
    load_base(recipe, source, compute, progress, compressor=Compressor(base, writer, calibration))
    gc.collect()
    made = settings(recipe)["base"] | {"clip": base.clips}
    names = ("prune", "quant", "method", "clip", "calibration")
    record = writer.finish({name: made[name] for name in names if name in made})
    text = "Compressed %d layers to %s; %.2f %% of their %s weights are zero."
    logger.info(
        text, len(writer.layers), base.quant_in_words, 100 * record["sparsity"], f"{record['num_weights']:,}"
    )


def compression_key(recipe: Recipe, source: ModelSource, compute: Compute, calibration: Tensor | None) -> str:
    """A hash of all that decides a compressed base, 16 hex digits: files, base.*, dtype, calibration tokens."""
    base = recipe.base.model_dump(mode="json", exclude={"cache", "residency", "streamed_blocks"})
    facts = {"files": fingerprints(source), "base": base, "dtype": str(compute.dtype)}
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    if calibration is not None:
        digest.update(repr(tuple(calibration.shape)).encode() + calibration.numpy().tobytes())
    return digest.hexdigest()[:16]


def calibration_tokens(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, mix: Mix | None, config: PreTrainedConfig
) -> Tensor | None:
    """Pieces of the calibration text, (sequences, length) int64; None if no inputs are measured."""
    if recipe.base.measured is None:
        return None
    (where, asked), context = recipe.base.measured, context_length(config)
    if context is not None and asked.length > context:
        raise UserError(f"{where}.length: must be at most {context}, the context, got {asked.length}.")
    if asked.text == "mix":
        sets = mix.sets if mix is not None else ()
        drawn = (part for part, source in zip(sets, recipe.data.mix, strict=False) if source.weight != 0)
        examples = [example for part in drawn if isinstance(part, TokenizedSet) for example in part.examples]
        order = np.random.default_rng(asked.seed).permutation(len(examples))
        ids = np.concatenate([np.empty(0, dtype=np.int32), *(examples[index].input_ids for index in order)])
    else:
        (ids,) = map(np.asarray, encode_batch(tokenizer, read_texts([asked.text])))
    return pieces(ids, special_prefix(tokenizer), asked, where)


def pieces(
    ids: ArrayLike, prefix: Sequence[int], asked: CalibrationConfig, where: str = "calibration"
) -> Tensor:
    """Runs of tokens from random places of a text, each after the prefix with which the model's texts begin."""
    ids = np.asarray(ids)
    length = asked.length - len(prefix)
    if length < 1 or len(ids) < length:
        raise UserError(f"{where}.length: got {asked.length}, but the text has only {len(ids)} tokens.")
    starts = np.random.default_rng(asked.seed).integers(0, len(ids) - length + 1, asked.sequences)
    return torch.tensor(
        [[*prefix, *ids[start : start + length].tolist()] for start in starts], dtype=torch.int64
    )


def with_revisions_of(recipe: Recipe, other: Recipe) -> Recipe:
    """The recipe; where it has no revision of a base or tokenizer that `other` has, too, it takes that of `other`."""
    revisions = {
        revision: getattr(other.model, revision)
        for name, revision in REVISIONS.items()
        if getattr(recipe.model, revision) is None and getattr(recipe.model, name) == getattr(other.model, name)
    }
    return with_settings(recipe, model=revisions)


def base_record(source: ModelSource) -> dict[str, Any]:
    """Name -> size and samples of each file of a base, for environment.json; their times and place may change."""
    return {each["name"]: {"bytes": each["size"], "samples": each["samples"]} for each in fingerprints(source)}


def check_base(run: RunDirectory, source: ModelSource) -> None:
    """Refuse another base than that of the run. UserError with the files that differ."""
    before = run.read_json("environment.json").get("base", {}).values()
    different = [name for name, facts in base_record(source).items() if facts not in before]
    if before and different:
        what = f"{source.name} is not the base that was trained on: {first_few(different)} differs"
        raise UserError(f"{run.path}: {what}.")


def residency_of(recipe: Recipe) -> dict[str, Any]:
    return {"residency": recipe.base.residency, "streamed_blocks": recipe.base.streamed_blocks}


def residency_here(
    run: RunDirectory, recipe: Recipe, device: torch.device, *, differentiated: bool = False
) -> Recipe:
    """The recipe with a residency that this machine can load: that of the run's last start, but host only with a GPU
    and not if it is `differentiated` without checkpointing."""
    chosen = run.read_json("environment.json").get("residency") or residency_of(recipe)
    if chosen["residency"] == "host" and (device.type != "cuda" or differentiated):
        logger.info("base.residency: using device instead of host.")
        chosen = {"residency": "device", "streamed_blocks": None}
    return with_settings(recipe, base=chosen)
