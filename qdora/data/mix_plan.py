"""What a run will see of every source, worked out before it runs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from qdora.data.loader import StepLoader
from qdora.data.mix import Mix
from qdora.data.tokenize import TokenizedSet


@dataclass(frozen=True)
class SourcePlan:
    """One source over the steps of a run.

    Attributes:
        name: Of the source.
        num_examples: It has. None: nobody knows, as with what follows, of a stream.
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
    num_examples: int | None
    num_tokens: int | None
    num_truncated: int | None
    num_dropped: int | None
    share_asked: float
    share_seen: float
    num_draws: int
    num_tokens_seen: int | None
    epochs: float | None


@dataclass(frozen=True)
class MixPlan:
    """All sources over the steps of a run.

    Attributes:
        num_steps: Optimizer steps.
        num_draws: Examples that they take.
        is_exact: False where num_draws, and with it each source's, is a guess: steps of a number of tokens, drawn from
            a stream whose lengths are guessed from its first rows.
        sources: In the order of the recipe.
    """

    num_steps: int
    num_draws: int
    is_exact: bool
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
    sources = []
    for part, share, count, num_tokens in zip(mix.sets, mix.shares.tolist(), counts, tokens, strict=True):
        known = part if isinstance(part, TokenizedSet) else None
        size = len(part) if isinstance(part, TokenizedSet) else part.num_examples
        sources.append(
            SourcePlan(
                name=part.name,
                num_examples=size,
                num_tokens=None if known is None else known.num_tokens,
                num_truncated=None if known is None else known.num_truncated,
                num_dropped=None if known is None else known.num_dropped,
                share_asked=share,
                share_seen=count / max(num_draws, 1),
                num_draws=count,
                num_tokens_seen=None if known is None else num_tokens,
                epochs=None if size is None else count / size,
            )
        )
    return MixPlan(num_steps, num_draws, loader.counts_draws, tuple(sources))
