"""SparseGPT: remove weights column by column and push each error on to the columns that are still to come.

With H = X^T X + damping, and V upper triangular with H^-1 = V^T V, removing w_ij costs w_ij^2 / V_jj^2 and is made good
best by w_i,j: -= (w_ij / V_jj) V_j,j: . V_jj^2 is the entry of the inverse of H restricted to columns j and later.

Source: SparseGPT, arXiv 2301.00774, sec. 3 and algorithm 1. V comes from the Cholesky factor of H with its order
reversed, one triangular inverse: H itself is never inverted.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qdora.errors import UserError
from qdora.ops.sparsity import SparsityPattern, keep_mask, lowest, num_pruned

DAMPING = 0.01
"""Share of the mean of H's diagonal that is added to it. Source: SparseGPT, arXiv 2301.00774, sec. 4."""

BLOCK_COLUMNS = 128
"""Columns whose mask is chosen together. Source: SparseGPT, arXiv 2301.00774, sec. 3.3 and 4."""


@torch.no_grad()
def prune(
    weight: Tensor,
    input_products: Tensor,
    pattern: SparsityPattern,
    *,
    damping: float = DAMPING,
    block_columns: int = BLOCK_COLUMNS,
    keep: Tensor | None = None,
    name: str = "weight",
) -> tuple[Tensor, Tensor]:
    """Prune a weight and correct what is left.

    An unstructured mask is chosen for `block_columns` columns at a time, over all rows, from the weights as corrected
    so far; an n:m mask for m columns at a time. A column whose inputs were all zero costs nothing, so it goes first;
    where it stays it stays as it is. Whole columns are chosen before the first one is removed. Whole rows leave nothing
    to correct.

    Args:
        weight: (out, in), any float dtype; not changed.
        input_products: X^T X over the calibration tokens, (in, in); the sums run in its dtype, float32 or float64.
        pattern: An unstructured one has round(sparsity * out * in) zeros.
        damping: Added to the diagonal, as a share of its mean; above 0.
        block_columns: A multiple of m for n:m, or it is rounded up to one.
        keep: A mask (out, in) to be taken as it is instead of one chosen here.
        name: What the weight is called in an error.
    Returns:
        The weight in its dtype, exactly 0 where pruned, and its keep mask.
    Raises:
        UserError: If the damped H is not positive definite.
    """
    if not damping > 0:
        raise ValueError(f"damping {damping}; allowed: above 0.")
    factor = _inverse_factor(input_products, damping, name)
    work = weight.to(input_products.dtype, copy=True)
    if keep is None and pattern.kind == "rows":
        energy = (work @ input_products).mul_(work).sum(dim=1, keepdim=True)
        # It cannot be negative; rounding could make it so.
        keep = keep_mask(energy.clamp_(min=0), pattern).expand(work.shape).contiguous()
        return weight.masked_fill(~keep, 0), keep
    if keep is None and pattern.kind == "columns":
        # The whole inverse's diagonal: which column goes is decided before any is gone.
        keep = keep_mask(work.square() * _cost(factor.square().sum(dim=0), input_products), pattern)
    cost = _cost(factor.diagonal().square(), input_products)
    mask = torch.ones(weight.shape, dtype=torch.bool, device=weight.device) if keep is None else keep
    if pattern.kind == "n:m":
        block_columns = -(-block_columns // pattern.of) * pattern.of
    num_columns = work.shape[1]
    for start in range(0, num_columns, block_columns):
        columns = slice(start, min(start + block_columns, num_columns))
        if keep is None and pattern.kind == "unstructured":
            mask[:, columns] = _block_mask(work, cost, pattern.sparsity, columns)
        of = pattern if keep is None and pattern.kind == "n:m" else None
        errors = _remove_columns(work, factor, cost, mask, columns, of)
        work[:, columns.stop :] -= errors @ factor[columns, columns.stop :]
    return work.masked_fill_(~mask, 0).to(weight.dtype), mask


def _inverse_factor(input_products: Tensor, damping: float, name: str) -> Tensor:
    """V, upper triangular, with V^T V = (X^T X + damping)^-1."""
    diagonal = input_products.diagonal()
    mean = diagonal.mean()
    # Nothing measured at all: every input counts the same.
    added = torch.where(mean > 0, damping * mean, 1.0)
    damped = input_products + torch.diag(added.expand(len(diagonal)))
    lower, info = torch.linalg.cholesky_ex(damped.flip(0, 1))
    if int(info):
        raise UserError(
            f"{name}: X^T X of the calibration text is not positive definite with damping {damping}; "
            "allowed: a larger base.prune.damping, or more calibration text."
        )
    eye = torch.eye(len(diagonal), dtype=lower.dtype, device=lower.device)
    factor: Tensor = torch.linalg.solve_triangular(lower, eye, upper=False).flip(0, 1).contiguous()
    return factor


def _cost(inverse_diagonal: Tensor, input_products: Tensor) -> Tensor:
    """What a squared weight of each column costs, (in,): 0 in a dead one, unless nothing was measured at all."""
    dead = input_products.diagonal() == 0
    return inverse_diagonal.reciprocal().masked_fill_(dead & ~dead.all(), 0)


def _block_mask(work: Tensor, cost: Tensor, sparsity: float, columns: slice) -> Tensor:
    """The keep mask of a block of columns over all rows; the counts of all blocks add up to that of the tensor."""
    rows = work.shape[0]
    count = num_pruned(sparsity, rows * columns.stop) - num_pruned(sparsity, rows * columns.start)
    scores = work[:, columns].square() * cost[columns]
    return ~lowest(scores.reshape(1, -1), count).view(scores.shape)


def _remove_columns(
    work: Tensor, factor: Tensor, cost: Tensor, mask: Tensor, columns: slice, n_of_m: SparsityPattern | None
) -> Tensor:
    """Remove the pruned weights of a block and correct its later columns, in place; choose an n:m mask on the way.

    Returns:
        w / V_jj of every removed weight at the time it was removed, (out, columns of the block): what the columns
        behind the block are corrected by.
    """
    errors = torch.empty_like(work[:, columns])
    for column in range(columns.start, columns.stop):
        if n_of_m is not None and column % n_of_m.of == 0:
            group = slice(column, column + n_of_m.of)
            mask[:, group] = ~lowest(work[:, group].square() * cost[group], n_of_m.of - n_of_m.keep)
        error = (work[:, column] / factor[column, column]).masked_fill_(mask[:, column], 0)
        rest = slice(column, columns.stop)
        work[:, rest].addr_(error, factor[column, rest], alpha=-1.0)
        errors[:, column - columns.start] = error
    return errors
