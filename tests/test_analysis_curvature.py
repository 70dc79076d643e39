"""Curvature products against the dense matrices of autograd in float64, and what theory says at B = 0."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from qdora.analysis.curvature import CurvatureOperator, curvature_of, labelled_logits, top_eigenpairs
from qdora.analysis.differentiable import FACTORS, PARTS, plain_model
from qdora.data.batching import MicroBatch
from qdora.model.inject import adapted_layers, inject
from qdora.ops.frozen_product import frozen_linear
from qdora.ops.packed import dequantize, quantize
from tests import tiny_adapted, tiny_curvature
from tests.tiny_curvature import LAYERS

CASES = [("lora", "none", FACTORS), ("dora", "attached", PARTS), ("dora", "held", PARTS)]


def as_matrix(operator: CurvatureOperator) -> np.ndarray[Any, np.dtype[np.float64]]:
    columns = [operator.product(unit) for unit in torch.eye(operator.size, dtype=torch.float64)]
    return torch.stack(columns, dim=1).numpy()


def in_numpy(operator: CurvatureOperator) -> Callable[[Any], Any]:
    return lambda vector: operator.product(torch.from_numpy(vector)).numpy()


@pytest.mark.parametrize("kind, norm, parts", CASES)
def test_masked_products_are_those_of_the_dense_matrix(kind: str, norm: Any, parts: tuple[str, ...]) -> None:
    model = tiny_curvature.adapted(kind=kind, masked=True)
    expected = tiny_curvature.dense("llama", model, LAYERS, parts, curvature="hessian", held=norm == "held")
    with curvature_of(model, LAYERS, tiny_curvature.batches(), curvature="hessian", norm=norm, parts=parts) as operator:
        vector = torch.randn(operator.size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        np.testing.assert_allclose(operator.product(vector), expected @ vector.numpy(), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    "kind, norm, parts, curvature",
    [
        (*CASES[0], "gauss_newton"),
        (*CASES[1], "gauss_newton"),
        (*CASES[1], "hessian"),
        (*CASES[2], "hessian"),
        # What these two share with the others is fast above, and their products in the test before.
        pytest.param(*CASES[0], "hessian", marks=pytest.mark.slow),
        pytest.param(*CASES[2], "gauss_newton", marks=pytest.mark.slow),
    ],
)
def test_products_and_eigenvalues_are_those_of_the_dense_matrix(
    kind: str, norm: Any, parts: tuple[str, ...], curvature: Any
) -> None:
    model = tiny_curvature.adapted(kind=kind)
    expected = tiny_curvature.dense("llama", model, LAYERS, parts, curvature=curvature, held=norm == "held")
    with curvature_of(model, LAYERS, tiny_curvature.batches(), curvature=curvature, norm=norm, parts=parts) as operator:
        generator = torch.Generator().manual_seed(0)
        vectors = torch.randn(3, operator.size, dtype=torch.float64, generator=generator)
        for vector in vectors:
            np.testing.assert_allclose(operator.product(vector), expected @ vector.numpy(), rtol=1e-9, atol=1e-11)
        assert operator.num_matvecs == 3
        found = top_eigenpairs(in_numpy(operator), operator.size, 8, tolerance=0.0)
    values = np.linalg.eigvalsh((expected + expected.T) / 2)
    largest = values[np.argsort(-np.abs(values))][:8]
    np.testing.assert_allclose(found.values, largest, rtol=1e-6)
    assert found.residuals.max() < 1e-9 * abs(largest[0])
    np.testing.assert_allclose(expected @ found.vectors, found.vectors * found.values, atol=1e-8 * abs(largest[0]))


@pytest.mark.parametrize("curvature", ["hessian", "gauss_newton"])
@pytest.mark.parametrize(
    "architecture, tolerance",
    [("qwen2", 1e-9), ("gemma2", 1e-6)],  # biases; capped logits, and attention whose softmax is float32
)
def test_other_architectures(architecture: str, tolerance: float, curvature: Any) -> None:
    model = tiny_curvature.adapted(architecture)
    layer = LAYERS[:1]
    expected = tiny_curvature.dense(architecture, model, layer, FACTORS, curvature=curvature, held=False)
    with curvature_of(model, layer, tiny_curvature.batches(), curvature=curvature, norm="attached") as operator:
        vector = torch.randn(operator.size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        product = expected @ vector.numpy()
        np.testing.assert_allclose(operator.product(vector), product, rtol=0, atol=tolerance * np.abs(product).max())


def test_attached_and_held_differ_by_far_more_than_rounding() -> None:
    model = tiny_curvature.adapted()
    products = {}
    norms: tuple[Any, ...] = ("attached", "held")
    for norm in norms:
        with curvature_of(model, LAYERS, tiny_curvature.batches(), curvature="hessian", norm=norm) as operator:
            products[norm] = operator.product(torch.ones(operator.size, dtype=torch.float64))
    assert (products["attached"] - products["held"]).norm() > 0.01 * products["attached"].norm()


def test_one_micro_batch_keeps_its_graph_and_gives_the_same() -> None:
    model = tiny_curvature.adapted()
    batch = tiny_curvature.batches()[:1]
    for curvature in ("hessian", "gauss_newton"):
        with curvature_of(model, LAYERS, batch, curvature=curvature, norm="attached") as operator:  # type: ignore[arg-type]
            vector = torch.ones(operator.size, dtype=torch.float64)
            first, second = operator.product(vector), operator.product(vector)
        with curvature_of(model, LAYERS, batch * 2, curvature=curvature, norm="attached") as operator:  # type: ignore[arg-type]
            twice = operator.product(vector)  # the same batch twice is the same mean
        assert torch.equal(first, second)
        torch.testing.assert_close(twice, first, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind, norm", [("lora", "none"), ("dora", "attached"), ("dora", "held")])
def test_at_zero_b_the_inertia_is_that_of_the_gradient(kind: str, norm: Any) -> None:
    """H_AA = 0 and H_AB = s G_k for each component, so a G of full row rank gives rank * out eigenvalues below zero.

    G is the gradient by the adapted weight; with the norm attached, of its part across the weight's rows.
    """
    rank = 2
    model = tiny_curvature.adapted(kind=kind, moved=False, rank=rank)
    (name,) = layers = ("model.layers.0.self_attn.v_proj",)
    layer = adapted_layers(model)[name]
    out, in_ = layer.out_features, layer.in_features
    ids = torch.randint(0, 336, (3, 11), generator=torch.Generator().manual_seed(0))
    batch = MicroBatch(ids, torch.ones_like(ids), ids, torch.zeros(3, dtype=torch.int64), ["task"], ["a", "b", "c"])
    with curvature_of(model, layers, [batch], curvature="hessian", norm=norm) as operator:
        hessian = as_matrix(operator)
    gradient = gradient_by_weight(model, name, batch)
    if norm == "attached":
        base = layer.base.dequantized(torch.float64)
        gradient = gradient - (gradient * base).sum(1, keepdim=True) / base.square().sum(1, keepdim=True) * base
    size_a = rank * in_
    assert np.abs(hessian[:size_a, :size_a]).max() == 0.0
    mixed = hessian[:size_a, size_a:].reshape(rank, in_, out, rank)
    for first in range(rank):
        for second in range(rank):
            expected = (layer.scaling * gradient.T).numpy() if first == second else np.zeros((in_, out))
            np.testing.assert_allclose(mixed[first, :, :, second], expected, rtol=1e-9, atol=1e-13)
    rank_of_gradient = int(torch.linalg.matrix_rank(gradient, rtol=1e-9))
    assert rank_of_gradient == out  # enough tokens; else directions of B alone would have their say
    values = np.linalg.eigvalsh((hessian + hessian.T) / 2)
    assert (values < -1e-9 * np.abs(values).max()).sum() == rank * rank_of_gradient


def gradient_by_weight(model: Any, name: str, batch: Any) -> torch.Tensor:
    """dL/dW of the base under an adapter that still is zero: of a model without adapters, by autograd."""
    plain = tiny_curvature.base("llama")
    weight = plain.get_submodule(name).weight.requires_grad_(True)
    logits = plain(input_ids=batch.input_ids).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels[:, 1:].flatten())
    (gradient,) = torch.autograd.grad(loss, weight)
    return gradient


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("quant", ["nf4", "int8", None])
def test_the_plain_model_is_the_model(kind: str, quant: str | None) -> None:
    model = tiny_adapted.adapted("qwen2", quant=quant, kind=kind, dropout=0.5)
    model.train()
    modes = {name: module.training for name, module in model.named_modules()}
    names = list(adapted_layers(model))
    batch = tiny_curvature.batches()[1]
    norm: Any = "attached" if kind == "dora" else "none"
    with plain_model(model, names, norm=norm) as leaves:
        logits, targets = labelled_logits(model, batch, torch.device("cpu"))
        assert [leaf.dtype for leaf in leaves.values()] == [torch.float32] * 2 * len(names)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert not any("forward" in vars(module) for module in model.modules())
    model.eval()
    with torch.no_grad():
        whole = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, :-1]
    torch.testing.assert_close(logits, whole[batch.labels[:, 1:] != -100], rtol=1e-4, atol=1e-5)
    assert torch.equal(targets, tiny_curvature.targets(batch))


def test_rows_of_zeros_stay_zero_and_finite() -> None:
    model = tiny_adapted.base(dtype=torch.float64)
    weight = model.model.layers[1].mlp.down_proj.weight
    weight.data[3] = 0.0
    inject(model, rank=2, targets=["model.layers.1.mlp.down_proj"], dtype=torch.float64)
    name = "model.layers.1.mlp.down_proj"
    for norm in ("attached", "held"):
        with curvature_of(
            model, [name], tiny_curvature.batches(), curvature="hessian", norm=norm, parts=PARTS
        ) as operator:  # type: ignore[arg-type]
            assert operator.product(torch.ones(operator.size, dtype=torch.float64)).isfinite().all()


@pytest.mark.parametrize("quant", ["nf4", "int8", None])
def test_the_frozen_product_is_differentiable_twice(quant: str | None) -> None:
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    stored = quantize(weight, quant, 64) if quant else weight.double()
    dense = dequantize(stored, torch.float32).double() if quant else weight.double()  # type: ignore[arg-type]
    x = torch.randn(2, 3, 64, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(frozen_linear(x, stored), x @ dense.T, rtol=1e-6, atol=1e-7)
    short = x.detach()[0, :1, :].requires_grad_(True)
    assert torch.autograd.gradcheck(lambda each: frozen_linear(each, stored), (short,))
    assert torch.autograd.gradgradcheck(lambda each: frozen_linear(each, stored).tanh(), (short,))


def test_faults() -> None:
    model = tiny_curvature.adapted()
    batches = tiny_curvature.batches()
    for changes, message in [
        ({"layers": ["nowhere"]}, "no adapted layers"),
        ({"norm": "none"}, "norm 'none' for dora layers; allowed: attached, held"),
        ({"parts": ("bias",)}, "allowed: one or more of lora_A"),
        ({"batches": []}, "no labelled token"),
    ]:
        given: dict[str, Any] = {"layers": LAYERS, "batches": batches, "norm": "attached"} | changes
        with pytest.raises(ValueError, match=message), curvature_of(model, curvature="hessian", **given):
            pass
    with (
        pytest.raises(ValueError, match="'magnitude' in LoRA layers"),
        plain_model(tiny_curvature.adapted(kind="lora"), LAYERS, norm="none", parts=PARTS),
    ):
        pass
    narrow = tiny_adapted.adapted(dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"allowed: float32"), plain_model(narrow, [LAYERS[0]], norm="held"):
        pass
    with (
        curvature_of(model, LAYERS, batches, curvature="hessian", norm="held") as operator,
        pytest.raises(ValueError, match="allowed: "),
    ):
        operator.product(torch.zeros(3))
