"""Norms, gains and operands of all layers, once per optimizer step, before its first forward pass.

Layers alike (one shape, rank and kind of base) share operations: one by one, some 20 small operations of a layer take
longer to send than to compute.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from qdora.adapter.algebra import (
    Gain,
    entries_at_a_time,
    factored_norms,
    gain,
    measure_cancelled_,
    rounded,
    row_norm,
    scaled_B,
)
from qdora.adapter.layer import AdaptedLinear
from qdora.adapter.product import Operands
from qdora.adapter.rows import gather_runs
from qdora.quant.kernels import is_planning
from qdora.quant.tiles import own_scales, with_scales

_CHECKED_LATER: ContextVar[bool] = ContextVar("norms_are_checked_later", default=False)


@contextmanager
def norms_checked_later(later: bool) -> Iterator[None]:
    """With `later`, `refresh` does not wait for a GPU: the caller asks `unchecked` and repeats a wrong step
    (`settle_norms`)."""
    before = _CHECKED_LATER.set(later)
    try:
        yield
    finally:
        _CHECKED_LATER.reset(before)


def unchecked(layers: Iterable[AdaptedLinear]) -> dict[AdaptedLinear, Tensor]:
    """The layers whose norms may be wrong, and `has_cancelled` of each."""
    return {layer: layer.has_cancelled for layer in layers if layer.has_cancelled is not None}


def settle_norms(layers: Iterable[AdaptedLinear], flags: Sequence[float]) -> bool:
    """Take the flags of the `unchecked` layers, 0 for a right norm, and forget wrong norms. Returns whether there are
    any; `refresh` asks their layers at once from then on."""
    for layer, flag in zip(layers, flags, strict=True):
        layer.has_cancelled = None
        if flag:
            layer.asks_at_once = True
            layer.parameters_changed()
    return any(flags)


def refresh(layers: Iterable[AdaptedLinear]) -> int:
    """Compute what the coming forward pass reads of the parameters, so that a GPU's host waits once, not once a layer.

    Whether a factored norm has cancelled decides what runs next: one question serves all layers, or none is asked
    (`norms_checked_later`). Left to the forward pass: layers that have not run yet, masked ones, stacks of experts.
    Streamed weights must be of one block. All processes that divide a base call this together, since norms are gathered
    in one collective. Returns how many norms were computed.
    """
    known = [(layer, layer.dtype) for layer in layers if layer.dtype is not None]
    whole = [(layer, dtype) for layer, dtype in known if not layer.masked and layer.base.share is None]
    divided = [
        (layer, dtype) for layer, dtype in known if layer.base.share is not None and layer.base.share.by_rows
    ]
    changed = [(layer, dtype) for layer, dtype in [*whole, *divided] if _has_changed(layer, dtype)]
    for layer, _ in changed:
        layer.parameters_changed()  # frees what is of earlier parameters, before as much is made anew
    device = known[0][0].lora_A.device.type if known else "cpu"
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device, enabled=False):
        groups = [_Alike(*some) for some in _alike(changed)]
        _check(groups)
        shares = [(each, share) for each in groups if (share := each.share) is not None]
        if shares:
            lengths, group = [share.out_features for _, share in shares], shares[0][1].group
            norms = gather_runs([each.norm[0] for each, _ in shares], lengths, group)
            for (each, _), norm in zip(shares, norms, strict=True):
                each.norm = norm.unsqueeze(0)
        while groups:
            groups.pop().keep()  # and frees what is not kept
    for layer, dtype in whole:
        layer.operands(dtype)
    return len(changed)


def _has_changed(layer: AdaptedLinear, dtype: torch.dtype) -> bool:
    return layer.kind == "dora" and not layer.kept_norm.knows(*layer.norm_state(dtype))


def _check(groups: Sequence[_Alike]) -> None:
    asked: list[tuple[_Alike, int, Tensor]] = []
    for each in groups:
        for number, flag in enumerate(each.cancelled.any(dim=1)):
            layer = each.layers[number]
            asks_later = _CHECKED_LATER.get() and not layer.asks_at_once and each.share is None
            layer.has_cancelled = flag if asks_later else None
            if not asks_later:
                asked.append((each, number, flag))
    answers = [False] * len(asked)
    if asked and not is_planning():
        device = asked[0][2].device
        answers = torch.stack([flag.to(device) for _, _, flag in asked]).tolist()
    for (each, number, _), has_cancelled in zip(asked, answers, strict=True):
        each.layers[number].asks_at_once = has_cancelled
        if has_cancelled:
            weight = each.weights[number] if each.share is None else each.share.weight()
            found = each.norm[number], each.cancelled[number], weight
            factors, s = (each.lora_A[number], each.lora_B[number][each.rows]), each.layers[number].scaling
            measure_cancelled_(*found, *factors, s, dtype=each.dtype)


class _Alike:
    """Layers whose tensors can be stacked: their norms, (n, out), A, (n, rank, in), and gated B, (n, out, rank).

    Or one layer whose base is divided: the norms, and what they are made of, of this process's `rows`, perhaps none.
    """

    def __init__(self, layers: list[AdaptedLinear], dtype: torch.dtype) -> None:
        self.layers, self.dtype, self.share = layers, dtype, layers[0].base.share
        self.rows: slice = slice(None) if self.share is None else self.share.rows
        self.lora_A = _stacked([rounded(layer.lora_A.detach(), dtype) for layer in layers])
        self.lora_B = _stacked([rounded(layer.gated_B().detach(), dtype) for layer in layers])
        if self.share is None:
            # Decoded scales, where layers keep them, serve the norm and the operands.
            scales = [
                own_scales(layer.base.stored_weight) if layer.may_keep_scales else None for layer in layers
            ]
            stored = zip([layer.base.stored_weight for layer in layers], scales, strict=True)
            weights = [weight if own is None else with_scales(weight, own) for weight, own in stored]
        else:  # its scales are decoded: of one layer at a time
            weights = [self.share.weight()]
        self.weights: list[Any] = weights if self.share is None else [None]
        squared = _stacked([layer.base_squared for layer in layers if layer.base_squared is not None])[
            :, self.rows
        ]
        factors, s = (self.lora_A, self.lora_B[:, self.rows]), layers[0].scaling
        if squared.numel() and not layers[0].masked:
            self.norm, self.cancelled = factored_norms(weights, *factors, s, base_squared=squared, dtype=dtype)
            return
        self.norm, self.cancelled = squared, torch.zeros_like(squared, dtype=torch.bool)
        if self.share is not None and squared.numel():
            bits, (weight,), (a, b) = self.share.keep_bits(), weights, (each[0] for each in factors)
            norm = row_norm(weight, a, b, s, base_squared=squared[0], dtype=dtype, keep_bits=bits)
            self.norm = norm.unsqueeze(0)

    def keep(self) -> None:
        first = self.layers[0]
        magnitude = _stacked([layer.magnitude.detach() for layer in self.layers if layer.magnitude is not None])
        scaling = first.scaling / (1.0 - first.present_dropout)
        own = [layer.lora_A.detach() for layer in self.layers]
        made = operands_of_alike(own, self.lora_A, self.lora_B, magnitude, self.norm, scaling)
        for layer, norm, operands in zip(self.layers, self.norm, made, strict=True):
            weight = self.weights.pop(0)  # its decoded scales go with it
            if layer.may_keep_scales and operands.gain is not None:
                operands = operands._replace(scales=own_scales(weight, operands.gain.value))
            layer.kept_norm.put(*layer.norm_state(self.dtype), norm)
            layer.kept_operands.put(*layer.state(self.dtype), operands)


def operands_of_alike(
    own: Sequence[Tensor], lora_A: Tensor, lora_B: Tensor, magnitude: Tensor, norm: Tensor, scaling: float
) -> list[Operands]:
    """The operands of n layers alike: A, (n, rank, in) in the dtype of the products, B, (n, out, rank), magnitudes and
    row norms, (n, out). Where the A's of the layers, `own`, have that dtype, these serve."""
    value, inverse = gain(magnitude, norm)
    factor = (value * scaling).unsqueeze(-1)
    scaled = scaled_B(lora_B, factor, lora_A.dtype)
    factors = [a if a.dtype == lora_A.dtype else lora_A[i] for i, a in enumerate(own)]
    return [Operands(a, scaled[i], factor[i], Gain(value[i], inverse[i]), None) for i, a in enumerate(factors)]


def _alike(
    layers: Sequence[tuple[AdaptedLinear, torch.dtype]],
) -> Iterator[tuple[list[AdaptedLinear], torch.dtype]]:
    """Groups of layers alike, each of as many as may be stacked at a time."""
    groups: dict[tuple[torch.dtype, tuple[object, ...]], list[AdaptedLinear]] = {}
    for layer, dtype in layers:
        base = layer.base.kind, layer.base.block_size, layer.base.wide_dtype, layer.base.share
        shape = layer.out_features, layer.in_features, layer.rank, layer.scaling, layer.present_dropout
        kept = layer.lora_A.dtype, layer.lora_B.dtype, layer.lora_A.device, layer.may_keep_scales
        groups.setdefault((dtype, (base, shape, kept)), []).append(layer)
    for (dtype, _), some in groups.items():
        first = some[0]
        entries = first.rank * max(first.out_features, first.in_features)
        number = max(1, entries_at_a_time(first.lora_A.device) // entries)
        for start in range(0, len(some), number):
            yield some[start : start + number], dtype


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(list(tensors))
