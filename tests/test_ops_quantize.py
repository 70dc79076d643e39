"""Quantising: against plain loops, against bitsandbytes on the same input, and what must hold for any input."""

from __future__ import annotations

import math

import bitsandbytes as bnb
import numpy as np
import pytest
import torch
from bitsandbytes import functional as bnb_functional
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from qdora.ops import blockwise, bnb_kernels, codebooks
from qdora.ops.packed import (
    BLOCK_SIZES,
    PackedWeight,
    RowParts,
    block_scales,
    choose_backend,
    dequantize,
    empty_packed,
    quantize,
    zero_packed,
)
from tests import reference_quant as reference

FOUR_BITS, RESEARCH = ("nf4", "fp4"), ("nf3", "nf2", "int4")
KINDS = (*FOUR_BITS, "int8", *RESEARCH)
BITS = {"nf3": 3, "nf2": 2, "int4": 4}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
same_nested_rule = pytest.mark.skipif(
    not bnb.__version__.startswith("0.50."), reason="nested codes are compared with the CPU rule of bitsandbytes 0.50"
)


def uneven(shape, dtype=torch.float32, seed=0):
    """Gaussian rows of very different size, the first one zero, with zeros in between."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator) * 10 ** (4 * torch.rand(shape[0], 1, generator=generator) - 2)
    weight[torch.rand(shape, generator=generator) < 0.05] = 0
    if shape[0] > 1:
        weight[0] = 0
    return weight.to(dtype)


def by_backends(packed: PackedWeight, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The dense weight by `dequantize`, by plain torch and, where it may be chosen, by bitsandbytes."""
    found = {"auto": dequantize(packed, dtype)}
    if packed.kind == "int8":
        return found | {"torch": blockwise.dequantize_rows(packed.packed, packed.absmax, dtype)}
    form = {"block_size": packed.block_size, "in_features": packed.shape[1], "dtype": dtype}
    codes = {"torch": blockwise, "bnb": bnb_kernels}
    for name in {"torch", choose_backend(packed.kind, packed.device, **form)}:
        scales, nested = packed.absmax, packed.nested
        if nested is not None:
            scales = codes[name].dequantize_scales(scales, nested.absmax, nested.code, nested.offset)
        found[name] = codes[name].dequantize_4bit(
            packed.packed, scales, packed.kind, packed.block_size, shape=packed.shape, dtype=dtype
        )
    return found


def unpack(packed, numel):
    return torch.stack([packed >> 4, packed & 15], dim=1).reshape(-1)[:numel].tolist()


def assert_same(found: PackedWeight, wanted: PackedWeight) -> None:
    assert (found.kind, found.shape, found.block_size) == (wanted.kind, wanted.shape, wanted.block_size)
    assert found.tensors().keys() == wanted.tensors().keys()
    assert all(torch.equal(found.tensors()[name], tensor) for name, tensor in wanted.tensors().items())


# ------------------------------------------------------------------------------------------------ code books


def table(kind):
    """QLoRA's construction with scipy.stats: evenly spaced probabilities on each side of an exact 0."""
    if kind == "int4":
        return np.arange(-7, 8) / 7
    half = 2 ** (BITS.get(kind, 4) - 1)
    end = 1 - 0.5 * (1 / (4 * half) + 1 / (4 * half - 2))
    positive, negative = norm.ppf(np.linspace(end, 0.5, half + 1)[:-1]), norm.ppf(np.linspace(end, 0.5, half)[:-1])
    values = np.sort(np.concatenate([positive, -negative, [0.0]]))
    return values / values.max()


