"""What training did to each layer, and what its tensors take: trained.json, for the run's page.

Nothing is dequantised: DoRA layers hold ||W||^2 of every row, and ||B A|| follows from two (rank, rank) products.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from qdora.files.run_directory import RunDirectory
from qdora.model.inject import adapted_layers
from qdora.nn.adapted_linear import AdaptedLinear
from qdora.nn.frozen_linear import FrozenLinear
from qdora.plan import plan_contents as parts
from qdora.train.optimizer import AdapterOptimizer

TRAINED_FILE = "trained.json"
_COMPONENT = {"packed": parts.BASE, "weight": parts.BASE, "keep_bits": parts.MASKS, "bias": parts.DENSE}


def keep_trained(run: RunDirectory, model: nn.Module, optimizer: AdapterOptimizer, step: int) -> None:
    """Write trained.json after `step` steps: `memory` by component, and `layers`."""
    layers = [{"path": path, **layer_facts(layer)} for path, layer in adapted_layers(model).items()]
    run.write_json(TRAINED_FILE, {"step": step, "memory": held_bytes(model, optimizer), "layers": layers})


@torch.no_grad()
def layer_facts(layer: AdaptedLinear) -> dict[str, Any]:
    """Rank, and how far a layer has moved from its base.

    Returns: JSON values. `magnitude_moved`, `magnitude_moved_most`: mean and maximum of |m / ||w|| - 1| over the rows w
        of the base that are not zero. `update`: ||s B A|| / ||W||, Frobenius norms, without mask. None for LoRA, which
        does not know the norms of its base.
    """
    found: dict[str, Any] = {"rank": layer.rank, "magnitude_moved": None, "magnitude_moved_most": None, "update": None}
    squared, magnitude = layer.base_squared, layer.magnitude
    if squared is None or magnitude is None:
        return found
    alive = squared > 0
    moved = (magnitude[alive] / squared[alive].sqrt() - 1).abs()
    first, second = layer.lora_A.float(), layer.gated_B().float()
    # ||B A||^2 = sum of (A A^T) o (B^T B)
    size = ((first @ first.mT) * (second.mT @ second)).sum().clamp(min=0).sqrt() * layer.scaling
    if moved.numel():
        found |= {"magnitude_moved": float(moved.mean()), "magnitude_moved_most": float(moved.max())}
        found["update"] = float(size / squared.sum().sqrt())
    return found


def _held(layer: FrozenLinear) -> dict[str, Tensor]:
    """The tensors of a layer that live from step to step: of a divided weight this process's share."""
    found = dict(layer.named_buffers(recurse=False))
    if layer.share is not None:
        return found | layer.share.parts
    return {name: tensor for name, tensor in found.items() if name not in layer.away}


def held_bytes(model: nn.Module, optimizer: AdapterOptimizer) -> dict[str, int]:
    """Bytes on the model's device by component of a plan, of all that lives from step to step; without empty ones.

    Of a base that is divided among processes, this one's share counts. Gradients count as they are during a step:
    float32, one for each trainable parameter.
    """
    device, seen = next(iter(optimizer.parameters.values())).device, set[int]()

    def num_bytes(*tensors: Tensor | None) -> int:
        total = 0
        for tensor in tensors:
            if isinstance(tensor, DTensor):  # it has no storage of its own
                tensor = tensor.to_local()
            if tensor is not None and tensor.device == device and tensor.untyped_storage().data_ptr() not in seen:
                seen.add(tensor.untyped_storage().data_ptr())
                total += tensor.untyped_storage().nbytes()
        return total

    found = dict.fromkeys((parts.BASE, parts.SCALES, parts.MASKS, parts.DENSE, parts.ADAPTERS), 0)
    bases = {layer.base for layer in adapted_layers(model).values()}
    whole = {name for name in optimizer.undecayed if not name.endswith(".rows")}  # dense weights, as in a plan
    found[parts.ADAPTERS] += num_bytes(*(each for name, each in optimizer.parameters.items() if name not in whole))
    for module in model.modules():
        if isinstance(module, FrozenLinear):
            # In a divided model every linear layer is frozen, the head too
            other = module.share is not None and module not in bases
            for name, tensor in _held(module).items():
                component = parts.DENSE if other and name == "weight" else _COMPONENT.get(name, parts.SCALES)
                found[component] += num_bytes(tensor)
        elif isinstance(module, AdaptedLinear):
            found[parts.ADAPTERS] += num_bytes(*module.buffers(recurse=False))
        else:
            found[parts.DENSE] += num_bytes(*module.parameters(recurse=False), *module.buffers(recurse=False))
    found[parts.OPTIMIZER] = num_bytes(*optimizer.state_tensors().values())
    found[parts.GRADIENTS] = sum(4 * each.numel() for each in optimizer.parameters.values())
    return {name: size for name, size in found.items() if size}
