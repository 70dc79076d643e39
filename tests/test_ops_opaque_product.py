"""The opaque operators: the bits of the plain products, float64's numbers, and the shapes that they promise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qdora.nn.adapted_linear import AdaptedLinear
from qdora.nn.frozen_linear import FrozenLinear
from qdora.ops.opaque_product import opaque_weight, stand_ins
from qdora.ops.packed import quantize
from qdora.ops.sparsity import mask_bits
from tests import reference, tiny

CASES: dict[str, dict[str, Any]] = {
    "dora": {},
    "lora": {"kind": "lora"},
    "bias": {"bias": True},
    "dropout": {"dropout": 0.3},
    "nf4": {"quant": "nf4", "dtype": torch.float32, "in_": 64},
    "crossing rows": {"quant": "nf4", "dtype": torch.float32},
    "int8": {"quant": "int8", "dtype": torch.float32, "bias": True},
    "bf16": {"quant": "nf4", "dtype": torch.bfloat16, "in_": 64, "dropout": 0.3},
}


def masked(kind: str, dropout: float = 0.0) -> AdaptedLinear:
    keep = torch.rand(24, 40, generator=torch.Generator().manual_seed(4)) > 0.4
    weight = torch.randn(24, 40, generator=torch.Generator().manual_seed(5), dtype=torch.float64) * keep
    base = FrozenLinear(weight, keep_bits=mask_bits(keep))
    return AdaptedLinear(base, kind=kind, rank=3, dtype=torch.float64, masked=True, dropout=dropout)  # type: ignore


def layer_of(case: str) -> AdaptedLinear:
    if case.startswith("masked"):
        layer = masked(case.removeprefix("masked "), dropout=0.3)
    elif case == "gated":
        layer = tiny.adapted_linear(bias=True)
        layer.add_gate()
    else:
        layer = tiny.adapted_linear(**CASES[case])
    tiny.move_all_parameters_(layer)
    for parameter in layer.parameters():
        parameter.grad_dtype = torch.promote_types(parameter.dtype, torch.float32)
    return layer.train()


def results(layer: Any, x: Tensor, dy: Tensor, *, opaque: bool) -> dict[str, Tensor]:
    """Output and gradients; by the opaque operator, if asked."""
    torch.manual_seed(7)
    layer.zero_grad()
    x = x.clone().requires_grad_()
    if opaque and isinstance(layer, AdaptedLinear):
        layer.opaque = layer.opaque_operands(x.dtype, stand_ins(*layer.trained_tensors()))
    elif opaque:
        layer.opaque = opaque_weight(layer.stored_weight, x.dtype)
    out = layer(x)
    layer.opaque = None
    out.backward(dy)
    assert x.grad is not None
    found = {name: parameter.grad for name, parameter in layer.named_parameters()}
    assert all(gradient is not None for gradient in found.values())
    return {"out": out.detach(), "x": x.grad, **found}


def inputs(layer: Any) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    dtype = layer.lora_A.dtype
    x = torch.randn(2, 7, layer.in_features, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.randn(2, 7, layer.out_features, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("case", [*CASES, "gated", "masked dora", "masked lora"])
def test_bits_are_those_of_the_plain_product(case: str) -> None:
    layer = layer_of(case)
    x, dy = inputs(layer)
    expected, found = (results(layer, x, dy, opaque=opaque) for opaque in (False, True))
    assert len(found) >= 4
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
        assert found[name].dtype == value.dtype, name


def test_output_and_gradients_are_those_of_float64_loops() -> None:
    layer = layer_of("bias")
    x, dy = inputs(layer)
    found = results(layer, x, dy, opaque=True)
    flat_x, flat_dy = x.flatten(0, 1).numpy(), dy.flatten(0, 1).numpy()
    numbers: Any = {
        "weight": layer.base.dequantized(torch.float64).numpy(),
        "lora_a": layer.lora_A.detach().numpy(),
        "lora_b": layer.lora_B.detach().numpy(),
        "scaling": layer.alpha / layer.rank,
        "magnitude": layer.magnitude.detach().numpy(),  # type: ignore[union-attr]
    }
    assert layer.base.bias is not None
    out = reference.forward(flat_x, bias=layer.base.bias.numpy(), **numbers)
    grads = reference.gradients(flat_x, flat_dy, **numbers)
    pairs = {"out": out, "x": grads.x, "lora_A": grads.lora_a, "lora_B": grads.lora_b, "magnitude": grads.magnitude}
    for name, value in pairs.items():
        assert value is not None
        assert reference.relative_error(found[name].numpy().reshape(value.shape), value) < 1e-12, name


@pytest.mark.parametrize("quant", ["nf4", None])
def test_a_frozen_layer_has_the_bits_of_the_plain_product(quant: str | None) -> None:
    weight = torch.randn(24, 64, generator=torch.Generator().manual_seed(2))
    bias = torch.randn(24, generator=torch.Generator().manual_seed(3))
    layer = FrozenLinear(quantize(weight, quant) if quant else weight, bias)
    x, dy = torch.randn(3, 5, 64), torch.randn(3, 5, 24)
    expected, found = (results(layer, x, dy, opaque=opaque) for opaque in (False, True))
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("case", ["nf4", "masked dora", "lora"])
def test_shapes_and_dtypes_are_those_that_a_compiler_is_told(case: str) -> None:
    """torch's own check of an operator: its schema, its fake results, and its gradient in a graph of any lengths."""
    layer = layer_of(case)
    x, _ = inputs(layer)
    operands = layer.opaque_operands(x.dtype, stand_ins(*layer.trained_tensors()))
    weight = operands.weight
    flat = x.flatten(0, 1).requires_grad_()
    settings = weight.tensors, weight.kind, weight.block_size, layer.out_features
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    arguments = (flat, *operands.stand_ins, *operands[2:], *settings)
    torch.library.opcheck(torch.ops.qdora.adapted_linear.default, arguments, test_utils=checks)
    torch.library.opcheck(torch.ops.qdora.frozen_linear.default, (flat, *settings), test_utils=checks)


def test_gradients_of_bf16_factors_are_not_rounded_to_bf16() -> None:
    layer = layer_of("bf16")
    x, dy = inputs(layer)
    found = results(layer, x, dy, opaque=True)
    for name in ("lora_A", "lora_B"):
        assert found[name].dtype == torch.float32
    assert not torch.equal(found["lora_B"], found["lora_B"].bfloat16().float())


def test_a_stand_in_takes_no_memory_and_only_trained_tensors_have_a_gradient() -> None:
    trained, frozen = torch.zeros(30, 50, dtype=torch.bfloat16, requires_grad=True), torch.zeros(7)
    first, second = stand_ins(trained, frozen)
    assert (first.shape, first.dtype, first.untyped_storage().nbytes()) == (trained.shape, torch.float32, 4)
    assert (first.requires_grad, second.requires_grad) == (True, False)
