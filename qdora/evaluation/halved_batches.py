"""Batches of an evaluation that do not fit into memory, computed in halves."""

from __future__ import annotations

import logging
from collections.abc import Callable
from itertools import pairwise
from typing import Generic, TypeVar

from torch import nn
from torch.distributed.fsdp import FSDPModule

from qdora.errors import first_line
from qdora.memory.failed_allocation import free_memory, is_out_of_memory

logger = logging.getLogger("qdora")

Result = TypeVar("Result")
Compute = Callable[[list[int]], list[Result]]
"""A batch of items -> a result for each."""


def halved_where_short(model: nn.Module, compute: Compute[Result]) -> Compute[Result]:
    """`compute`, but a batch whose allocation fails is computed in halves, down to single items. Logged once.

    Later batches, which hold about as many tokens, begin with as many parts. The items are the same; a smaller batch
    rounds otherwise, so that the last bits of its scores may differ. A base that is divided among processes is not
    computed again: the others would wait in another batch.
    """
    if any(isinstance(module, FSDPModule) for module in model.modules()):
        return compute
    return _Parts(compute)


class _Parts(Generic[Result]):
    """Computes batches in as many parts as one has needed so far: 1, 2, 4, ..."""

    def __init__(self, compute: Compute[Result]) -> None:
        self._compute, self._number = compute, 1

    def __call__(self, batch: list[int]) -> list[Result]:
        while True:
            ends = [len(batch) * part // self._number for part in range(self._number + 1)]
            parts = [batch[start:end] for start, end in pairwise(ends) if end > start]
            try:
                return [result for part in parts for result in self._compute(part)]
            except (RuntimeError, MemoryError) as error:
                if self._number >= len(batch) or not is_out_of_memory(error):
                    raise
                reason = first_line(error).rstrip(".")
            free_memory()  # outside the except block, where the error keeps the tensors of its frames alive
            if self._number == 1:
                told = "Evaluation: out of memory with a batch of %d; computed again in halves (%s)."
                logger.warning(told, len(batch), reason)
            self._number *= 2
