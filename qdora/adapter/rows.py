"""Rows of a matrix: those of an embedding that are trained, and those of a frozen weight that this process holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional

from qdora.adapter.algebra import squared_row_norm
from qdora.quant.codebooks import NESTED_BLOCK_SIZE
from qdora.quant.packed import PackedWeight, block_scales
from qdora.quant.tiles import Weight, wide_dtype


def never_narrowed(
    fn: Callable[[Tensor], Tensor], tensors: Sequence[Tensor | None], *, may_widen: bool = True
) -> Callable[[Tensor], Tensor]:
    """The `fn` of a module's `_apply` for which these tensors may move and widen, but no cast narrows them."""
    held = {id(tensor) for tensor in tensors}

    def moved(tensor: Tensor) -> Tensor:
        found = fn(tensor)
        is_right = found.dtype.itemsize >= tensor.dtype.itemsize if may_widen else found.dtype == tensor.dtype
        return found if is_right or id(tensor) not in held else tensor.to(found.device)

    return moved


class TrainedRows(nn.Module):
    """The trained rows of an embedding or an output head; a tied head shares them with the embedding.

    A masked gradient on the whole matrix would take its size in gradients and optimizer states. `rows`, (len(ids),
    features), in the order of the ascending token `ids`, stays float32 when the model is cast: bf16 rounds small
    updates away.
    """

    ids: Tensor

    def __init__(self, ids: Sequence[int], rows: Tensor) -> None:
        super().__init__()
        self.rows = nn.Parameter(rows)
        self.register_buffer("ids", torch.tensor(ids, device=rows.device), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TrainedRows:
        super()._apply(never_narrowed(fn, [self.rows]), recurse)  # type: ignore[no-untyped-call]
        return self


class RowEmbedding(nn.Module):
    """An embedding with some rows from `trained`, the others from its frozen base: nn.Embedding, or a subclass with
    `embed_scale` (Gemma), which scales the trained rows, too."""

    def __init__(self, base: nn.Module, trained: TrainedRows) -> None:
        super().__init__()
        self.base, self.trained = base, trained

    @property
    def weight(self) -> Tensor:
        """The whole matrix in the base's dtype: a copy."""
        return merged_rows(self).to(self.base.weight.dtype)  # type: ignore[arg-type]

    def forward(self, ids: Tensor) -> Tensor:
        """(...) token ids to (..., features) in the base's dtype."""
        found: Tensor = self.base(ids)
        known, ids = self.trained.ids, ids.to(self.trained.ids.device)
        index = torch.searchsorted(known, ids).clamp_(max=len(known) - 1)
        # Summed in float32 in the backward pass: a token may be in a batch hundreds of times.
        mine = functional.embedding(index, self.trained.rows).to(found.dtype)
        scale = getattr(self.base, "embed_scale", None)
        if scale is not None:
            mine = mine * torch.as_tensor(scale, device=mine.device).to(mine.dtype)
        return torch.where((known[index] == ids).unsqueeze(-1), mine, found)


class RowHead(nn.Module):
    """An output head without bias that takes some logits from the rows `trained`, and all others from its base."""

    def __init__(self, base: nn.Linear, trained: TrainedRows) -> None:
        super().__init__()
        self.base, self.trained = base, trained
        self.in_features, self.out_features, self.bias = base.in_features, base.out_features, None

    @property
    def weight(self) -> Tensor:
        """The whole matrix in the base's dtype: a copy."""
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
    base: nn.Embedding | nn.Linear = module.base  # type: ignore[assignment]
    merged = base.weight.detach().to(torch.float32, copy=True)
    merged[module.trained.ids.tolist()] = module.trained.rows.detach().to(merged)
    return merged


class RowShare:
    """What this process holds of a frozen weight that is divided among processes.

    Each tensor is cut along its first dimension, as torch's `fully_shard` does it. Where block scales do not cross rows
    (`by_rows`), that dimension counts rows, so that a process can compute the norms of its rows.

    Of `form`, the weight, and `keep_bits`, its mask, only shapes and the scales of scales are read. `parts` are name ->
    this process's part; a DTensor once it is sharded.
    """

    def __init__(self, form: Weight, keep_bits: Tensor | None, group: dist.ProcessGroup) -> None:
        self.form, self.keep_bits_form, self.group = form, keep_bits, group
        self.rank, self.size = group.rank(), group.size()
        self.by_rows = is_cut_by_rows(form, masked=keep_bits is not None)
        self.out_features = int(form.shape[0])
        self.parts: dict[str, Tensor] = {}

    @property
    def local(self) -> dict[str, Tensor]:
        """Name -> this process's part of the tensor; perhaps without elements."""
        with torch.no_grad():
            return {
                name: part.to_local() if isinstance(part, DTensor) else part
                for name, part in self.parts.items()
            }

    def cut(self, tensor: Tensor) -> Tensor:
        """A view of a tensor of the weight whose first dimension is cut."""
        return tensor.reshape(self.out_features, -1) if self.by_rows else tensor.reshape(-1)

    def mine(self, tensor: Tensor) -> Tensor:
        """This process's part of a `cut` tensor, a view; perhaps empty."""
        return tensor[span(len(tensor), self.rank, self.size)]

    @property
    def rows(self) -> slice:
        """The rows of this process, perhaps none."""
        return span(self.out_features, self.rank, self.size)

    def weight(self) -> Weight:
        """The rows of this process as a weight of their own, with decoded block scales."""
        if isinstance(self.form, Tensor):
            return self.local["weight"]
        form, rows = self.form, self.rows
        packed, absmax = self.local["packed"], self.local["absmax"].reshape(-1)
        if form.nested_absmax is not None:
            # A group of 256 scales may begin in another process's rows.
            first = rows.start * (form.shape[1] // form.block_size)
            skipped = first % NESTED_BLOCK_SIZE
            nested, codes = (
                form.nested_absmax[first // NESTED_BLOCK_SIZE :],
                functional.pad(absmax, (skipped, 0)),
            )
            absmax = block_scales(replace(form, absmax=codes, nested_absmax=nested), slice(skipped, None))
        shape, packed = (
            (rows.stop - rows.start, form.shape[1]),
            packed if form.kind == "int8" else packed.reshape(-1),
        )
        if form.global_scale is not None:
            absmax = block_scales(replace(form, absmax=absmax))
        zeros = self.local["zeros"].reshape(-1) if "zeros" in self.local else None
        return PackedWeight(form.kind, shape, form.block_size, packed, absmax, zeros=zeros)

    def keep_bits(self) -> Tensor | None:
        """`quant.packed.mask_bits` of the rows of this process; None without a mask."""
        return self.local["keep_bits"].reshape(-1) if "keep_bits" in self.parts else None

    def whole(self) -> tuple[Weight, Tensor | None]:
        """The weight and its mask, gathered from all processes, which must all call this; new tensors."""
        forms = divided_tensors(self.form, self.keep_bits_form)
        found: dict[str, Any] = {
            name: gather_runs([part], [len(self.cut(forms[name]))], self.group)[0].view(forms[name].shape)
            for name, part in self.local.items()
        }
        bits = found.pop("keep_bits", None)
        return found["weight"] if isinstance(self.form, Tensor) else replace(self.form, **found), bits

    def squared_row_norm(self) -> Tensor:
        """`algebra.squared_row_norm` of the whole weight; all processes call this together."""
        if not self.by_rows:
            return squared_row_norm(self.whole()[0])
        weight = self.weight()
        empty = torch.empty(0, dtype=wide_dtype(weight), device=weight.device)
        mine = squared_row_norm(weight) if weight.shape[0] else empty
        return gather_runs([mine], [self.out_features], self.group)[0]


def is_cut_by_rows(form: Weight, *, masked: bool) -> bool:
    """Whether block scales and bits of a mask end with each row."""
    whole_blocks = isinstance(form, Tensor) or form.kind == "int8" or form.shape[1] % form.block_size == 0
    return whole_blocks and (not masked or form.shape[1] % 8 == 0)


def divided_tensors(weight: Weight, keep_bits: Tensor | None) -> dict[str, Tensor]:
    """Name -> tensor that processes divide; the scales of scales stay whole."""
    if isinstance(weight, Tensor):
        found = {"weight": weight}
    else:
        found = {name: each for name, each in weight.tensors().items() if name in ("packed", "absmax", "zeros")}
    return found if keep_bits is None else found | {"keep_bits": keep_bits}


def span(length: int, rank: int, size: int) -> slice:
    """The run of process `rank` where `length` things are divided among `size`; torch.chunk cuts the same way."""
    step = -(-length // size)
    return slice(min(rank * step, length), min((rank + 1) * step, length))


@torch.no_grad()
def gather_runs(parts: Sequence[Tensor], lengths: Sequence[int], group: dist.ProcessGroup) -> list[Tensor]:
    """Join the parts of some tensors in one collective: the whole tensors, whose first dimensions are `lengths`.
    `parts` are this process's `span` of each, of one dtype and device: (n,) or (n, columns)."""
    size = group.size()
    shapes = [torch.Size((length, *part.shape[1:])) for length, part in zip(lengths, parts, strict=True)]
    steps = [-(-shape[0] // size) * shape[1:].numel() for shape in shapes]
    padded = (
        functional.pad(part.reshape(-1), (0, step - part.numel()))
        for part, step in zip(parts, steps, strict=True)
    )
    mine = torch.cat(list(padded))
    every = mine.new_empty(size, len(mine))
    dist.all_gather(list(every.unbind(0)), mine, group=group)
    runs = torch.split(every, steps, dim=1)
    return [run.reshape(-1)[: shape.numel()].view(shape) for run, shape in zip(runs, shapes, strict=True)]
