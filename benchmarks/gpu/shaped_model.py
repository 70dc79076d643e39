"""A model with the shape of a real one and random weights, filled layer by layer on the device.

Only time and memory of it mean anything.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate import init_empty_weights
from contenders import TARGETS, linear4bit
from random_weights import RandomWeights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from qdora.model.inject import replace_module
from qdora.nn.frozen_linear import FrozenLinear
from qdora.ops.packed import PackedWeight


class Weights:
    """The weights of a model by their paths, made when they are asked for and then kept, to be shared by models."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._random = RandomWeights(device)
        self._packed: dict[str, PackedWeight] = {}
        self._dense: dict[str, Tensor] = {}

    def packed(self, path: str, shape: tuple[int, int]) -> PackedWeight:
        """NF4 with double quantisation, (out, in)."""
        if path not in self._packed:
            self._packed[path] = self._random.packed(shape, len(self._packed))
        return self._packed[path]

    def dense(self, path: str, shape: tuple[int, ...]) -> Tensor:
        """bf16: an embedding, a head or a norm."""
        if path not in self._dense:
            self._dense[path] = self._random.dense(shape)
        return self._dense[path]


def build(settings: dict[str, Any], weights: Weights, engine: str) -> Any:
    """A frozen causal LM on the device: FrozenLinear ("own") or bitsandbytes' Linear4bit ("peft") on one set of bytes.

    Args:
        settings: Of a LlamaConfig.
    """
    config = LlamaConfig(**settings, tie_word_embeddings=False, use_cache=False)
    with init_empty_weights(include_buffers=False):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    model.model.embed_tokens.weight = _frozen(weights.dense("embedding", model.model.embed_tokens.weight.shape))
    model.lm_head.weight = _frozen(weights.dense("head", model.lm_head.weight.shape))
    model.model.norm.weight = _frozen(weights.dense("norm", model.model.norm.weight.shape))
    for index, layer in enumerate(model.model.layers):
        _fill(layer, f"layers.{index}", weights, engine)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(weights.device)
    return model.requires_grad_(False)


def linear_shapes(settings: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Path inside a decoder layer -> (out, in) of its linear layers."""
    with init_empty_weights():
        model: Any = AutoModelForCausalLM.from_config(LlamaConfig(**settings | {"num_hidden_layers": 1}))
    modules = model.model.layers[0].named_modules()
    return {name: tuple(each.weight.shape) for name, each in modules if isinstance(each, nn.Linear)}


def _fill(layer: Any, path: str, weights: Weights, engine: str) -> None:
    linear = {name: each for name, each in layer.named_modules() if isinstance(each, nn.Linear)}
    assert {name.rpartition(".")[2] for name in linear} == set(TARGETS), sorted(linear)
    for name, module in linear.items():
        packed = weights.packed(f"{path}.{name}", (module.out_features, module.in_features))
        new = FrozenLinear(packed) if engine == "own" else linear4bit(packed, torch.bfloat16, copy=False)
        replace_module(layer, name, new)
    for name, parameter in list(layer.named_parameters()):
        if name.endswith("norm.weight"):
            module = layer.get_submodule(name.rpartition(".")[0])
            module.weight = _frozen(weights.dense(f"{path}.{name}", parameter.shape))


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
