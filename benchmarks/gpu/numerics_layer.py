"""Numerics on the device: the adapted layer's output and every gradient, dropout, zero rows, the cached norm."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from contenders import CONTENDERS, layer_on
from torch import Tensor

from gpu.numerics_formats import Check, check, off, random
from gpu.part import Part
from gpu.plan import Plan
from qdora.nn.adapted_linear import AdaptedLinear
from qdora.nn.frozen_linear import FrozenLinear
from qdora.nn.prepared_gains import prepare_gains
from qdora.ops import tiles
from qdora.ops.packed import quantize
from qdora.train.optimizer import AdapterOptimizer

_NAMES = ("out", "dx", "dA", "dB", "dm")


def run(part: Part, plan: Plan, device: torch.device) -> None:
    """All checks of this file."""
    for shape in plan.check_shapes:
        for kind in ("dora", "lora"):
            name = f"{kind} {'x'.join(map(str, shape))}"
            part.attempt(name, lambda k=kind, s=shape: layer(k, s, device))
    odd = plan.check_shapes[1]
    part.attempt("dora in many tiles", lambda: in_many_tiles(odd, device))
    part.attempt("int8 base", lambda: layer("dora", odd, device, quant="int8"))
    part.attempt("dense base", lambda: layer("dora", odd, device, quant=None))
    part.attempt("float32 adapters", lambda: layer("dora", odd, device, adapter=torch.float32))
    part.attempt("zero rows and zero magnitudes", lambda: zeros(device))
    part.attempt("dropout", lambda: dropout(device))
    for name in ("paged_adamw_8bit", "paged_adamw_32bit", "adamw", "lion"):
        part.attempt(f"norm after a step of {name}", lambda n=name: norm_after_step(n, device))
    part.attempt("prepared gains", lambda: prepared(device))
    for kind in ("lora", "dora"):
        part.attempt(f"PEFT's {kind}", lambda k=kind: peers(k, device))


def make(
    shape: tuple[int, int, int],
    device: torch.device,
    kind: Any = "dora",
    quant: str | None = "nf4",
    adapter: torch.dtype = torch.bfloat16,
    **options: Any,
) -> AdaptedLinear:
    """A layer (in, out, rank) with a bias, every parameter off its start."""
    in_, out, rank = shape
    weight = random((out, in_), device, torch.bfloat16, 1) * 0.02
    stored = weight if quant is None else quantize(weight, quant, 64)
    bias = random((out,), device, torch.bfloat16, 2)
    made = AdaptedLinear(FrozenLinear(stored, bias), kind=kind, rank=rank, dtype=adapter, **options)
    with torch.no_grad():
        made.lora_A.copy_(random((rank, in_), device, torch.float32, 3) / math.sqrt(in_))
        made.lora_B.copy_(random((out, rank), device, torch.float32, 4) * 0.02)
        if made.magnitude is not None:
            made.magnitude.mul_(0.9 + 0.2 * random((out,), device, torch.float32, 5).sigmoid())
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
    gradients = torch.autograd.grad(out, [x, *parameters], dy)
    return dict(zip(_NAMES, (out.detach(), *gradients), strict=False))


def layer(
    kind: str,
    shape: tuple[int, int, int, int],
    device: torch.device,
    quant: str | None = "nf4",
    adapter: torch.dtype = torch.bfloat16,
) -> dict[str, Check]:
    """Errors against float64; each may be twice the plain formula's in bf16, and half of bf16's last digit."""
    tokens, *size = shape
    made = make((size[0], size[1], size[2]), device, kind, quant, adapter)
    x, dy = random((tokens, size[0]), device, torch.bfloat16, 6), random((tokens, size[1]), device, torch.bfloat16, 7)
    exact, rough = (formula(made, x, dy, dtype) for dtype in (torch.float64, torch.bfloat16))
    found = results(made, x, dy)
    return {name: check(off(found[name], exact[name]), 2 * off(rough[name], exact[name]) + 2**-9) for name in exact}


@contextmanager
def small_tiles(num_bytes: int) -> Iterator[None]:
    """Tiles of `num_bytes`, so that a small layer has many."""
    before = tiles._GPU_TILE_BYTES, tiles._CPU_TILE_BYTES
    tiles._GPU_TILE_BYTES = tiles._CPU_TILE_BYTES = num_bytes
    try:
        yield
    finally:
        tiles._GPU_TILE_BYTES, tiles._CPU_TILE_BYTES = before


def in_many_tiles(shape: tuple[int, int, int, int], device: torch.device) -> dict[str, Check]:
    """Products into strided slices of the output, and tiles cut out of packed bytes."""
    with small_tiles(16 << 10):
        return layer("dora", shape, device)


def zeros(device: torch.device) -> dict[str, Check]:
    """A pruned row whose adapter is zero gives zero, a zero magnitude too; no NaN, and a zero magnitude can grow."""
    made = make((64, 32, 4), device, quant=None)
    weight = made.base.get_buffer("weight")
    assert made.magnitude is not None
    assert made.base.bias is not None
    with torch.no_grad():
        weight[3], made.lora_B[3], made.magnitude[3] = 0.0, 0.0, 0.0
        made.magnitude[5] = 0.0
        made.base.bias.zero_()
        made.base_squared = weight.float().square().sum(dim=1)
    made.parameters_changed()
    found = results(made, random((9, 64), device, torch.bfloat16, 8), random((9, 32), device, torch.bfloat16, 9))
    number = sum(int((~value.isfinite()).sum()) for value in found.values())
    return {
        "numbers that are not finite": check(number, 0),
        "largest output of a zero row": check(float(found["out"][:, [3, 5]].abs().max()), 1e-20),
        "dead gradient of the zero magnitude": check(float(found["dm"][5] == 0), 0),
    }


def dropout(device: torch.device) -> dict[str, Check]:
    """With A = B = I on a zero base and x = 1 the output is the kept elements, and dx those of the same call."""
    size, share = 64, 0.3
    made = AdaptedLinear(
        FrozenLinear(torch.zeros(size, size, device=device)),
        kind="lora",
        rank=size,
        alpha=float(size),
        dropout=share,
        dtype=torch.float32,
    ).train()
    with torch.no_grad():
        made.lora_A.copy_(torch.eye(size))
        made.lora_B.copy_(torch.eye(size))
    x = torch.ones(4096, size, device=device)
    torch.manual_seed(1)
    first = results(made, x, x)
    torch.manual_seed(1)
    again = results(made, x, x)
    kept = first["out"]
    number = kept.numel()
    zero_share = float((kept == 0).double().mean())
    tolerance = 5 * math.sqrt(share * (1 - share) / number)
    return {
        "share of zeros, less what was asked": check(abs(zero_share - share), tolerance),
        "share in which dx has other zeros": check(float(((kept == 0) != (first["dx"] == 0)).double().mean()), 0),
        "error of the scale": check(float((kept.max() * (1 - share) - 1).abs()), 1e-5),
        "share that another call with the seed changes": check(float((again["out"] != kept).double().mean()), 0),
    }


def norm_after_step(name: Any, device: torch.device) -> dict[str, Check]:
    """The gain after an optimizer's step is that of the new parameters, and the parameters have moved.

    Matrices of 131,072 elements: bitsandbytes pages states from 100,000 on.
    """
    made = make((1024, 1024, 128), device)
    optimizer = AdapterOptimizer(dict(made.named_parameters()), name=name)
    x = random((8, 1024), device, torch.bfloat16, 8)
    before = made.lora_B.detach().clone()
    for _ in range(2):
        made(x).float().square().sum().backward()
        optimizer.step(0.01)
        optimizer.zero_grad()
    gain = made.gain(torch.bfloat16)
    assert gain is not None
    assert made.magnitude is not None
    dense = (
        made.base.dequantized().double() + made.scaling * made.lora_B.detach().double() @ made.lora_A.detach().double()
    )
    expected = made.magnitude.detach().double() / dense.norm(dim=1)
    return {
        "gain": check(off(gain.value, expected), 1e-3),
        "matrices that did not move": check(float(torch.equal(before, made.lora_B.detach())), 0),
    }


def prepared(device: torch.device) -> dict[str, Check]:
    """Gains computed for all layers at once are those that each computes for itself."""
    layers = [make((128, 96, rank), device) for rank in (2, 3, 4)]
    x = random((8, 128), device, torch.bfloat16, 8)
    alone, together = [], []
    for each in layers:
        each(x)
        with torch.no_grad():
            each.lora_B.mul_(2.0)
    number = prepare_gains(layers)
    for each in layers:
        together.append(each.gain(torch.bfloat16))
        each.parameters_changed()
        alone.append(each.gain(torch.bfloat16))
    same = all(
        a is not None and b is not None and torch.equal(a.value, b.value) for a, b in zip(alone, together, strict=True)
    )
    return {"layers not prepared": check(len(layers) - number, 0), "gains that differ": check(float(not same), 0)}


def peers(kind: str, device: torch.device) -> dict[str, Check]:
    """Ours and PEFT's on the same bytes and parameters give the same numbers, so their times can be compared."""
    weight = quantize(random((192, 128), device, torch.bfloat16, 1) * 0.02, "nf4", 64)
    x, dy = random((64, 128), device, torch.bfloat16, 6), random((64, 192), device, torch.bfloat16, 7)
    found = []
    for name in (f"own_{kind}", f"peft_{kind}"):
        leaf = x.detach().requires_grad_()
        out = layer_on(weight, CONTENDERS[name], 8)(leaf)
        found.append((out.detach(), *torch.autograd.grad(out, [leaf], dy)))
    (own_out, own_dx), (peft_out, peft_dx) = found
    return {"out": check(off(own_out, peft_out), 1e-2), "dx": check(off(own_dx, peft_dx), 1e-2)}
