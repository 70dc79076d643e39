"""Batches of an evaluation: items of like length, divided among processes, and in parts where memory is short."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import numpy as np
from torch import nn
from torch.distributed.fsdp import FSDPModule

from qdora.errors import RunFailure, first_line
from qdora.files.console import Progress
from qdora.memory.oom import free_memory, is_out_of_memory

Result = TypeVar("Result")
Exchange = Callable[[Any], list[Any]]
"""The values of all processes, JSON types, from that of this one; raises where another process has failed."""

# A batch of at least so many tokens is closed when the next row would fill less than this share of its width: with one
# wide choice among many narrow ones, most of the batch would be padding.
_ENOUGH_TOKENS = 512
_LEAST_FILL = 0.8
_SHARE: ContextVar[tuple[int, int, Exchange] | None] = ContextVar("share_of_batches", default=None)

logger = logging.getLogger("qdora")


def length_batches(
    items: Sequence[int], width: Callable[[int], int], fits: Callable[[list[int]], bool]
) -> Iterator[list[int]]:
    """Cut items, widest first, into batches that fit and are not mostly padding; one item always makes a batch."""
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


@contextmanager
def batches_shared(rank: int, size: int, exchange: Exchange) -> Iterator[None]:
    """In the block, `results_of` computes every `size`-th batch here. All processes must evaluate the same.

    A process in which the block raises must send the others a failure, since they wait for its next exchange
    (`evaluate_together`).
    """
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
    """The result of every item of the batches, computed here or in another process (`batches_shared`).

    A batch whose allocation fails is computed in halves, down to single items, and so are those after it. A smaller
    batch rounds otherwise, so that the last bits of scores may differ. A base that is divided among processes is not
    computed again: the others would wait in another batch.

    Args:
        compute: A batch of items -> a result for each, of JSON types.
        progress: Called with the items that are done and all items, after each batch.
    Raises RunFailure if the processes have different batches, and what `compute` or the exchange raises.
    """
    rank, size, exchange = _SHARE.get() or (0, 1, lambda own: [own])
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
            free_memory()  # outside the except block, where the error keeps the tensors of its frames alive
            if num_parts == 1:
                logger.warning(
                    "Evaluation: out of memory with a batch of %d, computed in halves: %s", len(batch), reason
                )
            num_parts *= 2
        num_done += len(batch)
        if progress is not None:
            progress(num_done, total)
    found = {item: result for part in exchange(own) for item, result in part}
    if len(found) != total:
        raise RunFailure("eval: the processes evaluate different examples. Fix: give all of them the same data.")
    return found
