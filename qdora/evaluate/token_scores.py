"""Log-likelihoods of token spans: the forward passes under every score, perplexity included.

A span is a token sequence of which the tail is scored. Spans that belong together (the choices of one question) share a
prefix. Where the model's cache allows it, the prefix runs once and its cache is copied to every choice, so that only
the choices' own tokens follow.

This file knows token ids and a model, nothing of text or tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from qdora.adapter.rows import ids_on_host
from qdora.data.chats import shared_length
from qdora.evaluate.batches import length_batches, results_of
from qdora.evaluate.forward_path import cache_keyword, head_input, scoring, shares_prefix
from qdora.files.console import Progress
from qdora.model.attention import known_masks, vocabulary_size

# One forward pass never makes more logits than this (256 MiB in bf16), whatever the vocabulary: of 2,730 tokens of a
# 49k vocabulary, 524 of a 256k one. Only a long span of a model without a shared prefix makes more.
_MAX_LOGITS = 2**27
# Copies of the prefix cache, one per choice, that live at the same time: 1,600 tokens of a 70B model (grouped keys).
_MAX_CACHE_BYTES = 2**29
# Logits turned to float32 at a time. On a CPU 4 MiB, which stay in its cache: three times as fast as 100 MiB.
_SOFTMAX_LOGITS = 2**25
_CPU_SOFTMAX_LOGITS = 2**20


@dataclass(frozen=True)
class Span:
    """`ids[start:]` is scored given `ids[:start]`; 1 <= start < len(ids)."""

    ids: tuple[int, ...]
    start: int

    def __post_init__(self) -> None:
        assert 1 <= self.start < len(self.ids), (self.start, len(self.ids))

    @property
    def num_scored(self) -> int:
        """Tokens that are scored."""
        return len(self.ids) - self.start

    @property
    def num_fed(self) -> int:
        """Tokens that are fed; the last one is only predicted."""
        return len(self.ids) - 1


def strided_spans(ids: Sequence[int], window: int, stride: int, first: int = 1) -> list[Span]:
    """Windows over one text such that tokens first .. len-1 are scored exactly once.

    The first window scores all that it can; every later one moves on by `stride` tokens and scores only the new ones.
    Every scored token has at least window - stride + 1 tokens of context, or all there are.

    Args:
        window: Most tokens that are fed at once (the token predicted last is not fed).
        stride: 1 <= stride <= window. stride == window gives windows that do not overlap.
        first: The first token to score; nothing predicts token 0.
    Returns: Spans in text order; none if `first` lies behind the text.
    """
    if not 1 <= stride <= window:
        raise ValueError(f"stride {stride} must lie between 1 and the window, {window}")
    assert first >= 1, first
    spans: list[Span] = []
    scored = first  # tokens before this one are scored, or only context
    while scored < len(ids):
        if spans:
            end = min(len(ids), scored + stride)
            begin = max(0, end - 1 - window)
        else:
            begin = max(0, scored - 1 - (window - stride))
            end = min(len(ids), begin + 1 + window)
        spans.append(Span(tuple(ids[begin:end]), scored - begin))
        scored = end
    return spans


def score_spans(model: nn.Module, spans: Sequence[Span], *, max_batch_tokens: int = 4096) -> NDArray[np.float64]:
    """Summed log-likelihood of every span's scored tokens, (spans,) float64, nats; each span runs whole."""
    found = score_groups(model, [[span] for span in spans], max_batch_tokens=max_batch_tokens)
    return np.array([float(score) for (score,) in found])


