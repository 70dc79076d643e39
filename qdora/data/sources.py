"""From a source in a recipe to Examples: built-in tasks, local files, data sets on the Hub."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from qdora.data.commonsense import TEMPLATES, Row, RowFault, example_of_row, instruction_row
from qdora.data.commonsense_hub import HUB_TASKS, hub_task_rows, load_hub_rows
from qdora.data.example import Example
from qdora.data.local_files import Rows, missing, read_rows, split_file, split_names
from qdora.data.row_formats import FORMATS, examples_of_rows
from qdora.data.shards import Shards, hub_shards, local_shards
from qdora.errors import UserError, nearest
from qdora.recipe.data_settings import is_path

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class SourceSpec:
    """One source of the mix, as the recipe gives it; exactly one of task and source.

    Attributes:
        task: demo/<family>, or one of the eight commonsense tasks.
        source: File, directory of <split> files, or Hub id.
        path: For a commonsense task: the directory of its <split> files; None takes the Hub.
        format: Layout of the rows of `source`; auto goes by the columns. For a commonsense task: auto asks for the
            text of a choice, commonsense170k for its name (instructions.py).
        split: Split to read; a single file has only one and ignores it.
        limit: Most examples, drawn at random with `seed`, in their old order; None takes all.
        name: Task name in metrics; None takes the task, the rows' own tasks, or the last part of the source.
        revision: Branch, tag or commit on the Hub; None takes the pinned one of a task, else the main branch.
        seed: Of the draw under `limit`.
        stream: Only the validation examples are read into memory; see `open_shards`.
    """

    task: str | None = None
    source: str | None = None
    path: str | None = None
    format: str = "auto"
    split: str = "train"
    limit: int | None = None
    name: str | None = None
    revision: str | None = None
    seed: int = 0
    stream: bool = False

    @property
    def label(self) -> str:
        """The name in metrics: `name`, the task, or the last part of the source without its ending."""
        source = self.source or ""
        return self.name or self.task or Path(source).name.partition(".")[0] or source


def load_source(spec: SourceSpec) -> list[Example]:
    """The examples of one split of a source.

    Raises:
        UserError: One line per fault, each with file and line or row: a missing file or split, a damaged file, a faulty
            row, an empty data set.
    """
    assert (spec.task is None) != (spec.source is None), spec
    examples = _task_examples(spec, spec.task) if spec.task is not None else _source_examples(spec, str(spec.source))
    return draw(examples, spec.limit, spec.seed)


def load_mix(
    specs: Sequence[SourceSpec], validations: Sequence[str | None], *, fraction: float
) -> list[tuple[list[Example], list[Example]]]:
    """`load_train_and_validation` of every source of a recipe, the faults of all of them gathered.

    Args:
        specs: data.mix, in its order.
        validations: Of each source: the split or file to validate on, or None.
        fraction: data.validation_fraction.
    Raises:
        UserError: "data.mix[2]: /x/y.jsonl: line 17: ..." for every fault of every source.
    """
    loaded: list[tuple[list[Example], list[Example]]] = []
    faults: list[str] = []
    for index, (spec, validation) in enumerate(zip(specs, validations, strict=True)):
        try:
            loaded.append(load_train_and_validation(spec, validation=validation, fraction=fraction))
        except UserError as error:
            faults.extend(f"data.mix[{index}]: {fault}" for fault in error.faults)
    if faults:
        raise UserError(*faults)
    return loaded


def load_train_and_validation(
    spec: SourceSpec, *, validation: str | None = None, fraction: float = 0.05
) -> tuple[list[Example], list[Example]]:
    """The training examples of a source and those to validate on; `limit` counts only for training.

    Args:
        spec: The source.
        validation: Split, or file, to validate on. None takes the validation split, or cuts `fraction` from the end of
            the train split where there is none, before `limit` draws from it.
        fraction: Share that is cut; 0 cuts nothing and gives an empty list.
    Returns:
        (train, validation); of a stream no training examples, and no validation but what is named or has a file.
    Raises:
        UserError: As `load_source`.
    """
    whole = replace(spec, limit=None)
    single_file = spec.source is not None and is_path(spec.source) and Path(spec.source).expanduser().is_file()
    if validation is not None and not is_path(validation) and (single_file or validation == spec.split):
        why = "is a single file, without splits" if single_file else "is trained on"
        raise UserError(f"validation {validation!r}: {spec.source if single_file else spec.split} {why}; name a file.")
    if spec.stream and validation is None and not has_split(spec, "validation"):
        return [], []  # where its end is, to cut validation examples from, only reading all of it would tell
    train = [] if spec.stream else load_source(whole)
    if validation is None and not has_split(spec, "validation"):
        train, held_out = split_off(train, fraction, name=spec.label)
    elif validation is not None and is_path(validation):
        held_out = load_source(_with_file(whole, validation))
    else:
        held_out = load_source(replace(whole, split=validation or "validation"))
    return draw(train, spec.limit, spec.seed), held_out


def open_shards(spec: SourceSpec) -> Shards:
    """The training split of a streamed source.

    Raises:
        UserError: As `load_source`, but for the rows, which are not read yet.
    """
    source = str(spec.source)
    if is_path(source):
        return local_shards(Path(source).expanduser(), spec.split)
    return hub_shards(source, split=spec.split, revision=spec.revision, hint=_local_hint(source))


def has_split(spec: SourceSpec, split: str) -> bool:
    """Whether a source has a split of its own by this name, and is not itself that split."""
    if spec.split == split:
        return False
    if spec.task is not None and spec.task.startswith("demo/"):
        return split in SPLITS
    if spec.task is not None and spec.path is None:
        return split in HUB_TASKS[spec.task].splits
    place = str(spec.path if spec.task is not None else spec.source)
    if spec.task is not None or is_path(place):
        directory = Path(place).expanduser()
        return directory.is_dir() and split_file(directory, split) is not None
    return False  # own data on the Hub: asked for with `validation: <split>`, never guessed


def split_off(examples: Sequence[Example], fraction: float, *, name: str) -> tuple[list[Example], list[Example]]:
    """Cut the last `fraction` of the examples off, at least one: (train, validation). No randomness.

    Raises:
        UserError: If nothing would be left to train on.
    """
    if fraction == 0.0:
        return list(examples), []
    num_validation = max(1, round(len(examples) * fraction))
    if num_validation >= len(examples):
        raise UserError(
            f"{name}: {len(examples)} examples leave none to train on after data.validation_fraction {fraction}; "
            "give more examples or name validation data."
        )
    return list(examples[:-num_validation]), list(examples[-num_validation:])


def draw(examples: list[Example], limit: int | None, seed: int) -> list[Example]:
    """`limit` of the examples, drawn without replacement, in their old order; all where there are no more."""
    if limit is None or limit >= len(examples):
        return examples
    chosen = np.random.default_rng([seed, len(examples)]).permutation(len(examples))[:limit]
    return [examples[index] for index in np.sort(chosen)]


def _task_examples(spec: SourceSpec, task: str) -> list[Example]:
    if task.startswith("demo/"):
        return _demo_examples(spec, task.removeprefix("demo/"))
    if task not in TEMPLATES:
        raise UserError(
            f"{task}: unknown task, allowed: {', '.join(TEMPLATES)}, demo/<family>.{nearest(task, TEMPLATES)}"
        )
    rows = _directory_rows(spec, spec.path) if spec.path else hub_task_rows(task, spec.split, spec.revision)
    examples, faults = [], []
    for place, row in rows:
        try:
            examples.append(_task_example(row, spec, task, str(place)))
        except RowFault as fault:
            faults.append(rows.fault(place, fault))
    rows.raise_faults(faults)
    return examples


def _task_example(row: Row, spec: SourceSpec, task: str, place: str) -> Example:
    if spec.format == "commonsense170k":
        return FORMATS[spec.format].example(instruction_row(row, task), task, spec.label, place)
    return example_of_row(row, task=task, label=spec.label, id=place)


def _demo_examples(spec: SourceSpec, family: str) -> list[Example]:
    from qdora.data import demo  # reads its tables; only needed here

    split = next((name for name in demo.SPLITS if name == spec.split), None)
    if split is None:
        allowed = ", ".join(demo.SPLITS)
        raise UserError(f"{spec.task}: no split {spec.split!r}, allowed: {allowed}.{nearest(spec.split, demo.SPLITS)}")
    examples = demo.examples(family, split)
    return [replace(example, task=spec.label) for example in examples] if spec.name else examples


def _source_examples(spec: SourceSpec, source: str) -> list[Example]:
    if is_path(source):
        path = Path(source).expanduser()
        rows = _directory_rows(spec, source) if path.is_dir() else read_rows(path)
    else:
        rows = _hub_rows(spec, source)
    return examples_of_rows(rows, format=spec.format, label=spec.label, named=spec.name is not None)


def _hub_rows(spec: SourceSpec, source: str) -> Rows:
    rows = load_hub_rows(source, split=spec.split, revision=spec.revision, hint=_local_hint(source))
    if not rows.rows:
        raise UserError(f"{source}: the data set is empty, allowed: at least one row")
    return rows


def _local_hint(source: str) -> str:
    return f" For the folder on this machine write ./{source}" if Path(source).exists() else ""


def _directory_rows(spec: SourceSpec, directory: str) -> Rows:
    folder = Path(directory).expanduser()
    if not folder.is_dir():
        raise UserError(missing(folder) if not folder.exists() else f"{folder}: is a file, expected a directory")
    file = split_file(folder, spec.split)
    if file is None:
        names = split_names(folder)
        there = f"there are {', '.join(names)}" if names else "there is no data file at all"
        raise UserError(f"{folder}: no file for split {spec.split!r}; {there}.{nearest(spec.split, names)}")
    return read_rows(file)


def _with_file(spec: SourceSpec, file: str) -> SourceSpec:
    """The same source, read from a file of its own."""
    if spec.task is None:
        return replace(spec, source=file)
    path = Path(file)
    return replace(spec, path=str(path.parent), split=path.stem)
