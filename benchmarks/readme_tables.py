"""Writes the tables of README.md, of the pages of benchmarks/ and of three guides, from result files and the recipe.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; no number in it is typed by hand. With --check the
script writes nothing and fails if a page differs from its sources. Guides have no marks, since a terminal shows them:
the guides of models and memory have one table each, made here, and the guide of the settings is made whole.
"""

from __future__ import annotations

import re
import sys
from importlib import import_module
from pathlib import Path

from frame import TABLES
from memory_plans import which_card_guide
from tables.models import models_short
from tables.settings import settings

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PAGES = (ROOT / "README.md", *(HERE / f"{name}.md" for name in ("README", "time", "memory", "correctness")))
MODELS, MEMORY = (ROOT / f"qdora/guide/{name}.md" for name in ("models", "memory"))
SETTINGS = ROOT / "qdora/guide/settings.md"
_BLOCK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
for path in sorted([*HERE.glob("*.py"), *HERE.glob("tables/*.py")]):
    if re.search(r"^@(table|bench)\(", path.read_text(encoding="utf-8"), re.MULTILINE):
        import_module(".".join(path.relative_to(HERE).with_suffix("").parts))


def filled(text: str) -> str:
    """A page with every table made anew."""
    return _BLOCK.sub(lambda match: match[1] + TABLES[match[2]]() + match[3], text)


def wanted(page: Path) -> str:
    if page == SETTINGS:
        return settings()
    text = page.read_text(encoding="utf-8")
    if page in (MODELS, MEMORY):
        first, made = ("families", models_short) if page == MODELS else ("model, format", which_card_guide)
        return re.sub(rf"^\| {first}.*\n(?:\|.*\n)+", lambda _: made(), text, flags=re.MULTILINE)
    return filled(text)


def main() -> None:
    for page in (*PAGES, MODELS, MEMORY, SETTINGS):
        text = wanted(page)
        if "--check" not in sys.argv[1:]:
            page.write_text(text, encoding="utf-8")
        elif text != page.read_text(encoding="utf-8"):
            sys.exit(f"{page.relative_to(ROOT)} is not up to date: run python benchmarks/readme_tables.py")


if __name__ == "__main__":
    main()
