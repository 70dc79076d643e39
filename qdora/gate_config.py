"""The section adapter.gates of a recipe: how components of the adapters are found superfluous and removed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from qdora.section import Fault, OneOrMore, Positive, Section, Warmup, Whole


class GateConfig(Section):
    """One trainable factor per rank component; the budget falls to its end while training, and what is over it goes.

    At the start all gates are 1. Every layer keeps at least its best component. Magnitudes have no gates.
    """

    mode: Literal["l1", "hard_concrete"] = "l1"
    """l1: what is beyond the budget is shrunk to 0 by a proximal step in Adam's metric. hard_concrete: gates are drawn
    at random, and what is rarely on is removed (L0, arXiv 1712.01312). Both are deterministic in evaluation."""
    mean_rank: OneOrMore | None = None
    """Budget: rank of the adapted layers on average. Either this or parameters."""
    parameters: Whole | None = None
    """Budget: parameters of lora_A and lora_B together. Either this or mean_rank."""
    warmup: Warmup = 0.1
    """Steps (whole number) or share of all steps (below 1) in which nothing is removed."""
    anneal: Warmup = 0.5
    """Steps or share of all steps after these, in which the budget falls from all components to its end."""
    lr: Positive = 0.01
    """Learning rate of the gates, in an Adam of their own without decay and schedule."""
    shrink_every: Whole = 10
    """Steps between removals of what has become superfluous from lora_A, lora_B and the optimizer's states."""

    def faults(self) -> Iterator[Fault]:
        given = [name for name in ("mean_rank", "parameters") if getattr(self, name) is not None]
        if len(given) != 1:
            got = "both" if given else "neither"
            yield (
                "mean_rank",
                f"contradiction, got {got} of mean_rank and parameters, allowed: exactly one of them.",
            )
        if self.anneal == 0:
            yield "anneal", f"the budget cannot fall at once, got {self.anneal}, allowed: more than 0."
        shares = [each for each in (self.warmup, self.anneal) if isinstance(each, float)]
        if sum(shares) > 1:
            what = f"longer than the run together with warmup, got {self.anneal:g} and {self.warmup:g}"
            yield "anneal", f"{what}, allowed: at most 1 in all."

    def phases(self, num_steps: int) -> tuple[int, int]:
        """Steps of warm-up and of the anneal in a run of `num_steps`."""
        steps = [each if isinstance(each, int) else round(each * num_steps) for each in (self.warmup, self.anneal)]
        warmup, anneal = steps
        if isinstance(self.warmup, float) and isinstance(self.anneal, float):
            # Each is rounded by itself: halves of an odd number would be a step too long
            warmup = min(warmup, num_steps - 1)
            anneal = min(anneal, num_steps - warmup)
        return warmup, max(1, anneal)

    def length_fault(self, num_steps: int) -> str | None:
        """Why the anneal does not end within the run, or None."""
        warmup, anneal = self.phases(num_steps)
        if warmup + anneal <= num_steps:
            return None
        what = f"the budget is not reached, got {warmup} + {anneal} steps of warm-up and anneal in a run of {num_steps}"
        return f"{what}, allowed: at most {num_steps} in all."
