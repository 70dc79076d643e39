"""How tokens that lie expert by expert divide among the experts of a stack, on the host and on a device.

The host needs the counts to cut the tokens, a GPU needs them for its grouped kernels. They are sent to it once for each
routing, in one tensor, from pinned memory and so without a wait.

A GPU without a grouped kernel multiplies several experts at once if they have equally many tokens. `padded_tokens`
makes their counts equal by rows of zeros.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, groupby
from typing import NamedTuple

import torch
from torch import Tensor

from qdora.quant.planned_device import is_planning

# Most rows of padding, as a share of the tokens of the experts that are padded to one count.
_MOST_PADDING = 0.25
# Experts that are not in ascending order need copies of their codes. They are ordered by count where that saves more
# groups than this, each of which has some eleven launches a stack and micro-batch.
_WORTH_COPIES = 16


class CountsOnDevice(NamedTuple):
    """The numbers of an `ExpertTokens` on a device, of the experts with tokens, in the order of these."""

    counts: Tensor  # int64
    experts: Tensor  # int64: their numbers
    ends: Tensor  # int32: the token after the last one of each
    shifts: Tensor  # (all experts,) int64: see `padded_tokens`; empty without padding


class ExpertTokens:
    """How tokens divide among the experts: `counts[e]` of them, which lie together, belong to expert e.

    `routed` are these counts without padding. `experts` are those that have tokens, in the order of these: ascending if
    it is not given. `shifts` is how many places the tokens of each expert lie behind those that they have in ascending
    order and without padding.
    """

    def __init__(
        self,
        counts: Sequence[int],
        experts: Iterable[int] | None = None,
        shifts: Sequence[int] = (),
        routed: Sequence[int] | None = None,
    ) -> None:
        self.counts, self.shifts = tuple(counts), shifts
        self.routed = self.counts if routed is None else tuple(routed)
        self.experts = tuple(e for e, count in enumerate(counts) if count) if experts is None else tuple(experts)
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
    def whole(self) -> Run:
        """All experts that have tokens, as one run."""
        return next(self.all_runs(len(self.experts)))

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
            sizes = [*3 * [len(reached)], len(self.shifts)]
            numbers = torch.tensor([*reached, *self.experts, *accumulate(reached), *self.shifts])
            if device.type not in ("cpu", "meta"):
                numbers = numbers.pin_memory()
            counts, experts, ends, shifts = torch.split(numbers.to(device, non_blocking=True), sizes)
            self._on[device] = CountsOnDevice(counts, experts, ends.int(), shifts)
        return self._on[device]


@dataclass(eq=False)
class Run:
    """Experts with tokens, in the order of these, and their tokens, which lie together.

    `first` is the place of the first of them among all experts of `every` that have tokens.
    """

    experts: tuple[int, ...]
    tokens: slice
    counts: tuple[int, ...]
    every: ExpertTokens
    first: int
    _ends: dict[torch.device, Tensor] = field(default_factory=dict, init=False)

    @cached_property
    def is_consecutive(self) -> bool:
        """Whether these are in ascending order, and no other expert is between them."""
        return self.experts == tuple(range(self.experts[0], self.experts[0] + len(self.experts)))

    @cached_property
    def groups(self) -> tuple[tuple[slice, slice], ...]:
        """Neighbours with one count: their places in the run, and their tokens, counted from its first."""
        found, first, token = [], 0, 0
        for count, same in groupby(self.counts):
            number = len(list(same))
            found.append((slice(first, first + number), slice(token, token + number * count)))
            first, token = first + number, token + number * count
        return tuple(found)

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


def padded_tokens(counts: Sequence[int]) -> ExpertTokens:
    """Tokens that `counts` divide, with rows of padding behind those of an expert, so that few groups have one count.

    A token at place p of the ascending order without padding goes to p + shifts[e] if it is of expert e.
    """
    reached = [expert for expert, count in enumerate(counts) if count]
    groups = _groups(reached, counts)
    by_count = _groups(sorted(reached, key=lambda expert: -counts[expert]), counts)
    if len(groups) - len(by_count) > _WORTH_COPIES:
        groups = by_count
    padded, shifts, place = [0] * len(counts), [0] * len(counts), 0
    for group in groups:
        most = max(counts[expert] for expert in group)
        for expert in group:
            padded[expert], shifts[expert] = most, place
            place += most
    for expert, before in enumerate(accumulate(counts[:-1], initial=0)):
        shifts[expert] -= before
    return ExpertTokens(padded, (expert for group in groups for expert in group), shifts, counts)


def _groups(experts: Sequence[int], counts: Sequence[int]) -> list[list[int]]:
    """Neighbours that are padded to one count: as many as `_MOST_PADDING` allows, each at most to its double."""
    groups: list[list[int]] = []
    least = most = total = 0
    for expert in experts:
        count = counts[expert]
        least, most, total = min(least, count), max(most, count), total + count
        if groups and most <= 2 * least and most * (len(groups[-1]) + 1) <= (1 + _MOST_PADDING) * total:
            groups[-1].append(expert)
        else:
            groups.append([expert])
            least = most = total = count
    return groups
