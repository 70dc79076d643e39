"""Intervals and tests for differences between arms that were run with the same seeds.

The difference between two arms with one seed is one number, and these numbers are independent draws: their mean has
Student's t interval, however much of their spread comes from the seeds and how much from the examples (simulated in
benchmarks/study_nulls.py). A bootstrap over so few numbers is no 95 % interval.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from qdora.evaluate.intervals import CONFIDENCE, Interval, Spread


def seed_spread(values: Sequence[float], num_first: int | None = None) -> Spread:
    """Of the mean of one number a seed, told by the `num_first` first ones; nan with a single seed.

    Where the first seeds left too wide an interval, so that others were added, they alone tell the spread. With that of
    all seeds, intervals that were narrow by chance, and so got no further seeds, would hold the truth too seldom: 92 %
    of the time instead of 95 % with three seeds and three more.
    Source: Stein, A two-sample test for a linear hypothesis whose power is independent of the variance, Ann. Math.
    Statist. 16 (1945), 243.
    """
    first = np.asarray(values[:num_first], dtype=np.float64)
    if first.size < 2:
        return Spread(math.nan, math.nan)
    return Spread(float(first.std(ddof=1)) / math.sqrt(len(values)), first.size - 1)


def t_interval(values: Sequence[float], *, num_first: int | None = None) -> Interval:
    """Mean of one number a seed with Student's t interval by `seed_spread`; of a single number without ends."""
    mean, half = float(np.mean(values)), seed_spread(values, num_first).half_width
    return Interval(mean, mean - half, mean + half)


def ratio_interval(above: Sequence[float], below: Sequence[float], *, num_first: int | None = None) -> Interval:
    """Mean of `above` / mean of `below` with the interval of every r for which that of above - r below contains 0.

    Source: Fieller, Some problems in interval estimation, J. R. Stat. Soc. B 16 (1954), 175.
    """
    a, b = np.mean(above), np.mean(below)
    value = float(a / b) if b else math.nan
    first = slice(num_first)
    lower = upper = math.nan
    if (number := len(above[first])) > 1:
        critical = float(special.stdtrit(number - 1, (1 - CONFIDENCE) / 2))
        covariance = np.cov(above[first], below[first]) / len(above) * critical**2
        # (a - r b)^2 <= t^2 var(above - r below) is square r^2 - 2 middle r + constant <= 0
        square, middle, constant = b**2 - covariance[1, 1], a * b - covariance[0, 1], a**2 - covariance[0, 0]
        inside = middle**2 - square * constant
        if square > 0 and inside >= 0:
            lower, upper = (float((middle + sign * math.sqrt(inside)) / square) for sign in (-1, 1))
    return Interval(value, lower, upper)


def holm(p_values: ArrayLike, number: int) -> list[float]:
    """Holm's adjusted p-values: rejecting those below alpha keeps the chance of any false rejection at alpha.

    `number`: how many tests there are; those beyond the given ones count as if their p-value were 1.
    Source: Holm, A simple sequentially rejective multiple test procedure, Scand. J. Statist. 6 (1979), 65.
    """
    given = np.asarray(p_values)
    order = np.argsort(given, kind="stable")
    adjusted = np.empty(len(given))
    adjusted[order] = np.maximum.accumulate(np.minimum(1.0, given[order] * (number - np.arange(len(given)))))
    return list(map(float, adjusted))
