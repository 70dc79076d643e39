"""An embedding, or an output head, of which some rows are trained: a small tensor of those rows on a frozen matrix.

A masked gradient on the whole matrix would take its size again in gradients and optimizer states, and decay or rounding
could move the other rows. Here they are not trainable at all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from qdora.adapter.host_embedding import HostEmbedding
from qdora.adapter.wide_tensors import never_narrowed


class TrainedRows(nn.Module):
    """The trained rows of a matrix; a tied head shares them with the embedding.

    `rows` is float32 whatever the dtype of the matrix, and stays so when the model is cast: in bf16 small updates would
    be rounded away. They are in a module of their own, behind the base: transformers takes a model's dtype from its
    first parameter.

    Args:
        ids: Ascending token ids, in the order of `rows`.
        rows: (len(ids), features), float32.
    """

    ids: Tensor

    def __init__(self, ids: Sequence[int], rows: Tensor) -> None:
        super().__init__()
        self.rows = nn.Parameter(rows)
        self.register_buffer("ids", torch.tensor(ids, device=rows.device), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TrainedRows:
        with never_narrowed(self, ("rows",)):
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self


class RowEmbedding(nn.Module):
    """An embedding that takes some rows from `trained`, and all others from its frozen base.

    Only the rows that a batch asks for are cast. A base that scales its output by `embed_scale` (Gemma) scales the
    trained rows, too. `base` is nn.Embedding, a subclass with `embed_scale`, or HostEmbedding.
    """

    def __init__(self, base: nn.Module, trained: TrainedRows) -> None:
        super().__init__()
        self.base, self.trained = base, trained

    @property
    def device(self) -> torch.device:
        """Where the rows go."""
        return self.trained.rows.device

    @property
    def weight(self) -> Tensor:
        """The whole matrix in the base's dtype: a copy, for models that read the weight; see `merged_rows`."""
        return merged_rows(self).to(self.base.weight.dtype)  # type: ignore[arg-type]

    def forward(self, ids: Tensor) -> Tensor:
        """(...) token ids to (..., features) in the base's dtype."""
        found: Tensor = self.base(ids)
        known, ids = self.trained.ids, ids.to(self.trained.ids.device)
        place = torch.searchsorted(known, ids).clamp_(max=len(known) - 1)
        # Summed in float32 in the backward pass: a token may be in a batch hundreds of times.
        mine = functional.embedding(place, self.trained.rows).to(found.dtype)
        scale = getattr(self.base, "embed_scale", None)
        if scale is not None:
            mine = mine * torch.as_tensor(scale, device=mine.device).to(mine.dtype)
        return torch.where((known[place] == ids).unsqueeze(-1), mine, found)


class RowHead(nn.Module):
    """An output head without bias that takes some logits from the rows `trained`, and all others from its base."""

    def __init__(self, base: nn.Linear, trained: TrainedRows) -> None:
        super().__init__()
        self.base, self.trained = base, trained
        self.in_features, self.out_features, self.bias = base.in_features, base.out_features, None

    @property
    def weight(self) -> Tensor:
        """The whole matrix in the base's dtype: a copy, for models that read the weight; see `merged_rows`."""
        return merged_rows(self).to(self.base.weight.dtype)

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., features) to (..., vocabulary) in the dtype of `hidden`."""
        logits: Tensor = self.base(hidden)
        mine = functional.linear(hidden, self.trained.rows.to(hidden.dtype))
        # In place: another copy of the logits would be the largest tensor of a step.
        return logits.index_copy_(-1, self.trained.ids, mine)


@torch.no_grad()
def merged_rows(module: RowEmbedding | RowHead) -> Tensor:
    """The matrix (vocabulary, features) with the trained rows in their places: a float32 copy, on the base's device."""
    base: nn.Embedding | nn.Linear | HostEmbedding = module.base  # type: ignore[assignment]
    return with_rows(base.weight, module.trained.ids.tolist(), module.trained.rows)


@torch.no_grad()
def with_rows(weight: Tensor, ids: Sequence[int], rows: Tensor) -> Tensor:
    """A float32 copy of `weight` (vocabulary, features), in which the rows `ids` are `rows`."""
    merged = weight.detach().to(torch.float32, copy=True)
    merged[list(ids)] = rows.detach().to(merged)
    return merged
