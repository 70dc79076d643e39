"""A frozen base that is divided among processes by torch's `fully_shard` (FSDP2), block by block.

Each process holds its rows of every packed weight, mask and embedding. Those of a block are gathered before it computes
and dropped behind it; layers read views of the memory that torch fills and frees, whose address does not change. Small
tensors (norms, biases, the scales of scales) and whatever is trained are whole in every process.
"""

from __future__ import annotations

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

from qdora.adapter.layer import FrozenLinear
from qdora.adapter.rows import RowShare, divided_tensors, span
from qdora.errors import RunFailure
from qdora.memory.oom import return_freed_memory
from qdora.model.checkpoint import Stored, StoredPacked, StoredTensor
from qdora.model.inject import frozen_layers, is_linear
from qdora.model.load import Loading, blocks_of, place, place_all, place_frozen, tie_
from qdora.quant.tiles import Weight

_SUFFIX = "_share"  # of a layer's parameter that torch gathers; a buffer without it is a view of that
_Placed = tuple[nn.Module, str, Tensor]  # module, name of its sharded parameter, this process's part


class ShardedBase:
    """A `Placer` that keeps in each process its rows of the weights; the last dimension of `mesh` divides them."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self.mesh = mesh
        self.group = mesh.get_group(mesh.ndim - 1)

    @torch.no_grad()
    def __call__(self, load: Loading) -> None:
        model = load.model
        _, blocks = blocks_of(model, "train.parallel: must be replicate")
        tied, placed = tie_(model), list[_Placed]()

        def place_rows(load: Loading, name: str, item: Stored) -> None:
            path, _, leaf = name.rpartition(".")
            module, dtype = model.get_submodule(path), load.dtype_of(name)
            if leaf == "weight" and name not in tied and (isinstance(item, StoredPacked) or is_linear(module)):
                weight = load.read(name, item)
                weight = weight.to(dtype) if isinstance(weight, Tensor) else weight.to(load.device)
                bits = None if item.keep_bits is None else item.keep_bits()
                placed.extend(self._place_layer(load, path, weight, bits))
            elif isinstance(module, nn.Embedding) or name in tied:
                assert isinstance(item, StoredTensor)
                parameter = module._parameters[leaf]
                assert parameter is not None  # the same object as that of a tied head
                parameter.requires_grad_(False)
                parameter.data = torch.empty(item.shape, dtype=dtype, device="meta")
                rows = span(item.shape[0], self.group.rank(), self.group.size())
                placed.append((module, leaf, item.read()[rows].to(load.device, dtype, copy=True)))
            else:
                place(load, name, item)

        place_all(load, place_rows)
        self._shard(model, blocks, placed)
        return_freed_memory()  # the processes of a machine share its memory

    def _place_layer(self, load: Loading, path: str, weight: Weight, keep_bits: Tensor | None) -> list[_Placed]:
        """Put a layer without values into the model."""

        def made(parts: dict[str, Tensor]) -> tuple[Weight, Tensor | None]:
            own: dict[str, Any] = {name: part for name, part in parts.items() if name != "keep_bits"}
            whole = own["weight"] if isinstance(weight, Tensor) else replace(weight, **own)
            return whole, parts.get("keep_bits")

        tensors, empty = divided_tensors(weight, keep_bits), dict[str, Tensor]()
        share = RowShare(*made({name: tensor.to("meta") for name, tensor in tensors.items()}), self.group)
        for name, tensor in tensors.items():
            empty[name] = torch.empty(tensor.shape, dtype=tensor.dtype, device=load.device)
            empty[name].untyped_storage().resize_(0)
        layer = place_frozen(load.model, path, *made(empty))
        layer.share = share
        for name, tensor in tensors.items():
            parameter = nn.Parameter(share.cut(tensor.to("meta")), requires_grad=False)
            layer.register_parameter(f"{name}{_SUFFIX}", parameter)
        return [
            (layer, f"{name}{_SUFFIX}", share.mine(share.cut(tensor)).to(load.device, copy=True))
            for name, tensor in tensors.items()
        ]

    def _shard(self, model: PreTrainedModel, blocks: nn.ModuleList, placed: list[_Placed]) -> None:
        divided = {id(module._parameters[name]) for module, name, _ in placed}
        options: dict[str, Any] = {"mesh": self.mesh}
        options["ignored_params"] = {each for each in model.parameters() if id(each) not in divided}
        # Units outside of the blocks: each embedding, and the head, together if they share their weight.
        head = model.get_output_embeddings()
        shared = id(head._parameters.get("weight")) if head is not None else None
        tables = [
            each for each in model.modules() if isinstance(each, nn.Embedding) and id(each.weight) in divided
        ]
        units: list[Any] = [[table, head] if id(table.weight) == shared else table for table in tables]
        if isinstance(head, FrozenLinear) and head.share is not None:
            units.append(head)
        for unit in units:
            holds_head = unit is head or isinstance(unit, list)
            made: Any = fully_shard(unit, reshard_after_forward=not holds_head, **options)  # head: `release`
            # torch would prefetch it behind the first block's backward pass
            if isinstance(unit, nn.Embedding):
                made.set_unshard_in_backward(False)
        sharded = [fully_shard(block, **options) for block in blocks]
        fully_shard(model, **options)
        for block, following in pairwise(sharded):
            block.set_modules_to_forward_prefetch([following])
        for module, name, mine in placed:  # torch expects a new parameter, which it reads at the first pass
            empty: Any = module._parameters[name]
            form: dict[str, Any] = {"run_check": False, "shape": empty.shape, "stride": empty.stride()}
            filled = nn.Parameter(
                DTensor.from_local(mine, self.mesh, empty.placements, **form), requires_grad=False
            )
            module._parameters[name] = filled
            if isinstance(module, FrozenLinear) and module.share is not None:
                module.share.parts[name.removesuffix(_SUFFIX)] = filled
        _Views(model)


def release(module: nn.Module) -> None:
    """Drop the gathered weight of an output head, which the loss needs after its forward pass."""
    if isinstance(module, FSDPModule):
        module.reshard()


class _Views:
    """`residency` of the layers: they read the memory into which torch gathers their unit."""

    def __init__(self, model: PreTrainedModel) -> None:
        for module in [*model.modules()][::-1]:  # blocks before the model
            if not isinstance(module, FSDPModule):
                continue
            assert isinstance(module, nn.Module)
            frozen = frozen_layers(module).values()
            layers = [layer for layer in frozen if layer.share is not None and layer.residency is None]
            for layer in layers:
                layer.residency = self
            if layers:
                module.register_forward_pre_hook(partial(_view, layers))

    def use(self, layer: FrozenLinear) -> None:
        packed = layer._buffers["weight" if layer.kind == "dense" else "packed"]
        assert packed is not None
        if packed.untyped_storage().nbytes() == 0:
            raise RunFailure("train.parallel: shard: a block's weight was read outside of its forward pass.")


def _view(layers: list[FrozenLinear], _module: nn.Module, _args: Any) -> None:
    """Point the layers' buffers at the gathered parameters, once: torch keeps these for good."""
    # Outside of inference mode, whose tensors a training step could not use.
    with torch.inference_mode(False), torch.no_grad():
        for layer in layers:
            if layer.residency is None:  # it reads a weight of its own (train/guards.py)
                continue
            for name in ("packed", "absmax", "zeros", "weight", "keep_bits"):
                whole, buffer = layer._parameters.get(f"{name}{_SUFFIX}"), layer._buffers.get(name)
                if whole is None or buffer is None or isinstance(whole, DTensor):
                    continue
                if buffer.untyped_storage()._cdata != whole.untyped_storage()._cdata:
                    layer._buffers[name] = whole.detach().view(buffer.shape)
