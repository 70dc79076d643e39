"""Another function in the place of one of a module, for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any


@contextmanager
def replaced(module: ModuleType, name: str, make: Callable[[Any], Any]) -> Iterator[None]:
    """Inside, the function of that name is `make(function)`; a module without it, of another version, is unchanged."""
    before = getattr(module, name, None)
    if before is None:
        yield
        return
    setattr(module, name, make(before))
    try:
        yield
    finally:
        setattr(module, name, before)
