"""What a person sees while a run trains: a live line in a terminal, plain lines elsewhere."""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import dataclass
from types import TracebackType

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn


def memory_bytes() -> int:
    """Peak memory of this process: allocated on the GPU where there is one, else resident."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


def duration(seconds: float) -> str:
    """12.3 -> '12s', 75 -> '1m15s', 7260 -> '2h01m'."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


@dataclass(frozen=True)
class StepReport:
    """One optimizer step as it is shown."""

    step: int
    num_steps: int
    loss: float
    lr: float
    tokens_per_second: float
    seconds_left: float

    def text(self) -> str:
        """One line."""
        return (
            f"step {self.step}/{self.num_steps}  loss {self.loss:.4f}  lr {self.lr:.2e}  "
            f"{self.tokens_per_second:,.0f} tok/s  {memory_bytes() / 2**30:.2f} GiB  left {duration(self.seconds_left)}"
        )


class TrainingProgress:
    """Shows steps; a rich bar on a terminal, else one plain line every `seconds_between` seconds and at the end.

    Args:
        num_steps: Length of the run.
        start: Steps already done (after a resume).
        console: Where to write; standard error by default, so that standard output stays for results.
        seconds_between: Pause between plain lines.
    """

    def __init__(
        self, num_steps: int, *, start: int = 0, console: Console | None = None, seconds_between: float = 10.0
    ) -> None:
        self.console = console or Console(stderr=True)
        self._num_steps, self._start = num_steps, start
        self._seconds_between, self._last_line = seconds_between, float("-inf")
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> TrainingProgress:
        if self.console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                console=self.console,
            )
            self._bar.start()
            self._task = self._bar.add_task("training", total=self._num_steps, completed=self._start)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def step(self, report: StepReport) -> None:
        """Show one finished step."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=report.step, description=report.text())
            return
        now = time.monotonic()
        if now - self._last_line >= self._seconds_between or report.step == report.num_steps:
            self._last_line = now
            self.line(report.text())

    def line(self, text: str) -> None:
        """A line of text above the bar."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)
