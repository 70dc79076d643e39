"""The files of a source: a file itself, those of a split of a folder, or those that a pattern such as *.jsonl means."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable
from pathlib import Path

from qdora.data.data_file import ending, name_without_ending
from qdora.errors import UserError, nearest, nearest_path
from qdora.recipe.data_settings import FILE_SUFFIXES, is_pattern

_SPLIT_NAMES = frozenset(("train", "training", "validation", "valid", "val", "dev", "test", "testing", "eval"))
"""A folder with one of these words in the name of a file or folder has splits."""
_TRAIN_NAMES = frozenset(("train", "training"))
_SHARD = re.compile(r"-\d+(-of-\d+)?$")
_ABOUT = frozenset(("readme", "license", "licence", "changelog", "dataset_info", "dataset_infos"))
"""Names of files that say something about a folder's data, and hold none."""


def files_of(source: Path, split: str) -> list[Path]:
    """The files of a source's split, sorted. A single file, and a pattern, are all of the data whatever the split.

    Of a folder they are <split>.<ending>, <split>-*.<ending> and <split>/*.<ending>, in it or in one folder inside it.
    A folder in which no name tells of splits is the training split as a whole, folders inside it included.

    Raises: UserError if there is none, or it is not clear which are meant.
    """
    if source.is_file():
        return [source]
    if source.is_dir():
        return files_of_split(source, split) or _whole_folder(source, split)
    if not is_pattern(str(source)):
        raise UserError(missing(source))
    found = _data_files(map(Path, glob.glob(str(source), recursive=True)))
    if not found:
        raise UserError(f"{source}: no data file matches, allowed endings: {', '.join(FILE_SUFFIXES)}.")
    return found


def files_of_split(folder: Path, split: str) -> list[Path]:
    """The files that are named after a split, in a folder or, if it names no split at all, in one folder inside it.

    Raises: UserError if two files, or those of two folders, could be meant.
    """
    found = _named_after(folder, split)
    if found or any(_tells(path.name) for path in folder.iterdir()):
        return found
    inside: dict[Path, list[Path]] = {}
    for each in sorted(map(Path, glob.glob(f"{glob.escape(str(folder))}/**/", recursive=True))):
        if not any(each.is_relative_to(other) for other in inside) and (files := _named_after(each, split)):
            inside[each] = files
    if len(inside) > 1:
        names = [str(each.relative_to(folder)) for each in inside]
        raise UserError(
            f"{folder}: {', '.join(names[:10])} each hold split {split!r}. Fix: name one of them, such as "
            f"{folder / names[0]}."
        )
    return next(iter(inside.values()), [])


def _named_after(folder: Path, split: str) -> list[Path]:
    same = [path for suffix in FILE_SUFFIXES if (path := folder / f"{split}{suffix}").is_file()]
    if len(same) > 1:
        names = ", ".join(path.name for path in same)
        raise UserError(f"{folder}: {names} all hold split {split!r}. Fix: name one file as the source.")
    start = glob.escape(str(folder / split))
    return sorted([*same, *_data_files(map(Path, [*glob.glob(f"{start}-*"), *glob.glob(f"{start}/*")]))])


def missing(path: Path) -> str:
    """The error line for a path that does not exist, with the nearest name that does."""
    if path.is_dir():
        return f"{path}: is a directory, expected a file"
    return f"{path}: no such file.{nearest_path(path)}"


def _whole_folder(folder: Path, split: str) -> list[Path]:
    found = _data_files(map(Path, glob.glob(f"{glob.escape(str(folder))}/**", recursive=True)))
    names = {part for path in found for part in path.relative_to(folder).parts[:-1]}
    names |= {name_without_ending(path) for path in found}
    others = {name for name in names if _tells(name) - _TRAIN_NAMES}
    if split != "train" or not found or others:
        shown = list(dict.fromkeys(_SHARD.sub("", name) for name in [*sorted(others), *sorted(names)]))
        there = f"there are {', '.join(shown[:10])}" if shown else "there is no data file at all"
        looked = f"looked for {split}.*, {split}-* and {split}/*"
        meant = next((path for path in found if _tells(name_without_ending(path)) & _TRAIN_NAMES), None)
        fix = f" Fix: name the files that are meant{f', such as {meant}' if meant else ''}." if found else ""
        near = nearest(split, shown) if split != "train" else ""
        raise UserError(f"{folder}: no file for split {split!r}, {looked}; {there}.{near or fix}")
    endings = sorted({ending(path) for path in found})
    if len(endings) > 1:
        raise UserError(
            f"{folder}: holds files of several kinds ({', '.join(endings)}), and none is named after split {split!r}. "
            f"Fix: name those that are meant, such as {folder}/*{endings[0]}."
        )
    return found


def _tells(name: str) -> frozenset[str]:
    """The words of a name that name a split."""
    return _SPLIT_NAMES.intersection(re.split(r"[-_. ]", name.lower()))


def _data_files(paths: Iterable[Path]) -> list[Path]:
    """Those that are data files, without what only tells of the others. (`glob` leaves out what is hidden.)"""
    return sorted(
        path
        for path in paths
        if ending(path) in FILE_SUFFIXES and name_without_ending(path).lower() not in _ABOUT and path.is_file()
    )
