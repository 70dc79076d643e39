"""The held-out examples of a run, on which exports are compared with it."""

from __future__ import annotations

import logging

from qdora.config import Recipe
from qdora.data.example import Example
from qdora.errors import UserError
from qdora.verbs.assemble import run_examples

logger = logging.getLogger("qdora")

_NUM_TEXTS = 24
"""Held-out texts on which the exported model is compared: about 2,000 tokens, enough for a maximum to mean
something."""


def held_out(recipe: Recipe) -> dict[str, list[Example]]:
    """The validation examples of a run by task; empty, with a warning, where its data cannot be read."""
    try:
        return run_examples(recipe, "validation")
    except UserError as error:
        logger.warning("The run's data cannot be read (%s); the check uses a fixed sentence.", error.faults[0])
        return {}


def texts_of(by_task: dict[str, list[Example]]) -> list[str]:
    """Examples with their answers, spread over the tasks; a fixed sentence where there are none."""
    picked = [task[index] for index in range(_NUM_TEXTS) for task in by_task.values() if index < len(task)]
    texts = [text for text in (_text(example) for example in picked[:_NUM_TEXTS]) if text]
    return texts or ["The quick brown fox jumps over the lazy dog, and then it rests in the shade of an old oak tree."]


def _text(example: Example) -> str:
    if example.messages:
        return "\n".join(content for _, content in example.messages)
    return example.prompt + example.answer
