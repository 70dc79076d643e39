"""Log-likelihoods of token spans: the forward passes under every score, perplexity included.

A span is a token sequence of which the tail is scored. Spans that belong together (the choices of one question) share a
prefix, which is run once; its key-value cache is then copied to every choice and only the choices' own tokens are run.

This file knows token ids and a model, nothing of text or tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from qdora.evaluation.forward_path import ForwardPath, choose_path, scoring
from qdora.evaluation.halved_batches import halved_where_short
from qdora.evaluation.shared_batches import results_of
from qdora.files.console import Progress
from qdora.model.known_masks import known_masks
from qdora.model.text_config import vocabulary_size
from qdora.nn.host_embedding import ids_on_host

T = TypeVar("T")

# One forward pass never makes more logits than this (256 MiB in bf16), whatever the vocabulary: 2,730 positions of a
# 49k vocabulary, 524 of a 256k one. Only a model without a cache that grows makes all logits of a long span.
_MAX_LOGITS = 2**27
# Copies of the prefix cache, one per choice, that live at the same time: 1,600 tokens of a 70B model (grouped keys).
_MAX_CACHE_BYTES = 2**29
# A batch of at least so many tokens is closed when the next row would fill less than this share of its width: with one
# wide choice among many narrow ones, most of the batch would be padding.
_ENOUGH_TOKENS = 512
_LEAST_FILL = 0.8
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


def score_spans(
    model: nn.Module,
    spans: Sequence[Span],
    *,
    max_batch_tokens: int = 4096,
    path: ForwardPath | None = None,
    progress: Progress | None = None,
) -> NDArray[np.float64]:
    """Summed log-likelihood of every span's scored tokens, each span run whole, batched by length, right-padded.

    A batch that does not fit into memory is run in halves (`halved_where_short`).

    Args:
        spans: In any order.
        max_batch_tokens: Most tokens of one batch, padding included; a longer span is a batch of its own.
    Returns: (spans,) float64, nats, in the order given.
    """
    path = path or choose_path(model)
    device = next(model.parameters()).device
    scores = np.zeros(len(spans))
    order = sorted(range(len(spans)), key=lambda index: (-len(spans[index].ids), index))
    max_logits = max(_MAX_LOGITS // vocabulary_size(model), 1)

    def width(index: int) -> int:
        return len(spans[index].ids) - 1

    def fits(batch: list[int]) -> bool:
        longest = width(batch[0])
        kept = longest + 1 - min(spans[index].start for index in batch)
        return len(batch) * longest <= max_batch_tokens and len(batch) * kept <= max_logits

    def compute(batch: list[int]) -> list[float]:
        if path.shared_prefix and spans[batch[0]].num_scored > max_logits:  # then it is a batch of its own
            return [_score_in_pieces(model, spans[batch[0]], path, device, max_logits)]
        found: list[float] = _score_whole(model, [spans[index] for index in batch], path, device).tolist()
        return found

    report = None if progress is None else lambda num_done: progress(num_done, len(spans))
    with scoring(model):
        for index, score in results_of(
            length_batches(order, width, fits), halved_where_short(model, compute), report
        ).items():
            scores[index] = score
    return scores


def score_groups(
    model: nn.Module,
    groups: Sequence[Sequence[Span]],
    *,
    max_batch_tokens: int = 4096,
    path: ForwardPath | None = None,
    progress: Progress | None = None,
) -> list[NDArray[np.float64]]:
    """Summed log-likelihood of every span of every group; the tokens that a group's spans share are run once.

    Batches that do not fit into memory are run in halves (`halved_where_short`).

    Args:
        groups: The spans of a question's choices; spans of a group may have different lengths and starts.
        max_batch_tokens: Most tokens of one forward pass, padding included, unless one row is longer.
    Returns: Per group (spans,) float64, nats, in the order given.
    """
    path = path or choose_path(model)
    shared = [_shared_length(group) if path.shared_prefix and len(group) > 1 else 0 for group in groups]
    scores = [np.zeros(len(group)) for group in groups]
    order = sorted((i for i in range(len(groups)) if shared[i] > 0), key=lambda i: (-shared[i], i))
    whole = [i for i in range(len(groups)) if shared[i] == 0]

    def compute(batch: list[int]) -> list[list[float]]:
        found = _score_shared(model, [groups[i] for i in batch], [shared[i] for i in batch], path, max_batch_tokens)
        return [each.tolist() for each in found]

    report = None if progress is None else lambda num_done: progress(num_done, len(groups))
    batches = length_batches(order, shared.__getitem__, lambda batch: len(batch) * shared[batch[0]] <= max_batch_tokens)
    with scoring(model):
        for i, group_scores in results_of(batches, halved_where_short(model, compute), report).items():
            scores[i] = np.array(group_scores)
    # The others run without a shared prefix
    flat = [(i, j) for i in whole for j in range(len(groups[i]))]

    def report_whole(done: int, total: int) -> None:
        if progress is not None:  # spans are turned into groups: rounded down, all of them at the end
            progress(len(order) + len(whole) * done // total, len(groups))

    spans = [groups[i][j] for i, j in flat]
    flat_scores = score_spans(model, spans, max_batch_tokens=max_batch_tokens, path=path, progress=report_whole)
    for (i, j), score in zip(flat, flat_scores, strict=True):
        scores[i][j] = score
    return scores


def padded(rows: Sequence[Sequence[int]], *, left: bool = False, fill: int = 0) -> tuple[Tensor, Tensor]:
    """The rows as one tensor with `fill` behind (left: before) the shorter ones, and a mask that is 1 on the rows' own;
    (rows, longest) int64 both."""
    own, side = [torch.tensor(row, dtype=torch.long) for row in rows], "left" if left else "right"
    ids = pad_sequence(own, batch_first=True, padding_value=fill, padding_side=side)
    return ids, pad_sequence([torch.ones_like(row) for row in own], batch_first=True, padding_side=side)


def _score_whole(model: nn.Module, rows: list[Span], path: ForwardPath, device: torch.device) -> NDArray[np.float64]:
    """One right-padded batch of whole spans -> (rows,) float64."""
    input_ids, attention_mask = padded([row.ids[:-1] for row in rows])  # the last token is predicted, never fed
    targets, _ = padded([(-1,) * (row.start - 1) + row.ids[row.start :] for row in rows], fill=-1)
    longest = input_ids.shape[1]
    first = min(row.start for row in rows) - 1  # the first position whose logits are needed
    kwargs: dict[str, Any] = {"logits_to_keep": longest - first} if path.keeps_logits else {}
    kwargs |= {"attention_mask": attention_mask.to(device), "use_cache": False}
    with known_masks(model, None, device), ids_on_host(model, input_ids):
        output = model(input_ids=input_ids.to(device), **kwargs)
    logits = output.logits[:, first - longest :]  # (rows, longest - first, vocabulary)
    return _summed(logits, targets[:, first:].to(device))


def _score_in_pieces(model: nn.Module, span: Span, path: ForwardPath, device: torch.device, length: int) -> float:
    """A span of more tokens than logits may exist at once: piece after piece behind the cache of those before."""
    cache, fed, total = DynamicCache(), span.ids[:-1], 0.0  # the last token is predicted, never fed
    for begin in range(0, len(fed), length):
        piece = fed[begin : begin + length]
        end = begin + len(piece)
        targets = span.ids[max(begin + 1, span.start) : end + 1]
        kwargs: dict[str, Any] = {"logits_to_keep": max(len(targets), 1)} if path.keeps_logits else {}
        output = model(
            input_ids=torch.tensor([piece], device=device),
            position_ids=torch.arange(begin, end, device=device)[None],
            use_cache=True,
            **{path.cache_keyword: cache},
            **kwargs,
        )
        if targets:
            total += float(_summed(output.logits[:, -len(targets) :], torch.tensor([targets], device=device))[0])
    return total


def _score_shared(
    model: nn.Module, groups: list[Sequence[Span]], prefix_lengths: list[int], path: ForwardPath, max_batch_tokens: int
) -> list[NDArray[np.float64]]:
    """One batch of groups: the prefixes left-padded in one pass, then the rest of every span from the copied cache.

    Left-padded, so that the last position is the same in every row (one row of logits each) and the attention mask has
    no hole between prefix and continuation: 0..0 1..1 | 1..1 0..0.
    """
    device = next(model.parameters()).device
    prefixes = [group[0].ids[:length] for group, length in zip(groups, prefix_lengths, strict=True)]
    prefix_ids, prefix_mask = padded(prefixes, left=True)
    longest = max(prefix_lengths)
    cache = DynamicCache()
    kwargs: dict[str, Any] = {path.cache_keyword: cache, "use_cache": True}
    if path.keeps_logits:
        kwargs["logits_to_keep"] = 1
    output = model(
        input_ids=prefix_ids.to(device),
        attention_mask=prefix_mask.to(device),
        position_ids=(prefix_mask.cumsum(-1) - 1).clamp_min(0).to(device),
        **kwargs,
    )
    flat = [(g, j) for g, group in enumerate(groups) for j in range(len(group))]
    # The last prefix position predicts the first token after the prefix, of every choice; it counts where it is scored.
    next_tokens = torch.tensor([groups[g][j].ids[prefix_lengths[g]] for g, j in flat], device=device)
    rows = torch.tensor([g for g, _ in flat], device=device)
    first_scores = _log_probabilities(output.logits[:, -1], rows, next_tokens).double().cpu().numpy()
    scores = [np.zeros(len(group)) for group in groups]
    for (g, j), score in zip(flat, first_scores, strict=True):
        if groups[g][j].start == prefix_lengths[g]:
            scores[g][j] = score

    def width(at: tuple[int, int]) -> int:
        return len(groups[at[0]][at[1]].ids) - 1 - prefix_lengths[at[0]]

    max_rows = min(max_batch_tokens, max(_MAX_LOGITS // vocabulary_size(model), 1))
    max_cached = max(_MAX_CACHE_BYTES // _cache_bytes_per_token(cache), 1)

    def fits(batch: list[tuple[int, int]]) -> bool:
        widest = width(batch[0])
        return len(batch) * widest <= max_rows and len(batch) * (longest + widest) <= max_cached

    longer = sorted((at for at in flat if width(at) > 0), key=lambda at: (-width(at), at))
    for batch in length_batches(longer, width, fits):
        spans = [groups[g][j] for g, j in batch]
        prefix_rows = torch.tensor([g for g, _ in batch])
        found = _score_rest(model, spans, prefix_rows, cache, prefix_mask, path=path)
        for (g, j), score in zip(batch, found, strict=True):
            scores[g][j] += score
    return scores


def _score_rest(
    model: nn.Module,
    spans: list[Span],
    prefix_rows: Tensor,
    cache: DynamicCache,
    prefix_mask: Tensor,
    *,
    path: ForwardPath,
) -> NDArray[np.float64]:
    """Scores of the tokens from the second one after the prefix on, right-padded -> (spans,) float64."""
    device = next(model.parameters()).device
    lengths = prefix_mask.sum(-1)[prefix_rows].tolist()
    input_ids, mask = padded([span.ids[length:-1] for span, length in zip(spans, lengths, strict=True)])
    scored = []
    for span, length in zip(spans, lengths, strict=True):
        skipped = max(span.start - 1 - length, 0)  # common tokens that a merge at the boundary put behind the prefix
        scored.append((-1,) * skipped + span.ids[length + 1 + skipped :])
    targets, _ = padded(scored, fill=-1)
    output = model(
        input_ids=input_ids.to(device),
        attention_mask=torch.cat([prefix_mask[prefix_rows], mask], dim=1).to(device),
        position_ids=(torch.tensor(lengths)[:, None] + torch.arange(input_ids.shape[1])).to(device),
        use_cache=True,
        **{path.cache_keyword: _copied_rows(cache, prefix_rows)},
    )
    return _summed(output.logits, targets.to(device))


def _summed(logits: Tensor, targets: Tensor) -> NDArray[np.float64]:
    """Sum over positions of log softmax(logits)[target], where target >= 0; float32 terms, float64 sums."""
    rows, positions = torch.nonzero(targets >= 0, as_tuple=True)
    flat_rows = rows * targets.shape[1] + positions
    terms = _log_probabilities(logits.reshape(-1, logits.shape[-1]), flat_rows, targets[rows, positions])
    sums = np.zeros(len(targets))
    np.add.at(sums, rows.cpu().numpy(), terms.double().cpu().numpy())
    return sums


def _log_probabilities(logits: Tensor, rows: Tensor, targets: Tensor) -> Tensor:
    """log softmax(logits[rows])[targets], (targets,) float32, a few rows at a time.

    float32: at a log-probability of -8 the spacing of bf16 is 0.03 nats.
    """
    limit = _CPU_SOFTMAX_LOGITS if logits.device.type == "cpu" else _SOFTMAX_LOGITS
    num_rows = max(limit // logits.shape[-1], 1)
    terms = []
    for some_rows, some_targets in zip(torch.split(rows, num_rows), torch.split(targets, num_rows), strict=True):
        chunk = logits[some_rows].float()
        terms.append(chunk.gather(1, some_targets[:, None])[:, 0] - chunk.logsumexp(-1))
    return torch.cat(terms) if terms else logits.new_zeros(0, dtype=torch.float32)


def _shared_length(group: Sequence[Span]) -> int:
    """Tokens at the start of all spans that are equal and not scored; 0 where there are none."""
    limit = min(span.start for span in group)
    first = group[0].ids
    for position in range(limit):
        if any(span.ids[position] != first[position] for span in group):
            return position
    return limit


def _copied_rows(cache: DynamicCache, rows: Tensor) -> DynamicCache:
    """A new cache that holds the chosen batch rows of another, repeats allowed."""
    copied = DynamicCache()
    for index, layer in enumerate(cache.layers):
        chosen = rows.to(layer.keys.device)
        copied.update(layer.keys[chosen], layer.values[chosen], index)
    return copied


def _cache_bytes_per_token(cache: DynamicCache) -> int:
    """Bytes that one token of one row takes in all layers."""
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    return sum(tensor.nbytes // (tensor.shape[0] * tensor.shape[-2]) for tensor in tensors)


def length_batches(order: list[T], width: Callable[[T], int], fits: Callable[[list[T]], bool]) -> Iterator[list[T]]:
    """Cut `order`, widest first, into batches that fit and are not mostly padding; one item always makes a batch."""
    batch: list[T] = []
    num_tokens = 0
    for item in order:
        padded = num_tokens >= _ENOUGH_TOKENS and width(item) < _LEAST_FILL * width(batch[0])
        if batch and (padded or not fits([*batch, item])):
            yield batch
            batch, num_tokens = [], 0
        batch.append(item)
        num_tokens += width(item)
    if batch:
        yield batch
