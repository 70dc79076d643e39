"""Batches of an evaluation that do not fit into memory, computed in halves."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import TypeVar

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

    The items are the same; a smaller batch rounds otherwise, so that the last bits of its scores may differ. A base
    that is divided among processes is not computed again: the others would wait in another batch.
    """
    if any(isinstance(module, FSDPModule) for module in model.modules()):
        return compute
    told: list[int] = []
    return partial(_in_halves, compute, told)


def _in_halves(compute: Compute[Result], told: list[int], batch: list[int]) -> list[Result]:
    try:
        return compute(batch)
    except (RuntimeError, MemoryError) as error:
        if len(batch) == 1 or not is_out_of_memory(error):
            raise
        reason = first_line(error).rstrip(".")
    free_memory()  # outside the except block, where the error keeps the tensors of its frames alive
    if not told:
        told.append(len(batch))
        logger.warning(
            "Evaluation: out of memory with a batch of %d; computed again in halves (%s).", len(batch), reason
        )
    middle = len(batch) // 2
    return [result for half in (batch[:middle], batch[middle:]) for result in _in_halves(compute, told, half)]
