"""Load the base of a run to where its recipe keeps it: on the device, in host memory or on disk."""

from __future__ import annotations

from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel

from qdora.errors import UserError
from qdora.files.console import Progress
from qdora.files.user_paths import cache_folder, user_path
from qdora.memory.activation_offload import ActivationOffload
from qdora.memory.disk_residency import DiskResidency
from qdora.memory.host_residency import HostResidency, keep_embedding_on_host
from qdora.memory.sharded_base import ShardedBase
from qdora.model.build_model import Compute, recompute_activations
from qdora.model.load import Placer, load_model, quantization_of
from qdora.model.packed_base import BaseCache, PrunedBase
from qdora.model.source import ModelSource
from qdora.recipe.settings import Recipe
from qdora.train.distributed import free_host_bytes

NO_GPU = "base.residency: got host, must be device or disk on a machine without a GPU."


def load_base(
    recipe: Recipe,
    source: ModelSource,
    compute: Compute,
    progress: Progress | None = None,
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


def _cache(recipe: Recipe, compute: Compute, progress: Progress | None, *, mapped: bool) -> BaseCache | None:
    """The reader of the packed base on disk; None if the recipe keeps none there."""
    base = recipe.base
    on_disk = base.residency == "disk"
    if base.quant == "none" or (base.cache is None and not on_disk):
        return None
    root = cache_folder("bases") if base.cache in (None, "auto") else user_path(base.cache)
    return BaseCache(root, quantization_of(base), compute.device, mapped=mapped or on_disk, progress=progress)