def test_code_books_are_those_of_the_papers_and_of_bitsandbytes():
    for kind in FOUR_BITS:
        values = codebooks.code_values(kind)
        assert values.tolist() == [float(v) for v in reference.VALUES[kind]]
        assert torch.equal(values, bnb_functional.get_4bit_type(kind, device="cpu"))
    np.testing.assert_allclose(codebooks.normal_quantiles(4), reference.NF4, atol=5e-7)
    np.testing.assert_allclose(table("nf4"), reference.NF4, atol=5e-7)
    for kind, count in (("nf3", 8), ("nf2", 4), ("int4", 15)):
        values = codebooks.code_values(kind)
        np.testing.assert_allclose(values.double().numpy(), table(kind), rtol=2e-7, atol=0)
        assert (len(values), int((values == 0).sum()), values.min(), values.max()) == (count, 1, -1, 1)
    # OCP Microscaling Formats 1.0, sec. 5.3.3: two exponent bits, one fraction bit.
    magnitudes = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    assert codebooks.code_values("mxfp4").tolist() == [*magnitudes, *(-each for each in magnitudes)]
    assert torch.equal(codebooks.dynamic_map(), bnb_functional.create_dynamic_map())
    np.testing.assert_allclose(codebooks.dynamic_map().double().numpy(), reference.dynamic_map(), rtol=2e-7)


@pytest.mark.parametrize("kind", [*codebooks.CODE_BITS])
def test_grid_look_up_equals_a_search_at_and_around_every_bound(kind):
    bounds, _ = codebooks.decision_bounds(kind)
    near = torch.cat([bounds, torch.linspace(-1, 1, 20_003)])
    near = torch.cat([near, torch.nextafter(near, torch.tensor(2.0)), torch.nextafter(near, torch.tensor(-2.0))])
    near = near.clamp(-1, 1)
    found, cell = codebooks.decision_table(kind), codebooks.cell(near)
    rank = found.rank[cell.long()] + (near > found.bound[cell.long()])
    assert torch.equal(rank.long(), (near[:, None] > bounds).sum(dim=1))


# ------------------------------------------------------------------------------------------------ plain loops


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(FOUR_BITS),
    dtype=st.sampled_from((*DTYPES, torch.float64)),
    block_size=st.sampled_from((32, 64, 128, 1024)),
    shape=st.tuples(st.integers(1, 7), st.integers(1, 70)),
    seed=st.integers(0, 2**31 - 1),
)
def test_four_bits_equal_the_plain_loops(kind, dtype, block_size, shape, seed):
    weight = uneven(shape, dtype, seed)
    packed = quantize(weight, kind, block_size, double_quant=False)
    codes, absmax = reference.quantize_4bit(weight.float().reshape(-1).numpy(), kind, block_size)
    assert unpack(packed.packed, weight.numel()) == codes
    assert packed.absmax.tolist() == [float(a) for a in absmax]

    nested = quantize(weight, kind, block_size, double_quant=True)
    assert nested.nested is not None
    assert torch.equal(nested.packed, packed.packed)
    offset, code = reference.offset(absmax), nested.nested.code.numpy()
    assert nested.nested.offset.item() == float(offset)
    nested_codes, nested_absmax = reference.quantize_scales(absmax, offset, code)
    assert nested.absmax.tolist() == nested_codes
    assert nested.nested.absmax.tolist() == [float(a) for a in nested_absmax]

    for one in (packed, nested):
        scales = absmax if one is packed else reference.dequantize_scales(nested_codes, nested_absmax, offset, code)
        assert block_scales(one).tolist() == [float(s) for s in scales]
        dense = torch.tensor(np.array(reference.dequantize_4bit(codes, scales, kind, block_size))).view(shape)
        for out in (*DTYPES, torch.float64):
            assert all(torch.equal(each, dense.to(out)) for each in by_backends(one, out).values())


