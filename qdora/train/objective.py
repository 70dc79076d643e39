"""A step's gradient kept apart by task, and tasks in conflict projected off each other (PCGrad).

How much a token of each task counts in the loss: fixed, or more where the validation loss falls more slowly.

What a step's gradient is the gradient of: the plain loss, a weighted one, or one with tasks kept from each other.

From a recipe to the objective of its steps: weights of tasks in the loss, and gradients kept apart by task.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qdora.data.batching import MicroBatch
from qdora.data.loader import Step, StepLoader
from qdora.recipe.settings import Recipe
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


logger = logging.getLogger("qdora")


def objective_faults(recipe: Recipe, loader: StepLoader, evaluated: Sequence[str]) -> list[str]:
    """What the data says against the asked objective.

    Args:
        recipe: Of the run.
        loader: Of its training data.
        evaluated: Names of the sources that are evaluated while training.
    """
    faults = []
    if recipe.interference.gradients == "pcgrad" and len(loader.task_names) < 2:
        only = ", ".join(loader.task_names)
        faults.append(f"interference.gradients: pcgrad, but {only} is the only task, allowed: null.")
    if recipe.interference.loss_weights == "progress":
        faults += [
            f"interference.loss_weights: progress, but {source.label} is not evaluated, allowed: validation data for "
            "every source, all of them in eval.tasks."
            for source in recipe.data.mix
            if source.label not in evaluated
        ]
    weights: dict[str, tuple[float, str]] = {}
    for source, part in zip(recipe.data.mix, loader.tokenised, strict=True):
        for task in part.task_names:
            weight, first = weights.setdefault(task, (_loss_weight(source.loss_weight), source.label))
            if weight != _loss_weight(source.loss_weight):
                faults.append(
                    f"data.mix: task {task} is in {first} with loss_weight {weight:g} and in {source.label} with "
                    f"{_loss_weight(source.loss_weight):g}, allowed: one weight for a task, or another `name`."
                )
    return faults


def make_objective(recipe: Recipe, loader: StepLoader, parameters: Mapping[str, nn.Parameter]) -> Objective:
    """The objective of the recipe's steps; the loader makes its micro-batches for it from now on."""
    pairs = list(zip(recipe.data.mix, loader.tokenised, strict=True))
    weights = gradients = None
    if recipe.interference.loss_weights == "progress":
        sources = {source.label: part.task_names for source, part in pairs}
        weights = TaskWeights(dict.fromkeys(loader.task_names, 1.0), sources)
    elif any(source.loss_weight is not None for source in recipe.data.mix):
        weights = TaskWeights(
            {task: _loss_weight(source.loss_weight) for source, part in pairs for task in part.task_names}
        )
    if recipe.interference.gradients == "pcgrad":
        gradients = TaskGradients(parameters, loader.task_names, recipe.train.seed)
        loader.by_task = True
        logger.info("PCGrad keeps a gradient for each of %d tasks: %.1f MiB.", *_size(gradients, loader))
    return Objective(weights, gradients)


def weigh_by_progress(objective: Objective, metrics: Mapping[str, Any], processes: Processes) -> dict[str, Any]:
    """Take an evaluation's metrics (of the first process) into the weights; what the line of metrics says of them."""
    weights = objective.weights
    if weights is None or not weights.by_progress:
        return {}
    nll = {task: numbers["nll_per_token"] for task, numbers in metrics.items()}
    weights.evaluated(processes.gather(nll)[0])
    return {"loss_weights": dict(weights.weights)}


def _loss_weight(given: float | None) -> float:
    return 1.0 if given is None else given


def _size(gradients: TaskGradients, loader: StepLoader) -> tuple[int, float]:
    return len(loader.task_names), gradients.num_bytes / 2**20
