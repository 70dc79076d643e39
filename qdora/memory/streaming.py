"""Streaming of frozen blocks: which blocks of a model are streamed, and the two slots that they are brought into.

A step uses the blocks in one order forward and in the reverse order backward, where the recomputation of a checkpoint
and the backward pass of a block come one after the other and need one load. One slot holds the block in use, the other
the one that comes next. A copy engine moves the bytes.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Protocol

import torch
from torch import nn
from transformers import PreTrainedModel

from qdora.adapter.frozen_linear import FrozenLinear
from qdora.errors import UserError
from qdora.model.load import block_list

NUM_SLOTS = 2
"""Streamed blocks that are on the device at a time: one is read while the other is filled."""


class CopyEngine(Protocol):
    """Brings blocks into slots while the device computes."""

    def start(self, block: int, slot: int, previous: int | None) -> None:
        """Begin to bring a block into a slot, after the work that was issued before the slot's last `release`.

        Nothing will read the `previous` block in the slot any more.
        """

    def wait(self, slot: int) -> None:
        """Let later work see the block that was last brought into the slot."""

    def release(self, slot: int) -> None:
        """Say that no later work reads the slot's present content."""


class Ring:
    """Two slots in which the blocks of a model, in forward order, take turns, each block always in the same one.

    A checkpoint keeps the graph of the first forward pass, and with it the address of each weight. The backward pass
    reads there, so the recomputation must bring the block to the same place.
    """

    def __init__(self, num_blocks: int, engine: CopyEngine) -> None:
        self.num_blocks, self.engine = num_blocks, engine
        self._slots: list[int | None] = [None] * NUM_SLOTS
        self._current: int | None = None
        self._step = 1

    def use(self, block: int, *, turns_back: bool) -> None:
        """Bring a block before its use, and begin to bring the next one over the block used until now.

        `turns_back` says that a backward pass follows the last block, and not the next forward pass.
        """
        if block == self._current:
            return
        if self._current is not None:
            if abs(block - self._current) == 1:
                self._step = block - self._current
            self.engine.release(self.slot_of(self._current))
        self._current = block
        self._bring(block)
        slot = self.slot_of(block)
        self.engine.wait(slot)
        following = self._next(block, turns_back)
        if self.slot_of(following) != slot:
            self._bring(following)

    def slot_of(self, block: int) -> int:
        """The slot of a block."""
        return block % NUM_SLOTS

    def _bring(self, block: int) -> None:
        slot = self.slot_of(block)
        previous = self._slots[slot]
        if previous != block:
            self._slots[slot] = block
            self.engine.start(block, slot, previous)

    def _next(self, block: int, turns_back: bool) -> int:
        """The block that will be used after this one; itself if there is only one."""
        following = block + self._step
        if following == self.num_blocks:
            following = block - 1 if turns_back else 0
        elif following < 0:
            following = block + 1
        return following if 0 <= following < self.num_blocks else block


def interleaved(num_blocks: int, num_streamed: int) -> list[int]:
    """The streamed blocks, spread evenly among the resident ones, so that copies can hide behind all blocks' work.

    Raises ValueError if there are more of them than blocks.
    """
    if not 0 <= num_streamed <= num_blocks:
        raise ValueError(f"the streamed blocks must be 0 to {num_blocks}, got {num_streamed}.")
    return [(2 * index + 1) * num_blocks // (2 * num_streamed) for index in range(num_streamed)]


class Turns:
    """The streamed blocks of a causal LM, numbered by their turn, and the layers in them.

    It is the `residency` of these layers: it brings the block of a layer before the layer is read. `num_streamed`
    blocks are spread evenly among the others; None for all.

    Raises UserError: A model without a list of blocks, more blocks than it has.
    """

    def __init__(self, model: PreTrainedModel, num_streamed: int | None) -> None:
        found = block_list(model)
        if found is None:
            raise UserError(
                f"base.residency: must be device, since {model.config.model_type} has no list of blocks that can be "
                "checkpointed."
            )
        self._path, blocks = found
        self._blocks = list(blocks)
        count = len(blocks) if num_streamed is None else num_streamed
        if count > len(blocks):
            raise UserError(f"base.streamed_blocks: must be at most the model's {len(blocks)} blocks, got {count}.")
        self._turns = {block: turn for turn, block in enumerate(interleaved(len(blocks), count))}
        self._turn_of: dict[FrozenLinear, int] = {}
        self._ring: Ring | None = None

    def __len__(self) -> int:
        return len(self._turns)

    @property
    def blocks(self) -> list[nn.Module]:
        """The streamed blocks by their turn."""
        return [self._blocks[block] for block in self._turns]

    def of(self, name: str) -> int | None:
        """The turn of the block that contains a weight or layer; None if it is not in a streamed block."""
        index = name.removeprefix(f"{self._path}.").partition(".")[0]
        inside = name.startswith(f"{self._path}.") and index.isdecimal()
        return self._turns.get(int(index)) if inside else None

    def add(self, layer: FrozenLinear, turn: int) -> None:
        """Stream a layer with the block of a turn."""
        layer.residency = self
        self._turn_of[layer] = turn

    def start(self, engine: CopyEngine) -> None:
        """Stream from now on: each streamed block is brought before its forward pass."""
        self._ring = Ring(len(self), engine)
        for turn, block in enumerate(self.blocks):
            block.register_forward_pre_hook(partial(_enter, self._ring, turn))

    def use(self, layer: FrozenLinear) -> None:
        assert self._ring is not None
        self._ring.use(self._turn_of[layer], turns_back=False)


def _enter(ring: Ring, turn: int, _block: nn.Module, _args: Any) -> None:
    ring.use(turn, turns_back=torch.is_grad_enabled())
