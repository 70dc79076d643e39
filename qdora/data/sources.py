"""A source of the mix -> Examples: built-in tasks, local files, data sets on the Hub; for training and to validate on.

The examples of a split are counted, cut and drawn from before any of them is read.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, overload

import numpy as np

from qdora.data import demo
from qdora.data.commonsense import HUB_TASKS, hub_task_rows
from qdora.data.example import Example
from qdora.data.files import Shards, files_of, files_of_split, local_shards, missing, readable, rows_of_split
from qdora.data.formats import FIRST_ROWS, RowExamples
from qdora.data.hub import hub_rows, hub_shards
from qdora.data.rows import FaultList, RowFault, Rows
from qdora.errors import UserError
from qdora.files.atomic import sampled_digest
from qdora.files.machine import user_path
from qdora.recipe.data_settings import (
    DataConfig,
    SourceConfig,
    absolute_pattern,
    is_path,
    is_pattern,
    names_files,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SplitExamples(Sequence[Example]):
    """Some rows of a split as Examples. Every pass over them reads the rows again and keeps none.

    Attributes:
        rows, make: The rows of the split, and how one becomes an Example: (place, row), or RowFault.
        indices: The rows that are meant, rising.
        unused: Columns that were not read, filled by a pass.
    """

    rows: Rows
    make: Callable[[Any, Any], Example]
    indices: Sequence[int]
    unused: set[str] = field(default_factory=set)

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[Example]:
        """Raises UserError after the last example, if rows are faulty: the first few by name, and how many more."""
        faults = FaultList(self.rows.where, self.rows.unit)
        for place, row in self.rows.chosen(self.indices):
            try:
                if isinstance(row, RowFault):
                    raise row
                yield self.make(place, row)
            except RowFault as fault:
                faults.add(place, fault)
        faults.check()

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | Sequence[Example]:
        """An example, or some of them, unread."""
        if isinstance(index, slice):
            return replace(self, indices=self.indices[index])
        return next(iter(replace(self, indices=[self.indices[index]])))

    @property
    def identity(self) -> str | None:
        """Stands for the content of these rows as they are in their files; None where it is not known."""
        if self.rows.identity is None:
            return None
        meant = self.indices if isinstance(self.indices, range) else np.asarray(self.indices).tobytes()
        return f"{self.rows.identity} {meant!r}"


def split_off(examples: SplitExamples, fraction: float, *, name: str) -> tuple[SplitExamples, SplitExamples]:
    """Cut the last `fraction` of the examples off, at least one: (train, validation). No randomness."""
    num_validation = 0 if fraction == 0.0 else max(1, round(len(examples) * fraction))
    if num_validation >= len(examples):
        check_rows(examples)  # a faulty row says more
        raise UserError(
            f"{name}: {len(examples)} examples leave none to train on after data.validation_fraction {fraction}. "
            "Fix: give more examples, name validation data, or set data.validation_fraction to 0."
        )
    border = len(examples) - num_validation
    first, last = examples.indices[:border], examples.indices[border:]
    return replace(examples, indices=first), replace(examples, indices=last)


def check_rows(*parts: SplitExamples | None) -> None:
    """Read the parts of a source and keep nothing. Raises UserError: the faulty rows, of each file in one list."""
    given = [part for part in parts if part is not None]
    if len(given) == 2 and given[0].rows is given[1].rows:
        given = [replace(given[0], indices=sorted({*given[0].indices, *given[1].indices}))]
    faults: list[str] = []
    for part in given:
        try:
            deque(part, maxlen=0)
        except UserError as error:
            faults += error.faults
    if faults:
        raise UserError(*faults)


def draw(examples: SplitExamples, limit: int | None, seed: int) -> SplitExamples:
    """`limit` of the examples, drawn without replacement, in their old order; all where there are no more."""
    if limit is None or limit >= len(examples):
        return examples
    chosen = np.sort(np.random.default_rng([seed, len(examples)]).permutation(len(examples))[:limit])
    return replace(examples, indices=[examples.indices[index] for index in chosen.tolist()])


def load_source(source: SourceConfig, split: str | None = None) -> list[Example]:
    """All examples of one split of a source, read; see `open_source`."""
    return list(open_source(source, split))


def open_source(source: SourceConfig, split: str | None = None) -> SplitExamples:
    """All examples of one split of a source, unread; `source.limit` is not applied.

    The split is `source.split` by default; a single file has only one and ignores it.
    """
    split = split or source.split
    if source.task is not None and source.task.startswith("demo/"):
        made = demo.examples(source.task.removeprefix("demo/"), split)
        rows = Rows(source.task, "row", len(made), lambda indices: ((index, {}) for index in indices))
        return SplitExamples(rows, lambda place, _: replace(made[place], task=source.label), range(len(made)))
    if source.path and not user_path(source.path).is_dir():
        folder = user_path(source.path)
        raise UserError(f"{folder}: is a file, expected a directory" if folder.exists() else missing(folder))
    if source.task is not None and not source.path:
        return _examples(source, hub_task_rows(source.task, split, source.revision))
    place = source.path or str(source.source)
    local = bool(source.path) or is_path(place)
    return _examples(source, rows_of_split(user_path(place), split) if local else hub_rows(source, split))


def _examples(source: SourceConfig, rows: Rows) -> SplitExamples:
    """The rows as Examples; the columns of the first ones tell the format of the user's own data."""
    first = rows.first(FIRST_ROWS) if source.task is None else []
    make = RowExamples(source, first, rows.where, named=source.name is not None)
    return SplitExamples(rows, lambda place, row: make(row, str(place)), range(rows.num_rows), make.unused)


