"""Paths of the user: the home directory, the cache directory, and names that are no text."""

from __future__ import annotations

import os
from pathlib import Path

from qdora.errors import UserError


def user_path(path: str | Path) -> Path:
    """A path as users write it: ~ is their home directory. ~name without such a user stays, and is then missing."""
    return Path(os.path.expanduser(path))


def check_text(path: Path, fix: str) -> None:
    """Refuse a path that is not UTF-8 text, which no recipe and no page can hold. Raises UserError with the `fix`."""
    try:
        str(path.absolute()).encode()
    except UnicodeEncodeError:
        raise UserError(f"{path}: the name is not UTF-8 text. Fix: {fix}.") from None


def cache_folder(name: str) -> Path:
    """The folder or file of this name in the user's cache directory; it may be missing."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qdora" / name
