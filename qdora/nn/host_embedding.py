"""The input embedding in the host's memory: a GPU gets the rows that its tokens ask for, not the table."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional


class HostEmbedding(nn.Module):
    """Rows of a frozen table that stays on the CPU, on `device`.

    The table is a buffer: a model's parameters say where it computes, and `model.to` moves it elsewhere, but not this.

    Args:
        weight: (words, features); on the meta device until it is read.
        device: Where the rows go.
    """

    weight: Tensor
    away = ("weight",)

    def __init__(self, weight: Tensor, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.register_buffer("weight", weight)

    def forward(self, ids: Tensor) -> Tensor:
        """(...) token ids, on any device, to (..., features) on `device`. Waits for the ids of a GPU."""
        return functional.embedding(ids.to(self.weight.device), self.weight).to(self.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> HostEmbedding:
        weight = self._buffers.pop("weight")
        assert weight is not None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        changed = fn(weight.new_empty(0))
        self.device = changed.device
        self._buffers["weight"] = weight.to(changed.dtype)
        return self
