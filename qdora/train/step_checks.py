"""Checks of training steps: a loss that is not finite or a spike, and a matrix that gets no gradient."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qdora.data.batches import Step
from qdora.recipe.train_settings import TrainConfig
from qdora.train.optimizer import AdapterOptimizer

# A loss is compared with the median of the last _WINDOW applied steps; with fewer than _LEAST, no loss is a spike.
_WINDOW, _LEAST = 32, 8


@dataclass(frozen=True)
class BadStep:
    """Step number `step`, from 1, which was not applied, with what this process knows of it.

    Attributes:
        loss, gradient_norm: Over all processes; NaN if unknown.
        example_nll: Summed NLL of each example, in the batch's order; NaN if unknown.
    """

    step: int
    reason: str
    batch: Step
    loss: float
    gradient_norm: float
    example_nll: list[float]


class BadSteps:
    """Decides which steps are bad and whether they are skipped (`train.on_bad_step`, `max_skips`, `spike`).

    A step is bad if its loss or gradient is not finite, or if its loss is more than `spike` times the median of the
    last 32 applied steps. All processes decide alike, since they see the same numbers.
    """

    def __init__(self, train: TrainConfig) -> None:
        self._train = train
        self._losses: deque[float] = deque(maxlen=_WINDOW)
        self._in_a_row = 0
        self.num_skipped = 0

    def fault(self, loss: float, gradient_norm: float) -> str | None:
        """What is wrong with a step of these numbers, or None."""
        for name, value in (("loss", loss), ("gradient norm", gradient_norm)):
            if not math.isfinite(value):
                return f"{name} {value} is not finite"
        if self._train.spike is not None and len(self._losses) >= _LEAST:
            usual = statistics.median(self._losses)
            if loss > self._train.spike * usual:
                return (
                    f"loss {loss:.4g} is more than {self._train.spike:g} times {usual:.4g}, the median of the last "
                    f"{len(self._losses)} steps"
                )
        return None

    def applied(self, loss: float) -> None:
        """Count a step that was applied."""
        self._losses.append(loss)
        self._in_a_row = 0

    def skip(self) -> bool:
        """Whether a bad step is skipped, and then counted; otherwise the run has to stop before it."""
        if self._train.on_bad_step == "stop" or self._in_a_row >= self._train.max_skips:
            return False
        self._in_a_row += 1
        self.num_skipped += 1
        return True

    def advice(self, kept: Path) -> str:
        """What a user can do after a stop, whose batch is in the directory `kept` of the run."""
        look = f"Fix: look at the batch in {'/'.join(kept.parts[-2:])}"
        again = "then resume with --resume and a lower -s train.lr=... or -s train.clip=..."
        if self._train.on_bad_step == "skip":
            few = {0: "", 1: "The step before it was skipped. "}
            skipped = few.get(self._in_a_row, f"The {self._in_a_row} steps before it were skipped. ")
            return f"{skipped}{look}, {again}"
        return f"{look}, {again}, or with -s train.on_bad_step=skip"

    def state_dict(self) -> dict[str, Any]:
        """State for a checkpoint; JSON values."""
        return {"losses": list(self._losses), "in_a_row": self._in_a_row, "num_skipped": self.num_skipped}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state of a checkpoint."""
        self._losses = deque(state["losses"], maxlen=_WINDOW)
        self._in_a_row, self.num_skipped = state["in_a_row"], state["num_skipped"]


class MissingGradientCheck:
    """Finds the trainable tensors that get no gradient other than zero in the first updates of a run.

    It reads gradients, not parameters: a healthy update can be too small to show in float32, at the end of a cosine or
    the start of a slow warm-up.

    Attributes:
        num_tensors: Trainable tensors.
        num_updates: Updates that are looked at.
    """

    num_updates = 3  # lora_A gets no gradient while lora_B is zero, that is, in the first one

    def __init__(self, optimizer: AdapterOptimizer) -> None:
        self._parameters, self._optional = optimizer.parameters, optimizer.undecayed
        self.num_tensors = len(self._parameters)
        self._num_seen = 0
        self._arrived: dict[str, Tensor] = {}

    def updated(self, lr: float) -> list[str] | None:
        """After the last update that is looked at, the tensors that had no gradient in any of them; otherwise None.

        Must be called after each update, while its gradients exist. An update with `lr` 0 does not count.
        """
        if lr == 0.0 or self._num_seen == self.num_updates:
            return None
        self._num_seen += 1
        for name, parameter in self._parameters.items():
            if parameter.grad is not None:
                some = parameter.grad.any()  # stays on the device, so that the host does not wait for it
                self._arrived[name] = self._arrived.get(name, some) | some
        if self._num_seen < self.num_updates:
            return None
        arrived = (
            dict(zip(self._arrived, torch.stack(list(self._arrived.values())).tolist(), strict=True))
            if self._arrived
            else {}
        )
        # Rows of new tokens have a gradient only in steps whose texts have such a token.
        needed = [name for name in self._parameters if name not in self._optional]
        return [name for name in needed if not arrived.get(name, False)]
