"""What the verbs show while they work."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from qdora.data.mix_plan import MixPlan, SourcePlan
from qdora.record import RunDirectory


def default_console() -> Console:
    """Standard error, so that standard output stays for results; wide enough for a table where it is no terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        console.width = 130
    return console


@contextmanager
def bar(console: Console, what: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on a terminal, one line elsewhere; gives the function to call with (done, total)."""
    if not console.is_terminal:
        console.print(what, markup=False, highlight=False)
        yield lambda done, total: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


@contextmanager
def suite_bar(console: Console, what: str) -> Iterator[Callable[[str, int, int], None]]:
    """`bar` for an evaluation of several tasks."""
    with bar(console, what) as update:
        yield lambda task, done, total: update(done, total)


@contextmanager
def log_to(run: RunDirectory) -> Iterator[None]:
    """Copy what qdora logs into the run's log.txt."""
    handler = _RunLog(run)
    logger = logging.getLogger("qdora")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(min(level or logging.INFO, logging.INFO))
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


class _RunLog(logging.Handler):
    def __init__(self, run: RunDirectory) -> None:
        super().__init__(logging.INFO)
        self.run = run

    def emit(self, record: logging.LogRecord) -> None:
        self.run.log(record.getMessage())


def show_mix(console: Console, plan: MixPlan) -> None:
    """What the run will see of every source, before it runs."""
    table = Table(title=_mix_title(plan), title_justify="left")
    for name in _MIX_COLUMNS:
        table.add_column(name, justify="left" if name == "source" else "right")
    for part in plan.sources:
        table.add_row(*_mix_cells(part))
    console.print(table)


def keep_mix(run: RunDirectory, plan: MixPlan) -> None:
    """The same in the run directory: lines of log.txt, and mix.json."""
    run.log(_mix_title(plan))
    for part in plan.sources:
        name, *numbers = zip(_MIX_COLUMNS, _mix_cells(part), strict=True)
        run.log(f"{name[1]}: " + ", ".join(f"{what} {value}" for what, value in numbers))
    run.write_json("mix.json", plan.to_dict())


_MIX_COLUMNS = ("source", "examples", "tokens", "asked", "seen", "tokens seen", "passes", "cut", "dropped")


def _mix_title(plan: MixPlan) -> str:
    return f"{plan.num_steps:,} steps, {'' if plan.is_exact else 'about '}{plan.num_draws:,} examples"


def _mix_cells(part: SourcePlan) -> tuple[str, ...]:
    return (
        part.name,
        _count(part.num_examples),
        _count(part.num_tokens),
        f"{part.share_asked:.1%}",
        f"{part.share_seen:.1%}",
        _count(part.num_tokens_seen),
        "unknown" if part.epochs is None else f"{part.epochs:.2f}",
        _count(part.num_truncated),
        _count(part.num_dropped),
    )


def _count(value: int | None) -> str:
    return "unknown" if value is None else f"{value:,}"
