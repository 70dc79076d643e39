"""Pruning a dense weight by magnitude, Wanda or SparseGPT, and the statistics of inputs that two of them need.

    magnitude   removing w_ij costs w_ij^2
    Wanda       w_ij^2 ||x_j||^2           inputs x measured on calibration text
    SparseGPT   w_ij^2 / [H^-1]_jj         and the weights that stay are corrected, see `sparsegpt`

A pattern cuts the costs into groups. In each the same number of weights is pruned, the cheapest ones; of equal ones the
first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor

from qdora.errors import UserError

DAMPING = 0.01
"""Added to H's diagonal, as a fraction of its mean. Source: SparseGPT, arXiv 2301.00774, sec. 4."""
BLOCK_COLUMNS = 128
"""Columns whose mask SparseGPT chooses together. Source: SparseGPT, arXiv 2301.00774, sec. 3.3 and 4."""
# Entries whose squares are formed at a time when a statistic is added up: 64 MiB of float32.
_ENTRIES_PER_SLICE = 1 << 24
PatternKind = Literal["unstructured", "n:m", "rows", "columns"]
Group = Literal["tensor", "row"]


@dataclass(frozen=True)
class SparsityPattern:
    """The zeros of a pruned weight: any weights, m - n of every m neighbours in a row, or whole outputs or inputs."""

    kind: PatternKind
    sparsity: float  # fraction of zeros, in [0, 1)
    keep: int = 0  # n of "n:m"
    of: int = 0  # m of "n:m"


def pattern_from(name: str, sparsity: float | None = None) -> SparsityPattern:
    """A pattern by its name in `base.prune.pattern`; n:m (n of m kept) implies its sparsity."""
    if ":" in name:
        keep, of = map(int, name.split(":"))
        return SparsityPattern("n:m", 1 - keep / of, keep, of)
    assert sparsity is not None
    return SparsityPattern(cast(PatternKind, name), sparsity)


def check_shape(pattern: SparsityPattern, shape: tuple[int, int], name: str = "weight") -> None:
    """Refuse a weight (out, in) that cannot have the pattern."""
    if pattern.kind == "n:m" and shape[1] % pattern.of:
        what = f"pattern {pattern.keep}:{pattern.of} needs in_features divisible by {pattern.of}, got {shape[1]}"
        raise UserError(f"base.prune.pattern: {name}: {what}. Fix: leave such layers out with base.skip.")


def num_pruned(sparsity: float, size: int) -> int:
    """Entries to prune in a group of `size`: sparsity * size, rounded to the nearest whole number."""
    return round(sparsity * size)


@torch.no_grad()
def lowest(scores: Tensor, count: int) -> Tensor:
    """The `count` lowest entries of each group, (groups, size) float32 or float64, finite: bool, exactly `count` True
    in every row, of equal entries the first."""
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    threshold = scores.kthvalue(count, dim=1, keepdim=True).values
    chosen = scores <= threshold
    surplus = chosen.sum(dim=1) - count
    tied_groups = surplus.nonzero().squeeze(1)
    if len(tied_groups):
        some, limit = scores[tied_groups], threshold[tied_groups]
        below, tied = some < limit, some == limit
        wanted = count - below.sum(dim=1, keepdim=True)
        chosen[tied_groups] = below | (tied & (tied.cumsum(dim=1) <= wanted))
    return chosen


@torch.no_grad()
def keep_mask(scores: Tensor, pattern: SparsityPattern, group: Group = "row") -> Tensor:
    """The mask (out, in) of a pattern that keeps the highest `scores`, (out, in), finite, not negative; that of a row
    or column is the sum over its weights. `group` is that of an unstructured pattern."""
    rows, columns = scores.shape
    scores = scores if scores.dtype == torch.float64 else scores.float()
    if pattern.kind == "n:m":
        groups = scores.reshape(-1, pattern.of)
        return ~lowest(groups, pattern.of - pattern.keep).view(rows, columns)
    if pattern.kind == "rows":
        pruned = lowest(scores.sum(dim=1)[None], num_pruned(pattern.sparsity, rows))
        return (~pruned).T.expand(rows, columns).contiguous()
    if pattern.kind == "columns":
        pruned = lowest(scores.sum(dim=0)[None], num_pruned(pattern.sparsity, columns))
        return (~pruned).expand(rows, columns).contiguous()
    groups = scores if group == "row" else scores.reshape(1, -1)
    return ~lowest(groups, num_pruned(pattern.sparsity, groups.shape[1])).view(rows, columns)


class InputStatistics:
    """Statistics of a layer's inputs, float32: for "wanda" the squares of each column, for "sparsegpt" X^T X."""

    def __init__(self, in_features: int, method: Literal["wanda", "sparsegpt"], device: torch.device | str) -> None:
        shape = (in_features,) if method == "wanda" else (in_features, in_features)
        self.sums = torch.zeros(shape, dtype=torch.float32, device=device)

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

    @property
    def column_squares(self) -> Tensor:
        """||x_j||^2 of each column, (in,) float32."""
        return self.sums if self.sums.ndim == 1 else self.sums.diagonal()


class Pruned(NamedTuple):
    """A pruned weight: (out, in) in its dtype, exactly 0 where `keep_mask` (out, in) is False."""

    weight: Tensor
    keep_mask: Tensor


