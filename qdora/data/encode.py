"""Text -> token ids, without what tokenizers add by themselves at the end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def special_prefix(tokenizer: Any) -> list[int]:
    """The special tokens that a tokenizer puts before every text by default (mostly one beginning-of-sequence token).

    Found by encoding the empty text, since the attributes that should say so (add_bos_token) are missing or wrong in
    many tokenizers. An end-of-sequence token behind the text is not part of it.
    """
    ids = list(tokenizer("", verbose=False)["input_ids"])
    eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
    # OPT begins every text with a token that is its beginning and its end of sequence in one
    if ids and ids[-1] == eos and (len(ids) > 1 or eos != bos):
        ids.pop()
    return ids


def encode_batch(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Ids of each text, no special tokens added (those written out in the text are recognised)."""
    if not texts:
        return []
    # verbose=False: no warning that a text is longer than the model's context, we check lengths ourselves
    encoded = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
    return [list(ids) for ids in encoded["input_ids"]]


def shared_length(first: Sequence[int], second: Sequence[int]) -> int:
    """Number of equal ids at the start of both."""
    limit = min(len(first), len(second))
    if first[:limit] == second[:limit]:
        return limit
    return next(position for position in range(limit) if first[position] != second[position])
