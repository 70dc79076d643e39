"""The packed weight: dequantising with every backend, moving, taking apart, and bitsandbytes' checkpoint layout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from bitsandbytes import functional as bnb_functional
from torch._subclasses.fake_tensor import FakeTensorMode

import qdora
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
from tests.test_ops_quantize import DTYPES, FOUR_BITS, by_backends, uneven

CPU = torch.device("cpu")
needs_bnb = pytest.mark.skipif(not bnb_kernels.is_available("cpu"), reason="bitsandbytes has no CPU library here")


def definition(packed: PackedWeight, dtype: torch.dtype) -> torch.Tensor:
    """value[code] * scale, one weight at a time in index order; scales from bitsandbytes' float32 code."""
    values = bnb_functional.get_4bit_type(packed.kind, device="cpu")
    codes = torch.stack([packed.packed >> 4, packed.packed & 15], dim=1).reshape(-1).long()
    numel = packed.shape[0] * packed.shape[1]
    scales = packed.absmax
    if packed.nested is not None:
        scales = bnb_functional.dequantize_blockwise(
            packed.absmax, absmax=packed.nested.absmax, code=packed.nested.code, blocksize=256
        )
        scales = scales + packed.nested.offset
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
def test_auto_takes_the_kernel_only_where_rows_are_whole_blocks():
    def chosen(kind="nf4", block_size=64, in_features=576, dtype=torch.bfloat16, device=CPU):
        return choose_backend(kind, device, block_size=block_size, in_features=in_features, dtype=dtype)

    assert chosen() == "bnb"
    assert chosen(kind="fp4", in_features=4096, block_size=1024, dtype=torch.float32) == "bnb"
    assert chosen(block_size=128) == "torch"  # 576 = 4.5 blocks
    assert chosen(in_features=96) == "torch"
    assert chosen(in_features=131) == "torch"
    assert chosen(in_features=4096, block_size=2048) == "torch"
    assert chosen(kind="int8") == "torch"
    assert chosen(dtype=torch.float64) == "torch"
    assert chosen(device=torch.device("meta")) == "torch"


def test_without_bitsandbytes_plain_torch_is_chosen(monkeypatch):
    packed = quantize(uneven((64, 128)), "nf4")
    expected = dequantize(packed)
    monkeypatch.setattr(bnb_kernels, "is_available", lambda device_type: False)
    assert choose_backend("nf4", CPU, block_size=64, in_features=128, dtype=torch.float32) == "torch"
    assert torch.equal(dequantize(packed), expected)


def test_the_result_is_new_memory_and_the_packed_bytes_stay():
    packed = quantize(uneven((64, 128)), "nf4", double_quant=False)
    before = {name: tensor.clone() for name, tensor in packed.tensors().items()}
    for _ in range(3):
        for dense in by_backends(packed, torch.float32).values():
            dense.add_(1.0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in packed.tensors().items())


def test_dequantising_still_right_after_frozen_layers_ran_in_eval_mode():
    """bitsandbytes' own layer repacks its bytes there on some CPUs; ours must not."""
    from qdora.nn.frozen_linear import FrozenLinear

    packed = quantize(uneven((64, 128)), "nf4")
    expected = {dtype: definition(packed, dtype) for dtype in DTYPES}
    layer = FrozenLinear(packed).eval()
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        for dtype in DTYPES:
            layer(x.to(dtype))
            layer(x[:1].to(dtype))
    for dtype in DTYPES:
        assert torch.equal(layer.dequantized(dtype), expected[dtype])


