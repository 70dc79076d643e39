"""The text on which an export is compared with its run: held-out examples, cut to a number of tokens."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from qdora.data.build_data import run_examples
from qdora.data.example import Example
from qdora.errors import UserError
from qdora.recipe.settings import Recipe

logger = logging.getLogger("qdora")

_NUM_TEXTS = 24
"""About 2,000 tokens: enough for a maximum over positions to be meaningful."""
_FALLBACK = "The quick brown fox jumps over the lazy dog, and then it rests in the shade of an old oak tree."


@dataclass(frozen=True)
class ComparisonText:
    """Token ids to compare logits on, and their texts if they come from a tokenizer."""

    sequences: Sequence[Sequence[int]]
    texts: Sequence[str] = ()
    tokenizer: PreTrainedTokenizerBase | None = None

    def __post_init__(self) -> None:
        if not any(self.sequences):
            raise UserError("There are no tokens to compare the export on.")


def comparison_text(
    tokenizer: PreTrainedTokenizerBase,
    examples: Mapping[str, Sequence[Example]],
    *,
    max_tokens: int = 2048,
    max_length: int = 512,
) -> ComparisonText:
    """The text of 24 examples, at most `max_length` tokens of each and `max_tokens` in total."""
    texts = texts_of(examples)
    sequences: list[list[int]] = []
    left = max_tokens
    for text in texts:
        ids = list(tokenizer(text)["input_ids"])[: min(max_length, left)]
        if ids:
            sequences.append(ids)
            left -= len(ids)
    return ComparisonText(sequences, texts, tokenizer)


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
