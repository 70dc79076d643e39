"""Which example comes next: a fixed, seeded order over several sources, open at any position."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from qdora.data.tokenize import TokenizedSet

Strategy = Literal["proportional", "equal", "temperature"]

Draws = tuple[NDArray[np.int64], NDArray[np.int64]]
"""(sources, indices): the source of each draw, and the example's index inside that source; (draws,) int64 each."""

_BLOCK = 4096
"""Weighted draws that are worked out together, up to one more or less for each source."""


def mix_shares(
    sizes: Sequence[int],
    strategy: Strategy,
    *,
    temperature: float | None = None,
    weights: Sequence[float] | None = None,
) -> NDArray[np.float64] | None:
    """The share of each source in the draws, (sources,) summing to 1; None for exact epochs over all examples.

    share_i ~ w_i (equal), n_i w_i (proportional), n_i^(1 / temperature) w_i (temperature; T5, arXiv 1910.10683, sec.
    3.5.2, without its cap on the size).

    Args:
        sizes: Examples of each source.
        strategy: proportional with equal weights gives None: every example exactly once an epoch.
        temperature: For strategy temperature, above 0.
        weights: Relative weights, above 0; None is 1 for all.
    """
    factors = np.ones(len(sizes)) if weights is None else np.asarray(weights, dtype=np.float64)
    assert len(factors) == len(sizes) > 0, (sizes, weights)
    assert min(sizes) > 0, sizes
    assert factors.min() > 0, weights
    if strategy == "proportional" and (factors == factors[0]).all():
        return None
    assert strategy != "temperature" or (temperature is not None and temperature > 0), temperature
    exponent = {"proportional": 1.0, "equal": 0.0, "temperature": 1.0 / (temperature or 1.0)}[strategy]
    # Divided by the largest first: 111,043^(1/T) overflows for a temperature near 0
    raw = (np.asarray(sizes, dtype=np.float64) / max(sizes)) ** exponent * factors
    shares: NDArray[np.float64] = raw / raw.sum()
    return shares