def score_groups(
    model: nn.Module,
    groups: Sequence[Sequence[Span]],
    *,
    max_batch_tokens: int = 4096,
    progress: Progress | None = None,
) -> list[NDArray[np.float64]]:
    """Summed log-likelihood of every span of every group; the tokens that a group's spans share run once.

    Args:
        groups: The spans of a question's choices; spans of a group may have different lengths and starts.
        max_batch_tokens: Most tokens of one forward pass, padding included, unless one row is longer.
        progress: Called with what is done and all there is, groups with a prefix and single spans counted alike.
    Returns: Per group (spans,) float64, nats, in the order given.
    """
    units: list[tuple[Sequence[Span], int]] = []  # spans that run together, and the length of their prefix
    can_share = shares_prefix(model)
    for group in groups:
        prefix = _shared_prefix(group) if can_share and len(group) > 1 else 0
        units += [(group, prefix)] if prefix else [([span], 0) for span in group]
    max_logits = max(_MAX_LOGITS // vocabulary_size(model), 1)

    def width(index: int) -> int:
        (span, *_), prefix = units[index]
        return prefix or span.num_fed

    def fits(batch: list[int]) -> bool:
        first, last = units[batch[0]][1], units[batch[-1]][1]
        num_scored = sum(units[index][0][0].num_scored for index in batch)
        is_small = len(batch) * width(batch[0]) <= max_batch_tokens and (first > 0 or num_scored <= max_logits)
        return is_small and (first > 0) == (last > 0)

    def compute(batch: list[int]) -> list[list[float]]:
        some = [units[index] for index in batch]
        if some[0][1]:
            return _score_shared(model, some, max_batch_tokens, max_logits)
        spans = [span for (span,), _ in some]
        num_fed = [span.num_fed for span in spans]
        if can_share and spans[0].num_scored > max_logits:  # a batch of its own: in pieces, each behind those before it
            cache, scores = DynamicCache(), np.zeros(1)
            for begin in range(0, num_fed[0], max_logits):
                past, end = torch.ones(1, begin, dtype=torch.long), min(begin + max_logits, num_fed[0])
                scores += _scores(model, spans, [begin], [end], cache=cache, past=past)
        else:
            scores = _scores(model, spans, [0] * len(spans), num_fed)
        return [[float(score)] for score in scores]

    order = sorted(range(len(units)), key=lambda index: (units[index][1] == 0, -width(index), index))
    with scoring(model):
        found = results_of(model, list(length_batches(order, width, fits)), compute, progress)
    flat = np.array([score for index in range(len(units)) for score in found[index]])
    return np.split(flat, np.cumsum([len(group) for group in groups]))[:-1]


def padded(rows: Sequence[Sequence[int]], *, left: bool = False) -> tuple[Tensor, Tensor]:
    """The rows as one tensor with zeros behind (left: before) the shorter ones, and a mask that is 1 on the rows' own;
    (rows, longest) int64 both."""
    own, side = [torch.tensor(row, dtype=torch.long) for row in rows], "left" if left else "right"
    ids = pad_sequence(own, batch_first=True, padding_side=side)
    return ids, pad_sequence([torch.ones_like(row) for row in own], batch_first=True, padding_side=side)


def _score_shared(
    model: nn.Module, units: list[tuple[Sequence[Span], int]], max_batch_tokens: int, max_logits: int
) -> list[list[float]]:
    """One batch of groups: all prefixes in one pass, then the rest of every span behind a copy of its prefix's cache.

    The prefixes are padded on the left, so that the mask has no hole before a continuation: 0..0 1..1 | 1..1 0..0.
    """
    spans = [span for group, _ in units for span in group]
    rows = torch.tensor([row for row, (group, _) in enumerate(units) for _ in group])
    ends = [prefix for group, prefix in units for _ in group]
    cache, past = DynamicCache(), padded([[1] * prefix for _, prefix in units], left=True)[1]
    none = torch.empty(len(units), 0, dtype=torch.long)
    scores = _scores(model, spans, [0] * len(spans), ends, rows=rows.tolist(), cache=cache, past=none)
    bytes_per_token = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) // past.numel()
    max_cached = _MAX_CACHE_BYTES // bytes_per_token

    def width(index: int) -> int:
        return spans[index].num_fed - ends[index]

    def fits(batch: list[int]) -> bool:
        widest = width(batch[0])
        is_small = len(batch) * widest <= min(max_batch_tokens, max_logits)
        return is_small and len(batch) * (past.shape[1] + widest) <= max_cached

    longer = sorted(
        (index for index in range(len(spans)) if width(index) > 0), key=lambda index: (-width(index), index)
    )
    for batch in length_batches(longer, width, fits):
        own, begins, chosen = [spans[index] for index in batch], [ends[index] for index in batch], rows[batch]
        copied = DynamicCache([(layer.keys[chosen], layer.values[chosen]) for layer in cache.layers])
        num_fed = [span.num_fed for span in own]
        scores[batch] += _scores(model, own, begins, num_fed, cache=copied, past=past[chosen])
    return [part.tolist() for part in np.split(scores, np.cumsum([len(group) for group, _ in units]))[:-1]]