@torch.no_grad()
def prune_weight(
    weight: Tensor,
    method: Literal["magnitude", "wanda", "sparsegpt"],
    pattern: SparsityPattern,
    *,
    statistics: InputStatistics | None = None,
    group: Group | None = None,
    damping: float = DAMPING,
    name: str = "weight",
) -> Pruned:
    """Prune a dense weight, (out, in) in any float dtype, which does not change.

    `group` are the weights that an unstructured pattern compares (default: the whole tensor for magnitude, each row for
    Wanda, its paper, sec. 3); sparsegpt compares within blocks of columns.
    """
    if not bool(weight.isfinite().all()):
        raise UserError(f"{name}: has weights that are not finite (NaN or infinite) and cannot be pruned.")
    if statistics is not None and not bool(statistics.sums.isfinite().all()):
        raise UserError(f"{name}: the inputs measured on the calibration text are not finite (NaN or infinite).")
    check_shape(pattern, (weight.shape[0], weight.shape[1]), name)
    if method == "sparsegpt":
        assert statistics is not None
        return sparsegpt(weight, statistics.sums, pattern, damping=damping, name=name)
    keep = mask_by_scores(weight, statistics, pattern, group)
    return Pruned(weight.masked_fill(~keep, 0), keep)


@torch.no_grad()
def mask_by_scores(
    weight: Tensor, statistics: InputStatistics | None, pattern: SparsityPattern, group: Group | None = None
) -> Tensor:
    """The keep mask (out, in) by Wanda (arXiv 2306.11695, eq. 1); without statistics by magnitude. If all are 0 (an
    expert without tokens), columns count the same."""
    scores = weight.to(torch.promote_types(weight.dtype, torch.float32)).square()
    if statistics is None:
        return keep_mask(scores, pattern, group or "tensor")
    squares = statistics.column_squares
    largest = squares.max()
    if largest != 0:
        # Divided by the largest: sums over many tokens would leave float32's range.
        scores.mul_(squares.to(scores.dtype) / largest)
    return keep_mask(scores, pattern, group or "row")


@torch.no_grad()
def sparsegpt(
    weight: Tensor, input_products: Tensor, pattern: SparsityPattern, *, damping: float = DAMPING, name: str = "weight"
) -> Pruned:
    """Remove weights column by column, and move each error on to the columns behind it.

    With H = X^T X + damping, and V upper triangular with H^-1 = V^T V, removing w_ij costs w_ij^2 / V_jj^2, and w_i,j:
    -= (w_ij / V_jj) V_j,j: compensates best. Source: SparseGPT, arXiv 2301.00774, sec. 3 and algorithm 1.

    An unstructured mask is chosen for `BLOCK_COLUMNS` columns at a time, from the weights as corrected so far; an n:m
    mask for m columns; whole columns before the first is removed. Whole rows leave nothing to correct. `input_products`
    are X^T X, (in, in), float32 or float64.
    """
    factor = _inverse_factor(input_products, damping, name)
    work = weight.to(input_products.dtype, copy=True)
    if pattern.kind == "rows":
        energy = (work @ input_products).mul_(work).sum(dim=1, keepdim=True)
        keep = keep_mask(energy.clamp_(min=0), pattern).expand(work.shape).contiguous()
        return Pruned(weight.masked_fill(~keep, 0), keep)
    if pattern.kind == "columns":
        mask = keep_mask(work.square() * _cost(factor.square().sum(dim=0), input_products), pattern)
    else:
        mask = torch.ones(weight.shape, dtype=torch.bool, device=weight.device)
    cost = _cost(factor.diagonal().square(), input_products)
    num_columns, block_columns = work.shape[1], BLOCK_COLUMNS
    if pattern.kind == "n:m":
        block_columns = -(-block_columns // pattern.of) * pattern.of
    for start in range(0, num_columns, block_columns):
        columns = slice(start, min(start + block_columns, num_columns))
        if pattern.kind == "unstructured":  # the counts of all blocks add up to that of the tensor
            before, after = (num_pruned(pattern.sparsity, len(work) * end) for end in (columns.start, columns.stop))
            scores = work[:, columns].square() * cost[columns]
            mask[:, columns] = ~lowest(scores.reshape(1, -1), after - before).view(scores.shape)
        errors = torch.empty_like(work[:, columns])  # w / V_jj of every removed weight at its removal
        for column in range(columns.start, columns.stop):
            if pattern.kind == "n:m" and column % pattern.of == 0:
                group = slice(column, column + pattern.of)
                mask[:, group] = ~lowest(work[:, group].square() * cost[group], pattern.of - pattern.keep)
            error = (work[:, column] / factor[column, column]).masked_fill_(mask[:, column], 0)
            rest = slice(column, columns.stop)
            work[:, rest].addr_(error, factor[column, rest], alpha=-1.0)
            errors[:, column - columns.start] = error
        work[:, columns.stop :] -= errors @ factor[columns, columns.stop :]
    return Pruned(work.masked_fill_(~mask, 0).to(weight.dtype), mask)


def _inverse_factor(input_products: Tensor, damping: float, name: str) -> Tensor:
    """V, upper triangular, with V^T V = (X^T X + damping)^-1."""
    diagonal = input_products.diagonal()
    mean = diagonal.mean()
    # If nothing was measured, every input counts the same.
    added = torch.where(mean > 0, damping * mean, 1.0)
    damped = input_products + torch.diag(added.expand(len(diagonal)))
    lower, info = torch.linalg.cholesky_ex(damped.flip(0, 1))
    if int(info):
        raise UserError(f"{name}: base.prune.damping: {damping} leaves X^T X not positive definite. Fix: raise it.")
    eye = torch.eye(len(diagonal), dtype=lower.dtype, device=lower.device)
    factor: Tensor = torch.linalg.solve_triangular(lower, eye, upper=False).flip(0, 1).contiguous()
    return factor


def _cost(inverse_diagonal: Tensor, input_products: Tensor) -> Tensor:
    """The cost of a squared weight of each column, (in,): 0 in a dead column, unless all are dead."""
    dead = input_products.diagonal() == 0
    return inverse_diagonal.reciprocal().masked_fill_(dead & ~dead.all(), 0)
