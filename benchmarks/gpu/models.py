"""Models with the shape of real ones and random weights, made on the device; only their time and memory mean anything.

One weight of each shape is random, the others are copies of it, so a model of any size takes seconds to make.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from accelerate import init_empty_weights
from contenders import TARGETS, linear4bit
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from qdora.adapter.layer import FrozenLinear
from qdora.model.checkpoint import Stored, StoredPacked, StoredTensor
from qdora.model.inject import replace_module
from qdora.model.load import Quantization, layers_to_quantize
from qdora.quant.packed import PackedWeight, from_tensors, quantize

QUANTIZATION = Quantization("nf4", 64, True, ("lm_head",))
_NUM_ROWS = 512  # of a table that differ: a billion normal numbers take a CPU a minute


class Weights:
    """The weights of a model by their paths, made when they are asked for and then kept, to be shared by models."""

    def __init__(self, device: torch.device) -> None:
        self.device, self._generator = device, torch.Generator(device).manual_seed(0)
        self._first: dict[tuple[int, int], PackedWeight] = {}
        self._made: dict[str, Any] = {}

    def packed(self, path: str, shape: tuple[int, int]) -> PackedWeight:
        """`QUANTIZATION`'s form of a weight (out, in), its codes rolled: no two blocks compute the same."""
        if path not in self._made:
            self._made[path] = self.new_packed(shape, len(self._made))
        return self._made[path]

    def dense(self, path: str, shape: tuple[int, ...]) -> Tensor:
        """bf16: an embedding, a head or a norm."""
        if path not in self._made:
            self._made[path] = self.new_dense(shape)
        return self._made[path]

    def new_packed(self, shape: tuple[int, int], number: int) -> PackedWeight:
        """One that is not kept, rolled by `number`."""
        first = self._first.get(shape)
        if first is None:
            first = self._first[shape] = quantize(self._normal(shape), "nf4", 64, double_quant=True)
            return first
        tensors = {name: tensor.clone() for name, tensor in first.tensors().items() if name != "packed"}
        return from_tensors("nf4", shape, 64, tensors | {"packed": first.packed.roll(number)})

    def new_dense(self, shape: tuple[int, ...]) -> Tensor:
        """The ones of a norm, or N(0, 0.02^2)."""
        if len(shape) == 1:
            return torch.ones(shape, device=self.device, dtype=torch.bfloat16)
        rows = self._normal((_NUM_ROWS, *shape[1:]))
        return rows[torch.arange(shape[0], device=self.device) % _NUM_ROWS]

    def _normal(self, shape: tuple[int, ...]) -> Tensor:
        made = torch.empty(shape, device=self.device, dtype=torch.bfloat16)
        return made.normal_(0.0, 0.02, generator=self._generator)


def random_checkpoint(model: Any, device: torch.device) -> dict[str, Stored]:
    """Name -> tensor of a quantised checkpoint of the model, each made when it is read."""
    weights, layers = Weights(device), layers_to_quantize(model, QUANTIZATION)
    stored: dict[str, Stored] = {}
    for number, (name, parameter) in enumerate(model.named_parameters()):
        shape = tuple(parameter.shape)
        if name.removesuffix(".weight") in layers:
            stored[name] = StoredPacked(name, shape, "nf4", 64, True, partial(weights.new_packed, shape, number))
        else:
            stored[name] = StoredTensor(name, shape, partial(weights.new_dense, shape))
    return stored


def build(settings: dict[str, Any], weights: Any, engine: str) -> Any:
    """A frozen Llama with FrozenLinear ("own") or bitsandbytes' Linear4bit ("peft") on one set of bytes, of `Weights`
    or what takes its place."""
    config = LlamaConfig(**settings, tie_word_embeddings=False, use_cache=False)
    with init_empty_weights(include_buffers=False):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and path != "lm_head":
            packed = weights.packed(path, (module.out_features, module.in_features))
            new = FrozenLinear(packed) if engine == "own" else linear4bit(packed, torch.bfloat16, copy=False)
            replace_module(model, path, new)
        elif getattr(module, "weight", None) is not None:
            module.weight = nn.Parameter(weights.dense(path, module.weight.shape), requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(weights.device)
    return model.requires_grad_(False)


def linear_shapes(settings: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Path inside a decoder layer -> (out, in) of its linear layers."""
    with init_empty_weights():
        model: Any = AutoModelForCausalLM.from_config(LlamaConfig(**settings | {"num_hidden_layers": 1}))
    modules = model.model.layers[0].named_modules()
    shapes = {name: tuple(each.weight.shape) for name, each in modules if isinstance(each, nn.Linear)}
    assert {name.rpartition(".")[2] for name in shapes} == set(TARGETS), sorted(shapes)
    return shapes
