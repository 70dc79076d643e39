"""Parts of the adapted product, each against its definition: norms, sums over tokens, precision, dropout, tiles."""

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

from qdora.adapter import dropout, expert_product
from qdora.adapter.adapted_linear import AdaptedLinear
from qdora.adapter.adapted_product import column_dot
from qdora.adapter.dora import merged_weight, row_norm, squared_row_norm
from qdora.adapter.dropout import draw_seed, drop_, dropped_slices, tokens_per_slice, zeroed, zeroed_
from qdora.adapter.frozen_linear import FrozenLinear
from qdora.adapter.frozen_product import frozen_linear
from qdora.quant import tiles
from qdora.quant.packed import quantize
from qdora.quant.tiles import column_tiles, dense_weight, is_one_tile, own_scales, row_tiles, spans, with_scales
from tests import reference
from tests.adapter_numbers import cut_tiles, expected_norm, expected_weight, make, to_numpy
from tests.test_ops_quantize import by_backends

# ------------------------------------------------------------------------------------------------ row norms and merge


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
    b, a = rng.normal(size=(400, 2)), rng.normal(size=(2, 64))
    left = np.linspace(0.05, 0.99, 400)[:, None]
    w, a, b = (torch.tensor(each).bfloat16() for each in (-(b @ a) / (1 - left), a, b))
    wanted = reference.row_norm(*map(to_numpy, (w, a, b)), 1.0)
    assert np.max(np.abs(to_numpy(norm_of(w, a, b, 1.0)) / wanted - 1)) < 2**-8 * 2


def test_a_merge_makes_a_new_tensor():
    weight = torch.randn(3, 4)
    before = weight.clone()
    merged_weight(weight, torch.randn(2, 4), torch.randn(3, 2), 2.0, torch.rand(3))
    assert torch.equal(weight, before)


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"\(4, 5\), \(2, 5\) and \(3, 2\)"):
        norm_of(torch.zeros(4, 5), torch.zeros(2, 5), torch.zeros(3, 2), 1.0)
    with pytest.raises(ValueError, match=r"\(5, 8\).* 1 to 5, got 6"):
        AdaptedLinear(FrozenLinear(torch.randn(5, 8)), rank=6)
    with pytest.raises(ValueError, match="pruned here"):
        AdaptedLinear(FrozenLinear(torch.randn(4, 8)), rank=2, masked=True)
    layer = make(out=4, in_=6, rank=2)
    y = layer(torch.randn(3, 6, dtype=torch.float64)).square().sum()
    (gradient,) = torch.autograd.grad(y, [layer.lora_A], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):  # a second derivative, which would be wrong
        gradient.square().sum().backward()


# ------------------------------------------------------------------------------------------------ full precision


def precisions() -> tuple[str, ...]:
    """What torch may round the factors of float32 products to, on a GPU and on a CPU; and the older setting."""
    backends: Any = torch.backends
    try:
        older = torch.get_float32_matmul_precision()
    except RuntimeError:  # the older flags and torch.backends disagree
        older = "mixed"
    return backends.cuda.matmul.fp32_precision, backends.mkldnn.matmul.fp32_precision, older, backends.fp32_precision


