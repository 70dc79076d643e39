"""The packed weight: dequantising with every backend, moving, taking apart, and bitsandbytes' checkpoint layout."""

from __future__ import annotations

import json
import re

import pytest
import torch
from bitsandbytes import functional as bnb_functional
from torch._subclasses.fake_tensor import FakeTensorMode

from qdora.nn.frozen_linear import FrozenLinear
from qdora.ops import bnb_kernels
from qdora.ops.bnb_state import from_bnb_state, to_bnb_state
from qdora.ops.packed import (
    BLOCK_SIZES,
    PackedWeight,
    block_scales,
    choose_backend,
    dequantize,
    empty_packed,
    from_tensors,
    quantize,
)
from tests.test_ops_quantize import DTYPES, FOUR_BITS, assert_same, by_backends, uneven

CPU = torch.device("cpu")
needs_bnb = pytest.mark.skipif(not bnb_kernels.is_available("cpu"), reason="bitsandbytes has no CPU library here")


def definition(packed: PackedWeight, dtype: torch.dtype) -> torch.Tensor:
    """value[code] * scale, one weight at a time in index order; scales from bitsandbytes' float32 code."""
    values = bnb_functional.get_4bit_type(packed.kind, device="cpu")
    codes = torch.stack([packed.packed >> 4, packed.packed & 15], dim=1).reshape(-1).long()
    numel = packed.shape[0] * packed.shape[1]
    scales, nested = packed.absmax, packed.nested
    if nested is not None:
        scales = bnb_functional.dequantize_blockwise(scales, absmax=nested.absmax, code=nested.code, blocksize=256)
        scales = scales + nested.offset
    block = torch.arange(numel) // packed.block_size
    return (values[codes[:numel]] * scales[block]).view(packed.shape).to(dtype)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.double().view(torch.int64)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("kind", FOUR_BITS)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_every_backend_gives_the_bits_of_the_definition(kind, block_size, double_quant):
    # Rows of whole blocks, rows that start inside a block, odd rows, rows shorter than a block.
    for shape in ((6, 4096), (40, 96), (33, 64), (9, 576), (7, 131), (1, 1)):
        packed = quantize(uneven(shape, seed=5), kind, block_size, double_quant)
        for dtype in (*DTYPES, torch.float64):
            expected = definition(packed, dtype)
            for backend, dense in by_backends(packed, dtype).items():
                assert dense.dtype == dtype
                assert dense.shape == shape
                # fp4 has two codes of zero, and on some CPUs bitsandbytes gives one of them the other sign.
                zero = 0.0 if kind == "fp4" and backend != "torch" else -0.0  # x - 0.0 is x
                assert torch.equal(bits(dense + zero), bits(expected + zero)), (shape, dtype, backend)


@needs_bnb
def test_the_kernel_is_chosen_only_where_rows_are_whole_blocks(monkeypatch):
    def chosen(kind="nf4", block_size=64, in_features=576, dtype=torch.bfloat16, device=CPU):
        return choose_backend(kind, device, block_size=block_size, in_features=in_features, dtype=dtype)

    assert chosen() == "bnb"
    assert chosen(kind="fp4", in_features=4096, block_size=1024, dtype=torch.float32) == "bnb"
    assert chosen(block_size=32) == "bnb"
    assert chosen(block_size=16) == "torch"
    assert chosen(block_size=128) == "torch"  # 576 = 4.5 blocks
    assert chosen(in_features=96) == "torch"
    assert chosen(in_features=131) == "torch"
    assert chosen(in_features=4096, block_size=2048) == "torch"
    assert chosen(kind="int8") == "torch"
    assert chosen(dtype=torch.float64) == "torch"
    assert chosen(device=torch.device("meta")) == "torch"
    packed = quantize(uneven((64, 128)), "nf4")
    expected = dequantize(packed)
    monkeypatch.setattr(bnb_kernels, "is_available", lambda device_type: False)
    assert chosen() == "torch"
    assert torch.equal(dequantize(packed), expected)


