"""Parts of the adapted product, each against its definition: norms, sums over tokens, precision, dropout, tiles; and
the loss of an output head in chunks."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qdora.adapter import dropout, expert_product
from qdora.adapter.algebra import row_norm, squared_row_norm
from qdora.adapter.dropout import dropped_slices, zeroed, zeroed_
from qdora.adapter.product import column_dot, frozen_linear
from qdora.quant import codebooks, tiles
from qdora.quant.packed import OWN_SCALES, block_scales, dequantize, from_tensors, quantize
from qdora.quant.tiles import dense_tiles, dense_weight, is_one_tile, own_scales, spans, with_scales
from qdora.train import loss
from qdora.train.loss import CHUNK_BYTES, auto_chunk, chunked_nll
from tests import reference
from tests.adapter_numbers import cut_tiles, make, to_numpy
from tests.test_ops_quantize import by_backends


def norm_of(weight: torch.Tensor, lora_A: torch.Tensor, lora_B: torch.Tensor, scaling: float) -> torch.Tensor:
    """The row norm with products in the weight's own dtype."""
    squared = squared_row_norm(weight)
    return row_norm(weight, lora_A, lora_B, scaling, base_squared=squared, dtype=weight.dtype)


@settings(max_examples=40, deadline=None)
@given(
    out=st.integers(1, 9),
    in_=st.integers(1, 17),
    rank=st.integers(1, 5),
    scaling=st.sampled_from([1e-3, 0.5, 2.0, 1e3]),
    seed=st.integers(0, 10**6),
)
def test_row_norm_is_exact_for_any_shape(out, in_, rank, scaling, seed):
    rng = np.random.default_rng(seed)
    w, a, b = rng.normal(size=(out, in_)), rng.normal(size=(rank, in_)), rng.normal(size=(out, rank))
    found = norm_of(torch.tensor(w), torch.tensor(a), torch.tensor(b), scaling)
    np.testing.assert_allclose(found.numpy(), reference.row_norm(w, a, b, scaling), rtol=1e-8)  # 1e7 may cancel


@pytest.mark.parametrize("left", [0.5, 0.1, 1e-2, 1 / 400, 0.0])
def test_row_norm_where_the_adapter_cancels_the_row(left):
    """B A = -(1 - left) W on every row: the factored sum cancels, the direct norm must take over."""
    rng = np.random.default_rng(0)
    b, a = rng.normal(size=(6, 2)), rng.normal(size=(2, 32))
    w, a, b = (torch.tensor(each, dtype=torch.float32) for each in (-(b @ a) / (1 - left) * 0.5, a, b))
    wanted = reference.row_norm(*map(to_numpy, (w, a, b)), 0.5)
    scale = np.linalg.norm(to_numpy(w), axis=1)
    np.testing.assert_allclose(to_numpy(norm_of(w, a, b, 0.5)) / scale, wanted / scale, rtol=2e-5, atol=2e-7)


def test_row_norm_of_bf16_weights_where_the_adapter_shortens_the_row():
    """W A^T runs in bf16: a row left with 0.05 to 1 of its length is off by no more than bf16's own rounding."""
    rng = np.random.default_rng(0)
    b, a, left = rng.normal(size=(400, 2)), rng.normal(size=(2, 64)), np.linspace(0.05, 0.99, 400)[:, None]
    w, a, b = (torch.tensor(each).bfloat16() for each in (-(b @ a) / (1 - left), a, b))
    wanted = reference.row_norm(*map(to_numpy, (w, a, b)), 1.0)
    assert np.max(np.abs(to_numpy(norm_of(w, a, b, 1.0)) / wanted - 1)) < 2**-8 * 2


def test_what_is_refused():
    layer = make(out=4, in_=6, rank=2)
    y = layer(torch.randn(3, 6, dtype=torch.float64)).square().sum()
    (gradient,) = torch.autograd.grad(y, [layer.lora_A], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):  # a second derivative, which would be wrong
        gradient.square().sum().backward()


