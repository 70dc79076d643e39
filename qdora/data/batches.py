"""Optimizer steps: which examples each takes, this process's share of them, and their micro-batches."""

from __future__ import annotations

import hashlib
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from qdora.data.mix import Mix
from qdora.data.stream import ExampleStream
from qdora.data.tokenize import TokenizedExample
from qdora.errors import UserError

IGNORED = -100  # label of a token that does not count, as in transformers
GROUP_COST = 128
"""Cost of a micro-batch apart from its tokens, in tokens, estimated for a 7B model on an A100: 40 ms to dequantise the
base two or three times, 0.3 ms a token."""
ATTENTION_COST = 4096
"""Length of a row at which attention takes as long as all other products, estimated; counting products alone 3,100 for
SmolLM2-135M and 24,700 for a 7B model."""


# Steps


@dataclass(frozen=True)
class Step:
    """One optimizer step. Counts are over all processes."""

    micro_batches: list[MicroBatch]  # this process's share; longest first, so that too large ones fail at once
    num_label_tokens: int  # at least 1: the denominator of the loss
    num_tokens: int  # without padding
    num_examples: int
    task_label_tokens: Mapping[str, int] = field(default_factory=dict)


class StepSize(NamedTuple):
    """A step that may be taken."""

    position: int  # where it begins
    num_examples: int
    num_tokens: int
    longest: int  # tokens of its longest example