def test_no_file_of_qdora_uses_the_layers_of_bitsandbytes():
    """But `qdora.peft`, which is a layer of PEFT around one."""
    files = [file for file in Path(qdora.__file__).parent.rglob("*.py") if file.name != "peft.py"]
    assert len(files) > 20
    forbidden = ("bitsandbytes.nn", "bnb.nn", "from bitsandbytes import nn", "import Linear4bit", "Linear4bit(")
    found = [f"{file}: {word}" for file in files for word in forbidden if word in file.read_text(encoding="utf-8")]
    assert found == []


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_works_in_any_autograd_mode(mode):
    packed = quantize(uneven((8, 64)), "nf4")
    expected = definition(packed, torch.float32)
    with mode():
        for dense in by_backends(packed, torch.float32).values():
            assert torch.equal(dense, expected)
            assert not dense.requires_grad
    assert torch.equal(by_backends(packed, torch.float32)["torch"], expected)


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_meta_and_fake_tensors_have_the_right_shape_and_leave_no_trace(kind):
    meta = dequantize(empty_packed(kind, (33, 65), device="meta"), torch.bfloat16)
    assert (meta.shape, meta.dtype, meta.device.type) == ((33, 65), torch.bfloat16, "meta")
    with FakeTensorMode():
        for shape in ((33, 65), (4, 128)):
            fake = dequantize(empty_packed(kind, shape), torch.float16)
            assert (fake.shape, fake.dtype) == (shape, torch.float16)
    weight = uneven((4, 65))
    assert torch.equal(dequantize(quantize(weight, kind)), dequantize(quantize(weight, kind)))


# ------------------------------------------------------------------------------------------------ the container


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("double_quant", [False, True])
def test_taken_apart_and_put_together(kind, double_quant):
    packed = quantize(uneven((33, 65)), kind, 128, double_quant)
    again = from_tensors(kind, packed.shape, packed.block_size, packed.tensors())
    assert again.tensors().keys() == packed.tensors().keys()
    assert all(again.tensors()[name] is tensor for name, tensor in packed.tensors().items())
    assert (again.kind, again.shape, again.block_size) == (packed.kind, packed.shape, packed.block_size)
    assert packed.to("cpu") is packed
    moved = packed.to("meta")
    assert moved.device.type == "meta"
    assert moved.num_bytes == packed.num_bytes


def test_sizes():
    plain = quantize(torch.zeros(64, 1024), "nf4", 64, double_quant=False)
    assert plain.num_bytes == 64 * 1024 // 2 + 4 * 1024
    nested = quantize(torch.zeros(64, 1024), "nf4", 64)
    assert nested.num_bytes == 64 * 1024 // 2 + 1024 + 4 * 4 + 1024 + 4
    assert quantize(torch.zeros(64, 1024), "int8").num_bytes == 64 * 1024 + 4 * 64


def test_faults_are_gathered():
    tensors = quantize(torch.zeros(8, 64), "nf4", 64, double_quant=False).tensors()
    tensors["packed"] = tensors["packed"][:-1]
    tensors["absmx"] = tensors.pop("absmax")
    with pytest.raises(ValueError) as raised:
        from_tensors("nf4", (8, 64), 64, tensors)
    unknown, packed, missing = str(raised.value).splitlines()
    assert unknown == "unknown tensor 'absmx'. Did you mean 'absmax'?"
    assert packed == "'packed' of (8, 64) in nf4 must be (256,) torch.uint8, got (255,) torch.uint8."
    assert missing == "tensor 'absmax' is missing."


# ------------------------------------------------------------------------------------------------ checkpoints


