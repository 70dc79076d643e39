"""A frozen weight that is divided among processes: what this process holds of it, and what all hold together.

Each tensor of the weight is cut along its first dimension into as many runs as there are processes, all but the last
equally long, as torch's `fully_shard` does it. Where block scales do not cross rows, that dimension counts rows, so
that a process can compute what belongs to its rows alone, such as their norms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from qdora.adapter.dora import squared_row_norm
from qdora.quant.codebooks import NESTED_BLOCK_SIZE
from qdora.quant.packed import PackedWeight, block_scales
from qdora.quant.tiles import Weight, wide_dtype


class RowShare:
    """The part of one frozen weight that this process holds.

    Args:
        form: The weight, of which only the double quantised scales' own tensors are read (`PackedWeight.nested`);
            the others may be on the meta device.
        keep_bits: The mask by which it was pruned, or None; only its shape is read.
        group: The processes among which the weight is divided.
    Attributes:
        by_rows: Whether each process holds whole rows. If not, a process can compute nothing from its part.
        parts: Name -> this process's part of the tensor, cut along its first dimension; a DTensor once it is sharded.
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
            return {name: part.to_local() if isinstance(part, DTensor) else part for name, part in self.parts.items()}

    def cut(self, tensor: Tensor) -> Tensor:
        """A view of a tensor of the weight whose first dimension is cut: its rows, or the flat tensor."""
        return tensor.reshape(self.out_features, -1) if self.by_rows else tensor.reshape(-1)

    def mine(self, tensor: Tensor) -> Tensor:
        """This process's part of a `cut` tensor, a view; perhaps empty."""
        return tensor[span(len(tensor), self.rank, self.size)]

    @property
    def rows(self) -> slice:
        """The rows of this process, perhaps none."""
        assert self.by_rows, "the parts of this weight are not rows"
        return span(self.out_features, self.rank, self.size)

    def weight(self) -> Weight:
        """The rows of this process as a weight of their own, with decoded block scales."""
        if isinstance(self.form, Tensor):
            return self.local["weight"]
        shape = (self.rows.stop - self.rows.start, self.form.shape[1])
        packed, absmax = self.local["packed"], self.local["absmax"].reshape(-1)
        if self.form.kind != "int8":
            packed = packed.reshape(-1)
        if self.form.nested is not None:
            absmax = self._decoded(absmax)
        return PackedWeight(self.form.kind, shape, self.form.block_size, packed, absmax)

    def keep_bits(self) -> Tensor:
        """`quant.sparsity.mask_bits` of the rows of this process."""
        return self.local["keep_bits"].reshape(-1)

    def _decoded(self, codes: Tensor) -> Tensor:
        """The block scales of this process's rows: a group of 256 of them may begin in another process's rows."""
        assert isinstance(self.form, PackedWeight)
        nested = self.form.nested
        assert nested is not None
        first = self.rows.start * (self.form.shape[1] // self.form.block_size)
        skipped = first % NESTED_BLOCK_SIZE
        nested = replace(nested, absmax=nested.absmax[first // NESTED_BLOCK_SIZE :])
        codes = torch.nn.functional.pad(codes, (skipped, 0))
        return block_scales(replace(self.form, absmax=codes, nested=nested), slice(skipped, None))

    def whole(self) -> tuple[Weight, Tensor | None]:
        """The weight and its mask, gathered from all processes, which must all call this; new tensors."""
        found = {}
        for name, part in self.local.items():
            found[name] = gather_runs([part], [self._length(name)], self.group)[0]
        bits = found.pop("keep_bits", None)
        bits = None if bits is None else bits.reshape(-1)
        if isinstance(self.form, Tensor):
            return found["weight"].view(self.form.shape), bits
        packed = found["packed"] if self.form.kind == "int8" else found["packed"].reshape(-1)
        absmax = found["absmax"].reshape(-1)
        form = self.form
        return PackedWeight(form.kind, form.shape, form.block_size, packed, absmax, nested=form.nested), bits

    def _length(self, name: str) -> int:
        """First dimension of a whole cut tensor."""
        if self.by_rows:
            return self.out_features
        if name == "keep_bits":
            return -(-self.form.shape[0] * self.form.shape[1] // 8)
        return self.form.numel() if isinstance(self.form, Tensor) else self.form.tensors()[name].numel()

    def squared_row_norm(self) -> Tensor:
        """`adapter.dora.squared_row_norm` of the whole weight, which all processes must ask for together."""
        if not self.by_rows:
            return squared_row_norm(self.whole()[0])
        weight = self.weight()
        empty = torch.empty(0, dtype=wide_dtype(weight), device=weight.device)
        mine = squared_row_norm(weight) if weight.shape[0] else empty
        return gather_runs([mine], [self.out_features], self.group)[0]


def is_cut_by_rows(form: Weight, *, masked: bool) -> bool:
    """Whether block scales and bits of a mask end with each row, so that a process can hold whole rows."""
    whole_blocks = isinstance(form, Tensor) or form.kind == "int8" or form.shape[1] % form.block_size == 0
    return whole_blocks and (not masked or form.shape[1] % 8 == 0)


def divided_tensors(weight: Weight, keep_bits: Tensor | None) -> dict[str, Tensor]:
    """Name -> tensor that processes divide, of a weight and its mask; scales of double quantised scales stay whole."""
    found = {"weight": weight} if isinstance(weight, Tensor) else {"packed": weight.packed, "absmax": weight.absmax}
    return found if keep_bits is None else found | {"keep_bits": keep_bits}


def span(length: int, rank: int, size: int) -> slice:
    """The run of process `rank` where `length` things are divided among `size`; torch.chunk cuts the same way."""
    step = -(-length // size)
    return slice(min(rank * step, length), min((rank + 1) * step, length))


@torch.no_grad()
def gather_runs(parts: Sequence[Tensor], lengths: Sequence[int], group: dist.ProcessGroup) -> list[Tensor]:
    """Join the parts of some tensors that all processes hold, in one collective.

    Args:
        parts: This process's `span` of each tensor, of one dtype and device: (n,) or (n, columns).
        lengths: Length of the first dimension of each whole tensor.
    Returns: The whole tensors.
    """
    size = group.size()
    columns = [part.shape[1:].numel() for part in parts]
    steps = [-(-length // size) * width for length, width in zip(lengths, columns, strict=True)]
    mine = parts[0].new_zeros(sum(steps))
    for part, room in zip(parts, torch.split(mine, steps), strict=True):
        room[: part.numel()] = part.reshape(-1)
    every = mine.new_empty(size, len(mine))
    dist.all_gather(list(every.unbind(0)), mine, group=group)
    found = []
    for part, length, run in zip(parts, lengths, torch.split(every, steps, dim=1), strict=True):
        whole = run.reshape(-1)[: length * part.shape[1:].numel()]
        found.append(whole.view(length, *part.shape[1:]))
    return found
