"""The inputs of checkpointed blocks, kept in the host's memory between the forward and the backward pass.

A checkpoint keeps one tensor a block, its input. It is copied out while the block computes, and back while the block
behind it goes through its backward pass, in the reverse order; the device holds the last two or three.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from transformers import PreTrainedModel

from qdora.errors import RunFailure, UserError
from qdora.model.load import block_list

# Smaller inputs are masks and positions.
_LEAST_BYTES = 1 << 16


class Away(Protocol):
    """A tensor that is on its way to the host, there, or on its way back."""

    def fetch(self) -> None:
        """Begin to bring it back, unless that has begun."""

    def take(self) -> Tensor:
        """The tensor on the device, for what is computed from now on; only once."""


class CudaHost:
    """Pinned buffers, and a stream on which tensors go out and come back in the order in which they are asked to.

    Args:
        device: Where the tensors belong.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._free: dict[tuple[torch.Size, torch.dtype], list[Tensor]] = {}

    def __call__(self, tensor: Tensor) -> Away:
        """Begin to copy a tensor out."""
        free = self._free.setdefault((tensor.shape, tensor.dtype), [])
        buffer = free.pop() if free else _pinned(tensor)
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            buffer.copy_(tensor, non_blocking=True)
        # Nobody else may get the memory before it has been copied.
        tensor.record_stream(self.stream)
        return _OnHost(self, buffer, free)


def _pinned(like: Tensor) -> Tensor:
    try:
        return torch.empty(like.shape, dtype=like.dtype, pin_memory=True)
    except RuntimeError as error:
        size, reason = like.nbytes / 2**20, str(error).splitlines()[0]
        raise RunFailure(
            f"memory.offload_activations: the system gives no {size:.0f} MiB of pinned host memory ({reason})."
        ) from error


class _OnHost:
    def __init__(self, host: CudaHost, buffer: Tensor, free: list[Tensor]) -> None:
        self.host, self.buffer, self.free = host, buffer, free
        self.back: Tensor | None = None
        self.arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def fetch(self) -> None:
        if self.back is None:
            with torch.cuda.stream(self.host.stream):
                self.back = torch.empty_like(self.buffer, device=self.host.device)
                self.back.copy_(self.buffer, non_blocking=True)
                self.arrived.record(self.host.stream)

    def take(self) -> Tensor:
        self.fetch()
        assert self.back is not None
        back, stream = self.back, torch.cuda.current_stream(self.host.device)
        stream.wait_event(self.arrived)
        back.record_stream(stream)
        # The next tensor that goes into the buffer does so on the same stream, behind this copy.
        self.free.append(self.buffer)
        return back


@dataclass
class _Kept:
    """A block's input between its passes; None once it was taken."""

    block: int
    away: Away | None


class ActivationOffload:
    """Keeps the checkpoints of a model's blocks in the host's memory, all but the last one, which is read at once.

    Args:
        model: With checkpointing that is not reentrant.
        send: Begins to copy a tensor out; by default a `CudaHost` of the model's device.
    Raises:
        UserError: A model without a list of blocks that are checkpointed.
    """

    def __init__(self, model: PreTrainedModel, send: Callable[[Tensor], Away] | None = None) -> None:
        found = block_list(model)
        if found is None:
            raise UserError(
                f"memory.offload_activations: {model.config.model_type} has no list of blocks that are checkpointed, "
                "allowed: false."
            )
        self._send = send or CudaHost(model.device)
        self._kept: dict[int, _Kept] = {}
        self.num_sent = 0
        for index, block in enumerate(list(found[1])[:-1]):
            plain: Any = block._gradient_checkpointing_func
            block._gradient_checkpointing_func = partial(self._checkpoint, index, plain)  # type: ignore[assignment]

    def _checkpoint(self, block: int, plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A block's checkpoint, whose inputs are saved by way of the host; hooks inside it are the checkpoint's own."""
        with saved_tensors_hooks(partial(self._out, block), self._back):
            return plain(*args, **kwargs)

    def _out(self, block: int, tensor: Tensor) -> Tensor | _Kept:
        if tensor.nbytes < _LEAST_BYTES or not tensor.is_floating_point():
            return tensor
        kept = self._kept[block] = _Kept(block, self._send(tensor.detach()))
        self.num_sent += 1
        return kept

    def _back(self, kept: Tensor | _Kept) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        if kept.away is None:
            raise RunFailure(
                "memory.offload_activations: a second backward pass through the same graph is not possible."
            )
        tensor, kept.away = kept.away.take(), None
        before = self._kept.get(kept.block - 1)
        if before is not None and before.away is not None:
            before.away.fetch()
        return tensor
