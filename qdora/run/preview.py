"""What the model will see of a recipe's data, token by token, before anything is trained: `qdora preview`."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date
from itertools import chain, islice, zip_longest
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

from qdora.data.chat_template import set_chat_date
from qdora.data.mix_plan import unused_in_words
from qdora.data.shown_examples import shown_example
from qdora.data.sources import SplitExamples, draw, open_shards, train_and_validation
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
from qdora.files.console import consoles
from qdora.model.build_model import find_model
from qdora.recipe.data_settings import DataConfig
from qdora.recipe.recipe_file import missing_files
from qdora.recipe.settings import Recipe
from qdora.run.data_checks import example_checks

_MOST_ROWS, _MOST_CHARACTERS = 2000, 1 << 23
"""Of a source that are read: enough for shares and lengths, few enough for seconds."""
_QUANTILES = {"shortest": 0.0, "5 %": 0.05, "median": 0.5, "95 %": 0.95, "longest": 1.0}
_LOSS, _SPECIAL, _FAINT = "green underline", "bold magenta", "dim"  # told apart without colours, too
_SHOWN = {"\n": "⏎\n", "\t": "⇥\t"}


def preview(recipe: Recipe, where: str, num_shown: int) -> dict[str, Any]:
    """Tokenise some rows of each source as a run does. Loads the tokenizer and the config of the model, no weights.

    Args:
        where: Name of the recipe in messages.
        num_shown: Examples of each source to show.
    Returns:
        JSON values: the settings that decide what becomes of the sources, the `sources` (`_preview_source`), and
        `is_refused`, whether a run would end before its first step.
    Raises:
        UserError: Missing files, no tokenizer, or sources that cannot be read, all at once.
    """
    faults = missing_files(recipe, where)
    if faults:
        raise UserError(*faults)
    _, tokenizer = find_model(recipe, weights=False)
    set_chat_date(tokenizer, date.today().isoformat())
    data, found = recipe.data, list[dict[str, Any]]()
    for number in range(len(data.mix)):
        try:
            found.append(_preview_source(data, number, tokenizer, num_shown))
        except UserError as error:
            faults.extend(f"data.mix[{number}]: {fault}" for fault in error.faults)
    if faults:
        raise UserError(*faults)
    whole = [source for source in found if source["drawn"] != "first"]
    return {
        "recipe": where,
        "model": recipe.model.source,
        "max_length": data.max_length,
        "too_long": data.too_long,
        "loss_on": data.loss_on,
        "sources": found,
        "is_refused": any(source["faults"] or not source["num_examples"] for source in whole),
    }


def _preview_source(data: DataConfig, number: int, tokenizer: Any, num_shown: int) -> dict[str, Any]:
    """What the rows of a source that are read become, as JSON values.

    num_rows                            rows to train on; None where that is not known, as for many streams
    num_rows_read, drawn                what all other numbers are about: "all", a "sample", or the "first" of a stream
    num_examples, num_tokens, num_in_loss   after too long examples are cut, split or dropped
    lengths, num_too_long               quantiles of the tokens of an example, and how many are too long, before that
    num_cut, num_dropped                of the examples that are too long
    faults                              why a run would be refused; of a stream the faulty rows, which are skipped
    warnings                            of the texts, the columns and the checks at the start of a run
    examples                            the first one of each of the first rows
    """
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
    lengths = np.quantile(tally.lengths or [0], [*_QUANTILES.values()], method="inverted_cdf").tolist()
    checks = [each.text for each in example_checks([whole], tokenizer, data) if each.state == "warning"]
    return {
        "name": source.label,
        "num_rows": num_rows,
        "num_rows_read": len(rows),
        "drawn": drawn,
        "num_examples": len(examples),
        "num_tokens": sum(map(len, examples)),
        "num_in_loss": sum(int(each.loss_mask.sum()) for each in examples),
        "lengths": dict(zip(_QUANTILES, map(int, lengths), strict=True)),
        "num_too_long": sum(length > data.max_length for length in tally.lengths),
        "num_cut": tally.num_truncated,
        "num_dropped": tally.num_dropped,
        "faults": faults,
        "warnings": [*tally.notes, *checks, *([unused_in_words(sorted(unused))] if unused else [])],
        "examples": [shown_example(source.label, each, tokenizer) for each in islice(in_turn, num_shown)],
    }


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


def show_preview(found: Mapping[str, Any], console: Console | None = None) -> None:
    """Print every source: its numbers, warnings and examples. Without colours, marks stand for them."""
    _, results = consoles(console)
    marks = results.color_system is None or results.no_color

    def say(text: str, style: str = "") -> None:
        results.print(Text(visible(text), style), soft_wrap=True)

    say(
        f"{found['recipe']}: tokens of {found['model']}, data.max_length {found['max_length']:,}, "
        f"data.too_long {found['too_long']}, data.loss_on {found['loss_on']}"
    )
    if marks:
        say("│ ends a token, ⟦ ⟧ are around tokens in the loss, « » around special ones, ⏎ is a line end.")
    else:
        legend = (("in the loss", _LOSS), ", only read, ", ("special", _SPECIAL), "; ⏎ is a line end.")
        results.print(Text.assemble("│ ends a token: ", *legend), soft_wrap=True)
    if found["is_refused"]:
        say("A run with this data is refused.", "bold red")
    for source in found["sources"]:
        results.print()
        say(source["name"], "bold")
        rows = "" if source["num_rows"] is None else f" of {source['num_rows']:,}"
        share = source["num_in_loss"] / max(source["num_tokens"], 1)
        say(
            f"  {source['drawn']} rows: {source['num_rows_read']:,}{rows}; {source['num_examples']:,} examples, "
            f"{source['num_tokens']:,} tokens, {share:.1%} of them in the loss"
        )
        sizes = ", ".join(f"{name} {size:,}" for name, size in source["lengths"].items())
        cut = f"{source['num_cut']:,} are cut and {source['num_dropped']:,} dropped ({found['too_long']})"
        long = (
            f"; {source['num_too_long']:,} longer than data.max_length, of which {cut}"
            if source["num_too_long"]
            else ""
        )
        say(f"  tokens of an example: {sizes}{long}")
        skipped = " (skipped)" if source["drawn"] == "first" else ""
        for text in (*(f"{fault}{skipped}" for fault in source["faults"]), *source["warnings"]):
            say(f"  ! {text}", "yellow")
        for example in source["examples"]:
            results.print()
            numbers = f"{example['num_in_loss']} of {example['num_tokens']} tokens in the loss"
            say(f"  example {example['id']}: {numbers}", "bold")
            results.print(_tokens(example, marks), soft_wrap=True)


def _tokens(example: Mapping[str, Any], marks: bool) -> Text:
    """The tokens of an example, one behind the other."""
    text, pieces = Text(), example["pieces"]
    for number, piece in enumerate(pieces):
        if example["left_out"] and number == example["left_out_behind"]:
            text.append(f" … {example['left_out']} tokens … ", style=_FAINT)
        shown = visible(piece["text"])
        words = shown.removesuffix("\n")
        if marks:
            before = number > 0 and pieces[number - 1]["in_loss"]
            after = number + 1 < len(pieces) and pieces[number + 1]["in_loss"]
            words = f"«{words}»" if piece["is_special"] else words
            words = ("⟦" if piece["in_loss"] > before else "") + words + ("⟧" if piece["in_loss"] > after else "")
        styles = [name for name, key in ((_LOSS, "in_loss"), (_SPECIAL, "is_special")) if piece[key]]
        text.append(words, style=" ".join(styles))
        text.append("│", style=_FAINT)
        text.append("\n" if shown.endswith("\n") and number + 1 < len(pieces) else "")
    return text


def visible(text: str) -> str:
    """Text in which no character hides or reorders others: a line end and a tab have a mark, the rest is escaped."""
    return "".join(
        _SHOWN.get(each) or (each if each.isprintable() else each.encode("unicode_escape").decode()) for each in text
    )
