"""Choices that were made without a GPU, each measured against its alternatives: to decide by numbers, not to keep.

Tile size, slice of the dropout, how the magnitude's gradient is summed, how dropout could be drawn, whether cuBLAS may
add partial sums in bf16, and what recomputing the norm costs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from measure import alternating, spread
from torch import Tensor

from gpu import device as on
from gpu.layer_cost import Base, make_base, make_case
from gpu.numerics_formats import off
from gpu.part import FAILURES, Part
from gpu.plan import Plan, shape_name
from qdora.ops import dropout, tiles
from qdora.ops.adapted_product import column_dot
from qdora.ops.dropout import drawn_positions, dropped, zeroed_

_MIB = 1 << 20


def run(part: Part, plan: Plan, device: torch.device) -> None:
    """One entry for each choice and shape."""
    for shape in plan.shapes[:2]:
        base = make_base(shape, device)
        for tokens in plan.tokens[:2]:
            key = f"tile size, {shape_name(shape)}, {tokens} tokens"
            part.attempt(key, lambda b=base, t=tokens: tile_sizes(plan, b, t))
    base, tokens = make_base(plan.shapes[0], device), plan.tokens[0]
    part.attempt("dropout slice", lambda: dropout_slices(plan, base, tokens))
    part.attempt("ways to drop", lambda: ways_to_drop(plan, tokens, plan.shapes[0][0], device))
    for count in plan.tokens[:2]:
        part.attempt(f"column sums, {count} tokens", lambda c=count: column_sums(plan, c, plan.shapes[0][1], device))
    part.attempt("partial sums in bf16", lambda: reduced_precision(plan, base, tokens))
    part.attempt("norm", lambda: norm(plan, base, tokens))


@contextmanager
def setting(module: Any, **values: Any) -> Iterator[None]:
    """Module constants, for the time of a call."""
    before = {name: getattr(module, name) for name in values}
    for name, value in values.items():
        setattr(module, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


def medians(plan: Plan, device: torch.device, functions: dict[str, Callable[[], Any]]) -> dict[str, dict[str, float]]:
    """Spread of the seconds of each, in turns."""
    calls = {name: on.calls_for(device, function, plan.sample_seconds) for name, function in functions.items()}
    samples = alternating(
        {name: functools.partial(on.timed, device, function, calls[name]) for name, function in functions.items()},
        max(plan.repeats // 2, 2),
    )
    return {name: spread([each.seconds for each in found]) for name, found in samples.items()}


def tile_sizes(plan: Plan, base: Base, num_tokens: int) -> dict[str, Any]:
    """The DoRA layer with tiles of 16 MiB to the whole weight."""
    case = make_case("own_dora", base, plan.ranks[0], num_tokens)
    device = case.x.device

    def step(num_bytes: int) -> None:
        with setting(tiles, _GPU_TILE_BYTES=num_bytes, _CPU_TILE_BYTES=num_bytes):
            case.step()

    sizes = {f"{size} MiB": size * _MIB for size in (16, 32, 64, 128, 256, 1024)}
    functions = {name: functools.partial(step, size) for name, size in sizes.items()}
    peaks = {}
    for name, function in functions.items():
        function()
        on.reset_peak(device)
        function()
        peaks[name] = on.peak_bytes(device)
    return {"seconds": medians(plan, device, functions), "peak_bytes": peaks, "in use": tiles._GPU_TILE_BYTES}


def dropout_slices(plan: Plan, base: Base, num_tokens: int) -> dict[str, Any]:
    """The layer with dropout, its zeros drawn for 2^20 to 2^26 elements at a time."""
    case = make_case("own_dora_dropout", base, plan.ranks[0], num_tokens)

    def step(size: int) -> None:
        with setting(dropout, _GPU_ELEMENTS_PER_SLICE=size, _ELEMENTS_PER_SLICE=size):
            case.step()

    functions = {f"2^{power}": functools.partial(step, 1 << power) for power in (20, 22, 24, 26)}
    return {"seconds": medians(plan, case.x.device, functions), "in use": dropout._GPU_ELEMENTS_PER_SLICE}


def ways_to_drop(plan: Plan, num_tokens: int, in_features: int, device: torch.device) -> dict[str, Any]:
    """The drop alone: a mask drawn element by element (in use), drawn positions, torch's fused dropout."""
    x = torch.randn(num_tokens, in_features, device=device).bfloat16()

    def mask() -> Tensor:
        return dropped(x, 0.05, 1)

    def positions() -> Tensor:
        return zeroed_(x.clone(), drawn_positions(x.numel(), 0.05, torch.Generator(device).manual_seed(1)))

    functions = {"mask": mask, "positions": positions, "torch": lambda: torch.nn.functional.dropout(x, 0.05)}
    return {"seconds": medians(plan, device, functions), "in use": "mask"}


