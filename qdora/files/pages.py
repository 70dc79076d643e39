"""What people read: HTML pages that need no other file, figures as SVG, and tables in Markdown."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2

from qdora.files.atomic import atomic_write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def render_page(package: str, template: str, **facts: Any) -> str:
    """The page of a template in a package, in `page_frame.html.j2`, escaped; the filter `image` embeds an SVG."""
    loader = jinja2.ChoiceLoader([jinja2.PackageLoader(name, "") for name in (package, "qdora.files")])
    pages = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    pages.filters["image"] = lambda svg: f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}"
    # Half a surrogate pair
    return pages.get_template(template).render(**facts).encode("utf-8", "replace").decode()


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, sizes in inches, that needs no closing."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


@contextmanager
def svg_file(path: Path, width: float, height: float) -> Iterator[Figure]:
    """A figure to draw on, which is written to `path` when the block ends."""
    figure = new_figure(width, height)
    yield figure
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(path, svg_text(figure))


def svg_text(figure: Figure) -> str:
    """The figure as SVG: the same data give the same bytes, and letters are paths."""
    import matplotlib as mpl
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        # A $ in a name is drawn as it is; only a logarithmic scale has formulas
        if isinstance(text, Text) and r"\mathdefault" not in text.get_text():
            text.set_parse_math(False)
    stream = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "qdora", "svg.fonttype": "path"}):
        figure.savefig(stream, format="svg", metadata={"Date": None})
    return stream.getvalue()


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[bool] = ()) -> str:
    """`right` says which columns are aligned to the right."""
    marks = ["---:" if index < len(right) and right[index] else "---" for index in range(len(header))]
    lines = [map(markdown_cell, header), marks, *(map(markdown_cell, row) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def markdown_cell(text: str) -> str:
    return " ".join(str(text).split()).replace("|", "\\|")
