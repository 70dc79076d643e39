"""Tensors of a micro-batch on their way from the host to a GPU, in one copy that the host does not wait for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def send(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """The tensors on `device`; themselves on a CPU.

    For a GPU they are joined in pinned memory, from which a copy needs no wait of the host. torch keeps that memory
    until the copy is done.

    Args:
        tensors: On the CPU, of one dtype and any shapes.
    """
    if device.type == "cpu":
        return list(tensors)
    assert len({tensor.dtype for tensor in tensors}) == 1, "joined tensors have one dtype"
    joined = torch.cat([tensor.reshape(-1) for tensor in tensors]).pin_memory()
    parts = torch.split(joined.to(device, non_blocking=True), [tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]
