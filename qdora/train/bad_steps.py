"""Steps that are never applied: a loss or gradient that is not finite, or a loss far above the usual one."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from qdora.data.loader import Step

Policy = Literal["stop", "skip"]

WINDOW, LEAST = 32, 8
"""Applied steps whose median loss is the usual one; with fewer than the second number, no loss is a spike."""


@dataclass(frozen=True)
class BadStep:
    """A step that was not applied, as far as this process has seen it.

    Attributes:
        step: Its number, from 1.
        reason: What was wrong.
        batch: Its examples.
        loss, gradient_norm: Of all processes; NaN where they are not known.
        example_nll: Summed NLL of each of the examples, in the batch's order; NaN where it is not known.
    """

    step: int
    reason: str
    batch: Step
    loss: float
    gradient_norm: float
    example_nll: list[float]


class BadSteps:
    """What is a bad step, and whether it is skipped. Looks only at numbers that are equal in all processes.

    Args:
        policy: stop: a bad step ends the run; skip: the run goes on without it.
        max_skips: Steps that may be skipped in a row; at the next bad one the run stops.
        spike: A loss above so many times the median of the last `WINDOW` applied steps is bad; None: none is.
    """

    def __init__(self, policy: Policy = "stop", *, max_skips: int = 5, spike: float | None = None) -> None:
        assert max_skips > 0, max_skips
        assert spike is None or spike > 1, spike
        self.policy, self.max_skips, self.spike = policy, max_skips, spike
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._in_a_row = 0
        self.num_skipped = 0

    def fault(self, loss: float, gradient_norm: float) -> str | None:
        """What is wrong with a step of these numbers, or None."""
        if not math.isfinite(loss):
            return f"loss {loss} is not finite"
        if not math.isfinite(gradient_norm):
            return f"gradient norm {gradient_norm} is not finite"
        if self.spike is not None and len(self._losses) >= LEAST:
            usual = statistics.median(self._losses)
            if loss > self.spike * usual:
                return (
                    f"loss {loss:.4g} is more than {self.spike:g} times {usual:.4g}, the median of the last "
                    f"{len(self._losses)} steps"
                )
        return None

    def applied(self, loss: float) -> None:
        """Count a step that was applied."""
        self._losses.append(loss)
        self._in_a_row = 0

    def skip(self) -> bool:
        """Whether a bad step is skipped; if so it is counted, if not the run has to stop before it."""
        if self.policy == "stop" or self._in_a_row >= self.max_skips:
            return False
        self._in_a_row += 1
        self.num_skipped += 1
        return True

    @property
    def way_on(self) -> str:
        """What to do after a stop."""
        if self.policy == "skip":
            return f"The {self._in_a_row} steps before it were skipped. Lower train.lr or train.clip"
        return "Look at the kept batch, lower train.lr or train.clip, or set train.on_bad_step to skip"

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint; JSON values."""
        return {"losses": list(self._losses), "in_a_row": self._in_a_row, "num_skipped": self.num_skipped}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken."""
        self._losses = deque(state["losses"], maxlen=WINDOW)
        self._in_a_row, self.num_skipped = state["in_a_row"], state["num_skipped"]
