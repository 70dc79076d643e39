"""Means over examples with their errors: standard errors, and t intervals of means weighted by tokens or tasks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, special

Array = NDArray[np.float64]
Weighting = Literal["tokens", "equal"]

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean with its standard error; the error is nan for a single example."""

    value: float
    stderr: float


def mean_stderr(values: ArrayLike) -> Estimate:
    """Mean and s / sqrt(n) with s^2 = sum (x - mean)^2 / (n - 1)."""
    return ratio_stderr(values, np.ones(np.shape(values)))


def ratio_stderr(numerators: ArrayLike, denominators: ArrayLike) -> Estimate:
    """R = sum a / sum b over examples, with the standard error of its linearisation.

    se(R) = s(a - R b) / (mean(b) sqrt(n)), s with n - 1: examples are the independent unit, not their tokens.

    Source: Cochran, Sampling Techniques (1977), eq. 6.13, without finite-population correction.
    """
    a, b = np.asarray(numerators, dtype=np.float64), np.asarray(denominators, dtype=np.float64)
    if a.size == 0:
        raise ValueError("the mean of no examples is not defined")
    ratio = float(a.sum() / b.sum())
    spread = float((a - ratio * b).std(ddof=1)) if a.size > 1 else math.nan
    return Estimate(ratio, spread / float(b.mean() * math.sqrt(a.size)))


@dataclass(frozen=True)
class Interval:
    """An estimate and the ends of its confidence interval, or nan."""

    value: float
    lower: float
    upper: float

    def columns(self, name: str) -> dict[str, float]:
        return {name: self.value, f"{name}_lower": self.lower, f"{name}_upper": self.upper}


@dataclass(frozen=True)
class TaskScores:
    """Scores of one task in one run."""

    examples: tuple[str, ...]  # names, each once
    values: Array  # (examples,) float64
    weights: Array  # (examples,) above 0: answer tokens for summed NLLs, else ones


SeedScores = Mapping[str, TaskScores]  # of the tasks of one seed's run


def weighted_mean(tasks: SeedScores, weighting: Weighting) -> float:
    """One number for a run. tokens: sum of values / sum of weights; equal: mean of this ratio over the tasks."""
    if weighting == "tokens":
        total = sum(float(each.weights.sum()) for each in tasks.values())
        return sum(float(each.values.sum()) for each in tasks.values()) / total
    return float(np.mean([each.values.sum() / each.weights.sum() for each in tasks.values()]))


@dataclass(frozen=True)
class Spread:
    """A standard error with its degrees of freedom."""

    stderr: float
    free: float

    @property
    def half_width(self) -> float:
        return -float(special.stdtrit(self.free, (1 - CONFIDENCE) / 2)) * self.stderr

    def p(self, value: float) -> float:
        """Two-sided p-value of 'the true value is 0'."""
        if self.stderr == 0:
            return 0.0 if value else 1.0
        return 2 * float(special.stdtr(self.free, -abs(value) / self.stderr))

    def p_equivalent(self, value: float, zone: float) -> float:
        """p-value of 'the true value is at least `zone` from 0': the larger one of two one-sided t tests.

        Source: Schuirmann, A comparison of the two one-sided tests procedure, J. Pharmacokinet. Biopharm. 15 (1987).
        """
        if self.stderr == 0:
            return 0.0 if abs(value) < zone else 1.0
        return float(special.stdtr(self.free, (abs(value) - zone) / self.stderr))

    def detectable(self, alpha: float, power: float) -> float:
        """Smallest true value that a two-sided t test at `alpha` finds with probability `power`."""
        if not self.stderr > 0:
            return self.stderr  # 0 or nan
        critical = -float(special.stdtrit(self.free, alpha / 2))

        def missing(ratio: float) -> float:
            tails = special.nctdtr(self.free, ratio, [critical, -critical])
            below, far_below = np.nan_to_num(tails)  # nan far out, where both are tiny
            return float(1 - below + far_below) - power

        highest = 2 * critical + 4
        while missing(highest) < 0:
            highest *= 2
        return float(optimize.brentq(missing, 0.0, highest, xtol=1e-9)) * self.stderr


def example_spread(seeds: Sequence[SeedScores], weighting: Weighting) -> Spread:
    """Of the mean over the seeds of `weighted_mean`, as if the examples alone were drawn and the seeds fixed.

    Linearised ratios (Cochran, Sampling Techniques, 1977, eq. 6.13), stratified by task. An example that several seeds
    have counts as one draw. Degrees of freedom: Satterthwaite's over the tasks.
    """
    # task -> example -> its part of the mean, less what is expected of it
    shares: dict[str, dict[str, float]] = {}
    for tasks in seeds:
        total = sum(float(each.weights.sum()) for each in tasks.values())
        pooled = weighted_mean(tasks, "tokens")
        for name, each in tasks.items():
            whole = float(each.weights.sum())
            ratio, scale = (
                (pooled, total) if weighting == "tokens" else (each.values.sum() / whole, whole * len(tasks))
            )
            residual = (each.values - ratio * each.weights) / (scale * len(seeds))
            of_task = shares.setdefault(name, {})
            for example, value in zip(each.examples, residual.tolist(), strict=True):
                of_task[example] = of_task.get(example, 0.0) + value
    variance = squares = 0.0
    for of_task in shares.values():
        number = len(of_task)
        part = number * float(np.var(list(of_task.values()), ddof=1)) if number > 1 else math.nan
        variance += part
        squares += part**2 / max(1, number - 1)
    return Spread(math.sqrt(variance), variance**2 / squares if squares else math.inf)


def example_interval(tasks: SeedScores, weighting: Weighting) -> Interval:
    """`weighted_mean` of one run with its t interval over the examples."""
    mean = weighted_mean(tasks, weighting)
    half = example_spread([tasks], weighting).half_width
    return Interval(mean, mean - half, mean + half)
