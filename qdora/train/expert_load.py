"""How the router of a mixture divides tokens among its experts while a run trains, as expert_load.json.

The adapters start as the base, so the first steps show the base's division and the last ones what training made of it.
The two differ by chance, too, since they saw other tokens; how much follows from the spread between single steps.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from qdora.adapter.expert_product import ExpertTokens
from qdora.files.run_directory import RunDirectory, unharmed
from qdora.model.experts import stacks

logger = logging.getLogger("qdora")
FILE = "expert_load.json"
# Most optimizer steps at the start and at the end that are compared.
_WINDOW = 10
_Counts = dict[str, NDArray[np.int64]]
"""Block of experts -> tokens of each expert."""


class ExpertLoad:
    """Counts the tokens of each expert in training steps, of the first process. False for a model without experts."""

    def __init__(self, model: nn.Module) -> None:
        last = {path.rpartition(".")[0]: stack for path, stack in stacks(model).items()}  # one of each block
        self._now: _Counts = {owner: np.zeros(stack.num_experts, np.int64) for owner, stack in last.items()}
        self._first: list[_Counts] = []
        self._recent: deque[_Counts] = deque(maxlen=_WINDOW)
        self.num_steps = 0
        for owner, stack in last.items():
            stack.register_forward_pre_hook(partial(self._add, owner))

    def __bool__(self) -> bool:
        return bool(self._now)

    def _add(self, owner: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        tokens: ExpertTokens = inputs[1]
        if module.training:  # a checkpoint's recompute counts again, which changes no share
            self._now[owner] += np.array(tokens.routed)

    def begin(self) -> None:
        """An optimizer step begins, or begins again. What was counted since the last one belongs to none."""
        for counts in self._now.values():
            counts[:] = 0

    def step(self) -> None:
        """The update of an optimizer step was made."""
        done = {owner: counts.copy() for owner, counts in self._now.items()}
        self.num_steps += 1
        if len(self._first) < _WINDOW:
            self._first.append(done)
        self._recent.append(done)

    def state_dict(self) -> dict[str, Any]:
        """JSON values with which a resumed run goes on counting.

        A line for each block: as lists, a checkpoint's indented JSON would have a line for each number.
        """
        first, recent = (
            [{owner: " ".join(map(str, each.tolist())) for owner, each in counts.items()} for counts in steps]
            for steps in (self._first, self._recent)
        )
        return {"num_steps": self.num_steps, "first": first, "recent": recent}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`."""
        self.num_steps = state["num_steps"]
        first, recent = (
            [{owner: np.array(line.split(), np.int64) for owner, line in text.items()} for text in state[name]]
            for name in ("first", "recent")
        )
        self._first, self._recent = first, deque(recent, maxlen=_WINDOW)

    def record(self) -> dict[str, Any]:
        """JSON values: the number of steps, and `window`, how many at each end are compared: at most half, at least 1.

        Of each block: the share of each expert in the first and in the last of them; `moved`, the share of tokens that
        went to other experts than at the start; and `noise`, what `moved` would be, on average, if the router had not
        changed (`_noise`). `moved` is None with one step, `noise` with fewer than 4.
        """
        window = min(_WINDOW, max(1, self.num_steps // 2))
        starts, ends = self._first[:window], list(self._recent)[-window:]
        blocks = {}
        for owner in self._now:
            first, last = ([step[owner] for step in steps] for steps in (starts, ends))
            shares = _shares(np.sum(first, axis=0)), _shares(np.sum(last, axis=0))
            blocks[owner] = {
                "first": shares[0].tolist(),
                "last": shares[1].tolist(),
                "moved": float(np.abs(shares[1] - shares[0]).sum() / 2) if self.num_steps > 1 else None,
                "noise": _noise(first, last) if window > 1 else None,
            }
        return {"num_steps": self.num_steps, "window": window, "blocks": blocks}

    def write(self, run: RunDirectory) -> None:
        """Write the record, and log changes and idle experts. Nothing without experts or steps."""
        if not self._now or not self.num_steps:
            return
        record = self.record()
        with unharmed(FILE):
            run.write_json(FILE, record)
        blocks, window = list(record["blocks"].values()), record["window"]
        if window > 1:
            moved, noise = ([block[name] for block in blocks] for name in ("moved", "noise"))
            logger.info(
                "Experts: between the first and the last %d steps %.1f %% of the tokens moved to other experts (at "
                "most %.1f %% in a block); by the spread between steps, chance alone would move %.1f %%.",
                *(window, 100 * float(np.mean(moved)), 100 * max(moved), 100 * float(np.mean(noise))),
            )
        idle = {owner: sum(share == 0 for share in block["last"]) for owner, block in record["blocks"].items()}
        if any(idle.values()):
            worst = max(idle, key=idle.__getitem__)
            text = "Experts: %d of %d got no token in the last %d steps; most in %s (%d)."
            total = sum(len(block["last"]) for block in blocks)
            logger.info(text, sum(idle.values()), total, window, worst, idle[worst])


def _shares(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    shares: NDArray[np.float64] = counts / max(1, int(counts.sum()))
    return shares


def _noise(first: Sequence[NDArray[np.int64]], last: Sequence[NDArray[np.int64]]) -> float:
    """Expected half of the sum of |differences| between the mean shares of two groups of n steps from one router.

    The difference of an expert's two means is normal with the variance 2 v / n, v the variance of its share between
    steps, and the mean of its absolute value is sqrt(4 v / (pi n)). v is taken within each group, so that a router that
    does change from one group to the other does not raise it.
    """
    groups = [np.stack([_shares(counts) for counts in steps]) for steps in (first, last)]
    variance = np.mean([group.var(axis=0, ddof=1) for group in groups], axis=0)
    return float(np.sqrt(variance / (math.pi * len(first))).sum())
