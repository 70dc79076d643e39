"""The sources of a recipe -> training and validation examples, the tokenised mix, and the loader of its steps.

Examples of a split are counted, cut and drawn before any is read.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from qdora.data import demo
from qdora.data.batches import Batching, StepLoader
from qdora.data.cache import TokenCache
from qdora.data.commonsense import HUB_TASKS, hub_task_rows
from qdora.data.example import Example, Row, RowFault, with_last_learnt
from qdora.data.files import (
    Rows,
    files_of,
    files_of_split,
    hub_rows,
    hub_shards,
    local_shards,
    rows_of,
    rows_of_split,
)
from qdora.data.formats import FIRST_ROWS, RowExamples
from qdora.data.mix import Mix, make_mix
from qdora.data.stream import ExampleStream
from qdora.data.tokenize import TokenizedSet, tokenize_all
from qdora.errors import UserError
from qdora.files.machine import cache_folder, user_path
from qdora.recipe.data_settings import (
    COMMONSENSE_TASKS,
    DataConfig,
    SourceConfig,
    absolute_pattern,
    is_path,
    names_files,
)
from qdora.recipe.settings import Recipe

AUTO_MICRO_BATCH_TOKENS = 2048  # train.micro_batch_tokens: auto, unless a longer example needs more

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SplitExamples(Sequence[Example]):
    """Some rows of a split as Examples, which every pass reads again."""

    rows: Rows  # of the whole split
    make: Callable[[Any, str], Example]  # of a row and its id
    indices: Sequence[int]  # the rows that are meant, rising
    unused: Iterable[str] = ()  # columns that are not read

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[Example]:
        return self.rows.made(lambda row, place: self.make(row, self.rows.id_of(place)), self.indices)

    def __getitem__(self, index: Any) -> Any:
        return replace(self, indices=self.indices[index])  # of a slice

    @property
    def identity(self) -> str | None:
        """Stands for the content of these rows in their files, where that is known."""
        return self.rows.identity and f"{self.rows.identity} {self.indices}"


def draw(examples: SplitExamples, limit: int | None, seed: int) -> SplitExamples:
    """`limit` of the examples, drawn without replacement, in their old order; all where there are no more."""
    if limit is None or limit >= len(examples):
        return examples
    chosen = np.sort(np.random.default_rng([seed, len(examples)]).permutation(len(examples))[:limit])
    return replace(examples, indices=[examples.indices[index] for index in chosen.tolist()])


# The splits of a source


def open_source(source: SourceConfig, split: str | None = None) -> SplitExamples:
    """All examples of one split (None: `source.split`) of a source, unread, before `source.limit`."""
    split, task = split or source.split, source.task
    schema_row: Callable[[Row], Row] = dict
    if source.is_local:
        rows = rows_of_split(_place(source), split)
    elif task is None:
        rows = hub_rows(source, split)
    elif task.startswith("demo/"):
        rows = rows_of(task, demo.examples(task.removeprefix("demo/"), split))
        return SplitExamples(rows, lambda made, id: replace(made, task=source.label), range(rows.num_rows))
    else:
        rows, schema_row = hub_task_rows(task, split, source.revision), HUB_TASKS[task].schema_row
    if not rows.num_rows:
        raise UserError(f"{rows.where}: the data set is empty")
    first = rows.chosen(range(min(FIRST_ROWS, rows.num_rows))) if task is None else ()
    readable = [row for _, row in first if not isinstance(row, RowFault)]
    make = RowExamples(source, readable, rows.where, named=source.name is not None)
    return SplitExamples(rows, lambda row, id: make(schema_row(row), id), range(rows.num_rows), make.unused)


def _place(source: SourceConfig) -> Path:
    return user_path(str(source.path or source.source))


def open_shards(source: SourceConfig) -> Rows:
    """The training split of a streamed source. Its rows are not read yet."""
    return local_shards(_place(source), source.split) if source.is_local else hub_shards(source)


def has_split(source: SourceConfig, split: str) -> bool:
    """Whether a source has a split by this name besides its own."""
    if source.split == split:
        return False
    if source.is_local:
        return _place(source).is_dir() and bool(files_of_split(_place(source), split))
    if source.task is not None:
        return split in (demo.SPLITS if source.task.startswith("demo/") else HUB_TASKS[source.task].splits)
    return False  # own data on the Hub: asked for with `validation: <split>`, never guessed


def train_and_validation(
    source: SourceConfig, data: DataConfig
) -> tuple[SplitExamples | None, SplitExamples | None]:
    """The training examples of a source and those to validate on, unread.

    The latter come from `source.validation` (a split or a file), else from the validation split, else from the end of
    the train split, before its limit. A stream gives no training examples.
    """
    validation = source.validation
    is_file = validation is not None and names_files(validation)
    held = source.model_copy(update={"path": validation}) if is_file else source
    single_file = source.is_local and source.task is None and not _place(source).is_dir()
    if validation is not None and not is_file and (single_file or validation == source.split):
        raise UserError(f"validation {validation!r}: {source.label} has no such split besides.")
    cut = validation is None and not has_split(source, "validation")
    if source.stream and cut:
        return None, None  # only reading all of it would tell where its end is
    train = None if source.stream else open_source(source)
    if is_file and (both := _files(source, source.split) & _files(held, source.split)):
        raise UserError(f"validation {validation!r}: {min(both)} is trained on, too.")
    if train is not None and cut:
        num, fraction = len(train), data.validation_fraction
        border = num - (max(1, round(num * fraction)) if fraction else 0)
        if border <= 0:
            raise UserError(
                f"{source.label}: {num} examples leave none to train on after data.validation_fraction."
            )
        train, held_out = train[:border], train[border:]
    else:
        held_out = open_source(held, source.split if is_file else validation or "validation")
    return None if train is None else draw(train, source.limit, data.seed), held_out


def _files(source: SourceConfig, split: str) -> set[Path]:
    """The files of a split, symbolic links followed; none of data on the Hub, or missing by now."""
    with suppress(UserError):
        return {path.resolve() for path in files_of(_place(source), split)} if source.is_local else set()
    return set()


# Data of `eval --data`


def place_of(given: str) -> str:
    """A file, folder or pattern as an absolute path; the id of a Hub data set as it is."""
    return absolute_pattern(given, Path.cwd()) if user_path(given).exists() or is_path(given) else given


def given_source(place: str, mix: Sequence[SourceConfig], like: str | None = None) -> SourceConfig:
    """A place of `place_of` as a source, read like the source of the run called `like`.

    Without `like`: like the one that trains or validates on this place, or the only one; else by its columns.
    """
    own = [source for source in mix if source.source is not None]
    same = [
        source
        for source in own
        if (source.label == like if like else place in (source.source, source.validation))
    ]
    layout = next(iter(same or (own if len(mix) == 1 else [])), SourceConfig.model_construct())
    has_layout = any(each.format != "auto" or each.chat or each.columns or each.template for each in own)
    if len(mix) > 1 and not same and has_layout:
        logger.warning(
            "%s is read by its columns alone. To read it like a source, name that with --tasks.", place
        )
    other = {} if layout.source == place else {"revision": None, "config": None, "data_files": None}
    return layout.model_copy(update={"source": place, "name": None, **other})


def trained_on(given: SourceConfig, split: str, mix: Sequence[SourceConfig]) -> list[str]:
    """The sources that train on the given data."""
    files, hub = _files(given, split), (given.source, given.config, split)
    return [
        source.label
        for source in mix
        if hub == (source.source, source.config, source.split) or files & _files(source, source.split)
    ]


# The data of a recipe


@contextmanager
def _of_source(index: int) -> Iterator[None]:
    """Name the source in what the block is refused for."""
    try:
        yield
    except UserError as error:
        raise type(error)(*(f"data.mix[{index}]: {fault}" for fault in error.faults)) from error


def read_data(
    data: DataConfig, names: Collection[str] | None = None
) -> tuple[dict[str, Sequence[Example]], dict[str, list[Example]]]:
    """Training examples, unread, and validation examples by source, of the sources of `names` (None: all)."""
    train: dict[str, Sequence[Example]] = {}
    validation: dict[str, list[Example]] = {}
    for index, source in enumerate(data.mix):
        if names is None or source.label in names:
            with _of_source(index):
                examples, held_out = train_and_validation(source, data)
                train[source.label] = examples or ()
                if held_out:
                    validation[source.label] = to_score(held_out, data)
    return train, validation


def check_local_rows(data: DataConfig) -> None:
    """Read every row of the sources on this machine that are not streamed; UserError for faulty ones."""
    for index, source in enumerate(data.mix):
        if source.is_local and not source.stream:
            with _of_source(index):
                for examples in train_and_validation(source, data):
                    for _ in examples or ():
                        pass


def run_examples(recipe: Recipe, split: str, names: Collection[str] | None = None) -> dict[str, list[Example]]:
    """The examples of a run's sources (None: all) in one split: train and validation as in training, or test."""
    sources = {source.label: source for source in recipe.data.mix if names is None or source.label in names}
    if split in ("train", "validation"):
        if split == "train" and any(source.stream for source in sources.values()):
            raise UserError("--split: a stream has only the splits validation, test, got train.")
        train, validation = read_data(recipe.data, sources)
        return validation if split == "validation" else {label: list(found) for label, found in train.items()}
    if missing := [label for label, source in sources.items() if not has_split(source, split)]:
        raise UserError(f"--split: {missing[0]} has no {split} split. Fix: name data with --data.")
    return {label: to_score(open_source(source, split), recipe.data) for label, source in sources.items()}


