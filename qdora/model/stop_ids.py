"""The tokens at which a model ends an answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from qdora.model.load import load_config, published_generation
from qdora.model.source import ModelSource


def stop_ids(source: ModelSource, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Tokens at which the model ends an answer: those of its generation config, else of its config, and the
    tokenizer's end of sequence."""
    config = load_config(source)
    named: Any = getattr(config, "eos_token_id", None)
    if named is None:  # multimodal models keep it with their text model
        named = getattr(config.get_text_config(), "eos_token_id", None)
    if (generation := published_generation(source)) is not None:
        named = generation.eos_token_id
    return _stops(named, tokenizer)


def stop_ids_of_model(model: Any, tokenizer: Any) -> frozenset[int]:
    """`stop_ids` of a loaded model: those of its generation config and of the tokenizer."""
    return _stops(getattr(getattr(model, "generation_config", None), "eos_token_id", None), tokenizer)


def _stops(named: int | Sequence[int] | None, tokenizer: Any) -> frozenset[int]:
    listed = named if isinstance(named, list | tuple) else [named]
    return frozenset(int(id) for id in (*listed, tokenizer.eos_token_id) if id is not None)
