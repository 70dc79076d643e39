"""What a section has found so far: a JSON file that is rewritten after every entry, so that a crash loses nothing."""

from __future__ import annotations

import subprocess
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from qdora.files.atomic import atomic_write_json

ERROR_LINES = 15
"""Lines of an error that are kept."""

FAILURES = (
    RuntimeError,  # CUDA's, cuBLAS's and the compiler's, out of memory among them
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ImportError,
    AssertionError,
    OSError,
    subprocess.SubprocessError,
)
"""What a case may fail with at no cost to the others."""


class Part:
    """The entries of one section.

    Args:
        path: JSON file, or None to keep them in memory.
        seconds: How long the section may take; it asks `time_left` before each case.
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

    def time_left(self) -> float:
        """Seconds; below 0 when the time is up."""
        return self._end - time.monotonic()

    def skip(self, key: str) -> bool:
        """Whether the time is up; the case is then listed as skipped."""
        if self.time_left() > 0:
            return False
        self.put("skipped", [*self.entries.get("skipped", []), key])
        return True

    def attempt(self, key: str, function: Callable[[], Any]) -> None:
        """Put what the function returns, or the end of its error: one failed case must not cost the others."""
        if self.skip(key):
            return
        try:
            self.put(key, function())
        except FAILURES:
            lines = traceback.format_exc().strip().splitlines()
            self.put(key, {"error": lines[-ERROR_LINES:]})
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
