"""Where the tensors of a GGUF file belong in the model, and how its values become those of the model.

Names come from the tables of the package `gguf`. Layouts come from transformers' own readers (llama.cpp interleaves the
rows of q and k, and adds 1 to Gemma's norms). For Qwen3.5 both come from transformers' conversions, in releases that
have them.

Of experts llama.cpp's converter writes a tensor for each of the gate, up and down projections of a block, (experts,
out, in), or gate and up as one if it is told to. It turns transposed stacks and takes alternating rows apart, so all
families are laid out alike. A stack here holds gate and up together, one expert after the other. DeepSeek's kv_b_proj
is cut in the same way: each head into keys, which are turned, and values.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, WeightTransform, rename_source_key
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

from qdora.errors import UserError
from qdora.model.experts import library_names, stacks
from qdora.model.inject import block_of

Values = np.ndarray[Any, np.dtype[Any]]

# Architectures whose tensors llama.cpp's converter changes like those of another one, which transformers reads.
_LAID_OUT_AS = {"gemma": "gemma2", "lfm2moe": "lfm2"}
_LAID_OUT_AS |= dict.fromkeys(("arcee", "granite", "granitemoe", "mistral3", "olmo", "smollm3"), "llama")
# Architectures whose tensors the converter does not change, except in the ways of `held_rows`.
_UNCHANGED = (
    *("cohere2", "command-r", "deepseek2", "glm4moe", "gpt-oss", "llama4", "olmo2", "olmoe", "phi3", "qwen2", "qwen3"),
    *("seed_oss", "starcoder2"),
)
_CONVERTED = ("qwen35", "qwen35moe")
"""Architectures for which newer releases of transformers have conversions in place of a processor."""


@dataclass(frozen=True)
class TensorLayout:
    """A tensor of the file is `name` in the model; `change` makes the model's values of the file's, in float32."""

    name: str
    change: Callable[[Values], Values]


def knows_layout(architecture: str, tensors: Iterable[str], model: nn.Module) -> bool:
    """Whether `tensor_layouts` and `held_rows` are known to undo every change of llama.cpp's converter.

    Not for experts that are no stacks in `model`, since transformers has no interface for them, and not for the shared
    MLP of Granite's mixtures, whose gate and up projections llama.cpp takes apart.
    """
    if architecture == "granitemoe" and any(name.endswith("shared_mlp") for name, _ in model.named_modules()):
        return False
    read = architecture in _CONVERTED and _library_conversions() is not None
    read = read or architecture in {*TENSOR_PROCESSORS, *_LAID_OUT_AS, *_UNCHANGED}
    return read and (bool(stacks(model)) or not any("_exps." in name for name in tensors))


def tensor_layouts(
    path: Path, architecture: str, tensors: Iterable[str], model: PreTrainedModel
) -> dict[str, TensorLayout]:
    """Name in the file -> its layout. Take the tensors of `held_rows` from there first.

    A tensor without a place in the model has no layout, or one whose `name` the model does not have. Raises UserError
    if the package gguf does not know the architecture. `path` is the file's, for the message.
    """
    conversions = _library_conversions() if architecture in _CONVERTED else None
    if conversions is not None:
        return _converted_layouts(conversions(architecture, model.config), tensors)
    kind = TENSOR_PROCESSORS.get(_LAID_OUT_AS.get(architecture, architecture), TensorProcessor)
    processor = kind(config=model.config.to_dict())
    names = _model_names(path, architecture, model, processor)
    return {name: TensorLayout(names[name], partial(_processed, processor, name)) for name in tensors if name in names}


def _processed(processor: TensorProcessor, name: str, values: Values) -> Values:
    found: Values = processor.process(weights=values, name=name).weights
    return found


def _model_names(path: Path, architecture: str, model: PreTrainedModel, processor: TensorProcessor) -> dict[str, str]:
    """Name in the file -> name in the model, by the tables of the package gguf."""
    import gguf

    known = next((key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture), None)
    if known is None:
        raise UserError(
            f"model.source: {path}: the installed package gguf does not know {architecture!r}. Fix: pip install -U gguf"
        )
    table = gguf.get_tensor_name_map(known, int(model.config.num_hidden_layers))
    renamings = [each for each in get_model_conversion_mapping(model) if isinstance(each, WeightRenaming)]
    back = [each.reverse_transform() for each in reversed(renamings)]
    names: dict[str, str] = {}
    own = library_names(model)
    for name in (each for each in model.state_dict() if each not in own):
        published, _ = rename_source_key(name, back, [])  # the converter reads published checkpoints
        for stem, ending in _stems(processor.preprocess_name(name)) + _stems(published):
            # Some architectures were converted from the model without its head; those names lack the first part.
            found = table.get_name(stem) or table.get_name(stem.removeprefix(f"{model.base_model_prefix}."))
            if found is not None:
                names[f"{found}{ending}"] = name
    return names


def _stems(name: str) -> list[tuple[str, str]]:
    """How a name may be written: one of the package's table, and what the converter puts behind it."""
    stem, _, leaf = name.rpartition(".")
    if leaf in ("weight", "bias"):
        return [(stem, f".{leaf}")]
    # The converter makes a weight or a bias of parameters that are neither (sinks, a correction of router scores).
    return [(name, ""), (name, ".weight"), (name, ".bias"), (name.removesuffix("_bias"), ".bias")]


