"""Curvature products against the dense matrices of autograd in float64, and eigenvalues of known matrices."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from qdora.model.inject import adapted_layers
from qdora.rank.curvature import FACTORS, PARTS, curvature_of, labelled_logits, plain_model, top_eigenpairs
from tests import support
from tests.support import CURVED_LAYERS, STACKS, update_of

CASES = [("lora", "none", FACTORS), ("dora", "attached", PARTS), ("dora", "held", PARTS)]


def normal(*size: int) -> Tensor:
    return torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


MASKED = [(*case, "hessian", True) for case in CASES]
PLAIN = [(*CASES[0], "gauss_newton"), (*CASES[1], "gauss_newton"), (*CASES[1], "hessian"), (*CASES[2], "hessian")]


@pytest.mark.parametrize("kind, norm, parts, curvature, masked", [*MASKED, *((*each, False) for each in PLAIN)])
def test_products_and_eigenvalues_are_those_of_the_dense_matrix(kind, norm, parts, curvature, masked):
    model, batches = support.float64_adapted(kind=kind, masked=masked), support.curved_batches()
    expected = support.dense_curvature(model, CURVED_LAYERS, parts, curvature=curvature, held=norm == "held")
    with curvature_of(model, CURVED_LAYERS, batches, curvature=curvature, norm=norm, parts=parts) as operator:
        for vector in normal(3, operator.size):
            np.testing.assert_allclose(operator.product(vector), expected @ vector.numpy(), rtol=1e-8, atol=1e-10)
        if masked or norm != "attached":
            return
        found, vectors, residuals = top_eigenpairs(operator.product, operator.size, 8, tolerance=0.0)
    values = np.linalg.eigvalsh((expected + expected.T) / 2)
    largest = values[np.argsort(-np.abs(values))][:8]
    np.testing.assert_allclose(found, largest, rtol=1e-6)
    assert residuals.max() < 1e-9 * abs(largest[0])
    np.testing.assert_allclose(expected @ vectors.numpy(), vectors * found, atol=1e-8 * abs(largest[0]))


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("mixture")


@pytest.mark.parametrize(
    "kind, norm, masked", [("dora", "attached", False), ("lora", "none", False), ("dora", "held", True)]
)
@pytest.mark.parametrize("curvature", ["hessian", "gauss_newton"])
def test_products_of_stacks_of_experts_are_those_of_autograd(directory, curvature, kind, norm, masked):
    model = support.curved_mixture(directory, kind=kind, masked=masked)
    layers, by_update = adapted_layers(model), support.logits_by_update(model, held=norm == "held")
    start = tuple(layers[name].get_parameter(part).detach() for name in STACKS for part in FACTORS)

    def logits(*values: Tensor) -> Tensor:
        pairs = zip(STACKS, values[::2], values[1::2], strict=True)
        return by_update({name: update_of(layers[name], lora_A=a, lora_B=b) for name, a, b in pairs})

    with curvature_of(model, STACKS, support.curved_batches(), curvature=curvature, norm=norm) as operator:
        sizes = [each.numel() for each in start]
        assert operator.size == sum(sizes)
        for vector in normal(2, operator.size):
            along = tuple(part.view_as(leaf) for part, leaf in zip(torch.split(vector, sizes), start, strict=True))
            if curvature == "hessian":
                _, image = torch.autograd.functional.hvp(
                    lambda *values: cross_entropy(logits(*values), support.all_targets()), start, along
                )
            else:
                out, change = torch.autograd.functional.jvp(logits, start, along)
                p = torch.softmax(out, -1)
                weighted = (p * change - p * (p * change).sum(-1, keepdim=True)) / len(p)
                _, image = torch.autograd.functional.vjp(logits, start, weighted)
            expected = torch.cat([each.flatten() for each in image])
            assert float((operator.product(vector) - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.parametrize("curvature", ["hessian", "gauss_newton"])
def test_attached_and_held_differ_by_far_more_than_rounding(curvature):
    model, batch = support.float64_adapted(), support.curved_batches()[:1]
    cases: list[tuple[Any, Any]] = [("attached", batch), ("attached", batch * 2), ("held", batch)]
    products = []
    for norm, given in cases:
        with curvature_of(model, CURVED_LAYERS, given, curvature=curvature, norm=norm) as operator:
            vector = torch.ones(operator.size, dtype=torch.float64)
            products.append(operator.product(vector))
            assert torch.equal(operator.product(vector), products[-1])
    attached, twice, held = products
    torch.testing.assert_close(twice, attached, rtol=1e-12, atol=1e-14)  # the same batch twice is the same mean
    assert (attached - held).norm() > 1e-3 * attached.norm()


@pytest.mark.parametrize("kind, quant", [("lora", "nf4"), ("lora", None), ("dora", "nf4"), ("dora", "int8")])
def test_the_plain_model_is_the_model(kind, quant):
    model = support.adapted_model("qwen2", quant=quant, kind=kind, dropout=0.5)
    model.train()
    modes = {name: module.training for name, module in model.named_modules()}
    names = list(adapted_layers(model))
    batch = support.curved_batches()[1]
    with plain_model(model, names, norm="attached" if kind == "dora" else "none") as leaves:
        logits, targets = labelled_logits(model, batch)
        assert [leaf.dtype for leaf in leaves.values()] == [torch.float32] * 2 * len(names)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert not any("forward" in vars(module) for module in model.modules())
    model.eval()
    with torch.no_grad():
        whole = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, :-1]
    torch.testing.assert_close(logits, whole[batch.labels[:, 1:] != -100], rtol=1e-4, atol=1e-5)
    assert torch.equal(targets, support.labelled_tokens(batch))


@pytest.mark.parametrize("multiplicity", [1, 4, 32])
@pytest.mark.parametrize("tolerance", [1e-3, 0.0])
def test_copies_of_an_eigenvalue_are_all_found(multiplicity, tolerance):
    """Both signs, each value several times, above a bulk: as the Hessian of adapters that have hardly been trained."""
    generator = np.random.default_rng(0)
    values = np.concatenate([np.repeat([1.0, 0.7, 0.5], multiplicity), -np.repeat([1.0, 0.7, 0.5], multiplicity)])
    values = np.concatenate([values, 0.05 * generator.standard_normal(300 - len(values))])
    rotation, _ = np.linalg.qr(generator.standard_normal((300, 300)))
    known = torch.from_numpy((rotation * values) @ rotation.T)
    found, vectors, _ = top_eigenpairs(lambda v: known @ v, 300, 20, tolerance=tolerance)
    again = top_eigenpairs(lambda v: known @ v, 300, 20, tolerance=tolerance)[1]
    expected = np.sort(np.abs(values))[::-1][:20]
    np.testing.assert_allclose(np.abs(found), expected, rtol=max(tolerance, 1e-10))
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(20), atol=1e-10)
    assert torch.equal(again, vectors)
    np.testing.assert_allclose(known @ vectors, vectors * found, atol=5e-3 if tolerance else 1e-8)


@pytest.mark.parametrize("rank", [1, 3, 30])
def test_a_matrix_without_more_eigenvalues_than_were_asked_for(rank):
    basis, _ = torch.linalg.qr(normal(40, rank))
    known = basis @ basis.T
    found, _, residuals = top_eigenpairs(lambda v: known @ v, 40, 10, tolerance=1e-3)
    np.testing.assert_allclose(found[: min(rank, 10)], 1.0, rtol=1e-10)
    np.testing.assert_allclose(found[rank:], 0.0, atol=1e-10)
    assert residuals.max() < 1e-9
