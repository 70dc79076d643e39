"""Several short examples in one row: fewer, fuller rows, and where each example lies in its row."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from qdora.data.tokenize import TokenizedExample

PackedLayout = Literal["rows", "single"]
"""rows: several packed rows in a micro-batch, padded to its longest. single: one row is a whole micro-batch and has no
padding, as attention kernels for variable lengths take it."""


@dataclass(frozen=True, slots=True)
class PackedRow:
    """Examples that stand one behind the other in a row.

    Attributes:
        examples: At least one; the first token of none of them is a label, so nothing is predicted across a border.
    """

    examples: tuple[TokenizedExample, ...]

    def __len__(self) -> int:
        """Tokens of all its examples."""
        return sum(map(len, self.examples))


def packed_rows(examples: Sequence[TokenizedExample], row_tokens: int) -> list[PackedRow]:
    """Best fit, decreasing: the longest example first, each into the fullest row that still has room for it.

    Never more than 3/2 of the fewest possible rows (Simchi-Levi, 1994), nor 11/9 of them plus 4 (Johnson, 1974). The
    same examples in the same order give the same rows.

    Args:
        examples: Of one step.
        row_tokens: Most tokens of a row; a longer example is a row of its own.
    Returns:
        The rows, in the order of their longest examples. Every example is in exactly one.
    """
    rows: list[list[TokenizedExample]] = []
    free: list[tuple[int, int]] = []  # (tokens left, row), sorted: of equally full rows the oldest is first
    for example in sorted(examples, key=len, reverse=True):
        place = bisect_left(free, (len(example), 0))
        if place < len(free):
            left, row = free.pop(place)
            rows[row].append(example)
        else:
            left, row = row_tokens, len(rows)
            rows.append([example])
        insort(free, (left - len(example), row))
    return [PackedRow(tuple(row)) for row in rows]
