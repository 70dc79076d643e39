"""Row norms of adapted layers whose base is divided among processes: each computes those of its rows, once a step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from qdora.adapter.adapted_linear import AdaptedLinear
from qdora.adapter.dora import FactoredNorm, factored_norm, masked_row_norm, measure_cancelled_
from qdora.adapter.row_share import RowShare, gather_runs


class _MyRows(NamedTuple):
    """The rows that this process has of a layer, whose products are in `dtype`."""

    layer: AdaptedLinear
    share: RowShare
    dtype: torch.dtype

    def factors(self) -> tuple[Tensor, Tensor]:
        """A, and these rows of B, as the products take them."""
        lora_A, lora_B = self.layer._rounded_factors(self.dtype)
        return lora_A, lora_B[self.share.rows]

    def norm(self) -> Tensor | FactoredNorm:
        """As the layer itself computes it from the whole weight; where rows can have cancelled, with their flags."""
        assert self.layer.base_squared is not None
        squared = self.layer.base_squared[self.share.rows]
        if not len(squared):
            return squared
        weight, scaling = self.share.weight(), self.layer.scaling
        if self.layer.masked:
            return masked_row_norm(weight, self.share.keep_bits(), *self.factors(), scaling, dtype=self.dtype)
        return factored_norm(weight, *self.factors(), scaling, base_squared=squared, dtype=self.dtype)

    def measure_cancelled_(self, found: FactoredNorm) -> None:
        """Measure the cancelled rows."""
        measure_cancelled_(found, self.share.weight(), *self.factors(), self.layer.scaling, dtype=self.dtype)


def prepare_shared_gains(layers: Iterable[AdaptedLinear]) -> int:
    """Compute the gains that the coming forward pass needs from the rows of each process, in one collective.

    All processes must call this together, in the same state. Like `prepare_gains` it skips layers that have not run
    yet, whose parameters have not changed, and that are LoRA; also stacks of experts, and weights that are not divided
    by rows: the forward pass computes their norms from the gathered weight. A GPU's host waits once. Returns how many
    norms were computed.
    """
    changed: list[_MyRows] = []
    for layer in layers:
        share, dtype = layer.base.share, layer._dtype
        if share is None or not share.by_rows or layer.base_squared is None or dtype is None:
            continue
        if not layer.knows_norm(dtype):
            changed.append(_MyRows(layer, share, dtype))
    if not changed:
        return 0
    device, group = changed[0].layer.lora_A.device.type, changed[0].share.group
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device, enabled=False):
        norms = gather_runs(_norms(changed), [each.share.out_features for each in changed], group)
    for (layer, _, dtype), norm in zip(changed, norms, strict=True):
        layer.keep_norm(dtype, norm)
        layer.gain(dtype)
        layer.operands(dtype)
    return len(changed)


def _norms(changed: Sequence[_MyRows]) -> list[Tensor]:
    """The norms of all these rows; one question tells which have cancelled."""
    found = [each.norm() for each in changed]
    asked = [(rows, norm) for rows, norm in zip(changed, found, strict=True) if isinstance(norm, FactoredNorm)]
    answers = torch.stack([norm.cancelled.any() for _, norm in asked]).tolist() if asked else []
    for (rows, norm), has_cancelled in zip(asked, answers, strict=True):
        if has_cancelled:
            rows.measure_cancelled_(norm)
    return [norm.norm if isinstance(norm, FactoredNorm) else norm for norm in found]
