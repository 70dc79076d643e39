"""What a section has found so far: a JSON file that is rewritten after every entry, so that a crash loses nothing."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from qdora.files.atomic import atomic_write_json

ERROR_LINES = 15  # that are kept


class Part:
    """The entries of one section.

    Args:
        path: JSON file, or None to keep them in memory.
        seconds: After these no case is begun.
    """

    def __init__(self, path: Path | None, seconds: float) -> None:
        self.path = path
        self.entries: dict[str, Any] = {}
        self._end = time.monotonic() + seconds

    def put(self, key: str, value: Any) -> None:
        """Add or replace an entry, and write."""
        self.entries[key] = value
        if self.path is not None:
            atomic_write_json(self.path, self.entries)

    def attempt(self, key: str, function: Callable[..., Any], *arguments: Any, **options: Any) -> None:
        """Put what the call returns, or the end of its error: one failed case must not cost the others."""
        if time.monotonic() > self._end:
            self.put("skipped", [*self.entries.get("skipped", []), key])
            return
        try:
            self.put(key, function(*arguments, **options))
        except Exception:
            self.put(key, {"error": traceback.format_exc().strip().splitlines()[-ERROR_LINES:]})
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
