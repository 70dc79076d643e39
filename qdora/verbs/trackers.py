"""Experiment trackers: which are installed, and what they are told."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any


def is_installed(name: str) -> bool:
    """Whether a tracker's package is there; accelerate drops one that is not without a word."""
    return find_spec(name) is not None


def flat_numbers(values: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """{"tasks": {"boolq": {"nll_sum": 3.0}}} -> {"tasks/boolq/nll_sum": 3.0}; what is no number is left out."""
    flat: dict[str, float] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flat_numbers(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            flat[f"{prefix}{key}"] = float(value)
    return flat
