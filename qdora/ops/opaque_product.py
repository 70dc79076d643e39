"""The products of frozen and adapted layers as opaque operators, which `torch.compile` calls and does not look into.

A layer looks up caches by addresses and versions and brings streamed weights: only Python can do that, and it would
break a graph. Here both are done before a compiled block runs, and their results are arguments.

The operators take the tensors of the packed weight, not a number by which Python would find the layer:

- Checkpoints: what a backward pass needs is saved by autograd with the graph and is freed, or computed again, with it.
- Streaming: a weight is read where it is when the operator is called. The recomputation of a checkpoint, which is
  outside of the compiled code, brings the weight back and passes it anew.
- One code for all like blocks: a number would be a constant in the code, and each layer would be compiled.
- Several models, copies of a model and threads need no table that they share.

A and B are stored in bf16, and their gradients are float32. The gradients of a compiled graph have the dtype of its
inputs, so they flow to stand-ins: float32 tensors in the shape of a parameter, without memory of their own
(`stand_ins`). The values of A and B are arguments without a gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qdora.ops.adapted_product import Call, Operands, product, product_gradients
from qdora.ops.dora import Gain
from qdora.ops.dropout import draw_seed
from qdora.ops.frozen_product import tiled_product, without_autocast
from qdora.ops.packed import TENSOR_NAMES, from_tensors
from qdora.ops.tiles import Weight

_DENSE = "dense"


class OpaqueWeight(NamedTuple):
    """A frozen weight as arguments of an operator."""

    dtype: torch.dtype  # of the products
    kind: str  # that of a packed weight, or "dense"
    block_size: int
    tensors: tuple[Tensor, ...]


class OpaqueOperands(NamedTuple):
    """What the operator of an adapted layer takes beside its input; see `opaque_operands`."""

    weight: OpaqueWeight
    stand_ins: tuple[Tensor, Tensor, Tensor | None]  # of A, B and m (None for LoRA), to which the gradients flow
    factors: tuple[Tensor, Tensor]  # A and diag(s g) B in the dtype of the products; with a mask A and B as stored
    row_factor: Tensor | None  # s g, (out, 1); None for LoRA and with a mask
    gain: Tensor | None  # g, (out,); None for LoRA, and where the weight contains it
    inverse_magnitude: Tensor | None  # 1 / m, (out,); None for LoRA
    keep_bits: Tensor | None
    numbers: Tensor  # s and the dropout, (2,) float64 on the CPU, so that other values need no other code


def opaque_weight(weight: Weight, dtype: torch.dtype) -> OpaqueWeight:
    """A weight for products in `dtype`."""
    tensors = (weight,) if isinstance(weight, Tensor) else tuple(weight.tensors().values())
    # torch compiles other code for views, and the tensors of a streamed weight are views.
    tensors = tuple(each.detach() if each._is_view() else each for each in tensors)
    if isinstance(weight, Tensor):
        return OpaqueWeight(dtype, _DENSE, 0, tensors)
    return OpaqueWeight(dtype, weight.kind, weight.block_size, tensors)


def opaque_operands(
    weight: Weight,
    stand_ins: tuple[Tensor, Tensor, Tensor | None],
    prepared: Operands | tuple[Tensor, Tensor, Gain | None],
    scaling: float,
    dtype: torch.dtype,
    *,
    dropout: float = 0.0,
    keep_bits: Tensor | None = None,
) -> OpaqueOperands:
    """The operands of an adapted layer for products in `dtype`.

    Args:
        prepared: The layer's operands; with a mask A, B and the gain.
        scaling: s = alpha / rank, without dropout's factor.
        dropout, keep_bits: As in `adapted_linear`.
    """
    if isinstance(prepared, Operands):
        base, row_gain = prepared.of_base(weight)
        factors, gain = (prepared.a, prepared.scaled_b), prepared.gain
        row_factor = prepared.row_factor if isinstance(prepared.row_factor, Tensor) else None
    else:
        base, factors, gain, row_factor = weight, prepared[:2], prepared[2], None
        row_gain = None if gain is None else gain.value
    # A and B in the dtype of the products may be the parameters, whose gradients are not these arguments' affair.
    factors = factors[0].detach(), factors[1].detach()
    return OpaqueOperands(
        opaque_weight(base, dtype),
        stand_ins,
        factors,
        row_factor=row_factor,
        gain=row_gain,
        inverse_magnitude=None if gain is None else gain.inverse_magnitude,
        keep_bits=keep_bits,
        numbers=_numbers(scaling, dropout),
    )


def stand_ins(*tensors: Tensor) -> tuple[Tensor, ...]:
    """For each tensor one of its shape, in float32 or wider and without memory, whose gradient is the tensor's."""
    trained = [each for each in tensors if each.requires_grad]
    made = iter(_StandIns.apply(*trained) if trained else ())  # type: ignore[no-untyped-call, unused-ignore]
    return tuple(next(made) if each.requires_grad else _stand_in(each) for each in tensors)


