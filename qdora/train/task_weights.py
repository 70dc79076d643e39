"""How much a token of each task counts in the loss: fixed, or more where the validation loss falls more slowly."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qdora.data.batching import MicroBatch
from qdora.data.loader import Step

TEMPERATURE = 2.0
"""Of progress weights: large makes them equal. Liu et al., arXiv 1803.10704, choose 2."""


def progress_weights(
    before: Mapping[str, float], now: Mapping[str, float], temperature: float = TEMPERATURE
) -> dict[str, float]:
    """w_k = K exp(r_k / T) / sum_i exp(r_i / T) with r_k = L_k(now) / L_k(before), for K tasks: 1 on average.

    Source: Dynamic Weight Average, End-to-End Multi-Task Learning with Attention, arXiv 1803.10704. L is a
    task's training loss over an epoch there; here it is its NLL per answer token on validation data, from one
    evaluation to the next, so that a task that is learnt by heart does not count as making progress.

    Args:
        before, now: Task -> loss, above 0.
    """
    ratios = {task: now[task] / before[task] for task in now}
    raised = {task: math.exp((ratio - max(ratios.values())) / temperature) for task, ratio in ratios.items()}
    total = sum(raised.values())
    return {task: len(raised) * value / total for task, value in raised.items()}


class TaskWeights:
    """The weight of each task's tokens in the loss, sum_t w_t NLL_t / sum_t w_t tokens_t over a step.

    Args:
        weights: Task -> weight, above 0. By progress they start at 1.
        sources: By progress: name in the evaluations -> tasks of its examples.
    """

    def __init__(self, weights: Mapping[str, float], sources: Mapping[str, list[str]] | None = None) -> None:
        self.weights = dict(weights)
        self._sources = sources
        self._before: dict[str, float] | None = None

    @property
    def by_progress(self) -> bool:
        """Whether evaluations change the weights."""
        return self._sources is not None

    def of(self, micro: MicroBatch) -> Tensor:
        """(examples,) float32: the weight of each example's tokens."""
        return torch.tensor([self.weights[name] for name in micro.task_names])[micro.task_ids]

    def total(self, step: Step) -> float:
        """Weighted labelled tokens of the whole step."""
        return sum(self.weights[name] * count for name, count in step.task_label_tokens.items())

    def evaluated(self, nll: Mapping[str, float]) -> None:
        """Take an evaluation's NLL per token; from the second one on, weights by progress follow from the last two."""
        if self._sources is None:
            return
        losses = {name: nll[name] for name in self._sources}
        if self._before is not None:
            found = progress_weights(self._before, losses)
            self.weights |= {task: found[name] for name, tasks in self._sources.items() for task in tasks}
        self._before = losses

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint; JSON types."""
        return {"weights": dict(self.weights), "before": self._before}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        if self._sources is not None:
            self.weights, self._before = dict(state["weights"]), state["before"]
