"""Choices that were made without a GPU, each measured against its alternatives: to decide by numbers, not to keep.

Tile size, and how the magnitude's gradient is summed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from gpu import device as on
from gpu.layer_cost import Base, make_base, make_case
from gpu.numerics import off
from gpu.part import Part
from gpu.plan import Plan, shape_name
from qdora.ops import tiles
from qdora.ops.adapted_product import column_dot


def run(part: Part, plan: Plan, device: torch.device) -> None:
    """One entry for each choice and shape."""
    for shape in plan.shapes[:2]:
        base = make_base(shape, device)
        for tokens in plan.tokens[:2]:
            part.attempt(f"tile size, {shape_name(shape)}, {tokens} tokens", tile_sizes, plan, base, tokens)
    for count in plan.tokens[:2]:
        part.attempt(f"column sums, {count} tokens", column_sums, plan, count, device)


def seconds(plan: Plan, device: torch.device, functions: Mapping[str, Callable[[], Any]]) -> dict[str, Any]:
    """Spread of each."""
    return on.spreads(on.in_turns(device, functions, max(plan.repeats // 2, 2), plan.sample_seconds))


def tile_sizes(plan: Plan, base: Base, num_tokens: int) -> dict[str, Any]:
    """The DoRA layer with tiles of 16 MiB to the whole weight."""
    case, device = make_case("own_dora", base, plan.ranks[0], num_tokens), base.dense.device

    def step(num_bytes: int) -> None:
        with mock.patch.multiple(tiles, _GPU_TILE_BYTES=num_bytes, _CPU_TILE_BYTES=num_bytes):
            case.step()

    functions = {f"{size} MiB": partial(step, size << 20) for size in (16, 64, 128, 256)}
    peaks = {}
    for name, function in functions.items():
        on.free(device)
        function()
        peaks[name] = on.memory(device)["peak"]
    return {"seconds": seconds(plan, device, functions), "peak_bytes": peaks, "in use": tiles._GPU_TILE_BYTES}


def column_sums(plan: Plan, num_tokens: int, device: torch.device) -> dict[str, Any]:
    """The magnitude's gradient: torch's batch-norm kernel (in use), or a product and a sum."""
    left, right = (torch.randn(num_tokens, plan.shapes[0][1], device=device).bfloat16() for _ in range(2))
    factor = torch.ones(left.shape[1], device=device)
    functions: dict[str, Callable[[], Tensor]] = {
        "batch norm": lambda: column_dot(left, right, factor),
        "bf16 product, sum": lambda: (left * right).sum(0, dtype=torch.float32),
    }
    exact = (left.double() * right.double()).sum(0)
    return {
        "seconds": seconds(plan, device, functions),
        "relative_error": {name: off(function(), exact) for name, function in functions.items()},
        "in use": "batch norm",
    }