def to_score(examples: Iterable[Example], data: DataConfig) -> list[Example]:
    """Examples of an evaluation: of chats the turns are scored that `data.loss_on` learns."""
    is_last = data.loss_on == "last"
    return [replace(each, messages=with_last_learnt(each.messages)) if is_last else each for each in examples]


def task_examples(task: str, *, split: str, data: Path | None, by_name: bool = False) -> list[Example]:
    """Examples of a built-in task; with `by_name` the commonsense tasks ask for the name of a choice, not its text."""
    local = {} if data is None or task.startswith("demo/") else {"path": str(data / task)}
    named = {"format": "commonsense170k"} if by_name and task in COMMONSENSE_TASKS else {}
    return list(open_source(SourceConfig.model_validate({"task": task, **local, **named}), split))


def tokenized_mix(recipe: Recipe, tokenizer: Any, train: Mapping[str, Sequence[Example]]) -> Mix:
    """Tokenise every source, or read what an earlier start kept, and put them together."""
    data, cache = recipe.data, None
    if data.cache != "off" and hasattr(tokenizer, "backend_tokenizer"):
        cache = TokenCache(cache_folder("data") if data.cache is None else user_path(data.cache), tokenizer)
    sets: list[TokenizedSet | ExampleStream] = []
    for index, source in enumerate(data.mix):
        examples = train[source.label]
        with _of_source(index):
            make = partial(tokenize_all, examples, tokenizer, source.label, data)
            identity, unused = getattr(examples, "identity", None), getattr(examples, "unused", ())
            if source.stream:
                stream = ExampleStream(open_shards(source), data, index, tokenizer)
                _ = stream.examples  # raises what a run would refuse its first rows for
                unused = stream.make.unused
                sets.append(stream)
            elif identity is None or cache is None:
                sets.append(make())
            else:
                content = {
                    **source.model_dump(include={"format", "task", "columns", "template", "chat"}),
                    **data.model_dump(include={"max_length", "loss_on", "too_long"}),
                    "rows": identity,
                    "label": source.label,
                    "named": source.name is not None,
                }
                sets.append(cache.kept(content, make))
        if unused:
            logger.info("%s: not used for training: %s.", source.label, ", ".join(sorted(unused)))
    return make_mix(sets, data)


def make_loader(recipe: Recipe, mix: Mix, tokenizer: Any, rank: int = 0, num_processes: int = 1) -> StepLoader:
    batching = Batching(micro_batch_tokens(recipe), tokenizer.pad_token_id)
    if recipe.data.packing:  # in "rows", until the loaded model shows what its attention takes
        batching.packed, batching.row_tokens = "rows", recipe.data.max_length
    return StepLoader(mix, batching, recipe.train.tokens_per_step, recipe.train.batch, rank, num_processes)


def micro_batch_tokens(recipe: Recipe) -> int:
    """Most tokens of a micro-batch, padding counted."""
    asked = recipe.train.micro_batch_tokens
    return max(recipe.data.max_length, AUTO_MICRO_BATCH_TOKENS) if asked == "auto" else asked


def num_steps_of(recipe: Recipe, loader: StepLoader) -> int:
    """Optimizer steps of the run."""
    if recipe.train.steps is not None:
        return recipe.train.steps
    assert recipe.train.epochs is not None
    return loader.steps_for_epochs(recipe.train.epochs)
