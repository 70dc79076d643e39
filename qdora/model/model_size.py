"""The size of a model in files: packed weights in their format, everything else of the base in 16 bits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qdora.model.inject import is_linear
from qdora.nn.adapted_linear import AdaptedLinear
from qdora.nn.expert_linear import ExpertLinear
from qdora.nn.frozen_linear import FrozenLinear
from qdora.nn.trained_rows import RowHead

_DENSE_BYTES = 2  # 16 bits in a file, whatever this machine computes in


@dataclass(frozen=True)
class ModelSize:
    """Weights of the linear layers without the output head, and bytes of these, the whole base and the adapter.

    Bytes include scales; codes of simulated formats count as tightly packed, lora_B as stored.
    """

    num_linear_weights: int
    num_linear_bytes: int
    num_base_bytes: int
    num_adapter_bytes: int


def model_size(model: nn.Module) -> ModelSize:
    """Size of a causal LM, with or without adapters; tied weights count once."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    head = head.base if isinstance(head, RowHead) else head
    seen: set[int] = set()
    weights = linear = other = adapter = 0
    for module in model.modules():
        if is_linear(module) and module is not head:
            assert isinstance(module, (FrozenLinear, ExpertLinear, nn.Linear))
            packed = module.packed_form if isinstance(module, FrozenLinear) else None
            count = module.out_features * module.in_features
            weights += count
            linear += _DENSE_BYTES * count if packed is None else packed.num_packed_bytes
            other += 0 if module.bias is None else _DENSE_BYTES * module.bias.numel()
        elif isinstance(module, AdaptedLinear):
            adapter += sum(p.numel() * p.element_size() for p in module.parameters(recurse=False))
        else:
            other += sum(_DENSE_BYTES * each.numel() for each in _own(module, seen))
    return ModelSize(weights, linear, linear + other, adapter)


def _own(module: nn.Module, seen: set[int]) -> list[Tensor]:
    """Tensors of the module itself that a file holds and that are not in `seen`, to which they are added."""
    kept = [b for name, b in module._buffers.items() if name not in module._non_persistent_buffers_set]
    found = [tensor for tensor in (*module._parameters.values(), *kept) if isinstance(tensor, torch.Tensor)]
    new = [tensor for tensor in found if id(tensor) not in seen]
    seen.update(map(id, new))
    return new