def _scores(
    model: nn.Module,
    spans: Sequence[Span],
    begins: Sequence[int],
    ends: Sequence[int],
    *,
    rows: Sequence[int] | None = None,
    cache: DynamicCache | None = None,
    past: Tensor | None = None,
) -> NDArray[np.float64]:
    """One forward pass over ids[begin:end] of every span: summed log-likelihood of the tokens that it predicts.

    These are the scored ones among ids[begin + 1 : end + 1].

    Args:
        rows: The row of each span, in ascending order; spans of one row are fed once. None: a row for each span.
        cache: Gets the keys and values of what is fed; None: nothing is kept.
        past: (rows, length) int64, 1 for each own token that the cache holds already.
    Returns: (spans,) float64, nats.
    """
    device = next(model.parameters()).device
    rows = range(len(spans)) if rows is None else rows
    fed = {row: span.ids[begin:end] for row, span, begin, end in zip(rows, spans, begins, ends, strict=True)}
    is_prefix = past is not None and past.shape[1] == 0
    ids, mask = padded(list(fed.values()), left=is_prefix)
    scored = [
        (row, token - 1 - begin + (ids.shape[1] - len(fed[row]) if is_prefix else 0), span.ids[token], index)
        for index, (row, span, begin, end) in enumerate(zip(rows, spans, begins, ends, strict=True))
        for token in range(max(begin + 1, span.start), end + 1)
    ]
    row, column, target, owner = torch.tensor(scored or [(0, 0, 0, 0)]).T.unbind()
    inputs: dict[str, Any] = {"use_cache": cache is not None}
    if past is not None:
        mask = torch.cat([past, mask], dim=1)
        positions = (mask.cumsum(-1) - 1).clamp_min(0)[:, past.shape[1] :]
        inputs |= {"position_ids": positions.to(device), cache_keyword(model): cache}
    row, column = row.to(device), column.to(device)
    masks = known_masks(model, None, device) if past is None else nullcontext()
    with masks, ids_on_host(model, ids), head_input(model, lambda hidden: hidden[row, column][None]):
        output = model(input_ids=ids.to(device), attention_mask=mask.to(device), **inputs)
    sums = np.zeros(len(spans))
    if scored:
        terms = _log_probabilities(output.logits[0], target.to(device))
        np.add.at(sums, owner.numpy(), terms.double().cpu().numpy())
    return sums


def _log_probabilities(logits: Tensor, targets: Tensor) -> Tensor:
    """log softmax(logits)[targets], (targets,) float32, a few rows at a time.

    float32: at a log-probability of -8 the spacing of bf16 is 0.03 nats.
    """
    limit = _CPU_SOFTMAX_LOGITS if logits.device.type == "cpu" else _SOFTMAX_LOGITS
    num_rows = max(limit // logits.shape[-1], 1)
    terms = []
    for some_logits, some_targets in zip(torch.split(logits, num_rows), torch.split(targets, num_rows), strict=True):
        chunk = some_logits.float()
        terms.append(chunk.gather(1, some_targets[:, None])[:, 0] - chunk.logsumexp(-1))
    return torch.cat(terms)


def _shared_prefix(group: Sequence[Span]) -> int:
    """Tokens at the start of all spans that are equal and not scored; 0 where there are none."""
    first, *others = group
    return min(*(span.start for span in group), *(shared_length(first.ids, span.ids) for span in others))
