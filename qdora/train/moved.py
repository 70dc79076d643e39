"""A check of a run's first updates: did every matrix that trains move?

Where frozen blocks come and go, a backward pass that reads the wrong bytes, or none, can leave a finite loss and
factors that never change; others have trained a lora_B of zeros that way. It costs a sum over each matrix, twice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qdora.errors import RunFailure
from qdora.train.optimizer import AdapterOptimizer

# lora_A gets no gradient before lora_B has left zero, and is known to have moved one update later.
_NUM_UPDATES = 3


class MovedCheck:
    """Compares every trainable matrix with its start, after a few updates.

    Args:
        optimizer: Over the parameters, before the first update that is watched.
    """

    def __init__(self, optimizer: AdapterOptimizer) -> None:
        self._optimizer = optimizer
        self._updates = 0
        self._start = self._sums()

    def updated(self, lr: float) -> None:
        """To be called after each update.

        Args:
            lr: Of the update; one of 0, at the start of a warm-up, moves nothing.
        Raises:
            RunFailure: After the third, where a matrix is what it was.
        """
        if lr == 0.0 or self._updates == _NUM_UPDATES:
            return
        self._updates += 1
        if self._updates < _NUM_UPDATES:
            return
        now = self._sums()
        still = [name for name, value in self._start.items() if torch.equal(value, now[name])]
        self._start = {}
        if still:
            raise RunFailure(
                f"after {_NUM_UPDATES} updates {len(still)} of {len(now)} trainable tensors are what they were, e.g. "
                f"{still[0]}: their gradients do not arrive. Train with base.residency: device, and report it."
            )

    def _sums(self) -> dict[str, Tensor]:
        """Path -> a number that changes with any bit of the parameter, its low bits included; on the device."""
        found = {}
        for name in self._optimizer.parameters:
            bits = self._optimizer.master(name).detach().float().contiguous().view(torch.int32).flatten()
            # Weighted, so that entries that trade places do not go unseen.
            weights = torch.arange(1, bits.numel() + 1, dtype=torch.int64, device=bits.device)
            found[name] = (bits.to(torch.int64) * weights).sum()
        return found
