"""The consoles: progress and notes on standard error, results on standard output; and the signals that end a verb."""

from __future__ import annotations

import logging
import os
import signal
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressBars

Progress = Callable[[int, int], None]  # called with (done, total)
SAME_REQUEST_SECONDS = 1.0  # a launcher repeats the signal that the terminal has sent to the whole group
END_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
# `extra` of a warning about this process alone; of other warnings the first process shows its own
OF_THIS_PROCESS = {"of_this_process": True}
_shown = {"progress": True, "results": True}


def is_told_here(record: logging.LogRecord, *, is_first: bool) -> bool:
    return is_first or record.levelno >= logging.ERROR or hasattr(record, "of_this_process")


def show_only(*, progress: bool, results: bool) -> None:
    """--quiet hides progress, --json hides tables, from now on."""
    _shown.update(progress=progress, results=results)


plain_console = partial(Console, markup=False, emoji=False, highlight=False)  # `[best]` in a path is no markup


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
    # To rich, a file is a terminal with FORCE_COLOR, and a terminal with TERM=dumb is one without bars.
    return console.is_interactive and console.file.isatty()


def duration(seconds: float) -> str:
    """12.3 -> '12s', 75 -> '1m15s', 7260 -> '2h01m'."""
    minutes, rest = divmod(round(seconds), 60)
    text = f"{minutes}m{rest:02d}s" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02d}m"
    return text if minutes else f"{rest}s"


@contextmanager
def errors_only(when: bool = True) -> Iterator[None]:
    """Drop qdora's messages below an error."""
    logger = logging.getLogger("qdora")
    before = logger.level
    logger.setLevel(logging.ERROR if when else before)
    try:
        yield
    finally:
        logger.setLevel(before)


@contextmanager
def bar(console: Console, what: str) -> Iterator[Progress]:
    """A progress bar, or one line where there are no bars."""
    if not shows_bars(console):
        console.print(what)
        yield lambda done, total: None
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with ProgressBars(*columns, console=console, transient=True) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def leave_closed_terminal(number: int) -> None:
    """After SIGHUP print nowhere: the terminal is gone, and a failed write would hide why the process ends."""
    for stream in (1, 2) if number not in (signal.SIGINT, signal.SIGTERM) else ():
        with suppress(OSError):  # closed
            if stat.S_ISCHR(os.fstat(stream).st_mode):  # files and pipes still get the output
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
