"""A source of the mix -> Examples: built-in tasks, local files, data sets on the Hub."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from qdora.data import demo
from qdora.data.commonsense import HUB_TASKS, example_of_row, hub_task_rows, instruction_row
from qdora.data.example import Example
from qdora.data.readers import Shards, hub_rows, hub_shards, local_shards, missing, read_rows, split_file, split_names
from qdora.data.row_formats import FORMATS, examples_of_rows
from qdora.data.rows import Row, Rows
from qdora.errors import UserError, nearest
from qdora.recipe.data_settings import DataConfig, SourceConfig, is_path


def load_source(source: SourceConfig, split: str | None = None) -> list[Example]:
    """All examples of one split of a source; `source.limit` is not applied.

    The split is `source.split` by default; a single file has only one and ignores it.

    Raises: UserError: One line per fault, each with file and line or row: a missing file or split, a damaged file, a
        faulty row, an empty data set.
    """
    split = split or source.split
    if source.task is None:
        rows = _own_rows(str(source.source), split, source.revision)
        return examples_of_rows(rows, format=source.format, label=source.label, named=source.name is not None)
    if source.task.startswith("demo/"):
        examples = demo.examples(source.task.removeprefix("demo/"), split)
        return [replace(example, task=source.label) for example in examples] if source.name else examples
    return _task_examples(source, source.task, split)


def load_train_and_validation(source: SourceConfig, data: DataConfig) -> tuple[list[Example], list[Example]]:
    """The training examples of a source and those to validate on. `source.limit` counts only for training.

    The validation examples come from `source.validation` (a split or a file), else from the validation split, else
    `data.validation_fraction` is cut from the end of the train split before the limit draws from it.

    Returns:
        (train, validation). A stream gives no training examples, and no validation but what is named or has a file.
    Raises: UserError: As `load_source`.
    """
    validation, own = source.validation, source.source
    single_file = own is not None and is_path(own) and Path(own).expanduser().is_file()
    if validation is not None and not is_path(validation) and (single_file or validation == source.split):
        why = "is a single file, without splits" if single_file else "is trained on"
        place = source.source if single_file else source.split
        raise UserError(f"validation {validation!r}: {place} {why}. Fix: name a file.")
    cut = validation is None and not has_split(source, "validation")
    if source.stream and cut:
        return [], []  # only reading all of it would tell where its end is
    train = [] if source.stream else load_source(source)
    if cut:
        train, held_out = split_off(train, data.validation_fraction, name=source.label)
    elif validation is not None and is_path(validation):
        held_out = _from_file(source, validation)
    else:
        held_out = load_source(source, validation or "validation")
    return draw(train, source.limit, data.seed), held_out


def open_shards(source: SourceConfig) -> Shards:
    """The training split of a streamed source. Its rows are not read yet.

    Raises: UserError: A missing file or split, a damaged file.
    """
    place = str(source.source)
    if is_path(place):
        return local_shards(Path(place).expanduser(), source.split)
    return hub_shards(place, split=source.split, revision=source.revision, hint=_local_hint(place))


def has_split(source: SourceConfig, split: str) -> bool:
    """Whether a source has a split of its own by this name, and is not itself that split."""
    if source.split == split:
        return False
    if source.task is not None and source.task.startswith("demo/"):
        return split in demo.SPLITS
    if source.task is not None and source.path is None:
        return split in HUB_TASKS[source.task].splits
    place = str(source.path if source.task is not None else source.source)
    if source.task is not None or is_path(place):
        directory = Path(place).expanduser()
        return directory.is_dir() and split_file(directory, split) is not None
    return False  # own data on the Hub: asked for with `validation: <split>`, never guessed


def split_off(examples: Sequence[Example], fraction: float, *, name: str) -> tuple[list[Example], list[Example]]:
    """Cut the last `fraction` of the examples off, at least one: (train, validation). No randomness.

    Raises: UserError if nothing would be left to train on.
    """
    if fraction == 0.0:
        return list(examples), []
    num_validation = max(1, round(len(examples) * fraction))
    if num_validation >= len(examples):
        raise UserError(
            f"{name}: {len(examples)} examples leave none to train on after data.validation_fraction {fraction}. "
            "Fix: give more examples or name validation data."
        )
    return list(examples[:-num_validation]), list(examples[-num_validation:])


def draw(examples: list[Example], limit: int | None, seed: int) -> list[Example]:
    """`limit` of the examples, drawn without replacement, in their old order; all where there are no more."""
    if limit is None or limit >= len(examples):
        return examples
    chosen = np.random.default_rng([seed, len(examples)]).permutation(len(examples))[:limit]
    return [examples[index] for index in np.sort(chosen)]


def _task_examples(source: SourceConfig, task: str, split: str) -> list[Example]:
    """One of the eight commonsense tasks."""
    rows = _directory_rows(source.path, split) if source.path else hub_task_rows(task, split, source.revision)

    def make(place: int, row: Row) -> Example:
        if source.format == "commonsense170k":
            return FORMATS[source.format].example(instruction_row(row, task), task, source.label, str(place))
        return example_of_row(row, task=task, label=source.label, id=str(place))

    return rows.examples(make)


def _own_rows(place: str, split: str, revision: str | None) -> Rows:
    if not is_path(place):
        return hub_rows(place, split=split, revision=revision, hint=_local_hint(place))
    path = Path(place).expanduser()
    return _directory_rows(place, split) if path.is_dir() else read_rows(path)


def _local_hint(source: str) -> str:
    return f" Fix: for the folder on this machine write ./{source}" if Path(source).exists() else ""


def _directory_rows(directory: str, split: str) -> Rows:
    folder = Path(directory).expanduser()
    if not folder.is_dir():
        raise UserError(missing(folder) if not folder.exists() else f"{folder}: is a file, expected a directory")
    file = split_file(folder, split)
    if file is None:
        names = split_names(folder)
        there = f"there are {', '.join(names)}" if names else "there is no data file at all"
        raise UserError(f"{folder}: no file for split {split!r}; {there}.{nearest(split, names)}")
    return read_rows(file)


def _from_file(source: SourceConfig, file: str) -> list[Example]:
    """The examples of the same source in a file of its own."""
    if source.task is None:
        return load_source(source.model_copy(update={"source": file}))
    path = Path(file)
    return load_source(source.model_copy(update={"path": str(path.parent)}), path.stem)
