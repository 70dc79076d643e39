"""The consoles: progress and notes on standard error, results on standard output; and progress bars."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@dataclass
class _Shown:
    progress: bool = True
    results: bool = True


_shown = _Shown()


def show_only(*, progress: bool, results: bool) -> None:
    """Choose what the consoles of this process show from now on: --quiet hides progress, --json hides tables."""
    _shown.progress, _shown.results = progress, results


def consoles(given: Console | None = None) -> tuple[Console, Console]:
    """The console for progress and the console for results; both are `given`, if it is given."""
    if given is not None:
        return given, given
    return _wide(Console(stderr=True, quiet=not _shown.progress)), _wide(Console(quiet=not _shown.results))


def _wide(console: Console) -> Console:
    """Make a console wide enough for a table if it is not a terminal."""
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
