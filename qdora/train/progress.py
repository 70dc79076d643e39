"""Progress of a training run: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import resource
import sys
import time
from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from qdora.files.console import duration, plain_console, shows_bars

_SECONDS_BETWEEN_LINES = 10.0


def peak_memory_bytes() -> int:
    """Peak memory: allocated on the GPU since this training began, or without a GPU resident in this process."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


def reserved_bytes() -> int | None:
    """As `peak_memory_bytes`, with the pieces that torch's allocator held and could not use; None without a GPU."""
    return int(torch.cuda.max_memory_reserved()) if torch.cuda.is_available() else None


def _memory_text() -> str:
    """1.50 GiB, or with a GPU 1.50 (reserved 1.75) GiB."""
    reserved = reserved_bytes()
    shown = "" if reserved is None else f" (reserved {reserved / 2**30:.2f})"
    return f"{peak_memory_bytes() / 2**30:.2f}{shown} GiB"


class TrainingProgress:
    """Shows steps: a bar on a terminal, otherwise one plain line every 10 seconds and at the end.

    After a resume, `start` steps are done already. The console is standard error by default: results go to stdout.
    """

    def __init__(self, num_steps: int, *, start: int = 0, console: Console | None = None) -> None:
        self.console = console or plain_console(stderr=True)
        self._num_steps, self._start = num_steps, start
        self._seconds: deque[float] = deque(maxlen=20)
        self._last_line = float("-inf")
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> TrainingProgress:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()  # of an earlier run in this process
        if shows_bars(self.console):
            columns = (BarColumn(bar_width=None), MofNCompleteColumn(), TimeElapsedColumn())
            self._bar = Progress(TextColumn("{task.description}", markup=False), *columns, console=self.console)
            self._bar.start()
            self._task = self._bar.add_task("training", total=self._num_steps, completed=self._start)
        return self

    def __exit__(self, *_error: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def step(self, metrics: Mapping[str, Any]) -> None:
        """Show the metrics of a finished step; the time left goes by the median of the last 20 steps."""
        step = metrics["step"]
        self._seconds.append(metrics["time"]["step_seconds"])
        left = sorted(self._seconds)[len(self._seconds) // 2] * (self._num_steps - step)
        text = (
            f"step {step}/{self._num_steps}  loss {metrics['loss']:.4f}  lr {metrics['lr']:.2e}  "
            f"{metrics['num_tokens'] / self._seconds[-1]:,.0f} tok/s  memory {_memory_text()}  "
            f"left {duration(left)}"
        )
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=step, description=text)
            return
        now = time.monotonic()
        if now - self._last_line >= _SECONDS_BETWEEN_LINES or step == self._num_steps:
            self._last_line = now
            self.console.print(text, soft_wrap=True)
