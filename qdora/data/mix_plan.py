"""What a run will see of each source of its mix: counts and shares over its steps, as a table."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from qdora.data.batches import StepLoader
from qdora.data.mix import Mix
from qdora.data.stream import ExampleStream
from qdora.data.tokenize import TokenizedSet

logger = logging.getLogger("qdora")


@dataclass(frozen=True, kw_only=True)
class SourcePlan:
    """One source over the steps of a run; None: not known."""

    name: str
    num_examples: int | None
    num_tokens: int | None = None
    num_truncated: int | None = None  # examples that were cut to data.max_length
    num_dropped: int | None = None
    share_asked: float  # of the draws, by the strategy
    share_seen: float | None  # less than asked once the source is used up, more once others are
    num_draws: int | None  # examples that the run takes
    epochs: float | None  # how often an example is seen on average
    unused: tuple[str, ...] = ()  # columns that its format does not read


@dataclass(frozen=True)
class MixPlan:
    """All sources over the steps of a run."""

    num_steps: int
    num_draws: int | None
    sources: tuple[SourcePlan, ...]


def plan_mix(mix: Mix, loader: StepLoader, num_steps: int) -> MixPlan:
    """What `num_steps` steps from position 0 take from each source."""
    num_draws = loader.draws_for_steps(num_steps)
    counts: list[int | None] = [None] * len(mix.sets)
    if num_draws is not None:
        counts = list(mix.order.counts(num_draws).tolist())
    sources = []
    for part, share, count in zip(mix.sets, mix.order.shares.tolist(), counts, strict=True):
        size, known = part.num_examples if isinstance(part, ExampleStream) else len(part), dict[str, int]()
        if isinstance(part, TokenizedSet):
            known = {"num_tokens": part.num_tokens}
            known |= {"num_truncated": part.num_truncated, "num_dropped": part.num_dropped}
        sources.append(
            SourcePlan(
                name=part.name,
                num_examples=size,
                share_asked=share,
                share_seen=None if count is None else count / max(num_draws or 0, 1),
                num_draws=count,
                epochs=None if size is None or count is None else count / size,
                unused=tuple(sorted(part.unused)),
                **known,
            )
        )
    return MixPlan(num_steps, num_draws, tuple(sources))


_COLUMNS = {
    "examples": ("num_examples", ",d"),
    "tokens": ("num_tokens", ",d"),
    "asked": ("share_asked", ".1%"),
    "seen": ("share_seen", ".1%"),
    "passes": ("epochs", ".2f"),
    "cut": ("num_truncated", ",d"),
    "dropped": ("num_dropped", ",d"),
}


def show_mix(console: Console, plan: MixPlan) -> None:
    """Print the plan as a table, and log the columns that training does not read."""
    draws = "" if plan.num_draws is None else f", {plan.num_draws:,} examples"
    table = Table("source", title=f"{plan.num_steps:,} steps{draws}", title_justify="left")
    for name in _COLUMNS:
        table.add_column(name, justify="right")
    for part in plan.sources:
        cells = ((getattr(part, field), form) for field, form in _COLUMNS.values())
        table.add_row(part.name, *("unknown" if value is None else format(value, form) for value, form in cells))
    console.print(table)
    for part in plan.sources:
        if part.unused:
            logger.info("%s: not used for training: %s.", part.name, ", ".join(part.unused))
