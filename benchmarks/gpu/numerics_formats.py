"""Numerics on the device: quantised formats, tiles, the reduction of the magnitude's gradient, the chunked loss.

Each check gives {value, bound, ok}. The yardstick is the plain torch definition, or float64.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gpu.part import Part
from gpu.plan import Plan
from qdora.ops import blockwise, int8
from qdora.ops.adapted_product import column_dot
from qdora.ops.loss import chunked_nll
from qdora.ops.packed import PackedWeight, choose_backend, dequantize, quantize
from qdora.ops.tiles import column_tiles, row_tiles

Check = dict[str, Any]
# (out, in): whole blocks in a row, blocks that cross rows, an odd number of weights.
_SHAPES = ((512, 1024), (130, 96), (33, 101))


def check(value: float, bound: float) -> Check:
    """A measured error and what it may be; NaN fails."""
    return {"value": value, "bound": bound, "ok": bool(value <= bound)}


def off(got: Tensor, expected: Tensor) -> float:
    """||got - expected|| / ||expected|| in float64."""
    expected = expected.double()
    return float((got.double() - expected).norm() / expected.norm().clamp_min(1e-300))


def random(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """N(0, 1), the same numbers on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device, dtype)


def run(part: Part, plan: Plan, device: torch.device) -> None:
    """All checks of this file."""
    for kind in ("nf4", "fp4", "int8"):
        for shape in _SHAPES:
            part.attempt(f"format {kind} {shape[0]}x{shape[1]}", lambda k=kind, s=shape: formats(k, s, device))
    for shape in plan.reduce_shapes:
        part.attempt(f"column_dot {shape[0]}x{shape[1]}", lambda s=shape: reduction(s, device))
    for softcap in (None, 30.0):
        part.attempt(f"chunked loss, softcap {softcap}", lambda c=softcap: loss(c, device))


def formats(kind: str, shape: tuple[int, int], device: torch.device) -> dict[str, Check]:
    """The device's codes against the CPU's, bitsandbytes' kernels against the definition, tiles against the whole."""
    weight = random(shape, torch.device("cpu"), torch.bfloat16) * 0.02
    weight[1] = 0.0
    found: dict[str, Check] = {}
    for double_quant in (False, True) if kind != "int8" else (False,):
        name = "double quant" if double_quant else "single"
        here = quantize(weight, kind, 64, double_quant)
        there = quantize(weight.to(device), kind, 64, double_quant)
        # The mean of the scales may be summed in another order, so a scale's code may be the neighbour's.
        for part, tensor in here.tensors().items():
            other = there.tensors()[part].cpu()
            share = float((tensor != other).double().mean()) if tensor.dtype != torch.float32 else off(other, tensor)
            found[f"{name}: {part} as on a CPU"] = check(share, 1e-2 if double_quant and part == "absmax" else 1e-6)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            short = str(dtype).removeprefix("torch.")
            if _has_kernel(there, dtype):
                by_kernel = dequantize(there, dtype)
                differ = float((by_kernel != by_definition(there, dtype)).double().mean())
                found[f"{name}: share of {short} that the kernel decodes to other bits"] = check(differ, 0.0)
        found |= {f"{name}: {key}": value for key, value in _tiles(there).items()}
    return found


def by_definition(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """`dequantize` in plain torch, whatever kernels the device has."""
    if weight.kind == "int8":
        return int8.dequantize_rows(weight.packed, weight.absmax, dtype)
    scales, nested = weight.absmax, weight.nested
    if nested is not None:
        scales = blockwise.dequantize_scales(scales, nested.absmax, nested.code, nested.offset)
    form = {"shape": weight.shape, "dtype": dtype}
    return blockwise.dequantize_4bit(weight.packed, scales, weight.kind, weight.block_size, **form)


def _has_kernel(weight: PackedWeight, dtype: torch.dtype) -> bool:
    columns, size = weight.shape[1], weight.block_size
    return choose_backend(weight.kind, weight.device, block_size=size, in_features=columns, dtype=dtype) == "bnb"


def _tiles(weight: PackedWeight) -> dict[str, Check]:
    """Row and column tiles, put together, against the dense weight times the factor."""
    factor = random((weight.shape[0],), weight.device, torch.float32, 5).abs_()
    dense = by_definition(weight, torch.float32).double() * factor.double().unsqueeze(1)
    rows = torch.cat([tile.clone() for _, tile in row_tiles(weight, torch.bfloat16, factor)])
    columns = torch.cat([tile.clone() for _, tile in column_tiles(weight, torch.bfloat16, factor)], dim=1)
    worst = [float(((got.double() - dense).abs() / dense.abs().clamp_min(1e-30)).max()) for got in (rows, columns)]
    return {"worst entry of row tiles": check(worst[0], 2**-8), "worst entry of column tiles": check(worst[1], 2**-8)}


def reduction(shape: tuple[int, int], device: torch.device) -> dict[str, Check]:
    """`column_dot`, which is torch's backward of a batch normalisation, in bf16 and float32, strided input too."""
    found = {}
    for dtype in (torch.bfloat16, torch.float32):
        left, right = random(shape, device, dtype, 1), random(shape, device, dtype, 2)
        factor = random((shape[1],), device, torch.float32, 3)
        expected = (left.double() * right.double()).sum(0) * factor.double()
        short = str(dtype).removeprefix("torch.")
        # float32 sums of up to 2^14 terms that cancel to the root of their number.
        found[short] = check(off(column_dot(left, right, factor), expected), 1e-4)
        strided = left.T.contiguous().T
        found[f"{short} strided"] = check(off(column_dot(strided, right, factor), expected), 1e-4)
    return found


def loss(softcap: float | None, device: torch.device) -> dict[str, Check]:
    """Chunked loss and its gradient against float64; twice the error of the plain formula in bf16 is allowed."""
    hidden, head = random((300, 128), device, torch.bfloat16, 1), random((5000, 128), device, torch.bfloat16, 2) * 0.1
    labels = torch.randint(0, 5000, (300,), generator=torch.Generator().manual_seed(3)).to(device)

    def plain(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        x = hidden.to(dtype).requires_grad_()
        logits = (x @ head.to(dtype).T).to(torch.promote_types(dtype, torch.float32))
        logits = logits if softcap is None else torch.tanh(logits / softcap) * softcap
        nll = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
        return nll.detach(), torch.autograd.grad(nll.sum(), x)[0]

    x = hidden.clone().requires_grad_()
    nll = chunked_nll(x, head, labels, softcap=softcap, chunk=64)
    nll.sum().backward()  # type: ignore[no-untyped-call]
    (exact, exact_gradient), (rough, rough_gradient) = plain(torch.float64), plain(torch.bfloat16)
    assert x.grad is not None
    return {
        "nll": check(off(nll.detach(), exact), 2 * off(rough, exact) + 1e-6),
        "gradient": check(off(x.grad, exact_gradient), 2 * off(rough_gradient, exact_gradient) + 1e-6),
    }
