"""Pruning a dense weight by magnitude, Wanda or SparseGPT, rounding by GPTQ, and the statistics that these measure.

    magnitude   removing w_ij costs w_ij^2
    Wanda       w_ij^2 ||x_j||^2           inputs x measured on calibration text
    SparseGPT   w_ij^2 / [H^-1]_jj         and the weights that stay are corrected, see `sweep`
    GPTQ        rounds instead of removing, with the same correction

A pattern cuts the costs into groups. In each the same number of weights is pruned, the cheapest ones; of equal ones the
first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from qdora.errors import UserError
from qdora.prune.grid import Grid, nearest
from qdora.quant import codebooks

DAMPING = 0.01
"""Added to H's diagonal, as a fraction of its mean. Source: SparseGPT, arXiv 2301.00774, sec. 4."""
BLOCK_COLUMNS = 128
"""Columns whose mask SparseGPT chooses together. Source: SparseGPT, arXiv 2301.00774, sec. 3.3 and 4."""
# That a rounding error reaches at once; those of a block at 128 would move 5 times the bytes
_INNER_COLUMNS = 16
# Entries whose squares are formed at a time when a statistic is added up: 64 MiB of float32.
_ENTRIES_PER_SLICE = 1 << 24
SCORES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "magnitude": lambda weight, _: weight.square(),
    "wanda": lambda weight, squares: weight.square().mul_(squares),
}
"""Method -> what removing each weight costs, (out, in), by the weights, at least float32, and by ||x_j||^2 over the
largest of them, (in,); these are 1 if none was measured. Wanda: arXiv 2306.11695, eq. 1."""


@dataclass(frozen=True)
class SparsityPattern:
    """The zeros of a pruned weight: any weights, or m - n of every m neighbours in a row."""

    sparsity: float  # fraction of zeros, in [0, 1)
    keep: int = 1  # n of "n:m"
    of: int = 1  # m of "n:m"; 1 if any weights


def pattern_from(name: str, sparsity: float | None = None) -> SparsityPattern:
    """A pattern by its name in `base.prune.pattern`; n:m (n of m kept) implies its sparsity."""
    if ":" in name:
        keep, of = map(int, name.split(":"))
        return SparsityPattern(1 - keep / of, keep, of)
    assert sparsity is not None
    return SparsityPattern(sparsity)


def check_shape(pattern: SparsityPattern, shape: tuple[int, int], name: str = "weight") -> None:
    """Refuse a weight (out, in) that cannot have the pattern."""
    if shape[1] % pattern.of:
        raise UserError(
            f"base.prune.pattern: {name}: pattern {pattern.keep}:{pattern.of} needs in_features divisible by "
            f"{pattern.of}, got {shape[1]}. Fix: leave such layers out with base.skip."
        )


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
def keep_mask(scores: Tensor, pattern: SparsityPattern, group: str = "row") -> Tensor:
    """The mask (out, in) of a pattern that keeps the highest `scores`, (out, in), finite, not negative. `group` is that
    of an unstructured pattern."""
    scores = scores if scores.dtype == torch.float64 else scores.float()
    if pattern.of > 1:
        return ~lowest(scores.reshape(-1, pattern.of), pattern.of - pattern.keep).view(scores.shape)
    groups = scores if group == "row" else scores.reshape(1, -1)
    return ~lowest(groups, num_pruned(pattern.sparsity, groups.shape[1])).view(scores.shape)


class InputStatistics:
    """Sums over a layer's inputs, float32: of all products, X^T X, or only of the squares of each column."""

    def __init__(self, in_features: int, device: torch.device | str, products: bool) -> None:
        shape = (in_features, in_features) if products else (in_features,)
        self.sums = torch.zeros(shape, dtype=torch.float32, device=device)
        self._factor: Tensor | None = None

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

    def inverse_factor(self, order: Tensor | None, damping: float, name: str) -> Tensor:
        """V, upper triangular, with V^T V = (X^T X + damping)^-1, the columns in `order`; made once.

        Layers with the same inputs share it. It takes the room of X^T X: `sums` are its diagonal from then on.
        """
        if self._factor is None:
            products, diagonal = self.sums, self.sums.diagonal()
            mean = diagonal.mean()
            # If nothing was measured, every input counts the same.
            added = torch.where(mean > 0, damping * mean, 1.0)
            self.sums = diagonal.clone()
            flipped = products.flip(0, 1) if order is None else products[order.flip(0)][:, order.flip(0)]
            del products, diagonal
            flipped.diagonal().add_(added)
            lower, info = torch.linalg.cholesky_ex(flipped)
            del flipped
            if int(info):
                what = f"X^T X with {damping} of its mean on the diagonal is not positive definite."
                raise UserError(f"{name}: {what} Fix: measure more text, or raise base.prune.damping.")
            eye = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
            inverse: Tensor = torch.linalg.solve_triangular(lower, eye, upper=False)
            del lower, eye
            self._factor = inverse.flip(0, 1).contiguous()
        return self._factor


class Pruned(NamedTuple):
    """A pruned weight, (out, in), exactly 0 where `keep_mask` is False, or its codes."""

    weight: Tensor
    keep_mask: Tensor


def check_finite(weight: Tensor, statistics: InputStatistics | None, name: str) -> None:
    """Refuse a weight and measured inputs that cannot be compared."""
    if not bool(weight.isfinite().all()):
        raise UserError(
            f"{name}: has weights that are not finite (NaN or infinite) and cannot be pruned or quantised."
        )
    if statistics is not None and not bool(statistics.sums.isfinite().all()):
        raise UserError(
            f"{name}: the inputs measured on the calibration text are not finite (NaN or infinite)."
        )


