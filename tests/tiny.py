"""Small layers and models for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from qdora.model.source import ModelSource
from qdora.nn.adapted_linear import AdaptedLinear
from qdora.nn.frozen_linear import FrozenLinear
from qdora.ops.packed import quantize


def adapted_linear(
    *,
    out: int = 24,
    in_: int = 40,
    rank: int = 3,
    bias: bool = False,
    kind: Any = "dora",
    dtype: torch.dtype = torch.float64,
    quant: str | None = None,
    seed: int = 0,
    **options: Any,
) -> AdaptedLinear:
    """A layer on a random base (std 0.1); dense in `dtype`, or quantised with block size 64."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, in_, generator=generator, dtype=torch.float64) * 0.1
    b = (torch.randn(out, generator=generator, dtype=torch.float64) * 0.1).to(dtype) if bias else None
    stored = quantize(weight.float(), quant, 64, double_quant=False) if quant else weight.to(dtype)
    layer = AdaptedLinear(FrozenLinear(stored, b), kind=kind, rank=rank, dtype=dtype, generator=generator, **options)
    if dtype == torch.float64 and layer.magnitude is not None:
        layer.magnitude.data = layer.magnitude.data.double()
    return layer


def move_all_parameters_(module: nn.Module, *, seed: int = 0, scale: float = 0.1) -> None:
    """Move every trainable parameter off its start: at the start wrong formulas agree, too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * scale
                parameter.add_(noise.to(parameter.dtype).to(parameter.device))


def source() -> ModelSource:
    """A source for a model whose config is known."""
    return ModelSource("directory", Path("config"), "config")


def llama(**overrides: Any) -> nn.Module:
    """A random Llama-type causal LM of a few thousand parameters, float32, eval mode."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings: dict[str, Any] = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
    }
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**(settings | overrides))).eval()
