"""What a run does around the steps of the training loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from qdora.train.step_checks import BadStep

Metrics = dict[str, Any]
"""One line of metrics.jsonl."""


@dataclass(frozen=True)
class Evaluated:
    """The result of an evaluation during training."""

    line: Metrics
    """Its line of metrics, without the step; the first process's counts."""
    save: bool = False
    """Whether the state is worth a checkpoint; the same in all processes, like `stop`."""
    stop: bool = False
    """Whether the run ends here."""


@dataclass(frozen=True)
class Reading:
    """Numbers on a GPU that are read with those of a step, so that the host waits once."""

    numbers: Callable[[], Tensor]
    """(n,) of any float dtype, once the gradient is complete."""
    take: Callable[[list[float]], None]
    """Takes their values."""


@dataclass(frozen=True, kw_only=True)
class Hooks:
    """What a run does around the steps; the loop only calls it.

    Attributes:
        write_metrics: Takes the numbers of a finished step or evaluation.
        save: Writes a checkpoint of the state after `step` steps and returns its directory.
        keep_batch: Writes the examples of a step that was not applied and returns where.
        evaluate, evaluate_every: Measures the model after `step` steps; steps between calls, None for none.
        begin_step: Prepares the model for the step that follows `step` steps, at every attempt at its gradient.
        reading: What `end_step` needs of the device; only a single process reads it beforehand.
        end_step: Takes `step` and whether its update was made, and returns more numbers of the step.
        updated: Takes the learning rate after every update; returns what is wrong with the update, or None.
    """

    write_metrics: Callable[[Metrics], None]
    save: Callable[[int], Path]
    keep_batch: Callable[[BadStep], Path]
    evaluate: Callable[[int], Evaluated] | None = None
    evaluate_every: int | None = None
    begin_step: Callable[[int], None] = lambda _step: None
    reading: Reading | None = None
    end_step: Callable[[int, bool], Metrics] | None = None
    updated: Callable[[float], str | None] = lambda _lr: None
