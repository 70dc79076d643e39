"""Accuracies, likelihoods and their errors from the scores of single examples. Pure numpy.

Definitions follow lm-evaluation-harness: `acc` takes the choice of the largest summed log-likelihood, `acc_norm` the
largest log-likelihood per character of the choice's text (without the space that joins it to the prompt), and a
standard error is sample standard deviation / sqrt(n). One thing differs: the harness gives a tie to the first of the
tied choices; here the right choice counts 1/k when it is one of k tied ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

NAN = float("nan")


@dataclass(frozen=True)
class Estimate:
    """A mean with its standard error; the error is nan for a single example."""

    value: float
    stderr: float


def mean_stderr(values: ArrayLike) -> Estimate:
    """Mean and s / sqrt(n) with s^2 = sum (x - mean)^2 / (n - 1); for 0/1 values that is sqrt(p (1 - p) / (n - 1))."""
    array = np.asarray(values, dtype=np.float64)
    if array.size == 0:
        raise ValueError("the mean of no examples is not defined")
    stderr = float(array.std(ddof=1) / math.sqrt(array.size)) if array.size > 1 else NAN
    return Estimate(float(array.mean()), stderr)


def ratio_stderr(numerators: ArrayLike, denominators: ArrayLike) -> Estimate:
    """R = sum a / sum b over examples, with the standard error of its linearisation.

    se(R) = s(a - R b) / (mean(b) sqrt(n)), s with n - 1: examples are the independent unit, not their tokens.

    Source: Cochran, Sampling Techniques (1977), eq. 6.13, without finite-population correction.
    """
    a = np.asarray(numerators, dtype=np.float64)
    b = np.asarray(denominators, dtype=np.float64)
    if a.size == 0 or b.sum() <= 0:
        raise ValueError("a ratio needs at least one example with a positive denominator")
    ratio = float(a.sum() / b.sum())
    if a.size == 1:
        return Estimate(ratio, NAN)
    return Estimate(ratio, float((a - ratio * b).std(ddof=1) / (b.mean() * math.sqrt(a.size))))


def tie_credit(scores: ArrayLike, gold: int) -> float:
    """1/k if `gold` is among the k largest scores, else 0."""
    array = np.asarray(scores, dtype=np.float64)
    best = np.flatnonzero(array == array.max())
    return 1.0 / best.size if gold in best else 0.0
