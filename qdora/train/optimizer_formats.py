"""The averages in an optimizer's state as numbers: float32 in torch's and bitsandbytes' 32-bit states, codes and block
scales in its 8-bit ones.

A paged state of bitsandbytes is a tensor of the CPU over memory that a GPU reads, too; block scales are on the GPU.
Numbers are worked with on the device of the parameter, whatever the state is on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import bitsandbytes.functional as F
import torch
from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq", "state1", "state2")
"""Of a parameter's shape: torch's names, and bitsandbytes'."""
FIRST_MOMENTS = ("exp_avg", "state1")
"""Averages of the gradient; the others are of its square."""
_BLOCK = 256


def widened_state(state: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """A parameter's averages in float32, new tensors on `device`, and its count of steps; empty for an empty state."""
    wide: dict[str, Any] = {}
    for name, value in state.items():
        if name == "step":
            wide[name] = value
        elif name in MOMENTS:
            is_wide = value.dtype == torch.float32
            wide[name] = value.to(device, copy=True) if is_wide else _dequantized(state, name).to(device)
    return wide


def fill_state_(state: dict[str, Any], wide: Mapping[str, Any]) -> None:
    """Put `widened_state`'s numbers, or a part of them, into a state that is there, in its own format."""
    for name, value in wide.items():
        place = state[name]
        if not isinstance(place, Tensor):
            state[name] = int(value)
        elif place.dtype == torch.uint8:
            number = name.removeprefix("state")
            codes, quantized = F.quantize_blockwise(value.contiguous(), code=state[f"qmap{number}"], blocksize=_BLOCK)
            place.copy_(codes.view_as(place))
            state[f"absmax{number}"].copy_(quantized.absmax)
        else:
            place.copy_(value)


def _dequantized(state: Mapping[str, Any], name: str) -> Tensor:
    number = name.removeprefix("state")
    absmax, code = state[f"absmax{number}"], state[f"qmap{number}"]
    codes = state[name].to(absmax.device)
    found: Tensor = F.dequantize_blockwise(codes, absmax=absmax, code=code, blocksize=_BLOCK)
    return found.view_as(codes)


def page_as(page: Any, like: Tensor) -> Tensor:
    """The start of a paged tensor's memory as one of another shape and dtype; its marks go along.

    bitsandbytes never frees a page, so a state that shrinks stays in the one it has.

    Args:
        page: From bitsandbytes, or from this function.
        like: Has the shape and dtype, contiguous; no more bytes than bitsandbytes made the page with.
    """
    found: Any = torch.empty(0, dtype=like.dtype).set_(page.untyped_storage(), 0, like.shape, like.stride())
    found.is_paged, found.page_deviceid = True, page.page_deviceid
    tensor: Tensor = found
    return tensor
