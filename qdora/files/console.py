"""The console for progress and notes (standard error), and progress bars."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


def default_console() -> Console:
    """Standard error, since standard output is for results; 130 columns wide if it is not a terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        console.width = 130
    return console


@contextmanager
def bar(console: Console, what: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on a terminal, one line elsewhere; yields the function to call with (done, total)."""
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
