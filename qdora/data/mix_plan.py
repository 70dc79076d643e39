"""What a run will see of every source, worked out before it runs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from qdora.data.loader import StepLoader
from qdora.data.mix import Mix


@dataclass(frozen=True)
class SourcePlan:
    """One source over the steps of a run.

    Attributes:
        name: Of the source.
        num_examples: It has.
        num_tokens: It has.
        num_truncated: Examples that were cut to data.max_length.
        num_dropped: Examples that were left out.
        share_asked: Share of the draws that the strategy gives it.
        share_seen: Share of the draws that come from it: less than asked once it is used up, more once others are.
        num_draws: Examples that the run takes from it.
        num_tokens_seen: Tokens that the run takes from it.
        epochs: Times that its examples are seen on average; below 1, some are never seen.
    """

    name: str
    num_examples: int
    num_tokens: int
    num_truncated: int
    num_dropped: int
    share_asked: float
    share_seen: float
    num_draws: int
    num_tokens_seen: int
    epochs: float


@dataclass(frozen=True)
class MixPlan:
    """All sources over the steps of a run.

    Attributes:
        num_steps: Optimizer steps.
        num_draws: Examples that they take.
        sources: In the order of the recipe.
    """

    num_steps: int
    num_draws: int
    sources: tuple[SourcePlan, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON types only."""
        return {**asdict(self), "sources": [asdict(source) for source in self.sources]}


def plan_mix(mix: Mix, loader: StepLoader, num_steps: int) -> MixPlan:
    """What `num_steps` steps from position 0 take from each source.

    Raises:
        UserError: If the sources are used up before.
    """
    num_draws = loader.draws_for_steps(num_steps)
    counts = mix.order.counts(num_draws).tolist()
    tokens = loader.tokens_of_draws(num_draws).tolist()
    sources = tuple(
        SourcePlan(
            name=part.name,
            num_examples=len(part),
            num_tokens=part.num_tokens,
            num_truncated=part.num_truncated,
            num_dropped=part.num_dropped,
            share_asked=share,
            share_seen=count / max(num_draws, 1),
            num_draws=count,
            num_tokens_seen=num_tokens,
            epochs=count / len(part),
        )
        for part, share, count, num_tokens in zip(mix.sets, mix.shares.tolist(), counts, tokens, strict=True)
    )
    return MixPlan(num_steps, num_draws, sources)
