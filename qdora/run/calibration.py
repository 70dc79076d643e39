"""The text on which pruning measures a base: pieces of the training mix, or of a text file."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from qdora.data.mix import Mix
from qdora.data.tokenize import TokenizedSet, encode_batch, special_prefix
from qdora.errors import UserError
from qdora.evaluation.perplexity import read_texts
from qdora.recipe.settings import CalibrationConfig, Recipe


def calibration_tokens(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, mix: Mix, config: PreTrainedConfig
) -> Tensor | None:
    """Pieces of the calibration text, (sequences, length) int64; None where nothing is measured.

    Args:
        recipe: With base.prune.
        tokenizer: Of the model.
        mix: The tokenised training data.
        config: Of the model.
    Raises:
        UserError: Text that is shorter than a piece, or pieces longer than the context.
    """
    prune = recipe.base.prune
    assert prune is not None
    if prune.method == "magnitude":
        return None
    settings = prune.calibration
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    if context is not None and settings.length > context:
        raise UserError(
            f"base.prune.calibration.length: {settings.length} tokens, allowed: at most {context}, the model's context."
        )
    if settings.text == "mix":
        ids = _mix_tokens([part for part in mix.sets if isinstance(part, TokenizedSet)], settings.seed)
    else:
        (ids,) = encode_batch(tokenizer, read_texts([settings.text]))
    return pieces(ids, special_prefix(tokenizer), settings)


def _mix_tokens(sets: Sequence[TokenizedSet], seed: int) -> list[int]:
    """The training examples of all sources in a random order, so that a piece spans several of them."""
    examples = [example for part in sets for example in part.examples]
    order = np.random.default_rng(seed).permutation(len(examples))
    return [int(token) for index in order for token in examples[index].input_ids]


def pieces(ids: Sequence[int], prefix: Sequence[int], settings: CalibrationConfig) -> Tensor:
    """Runs of a text from random places, each behind the tokens with which the model's texts begin.

    Raises:
        UserError: The text is shorter than a piece.
    """
    length = settings.length - len(prefix)
    if length < 1 or len(ids) < length:
        raise UserError(
            f"base.prune.calibration.length: {settings.length} tokens, but the text has {len(ids)}; "
            "allowed: shorter pieces, or more text."
        )
    starts = np.random.default_rng(settings.seed).integers(0, len(ids) - length + 1, settings.sequences)
    return torch.tensor([[*prefix, *ids[start : start + length]] for start in starts], dtype=torch.int64)
