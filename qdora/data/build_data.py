""""""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from qdora.data.example import Example
from qdora.data.loader import StepLoader
from qdora.data.mix import Mix, make_mix
from qdora.data.sources import SourceSpec, has_split, load_mix, load_source, open_shards
from qdora.data.stream import ExampleStream, StreamSettings
from qdora.data.tokenize import TokenizedSet, tokenize_all
from qdora.errors import UserError
from qdora.recipe.data_settings import COMMONSENSE_TASKS, DataConfig, SourceConfig
from qdora.recipe.settings import Recipe

AUTO_MICRO_BATCH_TOKENS = 2048
"""train.micro_batch_tokens: auto, unless a longer example needs more."""


def source_spec(source: SourceConfig, data: DataConfig) -> SourceSpec:
    """A recipe's source as the data package takes it."""
    return SourceSpec(
        task=source.task,
        source=source.source,
        path=source.path,
        format=source.format,
        split=source.split,
        limit=source.limit,
        name=source.name,
        revision=source.revision,
        seed=data.seed,
        stream=source.stream,
    )


def read_data(data: DataConfig) -> tuple[list[list[Example]], dict[str, list[Example]]]:
    """Training examples per source, and validation examples by the source's name (left out where there are none).

    Raises:
        UserError: The faults of all sources, each with its place in the recipe.
    """
    specs = [source_spec(source, data) for source in data.mix]
    loaded = load_mix(specs, [source.validation for source in data.mix], fraction=data.validation_fraction)
    validation = {spec.label: held_out for spec, (_, held_out) in zip(specs, loaded, strict=True) if held_out}
    return [train for train, _ in loaded], validation


def tokenized_mix(recipe: Recipe, tokenizer: Any, train: Sequence[Sequence[Example]]) -> Mix:
    """Tokenise every source and put them together; faults of all sources at once."""
    data = recipe.data
    sets: list[TokenizedSet | ExampleStream] = []
    faults: list[str] = []
    for number, (source, examples) in enumerate(zip(data.mix, train, strict=True)):
        try:
            if source.stream:
                sets.append(_stream(data, number, tokenizer))
                continue
            sets.append(
                tokenize_all(
                    examples,
                    tokenizer,
                    name=source.label,
                    max_length=data.max_length,
                    loss_on=data.loss_on,
                    too_long=data.too_long,
                )
            )
        except UserError as error:
            faults.extend(error.faults)
    if faults:
        raise UserError(*faults)
    return make_mix(
        sets,
        strategy=data.strategy,
        temperature=data.temperature,
        weights=[source.weight or 0.0 for source in data.mix] if data.strategy == "weights" else None,
        max_epochs=[source.max_epochs for source in data.mix],
        seed=data.seed,
    )


def _stream(data: DataConfig, number: int, tokenizer: Any) -> ExampleStream:
    """Source `number` of the mix as a stream; only its first rows are read."""
    source = data.mix[number]
    settings = StreamSettings(
        name=source.label,
        format=source.format,
        max_length=data.max_length,
        loss_on=data.loss_on,
        too_long=data.too_long,
        window=source.shuffle_window,
        size=source.size,
        seed=data.seed,
        number=number,
    )
    return ExampleStream(open_shards(source_spec(source, data)), settings, tokenizer)


def make_loader(recipe: Recipe, mix: Mix, tokenizer: Any, rank: int = 0, num_processes: int = 1) -> StepLoader:
    """The loader of the recipe's steps, or of a process's share of each of them.

    With data.packing it packs in "rows", until the loaded model shows what its attention takes.
    """
    return StepLoader(
        mix.sets,
        mix.order,
        tokens_per_step=recipe.train.tokens_per_step,
        batch=recipe.train.batch,
        micro_batch_tokens=micro_batch_tokens(recipe),
        pad_id=tokenizer.pad_token_id,
        packed="rows" if recipe.data.packing else None,
        row_tokens=recipe.data.max_length if recipe.data.packing else None,
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


def task_examples(task: str, *, split: str, data: Path | None, by_name: bool = False) -> list[Example]:
    """Examples of a built-in task, from the Hub or from <data>/<task>/<split> files.

    `by_name`: the commonsense tasks ask for the name of a choice, as the DoRA paper does, and not for its text.
    """
    path = None if data is None or task.startswith("demo/") else str(data / task)
    asked = "commonsense170k" if by_name and task in COMMONSENSE_TASKS else "auto"
    return load_source(SourceSpec(task=task, path=path, split=split, format=asked))


def run_examples(recipe: Recipe, split: str) -> dict[str, list[Example]]:
    """The examples of a run's sources in one split: train and validation as in training, or test.

    Raises:
        UserError: A source without that split; its training examples are never taken for it.
    """
    streamed = [source.label for source in recipe.data.mix if source.stream]
    if split == "train" and streamed:
        raise UserError(f"--split: {', '.join(streamed)}: a stream is not evaluated on, allowed: validation, test.")
    if split in ("train", "validation"):
        train, validation = read_data(recipe.data)
        labels = [source.label for source in recipe.data.mix]
        return validation if split == "validation" else dict(zip(labels, train, strict=True))
    specs = {source.label: source_spec(source, recipe.data) for source in recipe.data.mix}
    faults = [
        f"--split: {label} has no {split} split, allowed: validation, train."
        for label, spec in specs.items()
        if not has_split(spec, split)
    ]
    if faults:
        raise UserError(*faults)
    return {label: load_source(replace(spec, split=split, limit=None)) for label, spec in specs.items()}
