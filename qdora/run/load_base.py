"""Loading the base of a run where its recipe keeps it: on the device, in host memory or on disk."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError
from transformers import PreTrainedModel

from qdora.errors import UserError
from qdora.files.run_directory import RunDirectory
from qdora.memory.activation_offload import ActivationOffload
from qdora.memory.disk_residency import DiskResidency
from qdora.memory.host_residency import HostResidency, keep_embedding_on_host
from qdora.model.build_model import Compute, recompute_activations
from qdora.model.load import Placer, Quantization, load_model
from qdora.model.packed_base import BaseCache, default_cache
from qdora.model.source import ModelSource
from qdora.recipe.settings import Recipe
from qdora.train.distributed import free_host_bytes

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
