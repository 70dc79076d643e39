"""Intervals and tests for differences between series of scores on the same examples and seeds.

The bootstrap resamples examples within each task, and seeds, independently of each other. Every task counts once.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Array = NDArray[np.float64]
Statistic = Callable[[Array], Array]
"""statistic(means): (..., series) macro averages over tasks -> (...,)."""

_CHUNK_NUMBERS = 8_000_000  # resampled counts in memory at once: 64 MB
_ROUNDING = 1e-12  # sums in another order may differ by this share
_MAX_SEEDS_EXACT = 16


@dataclass(frozen=True)
class TaskScores:
    """Scores of one task for several series (arms, bases) on the same examples: (series, seeds, examples) float64.

    weights: (examples,), positive: answer tokens for summed NLLs, so that a mean is per token; 1 for accuracies.
    """

    scores: Array
    weights: Array

    def __post_init__(self) -> None:
        assert self.scores.ndim == 3, self.scores.shape
        assert self.weights.shape == self.scores.shape[2:], (self.weights.shape, self.scores.shape)
        assert self.weights.min() > 0, "weights"


@dataclass(frozen=True)
class Interval:
    """An estimate and the ends of its confidence interval, which are nan if it has none."""

    value: float
    lower: float
    upper: float

    @property
    def excludes_zero(self) -> bool:
        """Whether 0 lies outside the interval; False if there is none."""
        return self.lower > 0 or self.upper < 0


def difference(means: Array) -> Array:
    """The first series minus the second."""
    return means[..., 0] - means[..., 1]


def first(means: Array) -> Array:
    """The first series."""
    return means[..., 0]


def repaired(means: Array) -> Array:
    """(compressed base - adapter) / (compressed base - uncompressed base); the series are base, adapter, uncompressed.

    1: the adapter recovered all that compression lost. Above 1: more, since the adapter was also trained for the task.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio: Array = (means[..., 0] - means[..., 1]) / (means[..., 0] - means[..., 2])
    return ratio


def bca_interval(
    tasks: Sequence[TaskScores],
    statistic: Statistic,
    *,
    confidence: float = 0.95,
    num_resamples: int = 10_000,
    generator: np.random.Generator,
) -> Interval:
    """Bias-corrected and accelerated bootstrap interval of a statistic of macro averages.

    Examples of every task and the seeds (shared by all tasks) are resampled as independent samples. The acceleration is
    the one for several samples: it leaves out one example or one seed at a time. With one seed the interval covers only
    the choice of examples. With few seeds it is too narrow: S resampled seeds have (S - 1) / S of their variance. The
    ends are nan if a task has a single example or the statistic is not finite.

    Source: Efron, Better bootstrap confidence intervals, JASA 82 (1987), 171; several samples: Davison and Hinkley,
    Bootstrap methods and their application (1997), eq. 5.26.
    """
    value = float(statistic(_means(tasks)))
    if any(len(task.weights) < 2 for task in tasks) or not math.isfinite(value):
        return Interval(value, math.nan, math.nan)
    resampled = np.sort(np.concatenate([statistic(m) for m in _resampled_means(tasks, num_resamples, generator)]))
    if not np.isfinite(resampled).all():
        return Interval(value, math.nan, math.nan)
    if resampled[-1] - resampled[0] <= _ROUNDING * max(1.0, abs(value)):
        return Interval(value, value, value)
    # Ties count half: means of accuracies are often exactly equal
    below = float((resampled < value).mean() + (resampled <= value).mean()) / 2
    if not 0 < below < 1:
        return Interval(value, math.nan, math.nan)
    bias, acceleration = float(stats.norm.ppf(below)), _acceleration(tasks, statistic)
    shifted = bias + stats.norm.ppf([(1 - confidence) / 2, (1 + confidence) / 2])
    levels = stats.norm.cdf(bias + shifted / (1 - acceleration * shifted))
    lower, upper = np.quantile(resampled, levels)
    return Interval(value, float(lower), float(upper))


def permutation_p(tasks: Sequence[TaskScores], *, num_resamples: int, generator: np.random.Generator) -> float:
    """Two-sided p-value of the difference of two series, from swapping them example by example.

    An example is swapped in all its seeds at once. The test is exact if there are at most `num_resamples` ways to swap.
    Otherwise swaps are drawn, and p = (1 + number as extreme) / (1 + number drawn), which is never 0.

    Source: Phipson and Smyth, Permutation P-values should never be zero, SAGMB 9 (2010), 39.
    """
    parts = [(task.scores[0] - task.scores[1]).mean(axis=0) / (task.weights.sum() * len(tasks)) for task in tasks]
    values = np.concatenate(parts)
    if values.size < 60 and 2**values.size <= num_resamples:
        return _exact_p(values)
    extreme, observed = 0, _observed(values)
    for count in _chunks(num_resamples, values.size):
        signs = generator.integers(0, 2, (count, values.size)) * 2.0 - 1.0
        extreme += int((np.abs(signs @ values) >= observed).sum())
    return (1 + extreme) / (1 + num_resamples)


