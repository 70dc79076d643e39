"""The search for an arm's learning rate: short runs of all values, full ones around the best, and a parabola."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np

from qdora.study.grid import RatesConfig

Length = Literal["short", "full"]


class RateRun(NamedTuple):
    """One run of a search."""

    length: Length
    rate: float
    seed: int


Loss = Callable[[RateRun], float | None]
"""Validation loss of a run: inf if it diverged, None if it has no result yet."""


@dataclass(frozen=True)
class Search:
    """How far a search is.

    Attributes:
        runs: All runs that the search has asked for so far, those without a result among them.
        is_done: Whether all of them have a result and no more are needed.
        rate: The rate that was found; None before the end, or if every value diverged.
        is_interior: Whether the best value has a worse one on both sides.
        losses: (length, rate) -> mean loss over the seeds; inf if a run diverged.
    """

    runs: tuple[RateRun, ...]
    is_done: bool = False
    rate: float | None = None
    is_interior: bool = False
    losses: Mapping[tuple[Length, float], float] = field(default_factory=dict)


def search(config: RatesConfig, loss: Loss) -> Search:
    """What the search has found, and which runs it needs next: the same whenever the same results are there."""
    ladder = _Ladder(config, loss)
    known = set(range(len(config.values)))
    if config.steps is not None:
        best = ladder.bracketed("short", known)
        if best is None:
            return ladder.unfinished()
        known = {best - 1, best, best + 1}
    best = ladder.bracketed("full", {index for index in known if ladder.has(index)})
    if best is None:
        return ladder.unfinished()
    neighbours = [ladder.losses.get(("full", ladder.rate(index)), math.nan) for index in (best - 1, best, best + 1)]
    rates = [ladder.rate(index) for index in (best - 1, best, best + 1)]
    return Search(
        tuple(ladder.runs),
        is_done=True,
        rate=float(f"{minimum(rates, neighbours):.3g}"),
        is_interior=not any(map(math.isnan, neighbours)),
        losses=ladder.losses,
    )


def minimum(rates: list[float], losses: list[float]) -> float:
    """Where the parabola through three losses over ln(rate) is lowest; the middle rate if a loss is not finite.

    The middle one is the lowest of the three, so the minimum lies within half of the way to the neighbours.
    """
    if not all(map(math.isfinite, losses)):
        return rates[1]
    curvature, slope, _ = np.polyfit(np.log(rates) - math.log(rates[1]), losses, 2)
    return rates[1] if curvature <= 0 else rates[1] * math.exp(-slope / (2 * curvature))


class _Ladder:
    """Values of a search by index: 0 is the smallest that was given, those below and above continue its steps."""

    def __init__(self, config: RatesConfig, loss: Loss) -> None:
        self.config, self.loss = config, loss
        self.values = sorted(config.values)
        self.runs: list[RateRun] = []
        self.losses: dict[tuple[Length, float], float] = {}
        self.is_open = False

    def rate(self, index: int) -> float:
        values, last = self.values, len(self.values) - 1
        if index < 0:
            return float(f"{values[0] * (values[1] / values[0]) ** index:.3g}")
        if index > last:
            return float(f"{values[last] * (values[last] / values[last - 1]) ** (index - last):.3g}")
        return values[index]

    def has(self, index: int) -> bool:
        return -self.config.extend <= index < len(self.values) + self.config.extend

    def unfinished(self) -> Search:
        return Search(tuple(self.runs), is_done=not self.is_open, losses=self.losses)

    def bracketed(self, length: Length, known: set[int]) -> int | None:
        """The best of `known` and of what is added until it has a neighbour on both sides, or the ladder ends.

        None if runs have no result yet, or if all diverged.
        """
        while True:
            losses = {index: self._measured(length, self.rate(index)) for index in sorted(known)}
            if self.is_open:
                return None
            finite = {index: value for index, value in losses.items() if value is not None and math.isfinite(value)}
            best = min(finite, key=finite.__getitem__) if finite else None
            wanted = {min(known) - 1} if best is None else {best - 1, best + 1}
            added = {index for index in wanted - known if self.has(index)}
            if not added:
                return best
            known = known | added

    def _measured(self, length: Length, rate: float) -> float | None:
        seeds = self.config.seeds[:1] if length == "short" else self.config.seeds
        runs = [RateRun(length, rate, seed) for seed in seeds]
        self.runs += [run for run in runs if run not in self.runs]
        found = [self.loss(run) for run in runs]
        values = [value for value in found if value is not None]
        if len(values) < len(runs):
            self.is_open = True
            return None
        self.losses[length, rate] = float(np.mean(values))
        return self.losses[length, rate]