class Products(TorchDispatchMode):
    """The precisions at each product."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name().partition(".")[0] in ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm"):
            self.seen.append(precisions()[:3])
        return func(*args, **(kwargs or {}))


CALLERS = {
    "untouched": lambda: None,
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "allow_tf32": lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
    "backends": lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
}


@pytest.fixture(params=CALLERS)
def _caller(request):
    backends: Any = torch.backends
    before = backends.cuda.matmul.fp32_precision, backends.mkldnn.matmul.fp32_precision
    CALLERS[request.param]()
    yield
    torch.set_float32_matmul_precision("highest")
    backends.cuda.matmul.fp32_precision, backends.mkldnn.matmul.fp32_precision = before


@pytest.mark.usefixtures("_caller")
def test_norms_and_merges_use_float32_in_full_whatever_the_caller_lets_torch_do(monkeypatch):
    monkeypatch.setattr(expert_product, "device_kind", lambda _device: "cuda")  # several experts a run
    before = precisions()
    # Of the first: W A^T, A A^T and their sum, and twice B A.
    for form, num_products in (({"in_": 512}, 5), ({"masked": True}, None), ({"num_experts": 3}, None)):
        layer = make(dtype=torch.float32, **form)
        with Products() as products:
            norm, merged, gain = layer.row_norm(), layer.merged_weight(), layer.merged_gain()
        assert len(products.seen) == num_products or (num_products is None and products.seen)
        assert set(products.seen) == {("ieee", "ieee", "highest")}
        assert precisions() == before
        wanted = expected_norm(layer)
        assert reference.relative_error(to_numpy(norm).ravel(), wanted) < 1e-6
        assert reference.relative_error(to_numpy(merged), expected_weight(layer)) < 1e-6
        gains = reference.gain(to_numpy(layer.magnitude).ravel(), wanted)
        assert reference.relative_error(to_numpy(gain).ravel(), gains) < 1e-6


# ------------------------------------------------------------------------------------------------ sums over tokens


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


# ------------------------------------------------------------------------------------------------ dropout


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


def test_positions_are_inside_for_every_size_and_none_are_drawn_without_dropout():
    for shape in ((1, 1), (1, 7), (3, 5), (0, 4)):
        for seed in range(20):
            for tokens, positions in dropped_slices(torch.ones(shape), 0.6, seed):
                size = (tokens.stop - tokens.start) * shape[1]
                assert bool(((positions >= 0) & (positions < size)).all())
    assert drop_(torch.ones(4, 4), 0.0, 1).all()


def test_a_seed_comes_from_the_generator_that_a_checkpoint_restores_whatever_the_default_device():
    state = torch.manual_seed(3).get_state()
    first, second, x = draw_seed(), draw_seed(), torch.ones(4, 8)
    assert first != second
    (_, wanted) = next(dropped_slices(x, 0.5, first))
    torch.set_rng_state(state)
    with torch.device("meta"):
        assert draw_seed() == first
        (_, found) = next(dropped_slices(x, 0.5, first))
    assert torch.equal(found, wanted)


def test_a_gpu_gets_few_slices():
    """4,096 tokens of 14336 features are 57 slices on a CPU and 2 on a GPU."""
    assert -(-4096 // tokens_per_slice(14336, "cpu")) == 57
    assert -(-4096 // tokens_per_slice(14336, "cuda")) == 2
    assert tokens_per_slice(1 << 30, "cuda") == 1


@pytest.mark.usefixtures("_device_kind")
def test_a_layer_drops_the_same_in_both_directions_slice_by_slice():
    """The layer is linear in x, with the same zeros in y = J x and dx = J^T dy; of dA the zeros are those of x."""
    layer = make(kind="lora", bias=False, in_=400, rank=2, dropout=0.4)
    x = torch.randn(250, 400, dtype=torch.float64, requires_grad=True)  # three slices
    dy = torch.randn(250, layer.out_features, dtype=torch.float64)
    out = layer(x)
    out.backward(dy)
    assert float((dy * out).sum()) == pytest.approx(float((x.grad * x).sum()), rel=1e-9)
    of_a, of_b = ((each.grad * each).sum() for each in (layer.lora_A, layer.lora_B))
    assert float(of_a) == pytest.approx(float(of_b), rel=1e-9)
    assert not torch.allclose(layer.eval()(x), out)


# ------------------------------------------------------------------------------------------------ tiles

FORMATS = ("nf4", "fp4", "int8", "int4", "nf3", "nf2", "dense")


@pytest.fixture
def _small_tiles(monkeypatch):
    cut_tiles(monkeypatch, 2048)


def stored(kind: str, shape: tuple[int, int], *, block_size: int = 64, double_quant: bool = True) -> tiles.Weight:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(3)) * 0.1
    return weight if kind == "dense" else quantize(weight, kind, block_size, double_quant)


def whole(weight: tiles.Weight, row_factor: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """diag(row_factor) W in float64, rounded once: the definition."""
    dense = weight if isinstance(weight, torch.Tensor) else by_backends(weight, torch.float32)["torch"]
    dense = dense.double()
    if row_factor is not None:
        dense = dense * row_factor.double()[:, None]
    return dense.to(dtype)


def factor_of(rows: int) -> torch.Tensor:
    return torch.rand(rows, generator=torch.Generator().manual_seed(1)) * 2


@pytest.mark.usefixtures("_small_tiles")
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("with_factor", [False, True])
@pytest.mark.parametrize("shape", [(20, 192), (33, 64), (40, 96), (7, 131), (1, 640), (130, 1)])
def test_tiles_put_together_are_the_scaled_weight(kind, double_quant, with_factor, shape):
    weight = stored(kind, shape, double_quant=double_quant)
    factor = factor_of(shape[0]) if with_factor else None
    for dtype in (torch.float32, torch.bfloat16):
        expected = whole(weight, factor, dtype).double()
        by_rows = [(rows, tile.clone()) for rows, tile in row_tiles(weight, dtype, factor)]
        assert [rows.start for rows, _ in by_rows] == [0, *[rows.stop for rows, _ in by_rows[:-1]]]
        by_columns = [(columns, tile.clone()) for columns, tile in column_tiles(weight, dtype, factor)]
        # float32 products of code, scale and factor, each rounded, in another order than the definition's.
        tolerance = 0.0 if factor is None else 4e-7 if dtype == torch.float32 else 2**-8
        for found in (torch.cat([tile for _, tile in by_rows]), torch.cat([tile for _, tile in by_columns], dim=1)):
            assert (found.dtype, found.shape) == (dtype, shape)
            off = (found.double() - expected).abs() / (expected.abs() + 1e-30)
            assert float(off.max()) <= tolerance


@pytest.mark.usefixtures("_small_tiles")
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("double_quant", [False, True])
def test_scales_of_its_own_give_a_weight_the_same_tiles_and_leave_it_alone(kind, double_quant):
    weight, factor = stored(kind, (64, 256), double_quant=double_quant), factor_of(64)
    before = dense_weight(weight, torch.float32).clone()
    for dtype, some in itertools.product((torch.float32, torch.bfloat16), (None, factor)):
        scales = own_scales(weight, some)
        for cut in (row_tiles, column_tiles):
            found = [(run, tile.clone()) for run, tile in cut(weight, dtype, some)]
            if some is not None and dtype == torch.bfloat16:
                assert len(found) >= 4
                # A column tile is at least one block wide.
                assert all(tile.nbytes <= 2048 or tile.shape[1] <= 64 for _, tile in found)
            if kind == "dense":
                assert scales is None
                continue
            assert scales is not None
            own = with_scales(weight, scales)
            assert own.packed is weight.packed
            assert own.nested is None
            pairs = zip(cut(own, dtype), found, strict=True)
            assert all(a[0] == b[0] and torch.equal(a[1], b[1]) for a, b in pairs)
    assert torch.equal(dense_weight(weight, torch.float32), before)
    crossing = stored(kind, (7, 131), double_quant=double_quant)
    assert (own_scales(crossing, torch.ones(7)) is None) == (kind != "int8")


@settings(max_examples=200, deadline=None)
@given(
    total=st.integers(1, 200_000),
    other=st.integers(1, 40_000),
    itemsize=st.sampled_from([2, 4, 8]),
    device=st.sampled_from(["cpu", "cuda"]),
    align=st.sampled_from([1, 2, 16, 64, 128, 4096]),
)
def test_spans_cover_the_dimension_once_in_aligned_runs(total, other, itemsize, device, align):
    runs = spans(total, other, itemsize, device, align)
    assert runs[0].start == 0
    assert runs[-1].stop == total
    assert all(left.stop == right.start for left, right in itertools.pairwise(runs))
    assert all(run.start < run.stop and run.start % align == 0 for run in runs)
    budget = tiles._CPU_TILE_BYTES if device == "cpu" else tiles._GPU_TILE_BYTES
    longest = max(run.stop - run.start for run in runs)
    assert longest * other * itemsize <= budget or longest <= max(256, align)


@pytest.mark.parametrize(
    ("device", "total", "other", "align", "lengths"),
    [
        ("cpu", 11008, 4096, 1, [1024] * 10 + [256] * 3),  # 8 MiB of 4096 columns in 16 bits are 1,024 rows
        ("cpu", 4096, 2048, 1, [4096]),  # 16 MiB are not cut
        ("cpu", 4097, 2048, 1, [2048, 2048, 1]),
        ("cpu", 8192, 2048, 1, [2048] * 4),  # rows half as wide: twice as many of them
        ("cpu", 2048, 8192, 1, [1024] * 2),  # 1,024 rows of 8192 columns are 16 MiB
        ("cpu", 4096, 11008, 64, [256] * 16),
        # On a GPU no product is left with a sliver.
        ("cuda", 4096, 4096, 1, [4096]),
        ("cuda", 11008, 4096, 1, [11008]),  # 16,384 rows of 8 KiB fit
        ("cuda", 4096, 11008, 64, [4096]),  # 6,096 columns of 22,016 bytes fit
        ("cuda", 11008, 4096, 64, [11008]),
        ("cuda", 14336, 4096, 64, [14336]),
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
    for tiles_of in (row_tiles, column_tiles):
        ((_, tile),) = tiles_of(weight, torch.bfloat16)
        assert tile.data_ptr() == weight.data_ptr()
    assert len(list(row_tiles(weight, torch.bfloat16, torch.ones(2049)))) > 1
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
