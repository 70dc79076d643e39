"""Out of memory in a step: the same examples again in smaller micro-batches, so the run goes on with the same steps."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from qdora.data.batching import MicroBatch
from qdora.data.loader import StepLoader

# What allocators say that have no error class of their own: torch's on the CPU, and CUDA's outside torch's cache.
_SAID = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "CUDA error: out of memory",
    "CUDA out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


@dataclass(frozen=True)
class Backoff:
    """One reduction of the micro-batches: tokens of one forward pass, padding counted, before and after."""

    tokens_before: int
    tokens_after: int
    reason: str


@dataclass(frozen=True)
class Shortage:
    """A micro-batch for which there was not enough memory.

    Attributes:
        num_examples: Examples in it.
        num_tokens: Tokens, padding counted.
        reason: First line of what the allocator said.
    """

    num_examples: int
    num_tokens: int
    reason: str


def worst(shortages: Iterable[Shortage | None]) -> Shortage | None:
    """Of the shortages of several processes the one that leaves least to cut; None where there is none."""
    found = [shortage for shortage in shortages if shortage is not None]
    return min(found, key=lambda shortage: (shortage.num_examples > 1, shortage.num_tokens), default=None)


class OutOfMemory(Exception):
    """Carries a Shortage. While it is alive, so are the frames that it passed, and their tensors."""

    def __init__(self, shortage: Shortage) -> None:
        self.shortage = shortage
        super().__init__(shortage.reason)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that an allocation failed, on the GPU or the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(said in str(error) for said in _SAID)


@contextmanager
def shortage_of(micro: MicroBatch) -> Iterator[None]:
    """Turn a failed allocation in the block into OutOfMemory; every other error passes as it is."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise OutOfMemory(Shortage(len(micro.example_ids), micro.input_ids.numel(), reason)) from error


def back_off(loader: StepLoader, shortage: Shortage) -> Backoff | None:
    """Halve the tokens of a micro-batch, counted from the one that did not fit, and give freed memory back.

    Called outside the `except` block, where the error is gone and with it the tensors of its frames.

    Returns:
        What was changed, or None where the micro-batch was a single example.
    """
    before = loader.micro_batch_tokens
    if shortage.num_examples == 1 or before <= 1:
        return None
    loader.micro_batch_tokens = min(before, shortage.num_tokens) // 2
    gc.collect()  # the graph of the failed pass may hang in cycles of frames
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return Backoff(before, loader.micro_batch_tokens, shortage.reason)


def cannot_cut(shortage: Shortage) -> str:
    """What to do where one example by itself does not fit."""
    return (
        f"out of memory with one example of {shortage.num_tokens:,} tokens by itself ({shortage.reason.rstrip('.')}). "
        "Turn on memory.checkpointing or lower memory.loss_chunk and go on with --resume; or start a new run with "
        "fewer tokens (data.max_length with data.too_long), a smaller adapter.rank or another base.quant."
    )
