"""Row norms of adapted layers whose base is divided among processes: each computes those of its rows, once a step."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from qdora.nn.adapted_linear import AdaptedLinear
from qdora.nn.row_share import RowShare, gather_runs
from qdora.ops.dora import masked_row_norm, row_norm

_Found = tuple[AdaptedLinear, RowShare, torch.dtype, Tensor]


def prepare_shared_gains(layers: Iterable[AdaptedLinear]) -> int:
    """Compute the gains that the coming forward pass needs from the rows of each process, in one collective.

    All processes must call this together, in the same state. Like `prepare_gains` it skips layers that have not run
    yet, whose parameters have not changed, and that are LoRA; also stacks of experts, and weights that are not divided
    by rows: the forward pass computes their norms from the gathered weight. Returns how many were computed.
    """
    found: list[_Found] = []
    for layer in layers:
        share, dtype = layer.base.share, layer._dtype
        if share is None or not share.by_rows or layer.base_squared is None or dtype is None:
            continue
        if layer._cache.knows("row_norm", layer._factors(), (dtype, layer.scaling)):
            continue
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(layer.lora_A.device.type, enabled=False):
            found.append((layer, share, dtype, _norm_of_rows(layer, share, dtype)))
    if found:
        _, share, _, _ = found[0]
        norms = gather_runs([norm for *_, norm in found], [each.out_features for _, each, _, _ in found], share.group)
        for (layer, _, dtype, _), norm in zip(found, norms, strict=True):
            layer._cache.put("row_norm", layer._factors(), (dtype, layer.scaling), norm)
            layer.gain(dtype)
            layer.operands(dtype)
    return len(found)


def _norm_of_rows(layer: AdaptedLinear, share: RowShare, dtype: torch.dtype) -> Tensor:
    """The norms of this process's rows, as the layer itself computes them from the whole weight."""
    rows, squared = share.rows, layer.base_squared
    assert squared is not None
    if rows.start == rows.stop:
        return squared[rows]
    lora_A, lora_B = layer._rounded_factors(dtype)
    if layer.masked:
        return masked_row_norm(share.weight(), share.keep_bits(), lora_A, lora_B[rows], layer.scaling, dtype=dtype)
    squared = squared[rows]
    return row_norm(share.weight(), lora_A, lora_B[rows], layer.scaling, base_squared=squared, dtype=dtype)
