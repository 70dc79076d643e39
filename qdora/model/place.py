"""Putting read tensors into a model, in the dtype and at the place that it keeps them."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qdora.model.checkpoint import tied_weights
from qdora.model.inject import replace_module
from qdora.nn.frozen_linear import FrozenLinear
from qdora.nn.host_embedding import HostEmbedding
from qdora.ops.tiles import Weight


def place_frozen(model: nn.Module, layer: str, weight: Weight, keep_bits: Tensor | None = None) -> FrozenLinear:
    """Put a frozen layer in the place of a linear one, whose bias it takes over, read or not."""
    bias = model.get_submodule(layer).bias
    frozen = FrozenLinear(weight, bias if isinstance(bias, Tensor) else None, keep_bits)
    replace_module(model, layer, frozen)
    return frozen


def place_dense(module: nn.Module, leaf: str, value: Tensor, device: torch.device, dtype: torch.dtype) -> None:
    old = getattr(module, leaf)
    if isinstance(module, HostEmbedding):
        device = torch.device("cpu")
    elif leaf in module._buffers and not isinstance(module, FrozenLinear):
        dtype = old.dtype
    elif not value.is_floating_point():
        dtype = value.dtype
    # copy: the value may be a view of the file.
    placed = value.to(device=device, dtype=dtype, copy=True)
    setattr(module, leaf, nn.Parameter(placed, requires_grad=False) if leaf in module._parameters else placed)


def settle(model: PreTrainedModel, device: torch.device) -> None:
    """Tie what is tied, and move the buffers; to be called again when more is read."""
    for target, origin in tied_weights(model).items():
        _tie(model, target, origin)
    for module in model.modules():
        away = module.away if isinstance(module, FrozenLinear | HostEmbedding) else ()
        for name, buffer in module._buffers.items():
            if name not in away and buffer is not None and not buffer.is_meta and buffer.device != device:
                module._buffers[name] = buffer.to(device)


def _tie(model: PreTrainedModel, target: str, origin: str) -> None:
    """Make two names one parameter, whichever of them was stored."""
    first, second = (model.get_submodule(name.rpartition(".")[0]) for name in (target, origin))
    target_leaf, origin_leaf = target.rpartition(".")[2], origin.rpartition(".")[2]
    if getattr(second, origin_leaf).is_meta:
        setattr(second, origin_leaf, getattr(first, target_leaf))
    else:
        setattr(first, target_leaf, getattr(second, origin_leaf))


def wide_names(model: PreTrainedModel, dtype: torch.dtype) -> list[str]:
    """Parts of parameter names that the model wants in float32 when the rest is in `dtype`, as transformers does it."""
    names: set[str] = set()
    if dtype in (torch.float16, torch.bfloat16):
        names |= set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == torch.float16:
        names |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    return sorted(names)


def is_wide(name: str, wide: Sequence[str]) -> bool:
    """Whether a parameter is one of `wide_names`."""
    return any(re.search(rf"(^|\.){re.escape(part)}($|\.)", name) for part in wide)
