"""The key of a cell: a hash of everything that decides its result, and of nothing else."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from qdora.data.readers import READERS
from qdora.files.run_directory import WITHOUT_EFFECT, flat, is_below
from qdora.recipe.data_settings import is_path
from qdora.recipe.recipe_file import settings
from qdora.recipe.settings import Recipe

_KEY_LENGTH = 16  # hex digits: two of a million recipes share one with a chance of 3e-8
_BLOCK = 2**20
_MOST_BLOCKS = 1024


def key_of(recipe: Recipe) -> str:
    """Hash of the settings that decide the result, and of the content of the recipe's data files.

    The order and spelling in the file do not matter, nor do settings in `WITHOUT_EFFECT`. Files of the model count by
    their path only.
    """
    decisive = {key: value for key, value in flat(settings(recipe)).items() if not is_below(key, WITHOUT_EFFECT)}
    contents = {str(path): [_content(file) for file in _files(path, recipe)] for path in sorted(set(_paths(recipe)))}
    text = json.dumps([decisive, contents], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()[:_KEY_LENGTH]


def _paths(recipe: Recipe) -> Iterator[Path]:
    """Files and folders that hold examples, calibration text or the adapter to start from."""
    named: list[Any] = [recipe.adapter.resume_from]
    if recipe.base.prune is not None and recipe.base.prune.calibration.text != "mix":
        named.append(recipe.base.prune.calibration.text)
    for source in recipe.data.mix:
        named += [source.path, *(name for name in (source.source, source.validation) if name and is_path(name))]
    yield from (Path(name).expanduser() for name in named if name is not None)


def _files(path: Path, recipe: Recipe) -> list[Path]:
    """A file itself; of a folder, its files of splits or of an adapter."""
    if not path.is_dir():
        return [path] if path.is_file() else []  # a missing one is reported before anything runs
    splits = {"train", "validation", "test"}
    splits |= {name for source in recipe.data.mix for name in (source.split, source.validation) if name}
    names = {f"{split}{ending}" for split in splits for ending in READERS}
    return sorted(
        file for file in path.iterdir() if file.name.startswith("adapter_") or (file.name in names and file.is_file())
    )


def _content(file: Path) -> list[Any]:
    stat = file.stat()
    return [file.name, stat.st_size, _digest(str(file), stat.st_size, stat.st_mtime_ns)]


@lru_cache(maxsize=4096)
def _digest(file: str, size: int, modified: int) -> str:
    """SHA-256 of a file's content; of more than 1 GiB, of 1,024 blocks spread evenly over it.

    A data set of 500 GB that is streamed would take minutes otherwise, in each process; its size counts, too.
    """
    num_blocks = -(-size // _BLOCK)
    num_read = min(num_blocks, _MOST_BLOCKS)
    found = hashlib.sha256()
    with Path(file).open("rb") as stream:
        for index in range(num_read):
            stream.seek(index * (num_blocks - 1) // max(1, num_read - 1) * _BLOCK)
            found.update(stream.read(_BLOCK))
    return found.hexdigest()
