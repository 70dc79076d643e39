"""What a plan saves and spends when blocks, checkpoints or the embedding are not on the device, from sizes alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedModel

from qdora.memory.host_residency import Piece, pinned_bytes
from qdora.memory.streaming import NUM_SLOTS, Turns
from qdora.model.load import Quantization, layers_to_quantize
from qdora.ops.packed import empty_packed
from qdora.plan.plan_contents import BASE, CHECKPOINTS, DENSE, SCALES, STREAMING, Moment


@dataclass(frozen=True)
class StreamedBlocks:
    """Sizes of the streamed blocks: bytes of all packed tensors (`codes`, `scales`), of the largest block in one piece,
    and of pinned host memory, as torch's allocator rounds it (0 for blocks on disk).
    """

    num_streamed: int
    codes: int
    scales: int
    block_bytes: int
    host_bytes: int

    @property
    def slot_bytes(self) -> int:
        """Bytes of the slots on the device."""
        return NUM_SLOTS * self.block_bytes


def streamed_blocks(
    model: PreTrainedModel, wanted: Quantization, residency: Literal["host", "disk"], num_streamed: int | None
) -> StreamedBlocks:
    """Sizes of the streamed blocks of a model on the meta device, whose linear layers are not yet replaced.

    `num_streamed` None is all blocks; UserError if the model has fewer.
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
    """The moments with these blocks off the device: without their bytes, but with the slots."""
    return [
        _changed(
            moment,
            {
                BASE: moment.by_component[BASE] - streamed.codes,
                SCALES: moment.by_component[SCALES] - streamed.scales,
                STREAMING: streamed.slot_bytes,
            },
        )
        for moment in moments
    ]


def without_embedding(moments: Sequence[Moment], num_bytes: int) -> list[Moment]:
    """The moments with the input embedding, of `num_bytes`, on the host."""
    return [_changed(moment, {DENSE: moment.by_component.get(DENSE, 0) - num_bytes}) for moment in moments]


def with_offloaded(moments: Sequence[Moment], num_blocks: int) -> tuple[list[Moment], int]:
    """The moments with checkpoints on the host, and the pinned memory that these take.

    Three checkpoints are on the device: that of the block in its backward pass, the next one, which is being copied,
    and the last one.
    """
    largest = max((moment.by_component.get(CHECKPOINTS, 0) for moment in moments), default=0)
    each = largest // max(num_blocks, 1)
    found = [
        _changed(moment, {CHECKPOINTS: min(moment.by_component.get(CHECKPOINTS, 0), 3 * each)}) for moment in moments
    ]
    return found, pinned_bytes(each) * max(num_blocks - 1, 0)


def _changed(moment: Moment, sizes: Mapping[str, int]) -> Moment:
    """A moment with other sizes of some components; components without bytes are left out."""
    merged = {**moment.by_component, **sizes}
    return Moment(moment.phase, moment.block, {name: size for name, size in merged.items() if size})
