"""Log-likelihoods of token spans: the forward passes under every score, perplexity included.

Where the model's cache allows it, the prefix of a question's choices runs once and its cache is copied to each.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from qdora.adapter.layer import evaluation_mode
from qdora.data.chats import shared_length
from qdora.errors import first_line
from qdora.files.console import Progress
from qdora.memory.oom import free_memory, is_out_of_memory
from qdora.model.attention import fast_grouped_attention, known_masks, text_config

BATCH_TOKENS = 4096  # of a forward pass, padding counted; a longer row is a batch of its own
_MAX_LOGITS = 2**27  # of a forward pass, 256 MiB in bf16
_MAX_CACHE_BYTES = 2**29  # of the copies of the prefix cache, one per choice
# Logits turned to float32 at a time. On a CPU they stay in its cache: three times as fast as 2**25.
_SOFTMAX_LOGITS, _CPU_SOFTMAX_LOGITS = 2**25, 2**20
# A batch of so many tokens is closed when the next row would fill less than this share of its width.
_ENOUGH_TOKENS, _LEAST_FILL = 512, 0.8

Result = TypeVar("Result")
Exchange = Callable[[Any], list[Any]]  # JSON values of all processes; raises where another one has failed

logger = logging.getLogger("qdora")


@dataclass(frozen=True)
class Span:
    """`ids[start:]` is scored given `ids[:start]`; 1 <= start < len(ids)."""

    ids: tuple[int, ...]
    start: int

    @property
    def num_scored(self) -> int:
        return len(self.ids) - self.start

    @property
    def num_fed(self) -> int:
        """Tokens that are fed; the last one is only predicted."""
        return len(self.ids) - 1


def strided_spans(ids: Sequence[int], window: int, stride: int, first: int = 1) -> list[Span]:
    """Windows of at most `window` fed tokens over one text that score tokens first .. len-1 once, first >= 1.

    Each moves on by `stride`: every scored token has at least window - stride + 1 tokens of context, or all there are.
    """
    spans: list[Span] = []
    scored = first  # tokens before this one are scored, or only context
    begin = max(0, scored - 1 - (window - stride))
    end = begin + 1 + window
    while scored < len(ids):
        end = min(end, len(ids))
        begin = max(0, end - 1 - window) if spans else begin
        spans.append(Span(tuple(ids[begin:end]), scored - begin))
        scored, end = end, end + stride
    return spans


# What a model can do


def shares_prefix(model: nn.Module) -> bool:
    """Whether the cache of a prefix can be copied to several continuations: a sliding window forgets positions."""
    return _caches_only(model, DynamicLayer)


def pads_left(model: nn.Module) -> bool:
    """Whether padding before a row changes nothing: a recurrent state knows no padding."""
    return _caches_only(model, DynamicLayer, DynamicSlidingWindowLayer)


def _caches_only(model: nn.Module, *kinds: type) -> bool:
    """Whether the cache has only these layers, and the model takes positions, which padding would shift."""
    if "position_ids" not in inspect.signature(model.forward).parameters or getattr(
        model, "_is_stateful", False
    ):
        return False
    return {type(layer) for layer in DynamicCache(config=model.config).layers} <= set(kinds)


@contextmanager
def scoring(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients, and fast kernels of attention."""
    # Not inference_mode: a layer may keep what it computes here (rotary tables, norms) for a later backward pass
    with evaluation_mode(model), torch.no_grad(), fast_grouped_attention():
        yield


