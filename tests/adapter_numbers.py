"""Adapted layers of every form, their numbers for the reference, and what they and the reference compute."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from qdora.adapter import algebra
from qdora.adapter.experts import AdaptedExperts, FrozenExperts
from qdora.adapter.layer import AdaptedLinear, FrozenLinear
from qdora.quant import tiles
from qdora.quant.packed import mask_bits, quantize
from tests import reference, support

GATE = (0.7, 0.0, -1.3, 0.4, 1.1)


def make(
    *,
    kind: str = "dora",
    quant: str | None = None,
    dtype: torch.dtype = torch.float64,
    masked: bool = False,
    gated: bool = False,
    num_experts: int = 0,
    out: int = 24,
    in_: int = 64,
    rank: int = 3,
    bias: bool = True,
    alpha: float = 5.0,
    moved: bool = True,
    seed: int = 0,
    **options: Any,
) -> Any:
    """A layer or a stack, every trainable parameter off its start, on a random base (std 0.1) in blocks of 64.

    `quant` is a kind, with " nested" behind it for double quantisation; `kind` may be "magnitude" (DoRA whose B stays
    0). Row 1 of the base is zero. A masked one has 40 % zeros, and row 1 stays zero.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = out * max(num_experts, 1)
    weight = torch.randn(rows, in_, generator=generator, dtype=torch.float64) * 0.1
    keep = torch.rand(rows, in_, generator=generator) > 0.4
    if rows > 1:
        weight[1], keep[1] = 0.0, False
    weight = weight * keep if masked else weight
    name, _, nested = (quant or "").partition(" ")
    stored = quantize(weight.float(), name, 64, double_quant=bool(nested)) if quant else weight.to(dtype)
    offset = torch.randn((num_experts, out) if num_experts else (out,), generator=generator) * 0.1
    given = offset.to(dtype) if bias else None, mask_bits(keep) if masked else None
    kind_of_layer: Any = "dora" if kind == "magnitude" else kind
    options = {"kind": kind_of_layer, "rank": rank, "alpha": alpha, "dtype": dtype, "masked": masked} | options
    layer: Any
    if num_experts:
        layer = AdaptedExperts(FrozenExperts(stored, num_experts, *given), generator=generator, **options)
    else:
        layer = AdaptedLinear(FrozenLinear(stored, *given), generator=generator, **options)
    if kind == "magnitude":
        layer.lora_A.requires_grad_(False)
        layer.lora_B.requires_grad_(False)
    if gated:
        layer.add_gate()
    if moved:
        support.move_all_parameters_(layer)
        if gated:
            layer.gate.data.copy_(torch.tensor(GATE[:rank]))
    return layer


def cut_tiles(patch: pytest.MonkeyPatch, num_bytes: int = 4096, long: int = 8, short: int = 3) -> None:
    """Let a CPU take a base, and a masked update, in many small tiles."""
    patch.setattr(tiles, "_CPU_TILE_BYTES", num_bytes)
    patch.setattr(tiles, "_LONG", long)
    patch.setattr(tiles, "_SHORT", short)
    patch.setattr(algebra, "_ROWS", 5)


def to_numpy(tensor: torch.Tensor | None) -> Any:
    return None if tensor is None else tensor.detach().double().cpu().numpy().copy()


def own(values: Any, expert: int | None) -> Any:
    """The part of an expert."""
    return values if expert is None or values is None else values[expert]


def experts_of(layer: Any) -> list[int | None]:
    return list(range(layer.num_experts)) if isinstance(layer, AdaptedExperts) else [None]


def arrays(layer: Any, expert: int | None = None) -> dict[str, Any]:
    """The numbers of a layer, or of an expert of a stack, as the reference takes them: the gate is in B."""
    size = layer.out_features if expert is None else layer.expert_features
    rows = slice(0, size) if expert is None else slice(expert * size, (expert + 1) * size)
    b = to_numpy(own(layer.lora_B, expert))
    numbers = {
        "weight": to_numpy(layer.base.dequantized(torch.float64))[rows],
        "lora_a": to_numpy(own(layer.lora_A, expert)),
        "lora_b": b if layer.gate is None else reference.gated(b, to_numpy(layer.gate)),
        "scaling": layer.alpha / (math.sqrt(layer.rank) if layer.rank_stabilized else layer.rank),
        "magnitude": to_numpy(own(layer.magnitude, expert)),
    }
    return numbers | ({"mask": layer.base.keep_mask().cpu().numpy()[rows]} if layer.masked else {})


def expected_norm(layer: Any) -> Any:
    """Of every row, (out,) or (experts * out,)."""
    parts = [arrays(layer, expert) for expert in experts_of(layer)]
    return np.concatenate([reference.row_norm(**{k: v for k, v in p.items() if k != "magnitude"}) for p in parts])


