"""Triton's kernels against bitsandbytes': tiles, experts, the norm. Does QDORA_KERNELS=triton pay on this card?

Without Triton, or on a CPU outside its interpreter, bitsandbytes alone is measured.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gpu.numerics_formats import Check, by_definition, check, random
from gpu.part import Part
from gpu.plan import Plan, Shape, shape_name
from gpu.untested_choices import medians, setting
from qdora.ops import tiles
from qdora.ops.dora import row_norm, squared_row_norm
from qdora.ops.expert_product import expert_rows
from qdora.ops.expert_tokens import ExpertTokens
from qdora.ops.packed import PackedWeight, quantize
from qdora.ops.tiles import column_tiles, own_scales, row_tiles, with_scales

_BF16 = torch.bfloat16
_NUM_EXPERTS, _REACHED = 8, (0, 2, 3, 6)


def run(part: Part, plan: Plan, device: torch.device) -> None:
    """Bits first: a fast kernel that is wrong is of no use."""
    part.put("triton", with_triton(device))
    for shape in plan.shapes[:2]:
        weight = quantize(random((shape[1], shape[0]), device, _BF16) * 0.02, "nf4")
        gain = random((shape[1],), device, torch.float32, 1).abs_()
        name = shape_name(shape)
        cases: dict[str, Callable[[], Any]] = {"bits": partial(bits, weight, gain)} if with_triton(device) else {}
        cases |= {"tiles": partial(decoding, plan, weight, gain), "norm": partial(norm, plan, weight, shape)}
        cases["some experts"] = partial(experts, plan, weight, gain)
        for case, function in cases.items():
            part.attempt(f"{case}, {name}", partial(with_known_errors, function))


def with_known_errors(function: Callable[[], Any]) -> Any:
    """Triton's errors are of no kind that a part keeps."""
    if importlib.util.find_spec("triton") is None:
        return function()
    from triton.errors import TritonError

    try:
        return function()
    except TritonError as error:
        raise RuntimeError(str(error)) from error


def with_triton(device: torch.device) -> bool:
    """Whether Triton's kernels run on the device."""
    if importlib.util.find_spec("triton") is None:
        return False
    from qdora.ops import triton_kernels

    return device.type == "cuda" or triton_kernels.INTERPRETED


def scaled_weight(weight: PackedWeight, gain: Tensor) -> PackedWeight:
    """diag(gain) W with scales at hand."""
    scales = own_scales(weight, gain)
    assert scales is not None
    return with_scales(weight, scales)


def bits(weight: PackedWeight, gain: Tensor) -> dict[str, Check]:
    """The share of weights that differ from the definition, and the norm's sums against float64."""
    from qdora.ops import triton_kernels

    scaled = scaled_weight(weight, gain)
    expected = by_definition(scaled, _BF16)
    tile = triton_kernels.decode(weight, _BF16, gain=gain)
    exact = by_definition(weight, torch.float32).double().square().sum(dim=1)
    off = (triton_kernels.squared_row_norm(weight).double() - exact).abs() / exact
    return {
        "tile": check(float((tile != expected).double().mean()), 0.0),
        "row norms": check(float(off.max()), 1e-5),
    }


def decoding(plan: Plan, weight: PackedWeight, gain: Tensor) -> dict[str, Any]:
    """Seconds for all tiles of a weight. Scales at hand have the gain in them already."""
    scaled = scaled_weight(weight, gain)

    def all_tiles(cut: Callable[..., Any], of: PackedWeight, factor: Tensor | None) -> None:
        for _ in cut(of, _BF16, factor):
            pass

    cases = {"rows": (row_tiles, weight, gain), "columns": (column_tiles, weight, gain)}
    cases |= {f"{name}, scales at hand": (cut, scaled, None) for name, (cut, *_) in cases.items()}
    functions: dict[str, Callable[[], Any]] = {}
    for name, arguments in cases.items():
        functions |= by_both(name, lambda a=arguments: all_tiles(*a), weight.device)
    return {"seconds": medians(plan, weight.device, functions), "in use": "bitsandbytes"}


def norm(plan: Plan, weight: PackedWeight, shape: Shape) -> dict[str, Any]:
    """Seconds for ||w||^2 of each row, and for the row norms of a layer at the first rank."""
    a = random((plan.ranks[0], shape[0]), weight.device, _BF16, 2)
    b = random((shape[1], plan.ranks[0]), weight.device, _BF16, 3) * 0.01
    base = squared_row_norm(weight)
    functions = by_both(
        "norm", lambda: row_norm(weight, a, b, 2.0, base_squared=base, dtype=_BF16), weight.device
    ) | by_both("squares", lambda: squared_row_norm(weight), weight.device)
    return {"seconds": medians(plan, weight.device, functions), "in use": "bitsandbytes"}


def experts(plan: Plan, weight: PackedWeight, gain: Tensor) -> dict[str, Any]:
    """Seconds for the tile of some experts that do not lie together: the weight as a stack of 8."""
    tokens = ExpertTokens.one_for_each(_REACHED, _NUM_EXPERTS)
    (together,) = tokens.all_runs(len(_REACHED))
    index = together.index(weight.device)
    rows = weight.shape[0] // _NUM_EXPERTS

    def by_bitsandbytes() -> None:
        factor = together.pick(gain.view(_NUM_EXPERTS, -1)).reshape(-1)
        for _ in row_tiles(expert_rows(weight, _NUM_EXPERTS, together), _BF16, factor):
            pass

    functions: dict[str, Callable[[], Any]] = {"bitsandbytes": by_bitsandbytes}
    if with_triton(weight.device):
        from qdora.ops import triton_kernels

        some = triton_kernels.Experts(index, rows)
        functions["triton"] = lambda: triton_kernels.decode(weight, _BF16, gain=gain, experts=some)
    return {"seconds": medians(plan, weight.device, functions), "in use": "bitsandbytes"}


def by_both(name: str, function: Callable[[], Any], device: torch.device) -> dict[str, Callable[[], Any]]:
    """A function of qdora with each kind of kernels."""

    def by_triton() -> None:
        with setting(tiles, runs_triton=lambda _: True):
            function()

    found = {f"{name}, bitsandbytes": function}
    return found | {f"{name}, triton": by_triton} if with_triton(device) else found
