"""What progress and metrics show of memory and time."""

from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console

from qdora.files.console import bar, duration, plain_console, shows_bars
from qdora.train.distributed import Processes
from qdora.train.loop import _peaks
from qdora.train.progress import TrainingProgress

METRICS = {"step": 1, "loss": 1.0, "lr": 1e-3, "num_tokens": 8, "time": {"step_seconds": 1.0}}


def shown() -> str:
    text = io.StringIO()
    with TrainingProgress(1, console=Console(file=text)) as progress:
        progress.step(METRICS)
    return text.getvalue()


class Screen(io.StringIO):
    """A terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    "file, variables, has_bars",
    [
        (Screen(), {"TERM": "xterm"}, True),
        (Screen(), {"TERM": "dumb"}, False),
        (io.StringIO(), {"TERM": "xterm", "FORCE_COLOR": "1"}, False),
        (io.StringIO(), {"TERM": "xterm"}, False),
    ],
)
def test_where_no_bar_is_drawn_there_are_lines(file: io.StringIO, variables: dict[str, str], has_bars: bool) -> None:
    console = plain_console(file=file, width=100, _environ=variables)
    with bar(console, "loading the base") as update:
        update(1, 2)
    with TrainingProgress(1, console=console) as progress:
        progress.step(METRICS)
    assert shows_bars(console) == has_bars
    assert ("━" in file.getvalue()) == has_bars
    for text in ("loading the base", "step 1/1"):
        assert text in file.getvalue()


def test_with_a_gpu_reserved_memory_stands_beside_what_is_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    peaks = {"allocated": 9 << 30, "reserved": 9 << 30}  # of a larger run before
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: peaks["allocated"])
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: peaks["reserved"])
    now = {"allocated": 3 << 29, "reserved": 7 << 28}
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: peaks.update(now))
    assert "memory 1.50 (reserved 1.75) GiB" in shown()
    assert _peaks(Processes()) == {"peak_memory_bytes": 3 << 29, "peak_reserved_bytes": 7 << 28}


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_nothing_is_reserved() -> None:
    assert "reserved" not in shown()
    assert list(_peaks(Processes())) == ["peak_memory_bytes"]


@pytest.mark.parametrize(
    "seconds, text", [(5, "5s"), (59.6, "1m00s"), (200, "3m20s"), (3599.7, "1h00m"), (7500, "2h05m")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