def precisions() -> tuple[str, ...]:
    """What torch may round the factors of float32 products to, on a GPU and on a CPU; and the older setting."""
    backends: Any = torch.backends
    try:
        older = torch.get_float32_matmul_precision()
    except RuntimeError:  # the older flags and torch.backends disagree
        older = "mixed"
    return backends.cuda.matmul.fp32_precision, backends.mkldnn.matmul.fp32_precision, older


class Products(TorchDispatchMode):
    """The precisions at each product."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name().partition(".")[0] in ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm"):
            self.seen.append(precisions())
        return func(*args, **(kwargs or {}))


CALLERS = {
    "untouched": lambda: None,
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "backends": lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
}


@pytest.mark.parametrize("caller", CALLERS)
def test_norms_and_merges_use_float32_in_full_whatever_the_caller_lets_torch_do(monkeypatch, caller):
    monkeypatch.setattr(expert_product, "device_kind", lambda _device: "cuda")  # several experts a run
    backends: Any = torch.backends
    backends = backends.cuda.matmul, backends.mkldnn.matmul
    own = [each.fp32_precision for each in backends]
    layers = [make(dtype=torch.float32, **form) for form in ({}, {"masked": True}, {"num_experts": 3})]
    try:
        CALLERS[caller]()
        before = precisions()
        for layer in layers:
            with Products() as products:
                for number in (layer.row_norm, layer.merged_weight, layer.merged_gain):
                    number()
            assert set(products.seen) == {("ieee", "ieee", "highest")}
            assert precisions() == before
    finally:
        torch.set_float32_matmul_precision("highest")
        for backend, precision in zip(backends, own, strict=True):
            backend.fp32_precision = precision


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(0, 70),
    out=st.integers(1, 40),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64]),
    strided=st.booleans(),
    size=st.sampled_from([1.0, 2.0**-100, 2.0**60]),
    seed=st.integers(0, 2**31),
)
def test_column_dots_of_any_shape_against_float64(tokens, out, dtype, strided, size, seed):
    """The factor is 1 / m, and m may be the 2^-100 that stands for 0."""
    rng = np.random.default_rng(seed)
    size = 1.0 if dtype == torch.float16 else size
    left, right = (torch.tensor(rng.normal(size=(out, tokens)) * by).to(dtype).T for by in (1.0, size))
    if not strided:
        left, right = left[:1].expand(tokens, out), right.contiguous()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    factor = torch.tensor(rng.normal(size=out) / size).to(wide)
    found = column_dot(left, right, factor)
    products = to_numpy(left) * to_numpy(right)
    scale = np.abs(to_numpy(factor)) * np.abs(products).sum(axis=0) + 1e-30
    off = np.abs(to_numpy(found) - to_numpy(factor) * products.sum(axis=0))
    assert found.dtype == wide
    assert np.all(off <= (1e-14 if wide == torch.float64 else 2e-6) * scale)


@pytest.fixture(params=["cpu", "cuda"])
def _device_kind(request, monkeypatch):
    """The kind of device whose way to draw is taken, in slices of 40,000 elements."""
    monkeypatch.setattr(dropout, "device_kind", lambda _device: request.param)
    for name in ("_ELEMENTS_PER_SLICE", "_GPU_ELEMENTS_PER_SLICE"):
        monkeypatch.setattr(dropout, name, 40_000)


def kept(shape: tuple[int, int], probability: float, seed: int) -> torch.Tensor:
    """1 where an element stays."""
    mask = torch.ones(shape)
    for tokens, zeros in dropped_slices(mask, probability, seed):
        copy = zeroed(mask[tokens], zeros)
        zeroed_(mask[tokens], zeros)
        assert torch.equal(copy, mask[tokens])
    return mask


@pytest.mark.usefixtures("_device_kind")
@pytest.mark.parametrize("probability", [0.05, 0.3, 0.9])
def test_share_rows_columns_and_pairs_are_those_of_independent_zeros(probability):
    shape = (1000, 400)
    zeros = 1 - kept(shape, probability, 7)
    std = math.sqrt(probability * (1 - probability))
    # Each bound is 5 standard deviations of the estimate.
    assert abs(float(zeros.mean()) - probability) < 5 * std / math.sqrt(zeros.numel())
    assert float((zeros.mean(dim=1) - probability).abs().max()) < 5 * std / math.sqrt(shape[1])
    assert float((zeros.mean(dim=0) - probability).abs().max()) < 5 * std / math.sqrt(shape[0])
    centred = (zeros - probability) / std
    for shift, dim in ((1, 0), (1, 1), (100, 0), (2, 1)):
        assert abs(float((centred * centred.roll(shift, dim)).mean())) < 5 / math.sqrt(zeros.numel())
    again, other = kept(shape, probability, 7), kept(shape, probability, 8)
    assert torch.equal(1 - again, zeros)
    assert float((other != again).float().mean()) == pytest.approx(2 * std**2, rel=0.05)


def stored(kind: str, shape: tuple[int, int], *, double_quant: bool = True) -> tiles.Weight:
    if kind == "int4-groups":
        random, blocks = torch.Generator().manual_seed(3), shape[0] * shape[1] // 32
        codes, zeros = (torch.randint(0, 16, (n,), dtype=torch.uint8, generator=random) for n in (32 * blocks, blocks))
        tensors = {
            "packed": codes[::2] << 4 | codes[1::2],
            "zeros": zeros,
            "absmax": torch.rand(blocks, generator=random).half(),
        }
        return from_tensors(kind, shape, 32, tensors)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(3)) * 0.1
    return weight if kind == "dense" else quantize(weight, kind, 64, double_quant)


def whole(weight: tiles.Weight, row_factor: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """diag(row_factor) W in float64, rounded once: the definition."""
    if not isinstance(weight, torch.Tensor) and weight.kind in OWN_SCALES:
        codes = weight.packed.view(shape := (weight.shape[0], -1))
        values = codebooks.code_values(weight.kind)[torch.stack([codes >> 4, codes & 15], -1).view(shape).int()]
        zeros = 0 if weight.zeros is None else weight.zeros.view(shape).repeat_interleave(weight.block_size, 1)
        dense = (values - zeros) * block_scales(weight).view(shape).repeat_interleave(weight.block_size, 1)
    else:
        dense = weight if isinstance(weight, torch.Tensor) else by_backends(weight, torch.float32)["torch"]
    factor = torch.ones(dense.shape[0]) if row_factor is None else row_factor
    return (dense.double() * factor.double()[:, None]).to(dtype)


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8", "int4", "nf3", "nf2", "int3", "int2", "dense", *OWN_SCALES])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape", [(20, 192), (64, 256), (40, 96), (7, 131), (1, 640), (130, 1)])
def test_tiles_put_together_are_the_scaled_weight_also_those_by_scales_of_its_own(
    kind, double_quant, shape, monkeypatch
):
    if kind in OWN_SCALES and (double_quant or shape[1] % 32):
        pytest.skip("one form, in rows of whole blocks")
    cut_tiles(monkeypatch, 2048)
    weight, factor = stored(kind, shape, double_quant=double_quant), torch.linspace(0.1, 2, shape[0])
    before = dense_weight(weight, torch.float32).clone()
    for dtype, some in itertools.product((torch.float32, torch.bfloat16), (None, factor)):
        expected, scales = whole(weight, some, dtype).double(), own_scales(weight, some)
        crosses = shape[1] % 64 > 0 and kind not in ("int8", *OWN_SCALES)
        assert (scales is None) == (crosses or kind == "dense")
        # float32 products of code, scale and factor, each rounded, in another order than the definition's.
        # Products of int4-groups have so few bits that they lie on ties: an ulp of bf16.
        tolerance = 0.0 if some is None else 4e-7 if dtype == torch.float32 else 2.0 ** (-7 if "groups" in kind else -8)
        for dim in (0, 1):
            found = [(run, tile.clone()) for run, tile in dense_tiles(weight, dtype, some, dim)]
            assert [run.start for run, _ in found] == [0, *(run.stop for run, _ in found[:-1])]
            joined = torch.cat([tile for _, tile in found], dim)
            assert (joined.dtype, joined.shape) == (dtype, shape)
            off = (joined.double() - expected).abs() / (expected.abs() + 1e-30)
            assert float(off.max()) <= tolerance
            if shape == (64, 256) and some is not None and dtype == torch.bfloat16:
                assert len(found) >= 4
                # A column tile is at least one block wide.
                assert all(tile.nbytes <= 2048 or tile.shape[1] <= 64 for _, tile in found)
            if scales is not None:
                own = with_scales(weight, scales)
                assert own.packed is weight.packed
                assert own.nested_absmax is None
                pairs = zip(dense_tiles(own, dtype, dim=dim), found, strict=True)
                assert all(a[0] == b[0] and torch.equal(a[1], b[1]) for a, b in pairs)
    assert torch.equal(dense_weight(weight, torch.float32), before)


@pytest.mark.parametrize(
    ("device", "total", "other", "align", "lengths"),
    [
        ("cpu", 11008, 4096, 1, [1024] * 10 + [256] * 3),  # 8 MiB of 4096 columns in 16 bits are 1,024 rows
        ("cpu", 4096, 2048, 1, [4096]),  # 16 MiB are not cut
        ("cpu", 4096, 11008, 64, [256] * 16),
        ("cpu", 600, 1 << 20, 16, [256, 256, 88]),  # no run fits: short ones
        ("cpu", 9000, 4096, 96, [1056] * 8 + [288] + [264]),
        ("cuda", 300, 1 << 20, 16, [64] * 4 + [44]),
        # On a GPU no product is left with a sliver.
        ("cuda", 11008, 4096, 1, [11008]),  # 16,384 rows of 8 KiB fit
        ("cuda", 4096, 11008, 64, [4096]),  # 6,096 columns of 22,016 bytes fit
        ("cuda", 28672, 8192, 1, [7168] * 4),  # 8,192 rows of 16 KiB fit
        ("cuda", 8192, 28672, 64, [2048] * 4),  # 2,340 columns fit
        ("cuda", 11000, 8192, 1, [5504, 5496]),
    ],
)
def test_lengths_of_a_large_weight_are_those_that_products_are_fast_with(device, total, other, align, lengths):
    assert [run.stop - run.start for run in spans(total, other, 2, device, align)] == lengths


def test_a_dense_weight_without_a_factor_is_its_own_single_tile():
    """Nothing is made, so nothing has to stay within a budget."""
    weight = torch.zeros(2049, 4096, dtype=torch.bfloat16)
    for dim in (0, 1):
        ((_, tile),) = dense_tiles(weight, torch.bfloat16, dim=dim)
        assert tile.data_ptr() == weight.data_ptr()
    assert len(list(dense_tiles(weight, torch.bfloat16, torch.ones(2049)))) > 1
    assert not is_one_tile(weight, torch.bfloat16)
    assert is_one_tile(weight[1:], torch.bfloat16)


@pytest.mark.parametrize("quant", ["nf4", "int8", "dense"])
def test_the_frozen_product_is_differentiable_twice(quant):
    weight = stored(quant, (6, 64))
    weight = weight.double() if isinstance(weight, torch.Tensor) else weight
    x, bias = torch.randn(2, 3, 64, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    wanted = x @ dense_weight(weight, torch.float64).T + bias
    with_graph = frozen_linear(x.clone().requires_grad_(), weight, bias)
    torch.testing.assert_close(with_graph, wanted, rtol=1e-6, atol=1e-7)
    with torch.no_grad():
        assert torch.equal(frozen_linear(x, weight, bias), with_graph)
    short = x[0, :1].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda each: frozen_linear(each, weight), (short,))
    assert torch.autograd.gradgradcheck(lambda each: frozen_linear(each, weight).tanh(), (short,))


FORMS: list[dict[str, Any]] = [{}, {"scale": 0.3}, {"softcap": 1.5}, {"scale": 2.5, "softcap": 0.7}]


def a_head(num_tokens, vocabulary, width, *, bias=False, seed=0, size=1.0):
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


@settings(max_examples=150, deadline=None)
@given(
    num_tokens=st.integers(0, 13),
    vocabulary=st.integers(1, 40),
    width=st.integers(1, 9),
    chunk=st.one_of(st.none(), st.integers(1, 16)),
    per_slice=st.integers(1, 100),
    bias=st.booleans(),
    form=st.sampled_from(FORMS),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    quant=st.sampled_from([None, None, "nf4", "int8"]),
    seed=st.integers(0, 99),
)
def test_values_and_gradients_of_any_shape_chunk_and_slice(
    num_tokens, vocabulary, width, chunk, per_slice, bias, form, dtype, quant, seed
):
    hidden, weight, offset, labels, upstream = a_head(num_tokens, vocabulary, width, bias=bias, seed=seed)
    hidden = hidden.T.contiguous().T.to(dtype)  # columns first in memory
    given_weight = weight.to(dtype) if quant is None else quantize(weight.float(), quant, 64)
    weight = given_weight if isinstance(given_weight, torch.Tensor) else dequantize(given_weight, dtype)
    offset = None if offset is None else offset.to(dtype)
    hidden.requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss, "_CPU_SLICE_LOGITS", per_slice)
        nll = chunked_nll(hidden, given_weight, labels, bias=offset, chunk=chunk, **form)
    nll.backward(upstream.to(dtype))
    expected, rows = loops(hidden, weight, offset, labels, **form)
    tolerance = 1e-11 if dtype == torch.float64 else 2e-5
    assert nll.dtype == dtype
    np.testing.assert_allclose(nll.detach().numpy(), expected, rtol=tolerance, atol=tolerance)
    wanted = upstream.numpy()[:, None] * rows
    np.testing.assert_allclose(hidden.grad.numpy(), wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_bf16_errs_at_most_twice_as_much_as_the_plain_formula(form):
    hidden, weight, offset, labels, upstream = a_head(64, 300, 48, bias=True, size=0.5)
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
    np.testing.assert_allclose(hidden.grad.numpy(), [[2.0], [0.0], [0.0]], atol=1e-6)
    with torch.no_grad():
        assert not chunked_nll(hidden, weight, torch.tensor([1, 0, 2])).requires_grad


class _Largest(TorchDispatchMode):
    """The most elements that a tensor made by any operation has."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.numel = max(self.numel, *(each.numel() for each in tree_leaves(out) if isinstance(each, torch.Tensor)), 0)
        return out


def test_no_tensor_is_larger_than_the_logits_of_a_chunk_and_automatic_chunks_fill_their_bytes():
    hidden, weight, _, labels, upstream = a_head(50, 400, 3)
    with _Largest() as largest:
        chunked_nll(hidden.bfloat16().requires_grad_(), weight.bfloat16(), labels, chunk=6).backward(upstream.float())
    assert largest.numel == 6 * 400
    assert auto_chunk(128256, 2) == 523
    assert CHUNK_BYTES - 128256 * 2 < 523 * 128256 * 2 <= CHUNK_BYTES
    assert auto_chunk(10**8, 2) == 16


def test_chunks_and_derivatives_that_are_refused():
    hidden, weight, _, labels, _ = a_head(3, 5, 2)
    with pytest.raises(ValueError, match="must not be zero"):
        chunked_nll(hidden, weight, labels, chunk=0)
    with pytest.raises(RuntimeError, match="no second derivative"):  # else curvature would be wrong without a word
        torch.autograd.grad(chunked_nll(hidden.requires_grad_(), weight, labels).sum(), hidden, create_graph=True)
