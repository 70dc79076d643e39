"""Reads an HTML page as a browser does: its tables, its text, and whatever it would load or run."""

from __future__ import annotations

import re
from html.parser import HTMLParser

VOID = {"meta", "img", "br", "hr", "link", "input", "base", "source"}


class Page(HTMLParser):
    """`tables`: rows of cells, the header first; `text`: all outside <style>; `loads`: addresses other than data:;
    `faults`: elements that are closed in the wrong order, and event attributes."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tables: list[list[list[str]]] = []
        self.text, self.style = "", ""
        self.tags, self.loads, self.faults, self.images, self._open = (list[str]() for _ in range(5))
        self.feed(source)
        self.close()
        self.faults += [f"<{tag}> is not closed" for tag in self._open]
        self.loads += re.findall(r"url\(|@import|@font-face", self.style)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        known = {name: value or "" for name, value in attrs}
        self.tags.append(tag)
        self.faults += [f"<{tag} {name}>" for name in known if name.startswith("on")]
        addresses = [known[name] for name in ("src", "href", "action", "srcset", "data", "poster") if name in known]
        self.loads += [each for each in addresses if not each.startswith("data:image/svg+xml;base64,")]
        if tag == "img":
            self.images.append(known["src"])
        elif tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        last = self._open.pop() if self._open else "nothing"
        if last != tag:
            self.faults.append(f"</{tag}> closes <{last}>")

    def handle_data(self, data: str) -> None:
        tag = self._open[-1] if self._open else ""
        if tag == "style":
            self.style += data
            return
        self.text += data
        if tag in ("td", "th"):
            self.tables[-1][-1][-1] += data

    def table(self, *columns: str) -> list[list[str]]:
        """The rows of the only table whose header begins with these columns, without the header."""
        (found,) = [table for table in self.tables if tuple(table[0][: len(columns)]) == columns]
        return found[1:]
