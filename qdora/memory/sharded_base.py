"""A frozen base that is divided among processes by torch's `fully_shard` (FSDP2), block by block.

Each process holds its rows of every packed weight, mask and embedding. The whole tensors of a block exist only while
the block computes: they are gathered before it, the next block's while it runs, and dropped behind it. Small tensors
(norms, biases, the scales of scales) and whatever is trained are whole in every process.

The layers read their tensors through views of the memory that torch fills and frees; its address does not change.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from qdora.errors import RunFailure, UserError
from qdora.model.inject import frozen_layers, is_linear
from qdora.model.load import Loading, block_list, is_wide, iterate_quantized, place_dense, place_frozen, wide_names
from qdora.model.packed_base import PrunedBase
from qdora.model.stored_tensors import tied_weights
from qdora.nn.frozen_linear import FrozenLinear
from qdora.nn.row_share import RowShare, span
from qdora.ops.packed import PackedWeight
from qdora.ops.tiles import Weight

_SUFFIX = "_share"
"""Ends the name of a layer's parameter that torch gathers; a buffer without it is a view of that."""
_Placed = tuple[nn.Module, str, Tensor]
"""A module, the name of its sharded parameter, and this process's part of it."""


class ShardedBase:
    """A `Placer` that keeps in each process its rows of the weights.

    Args:
        mesh: The processes: one dimension, or two, of which the last one divides the weights and the first repeats it.
        pruned: The layers of a pruned base, read instead of the model's own; None for a base that is not pruned.
    """

    def __init__(self, mesh: DeviceMesh, pruned: PrunedBase | None = None) -> None:
        self.mesh, self.pruned = mesh, pruned
        self.group = mesh.get_group(mesh.ndim - 1)

    @torch.no_grad()
    def __call__(self, load: Loading) -> None:
        """Read the weights one after the other, keep this process's rows, and shard the model.

        Raises UserError: A model without a list of blocks; as `PrunedBase`.
        """
        model, device = load.model, load.device
        if block_list(model) is None:
            what = f"must be replicate, since {model.config.model_type} has no list of blocks to divide"
            raise UserError(f"train.parallel: {what}.")
        tied = _tie(model)
        wide = wide_names(model, load.compute_dtype)
        placed: list[_Placed] = []
        for done, (name, value, keep_bits) in enumerate(self._weights(load), start=1):
            path, _, leaf = name.rpartition(".")
            module = model.get_submodule(path)
            dtype = torch.float32 if is_wide(name, wide) else load.compute_dtype
            if leaf == "weight" and name not in tied and (isinstance(value, PackedWeight) or is_linear(module)):
                moved = value.to(device) if isinstance(value, PackedWeight) else value.to(device, dtype)
                placed += self._place_layer(model, path, moved, keep_bits)
            elif isinstance(module, nn.Embedding) or name in tied:
                assert isinstance(value, Tensor)
                placed.append(self._divide(module, leaf, value.to(device, dtype)))
            else:
                assert isinstance(value, Tensor)
                place_dense(module, leaf, value, device, dtype)
            del value, keep_bits
            if load.progress is not None:
                load.progress(done, len(load.stored))
        self._shard(model, placed)

    def _weights(self, load: Loading) -> Iterator[tuple[str, Weight, Tensor | None]]:
        """(model name, weight, mask) of everything that is stored."""
        pruned = self.pruned
        stored = load.stored if pruned is None else pruned.others(load)
        for name, value in iterate_quantized(stored, load.layers, load.wanted, load.device):
            yield name, value, None
        if pruned is not None:
            for path in pruned.layers:
                yield f"{path}.weight", *pruned.read(path)

    def _place_layer(self, model: nn.Module, path: str, weight: Weight, keep_bits: Tensor | None) -> list[_Placed]:
        """Put a layer without values into the model; what this process keeps of its tensors is returned."""
        tensors = _cut_tensors(weight)
        share = RowShare(_without_values(weight), keep_bits, self.group)
        if keep_bits is not None:
            tensors["keep_bits"] = keep_bits.to(weight.device)
        layer = place_frozen(model, path, *_empty(weight, keep_bits))
        layer.share = share
        return [self._divide(layer, f"{name}{_SUFFIX}", share.cut(tensor)) for name, tensor in tensors.items()]

    def _divide(self, module: nn.Module, name: str, tensor: Tensor) -> _Placed:
        """Give a module a parameter without values in the place of a tensor; its rows of this process are copied."""
        mine = tensor[span(len(tensor), self.group.rank(), self.group.size())].clone()
        meta = torch.empty_like(tensor, device="meta", memory_format=torch.contiguous_format)
        if name not in module._parameters:
            module.register_parameter(name, nn.Parameter(meta, requires_grad=False))
        else:  # the same object, which a tied module may hold as well
            parameter = module._parameters[name]
            assert parameter is not None
            parameter.requires_grad_(False)
            parameter.data = meta
        return module, name, mine

    def _shard(self, model: PreTrainedModel, placed: list[_Placed]) -> None:
        """Let torch gather and drop the placed tensors, unit by unit."""
        found = block_list(model)
        assert found is not None
        divided = {id(module._parameters[name]) for module, name, _ in placed}
        options: dict[str, Any] = {"mesh": self.mesh}
        options["ignored_params"] = {each for each in model.parameters() if id(each) not in divided}
        for unit in _ends(model, divided):
            # What needs the head's weight after its forward pass says when it no longer does (`release`).
            made: Any = fully_shard(unit, reshard_after_forward=not _holds_head(model, unit), **options)
            if isinstance(unit, nn.Embedding):  # which torch would prefetch behind the first block's backward pass
                made.set_unshard_in_backward(False)
        sharded = [fully_shard(block, **options) for block in found[1]]
        fully_shard(model, **options)
        for block, following in pairwise(sharded):
            block.set_modules_to_forward_prefetch([following])
        for module, name, mine in placed:
            _fill(module, name, mine, self.mesh)
        _Views(model)