def expected_weight(layer: Any) -> Any:
    """Merged, (out, in) or (experts * out, in)."""
    return np.concatenate([reference.merged_weight(**arrays(layer, expert)) for expert in experts_of(layer)])


def expected(layer: Any, x: torch.Tensor, dy: torch.Tensor, *, keep: Any = None, counts: Any = None) -> dict[str, Any]:
    """The output and every gradient by the reference; `keep` is what dropout multiplies the adapter's input with."""
    given, upstream = (to_numpy(each).reshape(-1, each.shape[-1]) for each in (x, dy))
    found: dict[str, Any] = {"y": np.zeros(upstream.shape), "x": np.zeros(given.shape)}
    found |= {name: np.zeros(each.shape) for name, each in layer.named_parameters() if each.requires_grad}
    ends = np.cumsum([len(given)] if counts is None else counts)
    for expert, start, stop in zip(experts_of(layer), [0, *ends[:-1]], ends, strict=True):
        if start == stop:
            continue
        tokens, numbers = slice(start, stop), arrays(layer, expert)
        mine = None if keep is None else keep[tokens]
        bias = to_numpy(own(layer.base.bias, expert))
        found["y"][tokens] = reference.forward(given[tokens], bias=bias, keep=mine, **numbers)
        grads = reference.gradients(given[tokens], upstream[tokens], keep=mine, **numbers)
        found["x"][tokens] = grads.x
        d_b = grads.lora_b
        if layer.gate is not None:
            d_b, d_gate = reference.gate_gradients(d_b, to_numpy(own(layer.lora_B, expert)), to_numpy(layer.gate))
            found["gate"] += d_gate
        for name, gradient in (("lora_A", grads.lora_a), ("lora_B", d_b), ("magnitude", grads.magnitude)):
            if name in found:
                own(found[name], expert)[...] += gradient
    return found


def results(layer: Any, x: torch.Tensor, dy: torch.Tensor, *tokens: Any) -> dict[str, torch.Tensor]:
    """The layer's own output and gradients, under the names of `expected`."""
    layer.zero_grad()
    x = x.detach().requires_grad_()
    y = layer(x, *tokens)
    y.backward(dy)
    found = {"y": y.detach(), "x": x.grad}
    return found | {name: each.grad for name, each in layer.named_parameters() if each.grad is not None}


def assert_close(found: dict[str, torch.Tensor], wanted: dict[str, Any], tolerance: float) -> None:
    """The same names, and of each tensor no entry is off by more than `tolerance` of the largest."""
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        off = np.abs(to_numpy(found[name]).reshape(value.shape) - value).max(initial=0.0)
        assert off <= tolerance * np.abs(value).max(initial=0.0), (name, off)


def plain_results(layer: AdaptedLinear, x: torch.Tensor, dy: torch.Tensor) -> dict[str, torch.Tensor]:
    """The textbook formula in the dtype of x: the dense sum, its norm held, autograd."""
    w = layer.base.dequantized(x.dtype)
    named = {name: each.detach().to(x.dtype).requires_grad_() for name, each in layer.named_parameters()}
    x = x.detach().requires_grad_()
    a, b = named["lora_A"], named["lora_B"]
    b = b * named["gate"] if "gate" in named else b
    delta = layer.scaling * (b @ a)
    if layer.masked:
        delta = delta * layer.base.keep_mask()
    y = x @ w.T + (x @ delta.T if layer.masked else layer.scaling * ((x @ a.T) @ b.T))
    if "magnitude" in named:
        norm = (w + delta).norm(dim=1).detach()
        dead = norm == 0
        y = y * (named["magnitude"] / norm.masked_fill(dead, 1.0)).masked_fill(dead, 0.0)
    if layer.base.bias is not None:
        y = y + layer.base.bias.to(x.dtype)
    y.backward(dy)
    gradients = {name: each.grad for name, each in named.items() if each.grad is not None}
    return {"y": y.detach(), "x": x.grad} | gradients


def errors_in_bf16(layer: AdaptedLinear, seed: int = 3) -> tuple[dict[str, float], dict[str, float]]:
    """Relative errors of the layer and of the plain formula, both in bf16, for 64 tokens."""
    generator = torch.Generator().manual_seed(seed)
    x, dy = (torch.randn(64, size, generator=generator).bfloat16() for size in (layer.in_features, layer.out_features))
    wanted = expected(layer, x, dy)
    ours, plain = results(layer, x, dy), plain_results(layer, x, dy)
    assert ours.keys() == wanted.keys() == plain.keys()
    return (
        {name: reference.relative_error(to_numpy(ours[name]), value) for name, value in wanted.items()},
        {name: reference.relative_error(to_numpy(plain[name]), value) for name, value in wanted.items()},
    )
