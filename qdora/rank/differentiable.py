"""A model whose adapters run by the plain formula: differentiable any number of times, in float32, without dropout.

    y = g * (x W^T + s (x A^T) B^T) + bias,        g = m / ||W + s B A||_row

A masked adapter (`adapter.mask: keep`) has M o (B A) in place of B A, also in the norm. The part `update` is the whole
matrix s B A, to differentiate by it instead of by its factors. A stack of experts is this formula for each expert with
its tokens; which expert a token goes to is a constant, what the router weighs it with is not.

The training layer keeps the norm constant in its backward pass (DoRA, arXiv 2402.09353, sec. 4.3), so autograd through
it gives the curvature of another function than the loss. Here the caller chooses:

    attached    n(A, B) is part of the graph: the derivatives are those of the loss.
    held        n is the number that it is now: the derivatives are those of the surrogate that training follows.

At the point itself both give the loss of the training layer. LoRA has no norm: `none`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from qdora.adapter.expert_product import ExpertTokens, add_expert_bias, expert_rows, frozen_stack
from qdora.adapter.experts import AdaptedExperts
from qdora.adapter.layer import AdaptedLinear, evaluation_mode
from qdora.adapter.product import frozen_linear
from qdora.model.inject import adapted_layers
from qdora.quant.tiles import Weight, dense_weight

Norm = Literal["attached", "held", "none"]
NORMS: tuple[Norm, ...] = ("attached", "held")
PARTS = ("lora_A", "lora_B", "magnitude")
FACTORS = PARTS[:2]
UPDATE = ("update",)
"""In place of the factors: s B A as one dense matrix, (out, in) or (experts * out, in), before the mask."""


@dataclass(frozen=True)
class PlainLayer:
    """The values of an adapted layer, or of one expert of a stack, while it runs by the plain formula.

    Attributes:
        values: Part ("lora_A", ...) -> its value in the dtype of the analysis; the chosen ones are leaves of a graph.
        row_norm: ||W + s B A||_row of the present values, (out,), or (experts, out) of a stack; None for LoRA.
        attached: The norm is computed anew in every forward pass, as a part of the graph.
        keep_mask: M, (out, in) or (experts * out, in) bool; None without a mask.
    """

    values: dict[str, Tensor]
    row_norm: Tensor | None
    attached: bool
    keep_mask: Tensor | None = None

    def gain(self, norm: Tensor) -> Tensor:
        """g = m / norm for each row, and 0 for a row whose present norm is 0."""
        assert self.row_norm is not None, "LoRA has no gain"
        dead = self.row_norm == 0
        return (self.values["magnitude"] / norm.masked_fill(dead, 1.0)).masked_fill(dead, 0.0)

    def of_expert(self, expert: int) -> PlainLayer:
        """The values of one expert of a stack, which shares their graph."""
        size = self.values["lora_B"].shape[1]
        rows = slice(expert * size, (expert + 1) * size)
        values = {name: value[rows] if name in UPDATE else value[expert] for name, value in self.values.items()}
        norm = None if self.row_norm is None else self.row_norm[expert]
        return PlainLayer(values, norm, self.attached, None if self.keep_mask is None else self.keep_mask[rows])

    def dense_update(self, scaling: float) -> Tensor | None:
        """M o (s B A), (out, in) with its graph, where it has to be formed: for a mask, or by the whole matrix."""
        update = self.values.get("update")
        if update is None:
            if self.keep_mask is None:
                return None
            update = self.values["lora_B"] @ self.values["lora_A"] * scaling
        return update if self.keep_mask is None else update.masked_fill(~self.keep_mask, 0.0)


@contextmanager
def plain_model(
    model: nn.Module, layers: Collection[str], *, norm: Norm, parts: Collection[str] = FACTORS
) -> Iterator[dict[str, Tensor]]:
    """Run `model` by the plain formula inside the block; afterwards it is as before.

    Inside: eval mode, attention by SDPA's MATH kernel or in plain torch (the other kernels cannot be differentiated
    twice), adapters in float32 (float64 on a float64 base).

    Args:
        model: A causal LM with adapters, its activations in float32 or float64.
        norm: "attached" or "held" in these layers; "none" for LoRA. In other layers the norm is constant.
        parts: The parameters to differentiate by, or `UPDATE`.
    Yields: "<layer>.<part>" -> leaf, in model order.
    Raises: ValueError: A layer that is not there, a norm that does not fit the kind, a model in 16 bits.
    """
    adapted = adapted_layers(model)
    check_layers(model, layers, norm=norm, parts=parts)
    leaves: dict[str, Tensor] = {}
    attention = getattr(getattr(model, "config", None), "_attn_implementation", None)
    try:
        if attention not in (None, "eager", "sdpa"):
            model.set_attn_implementation("eager")  # type: ignore[operator]
        for name, layer in adapted.items():
            plain = _plain_layer(layer, name in layers and norm == "attached", name in layers and "update" in parts)
            if name in layers:
                leaves |= {f"{name}.{part}": plain.values[part].requires_grad_(True) for part in parts}
            if isinstance(layer, AdaptedExperts):
                vars(layer)["forward"] = partial(plain_experts, layer, plain)
            else:
                vars(layer)["forward"] = partial(plain_forward, layer, plain)
        with evaluation_mode(model), sdpa_kernel(SDPBackend.MATH):
            yield leaves
    finally:
        for layer in adapted.values():
            vars(layer).pop("forward", None)
        if attention not in (None, "eager", "sdpa"):
            model.set_attn_implementation(attention)  # type: ignore[operator]


def plain_forward(layer: AdaptedLinear, plain: PlainLayer, x: Tensor) -> Tensor:
    """(..., in) -> (..., out), the formula above written out."""
    a, b = plain.values["lora_A"], plain.values["lora_B"]
    weight = layer.base.stored_weight
    update = plain.dense_update(layer.scaling)
    out = frozen_linear(x, weight) + ((x @ a.T) @ b.T * layer.scaling if update is None else x @ update.T)
    if plain.row_norm is not None:
        norm = plain.row_norm
        if plain.attached:
            norm = _norm_now(weight, layer.base_squared, plain, update, layer.scaling)
        out = out * plain.gain(norm)
    return out if layer.base.bias is None else out + layer.base.bias.to(out.dtype)


def plain_experts(layer: AdaptedExperts, plain: PlainLayer, x: Tensor, tokens: ExpertTokens) -> Tensor:
    """`plain_forward` for a stack of experts: (tokens, in), sorted by expert -> (tokens, out)."""
    added, gains = [], []
    for run in tokens.reached:
        (expert,) = run.experts
        own = plain.of_expert(expert)
        update = own.dense_update(layer.scaling)
        a, b = own.values["lora_A"], own.values["lora_B"]
        part = x[run.tokens]
        added.append((part @ a.T) @ b.T * layer.scaling if update is None else part @ update.T)
        if own.row_norm is not None:
            norm = own.row_norm
            if plain.attached:
                rows = expert_rows(layer.base.stored_weight, layer.num_experts, run)
                squared = None if layer.base_squared is None else layer.base_squared[expert]
                norm = _norm_now(rows, squared, own, update, layer.scaling)
            gains.append(own.gain(norm).expand(len(part), -1))
    out = frozen_stack(x, layer.base.stored_weight, tokens) + torch.cat(added)
    if gains:
        out = out * torch.cat(gains)
    return out if layer.base.bias is None else add_expert_bias(out, layer.base.bias, tokens)


def _norm_now(
    weight: Weight, base_squared: Tensor | None, plain: PlainLayer, update: Tensor | None, scaling: float
) -> Tensor:
    """The attached norm of a layer or of one expert, (out,)."""
    if update is not None:
        return _dense_norm(dense_weight(weight, torch.float64), update)
    assert base_squared is not None
    return attached_norm(weight, base_squared, plain.values["lora_A"], plain.values["lora_B"], scaling)


def attached_norm(weight: Weight, base_squared: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """||W + s B A|| of each row with its graph, (out,); a row of zeros has no derivative and comes out as 1.

    ||w + s b A||^2 = ||w||^2 + 2 s b (A w^T) + s^2 b (A A^T) b^T, summed in float64: a derivative of it divides by n^3,
    so a row that has cancelled would lose its digits three times over.

    `base_squared` is ||w||^2 of the rows of the frozen `weight`, (out,).
    """
    wide = torch.float64
    products = frozen_linear(lora_A, weight).T.to(wide)  # (out, rank)
    a, b = lora_A.to(wide), lora_B.to(wide)
    squared = base_squared.to(wide) + ((2.0 * products + b @ (a @ a.T) * scaling) * b).sum(dim=1) * scaling
    # A sum of rounding noise is a zero row, too
    return squared.masked_fill(squared <= 0, 1.0).sqrt().to(lora_A.dtype)


def _dense_norm(weight: Tensor, update: Tensor) -> Tensor:
    """As `attached_norm`, from W, in float64, + update itself, where nothing cancels after the squares."""
    squared = (weight + update.to(torch.float64)).square().sum(dim=1)
    return squared.masked_fill(squared <= 0, 1.0).sqrt().to(update.dtype)


def _plain_layer(layer: AdaptedLinear, attached: bool, whole: bool) -> PlainLayer:
    dtype = layer.base.wide_dtype
    values = {"lora_A": layer.lora_A, "lora_B": layer.stored_B(), "magnitude": layer.magnitude}
    copies = {name: value.detach().to(dtype, copy=True) for name, value in values.items() if value is not None}
    if whole:
        product = copies["lora_B"] @ copies["lora_A"] * layer.scaling
        copies["update"] = product.flatten(0, -2)
    keep_mask = layer.base.keep_mask() if layer.masked else None
    return PlainLayer(copies, None if layer.magnitude is None else layer.row_norm(), attached, keep_mask)


def check_layers(
    model: nn.Module,
    layers: Collection[str],
    *,
    norm: Norm,
    parts: Collection[str] = FACTORS,
) -> None:
    """Raises ValueError for what `plain_model` cannot take."""
    adapted = adapted_layers(model)
    missing = [name for name in layers if name not in adapted]
    if missing or not layers:
        raise ValueError(f"no adapted layers {missing}; allowed: one or more of {', '.join(adapted) or 'none'}.")
    unknown = [part for part in parts if part not in PARTS]
    if (unknown or not parts) and tuple(parts) != UPDATE:
        raise ValueError(f"no parameters {unknown}; allowed: one or more of {', '.join(PARTS)}, or update alone.")
    kinds = {adapted[name].kind for name in layers}
    if "magnitude" in parts and "lora" in kinds:
        raise ValueError(f"no parameter 'magnitude' in LoRA layers; allowed: {', '.join(FACTORS)}.")
    allowed = NORMS if "dora" in kinds else ("none",)
    if norm not in allowed:
        raise ValueError(f"norm {norm!r} for {', '.join(sorted(kinds))} layers; allowed: {', '.join(allowed)}.")
    narrow = {each.dtype for each in model.parameters() if each.ndim > 1 and not each.requires_grad}
    if narrow - {torch.float32, torch.float64}:
        raise ValueError(f"a model in {', '.join(map(str, narrow))}; allowed: float32 or float64, see `load_run`.")
