"""Tensors of a module that a cast of the model does not narrow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn


@contextmanager
def never_narrowed(module: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Around a module's `_apply`: these of its tensors, those that are not None, may move and widen, but a cast to
    fewer bits does not reach them."""
    tensors: dict[str, Tensor | None] = {name: getattr(module, name) for name in names}
    before = {name: tensor.data for name, tensor in tensors.items() if tensor is not None}
    yield
    for name, values in before.items():
        tensor = getattr(module, name)
        if tensor.dtype.itemsize < values.dtype.itemsize:
            tensor.data = values.to(tensor.device)
