"""How tokens that are sorted by expert divide among the experts of a stack, on the host and on a device.

The host needs the counts to cut the tokens, a GPU needs them for its grouped kernels. They are sent to it once for each
routing, in one tensor, from pinned memory and so without a wait.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from qdora.ops.planned_device import is_planning


class CountsOnDevice(NamedTuple):
    """The numbers of an `ExpertTokens` on a device."""

    counts: Tensor  # (experts,) int64
    experts: Tensor  # (experts with tokens,) int64: their numbers
    ends: Tensor  # (experts with tokens,) int32: the token after the last one of each


class ExpertTokens:
    """How tokens that are sorted by expert divide among the experts: `counts[e]` of them belong to expert e."""

    def __init__(self, counts: Sequence[int]) -> None:
        self.counts = tuple(counts)
        self._on: dict[torch.device, CountsOnDevice] = {}

    @classmethod
    def one_for_each(cls, experts: Collection[int], num_experts: int) -> ExpertTokens:
        """One token for each of some experts."""
        return cls([int(expert in experts) for expert in range(num_experts)])

    @cached_property
    def reached(self) -> tuple[Run, ...]:
        """Each expert that has tokens, as a run of its own."""
        return tuple(self.all_runs(1))

    @cached_property
    def experts(self) -> tuple[int, ...]:
        """The experts that have tokens."""
        return tuple(expert for expert, count in enumerate(self.counts) if count)

    def all_runs(self, together: int) -> Iterator[Run]:
        """The experts that have tokens, `together` at a time."""
        token = 0
        for first in range(0, len(self.experts), together):
            some = self.experts[first : first + together]
            counts = tuple(self.counts[expert] for expert in some)
            yield Run(some, slice(token, token + sum(counts)), counts, self, first)
            token += sum(counts)

    def runs(self, together: int) -> Iterator[Run]:
        """`all_runs`; in a plan without those that need no more bytes."""
        before = deque[tuple[int, int, bool]](maxlen=2)
        for run in self.all_runs(together):
            if is_planning():
                sizes = len(run.experts), run.tokens.stop - run.tokens.start, run.is_consecutive
                # The second of two equal runs is needed: tensors of the first may still be alive in it.
                if before.count(sizes) == 2:
                    continue
                before.append(sizes)
            yield run

    def on(self, device: torch.device) -> CountsOnDevice:
        """The numbers on a device, sent at the first call."""
        if device not in self._on:
            reached = [self.counts[expert] for expert in self.experts]
            sizes = [len(self.counts), len(self.experts), len(self.experts)]
            numbers = torch.tensor([*self.counts, *self.experts, *accumulate(reached)])
            if device.type not in ("cpu", "meta"):
                numbers = numbers.pin_memory()
            counts, experts, ends = torch.split(numbers.to(device, non_blocking=True), sizes)
            self._on[device] = CountsOnDevice(counts, experts, ends.int())
        return self._on[device]


@dataclass(eq=False)
class Run:
    """Experts with tokens, in ascending order, and their tokens, which lie together.

    `first` is the place of the first of them among all experts of `every` that have tokens.
    """

    experts: tuple[int, ...]
    tokens: slice
    counts: tuple[int, ...]
    every: ExpertTokens
    first: int
    _ends: dict[torch.device, Tensor] = field(default_factory=dict, init=False)

    @property
    def is_consecutive(self) -> bool:
        """Whether no expert without tokens is between these."""
        return self.experts[-1] - self.experts[0] == len(self.experts) - 1

    def index(self, device: torch.device) -> Tensor:
        """The numbers of its experts on a device, (n,) int64."""
        return self.every.on(device).experts[self.first : self.first + len(self.experts)]

    def ends(self, device: torch.device) -> Tensor:
        """Where its experts end, counted from its first token, (n,) int32: `offs` of torch's grouped product."""
        if device not in self._ends:
            ends = self.every.on(device).ends[self.first : self.first + len(self.experts)]
            self._ends[device] = ends - self.tokens.start if self.tokens.start else ends
        return self._ends[device]

    def pick(self, values: Tensor) -> Tensor:
        """The entries of its experts along the first dimension: a view if they are consecutive."""
        if self.is_consecutive:
            return values[self.experts[0] : self.experts[-1] + 1]
        return values.index_select(0, self.index(values.device))
