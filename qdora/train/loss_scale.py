"""Loss scaling: float16 holds nothing below 6e-8 and nothing above 65,504, and gradients pass both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# The range of the factor, its start, and the steps without an overflow after which it doubles.
_LEAST, _START, _MOST = 2.0**-4, 2.0**7, 2.0**15
_PATIENCE = 500


class LossScale:
    """The factor of a step's summed loss in a float16 backward pass; the float32 gradients are divided by it.

    The sum is not divided by the step's tokens before the backward pass: of 32,768 tokens each would have a gradient
    that underflows. A step whose gradients overflow is computed again with half the factor, so no step is lost. Source:
    Mixed Precision Training, arXiv 1710.03740, sec. 3.2.
    """

    def __init__(self) -> None:
        self.value = _START
        self._num_good = 0

    def halve(self) -> bool:
        """After an overflow: half the factor, and whether the step is worth another try."""
        self._num_good = 0
        if self.value <= _LEAST:
            return False
        self.value /= 2
        return True

    def applied(self) -> None:
        """Count a step without an overflow; after many of them the factor doubles."""
        self._num_good += 1
        if self._num_good == _PATIENCE:
            self.value, self._num_good = min(2 * self.value, _MOST), 0

    def state_dict(self) -> dict[str, Any]:
        """State for a checkpoint; JSON values."""
        return {"value": self.value, "num_good": self._num_good}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state of a checkpoint."""
        self.value, self._num_good = state["value"], state["num_good"]
