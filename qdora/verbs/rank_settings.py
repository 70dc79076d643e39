"""What `qdora rank` can be asked for, and what of it does not go together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qdora.analysis.component_curvature import LEAST_DRAWS
from qdora.analysis.curvature import CURVATURES
from qdora.analysis.plain import NORMS
from qdora.errors import UserError, nearest

METHODS = ("curvature", "svd", "gradient", "gates")


@dataclass(frozen=True)
class RankSettings:
    """What `qdora rank` was asked for; None where an option was left out.

    Attributes:
        method: curvature, svd, gradient or gates; the last has been chosen while training, so no other option counts.
        budget: Parameters of the low-rank factors of the chosen layers, or a share of the run's own ("50%"); the
            run's own if left out.
        threshold: In place of a budget, each layer gets the fewest components that hold this share of its energy.
        max_rank: Largest rank of a layer; twice the largest of the run, and with svd that of the layer.
        draws: Labels drawn for each labelled token, to estimate the curvature along each component; 16. 0 computes it
            exactly, by one product with the curvature a component (benchmarks/curvature_draws.py compares them).
        eigenvalues: How many of the curvature by A and B are written beside the ranks, which do not depend on them and
            cost far less; 0.
        curvature: Of which matrix they are; hessian.
        norm: Of DoRA, attached or held, in worths and eigenvalues; attached.
        layers: Names or patterns; all adapted layers if left out. Those left out keep their rank.
        examples: Of the run's training mix, from its start; 64.
        micro_batch_tokens: Most tokens of a micro-batch, padding counted; its graph is most of the memory beyond the
            model's, with the gradients (`update_gradients`) and the components' directions.
        over_all: Also the eigenvalues of all chosen layers together.
    """

    method: str = "curvature"
    budget: str | None = None
    threshold: float | None = None
    max_rank: int | None = None
    draws: int | None = None
    eigenvalues: int | None = None
    curvature: str | None = None
    norm: str | None = None
    layers: Sequence[str] = ()
    examples: int | None = None
    micro_batch_tokens: int | None = None
    over_all: bool = False

    def check(self) -> None:
        """Raises UserError with every fault that shows without the run."""
        faults = []
        if self.method not in METHODS:
            faults.append(f"--method: {self.method!r}, allowed: {', '.join(METHODS)}.{nearest(self.method, METHODS)}")
        for option, value, allowed in (("--curvature", self.curvature, CURVATURES), ("--norm", self.norm, NORMS)):
            if value is not None and value not in allowed:
                faults.append(f"{option}: {value!r}, allowed: {', '.join(allowed)}.{nearest(value, allowed)}")
            if value is not None and self.method != "curvature":
                faults.append(f"{option}: has no effect with --method {self.method}, allowed: --method curvature.")
        with_number = (("--draws", self.draws is not None), ("--eigenvalues", self.eigenvalues is not None))
        for option, given in (("--over-all", self.over_all), *with_number):
            if given and self.method != "curvature":
                faults.append(f"{option}: has no effect with --method {self.method}, allowed: --method curvature.")
        for option, given in (("--over-all", self.over_all), ("--curvature", self.curvature is not None)):
            if given and not self.eigenvalues:
                faults.append(f"{option}: has no effect without --eigenvalues, allowed: with --eigenvalues 20.")
        if self.draws is not None and self.draws != 0 and self.draws < LEAST_DRAWS:
            faults.append(f"--draws: {self.draws}, allowed: 0 (exact), or {LEAST_DRAWS} and more.")
        for option, number in (("--examples", self.examples), ("--micro-batch-tokens", self.micro_batch_tokens)):
            if number is not None and self.method == "svd":
                faults.append(f"{option}: --method svd reads no data, allowed: --method curvature or gradient.")
        if self.method == "gates":
            options: dict[str, Any] = {"--budget": self.budget, "--threshold": self.threshold}
            options |= {"--max-rank": self.max_rank, "--layers": self.layers or None, "--examples": self.examples}
            options |= {"--micro-batch-tokens": self.micro_batch_tokens}
            chosen = "has no effect with --method gates, whose ranks the run has chosen, allowed: leave it out."
            faults += [f"{option}: {chosen}" for option, value in options.items() if value is not None]
        elif self.budget is not None and self.threshold is not None:
            faults.append("--threshold: given with --budget, allowed: one of them.")
        if self.threshold is not None and not 0 < self.threshold <= 1:
            faults.append(f"--threshold: {self.threshold:g}, allowed: above 0, at most 1.")
        if self.method == "svd" and self.threshold is None and self.budget in (None, "100%"):
            faults.append(
                "--budget: an update of the run's ranks says nothing of larger ones, so all ranks would stay; "
                "allowed: less than 100%, such as 50%, or --threshold."
            )
        if faults:
            raise UserError(*faults)
