"""A source of the mix -> Examples: built-in tasks, local files, data sets on the Hub."""

from __future__ import annotations

from dataclasses import replace

from qdora.data import demo
from qdora.data.commonsense import example_of_row, instruction_row
from qdora.data.commonsense_hub import HUB_TASKS, hub_task_rows
from qdora.data.example import Example
from qdora.data.hub_datasets import hub_rows, hub_shards
from qdora.data.readers import Shards, local_shards, rows_of_split
from qdora.data.row_examples import FIRST_ROWS, RowExamples
from qdora.data.row_formats import FORMATS, unused_columns, with_lists
from qdora.data.rows import Row, Rows
from qdora.data.source_files import files_of, files_of_split, missing
from qdora.data.split_examples import SplitExamples, draw, split_off
from qdora.errors import UserError
from qdora.files.user_paths import user_path
from qdora.recipe.data_settings import DataConfig, SourceConfig, is_path, is_pattern, names_files


def load_source(source: SourceConfig, split: str | None = None) -> list[Example]:
    """All examples of one split of a source, read; see `open_source`.

    Raises: UserError: As `open_source`, and one line per faulty row with file and line or row.
    """
    return list(open_source(source, split))


def open_source(source: SourceConfig, split: str | None = None) -> SplitExamples:
    """All examples of one split of a source, unread; `source.limit` is not applied.

    The split is `source.split` by default; a single file has only one and ignores it.

    Raises: UserError: A missing file or split, a damaged file, an empty data set, columns that fit no format.
    """
    split = split or source.split
    if source.task is None:
        place = str(source.source)
        return _examples(source, rows_of_split(user_path(place), split) if is_path(place) else hub_rows(source, split))
    if source.task.startswith("demo/"):
        made = demo.examples(source.task.removeprefix("demo/"), split)
        rows = Rows(source.task, "row", len(made), lambda indices: ((index, {}) for index in indices))
        task = source.name or source.task
        return SplitExamples(rows, lambda place, _: replace(made[place], task=task), range(len(made)))
    if source.path:
        return _examples(source, _directory_rows(source.path, split))
    return _examples(source, hub_task_rows(source.task, split, source.revision))


def train_and_validation(source: SourceConfig, data: DataConfig) -> tuple[SplitExamples | None, SplitExamples | None]:
    """The training examples of a source and those to validate on, unread. `source.limit` counts only for training.

    The validation examples come from `source.validation` (a split or a file), else from the validation split, else
    `data.validation_fraction` is cut from the end of the train split before the limit draws from it.

    Returns:
        (train, validation). A stream gives no training examples, and no validation but what is named or has a file.
    Raises: UserError: As `open_source`.
    """
    validation, own = source.validation, source.source
    file = validation if validation is not None and names_files(validation) else None
    single_file = own is not None and is_path(own) and (is_pattern(own) or user_path(own).is_file())
    if validation is not None and file is None and (single_file or validation == source.split):
        why = "has no splits" if single_file else "is trained on"
        place = source.source if single_file else source.split
        raise UserError(f"validation {validation!r}: {place} {why}. Fix: name a file.")
    cut = validation is None and not has_split(source, "validation")
    if source.stream and cut:
        return None, None  # only reading all of it would tell where its end is
    train = None if source.stream else open_source(source)
    if cut:
        assert train is not None
        train, held_out = split_off(train, data.validation_fraction, name=source.label)
    elif file is not None:
        held_out = _examples(source, rows_of_split(user_path(file), source.split))
        place = source.path if source.task is not None else source.source
        if place is not None and (source.task is not None or is_path(place)):
            trained = {each.resolve() for each in files_of(user_path(place), source.split)}
            both = [each for each in files_of(user_path(file), source.split) if each.resolve() in trained]
            if both:
                fix = "name another file, or leave validation out" if len(trained) == 1 else f"keep it out of {place}"
                raise UserError(f"validation {file!r}: {both[0]} is trained on, too. Fix: {fix}.")
    else:
        held_out = open_source(source, validation or "validation")
    return None if train is None else draw(train, source.limit, data.seed), held_out


def open_shards(source: SourceConfig) -> Shards:
    """The training split of a streamed source. Its rows are not read yet.

    Raises: UserError: A missing file or split, a damaged file.
    """
    place = str(source.source)
    if is_path(place):
        return local_shards(user_path(place), source.split)
    return hub_shards(source)


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
        directory = user_path(place)
        return directory.is_dir() and bool(files_of_split(directory, split))
    return False  # own data on the Hub: asked for with `validation: <split>`, never guessed


def _examples(source: SourceConfig, rows: Rows) -> SplitExamples:
    """Examples of a commonsense task, or of the user's own data, whose format the columns of the first row tell."""
    if source.task is not None:
        return _of_task(source, source.task, rows)
    make = RowExamples(source, rows.first(FIRST_ROWS), rows.where, named=source.name is not None)
    return SplitExamples(rows, lambda place, row: make(row, str(place)), range(rows.num_rows), make.unused)


def _of_task(source: SourceConfig, task: str, rows: Rows) -> SplitExamples:
    unused = set[str]()

    def make(place: int, row: Row) -> Example:
        row = with_lists(row, "choices")
        unused.update(unused_columns(row, "choices"))
        if source.format == "commonsense170k":
            return FORMATS[source.format].example(instruction_row(row, task), source.label, str(place))
        return example_of_row(row, task=task, label=source.label, id=str(place))

    return SplitExamples(rows, make, range(rows.num_rows), unused)


def _directory_rows(directory: str, split: str) -> Rows:
    folder = user_path(directory)
    if not folder.is_dir():
        raise UserError(missing(folder) if not folder.exists() else f"{folder}: is a file, expected a directory")
    return rows_of_split(folder, split)
