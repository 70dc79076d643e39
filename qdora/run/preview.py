"""What the model will see of a recipe's data, token by token, before anything is trained: `qdora preview`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from itertools import chain, islice, zip_longest
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text
from tokenizers.decoders import DecodeStream

from qdora.data.chats import set_chat_date
from qdora.data.sources import draw, open_shards, train_and_validation
from qdora.data.stream import ExampleStream
from qdora.data.tokenize import ExampleTally, TokenizedExample, TokenizedSet
from qdora.errors import UserError, refuse
from qdora.files.console import consoles
from qdora.model.build_model import find_model
from qdora.recipe.data_settings import DataConfig
from qdora.recipe.recipe_file import missing_files
from qdora.recipe.settings import Recipe
from qdora.run.prepare import example_checks

MOST_ROWS = 2000  # of a source that are read, in seconds
_HALF = 200  # tokens of an example that are shown from its beginning, and from its end
_QUANTILES = {"shortest": 0.0, "median": 0.5, "95 %": 0.95, "longest": 1.0}
_SHOWN = {"\n": "⏎\n", "\t": "⇥\t"}


def preview(recipe: Recipe, where: str, num_shown: int, *, console: Console | None = None) -> dict[str, Any]:
    """Tokenise some rows of each source as a run does, without weights, and print what they become.

    Returns JSON values: the `sources` with `num_shown` examples each, and `is_refused`, whether a run would end before
    its first step.
    """
    refuse(missing_files(recipe, where))
    _, tokenizer = find_model(recipe, weights=False)
    set_chat_date(tokenizer, date.today().isoformat())
    data, sources, faults = recipe.data, list[dict[str, Any]](), list[str]()
    for number in range(len(data.mix)):
        try:
            sources.append(_preview_source(data, number, tokenizer, num_shown))
        except UserError as error:
            faults.extend(f"data.mix[{number}]: {fault}" for fault in error.faults)
    refuse(faults)
    whole = (source for source in sources if source["drawn"] != "first")
    is_refused = any(source["faults"] or not source["num_examples"] for source in whole)
    _, results = consoles(console)

    def say(text: str, style: str = "") -> None:
        results.print(Text(visible(text), style), soft_wrap=True)

    say(
        f"{where}: tokens of {recipe.model.source}, data.max_length {data.max_length:,}, "
        f"data.too_long {data.too_long}, data.loss_on {data.loss_on}"
    )
    say("│ ends a token, ⟦ ⟧ are around tokens in the loss, « » around special ones, ⏎ is a line end.")
    if is_refused:
        say("A run with this data is refused.", "bold red")
    for source in sources:
        results.print()
        say(source["name"], "bold")
        rows = "" if source["num_rows"] is None else f" of {source['num_rows']:,}"
        share = source["num_in_loss"] / max(source["num_tokens"], 1)
        say(
            f"  {source['drawn']} rows: {source['num_rows_read']:,}{rows}; {source['num_examples']:,} examples, "
            f"{source['num_tokens']:,} tokens, {share:.1%} of them in the loss; lengths "
            f"{', '.join(f'{name} {size:,}' for name, size in source['lengths'].items())}; {source['num_too_long']:,} "
            f"longer than data.max_length ({source['num_cut']:,} cut, {source['num_dropped']:,} dropped)"
        )
        for text in (*source["faults"], *source["warnings"]):
            say(f"  ! {text}", "yellow")
        for example in source["examples"]:
            results.print()
            numbers = f"{example['num_in_loss']} of {example['num_tokens']} tokens in the loss"
            say(f"  example {example['id']}: {numbers}", "bold")
            results.print(_tokens(example), soft_wrap=True)
    return {"recipe": where, "sources": sources, "is_refused": is_refused}


def _preview_source(data: DataConfig, number: int, tokenizer: Any, num_shown: int) -> dict[str, Any]:
    """What the rows of a source that are read become: `drawn` "all", a "sample", or the "first" of a stream.

    `faults` are why a run would be refused; of a stream the faulty rows, which are skipped.
    """
    source = data.mix[number]
    train, _ = train_and_validation(source, data)
    if train is None:
        stream = ExampleStream(open_shards(source), data, number, tokenizer)
        rows, tally, drawn = stream.first_rows, stream.first_tally, "first"
        num_rows, unused = stream.shards.num_rows or None, stream.make.unused
        faults = [part for row in rows for part in row if isinstance(part, str)]
    else:
        tally, sample = ExampleTally(source.label, data, tokenizer), draw(train, MOST_ROWS, data.seed)
        rows = tally.add(sample)
        drawn = "all" if len(rows) == len(train) else "sample"
        num_rows, unused, faults = len(train), set(sample.unused), tally.faults()
    by_row = [[part for part in row if isinstance(part, TokenizedExample)] for row in rows]
    examples = [example for row in by_row for example in row]
    in_turn = (
        example for example in chain.from_iterable(zip_longest(*by_row[:num_shown])) if example is not None
    )
    lengths = np.quantile(tally.lengths or [0], [*_QUANTILES.values()], method="inverted_cdf").tolist()
    checks = example_checks([TokenizedSet(source.label, tuple(examples))], tokenizer, data)
    warnings = [check.text for check in checks if check.state == "warning"]
    if unused:
        warnings.append(f"not used for training: {', '.join(sorted(unused))}.")
    return {
        "name": source.label,
        "num_rows": num_rows,
        "num_rows_read": len(rows),
        "drawn": drawn,
        "num_examples": len(examples),
        "num_tokens": sum(map(len, examples)),
        "num_in_loss": sum(int(example.loss_mask.sum()) for example in examples),
        "lengths": dict(zip(_QUANTILES, map(int, lengths), strict=True)),
        "num_too_long": sum(length > data.max_length for length in tally.lengths),
        "num_cut": tally.num_truncated,
        "num_dropped": tally.num_dropped,
        "faults": faults,
        "warnings": warnings,
        "examples": [shown_example(example, tokenizer) for example in islice(in_turn, num_shown)],
    }


def token_pieces(tokenizer: Any, ids: Sequence[int], loss_mask: Iterable[bool]) -> list[dict[str, Any]]:
    """Of each token its `text`, whether it is `in_loss`, and whether it `is_special`. `text` is what it adds to those
    before it: empty for the first tokens of a character that several tokens spell out byte by byte."""
    special = {number for number, added in tokenizer.added_tokens_decoder.items() if added.special}
    stream = DecodeStream(skip_special_tokens=False)
    texts = [stream.step(tokenizer.backend_tokenizer, id) or "" for id in ids]
    both = zip(ids, texts, loss_mask, strict=True)
    return [{"text": text, "in_loss": bool(learnt), "is_special": id in special} for id, text, learnt in both]


def shown_example(example: TokenizedExample, tokenizer: Any) -> dict[str, Any]:
    """JSON values: id, numbers of tokens, `token_pieces`, and how many are `left_out` in their middle."""
    pieces = token_pieces(tokenizer, example.input_ids.tolist(), example.loss_mask)
    left_out = max(0, len(pieces) - 2 * _HALF)
    return {
        "id": example.id,
        "num_tokens": len(pieces),
        "num_in_loss": int(example.loss_mask.sum()),
        "pieces": [*pieces[:_HALF], *pieces[_HALF + left_out :]],
        "left_out": left_out,
    }


def _tokens(example: Mapping[str, Any]) -> Text:
    text, pieces = Text(), example["pieces"]
    learnt = [False, *(piece["in_loss"] for piece in pieces), False]
    for number, piece in enumerate(pieces):
        if example["left_out"] and number == _HALF:
            text.append(f" … {example['left_out']} tokens … ", style="dim")
        shown = visible(piece["text"])
        before, after = learnt[number], learnt[number + 2]
        words = shown.removesuffix("\n")
        words = f"«{words}»" if piece["is_special"] else words
        words = ("⟦" if piece["in_loss"] > before else "") + words + ("⟧" if piece["in_loss"] > after else "")
        text.append(
            words, style="green underline" if piece["in_loss"] else "magenta" if piece["is_special"] else ""
        )
        text.append("│", style="dim")
        text.append("\n" if shown.endswith("\n") and number + 1 < len(pieces) else "")
    return text


def visible(text: str) -> str:
    """Text in which no character hides or reorders others."""
    return "".join(
        _SHOWN.get(letter) or (letter if letter.isprintable() else letter.encode("unicode_escape").decode())
        for letter in text
    )
