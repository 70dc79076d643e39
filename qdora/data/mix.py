"""Which example comes next: a fixed, seeded order over several sources, open at any position."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from qdora.data.stream import ExampleStream
from qdora.data.tokenize import TokenizedSet
from qdora.errors import UserError
from qdora.recipe.data_settings import DataConfig, Strategy

Draws = tuple[NDArray[np.int64], NDArray[np.int64]]
"""The source of each draw, and the example's index inside that source; (draws,) each."""

_BLOCK = 4096  # draws that are computed together, up to one more or less for each source


def mix_shares(
    sizes: Sequence[float], strategy: Strategy, temperature: float | None = None
) -> NDArray[np.float64]:
    """The share of each source in the draws, (sources,) summing to 1; `sizes` are numbers of examples, or the weights.

    share_i ~ n_i (proportional, weights), 1 (equal), n_i^(1 / temperature) (temperature; T5, arXiv 1910.10683, sec.
    3.5.2, without its cap on the size).
    """
    raw = np.asarray(sizes, dtype=np.float64)
    exponent = 0.0 if strategy == "equal" else 1.0 / (temperature or 1.0)
    # Divided by the largest first: large weights, and 111,043^(1/T) for a temperature near 0, would overflow
    raw = (raw / raw.max()) ** exponent
    # A source at 1e-15 is never drawn, but has its place in the order
    raw = np.maximum(raw, 1e-15)
    shares: NDArray[np.float64] = raw / raw.sum()
    return shares


class MixOrder:
    """An order of (source, index) pairs, a pure function of sizes, shares, caps, seed and position.

    The j-th draw of source s is due at time (j + 1/2) / share_s, and draws are made in the order of their times. After
    any n draws the number from source s differs from n share_s by at most 1/2 + share_s (number of sources) / 2; random
    draws would differ by sqrt(n). Inside a source the draws run through a shuffle of its examples, then through a new
    one. After its cap a source gives no more, and the others keep their proportions.

    `sizes` are the examples of each source; None: a stream, whose index is the number of the draw from it. `shares`
    (sources,) are from `mix_shares`. `caps` are the most draws of each source; None: no end.
    """

    def __init__(
        self,
        sizes: Sequence[int | None],
        shares: Sequence[float] | NDArray[np.float64],
        seed: int,
        caps: Sequence[int | None] | None = None,
    ) -> None:
        self.sizes, self.seed = tuple(sizes), seed
        self.caps = tuple(caps) if caps is not None else (None,) * len(sizes)
        weights = np.asarray(shares, dtype=np.float64)
        self.shares: NDArray[np.float64] = weights / weights.sum()
        # expected(t) = sum_s min(t share_s, cap_s) is piecewise linear: its inverse is a table of the times of the caps
        self._most = np.array([np.inf if cap is None else cap for cap in self.caps])
        ends = self._most / self.shares
        self._times = np.concatenate([[0.0], np.sort(ends[np.isfinite(ends)])])
        self._expected = np.minimum(self._times[:, None] * self.shares, self._most).sum(axis=1)
        self._rates = np.array([self.shares[ends > time].sum() for time in self._times])
        self._rates[0] = 1.0  # exactly, where the sum of the shares is rounded
        # (source, cycle, size) -> permutation; at the border of two cycles both are in use
        self.shuffle = lru_cache(maxsize=2 * len(sizes))(self._new_shuffle)
        self._block = lru_cache(maxsize=2)(self._new_block)

    @property
    def length(self) -> int | None:
        return None if None in self.caps else sum(filter(None, self.caps))

    def __getitem__(self, position: int) -> tuple[int, int]:
        sources, indices = self.draws(position, position + 1)
        return int(sources[0]), int(indices[0])

    def draws(self, start: int, stop: int) -> Draws:
        block = self._block_of(start)
        first, parts = self._first(block), [self._block(block)]
        while first + sum(len(sources) for sources, _ in parts) < stop:
            block += 1
            parts.append(self._block(block))
        sources, indices = map(np.concatenate, zip(*parts, strict=True))
        return sources[start - first : stop - first], indices[start - first : stop - first]

    def counts(self, num_draws: int) -> NDArray[np.int64]:
        """Of the first `num_draws` draws, those from each source, (sources,)."""
        if num_draws == self.length:
            return np.array(self.caps, dtype=np.int64)
        block = self._block_of(num_draws)
        rest = self._block(block)[0][: num_draws - self._first(block)]
        return self._before(block) + np.bincount(rest, minlength=len(self.sizes))

    def _first(self, block: int) -> int:
        """Position of the first draw of a block of time."""
        return int(self._before(block).sum())

    def _before(self, block: int) -> NDArray[np.int64]:
        """The draws j of each source before a block, (sources,): (j + 1/2) / share < the time when it begins."""
        num_draws = block * _BLOCK
        part = int(np.searchsorted(self._expected, num_draws, side="right")) - 1
        if self._rates[part] == 0.0:
            return self._most.astype(np.int64)
        time = self._times[part] + (num_draws - self._expected[part]) / self._rates[part]
        counts: NDArray[np.int64] = np.minimum(np.floor(time * self.shares + 0.5), self._most).astype(np.int64)
        return counts

    def _block_of(self, position: int) -> int:
        block = position // _BLOCK
        while self._first(block) > position:
            block -= 1
        while self._first(block + 1) <= position:
            block += 1
        return block

    def _new_block(self, block: int) -> Draws:
        before = self._before(block)
        numbers = self._before(block + 1) - before
        sources = np.repeat(np.arange(len(self.sizes)), numbers)
        draws = np.concatenate([np.arange(num) + first for num, first in zip(numbers, before, strict=True)])
        indices = draws.copy()
        for source, size in enumerate(self.sizes):
            if size is None:
                continue
            cycles, offsets = np.divmod(draws[sources == source], size)
            shuffled = np.empty_like(offsets)
            for cycle in np.unique(cycles).tolist():
                shuffled[cycles == cycle] = self.shuffle(source, cycle, size)[offsets[cycles == cycle]]
            indices[sources == source] = shuffled
        due = np.lexsort((sources, (draws + 0.5) / self.shares[sources]))
        return sources[due], indices[due]

    def _new_shuffle(self, source: int, cycle: int, size: int) -> NDArray[np.int64]:
        return np.random.default_rng([self.seed, 1, source + 1, cycle]).permutation(size)