@settings(max_examples=30, deadline=None)
@given(
    dtype=st.sampled_from((*DTYPES, torch.float64)),
    shape=st.tuples(st.integers(1, 7), st.integers(1, 70)),
    seed=st.integers(0, 2**31 - 1),
)
def test_int8_equals_the_plain_loops(dtype, shape, seed):
    weight = uneven(shape, dtype, seed)
    packed = quantize(weight, "int8")
    codes, absmax = reference.quantize_int8(weight.float().numpy())
    assert packed.packed.tolist() == codes
    assert packed.absmax.tolist() == [float(a) for a in absmax]
    exact = np.float64(codes) * np.float64(absmax)[:, None] / 127
    np.testing.assert_allclose(dequantize(packed, torch.float64).numpy(), exact, rtol=3e-7)


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(RESEARCH),
    shape=st.tuples(st.integers(1, 9), st.integers(1, 140)),
    block_size=st.sampled_from(BLOCK_SIZES),
    seed=st.integers(0, 9),
)
def test_in_research_formats_every_weight_takes_the_nearest_value(kind, shape, block_size, seed):
    weight = torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)).float()
    flat = weight.double().numpy().reshape(-1)
    dense = dequantize(quantize(weight, kind, block_size, double_quant=False)).double().numpy().reshape(-1)
    for start in range(0, len(flat), block_size):
        block = flat[start : start + block_size]
        scale = np.abs(block).max()
        nearest = np.abs(block[:, None] / scale - table(kind)[None]).min(axis=1)
        np.testing.assert_allclose(np.abs(block - dense[start : start + block_size]) / scale, nearest, atol=1e-6)


@pytest.mark.parametrize("num_blocks", [1, 7, 1000, 70_001])
def test_the_offset_of_double_quantisation_depends_neither_on_the_order_of_the_scales_nor_on_the_threads(num_blocks):
    """It is the float64 mean, rounded once. A float32 sum differs from order to order, and of more than 32,768 numbers
    it is summed in pieces, one a thread."""
    generator = torch.Generator().manual_seed(num_blocks)
    scales = torch.rand(num_blocks, generator=generator) * 0.02 + 1e-4
    expected = np.float32(math.fsum(scales.tolist()) / num_blocks)  # fsum is exact
    threads = torch.get_num_threads()
    for number, order in enumerate([scales, scales.sort().values, scales[torch.randperm(num_blocks)]], start=1):
        try:
            torch.set_num_threads(number)
            offset = blockwise.quantize_scales(order, torch.linspace(-1, 1, 256))[2]
        finally:
            torch.set_num_threads(threads)
        assert offset.item() == expected


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_layouts_and_parts_do_not_show(kind, monkeypatch):
    weight = uneven((19, 4097))
    kept = weight.clone()
    whole = quantize(weight, kind, 128)
    dense = by_backends(whole, torch.float32)["torch"]
    transposed = weight.T.contiguous().T.requires_grad_()
    assert not transposed.is_contiguous()
    assert_same(quantize(transposed, kind, 128), whole)
    assert not quantize(transposed, kind, 128).packed.requires_grad
    for wide in (weight, weight[:, :4096]):  # without whole blocks in a row, and with them
        parts = RowParts((19, wide.shape[1]), lambda wide=wide: iter(wide.split(8)))
        assert_same(quantize(parts, kind, 128), quantize(wide, kind, 128))
    monkeypatch.setattr(blockwise, "_CPU_CHUNK", 4096)
    monkeypatch.setattr(blockwise, "_CHUNK_OF_ROWS", 9000)
    assert_same(quantize(weight, kind, 128), whole)
    assert torch.equal(by_backends(whole, torch.float32)["torch"], dense)
    assert torch.equal(dequantize(whole, torch.float64), dense.double())
    assert torch.equal(weight, kept)


# ------------------------------------------------------------------------------------------------ bitsandbytes


