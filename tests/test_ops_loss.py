"""The loss of an output head in chunks against float64 loops: values, gradients, softcap, scale, bias, any chunk."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qdora.quant.packed import dequantize, quantize
from qdora.train import loss
from qdora.train.loss import CHUNK_BYTES, auto_chunk, chunked_nll
from tests import reference

FORMS: list[dict[str, Any]] = [{}, {"scale": 0.3}, {"softcap": 1.5}, {"scale": 2.5, "softcap": 0.7}]


def head(num_tokens, vocabulary, width, *, bias=False, seed=0, size=1.0):
    """hidden, weight, bias, labels, and an upstream gradient per token; float64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    labels = torch.randint(0, vocabulary, (num_tokens,), generator=generator)
    hidden, weight = normal(num_tokens, width) * size, normal(vocabulary, width) * 0.5
    return hidden, weight, normal(vocabulary) if bias else None, labels, normal(num_tokens)


def loops(hidden, weight, bias, labels, **form):
    as_numpy = [each.detach().double().numpy() for each in (hidden, weight)]
    return reference.head_nll(*as_numpy, labels.numpy(), None if bias is None else bias.double().numpy(), **form)


@settings(max_examples=120, deadline=None)
@given(
    num_tokens=st.integers(0, 13),
    vocabulary=st.integers(1, 40),
    width=st.integers(1, 9),
    chunk=st.one_of(st.none(), st.integers(1, 16)),
    per_slice=st.integers(1, 100),
    bias=st.booleans(),
    form=st.sampled_from(FORMS),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    seed=st.integers(0, 99),
)
def test_values_and_gradients_of_any_shape_chunk_and_slice(
    num_tokens, vocabulary, width, chunk, per_slice, bias, form, dtype, seed
):
    hidden, weight, offset, labels, upstream = head(num_tokens, vocabulary, width, bias=bias, seed=seed)
    hidden = hidden.T.contiguous().T.to(dtype)  # columns first in memory
    weight, offset = weight.to(dtype), None if offset is None else offset.to(dtype)
    hidden.requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss, "_CPU_SLICE_LOGITS", per_slice)
        nll = chunked_nll(hidden, weight, labels, bias=offset, chunk=chunk, **form)
    nll.backward(upstream.to(dtype))
    expected, rows = loops(hidden, weight, offset, labels, **form)
    tolerance = 1e-11 if dtype == torch.float64 else 2e-5
    assert nll.dtype == dtype
    np.testing.assert_allclose(nll.detach().numpy(), expected, rtol=tolerance, atol=tolerance)
    assert hidden.grad is not None
    wanted = upstream.numpy()[:, None] * rows
    np.testing.assert_allclose(hidden.grad.numpy(), wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_references_gradient_is_that_of_finite_differences(form):
    hidden, weight, offset, labels, _ = head(5, 11, 4, bias=True)
    hidden.requires_grad_()
    assert torch.autograd.gradcheck(lambda h: chunked_nll(h, weight, labels, bias=offset, chunk=2, **form), (hidden,))


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_bf16_errs_at_most_twice_as_much_as_the_plain_formula(form):
    hidden, weight, offset, labels, upstream = head(64, 300, 48, bias=True, size=0.5)
    low, low_weight, low_bias = hidden.bfloat16(), weight.bfloat16(), offset.bfloat16()
    upstream = upstream / 1000
    expected, rows = loops(low, low_weight, low_bias, labels, **form)

    def plain(h):
        logits = torch.nn.functional.linear(h, low_weight, low_bias) * form.get("scale", 1.0)
        cap = form.get("softcap")
        logits = logits if cap is None else torch.tanh(logits / cap) * cap
        return torch.nn.functional.cross_entropy(logits.float(), labels, reduction="none")

    def errors(nll_of):
        leaf = low.clone().requires_grad_()
        nll = nll_of(leaf)
        assert nll.dtype == torch.float32
        nll.backward(upstream.float())
        found = (nll, expected), (leaf.grad, upstream.numpy()[:, None] * rows)
        return [reference.relative_error(got.detach().double().numpy(), wanted) for got, wanted in found]

    ours = errors(lambda h: chunked_nll(h, low_weight, labels, bias=low_bias, chunk=10, **form))
    for own, other in zip(ours, errors(plain), strict=True):
        assert 0 < own <= 2 * other


def test_large_logits_and_impossible_labels():
    weight = torch.tensor([[1.0], [-1.0], [0.0]])
    hidden = torch.tensor([[1e4], [1e4], [0.0]], requires_grad=True)
    nll = chunked_nll(hidden, weight, torch.tensor([1, 0, 2]))
    nll.sum().backward()
    np.testing.assert_allclose(nll.detach().numpy(), [2e4, 0.0, np.log(3)], rtol=1e-6)
    assert hidden.grad is not None
    np.testing.assert_allclose(hidden.grad.numpy(), [[2.0], [0.0], [0.0]], atol=1e-6)


@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_a_packed_head_is_its_dequantised_weight(quant):
    hidden, weight, _, labels, upstream = head(6, 20, 64)
    packed = quantize(weight.float(), quant, 64)
    single = hidden.float().requires_grad_()
    nll = chunked_nll(single, packed, labels, chunk=4)
    nll.backward(upstream.float())
    expected, rows = loops(single, dequantize(packed), None, labels)
    np.testing.assert_allclose(nll.detach().numpy(), expected, rtol=1e-5)
    assert single.grad is not None
    np.testing.assert_allclose(single.grad.numpy(), upstream.numpy()[:, None] * rows, rtol=1e-4, atol=1e-5)


def test_without_a_gradient_nothing_is_kept_and_nothing_is_changed():
    hidden, weight, _, labels, _ = head(9, 17, 4)
    leaf = hidden.clone().requires_grad_()
    with torch.no_grad():
        assert not chunked_nll(leaf, weight, labels, chunk=2).requires_grad
    assert not chunked_nll(hidden, weight, labels, chunk=2).requires_grad
    again = chunked_nll(leaf, weight, labels, chunk=2)
    assert torch.equal(leaf, hidden)
    first = torch.autograd.grad(again.sum(), leaf, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(again.sum(), leaf)[0])


class _Largest(TorchDispatchMode):
    """The most elements that a tensor made by any operation has."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.numel = max(self.numel, *(each.numel() for each in tree_leaves(out) if isinstance(each, torch.Tensor)), 0)
        return out


def test_no_tensor_is_larger_than_the_logits_of_a_chunk_and_automatic_chunks_fill_their_bytes():
    hidden, weight, _, labels, upstream = head(50, 400, 3)
    with _Largest() as largest:
        chunked_nll(hidden.bfloat16().requires_grad_(), weight.bfloat16(), labels, chunk=6).backward(upstream.float())
    assert largest.numel == 6 * 400
    assert auto_chunk(128256, 2) == 523
    assert CHUNK_BYTES - 128256 * 2 < 523 * 128256 * 2 <= CHUNK_BYTES
    assert auto_chunk(10**8, 2) == 16


def test_what_is_refused():
    hidden, weight, _, labels, _ = head(3, 5, 2)
    with pytest.raises(ValueError, match="got 0"):
        chunked_nll(hidden, weight, labels, chunk=0)
    with pytest.raises(RuntimeError, match="no second derivative"):  # else curvature would be wrong without a word
        torch.autograd.grad(chunked_nll(hidden.requires_grad_(), weight, labels).sum(), hidden, create_graph=True)
    with pytest.raises(AssertionError, match="trainable head"):
        chunked_nll(hidden.requires_grad_(), weight.requires_grad_(), labels)
