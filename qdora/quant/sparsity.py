"""Sparsity patterns, keep masks with exact counts, and masks as bits.

A pattern cuts the scores of a weight into comparison groups. In each group the same number of entries is pruned, those
of the lowest score; of equal scores the first in the group is pruned first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor

PatternKind = Literal["unstructured", "n:m", "rows", "columns"]
Group = Literal["tensor", "row"]


@dataclass(frozen=True)
class SparsityPattern:
    """The zeros of a pruned weight: any weights, m - n of every m neighbours in a row, or whole outputs or inputs."""

    kind: PatternKind
    sparsity: float  # share of zeros, in [0, 1)
    keep: int = 0  # n of "n:m"
    of: int = 0  # m of "n:m"


def pattern_from(name: str, sparsity: float | None = None) -> SparsityPattern:
    """A pattern by name: "unstructured", "rows", "columns" with a sparsity, or "n:m" (n of m kept), which implies it.

    The names and numbers are those of `base.prune` in a recipe, whose section has checked them.
    """
    if ":" in name:
        keep, of = map(int, name.split(":"))
        return SparsityPattern("n:m", 1 - keep / of, keep, of)
    assert sparsity is not None, "only n:m implies its sparsity"
    return SparsityPattern(cast(PatternKind, name), sparsity)


def num_pruned(sparsity: float, size: int) -> int:
    """Entries to prune in a group of `size`: sparsity * size, rounded to the nearest whole number."""
    return round(sparsity * size)


def check_shape(pattern: SparsityPattern, shape: tuple[int, int], name: str = "weight") -> None:
    """Raise ValueError if a weight (out, in) cannot have the pattern."""
    if pattern.kind == "n:m" and shape[1] % pattern.of:
        raise ValueError(
            f"{name}: pattern {pattern.keep}:{pattern.of} needs in_features divisible by {pattern.of}, got {shape[1]}."
        )


@torch.no_grad()
def lowest(scores: Tensor, count: int) -> Tensor:
    """The `count` lowest entries of each group; of equal entries the first.

    `scores` is (groups, size), float32 or float64, finite. The result, bool, has exactly `count` True in every row.
    """
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
    """The mask (out, in) of a pattern that keeps the highest scores.

    Args:
        scores: Cost of removing each weight, (out, in), finite, not negative. The cost of a row or column is the sum
            over its weights.
        pattern: Its counts are exact: round(sparsity * size) per group are pruned, and m - n of every m.
        group: Of an unstructured pattern: the whole tensor, or each row.
    Raises ValueError: If in_features is no multiple of m.
    """
    rows, columns = scores.shape
    check_shape(pattern, (rows, columns))
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


@torch.no_grad()
def mask_bits(mask: Tensor) -> Tensor:
    """A mask as bits, row by row, the first of eight in the lowest bit: (ceil(out * in / 8),) uint8."""
    flat = torch.nn.functional.pad(mask.reshape(-1), (0, -mask.numel() % 8))
    return (flat.view(-1, 8).to(torch.uint8) * _bits(mask.device)).sum(dim=1, dtype=torch.uint8)


@torch.no_grad()
def mask_from_bits(bits: Tensor, shape: tuple[int, int], rows: slice | None = None) -> Tensor:
    """The inverse of `mask_bits`, or some of its rows: (rows, in) bool. Raises ValueError if the sizes differ."""
    numel = shape[0] * shape[1]
    if bits.dtype != torch.uint8 or bits.shape != (-(-numel // 8),):
        raise ValueError(f"a mask of {shape} must be ({-(-numel // 8)},) uint8, got {tuple(bits.shape)} {bits.dtype}.")
    first, last = (0, shape[0]) if rows is None else (rows.start, rows.stop)
    start, stop = first * shape[1], last * shape[1]
    flat = (bits[start // 8 : -(-stop // 8), None] & _bits(bits.device)).ne(0).view(-1)
    return flat[start % 8 : start % 8 + stop - start].view(last - first, shape[1])


def _bits(device: torch.device) -> Tensor:
    """1, 2, 4, ... 128, (8,) uint8. Made there: sending numbers to a GPU would make the host wait."""
    return 1 << torch.arange(8, dtype=torch.uint8, device=device)
