"""A check of a run's first updates: was there something to move every matrix that trains?

Where frozen blocks come and go, a backward pass that reads the wrong bytes, or none, can leave a finite loss and
factors that never change; others have trained a lora_B of zeros that way. Asked of the gradients, not of the
parameters: a healthy update can be smaller than float32 shows, at the end of a cosine or the start of a slow warm-up.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qdora.train.optimizer import AdapterOptimizer

# lora_A gets no gradient before lora_B has left zero, and is known to get one an update later.
_NUM_UPDATES = 3


class MovedCheck:
    """Watches for a gradient other than zero of every trainable matrix, in a few updates.

    Args:
        optimizer: Over the parameters.
    """

    def __init__(self, optimizer: AdapterOptimizer) -> None:
        self._parameters = optimizer.parameters
        self._updates = 0
        self._arrived: dict[str, Tensor] = {}

    def updated(self, lr: float) -> str | None:
        """To be called after each update, while its gradients are there.

        Args:
            lr: Of the update; one of 0, at the start of a warm-up, moves nothing.
        Returns:
            After the third: what is wrong, where a matrix had no gradient in any of them; else None.
        """
        if lr == 0.0 or self._updates == _NUM_UPDATES:
            return None
        self._updates += 1
        for name, parameter in self._parameters.items():
            if parameter.grad is not None:
                some = parameter.grad.any()  # stays on the device, where nobody waits for it
                self._arrived[name] = self._arrived.get(name, some) | some
        if self._updates < _NUM_UPDATES:
            return None
        flags = torch.stack(list(self._arrived.values())).tolist() if self._arrived else []
        arrived = {name for name, flag in zip(self._arrived, flags, strict=True) if flag}
        still = [name for name in self._parameters if name not in arrived]
        if not still:
            return None
        return (
            f"in {_NUM_UPDATES} updates {len(still)} of {len(self._parameters)} trainable tensors had no gradient, "
            f"e.g. {still[0]}. Train with base.residency: device in a new run, and report it."
        )
