"""The key of a cell: a hash of everything that decides its result, and of nothing else."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from qdora.data.files import files_of
from qdora.errors import UserError
from qdora.files.setting_keys import GONE, WITHOUT_EFFECT, flat, is_below
from qdora.files.user_paths import user_path
from qdora.recipe.data_settings import is_path, names_files
from qdora.recipe.recipe_file import settings
from qdora.recipe.settings import Recipe

_KEY_LENGTH = 16  # hex digits: two of a million recipes share one with a chance of 3e-8
_BLOCK = 2**20
_MOST_BLOCKS = 1024
_LATER = {"model.tokenizer_revision": None}
_LATER_OF_SOURCES = {"chat": False}
"""Settings, and those of a source, that were added after studies had been made, with the value that changes nothing: at
this value they have no part in a key, so the cells of those studies stay done."""


def key_of(recipe: Recipe) -> str:
    """Hash of the settings that decide the result, and of the content of the recipe's data files.

    The order and spelling in the file do not matter, nor do settings in `WITHOUT_EFFECT`. Files of the model count by
    their path only.
    """
    found = {key: value for key, value in flat(settings(recipe)).items() if not is_below(key, WITHOUT_EFFECT)}
    decisive = _without(found, _LATER) | dict(GONE)
    decisive["data.mix"] = [_without(source, _LATER_OF_SOURCES) for source in decisive["data.mix"]]
    contents = {str(path): [_content(file) for file in files] for path, files in sorted(_files(recipe).items())}
    text = json.dumps([decisive, contents], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()[:_KEY_LENGTH]


def _without(values: dict[str, Any], later: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if later.get(name, ...) != value}


def _files(recipe: Recipe) -> dict[Path, list[Path]]:
    """Files and folders that hold examples, calibration text, a chat template or the adapter to start from -> the
    files in them."""
    start, prune = recipe.adapter.resume_from, recipe.base.prune
    found: dict[Path, list[Path]] = {}
    if start is not None:
        folder = user_path(start)
        found[folder] = sorted(folder.glob("adapter_*")) if folder.is_dir() else _of_splits(folder, ())
    calibration = None if prune is None or prune.calibration.text == "mix" else prune.calibration.text
    for path in (user_path(name) for name in (calibration, recipe.data.chat_template) if name is not None):
        found[path] = _of_splits(path, ())
    for source in recipe.data.mix:
        splits, validation = {"train", "validation", "test", source.split}, source.validation
        if validation is not None and not names_files(validation):
            splits.add(validation)
            validation = None
        dataset = source.source if source.source is None or is_path(source.source) else None
        for path in (user_path(name) for name in (source.path, dataset, validation) if name is not None):
            found[path] = sorted({*found.get(path, ()), *_of_splits(path, splits)})
    return found


def _of_splits(path: Path, splits: Iterable[str]) -> list[Path]:
    """A file itself; the files of a folder's splits, or of a pattern. None where they are missing: that is reported
    before anything runs."""
    found: set[Path] = {path} if path.is_file() else set()
    for split in splits:
        with suppress(UserError):
            found.update(files_of(path, split))
    return sorted(found)


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
