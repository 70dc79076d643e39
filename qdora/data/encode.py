"""Prompts, answers and chats -> token ids, and where the answers are in them; for training and evaluation alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jinja2

from qdora.data.example import Messages
from qdora.errors import UserError


def encode_pairs(tokenizer: Any, pairs: Sequence[tuple[str, str]]) -> list[tuple[list[int], int]]:
    """Token ids of each prompt + answer, encoded as one text, and where the answer starts in them.

    As in lm-evaluation-harness, spaces at the end of the prompt go to the answer first, because tokenizers join a space
    to the word behind it. The answer starts at the first token that differs from those of the prompt alone, so it has
    every character of the answer even where a token spans the border. The ids begin with the tokenizer's
    beginning-of-sequence token if it adds one by default; they have no end-of-sequence token.

    Args:
        pairs: (prompt, answer); the prompt may be empty, the answer starts with its own space.
    Returns: (ids, start) of each: ids[start:] belongs to the answer. start is 0 for an empty prompt without
        beginning-of-sequence token: nothing predicts the first token then.
    """
    prompts = [prompt.rstrip(" ") for prompt, _ in pairs]
    prefix = special_prefix(tokenizer)
    whole = encode_batch(tokenizer, [prompt + answer for prompt, answer in pairs])
    alone = encode_batch(tokenizer, prompts)
    return [
        (prefix + ids, len(prefix) + _shared_length(ids, prompt_ids))
        for ids, prompt_ids in zip(whole, alone, strict=True)
    ]


def require_chat_template(tokenizer: Any, name: str) -> None:
    """Raise a UserError if the tokenizer cannot render the chats of source `name`."""
    if not getattr(tokenizer, "chat_template", None):
        tokenizer_name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        raise UserError(
            f"{name}: holds chats, but the tokenizer ({tokenizer_name}) has no chat template. Fix: set model.tokenizer "
            "to one that has it (the instruct version of the model), or give the data as prompt and completion."
        )


def encode_chats(
    tokenizer: Any, chats: Sequence[Messages], *, masked: bool = True
) -> list[tuple[list[int], list[bool]] | str]:
    """Render and encode each chat; (ids, mask), or what is wrong with it.

    The mask is True on each assistant turn: what the template adds from the end of the generation prompt before the
    turn to the end of the turn, its end mark included. The text up to any turn must begin the text of the whole chat. A
    template that rewrites earlier turns (some strip their reasoning) is refused, not masked by a guess.

    Args:
        tokenizer: With a chat template; beginning and end marks come from the template alone.
        masked: False takes any template; the mask is then True everywhere.
    """
    rendered = [_render(tokenizer, chat, masked) for chat in chats]
    texts = [text for parts in rendered if not isinstance(parts, str) for text in parts]
    encoded = iter(encode_batch(tokenizer, texts))
    results: list[tuple[list[int], list[bool]] | str] = []
    for parts in rendered:
        if isinstance(parts, str):
            results.append(parts)
            continue
        ids, *borders = [next(encoded) for _ in parts]
        mask = [not masked] * len(ids)
        for before, after in zip(borders[::2], borders[1::2], strict=True):
            start, end = _shared_length(ids, before), _shared_length(ids, after)
            mask[start:end] = [True] * (end - start)
        results.append((ids, mask))
    return results


def _render(tokenizer: Any, chat: Messages, masked: bool) -> list[str] | str:
    """[whole text, text before the first assistant turn, text after it, before the second, ...], or a fault."""
    turns = [{"role": role, "content": content} for role, content in chat]
    try:
        whole = tokenizer.apply_chat_template(turns, tokenize=False)
        parts = [whole]
        for index, turn in enumerate(turns):
            if turn["role"] != "assistant" or not masked:
                continue
            before = tokenizer.apply_chat_template(turns[:index], tokenize=False, add_generation_prompt=True)
            after = tokenizer.apply_chat_template(turns[: index + 1], tokenize=False)
            if not (after.startswith(before) and whole.startswith(after)):
                return (
                    f"messages[{index}]: the chat template renders this turn differently inside the whole chat, so "
                    "the assistant's tokens cannot be found. Fix: end each chat at the turn to learn, or set "
                    "data.loss_on: all."
                )
            parts += [before, after]
    except jinja2.TemplateError as error:
        return f"the chat template refuses it: {error}"
    return parts


def special_prefix(tokenizer: Any) -> list[int]:
    """The special tokens that a tokenizer puts before every text by default, mostly one beginning-of-sequence token.

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


def _shared_length(first: Sequence[int], second: Sequence[int]) -> int:
    """Number of equal ids at the start of both."""
    limit = min(len(first), len(second))
    if first[:limit] == second[:limit]:
        return limit
    return next(position for position in range(limit) if first[position] != second[position])