def seed_permutation_p(tasks: Sequence[TaskScores]) -> float:
    """Two-sided exact p-value from swapping two series seed by seed; with S seeds it is at least 2 / 2^S."""
    return _exact_p(seed_differences(tasks)[:_MAX_SEEDS_EXACT])


def _exact_p(values: Array) -> float:
    """Share of all choices of signs whose sum is as extreme as the observed one."""
    signs = np.array(list(itertools.product((1.0, -1.0), repeat=values.size)))
    return float((np.abs(signs @ values) >= _observed(values)).mean())


def _observed(values: Array) -> float:
    return float(abs(values.sum()) * (1 - 1e-9) - _ROUNDING * np.abs(values).max(initial=0.0))


def seed_differences(tasks: Sequence[TaskScores]) -> Array:
    """(seeds,) macro average of the first series minus the second, for each seed."""
    parts = [(task.scores[0] - task.scores[1]).sum(axis=1) / task.weights.sum() for task in tasks]
    averaged: Array = np.mean(parts, axis=0)
    return averaged


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values: rejecting those below alpha keeps the chance of any false rejection at alpha.

    Source: Holm, A simple sequentially rejective multiple test procedure, Scand. J. Statist. 6 (1979), 65.
    """
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def _means(tasks: Sequence[TaskScores]) -> Array:
    """(series,) macro averages."""
    parts = [task.scores.mean(axis=1).sum(axis=1) / task.weights.sum() for task in tasks]
    averaged: Array = np.mean(parts, axis=0)
    return averaged


def _resampled_means(tasks: Sequence[TaskScores], number: int, generator: np.random.Generator) -> Iterator[Array]:
    """Chunks of (resamples, series) macro averages over drawn examples and seeds."""
    num_series, num_seeds, _ = tasks[0].scores.shape
    for count in _chunks(number, max(len(task.weights) for task in tasks)):
        seeds = _drawn(count, num_seeds, generator)
        total = np.zeros((count, num_series))
        for task in tasks:
            drawn = _drawn(count, len(task.weights), generator)
            flat = task.scores.reshape(num_series * num_seeds, len(task.weights))
            sums = (drawn @ flat.T).reshape(count, num_series, num_seeds)
            total += (sums * seeds[:, None, :]).sum(axis=2) / (num_seeds * (drawn @ task.weights))[:, None]
        yield total / len(tasks)


def _drawn(count: int, size: int, generator: np.random.Generator) -> Array:
    """(count, size): how often each of `size` items occurs in each of `count` samples with replacement."""
    places = generator.integers(0, size, (count, size)) + size * np.arange(count)[:, None]
    return np.bincount(places.ravel(), minlength=count * size).reshape(count, size).astype(np.float64)


def _acceleration(tasks: Sequence[TaskScores], statistic: Statistic) -> float:
    numerator = denominator = 0.0
    for values in _left_out(tasks, statistic):
        influence = (len(values) - 1) * (values.mean() - values)
        numerator += float((influence**3).sum()) / len(values) ** 3
        denominator += float((influence**2).sum()) / len(values) ** 2
    return numerator / (6 * denominator**1.5) if denominator > 0 else 0.0


def _left_out(tasks: Sequence[TaskScores], statistic: Statistic) -> Iterator[Array]:
    """The statistic without each example of each task, and without each seed if there are several."""
    whole = _means(tasks)
    for task in tasks:
        by_example = task.scores.mean(axis=1)  # (series, examples)
        sums, weight = by_example.sum(axis=1), task.weights.sum()
        without = (sums[:, None] - by_example) / (weight - task.weights)
        yield statistic((whole[:, None] + (without - sums[:, None] / weight) / len(tasks)).T)
    num_seeds = tasks[0].scores.shape[1]
    if num_seeds > 1:
        kept = [np.delete(np.arange(num_seeds), seed) for seed in range(num_seeds)]
        yield statistic(
            np.array([_means([TaskScores(task.scores[:, rows], task.weights) for task in tasks]) for rows in kept])
        )


def _chunks(number: int, width: int) -> Iterator[int]:
    size = max(1, _CHUNK_NUMBERS // max(1, width))
    while number > 0:
        yield min(size, number)
        number -= size
