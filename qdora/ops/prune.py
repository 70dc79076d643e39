"""Pruning a weight: what removing a weight costs by three rules, and the inputs from which two of them learn it.

    magnitude   w_ij^2
    Wanda       w_ij^2 ||x_j||^2           inputs x measured on calibration text
    SparseGPT   w_ij^2 / [H^-1]_jj, and the error is pushed on to the weights that stay (`sparsegpt`)

Squares order the weights as the magnitudes of the papers do, and add up to the cost of a row or column.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from qdora.errors import UserError, nearest
from qdora.ops import codebooks, sparsegpt
from qdora.ops.packed import PackedWeight, from_tensors
from qdora.ops.sparsity import Group, SparsityPattern, check_shape, keep_mask

METHODS = ("magnitude", "wanda", "sparsegpt")

# Entries whose squares are formed at a time when a statistic is added up: 64 MiB of float32.
_ENTRIES_PER_SLICE = 1 << 24


class Pruned(NamedTuple):
    """A pruned weight: (out, in) in the dtype given, exactly 0 where `keep_mask` (out, in) is False."""

    weight: Tensor
    keep_mask: Tensor


class InputStatistics:
    """What pruning learns about a layer's inputs, added up over batches of calibration text in float32.

    Args:
        in_features: Columns of the layer.
        method: "wanda" adds up squares per column, "sparsegpt" the whole of X^T X.
        device: Where the sums lie.
    """

    def __init__(self, in_features: int, method: Literal["wanda", "sparsegpt"], device: torch.device | str) -> None:
        shape = (in_features,) if method == "wanda" else (in_features, in_features)
        self.sums = torch.zeros(shape, dtype=torch.float32, device=device)
        self.num_tokens = 0

    @torch.no_grad()
    def add(self, x: Tensor) -> None:
        """Add inputs (..., in) of any float dtype."""
        tokens = x.detach().reshape(-1, x.shape[-1])
        step = max(1, _ENTRIES_PER_SLICE // tokens.shape[1])
        for start in range(0, tokens.shape[0], step):
            part = tokens[start : start + step].float()
            if self.sums.ndim == 1:
                self.sums += part.square().sum(dim=0)
            else:
                self.sums.addmm_(part.T, part)
        self.num_tokens += tokens.shape[0]

    @property
    def column_squares(self) -> Tensor:
        """||x_j||^2 of each column, (in,) float32."""
        return self.sums if self.sums.ndim == 1 else self.sums.diagonal()


@torch.no_grad()
def magnitude_scores(weight: Tensor) -> Tensor:
    """w_ij^2, (out, in) float32 (float64 for float64 weights)."""
    return weight.to(torch.promote_types(weight.dtype, torch.float32)).square()


@torch.no_grad()
def wanda_scores(weight: Tensor, column_squares: Tensor) -> Tensor:
    """(|w_ij| ||x_j||)^2, (out, in) float32 (float64 for float64 weights).

    Source: Wanda, arXiv 2306.11695, eq. 1.

    Args:
        weight: (out, in).
        column_squares: ||x_j||^2 over the calibration tokens, (in,). All 0 (an expert that no token came to): every
            column counts the same.
    """
    scores = magnitude_scores(weight)
    largest = column_squares.max()
    if largest == 0:
        return scores
    # Divided by the largest, which changes no order: sums over many tokens would leave float32's range.
    return scores.mul_(column_squares.to(scores.dtype) / largest)


@torch.no_grad()
def prune_weight(
    weight: Tensor,
    method: str,
    pattern: SparsityPattern,
    *,
    statistics: InputStatistics | None = None,
    group: Group | None = None,
    damping: float = sparsegpt.DAMPING,
    block_columns: int = sparsegpt.BLOCK_COLUMNS,
    name: str = "weight",
) -> Pruned:
    """Prune a dense weight.

    Args:
        weight: (out, in), any float dtype; not changed.
        method: "magnitude", "wanda" or "sparsegpt".
        pattern: What is to be zero.
        statistics: Of the layer's inputs, for wanda and sparsegpt of that method.
        group: What an unstructured pattern compares. None: the whole tensor for magnitude, each row for Wanda (its
            paper, sec. 3). sparsegpt compares within blocks of columns.
        damping, block_columns: Of `sparsegpt.prune`.
        name: What the weight is called in an error.
    Raises:
        ValueError: Weights that are not finite, a pattern that does not fit, arguments that are missing or too many.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method '{method}'; allowed: {', '.join(METHODS)}.{nearest(method, METHODS)}")
    if (statistics is None) != (method == "magnitude"):
        needs = "needs" if statistics is None else "takes no"
        raise ValueError(f"{name}: {method} {needs} statistics of the layer's inputs.")
    num_bad = weight.numel() - int(weight.isfinite().sum())
    if num_bad:
        raise UserError(
            f"{name}: {num_bad} of {weight.numel()} weights are not finite (NaN or infinite) and cannot be pruned."
        )
    if statistics is not None and not bool(statistics.sums.isfinite().all()):
        raise UserError(f"{name}: the inputs measured on the calibration text are not finite (NaN or infinite).")
    check_shape(pattern, (weight.shape[0], weight.shape[1]), name)
    if method == "sparsegpt":
        assert statistics is not None
        if group is not None:
            raise ValueError("sparsegpt compares within blocks of columns; allowed: no group.")
        pruned, keep = sparsegpt.prune(
            weight, statistics.sums, pattern, damping=damping, block_columns=block_columns, name=name
        )
        return Pruned(pruned, keep)
    scores = magnitude_scores(weight) if statistics is None else wanda_scores(weight, statistics.column_squares)
    keep = keep_mask(scores, pattern, group or ("tensor" if method == "magnitude" else "row"))
    return Pruned(weight.masked_fill(~keep, 0), keep)


@torch.no_grad()
def zero_packed(packed: PackedWeight, keep_mask: Tensor) -> PackedWeight:
    """A quantised weight with the pruned entries set to the code of 0; scales and all other codes stay.

    Args:
        packed: (out, in).
        keep_mask: (out, in) bool.
    """
    tensors = packed.tensors()
    codes = packed.packed
    if packed.kind == "int8":
        tensors["packed"] = codes.masked_fill(~keep_mask, 0)
    else:
        zero = int((codebooks.code_values(packed.kind) == 0).nonzero()[0])
        keep = torch.nn.functional.pad(keep_mask.reshape(-1), (0, keep_mask.numel() % 2), value=True)
        high = torch.where(keep[0::2], codes & 0xF0, zero << 4)
        tensors["packed"] = high | torch.where(keep[1::2], codes & 0x0F, zero)
    return from_tensors(packed.kind, packed.shape, packed.block_size, tensors)


@torch.no_grad()
def layer_loss(weight: Tensor, pruned: Tensor, input_products: Tensor) -> float:
    """||X W^T - X W'^T||^2 on the calibration inputs, from X^T X (in, in), summed in float64."""
    difference = weight.double() - pruned.double()
    return float((difference @ input_products.double()).mul_(difference).sum())
