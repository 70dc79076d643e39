"""The input embedding in the host's memory: a GPU gets the rows of its tokens, not the table."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class HostEmbedding(nn.Module):
    """A frozen embedding whose table stays on the CPU and whose rows go to `device`.

    Attributes:
        weight: The table (words, features): a buffer, which `model.to` casts but does not move; on "meta" until it is
            read.
        rows: An empty parameter, (0,), with the dtype and the device of the rows. transformers reads the dtype and the
            device of a model from its first parameter, which would be the table. It is in no file.
    """

    weight: Tensor
    away = ("weight",)

    def __init__(self, weight: Tensor, device: torch.device) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.rows = nn.Parameter(torch.empty(0, dtype=weight.dtype, device=device), requires_grad=False)

    @property
    def device(self) -> torch.device:
        """Where the rows go."""
        return self.rows.device

    def forward(self, ids: Tensor) -> Tensor:
        """(...) token ids, on any device, to (..., features) on `device`.

        The host waits for ids of a GPU, which `ids_on_host` avoids. The rows leave from pinned memory, without a wait.
        """
        rows = functional.embedding(ids.to(self.weight.device), self.weight)
        if self.device.type in ("cpu", "meta"):
            return rows.to(self.device)
        return rows.pin_memory().to(self.device, non_blocking=True)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> HostEmbedding:
        weight = self._buffers.pop("weight")
        assert weight is not None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._buffers["weight"] = weight.to(self.rows.dtype)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        del destination[f"{prefix}rows"]

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        super()._load_from_state_dict({**state_dict, f"{prefix}rows": self.rows.detach()}, prefix, *args)


@contextmanager
def ids_on_host(model: Any, ids: Tensor) -> Iterator[None]:
    """Inside, an input embedding on the host looks up these ids, of the CPU, in place of the same ones of a GPU."""
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    embedding = getattr(embedding, "base", embedding)
    if not isinstance(embedding, HostEmbedding):
        yield
        return
    with embedding.register_forward_pre_hook(lambda _module, _args: (ids,)):
        yield
