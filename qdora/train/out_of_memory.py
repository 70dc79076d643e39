"""Smaller micro-batches as long as a step does not fit into memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from qdora.data.batches import MicroBatch, StepLoader
from qdora.errors import first_line
from qdora.memory.oom import free_memory, is_out_of_memory

# Steps that must fit before the first growth.
_FIRST_WAIT = 32


class Shortage(NamedTuple):
    """A micro-batch that did not fit: its tokens with padding, and the first line of the allocator's message."""

    num_examples: int
    num_tokens: int
    reason: str

    def fault(self) -> str:
        """What is wrong if the micro-batch is a single example, which cannot be split."""
        return (
            f"out of memory with one example of {self.num_tokens:,} tokens by itself ({self.reason.rstrip('.')}). "
            "Fix: resume with --resume and -s memory.loss_chunk=64, with -s memory.checkpointing=true if it is off, or "
            "on a GPU with -s memory.offload_activations=true or -s base.residency=host. Or start a new run with fewer "
            "tokens (data.max_length with data.too_long), a smaller adapter.rank or another base.quant."
        )


class OutOfMemory(Exception):
    """Its argument is a Shortage. It keeps the frames that it passed, and their tensors, alive."""


@contextmanager
def shortage_of(micro: MicroBatch) -> Iterator[None]:
    """Turn a failed allocation in the block into OutOfMemory; every other error passes unchanged."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(Shortage(len(micro.example_ids), micro.input_ids.numel(), first_line(error))) from error


class Backoff:
    """Tokens of a micro-batch: half as many when memory runs out, twice as many again after steps that fit.

    Memory may have been short for one long example, or for another program. After a growth that did not fit, the next
    one waits twice as long.
    """

    def __init__(self, loader: StepLoader) -> None:
        self._loader = loader
        self._asked = loader.batching.max_tokens
        self._wait, self._num_good, self._has_grown = _FIRST_WAIT, 0, False

    def shrink(self, shortage: Shortage) -> dict[str, Any] | None:
        """Halve the tokens, counted from the micro-batch that did not fit, and release freed memory.

        Must be called outside the `except` block, where the error no longer keeps the tensors of its frames alive.

        Returns:
            `tokens_before` and `tokens_after` (of a micro-batch, padding counted) and the `reason`, or None if the
            micro-batch was a single example.
        """
        before = self._loader.batching.max_tokens
        if shortage.num_examples == 1 or before <= 1:
            return None
        self._loader.batching.max_tokens = min(before, shortage.num_tokens) // 2
        if self._has_grown:
            self._wait *= 2
        self._num_good, self._has_grown = 0, False
        free_memory()
        return {"tokens_before": before, "tokens_after": self._loader.batching.max_tokens, "reason": shortage.reason}

    def grow(self) -> dict[str, Any] | None:
        """Count a step that fitted. Returns `tokens_before` and `tokens_after` if the next one has more tokens."""
        before = self._loader.batching.max_tokens
        self._num_good += 1
        if before >= self._asked or self._num_good < self._wait:
            return None
        self._loader.batching.max_tokens = min(2 * before, self._asked)
        self._num_good, self._has_grown = 0, True
        return {"tokens_before": before, "tokens_after": self._loader.batching.max_tokens}

    def state_dict(self) -> dict[str, Any]:
        """State for a checkpoint; JSON values."""
        waits = {"wait": self._wait, "num_good": self._num_good, "has_grown": self._has_grown}
        return {"asked": self._asked, "used": self._loader.batching.max_tokens, **waits}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state of a checkpoint, unless the recipe asks for another size now."""
        if state["asked"] == self._asked:
            self._loader.batching.max_tokens = state["used"]
            self._wait, self._num_good, self._has_grown = (state[key] for key in ("wait", "num_good", "has_grown"))
