"""The nearest matrix of low rank, for adapters that start from what quantisation and pruning took away."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def nearest_low_rank(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors L R of the matrix of at most `rank` nearest to the given one in the Frobenius norm.

    L = U sqrt(S), R = sqrt(S) V^T of the largest singular values, both of the same size.

    Found from the eigenvectors of the smaller Gram matrix, many times as fast as a full decomposition; singular values
    below 1e-3 of the largest are inexact in float32, which costs nothing where they matter.

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
