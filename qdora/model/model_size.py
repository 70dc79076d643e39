"""The size of a model in files: packed weights in their format, everything else of the base in 16 bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from qdora.adapter.adapted_linear import AdaptedLinear
from qdora.adapter.expert_linear import ExpertLinear
from qdora.adapter.frozen_linear import FrozenLinear
from qdora.adapter.trained_rows import RowHead
from qdora.model.inject import is_linear

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
    while isinstance(head, RowHead | AdaptedLinear):
        head = head.base
    seen: set[tuple[Any, Any]] = set()
    weights = linear = other = adapter = 0
    for module in model.modules():
        if isinstance(module, AdaptedLinear):
            adapter += sum(p.numel() * p.element_size() for p in module.parameters(recurse=False))
        elif is_linear(module):
            assert isinstance(module, (FrozenLinear, ExpertLinear, nn.Linear))
            packed = module.packed_form if isinstance(module, FrozenLinear) else None
            count = module.out_features * module.in_features
            num_bytes = _DENSE_BYTES * count if packed is None else packed.num_packed_bytes
            if module is not head:
                weights += count
                linear += num_bytes
            elif packed is not None or _is_new(module.weight, seen):  # type: ignore[arg-type]
                other += num_bytes
            other += 0 if module.bias is None else _DENSE_BYTES * module.bias.numel()
        else:
            kept = (b for name, b in module._buffers.items() if name not in module._non_persistent_buffers_set)
            own = [each for each in (*module._parameters.values(), *kept) if each is not None]
            other += sum(_DENSE_BYTES * each.numel() for each in own if _is_new(each, seen))
    return ModelSize(weights, linear, linear + other, adapter)


def _is_new(tensor: Tensor, seen: set[tuple[Any, Any]]) -> bool:
    """Whether the memory of a tensor, which tied weights share, is not in `seen`, to which it is added."""
    place = (tensor.untyped_storage()._cdata, tensor.storage_offset())
    if place in seen:
        return False
    seen.add(place)
    return True
