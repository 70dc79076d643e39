"""Log-likelihoods of choices and answers of examples: text in, nats out."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from qdora.data.chats import encode_chats, require_chat_template
from qdora.data.example import Example
from qdora.data.tokenize import encode_pairs, special_prefix
from qdora.errors import UserError
from qdora.evaluate.spans import Span, score_groups, strided_spans
from qdora.files.console import Progress
from qdora.model.attention import context_length

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExampleScore:
    """The scores of one example, (choices,), or (1,) without choices."""

    id: str
    gold: int | None  # None without choices
    loglikelihoods: NDArray[np.float64]  # summed over the tokens of each choice, nats
    num_tokens: NDArray[np.int64]
    num_chars: NDArray[np.int64]  # of each choice without the space that joins it to the prompt, for acc_norm
    num_truncated: int  # tokens cut from the left of the prompt to fit the model's context

    @property
    def nll(self) -> float:
        return -float(self.loglikelihoods[self.gold or 0])

    @property
    def num_answer_tokens(self) -> int:
        return int(self.num_tokens[self.gold or 0])


def score_examples(
    model: nn.Module, tokenizer: Any, examples: Sequence[Example], progress: Progress | None = None
) -> list[ExampleScore]:
    """Log-likelihood of every choice of every example, or of its answer where it has no choices.

    Token ids are those of training, without the end-of-sequence token. An example longer than the model's context loses
    tokens at the left of its prompt, the same number for all its choices, but for a beginning-of-sequence token. An
    answer that is too long by itself is scored in windows that overlap by half, each token once.
    """
    spans, truncated = _spans(tokenizer, examples, context_length(model))
    if any(truncated):
        _warn_of_truncation(", ".join(sorted({example.task for example in examples})))
    groups = [  # only choices share a prefix
        group
        for example, own in zip(examples, spans, strict=True)
        for group in ([own] if example.choices else [[span] for span in own])
    ]
    report = (
        None if progress is None else lambda done, total: progress(len(examples) * done // total, len(examples))
    )
    found = iter(score_groups(model, groups, report))
    scores = []
    for example, own, cut in zip(examples, spans, truncated, strict=True):
        loglikelihoods, num_tokens = next(found), np.array([span.num_scored for span in own])
        if not example.choices:
            rest = [next(found) for _ in own[1:]]
            loglikelihoods, num_tokens = sum(rest, loglikelihoods), num_tokens.sum(keepdims=True)
        num_chars = np.array([len(choice.lstrip()) for choice in example.choices])
        scores.append(ExampleScore(example.id, example.gold, loglikelihoods, num_tokens, num_chars, cut))
    return scores


def scoring_faults(tokenizer: Any, examples: Sequence[Example], context: int | None) -> list[str]:
    """What `score_examples` refuses first with a model of this `context_length`."""
    try:
        _spans(tokenizer, examples, context)
    except UserError as error:
        return list(error.faults)
    return []


def _spans(
    tokenizer: Any, examples: Sequence[Example], context: int | None
) -> tuple[list[list[Span]], list[int]]:
    """Per example a span for each choice, or those of its answer, and the tokens cut from its prompt."""
    chats = [example for example in examples if example.messages]
    if chats:
        require_chat_template(tokenizer, chats[0].task)
    pairs = [
        (each.prompt, text) for each in examples if not each.messages for text in each.choices or (each.answer,)
    ]
    encoded_chats, encoded = iter(encode_chats(tokenizer, chats)), iter(encode_pairs(tokenizer, pairs))
    prefix = len(special_prefix(tokenizer))
    spans: list[list[Span]] = []
    truncated: list[int] = []
    for example in examples:
        try:
            if example.choices:
                own, cut = _choice_spans([next(encoded) for _ in example.choices], prefix, context)
            elif example.messages:
                chat = next(encoded_chats)
                if isinstance(chat, str):
                    raise ValueError(chat)
                # the template writes what the tokenizer would have put in front
                fitted = [
                    _answer_spans(*run, 0, context) for part in chat for run in _runs(part.ids, part.mask)
                ]
                own, cut = (
                    [span for some, _ in fitted for span in some],
                    max((cut for _, cut in fitted), default=0),
                )
            else:
                own, cut = _answer_spans(*next(encoded), prefix, context)
            if not own:
                raise ValueError("the answer has no token to score")
            spans.append(own)
            truncated.append(cut)
        except ValueError as error:
            raise UserError(f"{example.task}: example {example.id}: {error}") from None
    return spans, truncated


def _runs(ids: Sequence[int], mask: Sequence[bool]) -> list[tuple[list[int], int]]:
    """(ids up to its end, its start) of every run of True in the mask; nothing predicts token 0."""
    closed = [False, *mask[1:], False]
    edges = [t for t in range(1, len(closed)) if closed[t] != closed[t - 1]]
    return [(list(ids[:end]), start) for start, end in zip(edges[::2], edges[1::2], strict=True)]


def _answer_spans(ids: Sequence[int], start: int, prefix: int, context: int | None) -> tuple[list[Span], int]:
    """Spans that score ids[start:] once, and the prompt tokens that they lack; the first `prefix` ids are kept."""
    start = max(start, 1)
    if start >= len(ids):
        return [], 0
    cut = 0 if context is None else max(len(ids) - 1 - context, 0)
    if context is not None and cut > start - max(prefix, 1):
        spans = strided_spans(ids, context, max(context // 2, 1), first=start)
        return spans, start - spans[0].start
    return [Span((*ids[:prefix], *ids[prefix + cut :]), start - cut)], cut


def _choice_spans(
    encoded: Sequence[tuple[Sequence[int], int]], prefix: int, context: int | None
) -> tuple[list[Span], int]:
    """A span for each choice, and the prompt tokens that they lack."""
    encoded = [(ids, max(start, 1)) for ids, start in encoded]
    if empty := [index for index, (ids, start) in enumerate(encoded) if start >= len(ids)]:
        raise ValueError(f"choices[{empty[0]}] has no token to score")
    cut = 0 if context is None else max(max(len(ids) for ids, _ in encoded) - 1 - context, 0)
    if cut > min(start for _, start in encoded) - max(prefix, 1):
        raise ValueError(
            f"a choice does not fit the model's context of {context} tokens, even without its prompt"
        )
    return [Span((*ids[:prefix], *ids[prefix + cut :]), start - cut) for ids, start in encoded], cut


@cache  # each evaluation of a run cuts the same prompts
def _warn_of_truncation(tasks: str) -> None:
    logger.warning("%s: examples exceed the model's context; the left of their prompts is cut.", tasks)