def opaque_frozen_linear(x: Tensor, weight: OpaqueWeight, out_features: int, bias: Tensor | None) -> Tensor:
    """`ops.frozen_product.frozen_linear` by an opaque operator, differentiable once."""
    x = x.to(weight.dtype)
    settings = weight.tensors, weight.kind, weight.block_size, out_features
    out: Tensor = torch.ops.qdora.frozen_linear(x.reshape(-1, x.shape[-1]), *settings)
    return _shaped(out, bias, x)


def opaque_adapted_linear(x: Tensor, operands: OpaqueOperands, out_features: int, bias: Tensor | None = None) -> Tensor:
    """`ops.adapted_product.adapted_linear` by an opaque operator, with its arguments and bits.

    The caller may write into the output: in a compiled graph such a write makes a new tensor.
    """
    weight = operands.weight
    x = x.to(weight.dtype)
    out: Tensor = torch.ops.qdora.adapted_linear(
        x.reshape(-1, x.shape[-1]),
        *operands.stand_ins,
        *operands[2:],
        weight.tensors,
        weight.kind,
        weight.block_size,
        out_features,
    )[0]
    return _shaped(out, bias, x)


def _shaped(out: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    if bias is not None:
        out = out + bias.to(out.dtype)
    return out.reshape(*x.shape[:-1], out.shape[-1])


@cache
def _numbers(scaling: float, dropout: float) -> Tensor:
    return torch.tensor((scaling, dropout), dtype=torch.float64, device="cpu")


def _stand_in(tensor: Tensor) -> Tensor:
    return tensor.new_zeros((), dtype=torch.promote_types(tensor.dtype, torch.float32)).expand(tensor.shape)


class _StandIns(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        return tuple(map(_stand_in, tensors))

    @staticmethod
    def backward(_ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return grads


def _weight_of(tensors: Sequence[Tensor], kind: str, block_size: int, shape: tuple[int, int]) -> Weight:
    if kind == _DENSE:
        return tensors[0]
    # A weight with one scale array has no nested ones: zip ends there.
    return from_tensors(kind, shape, block_size, dict(zip(TENSOR_NAMES, tensors, strict=False)))


@torch.library.custom_op("qdora::frozen_linear", mutates_args=())
def _frozen(x: Tensor, weight: Sequence[Tensor], kind: str, block_size: int, out_features: int) -> Tensor:
    with without_autocast(x.device):
        return tiled_product(x, _weight_of(weight, kind, block_size, (out_features, x.shape[1])), False)


@torch.library.custom_op("qdora::frozen_linear_backward", mutates_args=())
def _frozen_backward(dy: Tensor, weight: Sequence[Tensor], kind: str, block_size: int, in_features: int) -> Tensor:
    with without_autocast(dy.device):
        return tiled_product(dy, _weight_of(weight, kind, block_size, (dy.shape[1], in_features)), True)


@_frozen.register_fake
def _(x: Tensor, _weight: Any, _kind: str, _block_size: int, out_features: int) -> Tensor:
    return x.new_empty(x.shape[0], out_features)


@_frozen_backward.register_fake
def _(dy: Tensor, _weight: Any, _kind: str, _block_size: int, in_features: int) -> Tensor:
    return dy.new_empty(dy.shape[0], in_features)


def _save_frozen(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, ctx.kind, ctx.block_size, _ = inputs
    ctx.in_features = x.shape[1]
    ctx.save_for_backward(*weight)


def _frozen_gradients(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    weight = ctx.saved_tensors
    dx = torch.ops.qdora.frozen_linear_backward(dy, weight, ctx.kind, ctx.block_size, ctx.in_features)
    return dx, [None] * len(weight), None, None, None


_frozen.register_autograd(_frozen_gradients, setup_context=_save_frozen)


def _call(
    factors: Sequence[Tensor],
    row_factor: Tensor | None,
    gain: Tensor | None,
    inverse_magnitude: Tensor | None,
    *,
    keep_bits: Tensor | None,
    numbers: Tensor,
    weight: Weight,
    seed: int,
) -> Call:
    """The call of a product from the operator's arguments."""
    scaling, dropout = numbers.tolist()
    number = scaling / (1.0 - dropout)
    operands = None
    if keep_bits is None:
        of_rows = None if gain is None or inverse_magnitude is None else Gain(gain, inverse_magnitude)
        a, scaled_b = factors
        operands = Operands(a, scaled_b, number if row_factor is None else row_factor, of_rows, scales=None)
    return Call(
        weight, None, keep_bits, scaling=number, dropout=dropout, seed=seed, keeps_copy=False, operands=operands
    )


# The tag says that two calls with the same arguments differ: each draws the seed of its dropout.
@torch.library.custom_op("qdora::adapted_linear", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def _adapted(
    x: Tensor,
    of_A: Tensor,
    of_B: Tensor,
    of_m: Tensor | None,
    factors: Sequence[Tensor],
    row_factor: Tensor | None,
    gain: Tensor | None,
    inverse_magnitude: Tensor | None,
    keep_bits: Tensor | None,
    numbers: Tensor,
    weight: Sequence[Tensor],
    kind: str,
    block_size: int,
    out_features: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The output without its bias, the low-rank activations, and the seed of dropout, () int64 on the CPU."""
    seed = draw_seed() if numbers[1] > 0.0 else 0
    stored = _weight_of(weight, kind, block_size, (out_features, x.shape[1]))
    call = _call(
        factors, row_factor, gain, inverse_magnitude, keep_bits=keep_bits, numbers=numbers, weight=stored, seed=seed
    )
    out, low = product(x, factors[0], factors[1], gain, call)
    return out, x.new_empty(0) if low is None else low, torch.tensor(seed, dtype=torch.int64, device="cpu")


@torch.library.custom_op("qdora::adapted_linear_backward", mutates_args=())
def _adapted_backward(
    dy: Tensor,
    x: Tensor,
    out: Tensor | None,
    low: Tensor,
    seed: Tensor,
    needed: Sequence[bool],
    factors: Sequence[Tensor],
    row_factor: Tensor | None,
    gain: Tensor | None,
    inverse_magnitude: Tensor | None,
    keep_bits: Tensor | None,
    numbers: Tensor,
    weight: Sequence[Tensor],
    kind: str,
    block_size: int,
    out_features: int,
) -> list[Tensor]:
    """Those of dx, dA, dB and dm that are needed."""
    stored = _weight_of(weight, kind, block_size, (out_features, x.shape[1]))
    call = _call(
        factors,
        row_factor,
        gain,
        inverse_magnitude,
        keep_bits=keep_bits,
        numbers=numbers,
        weight=stored,
        seed=int(seed),
    )
    saved = [x, out, low, factors[0], factors[1], gain, inverse_magnitude]
    found = product_gradients(dy, saved, call, needed)
    return [each for each in found if each is not None]


@_adapted.register_fake
def _(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    factors, keep_bits, out_features = arguments[3], arguments[7], arguments[12]
    low = x.new_empty(x.shape[0], factors[0].shape[0]) if keep_bits is None else x.new_empty(0)
    return x.new_empty(x.shape[0], out_features), low, torch.empty((), dtype=torch.int64, device="cpu")


@_adapted_backward.register_fake
def _(_dy: Tensor, x: Tensor, _out: Any, _low: Any, _seed: Any, needed: Any, factors: Any, *rest: Any) -> list[Tensor]:
    inverse_magnitude, keep_bits = rest[2:4]
    (rank, in_features), (out_features, _) = (each.shape for each in factors)
    wide = torch.promote_types(factors[0].dtype, torch.float32)
    found = [x.new_empty(x.shape), x.new_empty(rank, in_features, dtype=wide)]
    db = x.new_empty(rank, out_features, dtype=wide).T  # the layout of its product
    found.append(db if keep_bits is None else x.new_empty(out_features, rank, dtype=wide))
    found += [] if inverse_magnitude is None else [inverse_magnitude.new_empty(inverse_magnitude.shape)]
    return [each for each, need in zip(found, needed, strict=False) if need]


def _save_adapted(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, *_, of_m, factors, row_factor, gain, inverse, keep_bits, numbers, weight = inputs[:11]
    out, low, seed = output
    ctx.settings = inputs[11:]
    read_again = out if of_m is not None and of_m.requires_grad else None
    optional = row_factor, gain, inverse, keep_bits
    ctx.save_for_backward(x, read_again, low, seed, numbers, *factors, *optional, *weight)


def _adapted_gradients(ctx: Any, dy: Tensor, *_: Any) -> tuple[Any, ...]:
    x, out, low, seed, numbers, a, b, row_factor, gain, inverse, keep_bits, *weight = ctx.saved_tensors
    needed = list(ctx.needs_input_grad[:4])
    arguments = [a, b], row_factor, gain, inverse, keep_bits, numbers, weight, *ctx.settings
    found = iter(torch.ops.qdora.adapted_linear_backward(dy, x, out, low, seed, needed, *arguments))
    grads = [next(found) if need else None for need in needed]
    return *grads, [None, None], *[None] * 5, [None] * len(weight), *[None] * 3


_adapted.register_autograd(_adapted_gradients, setup_context=_save_adapted)
