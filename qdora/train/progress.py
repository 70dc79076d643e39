"""Progress of a training run: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import dataclass
from types import TracebackType

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

_SECONDS_BETWEEN_LINES = 10.0


def memory_bytes() -> int:
    """Peak memory of this process: allocated on the GPU, or resident on a machine without one."""
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
    """The numbers of one optimizer step that are shown."""

    step: int
    num_steps: int
    loss: float
    lr: float
    tokens_per_second: float
    seconds_left: float

    def text(self) -> str:
        """The numbers as one line."""
        return (
            f"step {self.step}/{self.num_steps}  loss {self.loss:.4f}  lr {self.lr:.2e}  "
            f"{self.tokens_per_second:,.0f} tok/s  {memory_bytes() / 2**30:.2f} GiB  left {duration(self.seconds_left)}"
        )


class TrainingProgress:
    """Shows steps: a bar on a terminal, otherwise one plain line every 10 seconds and at the end.

    Args:
        num_steps: Length of the run.
        start: Steps already done (after a resume).
        console: Output; standard error by default, since standard output is for results.
    """

    def __init__(self, num_steps: int, *, start: int = 0, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self._num_steps, self._start = num_steps, start
        self._last_line = float("-inf")
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
        if now - self._last_line >= _SECONDS_BETWEEN_LINES or report.step == report.num_steps:
            self._last_line = now
            self.console.print(report.text(), markup=False, highlight=False, soft_wrap=True)