@torch.no_grad()
def mask_by_scores(
    method: str, weight: Tensor, statistics: InputStatistics | None, pattern: SparsityPattern, group: str
) -> Tensor:
    """The keep mask (out, in) by a method of `SCORES`; `group` as in base.prune. If all inputs are 0 (an expert without
    tokens), columns count the same."""
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    squares = torch.ones_like(wide[0])
    if statistics is not None and (largest := statistics.column_squares.max()) != 0:
        # Divided by the largest: sums over many tokens would leave float32's range.
        squares = statistics.column_squares.to(wide.dtype) / largest
    scores = SCORES[method](wide, squares)
    del wide  # of a weight in 16 bits a copy
    if group == "auto":
        group = "tensor" if statistics is None else "row"
    return keep_mask(scores, pattern, group)


@torch.no_grad()
def sweep(
    weight: Tensor,
    statistics: InputStatistics,
    pattern: SparsityPattern | None = None,
    mask: Tensor | None = None,
    grid: Grid | None = None,
    *,
    damping: float = DAMPING,
    name: str = "weight",
) -> Pruned:
    """Prune by `pattern` or `mask` and round to `grid`, column by column, each error moved to the columns behind it.

    With H = X^T X + damping, and V upper triangular with H^-1 = V^T V, lowering w_ij by e costs e^2 / V_jj^2, and
    w_i,j: -= (e / V_jj) V_j,j: compensates best. e is w_ij where it is removed, else its distance to the grid. Source:
    SparseGPT, arXiv 2301.00774, sec. 3, algorithm 1, and 3.5 for both; GPTQ, arXiv 2210.17323, algorithm 1.

    An unstructured mask is chosen for `BLOCK_COLUMNS` columns at a time, from the weights as corrected so far; an n:m
    mask for m columns. With a grid the columns come in descending order of H's diagonal, for n:m in groups of m.

    Returns, (out, in) each, the weight in its dtype, or with a grid uint8 codes, and the keep mask.
    """
    (rows, num_columns), dtype = weight.shape, statistics.sums.dtype
    of = 1 if pattern is None else pattern.of
    block_columns = inner_columns = -(-BLOCK_COLUMNS // of) * of
    if grid is None:
        factor, work = statistics.inverse_factor(None, damping, name), weight.to(dtype, copy=True)
        squares = statistics.column_squares
    else:  # transposed in memory, so that a column is contiguous
        groups = statistics.column_squares.reshape(-1, of).sum(dim=1).argsort(descending=True, stable=True)
        order = (groups[:, None] * of + torch.arange(of, device=groups.device)).view(-1)
        factor, work = statistics.inverse_factor(order, damping, name), weight.T[order].to(dtype).T
        squares, mask = statistics.column_squares[order], None if mask is None else mask.T[order].T
        inner_columns, zero_code = -(-_INNER_COLUMNS // of) * of, codebooks.zero_code(grid.kind)
        codes = torch.empty(num_columns, rows, dtype=torch.uint8, device=weight.device)
    if mask is None:
        mask = torch.ones_like(work, dtype=torch.bool)
    cost = _cost(factor.diagonal().square(), squares)
    for start in range(0, num_columns, block_columns):
        columns = slice(start, min(start + block_columns, num_columns))
        if pattern is not None and of == 1:  # the counts of all blocks add up to that of the tensor
            before, after = (num_pruned(pattern.sparsity, rows * end) for end in (columns.start, columns.stop))
            scores = work[:, columns].square() * cost[columns]
            mask[:, columns] = ~lowest(scores.reshape(1, -1), after - before).view(scores.shape)
        if grid is not None:
            scales = grid.scales_of(rows, num_columns, order[columns])
        errors = torch.empty_like(work[:, columns])  # e / V_jj of every weight
        for first in range(columns.start, columns.stop, inner_columns):
            inner = slice(first, min(first + inner_columns, columns.stop))
            for column in range(first, inner.stop):
                if pattern is not None and of > 1 and column % of == 0:
                    group = slice(column, column + of)
                    mask[:, group] = ~lowest(work[:, group].square() * cost[group], of - pattern.keep)
                gone, point = ~mask[:, column], work[:, column]
                if grid is not None:
                    codes[column], point = nearest(point, scales[column - start], grid.kind, grid.values)
                    codes[column].masked_fill_(gone, zero_code)
                error = (work[:, column] - point.masked_fill(gone, 0)) / factor[column, column]
                rest = slice(column, inner.stop)
                work[:, rest].addr_(error, factor[column, rest], alpha=-1.0)
                errors[:, column - start] = error
            behind = slice(inner.stop, columns.stop)
            work[:, behind] -= errors[:, first - start : inner.stop - start] @ factor[inner, behind]
        work[:, columns.stop :] -= errors @ factor[columns, columns.stop :]
    if grid is None:
        return Pruned(work.masked_fill_(~mask, 0).to(weight.dtype), mask)
    back = order.argsort()
    return Pruned(codes[back].T.contiguous(), mask.T[back].T.contiguous())


def _cost(inverse_diagonal: Tensor, squares: Tensor) -> Tensor:
    """The cost of a squared weight of each column, (in,): 0 in a dead column, unless all are dead."""
    dead = squares == 0
    return inverse_diagonal.reciprocal().masked_fill_(dead & ~dead.all(), 0)
