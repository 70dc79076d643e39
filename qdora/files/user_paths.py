"""Paths of the user: the home directory and the cache directory."""

from __future__ import annotations

import os
from pathlib import Path


def user_path(path: str | Path) -> Path:
    """A path as users write it: ~ is their home directory. ~name without such a user stays, and is then missing."""
    return Path(os.path.expanduser(path))


def cache_folder(name: str) -> Path:
    """The folder or file of this name in the user's cache directory; it may be missing."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qdora" / name
