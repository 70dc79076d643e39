"""Reads an HTML page as a browser does: its tables, its text, and whatever it would load or run."""

from __future__ import annotations

import re
from html.parser import HTMLParser

VOID = {"meta", "img", "br", "hr", "link", "input", "base", "source"}


class Page(HTMLParser):
    """`tables`: rows of cells, the header first; `text`: all outside <style>; `attributes`: (name, value) of all tags.

    Elements must be closed in their order.
    """

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tables: list[list[list[str]]] = []
        self.attributes: list[tuple[str, str]] = []
        self.tags, self._open = list[str](), list[str]()
        self.text, self.style = "", ""
        self.feed(source)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        tag = self._open[-1] if self._open else ""
        if tag == "style":
            self.style += data
            return
        self.text += data
        if tag in ("td", "th"):
            self.tables[-1][-1][-1] += data

    def loads(self) -> list[str]:
        """What the page would load or run: addresses that are no images in themselves, and event attributes."""
        names = ("src", "href", "action", "srcset", "data", "poster")
        found = [value for name, value in self.attributes if name in names and not value.startswith("data:image/svg")]
        events = [name for name, _ in self.attributes if name.startswith("on")]
        return found + events + re.findall(r"url\(|@import|@font-face", self.style)

    def table(self, *columns: str) -> list[list[str]]:
        """The rows of the only table whose header begins with these columns, without the header."""
        (found,) = [table for table in self.tables if tuple(table[0][: len(columns)]) == columns]
        return found[1:]