def test_dequantising_writes_into_nothing_and_is_right_in_any_mode_and_after_layers_ran():
    """bitsandbytes' own layer repacks its bytes in eval mode on some CPUs; ours must not."""
    packed = quantize(uneven((64, 128)), "nf4")
    before = {name: tensor.clone() for name, tensor in packed.tensors().items()}
    layer = FrozenLinear(packed).eval()
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(0))
    for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad):
        with mode():
            for dtype in DTYPES:
                layer(x.to(dtype))
                layer(x[:1].to(dtype))
                for dense in by_backends(packed, dtype).values():
                    assert torch.equal(dense, definition(packed, dtype))
                    assert not dense.requires_grad
                    dense.add_(1.0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in packed.tensors().items())
    assert all(torch.equal(layer.dequantized(dtype), definition(packed, dtype)) for dtype in DTYPES)


# ------------------------------------------------------------------------------------------------ the container


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
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


def test_faults_are_gathered():
    tensors = quantize(torch.zeros(8, 64), "nf4", 64, double_quant=False).tensors()
    tensors["packed"] = tensors["packed"][:-1]
    tensors["absmx"] = tensors.pop("absmax")
    with pytest.raises(ValueError) as raised:
        from_tensors("nf4", (8, 64), 64, tensors)
    lines = str(raised.value).splitlines()
    for line, words in zip(lines, (("absmx", "'absmax'"), ("packed", "(256,)", "(255,)"), ("absmax",)), strict=True):
        assert all(word in line for word in words), line
    for arguments, message in (
        (("int8", (8, 64), 64, {"nested_absmax": torch.zeros(1)}), "int8"),
        (("mxfp4", (8, 65), 32, {}), r"\(8, 65\)"),
    ):
        with pytest.raises(ValueError, match=message):
            from_tensors(*arguments)


# ------------------------------------------------------------------------------------------------ checkpoints


def bnb_checkpoint(weight: torch.Tensor, kind: str, block_size: int, double_quant: bool) -> dict[str, torch.Tensor]:
    """What bitsandbytes stores for a 4-bit layer."""
    packed, state = bnb_functional.quantize_4bit(
        weight, blocksize=block_size, quant_type=kind, compress_statistics=double_quant
    )
    return {"weight": packed} | {f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}


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


def test_int8_checkpoints():
    weight = uneven((12, 40), torch.float16)[1:]  # bitsandbytes has no defined code for a zero row
    codes, scales, _ = bnb_functional.int8_vectorwise_quant(weight)
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
    "several faults": (
        {"weight.quant_map": torch.linspace(-1, 1, 16), "weight.absmax": None, "weight.nested_quant_map": None},
        ("'weight.absmax'", "'weight.quant_map'", "'weight.nested_quant_map'"),
    ),
    "short": ({"weight": torch.zeros(2300, 1, dtype=torch.uint8)}, (r"'packed' .*\(2300,\)",)),
    "no weight": ({"weight": None}, ("'weight' .*weight.absmax",)),
    "no state": ({STATE: None}, ("got 0",)),
    "no JSON": ({STATE: quant_state("not json")}, ("not JSON",)),
    "no object": ({STATE: quant_state("[1]")}, ("got a list",)),
    "nothing in it": (
        {STATE: quant_state("{}")},
        ("'shape'", "'blocksize'", "'nested_offset'", "256, got None"),
    ),
    "another kind": (
        {STATE: quant_state('{"quant_type": "fp4", "shape": [2], "blocksize": 64, "nested_offset": 0}')},
        ("'fp4'.* 'nf4'", r"\[2\]", "256, got None"),
    ),
    "a kind that is not": ({STATE: None, STATE[:-3] + "af4": quant_state("{}")}, ("nf4, fp4, got 'af4'",)),
    "tiled": (SCB | {"weight_format": torch.tensor(2)}, ("weight_format 0.* got 2",)),
    "flat": (SCB | {"weight": torch.zeros(3)}, (r"\(out, in\), got \(3,\)",)),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_checkpoint_names_the_layer_and_every_fault(case):
    changes, words = BROKEN[case]
    stored = bnb_checkpoint(uneven((48, 96)), "nf4", 64, True) | changes
    with pytest.raises(ValueError) as raised:
        from_bnb_state({name: each for name, each in stored.items() if each is not None}, name="layers.3.up_proj")
    for line, word in zip(str(raised.value).splitlines(), words, strict=True):
        assert re.search(f"^layers.3.up_proj: .*{word}", line), (word, line)


def test_bitsandbytes_has_no_research_formats():
    with pytest.raises(ValueError, match="nf4, fp4, int8, got nf3"):
        to_bnb_state(quantize(torch.randn(4, 64), "nf3"))
