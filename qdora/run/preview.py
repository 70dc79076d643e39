"""What the model will see of a recipe's data, token by token, before anything is trained: `qdora preview`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date
from itertools import chain, count, islice, zip_longest
from typing import Any

import numpy as np

from qdora.data.chat_template import set_chat_date
from qdora.data.shown_examples import shown_example
from qdora.data.sources import open_shards, train_and_validation
from qdora.data.split_examples import SplitExamples, draw
from qdora.data.stream import ExampleStream
from qdora.data.tokenize import (
    ExampleTally,
    Outcome,
    TokenizedExample,
    TokenizedSet,
    num_characters_of,
    text_batches,
)
from qdora.errors import UserError
from qdora.model.build_model import find_model
from qdora.recipe.data_settings import DataConfig
from qdora.recipe.recipe_file import missing_files
from qdora.recipe.settings import Recipe
from qdora.run.start_checks import example_checks

_MOST_ROWS, _MOST_CHARACTERS = 2000, 1 << 23
"""Of a source that are read: enough for shares and lengths, few enough for seconds."""
_MOST_BARS = 10
_QUANTILES = {"shortest": 0.0, "5 %": 0.05, "median": 0.5, "95 %": 0.95, "longest": 1.0}


@dataclass(frozen=True)
class LengthBar:
    """How many examples have `start` to `end` tokens, both included."""

    start: int
    end: int
    num_examples: int


@dataclass(frozen=True, kw_only=True)
class SourcePreview:
    """What the rows of a source that were read become.

    Attributes:
        num_rows: Rows to train on; None where that is not known, as for many streams.
        num_rows_read: Rows that all other numbers are about: all of them, or as `drawn` says.
        drawn: "all", "sample" (drawn with data.seed), or "first" (the first rows of a stream).
        num_examples, num_tokens, num_in_loss: What is trained on, after too long examples are cut, split or dropped.
        lengths: Name -> quantile of the tokens of an example, before that.
        bars: The histogram of these lengths; the last bar has those above data.max_length, if there are any.
        num_too_long, num_cut, num_dropped: Examples longer than data.max_length, and those cut or left out.
        faults: Why a run with this source would be refused; of a stream the faulty rows, which are skipped.
        notes: What the user should know of the chat template and of the texts.
        unused: Columns that are not read.
        checks: Warnings that a run would begin with: no stop tokens, nothing to learn, empty thinking blocks.
        examples: The first example of each of the first rows, as in examples.json of a run.
    """

    name: str
    num_rows: int | None
    num_rows_read: int
    drawn: str
    num_examples: int
    num_tokens: int
    num_in_loss: int
    lengths: dict[str, int]
    bars: tuple[LengthBar, ...]
    num_too_long: int
    num_cut: int
    num_dropped: int
    faults: tuple[str, ...]
    notes: tuple[str, ...]
    unused: tuple[str, ...]
    checks: tuple[str, ...]
    examples: tuple[dict[str, Any], ...]

    @property
    def share_in_loss(self) -> float:
        """Tokens in the loss / tokens; 0 without examples."""
        return self.num_in_loss / max(self.num_tokens, 1)


@dataclass(frozen=True)
class Preview:
    """The sources of a recipe, and the settings that decide what becomes of them."""

    recipe: str
    model: str
    max_length: int
    too_long: str
    loss_on: str
    sources: tuple[SourcePreview, ...]

    @property
    def is_refused(self) -> bool:
        """Whether a run with these examples would end before its first step."""
        whole = [source for source in self.sources if source.drawn != "first"]
        return any(source.faults or not source.num_examples for source in whole)

    def to_dict(self) -> dict[str, Any]:
        """JSON types only."""
        listed = [asdict(each) | {"share_in_loss": each.share_in_loss} for each in self.sources]
        return {**asdict(self), "sources": listed, "is_refused": self.is_refused}


def preview(recipe: Recipe, where: str, num_shown: int) -> Preview:
    """Tokenise some rows of each source as a run does. Loads the tokenizer and the config of the model, no weights.

    Args:
        where: Name of the recipe in messages.
        num_shown: Examples of each source to show.
    Raises:
        UserError: Missing files, no tokenizer, or sources that cannot be read, all at once.
    """
    faults = missing_files(recipe, where)
    if faults:
        raise UserError(*faults)
    _, tokenizer = find_model(recipe, weights=False)
    set_chat_date(tokenizer, date.today().isoformat())
    data, found = recipe.data, list[SourcePreview]()
    for number in range(len(data.mix)):
        try:
            found.append(_preview_source(data, number, tokenizer, num_shown))
        except UserError as error:
            faults.extend(f"data.mix[{number}]: {fault}" for fault in error.faults)
    if faults:
        raise UserError(*faults)
    return Preview(
        recipe=where,
        model=recipe.model.source,
        max_length=data.max_length,
        too_long=data.too_long,
        loss_on=data.loss_on,
        sources=tuple(found),
    )


def _preview_source(data: DataConfig, number: int, tokenizer: Any, num_shown: int) -> SourcePreview:
    source = data.mix[number]
    train, _ = train_and_validation(source, data)
    if train is None:
        stream = ExampleStream(open_shards(source), data, number, tokenizer)
        rows, tally, drawn = stream.first_rows, stream.first_tally, "first"
        num_rows, unused = stream.shards.num_rows, stream.unused
        faults = [each for row in rows for each, _ in row if isinstance(each, str)]
    else:
        tally = ExampleTally(source.label, data.max_length, data.too_long)
        sample = draw(train, _MOST_ROWS, data.seed)
        rows = _tokenized(sample, tally, tokenizer, data)
        drawn = "all" if len(rows) == len(train) else "sample"
        num_rows, unused, faults = len(train), sample.unused, tally.faults()
    by_row = [[each for each, _ in row if isinstance(each, TokenizedExample)] for row in rows]
    examples = [each for row in by_row for each in row]
    whole = TokenizedSet(source.label, tuple(examples), tally.num_truncated, notes=tally.notes)
    in_turn = (each for each in chain.from_iterable(zip_longest(*by_row[:num_shown])) if each is not None)
    return SourcePreview(
        name=source.label,
        num_rows=num_rows,
        num_rows_read=len(rows),
        drawn=drawn,
        num_examples=len(examples),
        num_tokens=sum(map(len, examples)),
        num_in_loss=sum(int(each.loss_mask.sum()) for each in examples),
        lengths=_quantiles(tally.lengths),
        bars=_histogram(tally.lengths, data.max_length),
        num_too_long=sum(length > data.max_length for length in tally.lengths),
        num_cut=tally.num_truncated,
        num_dropped=tally.num_dropped,
        faults=tuple(faults),
        notes=tally.notes,
        unused=tuple(sorted(unused)),
        checks=tuple(each.text for each in example_checks([whole], tokenizer, data) if each.state == "warning"),
        examples=tuple(shown_example(source.label, each, tokenizer) for each in islice(in_turn, num_shown)),
    )


def _tokenized(sample: SplitExamples, tally: ExampleTally, tokenizer: Any, data: DataConfig) -> list[list[Outcome]]:
    """What becomes of each row, up to so many characters of text."""
    rows: list[list[Outcome]] = []
    num_characters = 0
    for batch in text_batches(sample):
        rows += tally.add(batch, tokenizer, data.loss_on)
        num_characters += sum(map(num_characters_of, batch))
        if num_characters >= _MOST_CHARACTERS:
            break
    return rows


def _quantiles(lengths: Sequence[int]) -> dict[str, int]:
    """Name -> the smallest length that at least this share of the examples does not exceed; empty without examples."""
    if not lengths:
        return {}
    found = np.quantile(np.asarray(lengths), list(_QUANTILES.values()), method="inverted_cdf")
    return dict(zip(_QUANTILES, map(int, found), strict=True))


def _histogram(lengths: Sequence[int], max_length: int) -> tuple[LengthBar, ...]:
    """Bars of equal width (1, 2 or 5 times a power of ten) up to `max_length`, and one for all that is longer."""
    fitting = [length for length in lengths if length <= max_length]
    longer = [length for length in lengths if length > max_length]
    bars = []
    if fitting:
        least, most = min(fitting), max(fitting)
        widths = (digit * 10**power for power in count() for digit in (1, 2, 5))
        width = next(each for each in widths if most // each - least // each < _MOST_BARS)
        for place in range(least // width, most // width + 1):
            start, end = place * width, min(place * width + width - 1, max_length)
            bars.append(LengthBar(start, end, sum(start <= length <= end for length in fitting)))
    if longer:
        bars.append(LengthBar(max_length + 1, max(longer), len(longer)))
    return tuple(bars)
