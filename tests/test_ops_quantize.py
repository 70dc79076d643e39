"""Quantising: against plain loops and bitsandbytes on the same input, what must hold for any input, and checkpoints."""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import sys

import bitsandbytes as bnb
import numpy as np
import pytest
import torch
from bitsandbytes import functional as bnb_functional
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm
from torch._subclasses.fake_tensor import FakeTensorMode

from qdora.errors import UserError
from qdora.quant import blockwise, codebooks, kernels
from qdora.quant.bnb import from_bnb_state, to_bnb_state
from qdora.quant.packed import (
    BLOCK_SIZES,
    PackedWeight,
    block_scales,
    decoder,
    dequantize,
    empty_packed,
    from_tensors,
    pack,
    quantize,
    quantize_parts,
    stored_scales,
    zero_packed,
)
from tests import reference_quant as reference

FOUR_BITS, TIGHT = ("nf4", "fp4"), ("nf3", "nf2", "int3", "int2")
RESEARCH = (*TIGHT, "int4")
KINDS = (*FOUR_BITS, "int8", *RESEARCH)
BITS = {"nf3": 3, "nf2": 2, "int3": 3, "int2": 2}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CPU = torch.device("cpu")
needs_bnb = pytest.mark.skipif(not kernels.is_available("cpu"), reason="bitsandbytes has no CPU library here")
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


DECODERS = {"torch": blockwise.dequantize_blocks, "bnb": kernels.dequantize_4bit, "triton": kernels.dequantize_tight}


def chosen_for(kind: str, device: torch.device, **form) -> str:
    return next(name for name, each in DECODERS.items() if each is decoder(kind, device, **form))


