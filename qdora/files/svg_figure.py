"""Figures as SVG: the same data give the same bytes, and letters are drawn as paths, so no font is needed."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from qdora.files.atomic import atomic_write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(width: float, height: float) -> Figure:
    """An empty figure (sizes in inches) that no global state of matplotlib refers to, so it needs no closing."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


@contextmanager
def svg_file(path: Path, width: float, height: float) -> Iterator[Figure]:
    """A figure to draw on; at the end of the block it is written to `path`, whose directory is made if needed."""
    figure = new_figure(width, height)
    yield figure
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(path, svg_text(figure))


def svg_text(figure: Figure) -> str:
    """The figure as the text of an SVG file. A $ in a name is drawn as it is; only a logarithmic scale has formulas."""
    import matplotlib as mpl
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        assert isinstance(text, Text)
        if "$" in text.get_text() and r"\mathdefault" not in text.get_text():
            text.set_parse_math(False)
    stream = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "qdora", "svg.fonttype": "path"}):
        figure.savefig(stream, format="svg", metadata={"Date": None})
    return stream.getvalue()
