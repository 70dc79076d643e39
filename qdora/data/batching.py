"""The examples of a step as micro-batches: grouped by length, or several packed into one row."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence, Sized
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from qdora.data.tokenize import TokenizedExample

PackedLayout = Literal["rows", "single"]
"""rows: several packed rows in a micro-batch, padded to its longest. single: one row is a whole micro-batch and has no
padding, as attention kernels for variable lengths take it."""


@dataclass(frozen=True, slots=True)
class PackedRow:
    """Examples behind each other in a row. The first token of each is no label: none is predicted across a border."""

    examples: tuple[TokenizedExample, ...]

    def __len__(self) -> int:
        return sum(map(len, self.examples))


def packed_rows(examples: Sequence[TokenizedExample], row_tokens: int) -> list[PackedRow]:
    """Best fit, decreasing: the longest example first, each into the fullest row that still has room for it.

    Never more than 3/2 of the fewest possible rows (Simchi-Levi, 1994), nor 11/9 of them plus 4 (Johnson, 1974). The
    same examples in the same order give the same rows.

    Args:
        row_tokens: Most tokens of a row; a longer example is a row of its own.
    Returns: The rows, in the order of their longest examples. Every example is in exactly one.
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


Row = TypeVar("Row", bound=Sized)

IGNORED = -100
"""Label of a token that does not count, as in transformers."""
GROUP_COST = 128
"""Cost of a micro-batch apart from its tokens, in tokens: each dequantises the base two or three times. An estimate for
a 7B model on an A100: 40 ms of memory traffic against 0.3 ms a token."""
ATTENTION_COST = 4096
"""Length of a row at which attention takes as long as all other products. A mask over the row does not reduce what is
multiplied. An estimate: counting products alone, 3,100 for SmolLM2-135M and 24,700 for a 7B model; attention is slower
than its count of products says."""


@dataclass(frozen=True)
class Packing:
    """Where the examples of packed rows lie.

    Attributes:
        position_ids: (rows, length) int64, counted from 0 in each example and again in the padding behind the last
            one: for the model the padding is one more example.
        example_index: (rows, length) int64, the token's example as its place in `MicroBatch.example_ids`; -1 in
            padding.
    """

    position_ids: Tensor
    example_index: Tensor


@dataclass(frozen=True)
class MicroBatch:
    """Examples of one forward pass, padded on the right. Without packing each is a row.

    Attributes:
        input_ids, attention_mask: (rows, length) int64.
        labels: (rows, length) int64, the token's own id where it counts and -100 elsewhere; not shifted.
        task_ids: (examples,) int64, into `task_names`.
        task_names: All tasks of the loader, the same list in every micro-batch.
        packing: Which tokens are whose, or None where a row is an example.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    task_ids: Tensor
    task_names: list[str]
    example_ids: list[str]
    packing: Packing | None = None

    def examples(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """(id, input ids, labels) of each example, (length,) int64 both, without padding."""
        for index, name in enumerate(self.example_ids):
            if self.packing is None:
                row, mine = index, self.attention_mask[index].bool()
            else:
                here = self.packing.example_index == index
                row = int(here.any(dim=1).nonzero()[0])
                mine = here[row]
            yield name, self.input_ids[row, mine], self.labels[row, mine]


@dataclass
class Batching:
    """How the examples of a step become micro-batches.

    Attributes:
        max_tokens: Most tokens of a micro-batch, padding counted; a longer example is a micro-batch of its own.
        pad_id: Token in padded places.
        packed: Layout of packed rows; None: each row is one example.
        row_tokens: Most tokens of a packed row in the layout "rows"; never more than `max_tokens`. Rows are shorter
            where that costs less, see `ATTENTION_COST`.
    """

    max_tokens: int
    pad_id: int
    packed: PackedLayout | None = None
    row_tokens: int | None = None


def micro_batches(
    examples: Sequence[TokenizedExample], batching: Batching, task_names: Sequence[str]
) -> list[MicroBatch]:
    """The examples of a step, or of a process's share of one, in micro-batches, the longest rows first."""
    if batching.packed is None:
        alone = [PackedRow((example,)) for example in examples]
        groups = micro_groups(alone, batching.max_tokens)
    elif batching.packed == "single":
        rows = packed_rows(examples, batching.max_tokens)
        groups = [[row] for row in sorted(rows, key=len, reverse=True)]
    else:
        most = batching.max_tokens if batching.row_tokens is None else min(batching.row_tokens, batching.max_tokens)
        choices = (micro_groups(packed_rows(examples, room), batching.max_tokens) for room in _rooms(examples, most))
        groups = min(choices, key=_cost)
    return [_micro_batch(group, batching, list(task_names)) for group in groups]


