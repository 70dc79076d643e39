"""How the router of a mixture divides tokens among its experts while a run trains, as expert_load.json and a figure.

The adapters start as the base, so the first steps show the base's division and the last ones what training made of it.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from qdora.files.run_directory import RunDirectory, unharmed
from qdora.model.experts import stacks
from qdora.ops.expert_product import ExpertTokens
from qdora.train.figures import draw_expert_load

logger = logging.getLogger("qdora")
FILE = "expert_load.json"
# Optimizer steps at the start and at the end whose tokens are added up.
_WINDOW = 10
Counts = NDArray[np.int64]


class ExpertLoad:
    """Counts the tokens of each expert in training steps, of the first process. Empty for a model without experts."""

    def __init__(self, model: nn.Module) -> None:
        last = {path.rpartition(".")[0]: stack for path, stack in stacks(model).items()}  # one of each block
        self._now = {owner: np.zeros(stack.num_experts, np.int64) for owner, stack in last.items()}
        self._first: list[dict[str, Counts]] = []
        self._recent: deque[dict[str, Counts]] = deque(maxlen=_WINDOW)
        self.num_steps = 0
        for owner, stack in last.items():
            stack.register_forward_pre_hook(partial(self._add, owner))

    def _add(self, owner: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        tokens: ExpertTokens = inputs[1]
        if module.training:  # a checkpoint's recompute counts again, which changes no share
            self._now[owner] += np.array(tokens.counts)

    def step(self) -> None:
        """An optimizer step is complete."""
        done = {owner: counts.copy() for owner, counts in self._now.items()}
        for counts in self._now.values():
            counts[:] = 0
        self.num_steps += 1
        if len(self._first) < _WINDOW:
            self._first.append(done)
        self._recent.append(done)

    def record(self) -> dict[str, Any]:
        """JSON values: the steps that were counted, and of each block the share of each expert in the first and the
        last of them; "moved" is the share of tokens that went to other experts than at the start."""
        blocks = {}
        for owner in self._now:
            first, last = (_shares([step[owner] for step in steps]) for steps in (self._first, self._recent))
            moved = float(np.abs(last - first).sum() / 2)
            blocks[owner] = {"first": first.tolist(), "last": last.tolist(), "moved": moved}
        return {"num_steps": self.num_steps, "window": min(_WINDOW, self.num_steps), "blocks": blocks}

    def write(self, run: RunDirectory) -> None:
        """Write the record and the figure, and log blocks with idle experts. Nothing without experts or steps."""
        if not self._now or not self.num_steps:
            return
        record = self.record()
        with unharmed(FILE):
            run.write_json(FILE, record)
        idle = {owner: sum(share == 0 for share in block["last"]) for owner, block in record["blocks"].items()}
        moved = [block["moved"] for block in record["blocks"].values()]
        text = "Experts: training moved %.1f %% of the tokens to other experts (at most %.1f %% in a block)."
        logger.info(text, 100 * float(np.mean(moved)), 100 * max(moved))
        if any(idle.values()):
            worst = max(idle, key=idle.__getitem__)
            text = "Experts: %d of %d got no token in the last %d steps; most in %s (%d)."
            total = sum(len(block["last"]) for block in record["blocks"].values())
            logger.info(text, sum(idle.values()), total, record["window"], worst, idle[worst])
        draw_expert_load(record, run.inside("figures") / "expert_load.svg")


def _shares(steps: Sequence[Counts]) -> NDArray[np.float64]:
    total = np.sum(list(steps), axis=0)
    shares: NDArray[np.float64] = total / max(1, int(total.sum()))
    return shares
