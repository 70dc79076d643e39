"""How much of the error that compression made in a weight an adapter takes back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ErrorUndone:
    """Of an update U and the error E = W - W', W the compressed base, W' the uncompressed one; 2-norms of all entries.

    undone: <U, -E> / |E|^2, the share of the error that the update takes back; 1 if U = -E, and any sign.
    undone_best: The same of the best approximation of -E with the rank of the adapter, in each part of a stack.
    cosine: <U, -E> / (|U| |E|); of the best approximation the square root of `undone_best`.
    """

    undone: float
    undone_best: float
    cosine: float


@torch.no_grad()
def error_undone(update: Tensor, error: Tensor, rank: int) -> ErrorUndone | None:
    """Compare an update with the error of its weight, in float32 or wider; None without an error.

    Source: Eckart and Young, The approximation of one matrix by another of lower rank, Psychometrika 1 (1936): the best
    one keeps the largest singular values.

    Args:
        update: Merged weight less the compressed base, (out, in); or a stack of such matrices, (parts, out, in).
        error: Compressed base less the uncompressed one, in the same shape.
        rank: Of the adapter, in each part.
    """
    whole = float(error.square().sum())
    if not whole:
        return None
    product = -float((update * error).sum())
    largest = torch.linalg.svdvals(error)[..., :rank]
    norms = float(update.norm()) * float(error.norm())
    return ErrorUndone(product / whole, float(largest.square().sum()) / whole, product / norms if norms else 0.0)