def release(module: nn.Module) -> None:
    """Drop the gathered weight of an output head, which is held after its forward pass."""
    if isinstance(module, FSDPModule):
        module.reshard()


def _ends(model: PreTrainedModel, divided: set[int]) -> list[Any]:
    """The units outside of the blocks: each embedding, and the head, together if they share their weight.

    A unit is a module, or a list of modules. `divided` are the ids of the parameters that are sharded.
    """
    head = model.get_output_embeddings()
    shared = id(head._parameters.get("weight")) if head is not None else None
    tables = [each for each in model.modules() if isinstance(each, nn.Embedding) and id(each.weight) in divided]
    units: list[Any] = [[table, head] if id(table.weight) == shared else table for table in tables]
    if isinstance(head, FrozenLinear) and head.share is not None:
        units.append(head)
    return units


def _holds_head(model: PreTrainedModel, unit: Any) -> bool:
    head = model.get_output_embeddings()
    return unit is head or (isinstance(unit, list) and head in unit)


def _tie(model: PreTrainedModel) -> set[str]:
    """Let tied weights be one parameter, which the skeleton may hold twice. Returns the names of all of them."""
    pairs = tied_weights(model)
    for target, origin in pairs.items():
        first, _, leaf = target.rpartition(".")
        second, _, origin_leaf = origin.rpartition(".")
        setattr(model.get_submodule(first), leaf, getattr(model.get_submodule(second), origin_leaf))
    return {name for pair in pairs.items() for name in pair}


def _fill(module: nn.Module, name: str, mine: Tensor, mesh: DeviceMesh) -> None:
    """Give a sharded parameter its values, in the way that torch expects: a new parameter, read at the first pass."""
    empty: Any = module._parameters[name]
    options: dict[str, Any] = {"run_check": False, "shape": empty.shape, "stride": empty.stride()}
    filled = nn.Parameter(DTensor.from_local(mine, mesh, empty.placements, **options), requires_grad=False)
    module._parameters[name] = filled
    if isinstance(module, FrozenLinear) and module.share is not None:
        module.share.parts[name.removesuffix(_SUFFIX)] = filled


def _cut_tensors(weight: Weight) -> dict[str, Tensor]:
    """The tensors of a weight that are divided; those of double quantised scales are small."""
    if isinstance(weight, Tensor):
        return {"weight": weight}
    return {"packed": weight.packed, "absmax": weight.absmax}


def _without_values(weight: Weight) -> Weight:
    if isinstance(weight, Tensor):
        return weight.to("meta")
    return replace(weight, packed=weight.packed.to("meta"), absmax=weight.absmax.to("meta"))


def _empty(weight: Weight, keep_bits: Tensor | None) -> tuple[Weight, Tensor | None]:
    """A weight and mask of the same shapes without memory, but for the scales of scales."""
    bits = None if keep_bits is None else _no_memory(keep_bits)
    if isinstance(weight, Tensor):
        return _no_memory(weight), bits
    return replace(weight, packed=_no_memory(weight.packed), absmax=_no_memory(weight.absmax)), bits


def _no_memory(tensor: Tensor) -> Tensor:
    """A tensor of the same shape, dtype and device whose memory is given back."""
    empty = torch.empty_like(tensor)
    empty.untyped_storage().resize_(0)
    return empty


class _Views:
    """Lets the layers of a unit read the memory into which torch gathers it, from its first forward pass on.

    It is the `residency` of the layers: reading one whose unit is not gathered is an error.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        seen: set[FrozenLinear] = set()
        for module in [*model.modules()][::-1]:  # blocks before the model
            if not isinstance(module, FSDPModule):
                continue
            assert isinstance(module, nn.Module)
            layers = [each for each in frozen_layers(module).values() if each.share is not None and each not in seen]
            seen.update(layers)
            for layer in layers:
                layer.residency = self
            if layers:
                module.register_forward_pre_hook(partial(_view, layers))

    def use(self, layer: FrozenLinear) -> None:
        """Check that the layer's tensors are gathered."""
        packed = layer._buffers["weight" if layer.kind == "dense" else "packed"]
        assert packed is not None
        if packed.untyped_storage().nbytes() == 0:
            raise RunFailure(
                "train.parallel: shard: the weight of a block was read outside of its forward pass, where this process "
                "holds a part of it only. Fix: train with train.parallel: replicate, and report it."
            )


def _view(layers: list[FrozenLinear], _module: nn.Module, _args: Any) -> None:
    """Point the layers' buffers at the gathered parameters, once: torch keeps these for good."""
    # Outside of inference mode, whose tensors a training step could not use.
    with torch.inference_mode(False), torch.no_grad():
        for layer in layers:
            if layer.residency is None:  # it reads a weight of its own (train/shard_check.py)
                continue
            for name in ("packed", "absmax", "weight", "keep_bits"):
                whole, buffer = layer._parameters.get(f"{name}{_SUFFIX}"), layer._buffers.get(name)
                if whole is None or buffer is None or isinstance(whole, DTensor):
                    continue
                if buffer.untyped_storage()._cdata != whole.untyped_storage()._cdata:
                    layer._buffers[name] = whole.detach().view(buffer.shape)
