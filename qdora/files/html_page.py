"""HTML pages that need no other file: one frame and one set of styles for all of them (`page_frame.html.j2`)."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from functools import cache
from typing import Any, TypedDict

import jinja2

from qdora.files.visible_text import visible

_FRAME = "qdora.files"


class PageTable(TypedDict):
    """A table as `data_table` of the page's parts shows it; `is_text` says for each column whether it holds words."""

    header: Sequence[str]
    is_text: Sequence[bool]
    rows: Sequence[Sequence[str]]


def render_page(package: str, template: str, **facts: Any) -> str:
    """The page of a template in a package, which extends the frame; every fact is escaped.

    The filter `visible` shows every character of a text (`visible_text`), `image` turns an SVG into a data address.
    """
    page = _environment(package).get_template(template).render(**facts)
    return page.encode("utf-8", "replace").decode("utf-8")  # half a surrogate pair: JSON can hold it, UTF-8 cannot


@cache  # an environment keeps its compiled templates, and a run writes its page more than once
def _environment(package: str) -> jinja2.Environment:
    places = [jinja2.PackageLoader(name, "") for name in (package, _FRAME)]
    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader(places), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    environment.filters |= {"visible": visible, "image": svg_address}
    return environment


def svg_address(svg: str) -> str:
    """A data: address of an SVG file. As an image it runs no script, loads nothing and shares no ids with the page."""
    return f"data:image/svg+xml;base64,{base64.b64encode(svg.encode('utf-8')).decode('ascii')}"
