"""Finding access tokens, which must not stay in recipes, records or messages, and masking them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

_TOKEN = re.compile(r"hf_[A-Za-z0-9]{20,}")  # the Hub's; prefix and length as the Hub issues them
_MAX_DEPTH = 20  # a recipe is 3 deep; YAML aliases can make a cycle

Steps = tuple[int | str, ...]


def masked(text: str) -> str:
    """The text with every access token replaced by hf_***."""
    return _TOKEN.sub("hf_***", text)


def token_paths(value: Any, steps: Steps = ()) -> Iterator[Steps]:
    """The path of every key and string with an access token in nested lists and dicts."""
    if isinstance(value, str) and _TOKEN.search(value):
        yield steps
    if len(steps) >= _MAX_DEPTH:
        return
    if isinstance(value, dict):
        for key, child in value.items():
            if isinstance(key, str) and _TOKEN.search(key):
                yield (*steps, key)
            yield from token_paths(child, (*steps, str(key)))
    elif isinstance(value, list | tuple):
        for index, child in enumerate(value):
            yield from token_paths(child, (*steps, index))
