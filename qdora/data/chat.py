"""Chats -> token ids through the tokenizer's chat template, with a mask of what the assistant says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jinja2

from qdora.data.encode import encode_batch, shared_length
from qdora.data.example import Messages
from qdora.errors import UserError


def require_chat_template(tokenizer: Any, name: str) -> None:
    """Raises:
    UserError: If the tokenizer cannot render the chats of source `name`.
    """
    if not getattr(tokenizer, "chat_template", None):
        tokenizer_name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        raise UserError(
            f"{name}: holds chats, but the tokenizer ({tokenizer_name}) has no chat template. Set model.tokenizer to "
            "one that has it (the instruct version of the model), or give the data as prompt and completion."
        )


def encode_chats(
    tokenizer: Any, chats: Sequence[Messages], *, masked: bool = True
) -> list[tuple[list[int], list[bool]] | str]:
    """Render and encode each chat; (ids, mask), or what is wrong with it.

    The mask is True on each assistant turn: what the template adds from the end of the generation prompt before the
    turn to the end of the turn, its end mark included. A template qualifies if the text up to any turn begins the text
    of the whole chat; one that rewrites earlier turns (some strip their reasoning) does not, and is refused rather than
    masked by guess.

    Args:
        tokenizer: With a chat template; beginning and end marks come from the template alone.
        chats: (role, content) of each turn.
        masked: False takes any template and makes a mask that is True throughout.
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
            start, end = shared_length(ids, before), shared_length(ids, after)
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
                    "what the assistant says cannot be told apart; end each chat at the turn that shall be learnt, or "
                    "use data.loss_on: all."
                )
            parts += [before, after]
    except jinja2.TemplateError as error:
        return f"the chat template refuses it: {error}"
    return parts
