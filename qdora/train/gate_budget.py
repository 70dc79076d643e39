"""How many components may be left at a step, which ones have to go, and by how much: pure functions on flat vectors.

All vectors have one entry for each component that still exists, over all layers: `cost` is what it takes of the budget,
`layer` the number of its layer, `alive` whether its gate is not 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qdora.ops.hard_concrete import probability_on

LARGEST_LOGIT = 8.0
"""log_alpha beyond which a hard-concrete gate is as good as decided."""


def allowed_cost(step: int, full: float, target: float, num_warmup: int, num_anneal: int) -> float:
    """The budget after `step` steps: full in warm-up, then down to the target along (1 - t)^3, so that what is pruned
    late, when the gates are best known, is little (arXiv 2303.10512, eq. 15).

    Args:
        step: Steps done.
        full, target: Budget at the start and at the end.
        num_warmup, num_anneal: Steps of each phase.
    """
    t = min(max((step - num_warmup) / num_anneal, 0.0), 1.0)
    return target + (full - target) * (1.0 - t) ** 3


def surplus(order: Tensor, cost: Tensor, layer: Tensor, alive: Tensor, allowed: float) -> Tensor:
    """The components that have to go so that the others fit: the lowest in `order`, but the highest of each layer.

    Args:
        order: (n,) what a component is worth per unit of cost; any order-preserving number.
        cost, layer, alive: (n,).
        allowed: Cost that may be left.
    Returns:
        (n,) bool. What is left costs at most `allowed`, and less by less than one component, unless the best ones of
        all layers cost more.
    """
    going = torch.zeros_like(alive)
    excess = float(cost[alive].sum()) - allowed
    if excess <= 0:
        return going
    candidates = (alive & ~_best_of_layers(order, layer, alive)).nonzero().squeeze(1)
    lowest = candidates[order[candidates].argsort(stable=True)]
    before = cost[lowest].cumsum(0) - cost[lowest]
    # Sums of whole numbers: exact
    going[lowest[before < excess]] = True
    return going


def _best_of_layers(order: Tensor, layer: Tensor, alive: Tensor) -> Tensor:
    """(n,) bool: the highest living component of each layer; of equal ones the first."""
    down = torch.where(alive, order, float("-inf")).argsort(descending=True, stable=True)
    place = torch.full((int(layer.max()) + 1,), len(order)).scatter_reduce(
        0, layer[down], torch.arange(len(order)), "amin"
    )
    best = torch.zeros_like(alive)
    best[down[place[place < len(order)]]] = True
    return best & alive


def death_penalty(values: Tensor, step_size: Tensor, cost: Tensor) -> Tensor:
    """The weight of the L1 penalty at which a proximal step takes a gate to 0: |c| / (p cost), (n,).

    The proximal step of lambda sum cost |c| in the metric diag(1 / p) takes lambda p cost off |c|. With Adam's step
    size p = lr / (sqrt(v) + eps) this is |c| times the root mean square of its gradient, so it stays the same if a
    component is scaled and its gate divided by that: what the loss changes, to first order, when the component goes.

    Args:
        values: Gates c.
        step_size: p, positive.
        cost: (n,), positive.
    """
    return values.abs() / (step_size * cost)


def proximal_step(values: Tensor, step_size: Tensor, cost: Tensor, penalty: float, chosen: Tensor) -> Tensor:
    """argmin over z of penalty cost |z| + (z - c)^2 / (2 p), for the chosen ones: |c| less penalty p cost, at least 0.

    Args:
        values: Gates c.
        step_size, cost: As of `death_penalty`.
        penalty: lambda.
        chosen: (n,) bool.
    Returns:
        (n,), the others as they were.
    """
    shrunk = values.sign() * (values.abs() - penalty * step_size * cost).clamp_min(0.0)
    return torch.where(chosen, shrunk, values)


def shifted_to_budget(log_alpha: Tensor, cost: Tensor, alive: Tensor, allowed: float) -> Tensor:
    """log_alpha + delta cost for the living, so that their expected cost is `allowed`: the nearest distribution (in KL
    divergence) of independent gates that keeps the budget on average.

    Args:
        log_alpha: (n,).
        cost: (n,), on average about 1.
        alive: (n,) bool.
        allowed: Expected cost; at or above that of all living, they are all on.
    Returns:
        (n,), kept within `LARGEST_LOGIT`.
    """

    def moved(delta: float) -> Tensor:
        return (log_alpha + delta * cost).clamp(-LARGEST_LOGIT, LARGEST_LOGIT)

    def expected(delta: float) -> float:
        return float((probability_on(moved(delta)) * cost)[alive].sum())

    # Far enough to bring every gate to either end
    high = 2.0 * LARGEST_LOGIT / float(cost.min())
    low = -high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if expected(middle) < allowed else (low, middle)
    return torch.where(alive, moved(high), log_alpha)