def micro_groups(rows: Sequence[Row], max_tokens: int) -> list[list[Row]]:
    """The rows sorted by length, longest first (equal lengths in their old order), cut into micro-batches.

    The cuts minimise the sum over groups of rows * longest row + GROUP_COST. On the eight commonsense tasks, steps of
    4,096 tokens in micro-batches of at most 2,048 get 0.11 tokens of padding for each real one; groups that are filled
    one after the other get 0.36 (five groups a step instead of three).

    Args:
        max_tokens: Most tokens of a group, padding counted, unless it is a single longer row.
    """
    ordered = sorted(rows, key=len, reverse=True)
    lengths = np.array([len(row) for row in ordered], dtype=np.int64)
    cost = np.zeros(len(ordered) + 1, dtype=np.int64)  # least cost of the first `end` rows
    cuts = np.zeros(len(ordered) + 1, dtype=np.int64)  # where the last of their groups begins
    for end in range(1, len(ordered) + 1):
        counts = np.arange(end, 0, -1)  # of a group that begins at 0, 1, ..., end - 1
        padded = counts * lengths[:end]
        allowed = (padded <= max_tokens) | (counts == 1)
        total = np.where(allowed, cost[:end] + padded + GROUP_COST, np.iinfo(np.int64).max)
        cuts[end] = total.argmin()
        cost[end] = total[cuts[end]]
    groups: list[list[Row]] = []
    end = len(ordered)
    while end > 0:
        groups.append(ordered[cuts[end] : end])
        end = int(cuts[end])
    return groups[::-1]


def _rooms(examples: Sequence[TokenizedExample], most: int) -> list[int]:
    """Lengths of a packed row to choose from: that of the longest example, half as many tokens more, ..., `most`."""
    rooms, room = [most], max(map(len, examples), default=most)
    while room < most:
        rooms.append(room)
        room += -(-room // 2)
    return rooms


def _cost(groups: Sequence[Sequence[PackedRow]]) -> float:
    """Cost of a step whose attention runs over whole rows, in tokens of its other products."""
    shapes = [(len(group), max(map(len, group))) for group in groups]
    return sum(rows * width * (1 + width / ATTENTION_COST) + GROUP_COST for rows, width in shapes)


def _micro_batch(rows: Sequence[PackedRow], batching: Batching, task_names: list[str]) -> MicroBatch:
    shape = len(rows), max(map(len, rows))
    input_ids = np.full(shape, batching.pad_id, dtype=np.int64)
    labels = np.full(shape, IGNORED, dtype=np.int64)
    position_ids = np.zeros(shape, dtype=np.int64)
    example_index = np.full(shape, -1, dtype=np.int64)
    examples: list[TokenizedExample] = []
    for number, row in enumerate(rows):
        start = 0
        for example in row.examples:
            assert not example.loss_mask[0], example.id
            here = number, slice(start, start + len(example))
            input_ids[here] = example.input_ids
            labels[here] = np.where(example.loss_mask, example.input_ids, IGNORED)
            position_ids[here] = np.arange(len(example))
            example_index[here] = len(examples)
            examples.append(example)
            start += len(example)
        position_ids[number, start:] = np.arange(shape[1] - start)
    packing = Packing(torch.from_numpy(position_ids), torch.from_numpy(example_index))
    return MicroBatch(
        input_ids=torch.from_numpy(input_ids),
        attention_mask=torch.from_numpy((example_index >= 0).astype(np.int64)),
        labels=torch.from_numpy(labels),
        task_ids=torch.tensor([task_names.index(example.task) for example in examples], dtype=torch.int64),
        task_names=task_names,
        example_ids=[example.id for example in examples],
        packing=None if batching.packed is None else packing,
    )
