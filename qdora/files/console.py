"""The consoles: progress and notes on standard error, results on standard output; progress bars, and durations."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressBars

Progress = Callable[[int, int], None]
"""Called with (done, total), as the function that `bar` yields."""

_shown = {"progress": True, "results": True}
OF_THIS_PROCESS = {"of_this_process": True}
"""`extra` of a warning about this process alone. Other warnings come from every process of a launch, and only the first
one shows them."""


def is_told_here(record: logging.LogRecord, *, is_first: bool) -> bool:
    """Whether a process of a launch shows a record: the first shows all, the others errors and `OF_THIS_PROCESS`."""
    return is_first or record.levelno >= logging.ERROR or hasattr(record, "of_this_process")


def show_only(*, progress: bool, results: bool) -> None:
    """Choose what the consoles of this process show from now on: --quiet hides progress, --json hides tables."""
    _shown.update(progress=progress, results=results)


plain_console = partial(Console, markup=False, emoji=False, highlight=False)
"""A console that prints names and paths as they are: to rich, `[best]` in one would be markup."""


def consoles(given: Console | None = None) -> tuple[Console, Console]:
    """The console for progress and the console for results; both are `given`, if it is given."""
    if given is not None:
        return given, given
    both = plain_console(stderr=True, quiet=not _shown["progress"]), plain_console(quiet=not _shown["results"])
    for console in both:
        if not console.is_terminal:
            console.width = 130  # enough for a table
    return both


def shows_bars(console: Console) -> bool:
    """Whether the console draws progress bars; otherwise progress is told in lines.

    To rich, a file is a terminal with FORCE_COLOR, and a terminal with TERM=dumb is one without bars.
    """
    return console.is_interactive and console.file.isatty()


def duration(seconds: float) -> str:
    """12.3 -> '12s', 75 -> '1m15s', 7260 -> '2h01m'."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


@contextmanager
def errors_only(when: bool = True) -> Iterator[None]:
    """Inside, qdora's messages below an error are dropped: they have been told, or another process tells them."""
    logger = logging.getLogger("qdora")
    before = logger.level
    if when:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


@contextmanager
def bar(console: Console, what: str) -> Iterator[Progress]:
    """A progress bar where there are bars, one line elsewhere; yields the function to call with (done, total)."""
    if not shows_bars(console):
        console.print(what)
        yield lambda done, total: None
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with ProgressBars(*columns, console=console, transient=True) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