def open_shards(source: SourceConfig) -> Shards:
    """The training split of a streamed source. Its rows are not read yet."""
    place = str(source.source)
    return local_shards(user_path(place), source.split) if is_path(place) else hub_shards(source)


def has_split(source: SourceConfig, split: str) -> bool:
    """Whether a source has a split of its own by this name, and is not itself that split."""
    if source.split == split:
        return False
    if source.task is not None and source.task.startswith("demo/"):
        return split in demo.SPLITS
    if source.task is not None and source.path is None:
        return split in HUB_TASKS[source.task].splits
    if source.is_local:
        directory = user_path(str(source.path or source.source))
        return directory.is_dir() and bool(files_of_split(directory, split))
    return False  # own data on the Hub: asked for with `validation: <split>`, never guessed


def train_and_validation(source: SourceConfig, data: DataConfig) -> tuple[SplitExamples | None, SplitExamples | None]:
    """The training examples of a source and those to validate on, unread. `source.limit` counts only for training.

    The validation examples come from `source.validation` (a split or a file), else from the validation split, else
    `data.validation_fraction` is cut from the end of the train split before the limit draws from it. A stream gives no
    training examples, and no validation but what is named or has a file.
    """
    validation, own = source.validation, source.source
    file = validation if validation is not None and names_files(validation) else None
    single_file = own is not None and is_path(own) and (is_pattern(own) or user_path(own).is_file())
    if validation is not None and file is None and (single_file or validation == source.split):
        why = f"{own} has no splits" if single_file else f"{source.split} is trained on"
        raise UserError(f"validation {validation!r}: {why}. Fix: name a file.")
    cut = validation is None and not has_split(source, "validation")
    if source.stream and cut:
        return None, None  # only reading all of it would tell where its end is
    train = None if source.stream else open_source(source)
    if cut:
        assert train is not None
        train, held_out = split_off(train, data.validation_fraction, name=source.label)
    elif file is not None:
        held_out = _examples(source, rows_of_split(user_path(file), source.split))
        if source.is_local:
            place = str(source.path or own)
            trained = {path.resolve() for path in files_of(user_path(place), source.split)}
            both = [path for path in files_of(user_path(file), source.split) if path.resolve() in trained]
            if both:
                fix = "name another file, or leave validation out" if len(trained) == 1 else f"keep it out of {place}"
                raise UserError(f"validation {file!r}: {both[0]} is trained on, too. Fix: {fix}.")
    else:
        held_out = open_source(source, validation or "validation")
    return None if train is None else draw(train, source.limit, data.seed), held_out


# Data of `eval --data`: read as a source of the run is, and compared with what the run trained on


def place_of(given: str) -> str:
    """A file, folder or pattern as an absolute path; the id of a Hub data set as it is.

    Unlike in a recipe, the name of a folder alone means that folder if there is one.
    """
    return absolute_pattern(given, Path.cwd()) if user_path(given).exists() or is_path(given) else given


def has_splits(place: str) -> bool:
    """Whether a place of `place_of` has splits: a folder and a Hub data set have, a file and a pattern have not."""
    return not is_path(place) or Path(place).is_dir()


def given_source(
    place: str, mix: Sequence[SourceConfig], like: str | None = None, split: str = "train"
) -> SourceConfig:
    """A split of a place of `place_of` as a source, with the format, chat, columns and template of a source of the run.

    That source is the one called `like`, else the one of the same Hub id or of a file of the same content, else any if
    all of the mix are read the same way. Otherwise the format follows from the columns, after a warning if some source
    has settings of its own.
    """
    plain, own = SourceConfig.model_construct(), [source for source in mix if source.source is not None]
    same = [source for source in own if (source.label == like if like is not None else source.source == place)]
    if not same and not _all_alike(mix):
        files = _contents(SourceConfig.model_construct(source=place), split)
        for source in own:
            validation = source.validation or "validation"
            is_file = names_files(validation)
            held_out = source.model_copy(update={"source": validation}) if is_file else source
            held_split = source.split if is_file else validation
            if files & (_contents(source, source.split) | _contents(held_out, held_split)):
                same.append(source)
    layout = plain
    if own and _all_alike(same or mix):
        layout = (same or own)[0]
    elif set_up := [source.label for source in own if _reading(source) != _reading(plain)]:
        logger.warning(
            "%s is read by the names of its columns alone, since the sources of the run are read in different "
            "ways. To read it like one of them, name that one with --tasks: %s.",
            place,
            ", ".join(set_up),
        )
    if layout.source != place:
        layout = layout.model_copy(update={"revision": None, "config": None, "data_files": None})
    return layout.model_copy(update={"source": place, "name": None})


def _all_alike(sources: Sequence[SourceConfig]) -> bool:
    return len({repr(_reading(source)) for source in sources}) == 1


def _reading(source: SourceConfig) -> tuple[object, ...]:
    """What decides how the rows of a source become text."""
    return source.task, source.format, source.chat, source.columns, source.template


def trained_on(given: SourceConfig, split: str, mix: Sequence[SourceConfig]) -> list[str]:
    """The sources that train on the given data: on a file of the same content, or on the same split on the Hub."""
    files, hub = _contents(given, split), (given.source, given.config, split)
    return [
        source.label
        for source in mix
        if files & _contents(source, source.split) or hub == (source.source, source.config, source.split)
    ]


def _contents(source: SourceConfig, split: str) -> set[tuple[int, str]]:
    """Size and digest of each file of a split; of none that is on the Hub or missing by now."""
    contents: set[tuple[int, str]] = set()
    if source.is_local:
        with suppress(UserError):
            for file in files_of(user_path(str(source.path or source.source)), split):
                with readable(file):
                    facts, digest = sampled_digest(file)
                contents.add((facts.st_size, digest))
    return contents
