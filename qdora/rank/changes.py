"""What training changed: the rows of the weights, and how much of a compression's error an adapter takes back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qdora.adapter.layer import AdaptedLinear
from qdora.quant.tiles import dense_weight


@dataclass(frozen=True)
class WeightChange:
    """Means over the rows of a layer's weight; V is the merged or trained weight, W the dequantised base.

    direction: 1 - cos(v, w). magnitude: | ||v|| / ||w|| - 1 |. length: | ||v|| - ||w|| |, as in DoRA, eq. 3. Rows of
    zeros are left out.
    """

    direction: float
    magnitude: float
    length: float


def weight_changes(layers: Mapping[str, AdaptedLinear]) -> dict[str, WeightChange]:
    """Path -> change of each adapted layer, in float32."""
    return {
        path: weight_change(dense_weight(layer.base.stored_weight, torch.float32), layer.merged_weight(torch.float32))
        for path, layer in layers.items()
    }


@torch.no_grad()
def weight_change(base: Tensor, trained: Tensor) -> WeightChange:
    """Change of one weight, (out, in) float32."""
    norms, trained_norms = base.norm(dim=-1), trained.norm(dim=-1)
    kept = (norms > 0) & (trained_norms > 0)
    cosines = (base * trained).sum(dim=-1)[kept] / (norms * trained_norms)[kept]
    lengths = (trained_norms - norms)[kept].abs()
    relative = lengths / norms[kept]
    return WeightChange(float((1 - cosines).mean()), float(relative.mean()), float(lengths.mean()))


@torch.no_grad()
def full_weight_changes(base: nn.Module, trained: nn.Module) -> dict[str, WeightChange]:
    """Path -> change of each linear layer between two dense models of the same structure, in float32."""
    layers = {path: layer for path, layer in base.named_modules() if isinstance(layer, nn.Linear)}
    return {
        path: weight_change(layer.weight.float(), trained.get_parameter(f"{path}.weight").float())
        for path, layer in layers.items()
    }


@torch.no_grad()
def set_magnitude_back_(layer: AdaptedLinear) -> None:
    """Give the magnitude of a layer the row norm of its base, with which DoRA begins; the direction stays."""
    assert layer.magnitude is not None, "only DoRA has magnitudes"
    layer.magnitude.copy_(layer.base.squared_row_norm().sqrt().view_as(layer.magnitude))


@dataclass(frozen=True)
class ErrorUndone:
    """Of an update U and the error E = W - W', W the compressed base, W' the uncompressed one; 2-norms of all entries.

    undone: <U, -E> / |E|^2, the share of the error that the update takes back. undone_best: The same of the best
    approximation of -E with the rank of the adapter. cosine: <U, -E> / (|U| |E|).
    """

    undone: float
    undone_best: float
    cosine: float


@torch.no_grad()
def error_undone(update: Tensor, error: Tensor, rank: int) -> ErrorUndone | None:
    """Compare an update with the error of its weight, (out, in) or (parts, out, in), in float32 or wider; None without
    an error. The best approximation keeps the largest singular values (Eckart and Young, Psychometrika 1, 1936)."""
    whole = float(error.square().sum())
    if not whole:
        return None
    product = -float((update * error).sum())
    largest = torch.linalg.svdvals(error)[..., :rank]
    norms = float(update.norm()) * float(error.norm())
    return ErrorUndone(product / whole, float(largest.square().sum()) / whole, product / norms if norms else 0.0)
