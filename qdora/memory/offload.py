"""Activation offload: the inputs of checkpointed blocks, kept in the host's memory between forward and backward pass.

A checkpoint keeps one tensor a block, its input. It is copied out while the block computes, and back during the
backward pass of the block behind it; the device holds the last two or three.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from transformers import PreTrainedModel

from qdora.errors import RunFailure, UserError, first_line
from qdora.files.machine import available_memory_bytes
from qdora.model.load import block_list

# Smaller inputs are masks and positions.
_LEAST_BYTES = 1 << 16
# Small beside a block's input (16 MiB at 2,048 tokens of width 4,096), and 80 microseconds of copying.
_PAGE_BYTES = 1 << 21
_PAGES_AT_ONCE = 8
# Tensors that are being copied out: copies have as long as two blocks compute.
_MOST_LEAVING = 2


class Away(Protocol):
    """A tensor on its way to the host, there, or on its way back."""

    def fetch(self) -> None:
        """Begin to bring it back, unless that has begun."""

    def take(self) -> Tensor:
        """The tensor on the device, for later work; only once."""


class PinnedPages:
    """Pinned host memory in pages of one size, which serve tensors of any shape.

    A pool per shape would hold the need of every length of micro-batch at once, and torch's pinned allocator rounds a
    size up to a power of 2. Here the memory is the largest need there was, and at most a page more for each tensor.
    """

    def __init__(self) -> None:
        self._free: list[Tensor] = []

    def take(self, num_bytes: int) -> list[Tensor]:
        """Pages (_PAGE_BYTES,) uint8 that hold `num_bytes` together. Raises RunFailure if the system has no more."""
        count = _num_pages(num_bytes)
        while len(self._free) < count:
            self._free += torch.split(_pinned(_PAGE_BYTES * _PAGES_AT_ONCE), _PAGE_BYTES)
        pages = self._free[-count:]
        del self._free[-count:]
        return pages

    def give(self, pages: list[Tensor]) -> None:
        """Take pages back, for other tensors."""
        self._free += pages


def _num_pages(num_bytes: int) -> int:
    return -(-num_bytes // _PAGE_BYTES)


def pages_bytes(num_bytes: int, count: int) -> int:
    """Pinned memory that `PinnedPages` takes for `count` tensors of `num_bytes` at once."""
    return -(-_num_pages(num_bytes) * count // _PAGES_AT_ONCE) * _PAGES_AT_ONCE * _PAGE_BYTES


def _pinned(num_bytes: int) -> Tensor:
    reason = "too little is free"  # beyond its limit, a container's process would be ended by SIGKILL
    if available_memory_bytes() >= num_bytes:
        try:
            return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
        except RuntimeError as error:
            reason = first_line(error)
    size = num_bytes / 2**20
    raise RunFailure(f"memory.offload_activations: the system refuses {size:.0f} MiB of pinned host memory ({reason}).")


def _copy(target: Iterable[Tensor], source: Iterable[Tensor]) -> None:
    """Begin to copy pieces of bytes into pieces; a page may be longer than the last one."""
    for into, out_of in zip(target, source, strict=True):
        size = min(into.numel(), out_of.numel())
        into[:size].copy_(out_of[:size], non_blocking=True)


class CudaHost:
    """Pinned pages for tensors of `device`, and a stream on which tensors go out and come back in call order.

    All tensors belong to the stream that computes, and it waits for a copy before it gives memory away that the copy
    uses. With `record_stream` in place of that, memory would be free only once the GPU has got there, and a host that
    runs ahead would take new memory for each block meanwhile.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.pages = PinnedPages()
        self.leaving: deque[tuple[Tensor, torch.cuda.Event]] = deque()
        """Tensors that are being copied out, and the ends of their copies."""

    @property
    def computing(self) -> torch.cuda.Stream:
        """The stream that computes."""
        return torch.cuda.current_stream(self.device)

    def __call__(self, tensor: Tensor) -> Away:
        """Begin to copy a tensor out."""
        flat = tensor.reshape(-1)  # a copy if it is not contiguous
        pages = self.pages.take(flat.nbytes)
        self.stream.wait_stream(self.computing)
        left = torch.cuda.Event()  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self.stream):
            _copy(pages, torch.split(flat.view(torch.uint8), _PAGE_BYTES))
            left.record(self.stream)
        self.leaving.append((flat, left))
        self.let_go(_MOST_LEAVING)
        return _OnHost(self, pages, tensor.shape, tensor.dtype)

    def let_go(self, most: int) -> None:
        """Free the memory of all but the last tensors that are being copied out, for what is computed after them."""
        while len(self.leaving) > most:
            self.computing.wait_event(self.leaving.popleft()[1])