class MixOrder:
    """An endless order of (source, index) pairs, a pure function of sizes, shares, seed and position.

    Without shares, draws e N .. (e+1) N - 1 are a shuffle of all N examples, a new one for each epoch e.

    With shares, the j-th draw of source s is due at time (j + 1/2) / share_s, and draws are made in the order of their
    times. After n draws a source has had n share_s of them up to 1/2 + share_s (number of sources) / 2, at any n, where
    random draws are off by sqrt(n): every optimizer step has nearly the asked shares. Any position is reached in closed
    form. Inside a source the draws run through a shuffle of its examples, then through a new one, so that none is
    repeated before all have been seen.

    Args:
        sizes: Examples of each source, each above 0.
        shares: (sources,) from `mix_shares`.
        seed: Of all shuffles.
    """

    def __init__(self, sizes: Sequence[int], shares: Sequence[float] | NDArray[np.float64] | None, seed: int) -> None:
        assert len(sizes) > 0, sizes
        assert min(sizes) > 0, sizes
        self.sizes = tuple(int(size) for size in sizes)
        self.seed = seed
        self.shares: NDArray[np.float64] | None = None
        self._starts = np.concatenate([[0], np.cumsum(self.sizes)]).astype(np.int64)
        if shares is not None:
            given = np.asarray(shares, dtype=np.float64)
            assert len(given) == len(sizes), (sizes, shares)
            assert given.min() > 0, shares
            self.shares = given / given.sum()
        # Per object, so that the shuffles go with it. At the border of two epochs both are in use.
        num_streams = 1 if shares is None else len(sizes)
        self._shuffle = lru_cache(maxsize=2 * num_streams)(self._new_shuffle)
        self._block = lru_cache(maxsize=2)(self._new_block)

    @property
    def epoch_length(self) -> int:
        """Draws of an epoch: as many as there are examples (with shares, not exactly each of them once)."""
        return sum(self.sizes)

    def __getitem__(self, position: int) -> tuple[int, int]:
        """(source, index) of one draw."""
        sources, indices = self.draws(position, position + 1)
        return int(sources[0]), int(indices[0])

    def draws(self, start: int, stop: int) -> Draws:
        """The draws start .. stop - 1."""
        assert 0 <= start < stop, (start, stop)
        block = self._block_of(start)
        first = self._first(block)
        parts = []
        while first < stop:
            sources, indices = self._block(block)
            begin, end = max(start - first, 0), min(stop - first, len(sources))
            parts.append((sources[begin:end], indices[begin:end]))
            first += len(sources)
            block += 1
        return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])

    def counts(self, num_draws: int) -> NDArray[np.int64]:
        """How many of the first `num_draws` draws come from each source, (sources,)."""
        block = self._block_of(num_draws)
        counts = self._counts_before(block)
        rest = num_draws - self._first(block)
        if rest:
            counts = counts + np.bincount(self._block(block)[0][:rest], minlength=len(self.sizes))
        return counts

    def _counts_before(self, block: int) -> NDArray[np.int64]:
        """Draws of each source before a block: an epoch without shares, a span of time with them."""
        if self.shares is None:
            return np.array(self.sizes, dtype=np.int64) * block
        # The draws j with (j + 1/2) / share < time
        return np.floor(block * _BLOCK * self.shares + 0.5).astype(np.int64)

    def _first(self, block: int) -> int:
        """Position of the first draw of a block."""
        return int(self._counts_before(block).sum())

    def _block_of(self, position: int) -> int:
        block = position // (self.epoch_length if self.shares is None else _BLOCK)
        while self._first(block) > position:
            block -= 1
        while self._first(block + 1) <= position:
            block += 1
        return block

    def _new_block(self, block: int) -> Draws:
        if self.shares is None:
            flat = self._shuffle(0, block, self.epoch_length)
            sources = np.searchsorted(self._starts, flat, side="right") - 1
            return sources, flat - self._starts[sources]
        before = self._counts_before(block)
        numbers = self._counts_before(block + 1) - before
        sources = np.repeat(np.arange(len(self.sizes)), numbers)
        turns = np.concatenate([np.arange(num) + first for num, first in zip(numbers, before, strict=True)])
        indices = np.empty_like(sources)
        for source, size in enumerate(self.sizes):
            cycles, places = np.divmod(turns[sources == source], size)
            found = np.empty_like(places)
            for cycle in np.unique(cycles).tolist():
                found[cycles == cycle] = self._shuffle(source + 1, cycle, size)[places[cycles == cycle]]
            indices[sources == source] = found
        due = np.lexsort((sources, (turns + 0.5) / self.shares[sources]))
        return sources[due], indices[due]

    def _new_shuffle(self, stream: int, cycle: int, size: int) -> NDArray[np.int64]:
        """Shuffle of range(size); stream 0 is the whole, s + 1 is source s."""
        generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([self.seed, 1, stream, cycle])))
        return generator.permutation(size)


@dataclass(frozen=True)
class SourceSummary:
    """One source in the mix, over the first `num_draws` draws.

    Attributes:
        name: Of the source.
        num_examples: It has.
        num_tokens: It has.
        share: Of the draws.
        num_draws: From this source.
        epochs: Times that its examples are seen on average; below 1, some are never seen.
        num_truncated: Examples that were cut to data.max_length.
        num_dropped: Examples that were left out.
    """

    name: str
    num_examples: int
    num_tokens: int
    share: float
    num_draws: int
    epochs: float
    num_truncated: int
    num_dropped: int


@dataclass(frozen=True)
class Mix:
    """Tokenised sources and the order in which they are drawn."""

    sets: tuple[TokenizedSet, ...]
    order: MixOrder

    def summary(self, num_draws: int | None = None) -> list[SourceSummary]:
        """What the first `num_draws` draws (None: one epoch) take from each source."""
        total = self.order.epoch_length if num_draws is None else num_draws
        counts = self.order.counts(total).tolist()
        return [
            SourceSummary(
                name=part.name,
                num_examples=len(part),
                num_tokens=part.num_tokens,
                share=count / max(total, 1),
                num_draws=count,
                epochs=count / len(part),
                num_truncated=part.num_truncated,
                num_dropped=part.num_dropped,
            )
            for part, count in zip(self.sets, counts, strict=True)
        ]


def make_mix(
    sets: Sequence[TokenizedSet],
    *,
    strategy: Strategy = "proportional",
    temperature: float | None = None,
    weights: Sequence[float] | None = None,
    seed: int = 0,
) -> Mix:
    """Put sources together; see `mix_shares` for strategy, temperature and weights."""
    sizes = [len(part) for part in sets]
    shares = mix_shares(sizes, strategy, temperature=temperature, weights=weights)
    return Mix(tuple(sets), MixOrder(sizes, shares, seed))