@contextmanager
def head_input(model: Any, choose: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Inside, the output head gets what `choose` takes from the hidden states (rows, positions, features), contiguous.

    With the slice of transformers' `logits_to_keep` an evaluation took 2.5 to 26 times as long on a CPU.
    """

    def take(_head: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (choose(args[0]).contiguous(), *args[1:])

    with model.get_output_embeddings().register_forward_pre_hook(take):
        yield


# Batches


def length_batches(
    items: Sequence[int], width: Callable[[int], int], fits: Callable[[list[int]], bool]
) -> Iterator[list[int]]:
    """Cut items, widest first, into batches that fit, or of one item, and are not mostly padding."""
    batch: list[int] = []
    num_tokens = 0
    for item in items:
        is_narrow = num_tokens >= _ENOUGH_TOKENS and width(item) < _LEAST_FILL * width(batch[0])
        if batch and (is_narrow or not fits([*batch, item])):
            yield batch
            batch, num_tokens = [], 0
        batch.append(item)
        num_tokens += width(item)
    if batch:
        yield batch


_SHARE: ContextVar[tuple[int, int, Exchange]] = ContextVar(
    "share_of_batches", default=(0, 1, lambda own: [own])
)


@contextmanager
def batches_shared(rank: int, size: int, exchange: Exchange) -> Iterator[None]:
    """In the block, `results_of` computes every `size`-th batch here; see `evaluate_together`."""
    before = _SHARE.set((rank, size, exchange))
    try:
        yield
    finally:
        _SHARE.reset(before)


def results_of(
    model: nn.Module,
    batches: Sequence[list[int]],
    compute: Callable[[list[int]], Sequence[Result]],
    progress: Progress | None = None,
) -> dict[int, Result]:
    """The result, JSON types, of every item of the batches, computed here or in another process.

    A batch whose allocation fails is computed in halves, and so are those after it; not with a base that is divided
    among processes, since the others would wait in another batch.
    """
    rank, size, exchange = _SHARE.get()
    is_divided = any(isinstance(module, FSDPModule) for module in model.modules())
    total, num_done, num_parts = sum(map(len, batches)), 0, 1
    own: list[tuple[int, Result]] = []
    for number, batch in enumerate(batches):
        while number % size == rank:
            parts = [part.tolist() for part in np.array_split(batch, min(num_parts, len(batch)))]
            try:
                own += zip(batch, [result for part in parts for result in compute(part)], strict=True)
                break
            except (RuntimeError, MemoryError) as error:
                if num_parts >= len(batch) or is_divided or not is_out_of_memory(error):
                    raise
                reason = first_line(error)
            free_memory()  # outside the except block, where the error keeps tensors alive
            if num_parts == 1:
                logger.warning(
                    "Evaluation: out of memory with a batch of %d, now in halves: %s", len(batch), reason
                )
            num_parts *= 2
        num_done += len(batch)
        if progress is not None:
            progress(num_done, total)
    return {item: result for part in exchange(own) for item, result in part}


# Scores


def score_spans(model: nn.Module, spans: Sequence[Span]) -> NDArray[np.float64]:
    """Summed log-likelihood of every span's scored tokens, (spans,) float64, nats."""
    return np.concatenate(score_groups(model, [[span] for span in spans]))


def score_groups(
    model: nn.Module, groups: Sequence[Sequence[Span]], progress: Progress | None = None
) -> list[NDArray[np.float64]]:
    """Summed log-likelihood of the spans of each group (a question's choices), (spans,) float64 each, nats."""
    units: list[tuple[Sequence[Span], int]] = []  # spans that run together, and the length of their prefix
    can_share = shares_prefix(model)
    for group in groups:
        prefix = 0
        if can_share and len(group) > 1:
            shared = (shared_length(group[0].ids, span.ids) for span in group[1:])
            prefix = min(*(span.start for span in group), *shared)
        units += [(group, prefix)] if prefix else [([span], 0) for span in group]
    max_logits = max(_MAX_LOGITS // getattr(text_config(model), "vocab_size", 2**16), 1)

    def width(index: int) -> int:
        (span, *_), prefix = units[index]
        return prefix or span.num_fed

    def fits(batch: list[int]) -> bool:
        first, last = units[batch[0]][1], units[batch[-1]][1]
        num_scored = sum(units[index][0][0].num_scored for index in batch)
        is_small = len(batch) * width(batch[0]) <= BATCH_TOKENS and (first > 0 or num_scored <= max_logits)
        return is_small and (first > 0) == (last > 0)

    def compute(batch: list[int]) -> list[list[float]]:
        some = [units[index] for index in batch]
        if some[0][1]:
            return _score_shared(model, some, max_logits)
        spans = [span for (span,), _ in some]
        num_fed = [span.num_fed for span in spans]
        if can_share and spans[0].num_scored > max_logits:  # a batch of its own, in pieces
            cache, scores = DynamicCache(), np.zeros(1)
            for begin in range(0, num_fed[0], max_logits):
                past, end = torch.ones(1, begin, dtype=torch.long), min(begin + max_logits, num_fed[0])
                scores += _scores(model, spans, [begin], [end], cache=cache, past=past)
        else:
            scores = _scores(model, spans, [0] * len(spans), num_fed)
        return [[float(score)] for score in scores]

    order = sorted(range(len(units)), key=lambda index: (units[index][1] == 0, -width(index), index))
    with scoring(model):
        scored = results_of(model, list(length_batches(order, width, fits)), compute, progress)
    flat = np.array([score for index in range(len(units)) for score in scored[index]])
    return np.split(flat, np.cumsum([len(group) for group in groups]))[:-1]


def _score_shared(
    model: nn.Module, units: list[tuple[Sequence[Span], int]], max_logits: int
) -> list[list[float]]:
    """One batch of groups: all prefixes, then the rest of every span behind a copy of its prefix's cache.

    Prefixes are padded on the left: the mask is 0..0 1..1 | 1..1 0..0.
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
        is_small = len(batch) * widest <= min(BATCH_TOKENS, max_logits)
        return is_small and len(batch) * (past.shape[1] + widest) <= max_cached

    longer = sorted((index for index in range(len(spans)) if width(index) > 0), key=lambda index: -width(index))
    for batch in length_batches(longer, width, fits):
        own, begins, chosen = [spans[index] for index in batch], [ends[index] for index in batch], rows[batch]
        copied = DynamicCache([(layer.keys[chosen], layer.values[chosen]) for layer in cache.layers])
        num_fed = [span.num_fed for span in own]
        scores[batch] += _scores(model, own, begins, num_fed, cache=copied, past=past[chosen])
    return [part.tolist() for part in np.split(scores, np.cumsum([len(group) for group, _ in units]))[:-1]]


def padded(rows: Sequence[Sequence[int]], *, left: bool = False) -> tuple[Tensor, Tensor]:
    """Rows with zeros behind (left: before) the shorter ones, and their mask; (rows, longest) int64."""
    own, side = [torch.tensor(row, dtype=torch.long) for row in rows], "left" if left else "right"
    ids = pad_sequence(own, batch_first=True, padding_side=side)
    return ids, pad_sequence([torch.ones_like(row) for row in own], batch_first=True, padding_side=side)


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
    """One forward pass over ids[begin:end] of every span: summed log-likelihood of the scored tokens that it predicts.

    `rows`: the row of each span, ascending; spans of one row are fed once. `past` is (rows, length) int64, 1 for each
    own token in the cache. Returns (spans,) float64, nats.
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
        is_new = "cache" in inspect.signature(model.forward).parameters  # older: past_key_values
        inputs |= {"position_ids": positions.to(device), "cache" if is_new else "past_key_values": cache}
    row, column = row.to(device), column.to(device)
    masks = known_masks(model, None, device) if past is None else nullcontext()
    with masks, head_input(model, lambda hidden: hidden[row, column][None]):
        output = model(input_ids=ids.to(device), attention_mask=mask.to(device), **inputs)
    sums = np.zeros(len(spans))
    if scored:
        terms = _log_probabilities(output.logits[0], target.to(device))
        np.add.at(sums, owner.numpy(), terms.double().cpu().numpy())
    return sums


def _log_probabilities(logits: Tensor, targets: Tensor) -> Tensor:
    """log softmax(logits)[targets], (targets,) float32: at -8 the spacing of bf16 is 0.03 nats."""
    limit = _CPU_SOFTMAX_LOGITS if logits.device.type == "cpu" else _SOFTMAX_LOGITS
    num_rows = max(limit // logits.shape[-1], 1)
    terms = []
    for some_logits, some_targets in zip(
        torch.split(logits, num_rows), torch.split(targets, num_rows), strict=True
    ):
        chunk = some_logits.float()
        terms.append(chunk.gather(1, some_targets[:, None])[:, 0] - chunk.logsumexp(-1))
    return torch.cat(terms)