@same_nested_rule
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", FOUR_BITS)
def test_codes_and_scales_equal_bitsandbytes(kind, dtype):
    # Whole blocks, short last blocks, odd lengths, less than a block, one weight, more than 256 blocks.
    shapes = ((8, 64), (7, 131), (5, 7), (1, 1), (3, 4096), (300, 257))
    for shape, block_size in [(shape, size) for shape in shapes for size in (64, 256, 4096)]:
        weight = uneven(shape, dtype)
        expected, plain = bnb_functional.quantize_4bit(weight, blocksize=block_size, quant_type=kind)
        packed = quantize(weight, kind, block_size)
        assert packed.nested is not None
        # bitsandbytes' own offset is a float32 mean, whose last bits depend on the number of threads.
        scales, state = bnb_functional.quantize_blockwise(plain.absmax - packed.nested.offset, blocksize=256)
        assert torch.equal(packed.packed, expected.reshape(-1))
        assert torch.equal(packed.absmax, scales)
        assert torch.equal(packed.nested.absmax, state.absmax)
        assert torch.equal(packed.nested.code, state.code)
        torch.testing.assert_close(packed.nested.offset, plain.absmax.mean(), rtol=1e-6, atol=0)
        assert torch.equal(quantize(weight, kind, block_size, False).absmax, plain.absmax)


@pytest.mark.parametrize("kind", FOUR_BITS)
def test_ties_and_their_neighbours_equal_bitsandbytes(kind):
    bounds, _ = codebooks.decision_bounds(kind)
    tie = torch.cat([bounds, torch.nextafter(bounds, torch.tensor(2.0)), torch.nextafter(bounds, torch.tensor(-2.0))])
    scales = (0.01 + torch.rand(60, generator=torch.Generator().manual_seed(0))).tolist()
    for scale in (1.0, 3e-39, 1e30, *scales):  # 3e-39: a block of subnormal numbers is not scaled up to 1
        whole = torch.cat([torch.tensor([1.0, -1.0, 0.0, -0.0]), tie, torch.zeros(15)])[None] * scale
        for weight in (whole, whole[:, :-15]):  # a short block is divided, a whole one multiplied by the reciprocal
            expected, state = bnb_functional.quantize_4bit(weight, blocksize=64, quant_type=kind)
            packed = quantize(weight, kind, 64, double_quant=False)
            assert torch.equal(packed.packed, expected.reshape(-1))
            assert torch.equal(packed.absmax, state.absmax)
    on_bounds = quantize(torch.cat([torch.ones(1), bounds])[None], kind, 64).packed
    assert unpack(on_bounds, 16)[1:] == list(reference.ascending_codes(kind)[:15])


@same_nested_rule
def test_nested_codes_equal_bitsandbytes_around_every_bound():
    code = codebooks.dynamic_map()
    middle = (code[:-1] + code[1:]) / 2
    # Where the grid point changes next to each bound, and the float32 numbers around it.
    grid = ((middle.double() + 1) / 2 * 65535).round()
    edges = torch.cat([(grid + shift) * 2 / 65535 - 1 for shift in (-0.5, 0.5)])
    edges = torch.cat([edges + step * 2.0**-25 for step in range(-8, 9)]).float()
    values = torch.cat([middle, edges.clamp(-1, 1), code, torch.linspace(-1, 1, 20_011)])
    for part in values.split(255):
        part = torch.cat([torch.ones(1), part])  # the 1 fixes the scale
        expected, state = bnb_functional.quantize_blockwise(part, blocksize=256)
        codes, absmax = blockwise.quantize_8bit(part, code, 256)
        assert torch.equal(codes, expected)
        assert torch.equal(absmax, state.absmax)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_int8_equals_bitsandbytes(dtype):
    for shape in ((8, 64), (7, 131), (1, 1), (3, 4096)):
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        expected, absmax, _ = bnb_functional.int8_vectorwise_quant(weight)
        packed = quantize(weight, "int8")
        assert torch.equal(packed.packed, expected)
        assert torch.equal(packed.absmax, absmax)
        dense = bnb_functional.int8_vectorwise_dequant(expected, absmax)
        for out in DTYPES:
            assert torch.equal(dequantize(packed, out), dense.to(out))


