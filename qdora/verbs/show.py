"""What the verbs show while they work."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from qdora.data.loader import StepLoader
from qdora.data.mix import Mix
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


def show_mix(console: Console, mix: Mix, loader: StepLoader, num_steps: int) -> None:
    """What the run will see of every source, before it runs."""
    lengths = sum(len(part) for part in mix.sets)
    num_draws = _num_draws(loader, num_steps, lengths)
    table = Table(title=f"{num_steps} steps, about {num_draws:,} examples", title_justify="left")
    for name in ("source", "examples", "tokens", "share", "passes", "cut", "dropped"):
        table.add_column(name, justify="left" if name == "source" else "right")
    for part in mix.summary(num_draws):
        table.add_row(
            part.name,
            f"{part.num_examples:,}",
            f"{part.num_tokens:,}",
            f"{part.share:.1%}",
            f"{part.epochs:.2f}",
            f"{part.num_truncated:,}",
            f"{part.num_dropped:,}",
        )
    console.print(table)


def _num_draws(loader: StepLoader, num_steps: int, num_examples: int) -> int:
    """Examples of the run: exact for a fixed batch, by the mean length for a number of tokens."""
    if loader.batch is not None:
        return num_steps * loader.batch
    assert loader.tokens_per_step is not None
    num_tokens = sum(part.num_tokens for part in loader.tokenised)
    return round(num_steps * loader.tokens_per_step * num_examples / max(1, num_tokens))
