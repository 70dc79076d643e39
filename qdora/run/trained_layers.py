"""What training did to each layer: trained.json.

Nothing is dequantised: DoRA layers hold ||W||^2 of every row, and ||B A|| follows from two (rank, rank) products.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from qdora.adapter.adapted_linear import AdaptedLinear
from qdora.files.run_directory import RunDirectory
from qdora.model.inject import adapted_layers

TRAINED_FILE = "trained.json"


def keep_trained(run: RunDirectory, model: nn.Module, step: int) -> None:
    """Write trained.json after `step` steps."""
    layers = [{"path": path, **layer_facts(layer)} for path, layer in adapted_layers(model).items()]
    run.write_json(TRAINED_FILE, {"step": step, "layers": layers})


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
