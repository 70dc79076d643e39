"""Differences over the same examples and seeds, both of which are drawn: interval and p-value."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special

Array = NDArray[np.float64]

LEAST_P = 1e-15
"""Smallest p-value that is told: beyond it the quantiles of t lose their digits."""


@dataclass(frozen=True)
class Paired:
    """Scores of two arms on one task.

    Attributes:
        first, second: (seeds, examples) float64. Columns are the same examples, rows are runs with the same seed.
        weights: (examples,) above 0: answer tokens for summed NLLs, so that the mean is one per token; ones for
            accuracies.
    """

    first: Array
    second: Array
    weights: Array

    def __post_init__(self) -> None:
        assert self.first.shape == self.second.shape, (self.first.shape, self.second.shape)
        assert self.weights.shape == self.first.shape[1:], (self.weights.shape, self.first.shape)
        assert self.weights.min() > 0, "weights"


@dataclass(frozen=True)
class PairedDifference:
    """Mean of first - second, in the units of the scores (per unit of weight), with its uncertainty.

    Attributes:
        value: Each task counts once.
        stderr: Standard error over examples and seeds; nan where one of them is a single one.
        lower, upper: Ends of the confidence interval; nan with `stderr`.
        p: Two-sided p-value: the level at which the interval ends at 0, no less than 1e-15; nan with `stderr`.
        num_seeds: 1: the interval covers the choice of examples alone.
    """

    value: float
    stderr: float
    lower: float
    upper: float
    p: float
    num_seeds: int


def paired_difference(tasks: Sequence[Paired], confidence: float = 0.95) -> PairedDifference:
    """The macro average over tasks of R_t = sum_se (first - second) / (seeds sum_e weight), and its interval.

    Seeds and examples are drawn independently of each other, so both add to the variance:

        var = 1/T^2 sum_t s^2_e(mean_s d_se - R_t w_e) / (n_t mean(w)^2) + s^2_s(macro average of seed s) / S

    The first is Cochran's ratio estimate (Sampling Techniques, 1977, eq. 6.13) over examples, the second the variance
    between the seeds' averages. The variance of a pair of seed and example is in both, so the interval tends to be too
    wide. Its quantile is the mean of the t quantiles of all parts, each of its own degrees of freedom, weighted by
    their variances (Cochran and Cox, Experimental Designs, 1957, sec. 4.14): with three seeds that of Student's t with
    2 where the seeds decide. (Satterthwaite's pooled degrees of freedom, themselves estimated from so few seeds, are
    too many: 9 % instead of 5 % of such intervals miss the truth.) With one seed its part is left out.

    Args:
        tasks: At least one, with the same seeds in the same order.
    """
    value, parts = _estimate(tasks)
    num_seeds = len(tasks[0].first)
    variance = sum(part for part, _ in parts)
    stderr = math.sqrt(variance)
    if math.isnan(stderr):
        return PairedDifference(value, math.nan, math.nan, math.nan, p=math.nan, num_seeds=num_seeds)
    if variance == 0:
        return PairedDifference(value, 0.0, value, value, p=LEAST_P if value else 1.0, num_seeds=num_seeds)
    half = _quantile(parts, 1 - confidence) * stderr
    p = _p_value(parts, abs(value) / stderr)
    return PairedDifference(value, stderr, value - half, value + half, p=p, num_seeds=num_seeds)


def _estimate(tasks: Sequence[Paired]) -> tuple[float, list[tuple[float, int]]]:
    """The value of `paired_difference`, and the parts of its variance with their degrees of freedom."""
    num_seeds = len(tasks[0].first)
    assert all(len(task.first) == num_seeds for task in tasks), [task.first.shape for task in tasks]
    value = 0.0
    by_seed = np.zeros(num_seeds)
    parts: list[tuple[float, int]] = []  # (variance, degrees of freedom)
    for task in tasks:
        difference = task.first - task.second
        num_examples, mean_weight = len(task.weights), float(task.weights.mean())
        ratios = difference.sum(axis=1) / task.weights.sum()
        by_seed += ratios / len(tasks)
        value += float(ratios.mean()) / len(tasks)
        residual = (difference.mean(axis=0) - ratios.mean() * task.weights) / mean_weight
        variance = float(residual.var(ddof=1)) / num_examples if num_examples > 1 else math.nan
        parts.append((variance / len(tasks) ** 2, num_examples - 1))
    if num_seeds > 1:
        parts.append((float(by_seed.var(ddof=1)) / num_seeds, num_seeds - 1))
    return value, parts


def _quantile(parts: Sequence[tuple[float, int]], level: float) -> float:
    """Quantile of the two-sided level; parts are (variance, degrees of freedom)."""
    quantiles = sum(-variance * float(special.stdtrit(free, level / 2)) for variance, free in parts)
    return quantiles / sum(variance for variance, _ in parts)


def _p_value(parts: Sequence[tuple[float, int]], ratio: float) -> float:
    """The level whose quantile is `ratio`."""

    def over(log_level: float) -> float:
        return _quantile(parts, math.exp(log_level)) - ratio

    if over(math.log(LEAST_P)) <= 0:
        return LEAST_P
    return 1.0 if ratio == 0 else math.exp(float(optimize.brentq(over, math.log(LEAST_P), 0.0, xtol=1e-12)))
