"""Tiny random models of many families, with a byte tokenizer: what a family's code does, without a download."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from byte_tokenizer import byte_tokenizer, write_sums
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tests import support

Settings = dict[str, Any]
FILE = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())
FAMILIES: dict[str, tuple[str, Settings]] = {name: tuple(each) for name, each in FILE["families"].items()}
"""Name -> model type of transformers, and what its config gets beside tokens and vocabulary."""
MIXTURES: dict[str, str] = FILE["mixtures"]
"""Name -> model type, of mixtures of experts; tests/support.py has their configs."""
MXFP4 = "GPT-OSS (MXFP4)"
"""A family whose checkpoint holds its experts in 4 bits, as the published ones do."""
MODEL_TYPES = {name: kind for name, (kind, _) in FAMILIES.items()} | MIXTURES

NUM_SUMS = 20


def write_family(name: str, directory: Path) -> None:
    """The model of a family in safetensors with its tokenizer; no part is without effect."""
    tokenizer = byte_tokenizer()
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "vocab_size": len(tokenizer)}
    if name == MXFP4:
        support.write_mxfp4(directory, **tokens)
        tokenizer.save_pretrained(directory)
        return
    kind = MODEL_TYPES[name]
    if name in MIXTURES:
        settings = support.EXPERT_SIZES | support.MIXTURES[kind] | tokens
    else:
        settings = tokens | FAMILIES[name][1]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings), dtype=torch.float32)
    spread_(model)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


@torch.no_grad()
def spread_(model: nn.Module) -> None:
    """Weights N(0, 1 / in), which make attention and activations far from linear; everything else off its start."""
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.normal_(std=parameter.shape[1] ** -0.5)
        else:
            parameter.add_(0.1 * torch.randn_like(parameter))
    for name, buffer in model.named_buffers():
        if name.endswith("correction_bias"):  # of DeepSeek's routers
            buffer.add_(0.1 * torch.randn_like(buffer))


def write_random_sums(file: Path, seed: int) -> None:
    draw = random.Random(seed)
    write_sums(file, [(draw.randrange(10), draw.randrange(10 ** (1 + index % 7))) for index in range(NUM_SUMS)])
