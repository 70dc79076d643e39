"""What training changed: the rows of the weights, and how much of a compression's error an adapter takes back."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from qdora.adapter.layer import AdaptedLinear


def weight_changes(layers: Mapping[str, AdaptedLinear]) -> dict[str, dict[str, float]]:
    """Path -> `weight_change` of each adapted layer, in float32."""
    return {
        path: weight_change(layer.base.dequantized(torch.float32), layer.merged_weight(torch.float32))
        for path, layer in layers.items()
    }


@torch.no_grad()
def weight_change(base: Tensor, trained: Tensor) -> dict[str, float]:
    """Means over the rows w of a base and v of a trained or merged weight, (out, in) float32, without rows of zeros.

    direction: 1 - cos(v, w). magnitude: | ||v|| / ||w|| - 1 |. length: | ||v|| - ||w|| |, as in DoRA, eq. 3.
    """
    norms, trained_norms = base.norm(dim=-1), trained.norm(dim=-1)
    kept = (norms > 0) & (trained_norms > 0)
    cosines = (base * trained).sum(dim=-1)[kept] / (norms * trained_norms)[kept]
    lengths = (trained_norms - norms)[kept].abs()
    relative = lengths / norms[kept]
    means = {"direction": (1 - cosines).mean(), "magnitude": relative.mean(), "length": lengths.mean()}
    return {name: float(mean) for name, mean in means.items()}


@torch.no_grad()
def full_weight_changes(base: nn.Module, trained: nn.Module) -> dict[str, dict[str, float]]:
    """Path -> `weight_change` of each linear layer of two dense models of the same structure, in float32."""
    return {
        path: weight_change(layer.weight.float(), trained.get_parameter(f"{path}.weight").float())
        for path, layer in base.named_modules()
        if isinstance(layer, nn.Linear)
    }


@torch.no_grad()
def set_magnitude_back_(layer: AdaptedLinear) -> None:
    """Give the magnitude of a layer the row norm of its base, with which DoRA begins; the direction stays."""
    assert layer.magnitude is not None, "only DoRA has magnitudes"
    layer.magnitude.copy_(layer.base.squared_row_norm().sqrt().view_as(layer.magnitude))


@torch.no_grad()
def error_undone(update: Tensor, error: Tensor, rank: int) -> dict[str, float]:
    """Compare an update U with the error E = W - W' of its weight, W the compressed base, W' the uncompressed one.

    (out, in) or (parts, out, in), in float32 or wider; 2-norms of all entries. error_undone: <U, -E> / |E|^2, the share
    of the error that the update takes back. error_undone_best: the same of the best approximation of -E with the rank
    of the adapter, which keeps the largest singular values (Eckart and Young, Psychometrika 1, 1936). error_cosine:
    <U, -E> / (|U| |E|). Empty without an error.
    """
    whole = float(error.square().sum())
    if not whole:
        return {}
    product = -float((update * error).sum())
    largest = torch.linalg.svdvals(error)[..., :rank]
    norms = float(update.norm()) * float(error.norm())
    return {
        "error_undone": product / whole,
        "error_undone_best": float(largest.square().sum()) / whole,
        "error_cosine": product / norms if norms else 0.0,
    }
