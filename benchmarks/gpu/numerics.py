"""Are a layer's numbers right at the sizes of real layers? Against float64.

Section `tests` has small layers, formats, tiles, dropout, sums, the loss, and the norm after an optimizer's step.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from gpu.plan import Part, Plan
from qdora.adapter.layer import AdaptedLinear, FrozenLinear
from qdora.quant.packed import quantize

_NAMES = ("out", "dx", "dA", "dB", "dm")


def run(part: Part, plan: Plan, device: torch.device) -> None:
    """Every size and kind, and the other formats of a base at an odd size."""
    for size in plan.check_shapes:
        for kind in ("dora", "lora"):
            part.attempt(f"{kind} {'x'.join(map(str, size))}", layer, kind, size, device)
    for quant in ("int8", "fp4", None):
        part.attempt(f"base {quant or '16 bits'}", layer, "dora", plan.check_shapes[1], device, quant)


def layer(
    kind: Any, size: tuple[int, int, int, int], device: torch.device, quant: str | None = "nf4"
) -> dict[str, dict[str, Any]]:
    """Errors of a layer (tokens, in, out, rank) with a bias and a zero row in its base, every parameter off its start:
    each may be twice the plain formula's in bf16, and half of bf16's last digit."""

    def random(shape: tuple[int, ...], seed: int) -> Tensor:  # N(0, 1), the same numbers on every device
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)

    tokens, in_, out, rank = size
    weight = (random((out, in_), 1) * 0.02).bfloat16()
    weight[3] = 0.0
    base = FrozenLinear(weight if quant is None else quantize(weight, quant, 64), random((out,), 2).bfloat16())
    made = AdaptedLinear(base, kind=kind, rank=rank, dtype=torch.bfloat16)
    with torch.no_grad():
        made.lora_A.copy_(random((rank, in_), 3) / math.sqrt(in_))
        made.lora_B.copy_(random((out, rank), 4) * 0.02)
        if made.magnitude is not None:
            made.magnitude.mul_(0.9 + 0.2 * random((out,), 5).sigmoid())
            made.magnitude[3] = 0.5
    x, dy = random((tokens, in_), 6).bfloat16(), random((tokens, out), 7).bfloat16()
    exact, rough = (formula(made, x, dy, dtype) for dtype in (torch.float64, torch.bfloat16))
    found = results(made.train(), x, dy)
    return {name: check(off(found[name], exact[name]), 2 * off(rough[name], exact[name]) + 2**-9) for name in exact}


def check(value: float, bound: float) -> dict[str, Any]:
    """A measured error and what it may be; NaN fails."""
    return {"value": value, "bound": bound, "ok": bool(value <= bound)}


def off(got: Tensor, expected: Tensor) -> float:
    """||got - expected|| / ||expected|| in float64."""
    expected = expected.double()
    return float((got.double() - expected).norm() / expected.norm().clamp_min(1e-300))


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
    return dict(zip(_NAMES, (out.detach(), *torch.autograd.grad(out, leaves, dy.to(dtype))), strict=False))


def results(layer: AdaptedLinear, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """What the layer gives."""
    x = x.detach().requires_grad_()
    parameters = [layer.lora_A, layer.lora_B, *([] if layer.magnitude is None else [layer.magnitude])]
    out = layer(x)
    return dict(zip(_NAMES, (out.detach(), *torch.autograd.grad(out, [x, *parameters], dy)), strict=False))