@dataclass
class StepLoader:
    """Optimizer steps from a position in an order; the position is all of its state.

    A step takes `batch` examples, or examples until it has at least `tokens_per_step` real tokens, whatever the
    `batching`. All processes draw the same steps; each pads its share.
    """

    mix: Mix
    batching: Batching
    tokens_per_step: int | None = None
    batch: int | None = None
    rank: int = 0
    num_processes: int = 1
    position: int = 0

    def __post_init__(self) -> None:
        self.tokenised, self.order = self.mix.sets, self.mix.order
        self.streams = [part for part in self.tokenised if isinstance(part, ExampleStream)]
        self.task_names = list(dict.fromkeys(name for part in self.tokenised for name in part.task_names))

    def next_step(self) -> Step:
        examples: list[TokenizedExample] = []
        num_tokens = 0
        while (
            not self._is_full(len(examples), num_tokens) and self.position + len(examples) != self.order.length
        ):
            source, index = self.order[self.position + len(examples)]
            part = self.tokenised[source]
            examples.append(part.next() if isinstance(part, ExampleStream) else part.examples[index])
            num_tokens += len(examples[-1])
        self.position += len(examples)
        labels = Counter[str]()
        for example in examples:
            labels[example.task] += int(example.loss_mask.sum())
        mine = share_of(examples, self.rank, self.num_processes)
        batches = micro_batches(mine, self.batching, self.task_names)
        return Step(batches, labels.total(), num_tokens, len(examples), labels)

    def _is_full(self, num_examples: int, num_tokens: int) -> bool:
        return num_tokens >= (self.tokens_per_step or 0) if self.batch is None else num_examples >= self.batch

    # Steps that are not taken yet

    def steps_for_epochs(self, epochs: float) -> int:
        """Steps from position 0 until `epochs` * (examples of all sources that are drawn) are used, at least 1."""
        drawn = (size or 0 for size, cap in zip(self.order.sizes, self.order.caps, strict=True) if cap != 0)
        num_draws = max(1, round(epochs * sum(drawn)))
        num_draws = min(num_draws, self.order.length or num_draws)
        return (
            -(-num_draws // self.batch)
            if self.batch is not None
            else sum(1 for _ in self._step_sizes(num_draws))
        )

    def draws_for_steps(self, num_steps: int) -> int | None:
        """Draws of the first steps; None where steps count the tokens of a stream."""
        length = self.order.length
        if self.batch is not None:
            num_draws, possible = (
                num_steps * self.batch,
                num_steps if length is None else -(-length // self.batch),
            )
        elif not self.streams:
            sizes = self.step_sizes(num_steps)
            num_draws, possible = sum(size.num_examples for size in sizes), len(sizes)
        elif length is None:
            return None
        else:
            raise UserError(
                "train.tokens_per_step: with max_epochs for every source and a stream steps have no end."
            )
        if num_steps > possible:
            left = f"because max_epochs of the sources leaves {length:,} examples"
            raise UserError(f"train.steps: must be at most {possible:,}, {left}, got {num_steps:,}.")
        return num_draws if length is None else min(num_draws, length)

    def step_sizes(self, num_steps: int) -> list[StepSize]:
        """The first steps of the order. Not for streams."""
        return list(islice(self._step_sizes(self.order.length), num_steps))

    def _step_sizes(self, num_draws: int | None) -> Iterator[StepSize]:
        position = num_examples = num_tokens = longest = 0
        for length in islice(self._drawn_lengths(), num_draws):
            num_examples, num_tokens, longest = num_examples + 1, num_tokens + length, max(longest, length)
            if self._is_full(num_examples, num_tokens):
                yield StepSize(position, num_examples, num_tokens, longest)
                position, num_examples, num_tokens, longest = position + num_examples, 0, 0, 0
        if num_examples:
            yield StepSize(position, num_examples, num_tokens, longest)

    def _drawn_lengths(self) -> Iterator[int]:
        start, end = 0, self.order.length
        while start != end:
            stop = start + 65536 if end is None else min(start + 65536, end)
            for source, index in zip(*(each.tolist() for each in self.order.draws(start, stop)), strict=True):
                yield len(self.tokenised[source].examples[index])
            start = stop

    # Resuming

    def state_dict(self) -> dict[str, Any]:
        """Positions, and what these are positions in; JSON types."""
        streams = {part.name: part.state_dict() for part in self.streams}
        state = {"position": self.position, "fingerprint": dict(self.fingerprint)}
        return state | ({"streams": streams} if streams else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.check_state(state)
        self.position = int(state["position"])
        if not 0 <= self.position < 2**53:  # of a damaged file
            raise UserError(f"position: {self.position} is no number of draws")
        for part in self.streams:
            part.load_state_dict(state["streams"][part.name])

    def check_state(self, state: dict[str, Any]) -> None:
        """UserError if other examples would follow than where `state` was taken."""
        stored, now = dict(state["fingerprint"]), self.fingerprint
        pairs = zip(self.tokenised, now["sets"], stored["sets"], strict=False)
        changed = [f"source {part.name}" for part, ours, then in pairs if ours != then]
        del changed[1:]  # later digests differ, too
        if not changed and stored["mix"] != now["mix"]:  # other numbers of examples alone change it, too
            changed.append("the mix (strategy, weights, max_epochs, data.seed)")
        if stored["step"] != now["step"]:
            changed.append(f"train.tokens_per_step or train.batch ({stored['step']}, now {now['step']})")
        before = stored.get("streams", {})
        changed += [f"source {part.name}" for part in self.streams if part.has_changed(before.get(part.name))]
        if changed:
            raise UserError(*(f"--resume: {what} differs from that of the checkpoint." for what in changed))

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """What decides which examples follow a position; JSON types.

        "sets" are SHA-256 over names, tasks, ids and labels (a stream: its name) up to the end of each source.
        """
        # The first draws stand for the shuffling itself, which numpy may change between versions
        first = np.concatenate(self.order.draws(0, min(256, self.order.length or 256)))
        shares = self.order.shares.tolist(), self.order.caps
        streams = {part.name: part.fingerprint() for part in self.streams}
        digest, sets = hashlib.sha256(), []
        for part in self.tokenised:
            if isinstance(part, ExampleStream):
                digest.update(f"{part.name} stream".encode())
            else:
                digest.update(f"{part.name} {part.num_examples}".encode())
                for example in part.examples:
                    digest.update(f"\n{example.task} {len(example)} ".encode())
                    digest.update(example.input_ids.tobytes() + example.loss_mask.tobytes())
            sets.append(digest.hexdigest()[:16])
        return ({"streams": streams} if streams else {}) | {
            "data": sets[-1],
            "sets": sets,
            "mix": hashlib.sha256(f"{shares} {self.order.seed} {first.tolist()}".encode()).hexdigest()[:16],
            "step": f"{self.tokens_per_step} tokens" if self.batch is None else f"{self.batch} examples",
        }


def share_of(examples: Sequence[TokenizedExample], rank: int, size: int) -> list[TokenizedExample]:
    """The share of process `rank`, in the step's order. Longest first, each goes to the one with the fewest tokens."""
    tokens, owner = [0] * size, [0] * len(examples)
    for index in sorted(range(len(examples)), key=lambda index: len(examples[index]), reverse=True):
        owner[index] = tokens.index(min(tokens))
        tokens[owner[index]] += len(examples[index])
    return [example for example, each in zip(examples, owner, strict=True) if each == rank]


# Micro-batches


PackedLayout = Literal["rows", "single"]
"""rows: several packed rows, padded to the longest. single: one row, for attention kernels of variable lengths."""


@dataclass
class Batching:
    """How the examples of a step become micro-batches."""

    max_tokens: int  # most tokens of a micro-batch, padding counted; a longer example is one of its own
    pad_id: int
    packed: PackedLayout | None = None  # None: each row is one example
    row_tokens: int | None = None  # most tokens of a packed row in "rows"; shorter where that costs less


@dataclass(frozen=True)
class Packing:
    position_ids: Tensor  # (rows, length) int64, counted from 0 in each example
    example_index: Tensor  # (rows, length) int64, index in `MicroBatch.example_ids`; -1 in padding


@dataclass(frozen=True)
class MicroBatch:
    """Examples of one forward pass, padded on the right."""

    input_ids: Tensor  # (rows, length) int64
    attention_mask: Tensor  # (rows, length) int64
    labels: Tensor  # (rows, length) int64, the token's own id where it counts and -100 elsewhere; not shifted
    task_ids: Tensor  # (examples,) int64, into `task_names`
    task_names: list[str]  # all tasks of the loader
    example_ids: list[str]
    packing: Packing | None = None  # None: each row is an example

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


@dataclass(frozen=True, slots=True)
class PackedRow:
    examples: tuple[TokenizedExample, ...]

    def __len__(self) -> int:
        return sum(map(len, self.examples))


def packed_rows(examples: Sequence[TokenizedExample], row_tokens: int) -> list[PackedRow]:
    """Rows of at most `row_tokens` (a longer example is a row of its own), in the order of their longest examples.

    Best fit, decreasing: at most 3/2 of the fewest possible rows (Simchi-Levi, 1994), and 11/9 plus 4 (Johnson, 1974).
    """
    rows: list[list[TokenizedExample]] = []
    free: list[tuple[int, int]] = []  # (tokens left, row), sorted: of equally full rows the oldest is first
    for example in sorted(examples, key=len, reverse=True):
        index = bisect_left(free, (len(example), 0))
        if index < len(free):
            left, row = free.pop(index)
            rows[row].append(example)
        else:
            left, row = row_tokens, len(rows)
            rows.append([example])
        insort(free, (left - len(example), row))
    return [PackedRow(tuple(row)) for row in rows]


def micro_groups(rows: Sequence[PackedRow], max_tokens: int) -> list[list[PackedRow]]:
    """The rows, longest first, in groups of at most `max_tokens`, padding counted, or of a single longer row.

    The cuts minimise the sum over groups of rows * longest row + GROUP_COST. On the eight commonsense tasks, steps of
    4,096 tokens in groups of 2,048 get 0.11 tokens of padding for each real one; groups filled in turn get 0.36.
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
    groups: list[list[PackedRow]] = []
    end = len(ordered)
    while end > 0:
        groups.append(ordered[cuts[end] : end])
        end = int(cuts[end])
    return groups[::-1]


def micro_batches(
    examples: Sequence[TokenizedExample], batching: Batching, task_names: Sequence[str]
) -> list[MicroBatch]:
    """The examples of a step, or of a share of it, in micro-batches, the longest rows first."""
    if batching.packed is None:
        groups = micro_groups([PackedRow((example,)) for example in examples], batching.max_tokens)
    elif batching.packed == "single":
        rows = packed_rows(examples, batching.max_tokens)
        groups = [[row] for row in sorted(rows, key=len, reverse=True)]
    else:
        # Rows as long as the longest example, half as many tokens more, ..., `most`: the cheapest are taken
        most = (
            batching.max_tokens
            if batching.row_tokens is None
            else min(batching.row_tokens, batching.max_tokens)
        )
        rooms, room = [most], max(map(len, examples), default=most)
        while room < most:
            rooms.append(room)
            room += -(-room // 2)
        groups = min(
            (micro_groups(packed_rows(examples, room), batching.max_tokens) for room in rooms), key=_cost
        )
    return [_micro_batch(group, batching, list(task_names)) for group in groups]


def _cost(groups: Sequence[Sequence[PackedRow]]) -> float:
    """Cost of a step whose attention runs over whole rows, in tokens."""
    shapes = [(len(group), max(map(len, group))) for group in groups]
    return sum(rows * width * (1 + width / ATTENTION_COST) + GROUP_COST for rows, width in shapes)


def _micro_batch(rows: Sequence[PackedRow], batching: Batching, task_names: list[str]) -> MicroBatch:
    shape = len(rows), max(map(len, rows))
    filling = batching.pad_id, IGNORED, 0, -1
    input_ids, labels, position_ids, example_index = (
        np.full(shape, value, dtype=np.int64) for value in filling
    )
    examples: list[TokenizedExample] = []
    for number, row in enumerate(rows):
        start = 0
        for example in row.examples:
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
