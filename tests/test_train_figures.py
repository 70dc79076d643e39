"""Figures of a run: what they show, read back from the SVG, and that none of them can end a run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from qdora.train.figures import draw_figures

pytestmark = pytest.mark.figures

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


def points(svg: Path, name: str) -> NDArray[np.float64]:
    """(points, 2) of the line of a figure, in the coordinates of the picture, where y goes down."""
    path = re.search(rf'<g id="{name}">\s*<path d="([^"]*)"', svg.read_text())
    assert path is not None
    return np.array(re.findall(r"[ML] (\S+) (\S+)", path[1]), dtype=float)


@pytest.fixture
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The figures of `lines`, drawn once: not of the whole module, whose fixtures see none of its marks."""
    folder = tmp_path_factory.getbasetemp() / "drawn"
    if not folder.exists():
        draw_figures(lines(), folder)
    return folder


@pytest.mark.parametrize(
    "name, values",
    [
        ("learning rate", RATES),
        ("peak memory, GiB", GIBS),
        ("tokens per second", [50.0, 200.0, 100.0, 25.0]),
        ("gradient norm", list(np.log(GRADIENT_NORMS))),
    ],
)
def test_a_line_goes_through_the_values_of_the_steps(name: str, values: list[float], drawn: Path) -> None:
    line = points(drawn / "steps.svg", name)
    assert line.shape == (4, 2)
    for found, expected in ((line[:, 0], [1.0, 2.0, 3.0, 4.0]), (-line[:, 1], values)):
        scale, _ = np.polyfit(expected, found, 1)
        assert scale > 0
        assert np.corrcoef(found, expected)[0, 1] == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize(
    "figure, line, values",
    [
        ("validation_nll", "sums", [4.0, 1.0, 2.0]),
        ("validation_nll", "letters", [8.0, 2.0, 4.0]),
        ("validation_nll", "all", [6.0, 1.5, 3.0]),
        ("validation_accuracy", "letters", [0.25, 0.75, 0.5]),
    ],
)
def test_validation_starts_at_the_base_and_goes_through_every_evaluation(
    figure: str, line: str, values: list[float], drawn: Path
) -> None:
    found = points(drawn / f"{figure}.svg", line)
    assert np.corrcoef(found[:, 0], [0, 2, 4])[0, 1] == pytest.approx(1.0, abs=1e-9)
    assert np.corrcoef(-found[:, 1], values)[0, 1] == pytest.approx(1.0, abs=1e-9)


def test_without_choices_or_evaluations_there_is_no_such_figure(tmp_path: Path) -> None:
    plain = lines()
    for line in plain:
        line.get("eval", {}).pop("letters", None)
        line.get("average", {}).update(acc=None)
    assert "validation_accuracy" not in {path.stem for path in draw_figures(plain, tmp_path)}
    steps = [line for line in lines() if "eval" not in line]
    assert len(draw_figures(steps, tmp_path)) == 2
    assert len(draw_figures(lines()[1:-1], tmp_path)) == 2  # a single evaluation


def test_the_same_run_draws_the_same_bytes_and_no_step_draws_nothing(drawn: Path, tmp_path: Path) -> None:
    first = draw_figures(lines(), tmp_path / "a")
    assert len(first) == 4
    assert [path.read_bytes() for path in first] == [(drawn / path.name).read_bytes() for path in first]
    assert draw_figures([{"step": 0, "eval": {}}], tmp_path / "c") == []
    assert not (tmp_path / "c").exists()


def test_a_figure_that_cannot_be_drawn_is_said_and_the_others_are_drawn(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    strange = lines()
    del strange[1]["time"]
    names = ["loss_per_task", "validation_nll", "validation_accuracy"]
    assert [path.stem for path in draw_figures(strange, tmp_path)] == names
    assert "figures/steps.svg was not drawn: KeyError: 'time'" in caplog.text
    (tmp_path / "file").write_text("")
    assert draw_figures(lines(), tmp_path / "file") == []
    assert (tmp_path / "file").read_text() == ""