# ------------------------------------------------------------------------------------------------ any input


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("double_quant", [False, True])
def test_zero_weights_come_back_as_zero_and_pruning_afterwards_keeps_all_else(kind, double_quant):
    weight = uneven((301, 201), seed=3)
    weight[:40] = 0  # whole zero blocks beside large ones, so that the nested scale of a zero block is not 0
    weight[50, ::2] = 0
    packed = quantize(weight, kind, 64, double_quant)
    for dtype in (*DTYPES, torch.float64):
        for dense in by_backends(packed, dtype).values():
            assert bool((dense[weight == 0] == 0).all())
            assert bool(dense.isfinite().all())
    if double_quant and kind != "int8":
        assert bool((block_scales(packed)[:100] != 0).any()), "the case this test is for did not occur"
    keep = torch.rand(301, 201, generator=torch.Generator().manual_seed(1)) < 0.5
    pruned = zero_packed(packed, keep)
    assert torch.equal(dequantize(pruned), dequantize(packed) * keep)
    assert torch.equal(block_scales(pruned), block_scales(packed))
    for shape in ((1, 1), (3, 64), (257, 65)):
        assert torch.equal(dequantize(quantize(torch.zeros(shape), kind, 64, double_quant)), torch.zeros(shape))


def test_an_int8_row_too_small_for_a_float32_factor_is_zero():
    dense = dequantize(quantize(torch.tensor([[1e-44, 0.0, -3e-45], [1.0, -2.0, 0.5]]), "int8"))
    assert bool(dense.isfinite().all())
    assert torch.equal(dense[0], torch.zeros(3))


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_weights_are_named_and_counted(kind, bad):
    weight = torch.randn(30, 70)
    weight[3, 5] = weight[29, 69] = bad
    with pytest.raises(ValueError, match=r"layers\.0\.q_proj: 2 of 2100 .* not finite"):
        quantize(weight, kind, name="layers.0.q_proj")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(3), "nf4"), r"\(out, in\), got \(3,\)"),
        ((torch.zeros(3, 3, dtype=torch.int32), "nf4"), "torch.int32"),
        ((torch.zeros(0, 3), "nf4"), r"\(0, 3\)"),
        ((torch.zeros(3, 3), "nf5"), "nf4, fp4, int8, int4, nf3, nf2, mxfp4, got 'nf5'.* 'nf4'"),
        ((torch.zeros(3, 3), "nf4", 48), "16, 32, 64, .* got 48"),
        ((torch.zeros(3, 32), "mxfp4"), "only read"),
    ],
)
def test_what_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        quantize(*arguments)
    with pytest.raises(ValueError, match=r"nf4, fp4, int4, nf3, nf2, got .nf5"):
        codebooks.code_values("nf5")


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    shape=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    block_size=st.sampled_from(BLOCK_SIZES),
    double_quant=st.booleans(),
)
def test_layout_and_bytes_are_known_beforehand(kind, shape, block_size, double_quant):
    packed = quantize(torch.zeros(shape), kind, block_size, double_quant)
    planned = empty_packed(kind, shape, block_size, double_quant, device="meta")
    assert planned.num_bytes == packed.num_bytes
    assert planned.block_size == packed.block_size
    assert {n: (t.shape, t.dtype) for n, t in planned.tensors().items()} == {
        n: (t.shape, t.dtype) for n, t in packed.tensors().items()
    }
    numel = shape[0] * shape[1]
    blocks = -(-numel // block_size)
    scales = blocks + 4 * -(-blocks // 256) + 1024 + 4 if double_quant else 4 * blocks
    wanted = numel + 4 * shape[0] if kind == "int8" else -(-numel // 2) + scales
    assert packed.num_bytes == wanted
    tight = -(-numel * BITS[kind] // 8) - -(-numel // 2) if kind in ("nf3", "nf2") else 0
    assert packed.num_packed_bytes == wanted + tight
