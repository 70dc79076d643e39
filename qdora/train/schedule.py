"""The learning rate at each step: warm-up, then linear, cosine or constant."""

from __future__ import annotations

import math
from typing import Literal

ScheduleName = Literal["linear", "cosine", "constant"]


def warmup_steps(warmup: int | float, num_steps: int) -> int:
    """Warm-up in steps: an int is a number of steps, a float a share of the run (rounded up)."""
    return math.ceil(warmup * num_steps) if isinstance(warmup, float) else warmup


def learning_rate(
    step: int, num_steps: int, *, peak: float, schedule: ScheduleName, warmup: int | float, end: float = 0.0
) -> float:
    """The rate of optimizer step `step` (from 0) of `num_steps`.

    Warm-up rises linearly and reaches `peak` at its last step; linear and cosine fall from there to `end` at the end of
    the run, reached one step after the last, so no step is spent at rate 0.

    Args:
        step: 0 to num_steps - 1.
        num_steps: Length of the run.
        peak: Largest rate.
        schedule: linear, cosine (half a period, arXiv 1608.03983 without restarts) or constant.
        warmup: Steps (int) or share of the run (float below 1).
        end: Rate that linear and cosine end at.
    """
    warm = min(warmup_steps(warmup, num_steps), num_steps)
    if step < warm:
        return peak * (step + 1) / warm
    if schedule == "constant":
        return peak
    progress = (step - warm) / max(1, num_steps - warm)
    share = (1 - progress) if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return end + (peak - end) * share
