"""Checkpoints that other programs quantised, as bases: weights and logits against the formats' own libraries.

Each writer runs in an environment of its own, named by its Python (`--llmcompressor llmcompressor/bin/python`). See
`checkpoint_writers.py`. Without one its rows are left out, unless FOLDER of `--made FOLDER` has them.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from byte_tokenizer import byte_tokenizer
from measure import OFFLINE
from tiny_families import spread_
from transformers import AutoModelForCausalLM, LlamaConfig

Settings = dict[str, Any]


def llmcompressor(scheme: str = "", **weights: Any) -> tuple[str, Settings]:
    if scheme:
        return "llmcompressor", {"targets": ["Linear"], "scheme": scheme}
    return "llmcompressor", {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}


def gptqmodel(bits: int = 4, group_size: int = 128, *, sym: bool = True, **options: Any) -> tuple[str, Settings]:
    return "gptqmodel", {"bits": bits, "group_size": group_size, "sym": sym} | options


CASES: dict[str, tuple[str, Settings]] = {
    "W4A16": llmcompressor("W4A16"),
    "W4A16_ASYM": llmcompressor("W4A16_ASYM"),
    "W4A16 64": llmcompressor(num_bits=4, symmetric=True, strategy="group", group_size=64),
    "W4A16_ASYM 64": llmcompressor(num_bits=4, symmetric=False, strategy="group", group_size=64),
    "W8A16": llmcompressor("W8A16"),
    "NVFP4A16": llmcompressor("NVFP4A16"),
    "MXFP4A16": llmcompressor("MXFP4A16"),
    "FP8_DYNAMIC": llmcompressor("FP8_DYNAMIC"),
    "FP8_BLOCK": llmcompressor("FP8_BLOCK"),
    "FP8 tensor": llmcompressor(num_bits=8, type="float", symmetric=True, strategy="tensor"),
    "FP8 channel": llmcompressor(num_bits=8, type="float", symmetric=True, strategy="channel"),
    "fp8": ("transformers", {"modules_to_not_convert": ["lm_head"]}),
    **{
        f"GPTQ{version} {bits} bits {'sym' if sym else 'asym'} {group}": gptqmodel(
            bits, group, sym=sym, format=f"gptq{version}"
        )
        for bits, group in ((4, 128), (4, 64), (2, 64), (3, 64), (8, 128))
        for sym in (True, False)
        for version in (("", "_v2") if bits == 4 else ("",))
    },
    "GPTQ desc_act": gptqmodel(desc_act=True),
    "AWQ 128": ("autoround", {"group_size": 128, "sym": False, "format": "auto_awq"}),
    "AWQ 64": ("autoround", {"group_size": 64, "sym": False, "format": "auto_awq"}),
    "AWQ sym 128": ("autoround", {"group_size": 128, "sym": True, "format": "auto_awq"}),
    "auto-round GPTQ": ("autoround", {"group_size": 128, "sym": True, "format": "auto_gptq"}),
}
"""Name -> its writer and the writer's settings."""


def write_source(folder: Path) -> None:
    """A random Llama in bf16, no part without effect; every size can be cut into 64 and 128."""
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    spread_(model)
    model.save_pretrained(folder)
