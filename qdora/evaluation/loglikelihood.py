"""Log-likelihoods of choices and answers of examples: text in, nats out."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from qdora.data.chat_template import require_chat_template
from qdora.data.encode_chats import encode_chats
from qdora.data.example import Example
from qdora.data.tokenize import encode_pairs, special_prefix
from qdora.errors import UserError
from qdora.evaluation.forward_path import ForwardPath, choose_path, tell_once
from qdora.evaluation.token_scores import Span, score_groups, score_spans, strided_spans
from qdora.files.console import Progress
from qdora.model.text_config import context_length

_CHECKED_AT_A_TIME = 1024
_SHOWN_FAULTS = 10


@dataclass(frozen=True)
class ChoiceScores:
    """The scores of one multiple-choice example; arrays are (choices,)."""

    task: str
    id: str
    gold: int
    loglikelihoods: NDArray[np.float64]
    """Summed over the tokens of each choice, nats."""
    num_tokens: NDArray[np.int64]
    num_chars: NDArray[np.int64]
    """Characters of each choice without the white space that joins it to the prompt (acc_norm divides by these)."""
    num_truncated: int
    """Tokens cut from the left of the prompt because the example is longer than the model's context."""


@dataclass(frozen=True)
class AnswerScore:
    """The score of the right answer of one example."""

    task: str
    id: str
    loglikelihood: float
    """Summed over the answer's tokens, nats."""
    num_tokens: int
    num_truncated: int


def score_choices(
    model: nn.Module,
    tokenizer: Any,
    examples: Sequence[Example],
    *,
    max_batch_tokens: int = 4096,
    path: ForwardPath | None = None,
    progress: Progress | None = None,
) -> list[ChoiceScores]:
    """Log-likelihood of every choice of every example, the tokens common to its choices run once.

    Token ids are those of training: prompt and choice encoded together, without the end-of-sequence token. An example
    longer than the model's context loses tokens at the left of its prompt, the same number for all its choices, as in
    lm-evaluation-harness (but it keeps a beginning-of-sequence token, as in training). The result counts them.

    Returns: In the order of `examples`.
    Raises: UserError if an example has no choices or no gold, a choice has no token to score, or one with its border
        alone exceeds the context; all faults at once.
    """
    path = path or choose_path(model)
    groups, truncated = _choice_groups(tokenizer, examples, context_length(model))
    _log_truncation(model, examples, truncated)
    scores = score_groups(model, groups, max_batch_tokens=max_batch_tokens, path=path, progress=progress)
    return [
        ChoiceScores(
            task=example.task,
            id=example.id,
            gold=-1 if example.gold is None else example.gold,  # None was refused above
            loglikelihoods=group_scores,
            num_tokens=np.array([span.num_scored for span in group], dtype=np.int64),
            num_chars=np.array([len(choice.lstrip()) for choice in example.choices], dtype=np.int64),
            num_truncated=cut,
        )
        for example, group, group_scores, cut in zip(examples, groups, scores, truncated, strict=True)
    ]


def score_answers(
    model: nn.Module,
    tokenizer: Any,
    examples: Sequence[Example],
    *,
    max_batch_tokens: int = 4096,
    path: ForwardPath | None = None,
    progress: Progress | None = None,
) -> list[AnswerScore]:
    """Log-likelihood of the answer of every example, with choices or without.

    In a chat the tokens that training learns are scored: the assistant's turns with their end marks. An example longer
    than the model's context is cut at the left of its prompt as in `score_choices`. An answer that is too long by
    itself (plain text is all answer) is scored in windows that overlap by half, each token once.

    Returns: In the order of `examples`.
    Raises: UserError if an example has no token to score or does not fit the chat template; all faults at once.
    """
    path = path or choose_path(model)
    spans, truncated = _answer_spans(tokenizer, examples, context_length(model))
    _log_truncation(model, examples, truncated)
    flat = [span for found in spans for span in found]
    flat_scores = score_spans(model, flat, max_batch_tokens=max_batch_tokens, path=path, progress=progress)
    ends = np.cumsum([len(found) for found in spans])
    return [
        AnswerScore(
            task=example.task,
            id=example.id,
            loglikelihood=float(flat_scores[end - len(found) : end].sum()),
            num_tokens=sum(span.num_scored for span in found),
            num_truncated=cut,
        )
        for example, found, end, cut in zip(examples, spans, ends, truncated, strict=True)
    ]


def scoring_faults(tokenizer: Any, examples: Sequence[Example], context: int | None) -> list[str]:
    """What `score_choices` and `score_answers` would refuse, without a model: the first faults, or [].

    Args:
        context: The `context_length` of the model.
    """
    for start in range(0, len(examples), _CHECKED_AT_A_TIME):
        some, faults = examples[start : start + _CHECKED_AT_A_TIME], list[str]()
        for spans_of, part in (
            (_choice_groups, [example for example in some if example.choices]),
            (_answer_spans, [example for example in some if not example.choices]),
        ):
            try:
                spans_of(tokenizer, part, context)
            except UserError as error:
                faults += error.faults
        if faults:
            return faults
    return []


