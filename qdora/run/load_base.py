"""Load the base of a run to where its recipe keeps it: on the device or in host memory."""

from __future__ import annotations

from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel

from qdora.files.console import Progress
from qdora.files.user_paths import cache_folder, user_path
from qdora.memory.offload import ActivationOffload
from qdora.memory.shard import ShardedBase
from qdora.memory.stream import HostResidency, keep_embedding_on_host
from qdora.model.build_model import Compute, recompute_activations
from qdora.model.load import Placer, load_model, quantization_of
from qdora.model.source import ModelSource
from qdora.model.store import BaseCache, PrunedBase
from qdora.recipe.settings import Recipe
from qdora.train.distributed import free_host_bytes


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
    Raises as `load_model`.
    """
    assert (recipe.base.prune is None) == (placer is None), "run/pruned_base.py loads a pruned base"
    base, cache = recipe.base, None
    if base.quant != "none" and base.cache is not None:
        root = cache_folder("bases") if base.cache == "auto" else user_path(base.cache)
        mapped = mesh is not None
        cache = BaseCache(root, quantization_of(base), compute.device, mapped=mapped, progress=progress)
    if mesh is not None:
        assert placer is None or isinstance(placer, PrunedBase), "a base is pruned whole"
        placer = ShardedBase(mesh, placer)
    elif base.residency == "host" and base.quant != "none":
        placer = HostResidency(base.streamed_blocks, free_bytes=free_host_bytes)
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
