"""Numerics at the sizes of real layers: formats, the adapted layer, zero rows, sums; against float64.

Section `tests` has small layers, tiles, dropout, the loss, and the norm after an optimizer's step.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from contenders import CONTENDERS, layer_on
from torch import Tensor

from gpu.part import Part
from gpu.plan import Plan, shape_name
from qdora.nn.adapted_linear import AdaptedLinear
from qdora.nn.frozen_linear import FrozenLinear
from qdora.ops import blockwise
from qdora.ops.adapted_product import column_dot
from qdora.ops.packed import PackedWeight, dequantize, quantize

_NAMES = ("out", "dx", "dA", "dB", "dm")
Check = dict[str, Any]


def run(part: Part, plan: Plan, device: torch.device) -> None:
    """All checks of this file."""
    for size in plan.check_shapes:
        for kind in ("dora", "lora"):
            part.attempt(f"{kind} {'x'.join(map(str, size))}", layer, kind, size, device)
    odd = plan.check_shapes[1]
    part.attempt("int8 base", layer, "dora", odd, device, quant="int8")
    part.attempt("dense base", layer, "dora", odd, device, quant=None)
    part.attempt("zero rows and zero magnitudes", zeros, device)
    for kind in ("lora", "dora"):
        part.attempt(f"PEFT's {kind}", peers, kind, device)
    for kind in ("nf4", "fp4", "int8"):
        for shape in ((130, 96), plan.shapes[-1]):
            part.attempt(f"format {kind} {shape_name(shape)}", formats, kind, shape, device)
    for shape in ((2, 64), (plan.tokens[0], plan.shapes[0][1]), (plan.tokens[-1], plan.shapes[-1][0])):
        part.attempt(f"column_dot {shape_name(shape)}", sums, shape, device)


def check(value: float, bound: float) -> Check:
    """A measured error and what it may be; NaN fails."""
    return {"value": value, "bound": bound, "ok": bool(value <= bound)}


def off(got: Tensor, expected: Tensor) -> float:
    """||got - expected|| / ||expected|| in float64."""
    expected = expected.double()
    return float((got.double() - expected).norm() / expected.norm().clamp_min(1e-300))


def random(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """N(0, 1), the same numbers on every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def make(shape: tuple[int, int, int], device: torch.device, kind: Any, quant: str | None) -> Any:
    """A layer (in, out, rank) with a bias and with a zero row in its base, every parameter off its start."""
    in_, out, rank = shape
    weight = random((out, in_), device, torch.bfloat16, 1) * 0.02
    weight[3] = 0.0
    bias = random((out,), device, torch.bfloat16, 2)
    base = FrozenLinear(weight if quant is None else quantize(weight, quant, 64), bias)
    made = AdaptedLinear(base, kind=kind, rank=rank, dtype=torch.bfloat16)
    with torch.no_grad():
        made.lora_A.copy_(random((rank, in_), device, torch.float32, 3) / math.sqrt(in_))
        made.lora_B.copy_(random((out, rank), device, torch.float32, 4) * 0.02)
        if made.magnitude is not None:
            made.magnitude.mul_(0.9 + 0.2 * random((out,), device, torch.float32, 5).sigmoid())
            made.magnitude[3] = 0.5
    return made.train()


