"""Saved random models, and loading them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma3TextConfig, LlamaConfig, PreTrainedModel, Qwen2Config

from qdora.model.load import load_model
from qdora.model.source import resolve

SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
CONFIGS = {
    "llama": LlamaConfig(**SMALL, tie_word_embeddings=False),
    "llama-tied-biased": LlamaConfig(**SMALL, tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    "qwen2": Qwen2Config(**SMALL, tie_word_embeddings=True),
    "gemma2": Gemma2Config(**SMALL, query_pre_attn_scalar=16, attn_logit_softcapping=2.0, final_logit_softcapping=3.0),
    "gemma3": Gemma3TextConfig(**SMALL, query_pre_attn_scalar=16, sliding_window=8),
}
TOKENS = torch.randint(0, 97, (2, 12), generator=torch.Generator().manual_seed(7))


def checkpoint(directory: Path, config: Any, *, dtype: torch.dtype = torch.float32, shard: str = "40KB") -> Path:
    """A saved random model, its biases and norms moved off their start, in several shards."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(directory, max_shard_size=shard)
    return directory


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def load(directory: Path, **settings: Any) -> PreTrainedModel:
    return load_model(resolve(str(directory)), **{"quant": "none", "compute_dtype": torch.float32, **settings})


def one_file(directory: Path, config: Any = None) -> tuple[Path, dict[str, torch.Tensor]]:
    checkpoint(directory, config or CONFIGS["llama"], shard="1GB")
    return directory / "model.safetensors", load_file(directory / "model.safetensors")
