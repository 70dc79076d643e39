"""Tiny causal LMs of three architectures with adapters that are off their start, and what they should merge to."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, Qwen2Config

from qdora.model.inject import inject, replace_module
from qdora.nn.adapted_linear import AdaptedLinear
from qdora.nn.frozen_linear import FrozenLinear
from qdora.ops.packed import quantize
from tests import reference

SIZES: dict[str, Any] = {
    "vocab_size": 336,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
# Llama ties the head here, Qwen2 has biased q, k, v and a head of its own, Gemma2 has other norms and ties.
CONFIGS: dict[str, Any] = {
    "llama": lambda: LlamaConfig(**SIZES, tie_word_embeddings=True),
    "qwen2": lambda: Qwen2Config(**SIZES, tie_word_embeddings=False),
    "gemma2": lambda: Gemma2Config(**SIZES, head_dim=8),
}
IDS = torch.tensor([[1, 17, 300, 5, 44, 260, 9, 120, 3, 3, 77]])


def base(architecture: str = "llama", *, quant: str | None = None, dtype: torch.dtype = torch.float32) -> Any:
    """A random model, eval mode; its linear layers but the head quantised in blocks of 64 if `quant` is given."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[architecture](), dtype=torch.float32, attn_implementation="eager")
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:  # biases and norms start at 0 and 1
            parameter.data += 0.1 * torch.randn_like(parameter)
        if name.endswith("proj.weight"):
            parameter.data *= 5
    if quant:
        linear = {n: m for n, m in model.named_modules() if type(m) is nn.Linear and n != "lm_head"}
        for name, module in linear.items():
            bias = None if module.bias is None else module.bias.data.to(dtype)
            replace_module(model, name, FrozenLinear(quantize(module.weight.data, quant, 64), bias))
    for (
        parameter
    ) in model.parameters():  # not model.to(): the rotary frequencies stay float32, as from_pretrained has it
        parameter.data = parameter.data.to(dtype)
    return model.eval()


def adapted(
    architecture: str = "llama", *, quant: str | None = None, dtype: torch.dtype = torch.float32, **options: Any
) -> Any:
    """`base` with adapters (DoRA of rank 3 unless `options` say otherwise) in bf16, as runs have them; all moved."""
    model = base(architecture, quant=quant, dtype=dtype)
    settings = {"rank": 3, "alpha": 6.0, "generator": torch.Generator().manual_seed(1)} | options
    layers = inject(model, dtype=torch.bfloat16, **settings)
    move(layers)
    return model


def move(layers: dict[str, AdaptedLinear]) -> None:
    """B random, magnitudes off by up to 10 %."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for layer in layers.values():
            layer.lora_B.copy_(torch.randn(layer.lora_B.shape, generator=generator) * 0.2)
            if layer.magnitude is not None:
                layer.magnitude *= 0.9 + 0.2 * torch.rand(layer.magnitude.shape, generator=generator)


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    """(positions, vocabulary)."""
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=ids, use_cache=False).logits[0]
    return result


def expected_weight(layer: AdaptedLinear) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The merged weight by plain float64 loops."""
    magnitude = None if layer.magnitude is None else layer.magnitude.detach().double().numpy()
    return reference.merged_weight(
        layer.base.dequantized(torch.float32).double().numpy(),
        layer.lora_A.detach().double().numpy(),
        layer.lora_B.detach().double().numpy(),
        layer.alpha / layer.rank,
        magnitude,
    )
