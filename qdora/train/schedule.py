"""The learning rate of each step: warm-up, then constant, linear or cosine."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from qdora.recipe.train_settings import TrainConfig

logger = logging.getLogger("qdora")


class Schedule:
    """The learning rate of a run of `num_steps`.

    Warm-up rises linearly and reaches `train.lr` at its last step. The rate then stays (constant) or falls to
    `train.lr_end`, linearly or along half a cosine (arXiv 1608.03983, without restarts). It would reach that end one
    step after the last, so no step is spent at rate 0.

    A run that is extended keeps the warm-up that it started with. From the first further step on its rate is that of a
    run of the new length: the same as before for constant, otherwise higher.
    """

    def __init__(self, train: TrainConfig, num_steps: int) -> None:
        self._train, self._num_steps = train, num_steps
        # As written in the recipe: 0.07 * 100 is 7.000000000000001 in floating point.
        share = Fraction(repr(train.warmup)) if isinstance(train.warmup, float) else None
        self._warmup = min(train.warmup if share is None else math.ceil(share * num_steps), num_steps)

    def rate(self, step: int) -> float:
        """The learning rate of optimizer step `step`, 0 to num_steps - 1."""
        train, warmup = self._train, self._warmup
        if step < warmup:
            return train.lr * (step + 1) / warmup
        if train.schedule == "constant":
            return train.lr
        progress = (step - warmup) / max(1, self._num_steps - warmup)
        share = (1 - progress) if train.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
        return train.lr_end + (train.lr - train.lr_end) * share

    def state_dict(self) -> dict[str, Any]:
        """State for a checkpoint; JSON values."""
        return {"num_steps": self._num_steps, "warmup": self._warmup}

    def load_state_dict(self, state: Mapping[str, Any], step: int) -> None:
        """Restore the state of a checkpoint after `step` steps; tells what follows if the run is longer now."""
        self._warmup = state["warmup"]
        if state["num_steps"] == self._num_steps:
            return
        name, then = self._train.schedule, f", {self.rate(step):.3g} at first"
        logger.warning(
            "The run has %d steps now, %d before: from step %d on the learning rate is that of a %s schedule of %d "
            "steps with the old warm-up%s.",
            *(self._num_steps, state["num_steps"], step + 1, name, self._num_steps, "" if name == "constant" else then),
        )