def by_backends(packed: PackedWeight, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The dense weight by `dequantize`, by plain torch and, where it may be chosen, by bitsandbytes."""
    found = {"auto": dequantize(packed, dtype)}
    if packed.kind == "int8":
        return found | {"torch": blockwise.dequantize_rows(packed.packed, packed.absmax, dtype)}
    form = {"block_size": packed.block_size, "in_features": packed.shape[1], "dtype": dtype}
    codes = {"torch": blockwise, "bnb": kernels, "triton": blockwise}
    for name in {"torch", chosen_for(packed.kind, packed.device, **form)}:
        scales = packed.absmax
        if packed.nested_absmax is not None:
            nested = packed.nested_absmax, packed.nested_code, packed.nested_offset
            scales = codes[name].dequantize_scales(scales, *nested)
        found[name] = DECODERS[name](
            packed.packed, scales, packed.kind, packed.block_size, shape=packed.shape, dtype=dtype
        )
    return found


def unpack(packed, numel, kind="nf4"):
    return reference.unpack(packed.tolist(), BITS.get(kind, 4), numel)


def assert_same(found: PackedWeight, wanted: PackedWeight) -> None:
    assert (found.kind, found.shape, found.block_size) == (wanted.kind, wanted.shape, wanted.block_size)
    assert found.tensors().keys() == wanted.tensors().keys()
    assert all(torch.equal(found.tensors()[name], tensor) for name, tensor in wanted.tensors().items())


def table(kind):
    """QLoRA's construction with scipy.stats: evenly spaced probabilities on each side of an exact 0."""
    if kind == "int4":
        return np.arange(-7, 8) / 7
    if kind in ("int3", "int2"):
        half = 2 ** (BITS[kind] - 1)
        return np.arange(-half, half) / (half - 0.5)
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
    np.testing.assert_allclose(table("nf4"), reference.NF4, atol=5e-7)
    for kind, count in (("nf3", 8), ("nf2", 4), ("int4", 15), ("int3", 8), ("int2", 4)):
        values = codebooks.code_values(kind)
        np.testing.assert_allclose(values.double().numpy(), table(kind), rtol=2e-7, atol=0)
        assert (len(values), int((values == 0).sum())) == (count, 1)
    # OCP Microscaling Formats 1.0, sec. 5.3.3: two exponent bits, one fraction bit.
    magnitudes = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    assert codebooks.code_values("mxfp4").tolist() == [*magnitudes, *(-each for each in magnitudes)]
    assert torch.equal(codebooks.dynamic_map(), bnb_functional.create_dynamic_map())
    np.testing.assert_allclose(codebooks.dynamic_map().double().numpy(), reference.dynamic_map(), rtol=2e-7)


# Those of research formats have just been compared with their construction.
reference.VALUES |= {kind: [np.float32(each) for each in codebooks.code_values(kind)] for kind in RESEARCH}


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from((*FOUR_BITS, *RESEARCH)),
    dtype=st.sampled_from((*DTYPES, torch.float64)),
    block_size=st.sampled_from(BLOCK_SIZES),
    # Rows that start inside a block, odd rows, rows shorter than a block; and rows of whole blocks.
    shape=st.one_of(
        st.tuples(st.integers(1, 7), st.integers(1, 70)), st.sampled_from([(33, 64), (9, 192), (5, 576), (2, 4096)])
    ),
    seed=st.integers(0, 2**31 - 1),
)
def test_four_bits_equal_the_plain_loops(kind, dtype, block_size, shape, seed):
    weight = uneven(shape, dtype, seed)
    packed = quantize(weight, kind, block_size, double_quant=False)
    codes, absmax = reference.quantize_4bit(weight.float().reshape(-1).numpy(), kind, block_size)
    assert unpack(packed.packed, weight.numel(), kind) == codes
    assert packed.absmax.tolist() == [float(a) for a in absmax]
    if kind in FOUR_BITS and dtype != torch.float64 and block_size >= 64:
        expected, state = bnb_functional.quantize_4bit(weight, blocksize=block_size, quant_type=kind)
        assert torch.equal(packed.packed, expected.reshape(-1))
        assert torch.equal(packed.absmax, state.absmax)

    nested = quantize(weight, kind, block_size, double_quant=True)
    assert torch.equal(nested.packed, packed.packed)
    matrix = torch.tensor(codes, dtype=torch.uint8).view(shape)
    for one in (packed, nested):
        assert_same(pack(matrix, packed.absmax, kind, block_size, one is nested), one)
        assert torch.equal(stored_scales(packed.absmax, one is nested), block_scales(one))
    offset, code = reference.offset(absmax), nested.nested_code.numpy()
    assert nested.nested_offset.item() == float(offset)
    nested_codes, nested_absmax = reference.quantize_scales(absmax, offset, code)
    assert nested.absmax.tolist() == nested_codes
    assert nested.nested_absmax.tolist() == [float(a) for a in nested_absmax]

    for one in (packed, nested):
        scales = absmax if one is packed else reference.dequantize_scales(nested_codes, nested_absmax, offset, code)
        assert block_scales(one).tolist() == [float(s) for s in scales]
        dense = torch.tensor(np.array(reference.dequantize_4bit(codes, scales, kind, block_size))).view(shape)
        for out in (*DTYPES, torch.float64):
            for each in by_backends(one, out).values():
                assert each.dtype == out
                assert torch.equal(each, dense.to(out))


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


