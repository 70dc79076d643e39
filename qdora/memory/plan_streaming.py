"""What a plan saves and spends where blocks are not on the device: arithmetic on the sizes of their packed tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedModel

from qdora.memory.host_residency import Piece, pinned_bytes
from qdora.memory.plan import BASE, CHECKPOINTS, DENSE, SCALES, STREAMING, Moment
from qdora.memory.turns import Turns
from qdora.model.load import Quantization, layers_to_quantize
from qdora.ops.packed import empty_packed

NUM_SLOTS = 2
"""Blocks that are there at a time, as in both residencies."""


@dataclass(frozen=True)
class StreamedBlocks:
    """The blocks that take turns.

    Attributes:
        num_streamed: How many.
        codes, scales: Bytes of their packed tensors, all together.
        block_bytes: Of the largest block, in one piece.
        host_bytes: Of pinned host memory, as torch's allocator takes it; 0 for blocks on disk.
    """

    num_streamed: int
    codes: int
    scales: int
    block_bytes: int
    host_bytes: int

    @property
    def slot_bytes(self) -> int:
        """What they need on the device."""
        return NUM_SLOTS * self.block_bytes


def streamed_blocks(
    model: PreTrainedModel, wanted: Quantization, residency: Literal["host", "disk"], num_streamed: int | None
) -> StreamedBlocks:
    """Sizes of the blocks of a model that take turns.

    Args:
        model: Its parameters on the meta device, its linear layers in place.
        wanted: How they are held.
        residency: Where the blocks live.
        num_streamed: How many; None for all.
    Raises:
        UserError: See `Turns`.
    """
    turns = Turns(model, num_streamed)
    pieces = [Piece() for _ in range(len(turns))]
    codes = scales = 0
    for path in layers_to_quantize(model, wanted):
        turn = turns.of(path)
        if turn is None:
            continue
        rows, columns = model.get_submodule(path).weight.shape
        packed = empty_packed(wanted.kind, (rows, columns), wanted.block_size, wanted.double_quant, "meta")
        pieces[turn].add(path, packed)
        codes += packed.packed.nbytes
        scales += packed.num_bytes - packed.packed.nbytes
    sizes = [piece.num_bytes for piece in pieces]
    host = sum(map(pinned_bytes, sizes)) if residency == "host" else 0
    return StreamedBlocks(len(turns), codes, scales, max(sizes, default=0), host)


def with_streamed(moments: Sequence[Moment], streamed: StreamedBlocks) -> list[Moment]:
    """The moments of a step of the same model with these blocks away: their bytes less, and the slots."""
    found = []
    for moment in moments:
        sizes = dict(moment.by_component)
        sizes[BASE] -= streamed.codes
        sizes[SCALES] -= streamed.scales
        sizes[STREAMING] = streamed.slot_bytes
        found.append(Moment(moment.phase, moment.block, {name: size for name, size in sizes.items() if size}))
    return found


def without_embedding(moments: Sequence[Moment], num_bytes: int) -> list[Moment]:
    """The moments of a step of the same model whose input embedding, so many bytes, is on the host."""
    return [
        Moment(
            moment.phase, moment.block, {**moment.by_component, DENSE: moment.by_component.get(DENSE, 0) - num_bytes}
        )
        for moment in moments
    ]


def with_offloaded(moments: Sequence[Moment], num_blocks: int) -> tuple[list[Moment], int]:
    """The moments of a step whose checkpoints are on the host, and the pinned memory that takes.

    On the device are the input of the block in its backward pass, the one that is fetched meanwhile, and the last one.
    """
    largest = max((moment.by_component.get(CHECKPOINTS, 0) for moment in moments), default=0)
    each = largest // max(num_blocks, 1)
    found = []
    for moment in moments:
        sizes = dict(moment.by_component)
        sizes[CHECKPOINTS] = min(sizes.get(CHECKPOINTS, 0), 3 * each)
        found.append(Moment(moment.phase, moment.block, {name: size for name, size in sizes.items() if size}))
    return found, pinned_bytes(each) * max(num_blocks - 1, 0)
