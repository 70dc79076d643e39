"""The Triton kernels in Triton's interpreter, on a CPU: decoding bit for bit, sums against float64.

tests/test_ops_triton.py runs this file in a process with TRITON_INTERPRET=1 and QDORA_KERNELS=triton.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qdora.ops import blockwise, expert_product, tiles, triton_kernels
from qdora.ops.dora import row_norm, squared_row_norm
from qdora.ops.expert_product import frozen_stack, stack_norm
from qdora.ops.expert_tokens import ExpertTokens
from qdora.ops.packed import BLOCK_SIZES, PackedWeight, quantize
from qdora.ops.tiles import column_tiles, row_tiles
from tests import reference
from tests.test_ops_adapted_product import to_numpy
from tests.test_ops_full_precision import Products
from tests.test_ops_quantize import uneven

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

from gpu import kernels_compared
from gpu.part import Part
from gpu.plan import SMOKE
from gpu.run_sections import failed_checks

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INTEGERS = {2: torch.int16, 4: torch.int32}
# Whole blocks, rows that are no multiple of a tile, one row, blocks that cross rows, odd rows, less than a block.
SHAPES = ((37, 192), (1, 64), (7, 320), (21, 1088), (40, 96), (33, 101), (5, 7), (1, 1))


def definition(weight: PackedWeight, dtype: torch.dtype, gain: Tensor | None = None) -> Tensor:
    """The dense diag(gain) W by plain torch: scales times gain if no block crosses rows, else weights times gain."""
    scales, nested = weight.absmax, weight.nested
    if weight.kind == "mxfp4":
        scales = 2.0 ** (scales.float() - 127)
    if nested is not None:
        scales = blockwise.dequantize_scales(scales, nested.absmax, nested.code, nested.offset)
    aligned = weight.shape[1] % weight.block_size == 0
    if gain is not None and aligned:
        scales = (scales.view(weight.shape[0], -1) * gain[:, None]).view(-1)
    form = {"shape": weight.shape, "dtype": torch.float32}
    dense = blockwise.dequantize_4bit(weight.packed, scales, weight.kind, weight.block_size, **form)
    return (dense if gain is None or aligned else dense * gain[:, None]).to(dtype)


def assert_same_bits(got: Tensor, expected: Tensor) -> None:
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    assert got.is_contiguous()
    bits = INTEGERS[got.element_size()]
    assert torch.equal(got.view(bits), expected.contiguous().view(bits))


def gain_of(weight: PackedWeight) -> Tensor:
    return torch.rand(weight.shape[0], generator=torch.Generator().manual_seed(5)) * 2


def assert_decodes(weight: PackedWeight, dtype: torch.dtype) -> None:
    for gain in (None, gain_of(weight)):
        expected = definition(weight, dtype, gain)
        assert_same_bits(triton_kernels.decode(weight, dtype, gain=gain), expected)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_weight_is_decoded_to_the_bits_of_the_definition(shape, double_quant):
    for dtype in DTYPES:
        assert_decodes(quantize(uneven(shape), "nf4", 64, double_quant), dtype)


@pytest.mark.parametrize("kind", ["fp4", "int4", "nf3", "nf2"])
def test_other_code_books_too(kind):
    for block_size in (16, 64):
        assert_decodes(quantize(uneven((9, 192)), kind, block_size), torch.bfloat16)


def test_scales_that_are_powers_of_2():
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 256, (9 * 96 // 2,), dtype=torch.uint8, generator=generator)
    scales = torch.randint(100, 150, (9 * 3,), dtype=torch.uint8, generator=generator)
    assert_decodes(PackedWeight("mxfp4", (9, 96), 32, codes, scales), torch.bfloat16)


@settings(max_examples=15, deadline=None)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 700),
    block_size=st.sampled_from(BLOCK_SIZES),
    whole=st.booleans(),
    double_quant=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shape_and_block_size(rows, columns, block_size, whole, double_quant, dtype):
    columns = -(-columns // block_size) * block_size if whole else columns
    assert_decodes(quantize(uneven((rows, columns)), "nf4", block_size, double_quant), dtype)


@pytest.mark.parametrize("shape", [(70, 1088), (33, 101)])
def test_a_part_has_the_bits_of_the_whole(shape):
    weight = quantize(uneven(shape), "nf4", 64)
    gain = gain_of(weight)
    expected = definition(weight, torch.bfloat16, gain)
    for rows, columns in ((slice(3, 20), slice(64, 101)), (slice(32, 33), slice(0, shape[1]))):
        if shape[1] % 64 == 0:
            columns = slice(columns.start, -(-columns.stop // 64) * 64)
        got = triton_kernels.decode(weight, torch.bfloat16, rows=rows, columns=columns, gain=gain)
        assert_same_bits(got, expected[rows, columns])


@pytest.mark.parametrize(("experts", "rows", "columns"), [((0, 2, 3), 12, 64), ((4,), 7, 96), ((1, 4), 5, 101)])
def test_some_experts_are_decoded_in_one_launch(experts, rows, columns):
    stack = quantize(uneven((5 * rows, columns)), "nf4", 64)
    gain = gain_of(stack)
    expected = definition(stack, torch.bfloat16, gain).view(5, rows, columns)[list(experts)].reshape(-1, columns)
    some = triton_kernels.Experts(torch.tensor(experts), rows)
    assert_same_bits(triton_kernels.decode(stack, torch.bfloat16, gain=gain, experts=some), expected)


@pytest.mark.parametrize(("columns", "weights"), [(4096, 2**32), (4100, 2**31)])
def test_offsets_need_64_bits(columns, weights):
    """More than 2^31 bytes of codes, and more than 2^31 weights where blocks cross rows."""
    rows = 16 * (weights // columns // 16 + 2)
    # Memory that is never touched costs nothing.
    packed = torch.empty(rows * columns // 2, dtype=torch.uint8)
    weight = PackedWeight("nf4", (rows, columns), 64, packed, torch.empty(rows * columns // 64))
    last = quantize(uneven((16, columns)), "nf4", 64, double_quant=False)  # whole blocks
    packed[-len(last.packed) :] = last.packed
    weight.absmax[-len(last.absmax) :] = last.absmax
    got = triton_kernels.decode(weight, torch.bfloat16, rows=slice(rows - 2, rows))
    assert_same_bits(got, definition(last, torch.bfloat16)[-2:])


@pytest.mark.parametrize("shape", [(40, 192), (33, 101), (20, 640)])
def test_tiles_have_the_bits_that_they_have_without_triton(shape, monkeypatch):
    """Cut in rows and in columns."""
    monkeypatch.setattr(tiles, "_CPU_TILE_BYTES", 4096)
    monkeypatch.setattr(tiles, "_LONG", 8)
    monkeypatch.setattr(tiles, "_SHORT", 3)
    weight = quantize(uneven(shape), "nf4", 64)
    gain = gain_of(weight)
    expected = definition(weight, torch.bfloat16, gain)
    for cut, dim in ((row_tiles, 0), (column_tiles, 1)):
        with mock.patch.object(triton_kernels, "decode", wraps=triton_kernels.decode) as decode:
            parts = [tile for _, tile in cut(weight, torch.bfloat16, gain)]
        assert decode.call_count == len(parts) > 1
        assert_same_bits(torch.cat(parts, dim=dim), expected)


def factors(weight: PackedWeight, rank: int, experts: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    out, columns = weight.shape[0] // experts, weight.shape[1]
    a = torch.randn(experts, rank, columns, generator=generator).bfloat16()
    return a, torch.randn(experts, out, rank, generator=generator)


@pytest.mark.parametrize(("shape", "rank"), [((70, 1088), 16), ((7, 2112), 3), ((33, 101), 20), ((1, 64), 1)])
def test_sums_over_rows_against_float64(shape, rank):
    """Parts of 1,024 columns, ranks that are no power of 2, crossing blocks."""
    weight = quantize(uneven(shape), "nf4", 64)
    dense = definition(weight, torch.float32).double()
    squares = squared_row_norm(weight)
    torch.testing.assert_close(squares.double(), dense.square().sum(dim=1), rtol=1e-6, atol=0)
    (a,), (b,) = factors(weight, rank)
    terms = (dense @ a.double().T) * b.double()
    sizes = (dense.abs() @ a.double().abs().T * b.double().abs()).sum(dim=1)
    off = (triton_kernels.factor_dots(weight, a, b).double() - terms.sum(dim=1)).abs()
    assert bool((off <= 1e-6 * sizes).all())


@pytest.mark.parametrize("shared", [False, True])
def test_sums_of_some_experts(shared):
    stack = quantize(uneven((5 * 70, 192)), "nf4", 64)
    a, b = factors(stack, 5, experts=5)
    a = a[:1] if shared else a
    index = torch.tensor([0, 3, 4])
    dense = definition(stack, torch.float32).double().view(5, 70, 192)[index]
    chosen = a if shared else a[index]
    expected = (dense @ chosen.double().mT * b[index].double()).sum(dim=2)
    got = triton_kernels.factor_dots(stack, chosen, b[index], triton_kernels.Experts(index, 70))
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_the_norm_of_a_layer_and_of_a_stack():
    """In bf16 the norm reads the codes, and its error stays far below that of a bf16 tile and product."""
    stack = quantize(torch.randn(4 * 12, 64, generator=torch.Generator().manual_seed(3)) * 0.1, "nf4", 64)
    a, b = factors(stack, 3, experts=4)
    b = b.bfloat16()
    base = squared_row_norm(stack).view(4, 12)
    dense = to_numpy(definition(stack, torch.float32)).reshape(4, 12, 64)
    expected = [reference.row_norm(dense[e], to_numpy(a[e]), to_numpy(b[e]), 0.5) for e in range(4)]
    tokens = ExpertTokens((2, 0, 1, 3))
    with mock.patch.object(triton_kernels, "factor_dots", wraps=triton_kernels.factor_dots) as dots:
        norms = stack_norm(stack, tokens, a, b, 0.5, base_squared=base, dtype=torch.bfloat16)
        one = quantize(definition(stack, torch.float32)[:12], "nf4", 64)
        base_of_one = squared_row_norm(one)
        norm = row_norm(one, a[0], b[0], 0.5, base_squared=base_of_one, dtype=torch.bfloat16)
    assert dots.call_count == 2
    for row, expert in enumerate((0, 2, 3)):
        assert reference.relative_error(to_numpy(norms[row]), expected[expert]) < 1e-6
    alone = reference.row_norm(to_numpy(definition(one, torch.float32)), to_numpy(a[0]), to_numpy(b[0]), 0.5)
    assert reference.relative_error(to_numpy(norm), alone) < 1e-6


def test_norms_use_float32_in_full_whatever_the_caller_allows():
    stack = quantize(uneven((4 * 12, 64)), "nf4", 64)
    a, b = factors(stack, 3, experts=4)
    base = squared_row_norm(stack)
    torch.set_float32_matmul_precision("high")
    try:
        with Products() as products:
            stack_norm(
                stack, ExpertTokens((2, 0, 1, 3)), a, b, 0.5, base_squared=base.view(4, 12), dtype=torch.bfloat16
            )
            row_norm(stack, a[0], b.flatten(0, 1), 0.5, base_squared=base, dtype=torch.bfloat16)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert products.precisions == 4 * [("ieee", "ieee", "highest")]  # A A^T and its product with B, of each


def test_experts_that_share_a_launch_give_the_products_of_experts_one_by_one(monkeypatch):
    stack = quantize(uneven((5 * 12, 64)), "nf4", 64)
    tokens = ExpertTokens((2, 0, 3, 1, 4))
    x = torch.randn(10, 64, generator=torch.Generator().manual_seed(1)).requires_grad_()

    def products() -> tuple[Tensor, Tensor]:
        out = frozen_stack(x, stack, tokens)
        return out.detach(), torch.autograd.grad(out.square().sum(), x)[0]

    expected = products()
    monkeypatch.setattr(expert_product, "_together", lambda *_: 3)
    with mock.patch.object(triton_kernels, "decode", wraps=triton_kernels.decode) as decode:
        got = products()
    stacks = [call.kwargs["experts"] for call in decode.call_args_list if "experts" in call.kwargs]
    assert [len(experts.numbers) for experts in stacks] == [3, 3]
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_section_of_the_gpu_suite_compares_both():
    part = Part(None, 1800)
    kernels_compared.run(part, replace(SMOKE, shapes=((64, 32),)), torch.device("cpu"))
    assert part.entries["triton"]
    assert failed_checks({"triton": {"result": part.entries}}) == []
    times = [entry["seconds"] for entry in part.entries.values() if isinstance(entry, dict) and "seconds" in entry]
    assert len(times) == 3
    assert all(any("triton" in way for way in seconds) for seconds in times)
