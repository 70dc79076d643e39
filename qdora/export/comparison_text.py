"""The text on which an export is compared with its run: held-out examples, cut to a number of tokens."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from transformers import PreTrainedTokenizerBase

from qdora.data.build_data import run_examples
from qdora.data.example import Example
from qdora.errors import UserError
from qdora.recipe.settings import Recipe

logger = logging.getLogger("qdora")

_NUM_TEXTS = 24
"""About 2,000 tokens: enough for a maximum over positions to be meaningful."""
_FALLBACK = "The quick brown fox jumps over the lazy dog, and then it rests in the shade of an old oak tree."


def validation_examples(recipe: Recipe) -> dict[str, list[Example]]:
    """The validation examples of a run by task; empty, with a warning, if its data cannot be read."""
    try:
        return run_examples(recipe, "validation")
    except UserError as error:
        logger.warning("The run's data cannot be read (%s); the check uses a fixed sentence.", error.faults[0])
        return {}


def texts_of(by_task: Mapping[str, Sequence[Example]]) -> list[str]:
    """The texts of 24 examples with their answers, spread over the tasks; a fixed sentence if there are none."""
    picked = [task[index] for index in range(_NUM_TEXTS) for task in by_task.values() if index < len(task)]
    texts = [text for text in (_text(example) for example in picked[:_NUM_TEXTS]) if text]
    return texts or [_FALLBACK]


def _text(example: Example) -> str:
    if example.messages:
        return "\n".join(content for _, content in example.messages)
    return example.prompt + example.answer


def token_sequences(
    tokenizer: PreTrainedTokenizerBase | None,
    texts: Sequence[str] | None,
    input_ids: Sequence[Sequence[int]] | None = None,
    *,
    max_tokens: int = 2048,
    max_length: int = 512,
) -> list[list[int]]:
    """The tokens to compare on: at most `max_length` of each text and `max_tokens` in total.

    Raises:
        UserError: Neither or both of texts and input_ids, texts without a tokenizer, or no tokens.
    """
    if (texts is None) == (input_ids is None):
        raise UserError("verify: give exactly one of texts and input_ids.")
    if texts is not None:
        if tokenizer is None:
            raise UserError("verify: texts need a tokenizer; give one, or give input_ids.")
        input_ids = [tokenizer(text)["input_ids"] for text in texts]
    sequences: list[list[int]] = []
    left = max_tokens
    for ids in input_ids or ():
        taken = list(ids)[: min(max_length, left)]
        if taken:
            sequences.append(taken)
            left -= len(taken)
    if not sequences:
        raise UserError("verify: there is no token to compare on.")
    return sequences
