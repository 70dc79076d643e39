"""HTML pages that need no other file: templates that extend one frame with one set of styles, `page_frame.html.j2`."""

from __future__ import annotations

import base64
from typing import Any

import jinja2


def render_page(package: str, template: str, **facts: Any) -> str:
    """The page of a template in a package; every fact is escaped. The filter `image` turns an SVG into a data address.

    As an image an SVG runs no script, loads nothing and shares no ids with the page.
    """
    loader = jinja2.ChoiceLoader([jinja2.PackageLoader(name, "") for name in (package, "qdora.files")])
    pages = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    pages.filters["image"] = lambda svg: f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}"
    return pages.get_template(template).render(**facts).encode("utf-8", "replace").decode()  # half a surrogate pair