@pytest.mark.parametrize("kind", ["nvfp4", "mxfp4"])
@pytest.mark.parametrize("largest", [3e-3, 1.0, 700.0])
def test_fp4_blocks_equal_the_definition(kind, largest, monkeypatch):
    monkeypatch.setattr(blockwise, "_CPU_CHUNK", 512)
    weight = uneven((24, 96)) * largest
    weight[2], weight[3, :16], weight[4, 32:64] = 0, 0, weight[4, 32:64] * 1e-6
    ties = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0]
    weight[5, :32] = torch.tensor([*ties, *(-each for each in ties)] * 2) * weight[5].abs().max() / 6
    dense, scales, whole = reference.quantize_fp4(weight.tolist(), kind)
    packed = quantize(weight, kind)
    assert packed.absmax.tolist() == scales
    assert packed.global_scale is None or float(packed.global_scale) == whole
    assert dequantize(packed).flatten().tolist() == [float(each) for each in dense]
    assert torch.equal(dequantize(quantize(weight * 4, kind)), 4 * dequantize(packed))


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
    parts = quantize_parts(weight[:, :4096].split(8), kind, 128, double_quant=True)
    assert_same(parts, quantize(weight[:, :4096], kind, 128))
    monkeypatch.setattr(blockwise, "_CPU_CHUNK", 4096)
    assert_same(quantize(weight, kind, 128), whole)
    assert torch.equal(by_backends(whole, torch.float32)["torch"], dense)
    assert torch.equal(dequantize(whole, torch.float64), dense.double())
    assert torch.equal(weight, kept)


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


