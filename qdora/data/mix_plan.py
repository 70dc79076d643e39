"""What a run will see of each source of its mix: counts and shares over its steps, kept as mix.json and printed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from qdora.data.batches import StepLoader


def plan_mix(loader: StepLoader, num_steps: int) -> dict[str, Any]:
    """What `num_steps` steps from position 0 take from each source, as JSON values; None where it is not known."""
    num_draws = loader.draws_for_steps(num_steps)
    counts = [None] * len(loader.tokenised) if num_draws is None else loader.order.counts(num_draws).tolist()
    sources = []
    for part, share, count in zip(loader.tokenised, loader.order.shares.tolist(), counts, strict=True):
        size = part.num_examples
        source = {
            "name": part.name,
            "num_examples": size,
            # Of a stream nobody knows them
            **{name: getattr(part, name, None) for name in ("num_tokens", "num_truncated", "num_dropped")},
            "share_asked": share,  # of the draws, by the strategy
            # less than asked once the source is used up, more once others are
            "share_seen": None if count is None else count / max(num_draws or 0, 1),
            "num_draws": count,
            "epochs": None if size is None or count is None else count / size,
        }
        sources.append(source)
    return {"num_steps": num_steps, "num_draws": num_draws, "sources": sources}


_COLUMNS = {
    "examples": ("num_examples", ",d"),
    "tokens": ("num_tokens", ",d"),
    "asked": ("share_asked", ".1%"),
    "seen": ("share_seen", ".1%"),
    "passes": ("epochs", ".2f"),
    "cut": ("num_truncated", ",d"),
    "dropped": ("num_dropped", ",d"),
}


def show_mix(console: Console, plan: Mapping[str, Any]) -> None:
    """Print the plan as a table."""
    draws = "" if plan["num_draws"] is None else f", {plan['num_draws']:,} examples"
    table = Table("source", title=f"{plan['num_steps']:,} steps{draws}", title_justify="left")
    for name in _COLUMNS:
        table.add_column(name, justify="right")
    for part in plan["sources"]:
        cells = ((part[field], form) for field, form in _COLUMNS.values())
        table.add_row(
            part["name"], *("unknown" if value is None else format(value, form) for value, form in cells)
        )
    console.print(table)
