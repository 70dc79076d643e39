"""Greedy decoding of many prompts at once: left-padded batches, a key-value cache, rows leave when they are done.

Like `spans.py` this file knows token ids and a model, nothing of text or tasks.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from qdora.errors import RunFailure
from qdora.evaluation.forward_path import ForwardPath, find_path, input_device, scoring
from qdora.evaluation.spans import Progress, length_batches

logger = logging.getLogger(__name__)

Finished = Callable[[int, Sequence[int]], bool]
"""finished(prompt, new ids): whether what this prompt has got so far is enough."""


def decode_greedily(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int],
    finished: Finished | None = None,
    max_batch_tokens: int = 4096,
    path: ForwardPath | None = None,
    progress: Progress | None = None,
) -> list[list[int]]:
    """The most likely next token again and again, of every prompt.

    The result does not depend on the batch but for rounding. A model without a cache that padded rows can share
    (recurrent states, no explicit positions) is run row by row, whole for every token: right, and slow.

    Args:
        model: A causal language model; called under `scoring`.
        prompts: Token ids, at least one each, in any order.
        max_new_tokens: Most tokens of one continuation.
        stop_ids: Ends of sequence; a row is done at the first, which is not part of its result.
        finished: Asked after every new token; a row is done where it says so.
        max_batch_tokens: Most tokens of one batch when all rows have got `max_new_tokens`, padding counted, unless a
            single row is longer.
        path: From `find_path`, if already chosen.
        progress: Called with prompts done and all prompts.
    Returns:
        Per prompt its new ids, in the order given.
    Raises:
        RunFailure: If the model gives logits that are not finite.
    """
    path = path or find_path(model)
    found: list[list[int]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda index: (-len(prompts[index]), index))
    most = max_batch_tokens if path.cache_keyword else 1
    if not path.cache_keyword:
        logger.warning("answers are generated one by one, without a cache, which is slow: %s", path.reason)
    num_done = 0

    def fits(batch: list[int]) -> bool:
        return len(batch) * (len(prompts[batch[0]]) + max_new_tokens) <= most

    with scoring(model):
        for batch in length_batches(order, lambda index: len(prompts[index]), fits):
            rows = _Rows(model, [prompts[index] for index in batch], path)
            _decode(rows, batch, found, max_new_tokens, stop_ids, finished)
            num_done += len(batch)
            if progress is not None:
                progress(num_done, len(prompts))
    return found


def _decode(
    rows: _Rows,
    batch: Sequence[int],
    found: list[list[int]],
    max_new_tokens: int,
    stop_ids: Collection[int],
    finished: Finished | None,
) -> None:
    """Fill the continuations of one batch; `batch` holds the prompts' indices, row by row."""
    running = list(range(len(batch)))  # rows of the batch that are not done
    kept = list(running)  # rows that are still fed
    tokens = rows.first()
    for position in range(max_new_tokens):
        chosen = dict(zip(kept, tokens.tolist(), strict=True))
        left = []
        for row in running:
            new = found[batch[row]]
            if chosen[row] in stop_ids:
                continue
            new.append(chosen[row])
            if finished is None or not finished(batch[row], new):
                left.append(row)
        running = left
        if not running or position + 1 == max_new_tokens:
            return
        if 2 * len(running) <= len(kept):  # a copy of the cache: only where it halves the work
            chosen_rows = torch.tensor([kept.index(row) for row in running])
            tokens = tokens[chosen_rows.to(tokens.device)]
            rows.keep(chosen_rows)
            kept = list(running)
        tokens = rows.next(tokens)


class _Rows:
    """One batch of sequences that grow by a token a call: the cache and mask of the rows that are still fed."""

    def __init__(self, model: nn.Module, prompts: Sequence[Sequence[int]], path: ForwardPath) -> None:
        longest = max(map(len, prompts))
        self._model, self._path = model, path
        self._ids = torch.zeros(len(prompts), longest, dtype=torch.long)
        self._mask = torch.zeros_like(self._ids)
        for row, prompt in enumerate(prompts):
            self._ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            self._mask[row, longest - len(prompt) :] = 1
        device = input_device(model)
        self._ids, self._mask = self._ids.to(device), self._mask.to(device)
        self._cache = DynamicCache(config=getattr(model, "config", None)) if path.cache_keyword else None

    def first(self) -> Tensor:
        """The token after every prompt, (rows,) int64."""
        positions = (self._mask.cumsum(-1) - 1).clamp_min(0)
        return self._most_likely(self._ids, positions)

    def next(self, tokens: Tensor) -> Tensor:
        """Append (rows,) tokens; the token after them."""
        self._mask = torch.cat([self._mask, torch.ones_like(self._mask[:, :1])], dim=1)
        if self._cache is None:
            self._ids = torch.cat([self._ids, tokens[:, None]], dim=1)
            return self._most_likely(self._ids, None)
        return self._most_likely(tokens[:, None], self._mask.sum(-1, keepdim=True) - 1)

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows alone."""
        assert self._cache is not None
        self._mask = self._mask[rows.to(self._mask.device)]
        self._cache.batch_select_indices(rows)  # a CPU index serves layers on any device

    def _most_likely(self, ids: Tensor, positions: Tensor | None) -> Tensor:
        kwargs: dict[str, Any] = {"logits_to_keep": 1} if self._path.keeps_logits else {}
        if self._cache is not None:
            kwargs |= {self._path.cache_keyword: self._cache, "use_cache": True, "position_ids": positions}
            kwargs["attention_mask"] = self._mask
        else:
            kwargs["use_cache"] = False  # a single row without padding
        logits = self._model(input_ids=ids, **kwargs).logits[:, -1]  # (rows, vocabulary)
        if not torch.isfinite(logits).all():
            raise RunFailure(
                "eval: the model's logits are not finite. Its weights or activations overflow or hold NaN."
            )
        chosen: Tensor = logits.argmax(-1)
        return chosen