def test_what_is_refused_and_that_an_int8_row_too_small_for_a_float32_factor_is_zero():
    dense = dequantize(quantize(torch.tensor([[1e-44, 0.0, -3e-45], [1.0, -2.0, 0.5]]), "int8"))
    assert bool(dense.isfinite().all())
    assert torch.equal(dense[0], torch.zeros(3))
    bad_values = ("nf4", math.nan), ("fp4", math.inf), ("int8", -math.inf), ("int3", math.nan), ("nvfp4", math.nan)
    for kind, bad in (*bad_values, ("mxfp4", math.inf)):
        weight = torch.randn(30, 96)
        weight[3, 5] = weight[29, 69] = bad
        with pytest.raises(ValueError, match=r"layers\.0\.q_proj: .* not finite"):
            quantize(weight, kind, name="layers.0.q_proj")
    tensors = quantize(torch.zeros(8, 64), "nf4", 64, double_quant=False).tensors()
    tensors["packed"] = tensors["packed"][:-1]
    tensors["absmx"] = tensors.pop("absmax")
    for call, message in (
        (lambda: quantize(torch.zeros(3, 3), "nf4", 48), "16, 32, 64, .* got 48"),
        (lambda: quantize(torch.zeros(3, 40), "mxfp4"), r"\(3, 40\) in mxfp4 must be one of \(32,\)"),
        (lambda: from_tensors("int8", (8, 64), 64, {"nested_absmax": torch.zeros(1)}), "nested_absmax"),
        (lambda: from_tensors("mxfp4", (8, 65), 32, {}), r"\(8, 65\)"),
        (lambda: from_tensors("nf4", (8, 64), 64, tensors), r"256.*absmax.*255.*absmx"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


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
    group, size = {4: (2, 1), 3: (8, 3), 2: (4, 1)}[BITS.get(kind, 4)]
    wanted = numel + 4 * shape[0] if kind == "int8" else -(-numel // group) * size + scales
    assert packed.num_bytes == wanted


@needs_bnb
def test_the_kernel_is_chosen_only_where_rows_are_whole_blocks(monkeypatch):
    def chosen(kind="nf4", block_size=64, in_features=576, dtype=torch.bfloat16, device=CPU):
        return chosen_for(kind, device, block_size=block_size, in_features=in_features, dtype=dtype)

    assert chosen() == "bnb"
    assert chosen(kind="fp4", in_features=4096, block_size=1024, dtype=torch.float32) == "bnb"
    assert chosen(block_size=32) == "bnb"
    assert chosen(block_size=16) == "torch"
    assert chosen(block_size=128) == "torch"  # 576 = 4.5 blocks
    assert chosen(in_features=96) == "torch"
    assert chosen(in_features=4096, block_size=2048) == "torch"
    assert chosen(kind="int8") == "torch"
    assert chosen(dtype=torch.float64) == "torch"
    assert chosen(device=torch.device("meta")) == "torch"
    packed = quantize(uneven((64, 128)), "nf4")
    expected = dequantize(packed)
    monkeypatch.setattr(kernels, "is_available", lambda device_type: False)
    assert chosen() == "torch"
    assert torch.equal(dequantize(packed), expected)


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8", "int3", "int2"])
@pytest.mark.parametrize("double_quant", [False, True])
def test_taken_apart_put_together_moved_and_faked(kind, double_quant):
    packed = quantize(uneven((33, 65)), kind, 128, double_quant)
    again = from_tensors(kind, packed.shape, packed.block_size, packed.tensors())
    assert_same(again, packed)
    assert all(again.tensors()[name] is tensor for name, tensor in packed.tensors().items())
    assert packed.to("cpu") is packed
    moved = packed.to("meta")
    assert (moved.device.type, moved.num_bytes) == ("meta", packed.num_bytes)
    copy = packed.clone()
    assert_same(copy, packed)
    assert all(copy.tensors()[name].data_ptr() != tensor.data_ptr() for name, tensor in packed.tensors().items())
    meta = dequantize(moved, torch.bfloat16)
    assert (meta.shape, meta.dtype, meta.device.type) == ((33, 65), torch.bfloat16, "meta")
    with FakeTensorMode():
        for shape in ((33, 65), (4, 128)):
            fake = dequantize(empty_packed(kind, shape), torch.float16)
            assert (fake.shape, fake.dtype) == (shape, torch.float16)
    assert isinstance(dequantize(packed)[0, 0].item(), float)  # no table of fake tensors was kept


@pytest.mark.parametrize("kind", TIGHT)
def test_one_launch_decodes_a_tile_where_triton_runs(kind, monkeypatch, caplog):
    """By Triton's interpreter. Without Triton plain torch does it, and the log has one line."""
    kernels.tight_decoder.cache_clear()
    form = {"block_size": 64, "in_features": 64, "dtype": torch.float32}
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "qdora.quant.tight_kernel", None)
        assert [chosen_for(kind, torch.device("cuda"), **form) for _ in range(2)] == ["torch", "torch"]
    kernels.tight_decoder.cache_clear()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    with kernels.planned_on("cuda"), FakeTensorMode():
        assert chosen_for(kind, CPU, **form) == "triton"
        assert dequantize(empty_packed(kind, (33, 65)), torch.float16).shape == (33, 65)
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    spec = importlib.util.find_spec("qdora.quant.tight_kernel")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(kernels, "tight_decoder", lambda device_type: module.decode_into)
    # To bfloat16 a GPU rounds to even (cvt.rn), while the interpreter truncates.
    shapes, dtypes = [(1, 1), (3, 5), (7, 131), (33, 64), (5, 576)], (torch.float32, torch.float16)
    for shape, dtype in itertools.product(shapes, dtypes):
        packed = quantize(uneven(shape), kind, 16)
        assert chosen_for(kind, CPU, **form) == "triton"
        found = by_backends(packed, dtype)
        assert torch.equal(found["triton"], found["torch"])


def bnb_checkpoint(weight: torch.Tensor, kind: str, block_size: int, double_quant: bool) -> dict[str, torch.Tensor]:
    """What bitsandbytes stores for a 4-bit layer."""
    packed, state = bnb_functional.quantize_4bit(
        weight, blocksize=block_size, quant_type=kind, compress_statistics=double_quant
    )
    return {"weight": packed} | {f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}


@same_nested_rule
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("kind", FOUR_BITS)
def test_checkpoints_of_bitsandbytes_are_read_and_written(kind, double_quant):
    weight = uneven((48, 96), torch.bfloat16)
    packed = quantize(weight, kind, 128, double_quant)
    stored = bnb_checkpoint(weight, kind, 128, double_quant)
    for storage in (torch.uint8, torch.bfloat16):
        stored["weight"] = stored["weight"].view(-1).view(storage).view(-1, 1)
        assert_same(from_bnb_state(stored | {"bias": torch.zeros(48)}), packed)
    stored["weight"] = stored["weight"].view(torch.uint8).view(-1, 1)

    written = to_bnb_state(packed, torch.float16)
    key = f"weight.quant_state.bitsandbytes__{kind}"
    forms = [{n: (t.shape, t.dtype) for n, t in each.items() if n != key} for each in (written, stored)]
    assert forms[0] == forms[1]
    ours, theirs = (json.loads(bytes(state[key].tolist())) for state in (written, stored))
    assert ours.keys() == theirs.keys()
    parts = {name.removeprefix("weight."): tensor for name, tensor in written.items() if name != "weight"}
    state = bnb_functional.QuantState.from_dict(parts, device=CPU)
    assert (state.blocksize, state.quant_type, tuple(state.shape), state.dtype) == (128, kind, (48, 96), torch.float16)
    nested = bnb_functional.dequantize_blockwise(state.absmax, state.state2) + state.offset if double_quant else None
    assert torch.equal(block_scales(packed), state.absmax if nested is None else nested)
    assert_same(from_bnb_state(to_bnb_state(packed)), packed)


@pytest.mark.parametrize("kind", TIGHT)
def test_tight_codes_are_written_with_their_bits(kind):
    packed, key = quantize(uneven((47, 97)), kind), f"weight.quant_state.bitsandbytes__{kind}"
    state = to_bnb_state(packed)
    assert_same(from_bnb_state(state), packed)
    assert json.loads(bytes(state[key].tolist()))["bits"] == BITS[kind]


def test_int8_checkpoints():
    weight = uneven((12, 40), torch.float16)[1:]  # bitsandbytes has no defined code for a zero row
    codes, scales, _ = bnb_functional.int8_vectorwise_quant(weight)
    assert torch.equal(quantize(weight, "int8").packed, codes)
    assert torch.equal(quantize(weight, "int8").absmax, scales)
    stored = {"weight": codes, "SCB": scales, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    packed = from_bnb_state(stored)
    assert torch.equal(dequantize(packed), bnb_functional.int8_vectorwise_dequant(codes, scales))
    written = to_bnb_state(packed)
    assert all(torch.equal(written[name], tensor) for name, tensor in stored.items())


def quant_state(text: str) -> torch.Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


STATE = "weight.quant_state.bitsandbytes__nf4"
SCB = {"SCB": torch.zeros(3)}
BROKEN = {
    "no scales": ({"weight.absmax": None}, "'weight.absmax'"),
    "another code book": ({"weight.quant_map": torch.linspace(-1, 1, 16)}, "code book of nf4"),
    "short": ({"weight": torch.zeros(2300, 1, dtype=torch.uint8)}, r"\(2300,\)"),
    "no weight": ({"weight": None}, "'weight'"),
    "no state": ({STATE: None}, "values to unpack"),
    "no JSON": ({STATE: quant_state("not json")}, "JSONDecodeError"),
    "nothing in it": ({STATE: quant_state("{}")}, "'shape'"),
    "other nested blocks": ({"weight.nested_absmax": torch.zeros(2)}, r"\(2,\)"),
    "a kind that is not": ({STATE: None, STATE[:-3] + "af4": quant_state("{}")}, "'af4'"),
    "tiled": (SCB | {"weight_format": torch.tensor(2)}, "must be 0.* got 2"),
    "flat": (SCB | {"weight": torch.zeros(3)}, "values to unpack"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_checkpoint_names_the_layer_and_the_fault(case):
    changes, word = BROKEN[case]
    stored = bnb_checkpoint(uneven((48, 96)), "nf4", 64, True) | changes
    with pytest.raises(UserError, match=f"^layers.3.up_proj: .*{word}"):
        from_bnb_state({name: each for name, each in stored.items() if each is not None}, name="layers.3.up_proj")
