"""The data of a recipe: its examples, the tokenised mix, and the loader of its steps."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from qdora.data.batches import Batching, StepLoader
from qdora.data.cache import TokenCache
from qdora.data.example import Example, with_last_learnt
from qdora.data.formats import FIRST_ROWS
from qdora.data.mix import Mix, make_mix
from qdora.data.sources import SplitExamples, check_rows, has_split, load_source, open_shards, train_and_validation
from qdora.data.stream import ExampleStream
from qdora.data.tokenize import TokenizedSet, tokenize_all
from qdora.errors import HubFailure, UserError
from qdora.files.machine import cache_folder, user_path
from qdora.recipe.data_settings import COMMONSENSE_TASKS, DataConfig, SourceConfig
from qdora.recipe.settings import Recipe

AUTO_MICRO_BATCH_TOKENS = 2048
"""train.micro_batch_tokens: auto, unless a longer example needs more."""


def read_data(
    data: DataConfig, names: Collection[str] | None = None
) -> tuple[list[Sequence[Example]], dict[str, list[Example]]]:
    """Training examples per source, unread, and validation examples by the source's name where there are any.

    Only the validation examples are read; where a source has a fault, all rows are, so that one answer has all faults.
    With `names`, sources of other names are left out and give no examples. Raises HubFailure if none but the Hub is at
    fault.
    """
    train: list[Sequence[Example]] = []
    validation: dict[str, list[Example]] = {}
    opened: dict[int, tuple[SplitExamples | None, SplitExamples | None]] = {}
    faults: dict[int, tuple[str, ...]] = {}
    kind: type[UserError] = HubFailure
    for index, source in enumerate(data.mix):
        train.append(())
        if names is not None and source.label not in names:
            continue
        try:
            examples, held_out = opened[index] = train_and_validation(source, data)
            train[index] = () if examples is None else examples
            if held_out is not None and len(held_out):
                validation[source.label] = to_score(held_out, data)
        except UserError as error:
            faults[index] = error.faults
            kind = kind if isinstance(error, HubFailure) else UserError
    if faults:
        for index, parts in opened.items():
            try:
                check_rows(*parts)
            except UserError as error:
                faults[index], kind = error.faults, UserError
        raise kind(*(f"data.mix[{index}]: {fault}" for index in sorted(faults) for fault in faults[index]))
    return train, validation


def check_first_rows(data: DataConfig, names: Collection[str]) -> None:
    """Check the files and the first rows of some sources as a run does, without a tokenizer.

    Where one of the first rows is faulty, all rows are checked, but of a stream the first ones alone.
    """
    faults: list[str] = []
    for index, source in enumerate(data.mix):
        if source.label not in names:
            continue
        try:
            parts = train_and_validation(source, data)
            if source.stream:
                ExampleStream(open_shards(source), data, index, None).check_rows()
            firsts = [None if part is None else replace(part, indices=part.indices[:FIRST_ROWS]) for part in parts]
            try:
                check_rows(*firsts)
            except UserError:
                check_rows(*parts)
        except UserError as error:
            faults += (f"data.mix[{index}]: {fault}" for fault in error.faults)
    if faults:
        raise UserError(*faults)


def run_examples(recipe: Recipe, split: str, names: Collection[str] | None = None) -> dict[str, list[Example]]:
    """The examples of a run's sources in one split: train and validation as in training, or test.

    `names` are the sources that are wanted (None: all); others need not have the split. A source without it is refused:
    its training examples are never taken instead.
    """
    sources = {source.label: source for source in recipe.data.mix if names is None or source.label in names}
    streamed = [label for label, source in sources.items() if source.stream]
    if split == "train" and streamed:
        raise UserError(f"--split: a stream ({', '.join(streamed)}) has only the splits validation, test, got train.")
    if split in ("train", "validation"):
        train, validation = read_data(recipe.data, sources)
        if split == "validation":
            return validation
        labels = [source.label for source in recipe.data.mix]
        return {label: list(found) for label, found in zip(labels, train, strict=True) if label in sources}
    faults = []
    for label, source in sources.items():
        if not has_split(source, split):
            on_hub = source.source is not None and not source.is_local
            fix = f"the data set with --data {source.source} --split {split}" if on_hub else "a file with --data"
            faults.append(f"--split: {label} has no {split} split, must be one of validation, train. Fix: name {fix}.")
    if faults:
        raise UserError(*faults)
    return {label: to_score(load_source(source, split), recipe.data) for label, source in sources.items()}


def to_score(examples: Iterable[Example], data: DataConfig) -> list[Example]:
    """Examples of an evaluation, in which those turns of chats are scored that training learns: see `data.loss_on`."""
    if data.loss_on != "last":
        return list(examples)
    return [replace(each, messages=with_last_learnt(each.messages)) for each in examples]


def task_examples(task: str, *, split: str, data: Path | None, by_name: bool = False) -> list[Example]:
    """Examples of a built-in task, from the Hub or from <data>/<task>/<split> files.

    With `by_name` the commonsense tasks ask for the name of a choice, as the DoRA paper does, not for its text.
    """
    local = {} if data is None or task.startswith("demo/") else {"path": str(data / task)}
    named = {"format": "commonsense170k"} if by_name and task in COMMONSENSE_TASKS else {}
    return load_source(SourceConfig.model_validate({"task": task, **local, **named}), split)


def tokenized_mix(recipe: Recipe, tokenizer: Any, train: Sequence[Sequence[Example]]) -> Mix:
    """Tokenise every source, or read what an earlier start kept, and put them together."""
    data = recipe.data
    return make_mix(
        tokenized_sources(data, tokenizer, train),
        strategy=data.strategy,
        temperature=data.temperature,
        weights=[source.weight or 0.0 for source in data.mix] if data.strategy == "weights" else None,
        max_epochs=[source.max_epochs for source in data.mix],
        seed=data.seed,
    )


def tokenized_sources(
    data: DataConfig, tokenizer: Any, train: Sequence[Sequence[Example]], names: Collection[str] | None = None
) -> list[TokenizedSet | ExampleStream]:
    """Each source as tokens, made or read from what an earlier start kept; only those of `names`, if given.

    Faulty rows and examples that are too long are refused, of all sources at once.
    """
    options: dict[str, Any] = {"max_length": data.max_length, "loss_on": data.loss_on, "too_long": data.too_long}
    cache = None
    if data.cache != "off":
        cache = TokenCache(cache_folder("data") if data.cache is None else user_path(data.cache), tokenizer)
    sets: list[TokenizedSet | ExampleStream] = []
    faults: list[str] = []
    for number, (source, examples) in enumerate(zip(data.mix, train, strict=True)):
        if names is not None and source.label not in names:
            continue
        try:
            if source.stream:
                stream = ExampleStream(open_shards(source), data, number, tokenizer)
                stream.first()  # raises what a run would refuse its first rows for
                sets.append(stream)
                continue
            make = partial(_tokenized, examples, tokenizer, name=source.label, **options)
            identity = examples.identity if isinstance(examples, SplitExamples) else None
            if identity is None or cache is None:
                sets.append(make())
                continue
            template = None if source.template is None else source.template.model_dump()
            layout = {"label": source.label, "named": source.name is not None, "format": source.format}
            layout |= {"task": source.task, "columns": source.columns, "template": template, "chat": source.chat}
            sets.append(cache.kept({"rows": identity, **layout, **options}, make))
        except UserError as error:
            faults.extend(f"data.mix[{number}]: {fault}" for fault in error.faults)
    if faults:
        raise UserError(*faults)
    return sets


def _tokenized(examples: Sequence[Example], tokenizer: Any, **options: Any) -> TokenizedSet:
    tokens = tokenize_all(examples, tokenizer, **options)
    return replace(tokens, unused=tuple(sorted(examples.unused if isinstance(examples, SplitExamples) else ())))


def make_loader(recipe: Recipe, mix: Mix, tokenizer: Any, rank: int = 0, num_processes: int = 1) -> StepLoader:
    """The loader of the recipe's steps, or of a process's share of each of them.

    With data.packing it packs in "rows", until the loaded model shows what its attention takes.
    """
    batching = Batching(
        micro_batch_tokens(recipe),
        tokenizer.pad_token_id,
        packed="rows" if recipe.data.packing else None,
        row_tokens=recipe.data.max_length if recipe.data.packing else None,
    )
    return StepLoader(
        mix.sets,
        mix.order,
        tokens_per_step=recipe.train.tokens_per_step,
        batch=recipe.train.batch,
        batching=batching,
        rank=rank,
        num_processes=num_processes,
    )


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
