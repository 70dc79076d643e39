"""What an adapter changed in the rows of the weights: their direction, and their magnitude."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from qdora.nn.adapted_linear import AdaptedLinear
from qdora.ops.tiles import dense_weight


@dataclass(frozen=True)
class WeightChange:
    """Means over the rows of a layer's weight; V is the merged weight, W the dequantised base.

    direction: 1 - cos(v, w). magnitude: | ||v|| / ||w|| - 1 |. Rows of zeros are left out.
    """

    direction: float
    magnitude: float


@torch.no_grad()
def weight_changes(layers: Mapping[str, AdaptedLinear]) -> dict[str, WeightChange]:
    """Path -> change of each adapted layer, in float32."""
    found = {}
    for path, layer in layers.items():
        base, merged = dense_weight(layer.base.stored_weight, torch.float32), layer.merged_weight(torch.float32)
        norms, merged_norms = base.norm(dim=-1), merged.norm(dim=-1)
        kept = (norms > 0) & (merged_norms > 0)
        cosines = (base * merged).sum(dim=-1)[kept] / (norms * merged_norms)[kept]
        ratios = merged_norms[kept] / norms[kept]
        found[path] = WeightChange(float((1 - cosines).mean()), float((ratios - 1).abs().mean()))
    return found


@torch.no_grad()
def set_magnitude_back_(layer: AdaptedLinear) -> None:
    """Give the magnitude of a layer the row norm of its base, with which DoRA begins; the direction stays."""
    assert layer.magnitude is not None, "only DoRA has magnitudes"
    layer.magnitude.copy_(layer.base.squared_row_norm().sqrt().view_as(layer.magnitude))
