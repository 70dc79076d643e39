"""The averages in an optimizer's state as numbers: float32 in torch's and bitsandbytes' 32-bit states, codes and block
scales in its 8-bit ones."""

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


def widened_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter's averages in float32, new tensors, and its count of steps; empty for an empty state."""
    wide: dict[str, Any] = {}
    for name, value in state.items():
        if name == "step":
            wide[name] = value
        elif name in MOMENTS:
            wide[name] = value.clone() if value.dtype == torch.float32 else _dequantized(state, name)
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
    codes, code = state[name], state[f"qmap{number}"]
    found: Tensor = F.dequantize_blockwise(codes, absmax=state[f"absmax{number}"], code=code, blocksize=_BLOCK)
    return found.view_as(codes)
