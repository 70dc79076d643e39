"""A packed base that stays on disk: its files are mapped into memory, read for a computation and dropped after it.

For machines without a GPU and with less memory than the packed base. The tensors of a layer are views of the files at
any time, so nothing can read a wrong weight; only the pages behind the views are loaded and dropped.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from qdora.errors import UserError
from qdora.memory.streaming import Turns
from qdora.model.load import Loading, place_dense, place_frozen
from qdora.model.packed_base import BaseCache, PackedBase, Part
from qdora.ops.packed import PackedWeight

# Smaller tensors are copied, since dropping the rest of a page would save nothing.
_LEAST_MAPPED_BYTES = 1 << 20


class DiskResidency:
    """A `Placer` that leaves the packed blocks, the embeddings and the head in the files of a packed base.

    `cache` is the `Reader` of the same load, with `mapped`. `num_streamed` blocks stay on disk, spread evenly among the
    others; None for all.
    """

    def __init__(self, cache: BaseCache, num_streamed: int | None = None) -> None:
        assert cache.mapped, "the weights must stay in the files"
        self.cache, self.num_streamed = cache, num_streamed

    def __call__(self, load: Loading) -> None:
        """Put the weights into the model.

        Raises UserError: Another device than the CPU, a model without a list of blocks, more blocks than it has.
        """
        model, device, progress = load.model, load.device, load.progress
        if device.type != "cpu":
            raise UserError("base.residency: must be one of device, host on a GPU, got disk.")
        base = self.cache.base
        assert base is not None, "the weights are read before they are placed"
        turns = Turns(model, self.num_streamed)
        blocks: list[list[Part]] = [[] for _ in range(len(turns))]
        others: list[Part] = []
        for done, (name, item) in enumerate(load.stored.items(), start=1):
            path, _, leaf = name.rpartition(".")
            turn, value = turns.of(name), item.read()
            if isinstance(value, PackedWeight) and turn is not None:
                turns.add(place_frozen(model, path, value), turn)
                blocks[turn] += base.parts(name)
            elif isinstance(value, PackedWeight):
                place_frozen(model, path, value.clone())
                _drop(base, name)
            else:
                dtype = load.dtype_of(name)
                if value.dtype == dtype and value.nbytes >= _LEAST_MAPPED_BYTES:
                    setattr(model.get_submodule(path), leaf, nn.Parameter(value, requires_grad=False))
                    others += base.parts(name)
                else:
                    place_dense(model.get_submodule(path), leaf, value, device, dtype)
                    _drop(base, name)
            del value
            if progress is not None:
                progress(done, len(load.stored))
        turns.start(_Pages(blocks, others))


class _Pages:
    """A copy engine without copies: it asks the system for the pages of a block, and drops those of another."""

    def __init__(self, blocks: Sequence[Sequence[Part]], others: Sequence[Part]) -> None:
        self.blocks, self.others = blocks, others

    def start(self, block: int, slot: int, previous: int | None) -> None:
        for part in [*(() if previous is None else self.blocks[previous]), *self.others]:
            part.file.drop(part.name)
        for part in self.blocks[block]:
            part.file.fetch(part.name)

    def wait(self, slot: int) -> None:
        """Nothing to do: reading a page waits for it."""

    def release(self, slot: int) -> None:
        """Nothing to do: on a CPU issued work is done."""


def _drop(base: PackedBase, name: str) -> None:
    for part in base.parts(name):
        part.file.drop(part.name)