class _OnHost:
    def __init__(self, host: CudaHost, pages: list[Tensor], shape: torch.Size, dtype: torch.dtype) -> None:
        self.host, self.pages, self.shape, self.dtype = host, pages, shape, dtype
        self.back: Tensor | None = None
        self.arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def fetch(self) -> None:
        if self.back is None:
            self.back = torch.empty(self.shape, dtype=self.dtype, device=self.host.device)
            self.host.stream.wait_stream(self.host.computing)  # it may still use what was in this memory
            with torch.cuda.stream(self.host.stream):
                _copy(torch.split(self.back.view(-1).view(torch.uint8), _PAGE_BYTES), self.pages)
                self.arrived.record(self.host.stream)

    def take(self) -> Tensor:
        self.fetch()
        back = self.back
        assert back is not None
        self._end()
        return back

    def _end(self) -> None:
        """Give the pages back: the next tensor is copied into them on the same stream, behind this one."""
        if self.back is not None:
            self.host.computing.wait_event(self.arrived)
            self.host.let_go(0)
            self.back = None
        self.host.pages.give(self.pages)
        self.pages = []

    def __del__(self) -> None:
        """A pass that was broken off takes nothing back."""
        if self.pages:
            self._end()


@dataclass
class _Kept:
    """A block's input between its passes; `away` is None after it was taken."""

    block: int
    away: Away | None


class ActivationOffload:
    """Keeps the checkpoints of a model's blocks in the host's memory, all but the last one, which is read at once.

    The checkpointing must not be reentrant. `send` begins to copy a tensor out (default: a `CudaHost` of the model's
    device).

    Raises UserError: A model without a list of blocks that are checkpointed.
    """

    def __init__(self, model: PreTrainedModel, send: Callable[[Tensor], Away] | None = None) -> None:
        found = block_list(model)
        if found is None:
            raise UserError(
                f"memory.offload_activations: must be false, since {model.config.model_type} has no list of blocks "
                "that are checkpointed."
            )
        self._send = send or CudaHost(model.device)
        self._kept: dict[int, _Kept] = {}
        for index, block in enumerate(list(found[1])[:-1]):
            plain: Any = block._gradient_checkpointing_func
            block._gradient_checkpointing_func = partial(self._checkpoint, index, plain)  # type: ignore[assignment]

    def _checkpoint(self, block: int, plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A block's checkpoint with its inputs saved on the host; the checkpoint's own hooks apply inside the block."""
        with saved_tensors_hooks(partial(self._out, block), self._back):
            return plain(*args, **kwargs)

    def _out(self, block: int, tensor: Tensor) -> Tensor | _Kept:
        if tensor.nbytes < _LEAST_BYTES or not tensor.is_floating_point():
            return tensor
        self._kept.pop(block, None)  # gives its pages back if its pass was broken off
        kept = self._kept[block] = _Kept(block, self._send(tensor.detach()))
        return kept

    def _back(self, kept: Tensor | _Kept) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        if kept.away is None:
            raise RunFailure("memory.offload_activations: a graph allows only one backward pass.")
        tensor, kept.away = kept.away.take(), None
        before = self._kept.get(kept.block - 1)
        if before is not None and before.away is not None:
            before.away.fetch()
        return tensor
