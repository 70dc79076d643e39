"""What a run shows of itself: figures, read back from the SVG, and its progress; none of them can end a run."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from rich.console import Console

from qdora.files.console import duration, shows_bars
from qdora.run.run import train_run
from qdora.train.distributed import Processes
from qdora.train.logs import TrainingProgress, draw_figures, smooth
from qdora.train.logs import peaks as _peaks
from tests import support

GRADIENT_NORMS = [0.5, 3.0, 1.0, 40.0]
RATES = [1e-4, 3e-4, 2e-4, 0.0]
SECONDS = [2.0, 0.5, 1.0, 4.0]
GIBS = [1, 2, 5, 6]


def lines() -> list[dict[str, Any]]:
    """Four steps of 100 tokens and an evaluation between them."""
    found: list[dict[str, Any]] = [
        {
            "step": index + 1,
            "lr": RATES[index],
            "gradient_norm": GRADIENT_NORMS[index],
            "loss": 2.0 - index / 4,
            "num_tokens": 100,
            "num_label_tokens": 10,
            "tasks": {"sums": {"nll_sum": 12.0 - index, "num_tokens": 10}},
            "time": {"step_seconds": SECONDS[index], "peak_memory_bytes": GIBS[index] * 2**30},
        }
        for index in range(4)
    ]
    base, middle, end = (
        {
            "step": step,
            "eval": {"sums": {"nll_per_token": nll, "acc": None}, "letters": {"nll_per_token": 2 * nll, "acc": acc}},
            "average": {"nll_per_token": 1.5 * nll, "acc": acc},
        }
        for step, nll, acc in ((0, 4.0, 0.25), (2, 1.0, 0.75), (4, 2.0, 0.5))
    )
    return [base, *found[:2], middle, *found[2:], end]


@pytest.mark.figures
def test_lines_go_through_the_values_of_steps_and_evaluations(tmp_path: Path) -> None:
    files = draw_figures(lines(), tmp_path / "a")
    assert [file.stem for file in files] == ["loss_per_task", "steps", "validation_nll", "validation_accuracy"]
    again = draw_figures(lines(), tmp_path / "b")
    assert [path.read_bytes() for path in files] == [path.read_bytes() for path in again]

    def points(figure: str, name: str) -> NDArray[np.float64]:
        """(points, 2) of a line in the coordinates of the picture, where y goes down."""
        path = re.search(rf'<g id="{name}">\s*<path d="([^"]*)"', (tmp_path / f"a/{figure}.svg").read_text())
        assert path is not None
        return np.array(re.findall(r"[ML] (\S+) (\S+)", path[1]), dtype=float)

    for figure, name, steps, values in (
        ("steps", "learning rate", [1, 2, 3, 4], RATES),
        ("steps", "peak memory, GiB", [1, 2, 3, 4], GIBS),
        ("steps", "tokens per second", [1, 2, 3, 4], [50.0, 200.0, 100.0, 25.0]),
        ("steps", "gradient norm", [1, 2, 3, 4], list(np.log(GRADIENT_NORMS))),
        ("validation_nll", "sums", [0, 2, 4], [4.0, 1.0, 2.0]),
        ("validation_nll", "letters", [0, 2, 4], [8.0, 2.0, 4.0]),
        ("validation_nll", "all", [0, 2, 4], [6.0, 1.5, 3.0]),
        ("validation_accuracy", "letters", [0, 2, 4], [0.25, 0.75, 0.5]),
    ):
        line = points(figure, name)
        assert len(line) == len(steps)
        assert np.corrcoef(line[:, 0], steps)[0, 1] == pytest.approx(1.0, abs=1e-9), name
        assert np.corrcoef(-line[:, 1], values)[0, 1] == pytest.approx(1.0, abs=1e-9), name


@pytest.mark.figures
def test_a_figure_that_cannot_be_drawn_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain = lines()
    for line in plain:
        line.get("eval", {}).pop("letters", None)
        line.get("average", {}).update(acc=None)
    assert "validation_accuracy" not in {path.stem for path in draw_figures(plain, tmp_path)}
    assert len(draw_figures([line for line in lines() if "eval" not in line], tmp_path)) == 2
    assert len(draw_figures(lines()[1:-1], tmp_path)) == 2  # a single evaluation
    assert draw_figures([{"step": 0, "eval": {}}], tmp_path / "none") == []
    assert not (tmp_path / "none").exists()
    strange = lines()
    del strange[1]["time"]
    names = ["loss_per_task", "validation_nll", "validation_accuracy"]
    assert [path.stem for path in draw_figures(strange, tmp_path)] == names
    assert "figures/steps.svg was not drawn: KeyError: 'time'" in caplog.text
    (tmp_path / "file").write_text("")
    assert draw_figures(lines(), tmp_path / "file") == []
    assert (tmp_path / "file").read_text() == ""


def test_smoothing_is_a_mean_over_tokens() -> None:
    values = smooth(np.array([0.0, 6.0, 0.0, 10.0]), np.array([0.0, 3.0, 0.0, 1.0]), half_life=1.0)
    assert np.isnan(values[0])
    assert values[1:].tolist() == pytest.approx([2.0, 2.0, (6 / 4 + 10) / (3 / 4 + 1)])


METRICS = {"step": 1, "loss": 1.0, "lr": 1e-3, "num_tokens": 8, "time": {"step_seconds": 1.0}}


class Screen(io.StringIO):
    """A terminal."""

    def isatty(self) -> bool:
        return True


def test_a_run_on_a_terminal_shows_a_bar_while_it_trains_and_evaluates(root: Path, tmp_path: Path) -> None:
    console = Console(force_terminal=True, width=120, file=Screen(), _environ={"TERM": "xterm"})
    train_run(support.tiny_recipe(root, train__steps=2, eval__every=1), tmp_path / "run", console=console)
    assert shows_bars(console)
    assert "step 2/2" in console.file.getvalue()  # type: ignore[attr-defined]


def shown() -> str:
    text = io.StringIO()
    with TrainingProgress(1, console=Console(file=text)) as progress:
        progress.step(METRICS)
    return text.getvalue()


def test_with_a_gpu_reserved_memory_stands_beside_what_is_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        assert "reserved" not in shown()
        assert list(_peaks(Processes())) == ["peak_memory_bytes"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    peaks = {"allocated": 9 << 30, "reserved": 9 << 30}  # of a larger run before
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: peaks["allocated"])
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: peaks["reserved"])
    now = {"allocated": 3 << 29, "reserved": 7 << 28}
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: peaks.update(now))
    assert "memory 1.50 (reserved 1.75) GiB" in shown()
    assert _peaks(Processes()) == {"peak_memory_bytes": 3 << 29, "peak_reserved_bytes": 7 << 28}


def test_durations() -> None:
    for seconds, text in ((5, "5s"), (59.6, "1m00s"), (200, "3m20s"), (3599.7, "1h00m"), (7500, "2h05m")):
        assert duration(seconds) == text
