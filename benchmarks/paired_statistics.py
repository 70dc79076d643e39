"""Intervals of results that were compared by seeds and examples together: a mean, and a difference of two series."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qdora.evaluation.metrics import Paired, PairedDifference, paired_difference, paired_half_width

Array = NDArray[np.float64]


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


def mean_interval(tasks: Sequence[TaskScores], confidence: float = 0.95) -> Interval:
    """The macro average of the first series, with its t interval over examples and seeds (`paired_difference`)."""
    pairs = [Paired(t.scores[0], np.zeros_like(t.scores[0]), t.weights) for t in tasks]
    value, half = paired_half_width(pairs, confidence)
    return Interval(value, value - half, value + half)


def difference_interval(tasks: Sequence[TaskScores], confidence: float = 0.95) -> PairedDifference:
    """The first series minus the second, with its t interval over examples and seeds, and the p-value."""
    return paired_difference([Paired(t.scores[0], t.scores[1], t.weights) for t in tasks], confidence)


def seed_differences(tasks: Sequence[TaskScores]) -> Array:
    """(seeds,) macro average of the first series minus the second, for each seed."""
    parts = [(task.scores[0] - task.scores[1]).sum(axis=1) / task.weights.sum() for task in tasks]
    averaged: Array = np.mean(parts, axis=0)
    return averaged