def _library_conversions() -> Callable[..., list[WeightTransform]] | None:
    """transformers' function (architecture, config) -> conversions; None in releases without it."""
    try:
        found = importlib.import_module("transformers.integrations.gguf")
    except ImportError:
        return None
    return getattr(found, "get_gguf_conversion_mapping", None)


def _converted_layouts(transforms: Sequence[WeightTransform], tensors: Iterable[str]) -> dict[str, TensorLayout]:
    """`tensor_layouts` by transformers' conversions."""
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    found = {}
    for name in tensors:
        place, pattern = rename_source_key(name, renamings, converters)
        converter = None if pattern is None else by_pattern[pattern]
        found[name] = TensorLayout(place, partial(_converted, converter))
    return found


def _converted(converter: WeightConverter | None, values: Values) -> Values:
    tensor = torch.from_numpy(np.require(values, requirements=["C", "W"]))
    if converter is not None:
        sources, targets = converter.source_patterns, converter.target_patterns
        for operation in converter.operations:
            made = operation.convert({sources[0]: tensor}, source_patterns=sources, target_patterns=targets)
            (tensor,) = made.values()
    return tensor.numpy()


@dataclass(frozen=True)
class HeldRows:
    """What a file's tensor of many parts holds of the model's weight or bias `name`: some rows of each part.

    The parts are the experts of a stack or the heads of a layer; each has `part_features` rows in the model. The file's
    tensor is (parts, out, in), (parts, in, out) if `turned`, or of biases (parts, out).
    """

    name: str
    rows: slice
    num_parts: int
    part_features: int
    columns: int | None  # None for a bias
    turned: bool = False

    @property
    def num_rows(self) -> int:
        """Rows of a part in the file's tensor."""
        return len(range(*self.rows.indices(self.part_features)))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the file's tensor."""
        if self.columns is None:
            return (self.num_parts, self.num_rows)
        sizes = (self.columns, self.num_rows) if self.turned else (self.num_rows, self.columns)
        return (self.num_parts, *sizes)


def held_rows(model: nn.Module) -> dict[str, HeldRows]:
    """Name of a tensor of many parts in the file -> its place in the model, for each name that a file may have."""
    found = {}
    ours = library_names(model)
    for path, stack in stacks(model).items():
        owner, _, projection = path.rpartition(".")
        for part, rows in _projections(model.get_submodule(owner), projection, stack.expert_features).items():
            for leaf, columns in (("weight", stack.in_features), ("bias", None)):
                name = f"{path}.{leaf}"
                if name in ours:
                    place = HeldRows(name, rows, stack.num_experts, stack.expert_features, columns)
                    found[f"{_block(path)}.ffn_{part}_exps.{leaf}"] = place
    for path, layer in model.named_modules():
        if not path.endswith(".kv_b_proj"):
            continue
        attention = model.get_submodule(path.rpartition(".")[0])
        nope, value = getattr(attention, "qk_nope_head_dim", None), getattr(attention, "v_head_dim", None)
        if nope is not None and value is not None:
            rest = (layer.out_features // (nope + value), nope + value, layer.in_features)
            found[f"{_block(path)}.attn_k_b.weight"] = HeldRows(f"{path}.weight", slice(0, nope), *rest, turned=True)
            found[f"{_block(path)}.attn_v_b.weight"] = HeldRows(f"{path}.weight", slice(nope, None), *rest)
    return found


def _block(path: str) -> str:
    """What llama.cpp calls the block that a module is in."""
    number = block_of(path)
    assert number is not None, f"{path}: outside of the blocks"
    return f"blk.{number}"


def _projections(owner: Any, projection: str, expert_features: int) -> dict[str, slice]:
    """llama.cpp's projections -> their rows of an expert in a stack."""
    if projection != "gate_up_proj":
        return {projection.removesuffix("_proj"): slice(None)}
    if not getattr(owner, "is_concatenated", True):
        return {"gate": slice(0, None, 2), "up": slice(1, None, 2)}
    half = expert_features // 2
    return {"gate": slice(0, half), "up": slice(half, None), "gate_up": slice(None)}
