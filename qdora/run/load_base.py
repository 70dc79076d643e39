"""Load the base of a run to where its recipe keeps it: on the device, in host memory or on disk."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, PositiveInt
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel

from qdora.errors import UserError
from qdora.files.run_directory import RunDirectory
from qdora.files.user_paths import cache_folder, user_path
from qdora.memory.activation_offload import ActivationOffload
from qdora.memory.disk_residency import DiskResidency
from qdora.memory.host_residency import HostResidency, keep_embedding_on_host
from qdora.memory.sharded_base import ShardedBase
from qdora.model.build_model import Compute, recompute_activations
from qdora.model.load import Placer, Quantization, load_model
from qdora.model.packed_base import BaseCache, PrunedBase, read_record
from qdora.model.source import ModelSource
from qdora.recipe.settings import Recipe
from qdora.train.distributed import free_host_bytes

logger = logging.getLogger("qdora")

NO_GPU = "base.residency: got host, must be device or disk on a machine without a GPU."


def load_base(
    recipe: Recipe,
    source: ModelSource,
    compute: Compute,
    progress: Callable[[int, int], None] | None = None,
    *,
    placer: Placer | None = None,
    mesh: DeviceMesh | None = None,
) -> PreTrainedModel:
    """The frozen base of the recipe; for full fine-tuning every parameter is trainable.

    Args:
        recipe, source, compute: What to load, from where, and where to.
        progress: Called with (tensors done, tensors in all).
        placer: Prunes the base or reads a pruned one (run/pruned_base.py). Required exactly with base.prune.
        mesh: The processes that divide the base, as in `ShardedBase`; None: all of it is in this process.
    Raises:
        UserError: This machine lacks the GPU, or what `load_model` refuses.
    """
    assert (recipe.base.prune is None) == (placer is None), "run/pruned_base.py loads a pruned base"
    base, cache = recipe.base, _cache(recipe, compute, progress, mapped=mesh is not None)
    if mesh is not None:
        assert placer is None or isinstance(placer, PrunedBase), "a base is pruned whole"
        placer = ShardedBase(mesh, placer, cache)
    elif base.residency == "host" and base.quant != "none":
        if compute.device.type != "cuda":
            raise UserError(NO_GPU)
        placer = HostResidency(base.streamed_blocks, free_bytes=free_host_bytes)
    elif base.residency == "disk" and base.quant != "none":
        assert cache is not None
        placer = DiskResidency(cache, base.streamed_blocks)
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


def _cache(
    recipe: Recipe, compute: Compute, progress: Callable[[int, int], None] | None, *, mapped: bool
) -> BaseCache | None:
    """The reader of the packed base on disk; None if the recipe keeps none there."""
    base = recipe.base
    on_disk = base.residency == "disk"
    if base.quant == "none" or (base.cache is None and not on_disk):
        return None
    root = cache_folder("bases") if base.cache in (None, "auto") else user_path(base.cache)
    wanted = Quantization(base.quant, base.block_size, base.double_quant, base.skip)
    return BaseCache(root, wanted, compute.device, mapped=mapped or on_disk, progress=progress)


FILE = "residency.json"
"""In a run directory: the residency that `memory.budget: auto` chose instead of the recipe's own."""


class _Chosen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    residency: Literal["device", "host", "disk"]
    streamed_blocks: PositiveInt | None
    host_embeddings: bool = False


def keep_residency(run: RunDirectory, given: Recipe, applied: Recipe) -> None:
    """Write residency.json if the recipe that runs has another residency than the one given; else remove it.

    The choice to divide the base says nothing about a process that later loads all of it: it takes the one given.
    """
    file = run.inside(FILE)
    now_divided = applied.train.divides_base and not given.train.divides_base
    if _chosen(applied) != _chosen(given) and not now_divided:
        run.write_json(FILE, _chosen(applied).model_dump())
    elif file.exists():  # from an earlier start
        file.unlink()


def residency_here(run: RunDirectory, recipe: Recipe, device: torch.device, *, differentiated: bool = False) -> Recipe:
    """The recipe with a residency that this machine can load, which may have a GPU where the run had none.

    It starts from the residency of the run's last start. host becomes disk without a GPU, and disk becomes host with
    one. A change is logged.

    Args:
        run: The run.
        recipe: Its recipe.
        device: Where the base is loaded.
        differentiated: Whether gradients are taken without checkpointing; then host, which cannot do it, is device.
    Raises:
        UserError: residency.json is damaged.
    """
    file = run.inside(FILE)
    chosen = read_record(file, _Chosen) if file.exists() else _chosen(recipe)
    residency: str = chosen.residency
    if residency != "device":
        residency = "host" if device.type == "cuda" else "disk"
    if residency == "host" and differentiated:
        residency = "device"
    if residency != chosen.residency:
        why = "the whole base is needed at once" if residency == "device" else f"the run computes on {device.type}"
        logger.info("base.residency: using %s instead of %s, because %s.", residency, chosen.residency, why)
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
