"""What a run will see of each source of its mix: counts and shares over its steps, as a table, and warnings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from rich.console import Console
from rich.table import Table

from qdora.data.batches import StepLoader
from qdora.data.mix import Mix
from qdora.data.tokenize import NO_SECOND, TokenizedSet
from qdora.files.run_directory import RunDirectory


@dataclass(frozen=True, kw_only=True)
class SourcePlan:
    """One source over the steps of a run; None where a number is not known, as for streams."""

    name: str
    num_examples: int | None
    num_tokens: int | None
    num_truncated: int | None  # examples that were cut to data.max_length
    num_dropped: int | None
    share_asked: float  # of the draws, by the strategy
    share_seen: float  # less than asked once the source is used up, more once others are
    num_draws: int  # examples that the run takes
    num_tokens_seen: int | None
    epochs: float | None  # how often an example is seen on average; below 1, some are never seen
    unused: tuple[str, ...] = ()  # columns that its format does not read; of a stream, those of its first rows
    notes: tuple[str, ...] = ()  # of the chat template and of the texts


@dataclass(frozen=True)
class MixPlan:
    """All sources over the steps of a run; not exact where steps count tokens and a stream is among the sources."""

    num_steps: int
    num_draws: int
    is_exact: bool
    sources: tuple[SourcePlan, ...]


def plan_mix(mix: Mix, loader: StepLoader, num_steps: int) -> MixPlan:
    """What `num_steps` steps from position 0 take from each source; UserError if the sources have fewer steps."""
    num_draws = loader.draws_for_steps(num_steps)
    counts = mix.order.counts(num_draws).tolist()
    tokens = loader.tokens_of_draws(num_draws).tolist()
    sources = []
    for part, share, count, num_tokens in zip(mix.sets, mix.order.shares.tolist(), counts, tokens, strict=True):
        whole = part if isinstance(part, TokenizedSet) else None
        size = len(part) if isinstance(part, TokenizedSet) else part.num_examples
        sources.append(
            SourcePlan(
                name=part.name,
                num_examples=size,
                num_tokens=None if whole is None else whole.num_tokens,
                num_truncated=None if whole is None else whole.num_truncated,
                num_dropped=None if whole is None else whole.num_dropped,
                share_asked=share,
                share_seen=count / max(num_draws, 1),
                num_draws=count,
                num_tokens_seen=None if whole is None else num_tokens,
                epochs=None if size is None else count / size,
                unused=tuple(sorted(part.unused)),
                notes=tuple(sorted(part.notes)),
            )
        )
    return MixPlan(num_steps, num_draws, loader.counts_draws, tuple(sources))


def large_step_warning(plan: MixPlan) -> str | None:
    """A warning if an optimizer step takes more examples than all sources have, so that it repeats some; else None."""
    sizes = [source.num_examples for source in plan.sources]
    num_examples = sum(size or 0 for size in sizes)
    if None in sizes or plan.num_draws <= plan.num_steps * num_examples:
        return None
    per_step = plan.num_draws / plan.num_steps
    return (
        f"An optimizer step takes {'' if plan.is_exact else 'about '}{per_step:,.0f} examples, but the training data "
        f"has only {num_examples:,}: each step repeats the data {per_step / num_examples:.1f} times. "
        "Fix: lower train.tokens_per_step or train.batch."
    )


def unused_in_words(columns: Sequence[str]) -> str:
    """What is said of columns that training does not read."""
    return f"not used for training: {', '.join(columns)}."


def mix_warnings(plan: MixPlan) -> list[str]:
    """What may be wrong with a mix, one line each: notes, too large a step."""
    large = large_step_warning(plan)
    return [*_remarks(plan, harmless=False), *([] if large is None else [large])]


def mix_facts(plan: MixPlan) -> list[str]:
    """What is known of a mix and needs no change, one line each."""
    return _remarks(plan, harmless=True)


def _remarks(plan: MixPlan, *, harmless: bool) -> list[str]:
    lines = [
        f"{source.name}: {unused_in_words(columns)}"
        for source in plan.sources
        if (columns := source.unused) and harmless
    ]
    notes = ((source.name, note) for source in plan.sources for note in source.notes)
    return lines + [f"{name}: {note}" for name, note in notes if (NO_SECOND in note) == harmless]


def show_mix(console: Console, plan: MixPlan) -> None:
    """Print the plan as a table."""
    table = Table(title=_mix_title(plan), title_justify="left")
    for name in MIX_COLUMNS:
        table.add_column(name, justify="left" if name == "source" else "right")
    for part in plan.sources:
        table.add_row(*mix_cells(part))
    console.print(table)


def keep_mix(run: RunDirectory, plan: MixPlan) -> None:
    """Write the plan to the run directory: lines of log.txt, and mix.json."""
    run.log(_mix_title(plan))
    for part in plan.sources:
        name, *numbers = zip(MIX_COLUMNS, mix_cells(part), strict=True)
        run.log(f"{name[1]}: " + ", ".join(f"{what} {value}" for what, value in numbers))
    run.write_json("mix.json", asdict(plan))


MIX_COLUMNS = ("source", "examples", "tokens", "asked", "seen", "tokens seen", "passes", "cut", "dropped")
"""Of the table of a mix; asked and seen are shares of the draws."""


def _mix_title(plan: MixPlan) -> str:
    return f"{plan.num_steps:,} steps, {'' if plan.is_exact else 'about '}{plan.num_draws:,} examples"


def mix_cells(part: SourcePlan) -> tuple[str, ...]:
    """A source's cells in `MIX_COLUMNS`."""
    counts = (part.num_examples, part.num_tokens, part.num_tokens_seen, part.num_truncated, part.num_dropped)
    examples, tokens, seen, cut, dropped = ("unknown" if value is None else f"{value:,}" for value in counts)
    passes = "unknown" if part.epochs is None else f"{part.epochs:.2f}"
    return (
        part.name,
        examples,
        tokens,
        f"{part.share_asked:.1%}",
        f"{part.share_seen:.1%}",
        seen,
        passes,
        cut,
        dropped,
    )
