"""Calibration text for pruning: pieces of the training mix, or of a text file."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from qdora.data.mix import Mix
from qdora.data.tokenize import TokenizedSet, encode_batch, special_prefix
from qdora.errors import UserError
from qdora.evaluate.perplexity import read_texts
from qdora.model.attention import positions_of
from qdora.recipe.settings import CalibrationConfig, Recipe


def calibration_tokens(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, mix: Mix, config: PreTrainedConfig
) -> Tensor | None:
    """Pieces of the calibration text, (sequences, length) int64; None if the pruning method needs none.

    Raises:
        UserError: Text that is shorter than a piece, or pieces longer than the model's context.
    """
    prune = recipe.base.prune
    assert prune is not None
    if prune.method == "magnitude":
        return None
    settings = prune.calibration
    context = positions_of(config)
    if context is not None and settings.length > context:
        raise UserError(
            f"base.prune.calibration.length: got {settings.length}, must be at most {context}, the model's context."
        )
    prefix = special_prefix(tokenizer)
    if settings.text == "mix":
        return pieces(_mix_tokens(mix, settings.seed), prefix, settings)
    (ids,) = encode_batch(tokenizer, read_texts([settings.text]))
    return pieces(ids, prefix, settings)


def _mix_tokens(mix: Mix, seed: int) -> NDArray[np.int32]:
    """The training examples of all sources but streams, in a random order so that a piece spans several of them."""
    examples = [example for part in mix.sets if isinstance(part, TokenizedSet) for example in part.examples]
    order = np.random.default_rng(seed).permutation(len(examples))
    return np.concatenate([np.empty(0, dtype=np.int32), *(examples[index].input_ids for index in order)])


def pieces(ids: ArrayLike, prefix: Sequence[int], settings: CalibrationConfig) -> Tensor:
    """Runs of tokens from random places of a text, each after the prefix with which the model's texts begin.

    Raises:
        UserError: The text is shorter than a piece.
    """
    ids = np.asarray(ids)
    length = settings.length - len(prefix)
    if length < 1 or len(ids) < length:
        raise UserError(
            f"base.prune.calibration.length: got {settings.length}, but the text has only {len(ids)} tokens. "
            "Fix: lower it, or give more text."
        )
    starts = np.random.default_rng(settings.seed).integers(0, len(ids) - length + 1, settings.sequences)
    return torch.tensor([[*prefix, *ids[start : start + length].tolist()] for start in starts], dtype=torch.int64)
