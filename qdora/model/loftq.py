"""LoftQ's start of the adapters, from the error of the quantised base."""

from __future__ import annotations

import logging

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qdora.errors import UserError
from qdora.model.inject import adapted_layers
from qdora.model.load import load_config, skeleton, tensors_of_source
from qdora.model.source import ModelSource
from qdora.model.stored_tensors import tied_weights
from qdora.recipe.settings import Recipe

logger = logging.getLogger("qdora")


def start_adapters(model: PreTrainedModel, recipe: Recipe, source: ModelSource) -> None:
    """Give fresh adapters LoftQ's start, which reads the source, if the recipe asks for it."""
    settings = recipe.adapter
    if settings.kind in ("lora", "dora") and settings.init == "loftq" and settings.resume_from is None:
        start_from_error_(model, source)


@torch.no_grad()
def nearest_low_rank(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors L (out, rank), R (rank, in) of the matrix of at most `rank` nearest to `matrix` in the Frobenius norm.

    L = U sqrt(S), R = sqrt(S) V^T of the largest singular values; `matrix` (out, in) is float32 or float64.

    Computed from the eigenvectors of the smaller Gram matrix, many times faster than a full decomposition; in float32
    singular values below 1e-3 of the largest are inexact, and too small to matter.
    """
    wide = matrix.shape[0] <= matrix.shape[1]
    gram = matrix @ matrix.T if wide else matrix.T @ matrix
    vectors = torch.linalg.eigh(gram).eigenvectors[:, -rank:].flip(1)
    image = matrix.T @ vectors if wide else matrix @ vectors  # S V, or U S
    values = image.norm(dim=0)
    root = values.sqrt()
    inverse = torch.where(root > 0, 1 / root, 0.0)
    if wide:
        return vectors * root, (image * inverse).T
    return image * inverse, (vectors * root).T


@torch.no_grad()
def start_from_error_(model: PreTrainedModel, source: ModelSource) -> dict[str, float]:
    """Set lora_A and lora_B of every adapted layer so that s B A is nearest to W - W_q, and m so that the gain is 1.

    Source: LoftQ, arXiv 2310.08659, algorithm 1 with one step. The paper quantises the base anew between the steps;
    here it stays what the recipe's `base` section says, so that the adapter can be used on it anywhere.

    In a masked layer only weights that were not pruned count. One weight of the source is read at a time. Returns path
    -> ||W - W_q - s B A|| / ||W - W_q||, 1 if there is no error. Raises UserError if the source is quantised.
    """
    empty = skeleton(load_config(source), source, model.dtype, "auto", torch.device("cpu"))
    stored = tensors_of_source(source, empty)
    tied = tied_weights(empty)
    left: dict[str, float] = {}
    for path, layer in adapted_layers(model).items():
        name = f"{path}.weight"
        weight = stored[name if name in stored else tied[name]].read()  # a tied head is stored as the embedding
        if not isinstance(weight, Tensor):
            raise UserError(
                f"adapter.init: loftq: {path} is quantised in the source. Fix: name a full-precision source."
            )
        base = layer.base.dequantized()
        error = weight.to(base.device).float() - base
        keep = layer.base.keep_mask() if layer.masked else None
        if keep is not None:
            error.masked_fill_(~keep, 0)
        parts = layer.approximated_parts(error / layer.scaling)
        factors = [nearest_low_rank(part, layer.rank) for part in parts]
        layer.set_factors_(factors)
        if layer.magnitude is not None:
            layer.magnitude.copy_(layer.row_norm())
        update = layer.scaling * (layer.lora_B.float() @ layer.lora_A.float()).view_as(error)
        if keep is not None:
            update.masked_fill_(~keep, 0)
        size = float(error.norm())
        left[path] = float((error - update).norm()) / size if size else 1.0
    mean = sum(left.values()) / len(left)
    logger.info("LoftQ: the adapters start from the error of the base and leave %.1f %% of it, on average.", 100 * mean)
    return left
