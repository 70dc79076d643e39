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

from qdora.ops import loss
from qdora.ops.loss import CHUNK_BYTES, auto_chunk, chunked_nll
from qdora.ops.packed import dequantize, quantize
from tests import reference

FORMS: list[dict[str, Any]] = [
    {},
    {"scale": 0.3},
    {"softcap": 1.5},
    {"scale": 2.5, "softcap": 0.7},
]


def head(
    num_tokens: int, vocabulary: int, width: int, *, bias: bool = False, seed: int = 0, size: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """hidden, weight, bias, labels, and an upstream gradient per token; float64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    labels = torch.randint(0, vocabulary, (num_tokens,), generator=generator)
    hidden, weight = normal(num_tokens, width) * size, normal(vocabulary, width) * 0.5
    return hidden, weight, normal(vocabulary) if bias else None, labels, normal(num_tokens)


def loops(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, labels: torch.Tensor, **form: Any
) -> tuple[Any, Any]:
    as_numpy = [each.detach().double().numpy() for each in (hidden, weight)]
    offset = None if bias is None else bias.double().numpy()
    return reference.head_nll(*as_numpy, labels.numpy(), offset, **form)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("chunk", [1, 7, 13, 100, None])
def test_values_and_gradients(form: dict[str, Any], bias: bool, chunk: int | None) -> None:
    hidden, weight, offset, labels, upstream = head(13, 37, 5, bias=bias)
    hidden.requires_grad_()
    nll = chunked_nll(hidden, weight, labels, bias=offset, chunk=chunk, **form)
    nll.backward(upstream)
    expected, rows = loops(hidden, weight, offset, labels, **form)
    np.testing.assert_allclose(nll.detach().numpy(), expected, rtol=1e-12, atol=1e-13)
    assert hidden.grad is not None
    np.testing.assert_allclose(hidden.grad.numpy(), upstream.numpy()[:, None] * rows, rtol=1e-10, atol=1e-13)


@settings(max_examples=60, deadline=None)
@given(
    num_tokens=st.integers(0, 9),
    vocabulary=st.integers(1, 40),
    width=st.integers(1, 9),
    chunk=st.integers(1, 12),
    per_slice=st.integers(1, 100),
    bias=st.booleans(),
    form=st.sampled_from(FORMS),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    seed=st.integers(0, 99),
)
def test_any_shape_chunk_and_slice(
    num_tokens: int,
    vocabulary: int,
    width: int,
    chunk: int,
    per_slice: int,
    bias: bool,
    form: dict[str, Any],
    dtype: torch.dtype,
    seed: int,
) -> None:
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
    np.testing.assert_allclose(nll.detach().numpy(), expected, rtol=tolerance, atol=tolerance)
    assert nll.dtype == dtype
    assert hidden.grad is not None
    expected_gradient = upstream.numpy()[:, None] * rows
    np.testing.assert_allclose(hidden.grad.numpy(), expected_gradient, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_gradcheck(form: dict[str, Any]) -> None:
    hidden, weight, offset, labels, _ = head(5, 11, 4, bias=True)
    hidden.requires_grad_()
    assert torch.autograd.gradcheck(lambda h: chunked_nll(h, weight, labels, bias=offset, chunk=2, **form), (hidden,))


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_bf16_errs_at_most_twice_as_much_as_the_plain_formula(form: dict[str, Any]) -> None:
    hidden, weight, offset, labels, upstream = head(64, 300, 48, bias=True, size=0.5)
    low, low_weight = hidden.bfloat16(), weight.bfloat16()
    assert offset is not None
    low_bias, upstream = offset.bfloat16(), upstream / 1000
    expected, rows = loops(low, low_weight, low_bias, labels, **form)
    expected_gradient = upstream.numpy()[:, None] * rows

    def plain(h: torch.Tensor) -> torch.Tensor:
        logits = torch.nn.functional.linear(h, low_weight, low_bias) * form.get("scale", 1.0)
        cap = form.get("softcap")
        logits = logits if cap is None else torch.tanh(logits / cap) * cap
        return torch.nn.functional.cross_entropy(logits.float(), labels, reduction="none")

    def errors(nll_of: Any) -> tuple[float, float]:
        leaf = low.clone().requires_grad_()
        nll = nll_of(leaf)
        assert nll.dtype == torch.float32
        nll.backward(upstream.float())
        assert leaf.grad is not None
        value = reference.relative_error(nll.detach().double().numpy(), expected)
        return value, reference.relative_error(leaf.grad.double().numpy(), expected_gradient)

    ours = errors(lambda h: chunked_nll(h, low_weight, labels, bias=low_bias, chunk=10, **form))
    theirs = errors(plain)
    assert 0 < ours[0] <= 2 * theirs[0]
    assert 0 < ours[1] <= 2 * theirs[1]


def test_large_logits_and_impossible_labels() -> None:
    weight = torch.tensor([[1.0], [-1.0], [0.0]])
    hidden = torch.tensor([[1e4], [1e4], [0.0]], requires_grad=True)
    labels = torch.tensor([1, 0, 2])
    nll = chunked_nll(hidden, weight, labels)
    nll.sum().backward()
    np.testing.assert_allclose(nll.detach().numpy(), [2e4, 0.0, np.log(3)], rtol=1e-6)
    assert hidden.grad is not None
    np.testing.assert_allclose(hidden.grad.numpy(), [[2.0], [0.0], [0.0]], atol=1e-6)


@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_a_packed_head_is_its_dequantised_weight(quant: str) -> None:
    hidden, weight, _, labels, upstream = head(6, 20, 64)
    packed = quantize(weight.float(), quant, 64)
    single = hidden.float().requires_grad_()
    nll = chunked_nll(single, packed, labels, chunk=4)
    nll.backward(upstream.float())
    expected, rows = loops(single, dequantize(packed), None, labels)
    np.testing.assert_allclose(nll.detach().numpy(), expected, rtol=1e-5)
    assert single.grad is not None
    np.testing.assert_allclose(single.grad.numpy(), upstream.numpy()[:, None] * rows, rtol=1e-4, atol=1e-5)


def test_without_a_gradient_nothing_is_kept_and_nothing_is_changed() -> None:
    hidden, weight, _, labels, _ = head(9, 17, 4)
    leaf = hidden.clone().requires_grad_()
    with torch.no_grad():
        assert not chunked_nll(leaf, weight, labels, chunk=2).requires_grad
    assert not chunked_nll(hidden, weight, labels, chunk=2).requires_grad
    again = chunked_nll(leaf, weight, labels, chunk=2)
    assert torch.equal(leaf, hidden)
    first = torch.autograd.grad(again.sum(), leaf, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(again.sum(), leaf)[0])


def test_no_token_gives_an_empty_loss_with_a_graph() -> None:
    hidden, weight, _, labels, _ = head(0, 17, 4)
    leaf = hidden.requires_grad_()
    total = chunked_nll(leaf, weight, labels).sum()
    total.backward()
    assert float(total.detach()) == 0.0
    assert leaf.grad is not None
    assert leaf.grad.shape == (0, 4)


class _Largest(TorchDispatchMode):
    """The most elements that a tensor made by any operation has."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        sizes = [each.numel() for each in tree_leaves(out) if isinstance(each, torch.Tensor)]
        self.numel = max(self.numel, *sizes, 0)
        return out


def test_no_tensor_is_larger_than_the_logits_of_a_chunk() -> None:
    hidden, weight, _, labels, upstream = head(50, 400, 3)
    with _Largest() as largest:
        chunked_nll(hidden.bfloat16().requires_grad_(), weight.bfloat16(), labels, chunk=6).backward(upstream.float())
    assert largest.numel == 6 * 400


def test_automatic_chunks_fill_their_bytes() -> None:
    assert auto_chunk(128256, 2) == 523
    assert CHUNK_BYTES - 128256 * 2 < 523 * 128256 * 2 <= CHUNK_BYTES
    assert auto_chunk(10**8, 2) == 16


def test_what_is_refused() -> None:
    hidden, weight, _, labels, _ = head(3, 5, 2)
    with pytest.raises(ValueError, match="a chunk must have 1 token or more, got 0"):
        chunked_nll(hidden, weight, labels, chunk=0)
    with pytest.raises(RuntimeError, match="no second derivative"):  # else curvature would be wrong without a word
        torch.autograd.grad(chunked_nll(hidden.requires_grad_(), weight, labels).sum(), hidden, create_graph=True)
    with pytest.raises(AssertionError, match="trainable head"):
        chunked_nll(hidden.requires_grad_(), weight.requires_grad_(), labels)
