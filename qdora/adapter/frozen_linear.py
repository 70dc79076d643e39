"""A linear layer whose weight never trains: packed in NF4, FP4 or int8, or dense in 16 or 32 bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from qdora.adapter.dora import squared_row_norm
from qdora.adapter.frozen_product import frozen_linear
from qdora.adapter.row_share import RowShare
from qdora.quant.packed import TENSOR_NAMES, PackedWeight, from_tensors
from qdora.quant.sparsity import mask_from_bits
from qdora.quant.tiles import Weight, dense_weight, wide_dtype

# Block scales keep their dtype when a model is cast: `model.to(torch.bfloat16)` would round every one of them.
_SCALES = TENSOR_NAMES[1:]


class Residency(Protocol):
    """Keeps the weights of some layers elsewhere while nothing computes with them."""

    def use(self, layer: FrozenLinear) -> None:
        """Bring a layer's packed tensors before they are read; they stay until a layer of another block is used."""


class FrozenLinear(nn.Module):
    """y = x W^T + bias, W (out, in), packed or dense, and bias (out,) frozen.

    The weight is held in buffers, so no optimizer, weight decay or `requires_grad_` can reach it. Its tensors are never
    repacked for a kernel: `dequantized` returns the same before and after any number of forwards.

    Attributes:
        keep_bits: `quant.sparsity.mask_bits` of the mask by which the weight was pruned (it is 0 where the mask is
            False); None for a weight that was not pruned.
        residency: Brings the weight before it is read; None if it is always there.
        share: What this process holds of a weight that is divided among processes; None for a weight that is not.
        replaces: Name of the class of the model's own layer.
    """

    keep_bits: Tensor | None

    def __init__(self, weight: Weight, bias: Tensor | None = None, keep_bits: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.block_size = 0
        self.residency: Residency | None = None
        self.share: RowShare | None = None
        self.replaces = "Linear"
        self._packed: PackedWeight | None = None
        if isinstance(weight, PackedWeight):
            self.kind: str = weight.kind
            self.block_size = weight.block_size
            self._names = tuple(weight.tensors())
            for name, tensor in weight.tensors().items():
                self.register_buffer(name, tensor)
        else:
            self.kind = "dense"
            self._names = ("weight",)
            self.register_buffer("weight", weight.detach())
        self.bias: Tensor | None
        self.register_buffer("bias", None if bias is None else bias.detach())
        self.register_buffer("keep_bits", keep_bits)

    def keep_mask(self, rows: slice | None = None) -> Tensor | None:
        """The mask by which the weight was pruned, or some of its rows, (rows, in) bool; None if it was not pruned."""
        shape = (self.out_features, self.in_features)
        return None if self.keep_bits is None else mask_from_bits(self.keep_bits, shape, rows)

    @property
    def packed_weight(self) -> PackedWeight | None:
        """The packed form, sharing memory with this layer, or None for a dense base."""
        weight = self.stored_weight
        return weight if isinstance(weight, PackedWeight) else None

    @property
    def packed_form(self) -> PackedWeight | None:
        """`packed_weight` without bringing it: its tensors may have no values."""
        if self.kind == "dense":
            return None
        # Kept, since a check of the tensors at every forward costs as much as a kernel.
        packed, buffers = self._packed, self._buffers
        if packed is None or any(buffers[name] is not tensor for name, tensor in packed.tensors().items()):
            tensors = {name: self.get_buffer(name) for name in self._names}
            self._packed = from_tensors(self.kind, (self.out_features, self.in_features), self.block_size, tensors)
        return self._packed

    @property
    def away(self) -> tuple[str, ...]:
        """Names of the buffers that only `residency` moves."""
        return () if self.residency is None else self._names

    @property
    def stored_weight(self) -> Weight:
        """The weight as stored, packed or dense, sharing memory with this layer."""
        if self.residency is not None:
            self.residency.use(self)
        packed = self.packed_form
        return self.get_buffer("weight") if packed is None else packed

    @property
    def device(self) -> torch.device:
        """Where the weight is when it is read."""
        if self.share is None:
            return self.stored_weight.device
        return self.get_buffer(self._names[0]).device

    def squared_row_norm(self) -> Tensor:
        """||w||^2 of each row, (out,) float32 (float64 for a float64 weight). If the weight is divided among processes,
        all must call this together."""
        return squared_row_norm(self.stored_weight) if self.share is None else self.share.squared_row_norm()

    @property
    def wide_dtype(self) -> torch.dtype:
        """The dtype of norms and merges: float32, or float64 for a float64 base."""
        weight = self._buffers.get("weight")
        return torch.float32 if weight is None else wide_dtype(weight)

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense weight (out, in) in `dtype`; for a packed base a new tensor."""
        return dense_weight(self.stored_weight, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out) in x's dtype."""
        return frozen_linear(x, self.stored_weight, self.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FrozenLinear:
        away = {name: self._buffers.pop(name) for name in self.away}
        kept = {name: self._buffers[name] for name in _SCALES if self._buffers.get(name) is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._buffers.update(away)
        self._packed = None  # it would keep the tensors that have been moved away
        for name, before in kept.items():
            after = self._buffers[name]
            if before is not None and after is not None and after.dtype != before.dtype:
                self._buffers[name] = before.to(after.device)
        return self

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        block = f", block_size={self.block_size}" if self.block_size else ""
        return f"{self.in_features}, {self.out_features}, {self.kind}{block}, bias={self.bias is not None}"