Source = TokenizedSet | ExampleStream


@dataclass(frozen=True)
class Mix:
    sets: tuple[Source, ...]
    order: MixOrder


def make_mix(sets: Sequence[Source], data: DataConfig) -> Mix:
    """Put the sources of `data.mix` together, in the shares of `mix_shares`, each with at most its `max_epochs`."""
    sizes = [part.num_examples for part in sets]
    by_size = data.strategy in ("proportional", "temperature") and len(sets) > 1
    for part, size, source in zip(sets, sizes, data.mix, strict=True):
        if size is None and (by_size or source.max_epochs):
            what = "max_epochs" if source.max_epochs else f"data.strategy {data.strategy}"
            raise UserError(f"{part.name}: {what} needs the size of the stream (examples).")
    counts = [size or 1 for size in sizes]
    sized: Sequence[float] = (
        counts if data.strategy != "weights" else [source.weight or 0.0 for source in data.mix]
    )
    shares = mix_shares(sized, data.strategy, data.temperature)
    # A source of weight 0 would be drawn once the others have reached their caps
    limits = [0.0 if source.weight == 0 else source.max_epochs for source in data.mix]
    # 0.29 * 100 is 28.999999999999996
    caps = [
        None if most is None else max(int(most > 0), math.floor(most * count + 1e-6))
        for most, count in zip(limits, counts, strict=True)
    ]
    drawn_from = [
        None if isinstance(part, ExampleStream) else size for part, size in zip(sets, sizes, strict=True)
    ]
    return Mix(tuple(sets), MixOrder(drawn_from, shares, data.seed, caps))