def _choice_groups(
    tokenizer: Any, examples: Sequence[Example], context: int | None
) -> tuple[list[list[Span]], list[int]]:
    """Per example the spans of its choices, and the tokens cut from its prompt."""
    faults = [
        f"{example.task}: example {example.id}: accuracy needs choices and the index of the right one, got "
        f"{len(example.choices)} choices and gold {example.gold}"
        for example in examples
        if example.gold is None or not 0 <= example.gold < len(example.choices)
    ]
    _raise_faults(faults)
    prefix = len(special_prefix(tokenizer))
    pairs = encode_pairs(tokenizer, [(example.prompt, choice) for example in examples for choice in example.choices])
    groups, truncated = [], []
    position = 0
    for example in examples:
        encoded = [(ids, max(start, 1)) for ids, start in pairs[position : position + len(example.choices)]]
        position += len(example.choices)
        spans, cut, fault = _fitted_choices(encoded, prefix, context)
        groups.append(spans)
        truncated.append(cut)
        if fault:
            faults.append(f"{example.task}: example {example.id}: {fault}")
    _raise_faults(faults)
    return groups, truncated


def _answer_spans(
    tokenizer: Any, examples: Sequence[Example], context: int | None
) -> tuple[list[list[Span]], list[int]]:
    """Per example the spans of its answer (several for a chat or a long text), and the tokens cut from its prompt."""
    texts = [example for example in examples if not example.messages]
    chats = [example for example in examples if example.messages]
    if chats:
        require_chat_template(tokenizer, chats[0].task)
    chat_iterator = iter(encode_chats(tokenizer, chats))
    text_iterator = iter(encode_pairs(tokenizer, [(text.prompt, text.answer) for text in texts]))
    text_prefix = len(special_prefix(tokenizer))
    spans: list[list[Span]] = []
    truncated: list[int] = []
    faults: list[str] = []
    for example in examples:
        chat = next(chat_iterator) if example.messages else None
        if isinstance(chat, str):
            faults.append(f"{example.task}: example {example.id}: {chat}")
            continue
        if chat is not None:
            runs = [run for part in chat for run in _runs(part.ids, part.mask)]
            prefix = 0  # the template writes what the tokenizer would have put in front
        else:
            ids, start = next(text_iterator)
            runs, prefix = [(ids, max(start, 1))], text_prefix
        runs = [(ids, start) for ids, start in runs if start < len(ids)]
        if not runs:
            faults.append(f"{example.task}: example {example.id}: the answer has no token to score")
            continue
        fitted = [_fitted_answer(ids, start, prefix, context) for ids, start in runs]
        spans.append([span for found, _ in fitted for span in found])
        truncated.append(max(cut for _, cut in fitted))
    _raise_faults(faults)
    return spans, truncated


def _runs(ids: Sequence[int], mask: Sequence[bool]) -> list[tuple[list[int], int]]:
    """(ids up to its end, its start) of every run of True in the mask, token 0 left out: nothing predicts it."""
    starts = [t for t in range(1, len(ids)) if mask[t] and (t == 1 or not mask[t - 1])]
    ends = [t + 1 for t in range(1, len(ids)) if mask[t] and (t + 1 == len(ids) or not mask[t + 1])]
    return [(list(ids[:end]), start) for start, end in zip(starts, ends, strict=True)]


def _fitted_answer(ids: Sequence[int], start: int, prefix: int, context: int | None) -> tuple[list[Span], int]:
    """Spans that score ids[start:] once, each fed at most `context` tokens, and the prompt tokens that they lack."""
    cut = 0 if context is None else max(len(ids) - 1 - context, 0)
    if context is not None and cut > start - max(prefix, 1):
        spans = strided_spans(ids, context, max(context // 2, 1), first=start)
        return spans, start - spans[0].start
    return [Span((*ids[:prefix], *ids[prefix + cut :]), start - cut)], cut


def _fitted_choices(
    encoded: Sequence[tuple[Sequence[int], int]], prefix: int, context: int | None
) -> tuple[list[Span], int, str]:
    """(a span per choice, tokens cut from the prompt behind its `prefix` special ones, what is wrong or "")."""
    empty = [index for index, (ids, start) in enumerate(encoded) if start >= len(ids)]
    if empty:
        what = f"choices[{empty[0]}] has no token to score: it is empty, or a single token with no prompt before it"
        return [], 0, what
    cut = 0 if context is None else max(max(len(ids) for ids, _ in encoded) - 1 - context, 0)
    if cut > min(start for _, start in encoded) - max(prefix, 1):
        return [], 0, f"a choice does not fit the model's context of {context} tokens, even without its prompt"
    return [Span((*ids[:prefix], *ids[prefix + cut :]), start - cut) for ids, start in encoded], cut, ""


def _raise_faults(faults: Sequence[str]) -> None:
    """All faults at once; the first few in full, the others counted."""
    rest = len(faults) - _SHOWN_FAULTS
    if faults:
        raise UserError(*faults[:_SHOWN_FAULTS], *([f"{rest} more examples that cannot be scored"] if rest > 0 else []))


def _log_truncation(model: nn.Module, examples: Sequence[Example], truncated: Sequence[int]) -> None:
    """One line where prompts were cut, once for a model and these examples."""
    num_cut = sum(cut > 0 for cut in truncated)
    if num_cut:
        names = ", ".join(sorted({example.task for example in examples}))
        what = f"{num_cut} of {len(truncated)} examples exceed the model's context; up to {max(truncated)} tokens were"
        tell_once(model, logging.WARNING, f"{names}: {what} cut from the left of the prompt")
