"""LoftQ's start of an adapter: s B A is the matrix of its rank nearest to the error of the base, W - W_q.

Source: LoftQ, arXiv 2310.08659, algorithm 1 with one step. The paper quantises the base anew between the steps; here
the base stays what the recipe's `base` section says, so that the adapter can be used on it anywhere.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qdora.errors import UserError
from qdora.model.inject import adapted_layers
from qdora.model.load import load_config, skeleton, stored_tensors
from qdora.model.source import ModelSource

log = logging.getLogger("qdora")


@torch.no_grad()
def nearest_low_rank(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors L R of the matrix of at most `rank` that is nearest to `matrix` in the Frobenius norm.

    L = U sqrt(S), R = sqrt(S) V^T of the largest singular values.

    Computed from the eigenvectors of the smaller Gram matrix, many times faster than a full decomposition; in float32
    singular values below 1e-3 of the largest are inexact, and too small to matter.

    Args:
        matrix: (out, in), float32 or float64.
        rank: 1 to min(out, in).
    Returns:
        (out, rank) and (rank, in) in the matrix's dtype.
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

    In a masked layer only weights that were not pruned count. One weight of the source is read at a time.

    Returns:
        Path -> ||W - W_q - s B A|| / ||W - W_q||, 1 if there is no error.
    Raises:
        UserError: The source holds a layer's weight quantised.
    """
    empty = skeleton(load_config(source), source, model.dtype, "auto", torch.device("cpu"))
    stored = stored_tensors(source, empty)
    left: dict[str, float] = {}
    for path, layer in adapted_layers(model).items():
        weight = stored[f"{path}.weight"].read()
        if not isinstance(weight, Tensor):
            raise UserError(
                f"adapter.init: loftq: {path} is quantised in the source. Fix: name a full-precision source."
            )
        base = layer.base.dequantized()
        error = weight.to(base.device).float() - base
        keep = layer.base.keep_mask() if layer.masked else None
        if keep is not None:
            error.masked_fill_(~keep, 0)
        lora_B, lora_A = nearest_low_rank(error / layer.scaling, layer.rank)
        layer.lora_A.copy_(lora_A)
        layer.lora_B.copy_(lora_B)
        if layer.magnitude is not None:
            layer.magnitude.copy_(layer.row_norm())
        update = layer.scaling * (layer.lora_B.float() @ layer.lora_A.float())
        if keep is not None:
            update.masked_fill_(~keep, 0)
        size = float(error.norm())
        left[path] = float((error - update).norm()) / size if size else 1.0
    mean = sum(left.values()) / len(left)
    log.info("LoftQ: the adapters start from the error of the base and leave %.1f %% of it, on average.", 100 * mean)
    return left