def bnb_checkpoint(weight: torch.Tensor, kind: str, block_size: int, double_quant: bool) -> dict[str, torch.Tensor]:
    """What bitsandbytes stores for a 4-bit layer."""
    packed, state = bnb_functional.quantize_4bit(
        weight, blocksize=block_size, quant_type=kind, compress_statistics=double_quant
    )
    return {"weight": packed} | {f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("kind", FOUR_BITS)
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_a_checkpoint_of_bitsandbytes_is_read(kind, double_quant, storage):
    weight = uneven((48, 96), torch.bfloat16)
    stored = bnb_checkpoint(weight, kind, 128, double_quant)
    stored["weight"] = stored["weight"].view(-1).view(storage).view(-1, 1)
    packed = from_bnb_state(stored | {"bias": torch.zeros(48)})
    expected = quantize(weight, kind, 128, double_quant)
    assert packed.tensors().keys() == expected.tensors().keys()
    assert all(torch.equal(packed.tensors()[name], tensor) for name, tensor in expected.tensors().items())
    assert (packed.kind, packed.shape, packed.block_size) == (kind, (48, 96), 128)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("kind", FOUR_BITS)
def test_bitsandbytes_reads_what_is_written(kind, double_quant):
    packed = quantize(uneven((48, 96)), kind, 64, double_quant)
    written = to_bnb_state(packed, torch.float16)
    by_bnb = bnb_checkpoint(uneven((48, 96)).half(), kind, 64, double_quant)
    assert {n: (t.shape, t.dtype) for n, t in written.items() if "quant_state" not in n} == {
        n: (t.shape, t.dtype) for n, t in by_bnb.items() if "quant_state" not in n
    }
    key = f"weight.quant_state.bitsandbytes__{kind}"
    ours, theirs = (json.loads(bytes(state[key].tolist())) for state in (written, by_bnb))
    assert ours.keys() == theirs.keys()

    parts = {name.removeprefix("weight."): tensor for name, tensor in written.items() if name != "weight"}
    state = bnb_functional.QuantState.from_dict(parts, device=CPU)
    assert (state.blocksize, state.quant_type, tuple(state.shape), state.dtype) == (64, kind, (48, 96), torch.float16)
    expected = definition(packed, torch.float32)
    scales = block_scales(packed)
    assert torch.equal(definition(from_bnb_state(to_bnb_state(packed)), torch.float32), expected)
    nested = bnb_functional.dequantize_blockwise(state.absmax, state.state2) + state.offset if double_quant else None
    assert torch.equal(scales, state.absmax if nested is None else nested)


def test_int8_checkpoints():
    weight = uneven((12, 40), torch.float16)[1:]  # bitsandbytes has no defined code for a zero row
    codes, scales, _ = bnb_functional.int8_vectorwise_quant(weight)
    stored = {"weight": codes, "SCB": scales, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    packed = from_bnb_state(stored)
    assert torch.equal(dequantize(packed), bnb_functional.int8_vectorwise_dequant(codes, scales))
    written = to_bnb_state(packed)
    assert all(torch.equal(written[name], tensor) for name, tensor in stored.items())
    with pytest.raises(ValueError, match=r"must be stored by rows \(weight_format 0\), got 2, which is tiled"):
        from_bnb_state(stored | {"weight_format": torch.tensor(2, dtype=torch.uint8)})


def test_a_broken_checkpoint_names_the_layer_and_every_fault():
    stored = bnb_checkpoint(uneven((48, 96)), "nf4", 64, True)
    stored["weight.quant_map"] = torch.linspace(-1, 1, 16)
    del stored["weight.absmax"], stored["weight.nested_quant_map"]
    with pytest.raises(ValueError) as raised:
        from_bnb_state(stored, name="layers.3.up_proj")
    assert str(raised.value).splitlines() == [
        "layers.3.up_proj: 'weight.absmax' is missing.",
        "layers.3.up_proj: 'weight.quant_map' is not the code book of nf4.",
        "layers.3.up_proj: 'weight.nested_quant_map' is missing.",
    ]
    stored = bnb_checkpoint(uneven((48, 96)), "nf4", 64, True)
    stored["weight"] = stored["weight"][:-4]
    with pytest.raises(ValueError, match=r"layers\.3\.up_proj: 'packed' of .* got \(2300,\)"):
        from_bnb_state(stored, name="layers.3.up_proj")
    with pytest.raises(ValueError, match=r"the tensor 'weight' is missing; there are \['bias'\]"):
        from_bnb_state({"bias": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"needs one tensor .* got 0"):
        from_bnb_state({"weight": torch.zeros(3)})
    stored["weight.quant_state.bitsandbytes__nf4"] = torch.tensor(list(b"not json"), dtype=torch.uint8)
    with pytest.raises(ValueError, match="is not JSON"):
        from_bnb_state(stored)
