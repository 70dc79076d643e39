"""The best of a run's evaluations so far, and early stopping."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


class BestSoFar:
    """The best value among a run's evaluations; in a tie the earlier one.

    Args:
        question: JSON values that define what is compared (metric, tasks, examples); values of another question are not
            comparable.
        higher: Whether higher is better.
        patience: Evaluations in a row without a better value that end the run; None: they never do.
    Attributes:
        judged: Step of the last evaluation that was judged, None before the first.
    """

    def __init__(self, question: Mapping[str, Any], *, higher: bool, patience: int | None) -> None:
        assert patience is None or patience > 0, patience
        self.question, self.higher, self.patience = dict(question), higher, patience
        self.step: int | None = None
        self.value: float | None = None
        self.num_since = 0
        self.judged: int | None = None

    def judge(self, step: int, value: float) -> bool:
        """Take the finite value of the evaluation after `step` steps; returns whether it is the best so far."""
        assert math.isfinite(value), value
        self.judged = step
        better = self.value is None or (value > self.value if self.higher else value < self.value)
        if better:
            self.step, self.value, self.num_since = step, value, 0
        else:
            self.num_since += 1
        return better

    @property
    def is_over(self) -> bool:
        """Whether the last `patience` evaluations brought nothing better."""
        return self.patience is not None and self.num_since >= self.patience

    def state_dict(self) -> dict[str, Any]:
        """State for a checkpoint; JSON values."""
        found = {"question": self.question, "step": self.step, "value": self.value, "num_since": self.num_since}
        return {**found, "judged": self.judged}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state of a checkpoint; it must be of the same question."""
        assert state["question"] == self.question, (state["question"], self.question)
        self.step, self.value, self.num_since = state["step"], state["value"], state["num_since"]
        self.judged = state.get("judged")  # not in checkpoints of earlier versions
