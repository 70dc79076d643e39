"""What a step's gradient is the gradient of: the plain loss, a weighted one, or one with tasks kept from each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from qdora.data.batching import MicroBatch
from qdora.data.loader import Step
from qdora.train.surgery import TaskGradients
from qdora.train.task_weights import TaskWeights


@dataclass(frozen=True)
class Objective:
    """The loss of a step; the default is the summed NLL over the labelled tokens.

    Attributes:
        weights: Of each task's tokens, or None: all count the same.
        gradients: Takes the gradient task by task, for which no micro-batch may have two tasks; or None.
    """

    weights: TaskWeights | None = None
    gradients: TaskGradients | None = None

    def begin(self) -> None:
        """Before the first micro-batch of a step, also of one that is tried again."""
        if self.gradients is not None:
            self.gradients.clear()

    def total(self, step: Step) -> float:
        """What the summed NLL is divided by."""
        return step.num_label_tokens if self.weights is None else self.weights.total(step)

    def example_weights(self, micro: MicroBatch) -> Tensor | None:
        """(examples,) float32, or None where all are 1."""
        return None if self.weights is None else self.weights.of(micro)

    def after(self, micro_batches: Sequence[MicroBatch], number: int) -> None:
        """After the backward pass of micro-batch `number`: where it is the last of its task, put the gradient aside."""
        if self.gradients is None:
            return
        task = _task(micro_batches[number])
        if number + 1 == len(micro_batches) or _task(micro_batches[number + 1]) != task:
            self.gradients.take(task)


def _task(micro: MicroBatch) -> str:
    first = int(micro.task_ids[0])
    assert bool((micro.task_ids == first).all()), "a micro-batch of several tasks"
    return micro.task_names[first]
