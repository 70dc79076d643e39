"""The first examples of a mix as the model sees them, for people: kept in the run directory as examples.json."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from itertools import chain, islice, zip_longest
from typing import Any

from qdora.data.stream import ExampleStream
from qdora.data.token_pieces import token_pieces
from qdora.data.tokenize import TokenizedExample, TokenizedSet
from qdora.files.run_directory import RunDirectory

EXAMPLES_FILE = "examples.json"
_NUM_SHOWN = 3
_MOST_TOKENS = 400
"""Tokens of an example that are shown; of a longer one the middle is left out."""


def keep_examples(run: RunDirectory, sources: Sequence[TokenizedSet | ExampleStream], tokenizer: Any) -> None:
    """Write examples.json: three examples, the first of each source and then the second ones."""
    run.write_json(EXAMPLES_FILE, {"examples": shown_examples(sources, tokenizer)})


def shown_examples(sources: Sequence[TokenizedSet | ExampleStream], tokenizer: Any) -> list[dict[str, Any]]:
    """JSON values of each: source, task, id, numbers of tokens, pieces (`TokenPiece`), and what is left out of them."""
    by_source = [[(part.name, each) for each in _first(part)] for part in sources]
    in_turn = (each for each in chain.from_iterable(zip_longest(*by_source)) if each is not None)
    return [shown_example(name, example, tokenizer) for name, example in islice(in_turn, _NUM_SHOWN)]


def _first(part: TokenizedSet | ExampleStream) -> Sequence[TokenizedExample]:
    return part.first(_NUM_SHOWN) if isinstance(part, ExampleStream) else part.examples[:_NUM_SHOWN]


def shown_example(source: str, example: TokenizedExample, tokenizer: Any) -> dict[str, Any]:
    """An example of `shown_examples`.

    `left_out` tokens are missing behind the piece number `left_out_behind`; 0 if all are there.
    """
    pieces = [asdict(each) for each in token_pieces(tokenizer, example.input_ids.tolist(), example.loss_mask.tolist())]
    half, left_out = _MOST_TOKENS // 2, max(0, len(pieces) - _MOST_TOKENS)
    return {
        "source": source,
        "task": example.task,
        "id": example.id,
        "num_tokens": len(pieces),
        "num_in_loss": sum(each["in_loss"] for each in pieces),
        "pieces": [*pieces[:half], *pieces[half + left_out :]],
        "left_out": left_out,
        "left_out_behind": half,
    }
