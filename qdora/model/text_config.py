"""What a model's config says of its language model; a multimodal model has a config of its own for that part."""

from __future__ import annotations

from typing import Any

from torch import nn


def text_config(config: Any) -> Any:
    """The part of a config that describes the language model: the config itself if it has no such part."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def positions_of(config: Any) -> int | None:
    """The most tokens that the positions of a config's model allow, or None where it sets no limit."""
    length = getattr(text_config(config), "max_position_embeddings", None)
    return int(length) if length and length > 0 else None


def context_length(model: nn.Module) -> int | None:
    """`positions_of` the model's config."""
    return positions_of(getattr(model, "config", None))


def vocabulary_size(model: nn.Module) -> int:
    """Width of the logits; 65,536 where the config does not say."""
    return int(getattr(text_config(getattr(model, "config", None)), "vocab_size", 2**16))


def attention_of(model: nn.Module) -> str | None:
    """transformers' name of the attention implementation, such as sdpa; None without one."""
    name: str | None = getattr(text_config(getattr(model, "config", None)), "_attn_implementation", None)
    return name
