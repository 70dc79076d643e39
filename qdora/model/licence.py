"""The licence of a base, as its own files state it; nothing is guessed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from qdora.model.gguf_file import read_header
from qdora.model.source import LICENCE_FILES, ModelSource

_LARGEST_FILE = 1 << 20


@dataclass(frozen=True)
class Licence:
    """A licence in the Hub's terms: `id` ("apache-2.0", or "other" with a `name`), `link` to its text."""

    id: str
    name: str | None = None
    link: str | None = None


def licence_of(source: ModelSource) -> Licence | None:
    """The licence in the model card or the GGUF header of a base; None if there is none."""
    if source.is_gguf:
        settings = read_header(source.path).settings
        names = ("general.license", "general.license.name", "general.license.link")
        return _licence(*(settings.get(name) for name in names))
    front = _front_matter(source.path / "README.md")
    link = front.get("license_link")
    if source.kind == "hub" and isinstance(link, str) and "://" not in link:
        link = f"https://huggingface.co/{source.name}/blob/{source.revision or 'main'}/{link}"
    return _licence(front.get("license"), front.get("license_name"), link)


def licence_files(source: ModelSource) -> dict[str, str]:
    """Name -> text of the licence files in the directory of a base."""
    if source.is_gguf:
        return {}
    found = {file for pattern in LICENCE_FILES for file in source.path.glob(pattern)}
    return {
        file.name: file.read_text(encoding="utf-8", errors="replace")
        for file in sorted(found)
        if file.is_file() and file.stat().st_size <= _LARGEST_FILE
    }


def _licence(id_: Any, name: Any, link: Any) -> Licence | None:
    if not isinstance(id_, str) or not id_:
        return None
    return Licence(id_, name if isinstance(name, str) else None, link if isinstance(link, str) else None)


def _front_matter(card: Path) -> dict[str, Any]:
    """The YAML at the head of a model card; empty if there is none, or it cannot be read."""
    if not card.is_file() or card.stat().st_size > _LARGEST_FILE:
        return {}
    parts = card.read_text(encoding="utf-8", errors="replace").split("---\n", 2)
    if len(parts) < 3 or parts[0].strip():
        return {}
    try:
        front = yaml.safe_load(parts[1])
    except yaml.YAMLError:
        return {}
    return front if isinstance(front, dict) else {}
