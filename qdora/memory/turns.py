"""Which blocks of a model take turns in memory."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from qdora.errors import UserError
from qdora.memory.plan_blocks import block_list
from qdora.memory.streaming import Ring, interleaved


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
