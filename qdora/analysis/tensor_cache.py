"""Tensors that took long to compute, kept on disk under a hash of what they depend on."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from qdora.files.atomic import atomic_write_bytes

log = logging.getLogger("qdora")

_FORMAT = 2
"""Version of the files; a file of another version is not read."""


def kept_tensors(cache: Path | None, key: Sequence[object]) -> dict[str, Tensor] | None:
    """What `keep_tensors` wrote under the same key, on the CPU; None where there is no such file, or no cache.

    A damaged file is named in the log and counts as none: its tensors are computed and written again.
    """
    file = None if cache is None else _file(cache, key)
    if file is None or not file.is_file():
        return None
    try:
        return load_file(file)
    except SafetensorError as error:
        log.warning("%s: is damaged (%s). Its tensors are computed again.", file, error)
        return None


def keep_tensors(cache: Path | None, key: Sequence[object], tensors: dict[str, Tensor]) -> None:
    """Write them atomically under a key of JSON values, all that they depend on; without a cache nothing happens."""
    if cache is not None:
        cache.mkdir(parents=True, exist_ok=True)
        atomic_write_bytes(_file(cache, key), save({name: each.cpu().contiguous() for name, each in tensors.items()}))


def made_once(cache: Path | None, key: Sequence[object], make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors from the cache; if they are not there, made and kept."""
    found = kept_tensors(cache, key)
    if found is None:
        found = make()
        keep_tensors(cache, key, found)
    return found


def _file(cache: Path, key: Sequence[object]) -> Path:
    digest = hashlib.sha256(json.dumps([_FORMAT, *key]).encode()).hexdigest()[:32]
    return cache / f"{digest}.safetensors"
