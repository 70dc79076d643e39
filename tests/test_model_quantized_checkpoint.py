"""Checkpoints that bitsandbytes quantised load bit for bit as they are, and nothing that was asked for is ignored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from qdora.errors import UserError
from qdora.model.inject import frozen_layers
from qdora.ops.packed import PackedWeight
from tests.checkpoints import CONFIGS, checkpoint, load, logits, one_file


def dequantised_by_hand(
    packed: torch.Tensor, parts: dict[str, torch.Tensor], block_size: int, offset: float
) -> np.ndarray[Any, Any]:
    """Not bitsandbytes' own function: on a CPU it is wrong where a block crosses a row (96 columns, blocks of 64)."""
    codes = np.stack([packed.numpy() >> 4, packed.numpy() & 15], axis=-1).reshape(-1)
    scales = parts["absmax"].numpy()
    if "nested_absmax" in parts:
        outer = parts["nested_absmax"].numpy().repeat(256)[: len(scales)]
        scales = parts["nested_quant_map"].numpy()[scales] * outer + np.float32(offset)
    return parts["quant_map"].numpy()[codes] * scales.repeat(block_size)[: len(codes)]


def quantised_checkpoint(directory: Path, *, kind: str, nested: bool = True, block_size: int = 64) -> PreTrainedModel:
    """A checkpoint as bitsandbytes writes it, and a dense reference with the weights that it means."""
    functional = pytest.importorskip("bitsandbytes").functional
    file, tensors = one_file(directory)
    # From another directory: transformers' tensors are views of the file, which is rewritten below.
    reference = AutoModelForCausalLM.from_pretrained(
        checkpoint(directory.with_name("dense"), CONFIGS["llama"]), dtype=torch.float32
    )
    for name in [n for n in tensors if n.endswith("_proj.weight")]:
        weight = tensors.pop(name)
        module = reference.get_submodule(name.removesuffix(".weight"))
        if kind == "int8":
            packed, row_absmax, _ = functional.int8_vectorwise_quant(weight.half())
            tensors |= {name: packed, name.replace(".weight", ".SCB"): row_absmax}
            tensors[name.replace(".weight", ".weight_format")] = torch.tensor(0, dtype=torch.uint8)
            module.weight.data = packed.float() * row_absmax[:, None] / 127
        else:
            packed, state = functional.quantize_4bit(
                weight, blocksize=block_size, compress_statistics=nested, quant_type=kind
            )
            parts = state.as_dict(packed=True)
            tensors[name] = packed
            tensors |= {f"{name}.{part}": value for part, value in parts.items()}
            dense = dequantised_by_hand(packed, parts, block_size, float(state.offset) if nested else 0.0)
            module.weight.data = torch.from_numpy(dense).reshape(weight.shape)
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, file)
    settings = {"quant_method": "bitsandbytes", "load_in_8bit": kind == "int8", "load_in_4bit": kind != "int8"}
    settings |= {"bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": nested}
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    return reference


@pytest.mark.parametrize(
    ("kind", "nested", "block_size"), [("nf4", True, 64), ("nf4", False, 128), ("fp4", True, 64), ("int8", False, 64)]
)
def test_bitsandbytes_checkpoint_loads_as_it_is(tmp_path: Path, kind: str, nested: bool, block_size: int) -> None:
    directory = tmp_path / "m"
    reference = quantised_checkpoint(directory, kind=kind, nested=nested, block_size=block_size)
    model = load(directory, quant=kind, block_size=block_size, double_quant=nested)
    stored = load_file(directory / "model.safetensors")
    layers = frozen_layers(model)
    assert len(layers) == 14
    for name, layer in layers.items():
        packed = layer.packed_weight
        assert isinstance(packed, PackedWeight)
        assert torch.equal(packed.packed, stored[f"{name}.weight"].reshape(packed.packed.shape))
    torch.testing.assert_close(logits(model), logits(reference), rtol=1e-5, atol=1e-5)
    assert not hasattr(model.config, "quantization_config")


def test_bitsandbytes_checkpoint_that_transformers_saved(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    checkpoint(tmp_path / "dense", CONFIGS["llama"])
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    saved = AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", quantization_config=settings, dtype=torch.float32, device_map="cpu"
    )
    saved.save_pretrained(tmp_path / "nf4")
    model = load(tmp_path / "nf4", quant="nf4")
    layers = frozen_layers(model)
    assert len(layers) == 14
    for name, layer in layers.items():
        theirs = saved.get_submodule(name).weight
        state = theirs.quant_state
        parts = state.as_dict(packed=True)
        expected = dequantised_by_hand(theirs.data, parts, state.blocksize, float(state.offset)).reshape(state.shape)
        torch.testing.assert_close(layer.dequantized(), torch.from_numpy(expected), rtol=1e-6, atol=1e-7)


def test_conflicts_with_a_quantised_checkpoint_are_errors(tmp_path: Path) -> None:
    directory = tmp_path / "m"
    quantised_checkpoint(directory, kind="nf4", nested=True, block_size=64)
    with pytest.raises(UserError, match=r"base\.quant: 'none', but the checkpoint is already quantised in nf4"):
        load(directory, quant="none")
    with pytest.raises(UserError) as caught:
        load(directory, quant="nf4", block_size=128, double_quant=False, skip=["lm_head", "q_proj"])
    assert [fault.split(":")[0] for fault in caught.value.faults] == [
        "base.block_size",
        "base.double_quant",
        "base.skip",
        "base.skip",
    ]


def test_other_quantisations_are_refused(tmp_path: Path) -> None:
    checkpoint(tmp_path, CONFIGS["llama"])
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(UserError, match=r"must be quantised by bitsandbytes or in mxfp4, if at all \(got 'gptq'\)"):
        load(tmp_path)
