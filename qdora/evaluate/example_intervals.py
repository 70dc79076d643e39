"""Means of single examples' scores, weighted by tokens or tasks, and their t intervals with the examples drawn."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special

Array = NDArray[np.float64]
Weighting = Literal["tokens", "equal"]

CONFIDENCE = 0.95
"""That of all intervals over seeds or examples."""

LEAST_P = 1e-15
"""Smallest p-value that is told: beyond it the quantiles of t lose their digits."""


@dataclass(frozen=True)
class Interval:
    """An estimate and the ends of its confidence interval, which are nan if it has none."""

    value: float
    lower: float
    upper: float

    @property
    def half_width(self) -> float:
        """Half of the distance between the ends."""
        return (self.upper - self.lower) / 2

    def columns(self, name: str) -> dict[str, float]:
        """As columns of a table."""
        return {name: self.value, f"{name}_lower": self.lower, f"{name}_upper": self.upper}


@dataclass(frozen=True)
class TaskScores:
    """Scores of one task in one run.

    Attributes:
        examples: Names, each once.
        values: (examples,) float64; of differences, those of each example.
        weights: (examples,) above 0: answer tokens for summed NLLs, so that a mean is per token; ones for all else.
    """

    examples: tuple[str, ...]
    values: Array
    weights: Array

    def __post_init__(self) -> None:
        assert self.values.shape == self.weights.shape == (len(self.examples),), (self.values.shape, len(self.examples))
        assert self.weights.min() > 0, "weights"


SeedScores = Mapping[str, TaskScores]
"""Task -> its scores in the run of one seed."""


def weighted_mean(tasks: SeedScores, weighting: Weighting) -> float:
    """One number for a run. tokens: sum of values / sum of weights; equal: mean of this ratio over the tasks."""
    if weighting == "tokens":
        total = sum(float(each.weights.sum()) for each in tasks.values())
        return sum(float(each.values.sum()) for each in tasks.values()) / total
    return float(np.mean([each.values.sum() / each.weights.sum() for each in tasks.values()]))


@dataclass(frozen=True)
class Spread:
    """A standard error with its degrees of freedom, by which an estimate is tested."""

    stderr: float
    free: float

    @property
    def half_width(self) -> float:
        """Half of the t interval."""
        return -float(special.stdtrit(self.free, (1 - CONFIDENCE) / 2)) * self.stderr

    def p(self, value: float) -> float:
        """Two-sided p-value of 'the true value is 0'."""
        if self.stderr == 0:
            return LEAST_P if value else 1.0
        return _told(2 * float(special.stdtr(self.free, -abs(value) / self.stderr)))

    def p_equivalent(self, value: float, zone: float) -> float:
        """p-value of 'the true value is at least `zone` from 0': the larger one of two one-sided t tests.

        Source: Schuirmann, A comparison of the two one-sided tests procedure, J. Pharmacokinet. Biopharm. 15 (1987).
        """
        if self.stderr == 0:
            return LEAST_P if abs(value) < zone else 1.0
        return _told(float(special.stdtr(self.free, (abs(value) - zone) / self.stderr)))

    def detectable(self, alpha: float, power: float) -> float:
        """Smallest true value that a two-sided t test at `alpha` finds with probability `power`."""
        if not self.stderr > 0:
            return self.stderr  # 0 or nan
        critical = -float(special.stdtrit(self.free, alpha / 2))

        def missing(ratio: float) -> float:
            """Power at a true value of `ratio` standard errors, less the power asked for."""
            tails = special.nctdtr(self.free, ratio, [critical, -critical])
            below, far_below = np.nan_to_num(tails)  # scipy gives nan far out, where both are tiny
            return float(1 - below + far_below) - power

        highest = 2 * critical + 4
        while missing(highest) < 0:
            highest *= 2
        return float(optimize.brentq(missing, 0.0, highest, xtol=1e-9)) * self.stderr


def _told(p: float) -> float:
    return p if math.isnan(p) else max(LEAST_P, p)


def example_spread(seeds: Sequence[SeedScores], weighting: Weighting) -> Spread:
    """Of the mean over the seeds of `weighted_mean`, as if the examples alone were drawn and the seeds fixed.

    Linearised ratios (Cochran, Sampling Techniques, 1977, eq. 6.13), stratified by task. An example that several seeds
    have counts as one draw. Degrees of freedom: Satterthwaite's over the tasks.

    Args:
        seeds: Of each seed the differences of two arms, example by example.
    """
    shares: dict[str, dict[str, float]] = {}  # task -> example -> its part of the mean, less what is expected of it
    for tasks in seeds:
        total = sum(float(each.weights.sum()) for each in tasks.values())
        pooled = weighted_mean(tasks, "tokens")
        for name, each in tasks.items():
            whole = float(each.weights.sum())
            ratio, scale = (pooled, total) if weighting == "tokens" else (each.values.sum() / whole, whole * len(tasks))
            residual = (each.values - ratio * each.weights) / (scale * len(seeds))
            known = shares.setdefault(name, {})
            for example, value in zip(each.examples, residual.tolist(), strict=True):
                known[example] = known.get(example, 0.0) + value
    variance = squares = 0.0
    for known in shares.values():
        number = len(known)
        part = number * float(np.var(list(known.values()), ddof=1)) if number > 1 else math.nan
        variance += part
        squares += part**2 / max(1, number - 1)
    return Spread(math.sqrt(variance), variance**2 / squares if squares else math.inf)


def example_interval(tasks: SeedScores, weighting: Weighting) -> Interval:
    """`weighted_mean` of one run with its t interval over the examples."""
    mean = weighted_mean(tasks, weighting)
    half = example_spread([tasks], weighting).half_width
    return Interval(mean, mean - half, mean + half)
