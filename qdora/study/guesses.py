"""What models reach that know nothing, to compare scores with: the answers' tokens by their frequency, and uniform."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qdora.data.build_data import run_examples
from qdora.data.example import Example
from qdora.data.tokenize import encode_pairs
from qdora.evaluate.suite import spread
from qdora.files.atomic import atomic_write_json
from qdora.files.json_file import read_json_object
from qdora.model.build_model import find_model
from qdora.model.load import load_config
from qdora.recipe.settings import Recipe

FILE = "guesses.json"
MOST_OF_TASK = 2000
"""Training examples of each task whose answers are counted."""
UNIFORM_SHARE = 0.01
"""Part of the unigram model that is uniform, for tokens that no training answer has."""


def write_guesses(recipe: Recipe, directory: Path) -> None:
    """Write what uniform and unigram models reach to `directory`, nats a token of the evaluated answers.

    A recipe with only chats, or with streams, has no unigram model.

    Args:
        recipe: Of the evaluation of a base.
    """
    source, tokenizer = find_model(recipe, weights=False)
    num_vocabulary = load_config(source).get_text_config().vocab_size
    found = {"uniform": math.log(num_vocabulary)}
    if not any(each.stream for each in recipe.data.mix):
        names = recipe.eval.tasks
        training, asked = (run_examples(recipe, split, names) for split in ("train", "validation"))
        counted = answer_tokens(tokenizer, training, MOST_OF_TASK)
        scored = answer_tokens(tokenizer, asked, recipe.eval.limit)
        if counted and scored:
            found["unigram"] = unigram_nll(counted, scored, num_vocabulary)
    atomic_write_json(directory / FILE, found)


def read_guesses(directory: Path) -> dict[str, float]:
    """What `write_guesses` left in a directory; {} if nothing."""
    return read_json_object(directory / FILE) if (directory / FILE).is_file() else {}


def answer_tokens(tokenizer: Any, examples: Mapping[str, Sequence[Example]], most: int | None) -> list[int]:
    """Tokens of the answers of at most so many examples of each task; chats have none."""
    chosen = [each for found in examples.values() for each in spread(found, most) if not each.messages]
    encoded = encode_pairs(tokenizer, [(each.prompt, each.answer) for each in chosen])
    return [token for ids, start in encoded for token in ids[start:]]


def unigram_nll(counted: Sequence[int], scored: Sequence[int], num_vocabulary: int) -> float:
    """Mean of -ln p over the scored tokens, nats.

    p = (1 - u) count / tokens counted + u / vocabulary,        u = UNIFORM_SHARE
    """
    counts = np.bincount(np.asarray(counted), minlength=num_vocabulary)
    shares = (1 - UNIFORM_SHARE) * counts / len(counted) + UNIFORM_SHARE / num_vocabulary
    return float(-np.log(shares[np.asarray(scored)]).mean())