def formula(layer: AdaptedLinear, x: Tensor, dy: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """The plain formula in one dtype by autograd, its norm held: W dense, B A dense, one operation after another."""
    a, b = (p.detach().to(dtype).requires_grad_() for p in (layer.lora_A, layer.lora_B))
    x = x.detach().to(dtype).requires_grad_()
    weight = layer.base.dequantized(torch.float32).to(dtype)
    leaves = [x, a, b]
    out = x @ weight.T + (x @ a.T) @ b.T * layer.scaling
    if layer.magnitude is not None:
        m = layer.magnitude.detach().to(dtype).requires_grad_()
        leaves.append(m)
        norm = (weight + layer.scaling * (b @ a)).detach().norm(dim=1)
        out = out * torch.where(norm > 0, m / norm, 0.0)
    assert layer.base.bias is not None
    out = out + layer.base.bias.to(dtype)
    gradients = torch.autograd.grad(out, leaves, dy.to(dtype))
    return dict(zip(_NAMES, (out.detach(), *gradients), strict=False))


def results(layer: AdaptedLinear, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """What the layer gives."""
    x = x.detach().requires_grad_()
    parameters = [layer.lora_A, layer.lora_B, *([] if layer.magnitude is None else [layer.magnitude])]
    out = layer(x)
    return dict(zip(_NAMES, (out.detach(), *torch.autograd.grad(out, [x, *parameters], dy)), strict=False))


def layer(
    kind: str,
    size: tuple[int, int, int, int],
    device: torch.device,
    quant: str | None = "nf4",
) -> dict[str, Check]:
    """Errors against float64; each may be twice the plain formula's in bf16, and half of bf16's last digit."""
    tokens, in_, out, rank = size
    made = make((in_, out, rank), device, kind, quant)
    x, dy = random((tokens, in_), device, torch.bfloat16, 6), random((tokens, out), device, torch.bfloat16, 7)
    exact, rough = (formula(made, x, dy, dtype) for dtype in (torch.float64, torch.bfloat16))
    found = results(made, x, dy)
    return {name: check(off(found[name], exact[name]), 2 * off(rough[name], exact[name]) + 2**-9) for name in exact}


def zeros(device: torch.device) -> dict[str, Check]:
    """A row of W + s B A that is zero gives zero, a zero magnitude too; no NaN, and a zero magnitude can grow."""
    made = make((64, 32, 4), device, "dora", "nf4")
    with torch.no_grad():
        made.lora_B[3], made.magnitude[5] = 0.0, 0.0
        made.base.bias.zero_()
    made.parameters_changed()
    found = results(made, random((9, 64), device, torch.bfloat16, 8), random((9, 32), device, torch.bfloat16, 9))
    return {
        "numbers that are not finite": check(sum(int((~value.isfinite()).sum()) for value in found.values()), 0),
        "largest output of a zero row": check(float(found["out"][:, [3, 5]].abs().max()), 1e-20),
        "dead gradient of the zero magnitude": check(float(found["dm"][5] == 0), 0),
    }


def peers(kind: str, device: torch.device) -> dict[str, Check]:
    """Ours and PEFT's on the same bytes and parameters give the same numbers, so their times can be compared."""
    weight = quantize(random((192, 128), device, torch.bfloat16, 1) * 0.02, "nf4", 64)
    x, dy = random((64, 128), device, torch.bfloat16, 6), random((64, 192), device, torch.bfloat16, 7)
    found = []
    for name in (f"own_{kind}", f"peft_{kind}"):
        leaf = x.detach().requires_grad_()
        out = layer_on(weight, CONTENDERS[name], 8)(leaf)
        found.append((out.detach(), *torch.autograd.grad(out, [leaf], dy)))
    return {name: check(off(own, theirs), 1e-2) for name, own, theirs in zip(("out", "dx"), *found, strict=True)}


def formats(kind: str, shape: tuple[int, int], device: torch.device) -> dict[str, Check]:
    """The device's codes against the CPU's, and bitsandbytes' kernels against the definition."""
    weight = random(shape, torch.device("cpu"), torch.bfloat16) * 0.02
    weight[1] = 0.0
    found: dict[str, Check] = {}
    for double_quant in (False, True) if kind != "int8" else (False,):
        name = "double quant" if double_quant else "single"
        here, there = (quantize(weight.to(where), kind, 64, double_quant) for where in ("cpu", device))
        # The mean of the scales may be summed in another order, so a scale's code may be the neighbour's.
        for key, tensor in here.tensors().items():
            other = there.tensors()[key].cpu()
            share = float((tensor != other).double().mean()) if tensor.dtype != torch.float32 else off(other, tensor)
            found[f"{name}: {key} as on a CPU"] = check(share, 1e-2 if double_quant and key == "absmax" else 1e-6)
        for dtype in (torch.bfloat16, torch.float16):
            differ = float((dequantize(there, dtype) != by_definition(there, dtype)).double().mean())
            found[f"{name}: share of other bits in {dtype}"] = check(differ, 0.0)
    return found


def by_definition(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """`dequantize` in plain torch, whatever kernels the device has."""
    if weight.kind == "int8":
        return blockwise.dequantize_rows(weight.packed, weight.absmax, dtype)
    scales, nested = weight.absmax, weight.nested
    if nested is not None:
        scales = blockwise.dequantize_scales(scales, nested.absmax, nested.code, nested.offset)
    form = {"shape": weight.shape, "dtype": dtype}
    return blockwise.dequantize_4bit(weight.packed, scales, weight.kind, weight.block_size, **form)


def sums(shape: tuple[int, int], device: torch.device) -> dict[str, Check]:
    """`column_dot`, which is torch's backward of a batch normalisation: float32 sums that cancel to their root."""
    left, right = (random(shape, device, torch.bfloat16, seed) for seed in (1, 2))
    factor = random((shape[1],), device, torch.float32, 3)
    expected = (left.double() * right.double()).sum(0) * factor.double()
    cases = {"contiguous": left, "strided": left.T.contiguous().T}
    return {name: check(off(column_dot(each, right, factor), expected), 1e-4) for name, each in cases.items()}
