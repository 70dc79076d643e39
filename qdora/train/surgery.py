"""A step's gradient kept apart by task, and tasks in conflict projected off each other (PCGrad)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qdora.train.distributed import Processes
from qdora.train.interference import inner_products

Array = NDArray[np.float64]


def pcgrad_weights(gram: Array, orders: Sequence[Sequence[int]]) -> tuple[Array, int]:
    """How much of each task's gradient PCGrad's sum has.

    For each task i, h = g_i; for all others j in a random order: if <h, g_j> < 0, h <- h - <h, g_j> g_j / <g_j, g_j>.
    The step takes the sum of all h. Each h is a combination of the g, so that all of it can be worked out from their
    inner products, without another vector.

    Source: Gradient Surgery for Multi-Task Learning, arXiv 2001.06782, algorithm 1.

    Args:
        gram: (tasks, tasks) inner products.
        orders: For each task the others in the order in which it meets them.
    Returns:
        (tasks,): the sum is weights @ g; ones where no two are in conflict. And the number of projections.
    """
    num_tasks = len(gram)
    total, num_projections = np.zeros(num_tasks), 0
    for task, order in enumerate(orders):
        own = np.eye(num_tasks)[task]
        for other in order:
            product = float(own @ gram[:, other])
            if product < 0.0 and gram[other, other] > 0.0:
                own[other] -= product / float(gram[other, other])
                num_projections += 1
        total += own
    return total, num_projections


class TaskGradients:
    """The gradients of one step, task by task: as many float32 copies of the adapter's size as the step has tasks.

    With L = sum_t NLL_t / labelled tokens of the step, task t's gradient is that of its own part of the sum, so tasks
    keep the weight that their tokens give them, and where none are in conflict the sum is the plain gradient.

    Args:
        parameters: Path -> parameter.
        names: All tasks, in an order that is the same in all processes.
        seed: Of the orders of projection; with the number of the step, so that a resumed run draws the same.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], names: Sequence[str], seed: int) -> None:
        self._parameters, self._names, self._seed = list(parameters.values()), list(names), seed
        self._found: dict[str, list[Tensor | None]] = {}

    @property
    def num_bytes(self) -> int:
        """Most memory that the gradients take, on the parameters' device."""
        return 4 * len(self._names) * sum(parameter.numel() for parameter in self._parameters)

    def clear(self) -> None:
        """Forget the step."""
        self._found = {}

    def take(self, name: str) -> None:
        """What has been accumulated since the last call is task `name`'s, all of it; parameters go on without."""
        assert name not in self._found, name
        self._found[name] = [parameter.grad for parameter in self._parameters]
        for parameter in self._parameters:
            parameter.grad = None

    @torch.no_grad()
    def combine_(self, step: int, processes: Processes) -> dict[str, Any]:
        """Put the projected sum over tasks, and over processes before that, into the parameters' gradients.

        Args:
            step: Number of the optimizer step.
            processes: All call this, whatever tasks they have seen.
        Returns:
            For the metrics: `num_projections`, and `weights`, task -> share of its gradient in the sum.
        """
        seen = {name for theirs in processes.gather(list(self._found)) for name in theirs}
        names = [name for name in self._names if name in seen]
        gradients = [self._summed(name, processes) for name in names]
        self.clear()
        gram = torch.zeros(len(names), len(names), dtype=torch.float64, device=self._parameters[0].device)
        for rows in zip(*gradients, strict=True):
            gram += inner_products(rows)
        generator = np.random.default_rng([self._seed, step])
        orders = [[int(j) for j in generator.permutation(len(names)) if j != i] for i in range(len(names))]
        weights, num_projections = pcgrad_weights(gram.cpu().numpy(), orders)
        for parameter, rows in zip(self._parameters, zip(*gradients, strict=True), strict=True):
            for row, weight in zip(rows, weights.tolist(), strict=True):
                if row is None:
                    continue
                if parameter.grad is None:
                    parameter.grad = row.mul_(weight)
                else:
                    parameter.grad.add_(row, alpha=weight)
        return {"num_projections": num_projections, "weights": dict(zip(names, weights.tolist(), strict=True))}

    def _summed(self, name: str, processes: Processes) -> list[Tensor | None]:
        """One task's gradients, summed over the processes."""
        for parameter, gradient in zip(self._parameters, self._found.get(name, self._nothing), strict=True):
            parameter.grad = gradient
        processes.sum_gradients_(self._parameters)
        found = [parameter.grad for parameter in self._parameters]
        for parameter in self._parameters:
            parameter.grad = None
        return found

    @property
    def _nothing(self) -> list[Tensor | None]:
        return [None] * len(self._parameters)
