"""Frozen blocks that come when they are needed and go afterwards: which block is where, and which one comes next.

A step uses the blocks in one order forward and in the reverse order backward, where the recomputation of a checkpoint
and the backward pass of a block come one after the other and need one load. A ring of a few slots holds the block in
use and those that come next; how bytes get there is the business of a copy engine.

Which blocks of a model take turns in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn
from transformers import PreTrainedModel

from qdora.errors import UserError
from qdora.model.load import block_list


class CopyEngine(Protocol):
    """Brings blocks into slots, beside the computation that is under way."""

    def start(self, block: int, slot: int, previous: int | None) -> None:
        """Begin to bring a block into a slot, once what was issued before the slot's last `release` has run.

        Args:
            block: Number of the block.
            slot: Where to.
            previous: The block that was there, which nobody will read any more.
        """

    def wait(self, block: int, slot: int) -> None:
        """Let what is computed from now on find the block in the slot."""

    def release(self, slot: int) -> None:
        """Say that what has been issued so far is the last that reads the slot's present content."""


class Ring:
    """Slots in which the blocks of a model take turns, each in the same one every time.

    A checkpoint keeps the graph of the first forward pass, and with it where each weight was then: the backward pass
    reads there, so that is where the recomputation must find the block again.

    Args:
        num_blocks: How many take turns, counted from 0 in the order of the forward pass.
        engine: Brings them.
        num_slots: At least 2, so that one is filled while another is read.
    Attributes:
        num_loads: Blocks that were brought so far.
    Raises:
        ValueError: Fewer than two slots.
    """

    def __init__(self, num_blocks: int, engine: CopyEngine, num_slots: int = 2) -> None:
        if num_slots < 2:
            raise ValueError(f"num_slots is {num_slots}, allowed: 2 or more.")
        self.num_blocks, self.engine = num_blocks, engine
        self.num_loads = 0
        self._slots: list[int | None] = [None] * num_slots
        self._current: int | None = None
        self._step = 1

    def use(self, block: int, *, turns_back: bool) -> int:
        """To be called before a block is computed with; what was in use until now may be replaced.

        Args:
            block: Which one.
            turns_back: Whether a backward pass follows the last block; else the next forward pass does.
        Returns:
            Its slot.
        """
        slot = self.slot_of(block)
        if block == self._current:
            return slot
        if self._current is not None:
            if abs(block - self._current) == 1:
                self._step = block - self._current
            self.engine.release(self.slot_of(self._current))
        self._current = block
        self._bring(block)
        self.engine.wait(block, slot)
        taken = {slot}
        for each in self._coming(block, turns_back):
            if self.slot_of(each) not in taken:
                self._bring(each)
                taken.add(self.slot_of(each))
        return slot

    def slot_of(self, block: int) -> int:
        """Where a block is whenever it is in one."""
        return block % len(self._slots)

    def _bring(self, block: int) -> None:
        slot = self.slot_of(block)
        previous = self._slots[slot]
        if previous != block:
            self._slots[slot] = block
            self.engine.start(block, slot, previous)
            self.num_loads += 1

    def _coming(self, block: int, turns_back: bool) -> Iterator[int]:
        """The blocks after this one, as many as there are other slots."""
        step, at = self._step, block
        for _ in range(min(len(self._slots), self.num_blocks) - 1):
            if at + step == self.num_blocks:
                if turns_back:
                    step = -1
                else:
                    at = -1
            elif at + step < 0:
                step = 1
            at += step
            yield at


def interleaved(num_blocks: int, num_streamed: int) -> list[int]:
    """Which blocks take turns, spread evenly among those that stay: copies then have the time of all blocks to hide in.

    Raises:
        ValueError: More than there are.
    """
    if not 0 <= num_streamed <= num_blocks:
        raise ValueError(f"{num_streamed} of {num_blocks} blocks, allowed: 0 to {num_blocks}.")
    return [(2 * index + 1) * num_blocks // (2 * num_streamed) for index in range(num_streamed)]


class Turns:
    """Which blocks of a model take turns, spread evenly among the others.

    Args:
        model: Any causal LM.
        num_streamed: How many; None for all.
    Raises:
        UserError: A model without a list of blocks, more blocks than it has.
    """

    def __init__(self, model: PreTrainedModel, num_streamed: int | None) -> None:
        found = block_list(model)
        if found is None:
            raise UserError(
                f"base.residency: {model.config.model_type} has no list of blocks that can be checkpointed, allowed: "
                "device."
            )
        self._path, blocks = found
        self._blocks = list(blocks)
        count = len(blocks) if num_streamed is None else num_streamed
        if count > len(blocks):
            raise UserError(f"base.streamed_blocks: {count}, allowed: at most {len(blocks)}, the blocks of the model.")
        self._turns = {block: turn for turn, block in enumerate(interleaved(len(blocks), count))}

    def __len__(self) -> int:
        return len(self._turns)

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks by their turn."""
        return [self._blocks[block] for block in self._turns]

    def follow(self, ring: Ring) -> None:
        """Let a ring know of every block that is about to be computed."""
        for turn, block in enumerate(self.blocks):
            block.register_forward_pre_hook(partial(_enter, ring, turn))

    def of(self, name: str) -> int | None:
        """The turn of the block that a weight or layer is in; None where that stays, or outside of the blocks."""
        index = name.removeprefix(f"{self._path}.").partition(".")[0]
        inside = name.startswith(f"{self._path}.") and index.isdecimal()
        return self._turns.get(int(index)) if inside else None


def _enter(ring: Ring, turn: int, _block: nn.Module, _args: Any) -> None:
    ring.use(turn, turns_back=torch.is_grad_enabled())
