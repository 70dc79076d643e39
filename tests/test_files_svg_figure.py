"""Figures as SVG."""

from __future__ import annotations

import re

import pytest
from matplotlib.figure import Figure

from qdora.files.svg_figure import new_figure, svg_text

pytestmark = pytest.mark.figures


def num_letters(figure: Figure) -> int:
    """Letters that are drawn: each one uses the path <font>-<number> of its glyph."""
    return len(re.findall(r'<use xlink:href="#\w+-\w+"', svg_text(figure)))


@pytest.mark.parametrize("name", ["$x^$", "costs $5 to $10", "$x$", "plain"])
def test_a_name_with_dollars_is_drawn_as_it_is(name: str) -> None:
    figure = new_figure(3, 2)
    axes = figure.subplots()
    axes.set_axis_off()
    axes.plot([1, 2], [1, 2], label=name)
    axes.legend()
    assert num_letters(figure) == len(name)


def test_a_logarithmic_scale_keeps_its_formulas() -> None:
    figure = new_figure(3, 2)
    axes = figure.subplots()
    axes.loglog([1e-3, 1e3], [1e-3, 1e3])
    axes.set_xticks([1e-3, 1e3])
    axes.set_yticks([])
    axes.minorticks_off()
    axes.set_title("$5")
    assert num_letters(figure) == len("10-3" + "103" + "$5")