def column_sums(plan: Plan, num_tokens: int, out_features: int, device: torch.device) -> dict[str, Any]:
    """The magnitude's gradient: torch's batch-norm kernel (in use), a product and a sum, one fused by torch.compile."""
    left, right = (torch.randn(num_tokens, out_features, device=device).bfloat16() for _ in range(2))
    factor = torch.ones(out_features, device=device)

    def wide(a: Tensor, b: Tensor) -> Tensor:
        return (a.float() * b.float()).sum(0)

    functions: dict[str, Callable[[], Tensor]] = {
        "batch norm": lambda: column_dot(left, right, factor),
        "bf16 product, sum": lambda: (left * right).sum(0, dtype=torch.float32),
        "float32 product, sum": lambda: wide(left, right),
    }
    errors: dict[str, Any] = {}
    if device.type == "cuda":
        compiled = torch.compile(wide)
        try:
            compiled(left, right)
            functions["compiled"] = lambda: compiled(left, right)
        except FAILURES as error:  # no compiler, no Triton
            errors["compiled"] = str(error)[-300:]
    exact = (left.double() * right.double()).sum(0)
    seconds = medians(plan, device, dict(functions))
    moved = 2 * left.numel() * left.element_size()
    return {
        "seconds": seconds,
        "bytes_per_second": {name: moved / found["median"] for name, found in seconds.items()},
        "relative_error": {name: off(function(), exact) for name, function in functions.items()},
        **({"errors": errors} if errors else {}),
        "in use": "batch norm",
    }


def reduced_precision(plan: Plan, base: Base, num_tokens: int) -> dict[str, Any]:
    """torch lets cuBLAS add the partial sums of a split product in bf16: does that show in the adapters' gradients?"""
    case = make_case("own_dora", base, plan.ranks[0], num_tokens)
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_bf16_reduced_precision_reduction
    found: dict[str, Any] = {"in use": str(before)}
    a, dy, x = (each.detach().double() for each in (case.layer.lora_A, case.dy, case.x))  # type: ignore[union-attr]
    expected = dy.T @ (x @ a.T)
    try:
        for allowed in (True, False):
            matmul.allow_bf16_reduced_precision_reduction = allowed
            low = case.x.detach() @ case.layer.lora_A.detach().T  # type: ignore[union-attr, operator]
            found[str(allowed)] = {
                "error_of_low": off(low, x @ a.T),
                "error_of_dB": off((low.T @ case.dy).T, expected),
                "seconds": medians(plan, case.x.device, {"step": case.step})["step"],
            }
    finally:
        matmul.allow_bf16_reduced_precision_reduction = before
    return found


def norm(plan: Plan, base: Base, num_tokens: int) -> dict[str, Any]:
    """A pass that finds its norm, one that computes it, and the norm alone."""
    known, fresh = (make_case(name, base, plan.ranks[0], num_tokens) for name in ("own_dora", "own_dora_new_norm"))
    layer: Any = fresh.layer

    def alone() -> None:
        layer.parameters_changed()
        layer.gain(torch.bfloat16)

    functions = {"known": known.step, "computed": fresh.step, "alone": alone}
    return {"seconds": medians(plan, known.x.device, functions)}
