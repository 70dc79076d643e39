"""Weights of a model of any size in seconds: one of each shape is random, the others are copies of it.

Time and memory of such a model mean something, its losses only whether two ways to compute it agree.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from qdora.model.load import Quantization, layers_to_quantize
from qdora.model.stored_tensors import Stored, StoredPacked, StoredTensor
from qdora.ops.packed import PackedWeight, from_tensors, quantize

QUANTIZATION = Quantization("nf4", 64, True, ("lm_head",))
_NUM_ROWS = 512  # of a table that differ: a billion normal numbers take a CPU a minute


class RandomWeights:
    """Makes the weights of a model on the device; every one has memory of its own."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._generator = torch.Generator(device).manual_seed(0)
        self._first: dict[tuple[int, int], PackedWeight] = {}

    def packed(self, shape: tuple[int, int], number: int) -> PackedWeight:
        """`QUANTIZATION`'s form of a weight (out, in), its codes rolled by `number`: no two blocks compute the same."""
        first = self._first.get(shape)
        if first is None:
            first = quantize(self._normal(shape), "nf4", 64, double_quant=True)
            self._first[shape] = first
            return first
        tensors = {name: tensor.clone() for name, tensor in first.tensors().items() if name != "packed"}
        return from_tensors("nf4", shape, 64, tensors | {"packed": first.packed.roll(number)})

    def dense(self, shape: tuple[int, ...]) -> Tensor:
        """bf16: the ones of a norm, or an embedding or a head N(0, 0.02^2)."""
        if len(shape) == 1:
            return torch.ones(shape, device=self.device, dtype=torch.bfloat16)
        rows = self._normal((_NUM_ROWS, *shape[1:]))
        return rows[torch.arange(shape[0], device=self.device) % _NUM_ROWS]

    def _normal(self, shape: tuple[int, ...]) -> Tensor:
        made = torch.empty(shape, device=self.device, dtype=torch.bfloat16)
        return made.normal_(0.0, 0.02, generator=self._generator)


def random_checkpoint(model: Any, device: torch.device) -> dict[str, Stored]:
    """Name -> tensor of a quantised checkpoint of the model, each made when it is read."""
    weights, layers = RandomWeights(device), layers_to_quantize(model, QUANTIZATION)
    stored: dict[str, Stored] = {}
    for number, (name, parameter) in enumerate(model.named_parameters()):
        shape = tuple(parameter.shape)
        if name.removesuffix(".weight") in layers:
            stored[name] = StoredPacked(name, shape, "nf4", 64, True, partial(weights.packed, shape, number))
        else:
            stored[name] = StoredTensor(name, shape, partial(weights.dense, shape))
    return stored
