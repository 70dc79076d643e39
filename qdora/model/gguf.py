"""Reading GGUF files: the header, and tensors one at a time, dequantised to float32 in transformers' layout.

Names come from the tables of `gguf`, layouts from transformers' readers (llama.cpp interleaves the rows of q and k, and
adds 1 to Gemma's norms). Of experts the file has a tensor for each of gate, up and down, (experts, out, in), or gate
and up as one. A stack here holds gate and up together, one expert after the other.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, MixtralConfig, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key
from transformers.modeling_gguf_pytorch_utils import (
    GGUF_SUPPORTED_ARCHITECTURES,
    TENSOR_PROCESSORS,
    TensorProcessor,
)

from qdora.errors import UserError, named
from qdora.files.atomic import atomic_directory, disk_reason, in_turn
from qdora.files.machine import cache_folder, package_versions
from qdora.model.checkpoint import StoredTensor
from qdora.model.experts import library_names, stacks
from qdora.model.inject import block_of

log = logging.getLogger("qdora")
Values = np.ndarray[Any, np.dtype[Any]]

_HEAD, _EMBEDDING = "output.weight", "token_embd.weight"
# Computed by the converter from the config; transformers does not take them from a GGUF file.
_ROTARY_FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
LAYOUTS: dict[str, str | None] = {name: name for name in TENSOR_PROCESSORS} | {
    "gemma": "gemma2",
    "lfm2moe": "lfm2",
}
LAYOUTS |= dict.fromkeys(("arcee", "granite", "mistral3", "olmo", "smollm3"), "llama")
LAYOUTS |= dict.fromkeys(("cohere2", "command-r", "glm4moe", "olmo2", "olmoe"))
LAYOUTS |= dict.fromkeys(("phi3", "qwen2", "qwen3", "seed_oss", "stablelm", "starcoder2"))
"""Architecture -> the one whose tensors the converter changes alike, for transformers; None: unchanged."""
# The 27B models of Gemma 2 and 3 scale their attention by another width than the head's, which llama.cpp knows from the
# number of layers.
_SCALE_NOT_STORED = {("gemma2", 46), ("gemma3", 62)}
_ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class GgufHeader:
    """`settings`: scalars and strings of the metadata; `tensors`: of the package `gguf`, whose shapes are reversed.

    `end` is the byte where the values start.
    """

    path: Path
    settings: Mapping[str, Any]
    tensors: Sequence[Any]
    end: int

    @property
    def architecture(self) -> str:
        return str(self.settings.get("general.architecture"))

    def rows(self, tensor: Any) -> Values:
        """The stored bytes or numbers as a matrix, mapped anew, so that the pages are given back."""
        data = tensor.data
        flat = np.memmap(self.path, data.dtype, "r", tensor.data_offset, data.shape)
        # asarray: slicing a memmap costs more than dequantising a small slice.
        return np.asarray(flat).reshape(-1, data.shape[-1])

    def values(self, tensor: Any) -> Values:
        """Float32 in torch's shape, dequantised some rows at a time, since `gguf` would hold them twice."""
        import gguf

        stored = self.rows(tensor)
        values = np.empty((len(stored), tensor.shape[0]), dtype=np.float32)
        for start in range(0, len(stored), _ROWS_AT_ONCE):
            part = slice(start, start + _ROWS_AT_ONCE)
            values[part] = gguf.dequantize(stored[part], tensor.tensor_type)
        return values.reshape(shape_of(tensor))


def shape_of(tensor: Any) -> tuple[int, ...]:
    """In torch's order."""
    return tuple(map(int, reversed(tensor.shape)))


def read_header(path: Path) -> GgufHeader:
    require_gguf()
    import gguf

    class Reader(gguf.GGUFReader):  # type: ignore[misc]
        def _get_field_parts(self, start: int, kind: int) -> Any:
            if kind != gguf.GGUFValueType.ARRAY:
                return super()._get_field_parts(start, kind)
            # Skipped: arrays of every word of the vocabulary would take seconds.
            (item, length), end = struct.unpack_from("<IQ", self.data, start), start + 12
            if item == gguf.GGUFValueType.STRING:
                for _ in range(length):
                    end += 8 + struct.unpack_from("<Q", self.data, end)[0]
            else:
                end += length * np.dtype(self.gguf_scalar_to_np[gguf.GGUFValueType(item)]).itemsize
            return end - start, [], [], []

    try:
        reader = Reader(path)
        if not all(tensor.n_elements > 0 for tensor in reader.tensors):
            raise ValueError("a tensor is empty")
    except Exception as error:  # a file may hold anything
        raise UserError(
            f"model.source: {path}: is no GGUF file, damaged or cut short ({named(error)})."
        ) from error
    settings = {name: field.contents() for name, field in reader.fields.items() if field.types}
    return GgufHeader(path, settings, reader.tensors, int(reader.data_offset))


def require_gguf() -> None:
    if importlib.util.find_spec("gguf") is None:
        raise UserError('model.source: a .gguf file needs the package gguf. Fix: pip install "qdora[gguf]"')


def check_gguf(header: GgufHeader) -> None:
    where, architecture = f"model.source: {header.path}:", header.architecture
    if architecture not in {*LAYOUTS, *GGUF_SUPPORTED_ARCHITECTURES}:
        raise UserError(f"{where} the layout of {architecture!r} in GGUF files is not known.")
    if (architecture, header.settings.get(f"{architecture}.block_count")) in _SCALE_NOT_STORED:
        raise UserError(f"{where} the attention scale of this {architecture} is not in GGUF files.")


def open_gguf(path: Path, model: PreTrainedModel) -> dict[str, StoredTensor]:
    header = read_header(path)
    if any(tensor.name in _ROTARY_FACTORS for tensor in header.tensors):
        log.warning("%s: its rotary factors are not read: the model differs in long texts.", path)
    return gguf_tensors(header, model)


def processor_of(header: GgufHeader, model: PreTrainedModel) -> TensorProcessor:
    """transformers' reader, which undoes what the converter did to the values of a tensor."""
    kind = TENSOR_PROCESSORS.get(LAYOUTS.get(header.architecture), TensorProcessor)
    return kind(config=model.config.to_dict())


def gguf_tensors(header: GgufHeader, model: PreTrainedModel) -> dict[str, StoredTensor]:
    """Model name -> tensor of the file, not read yet. `model` is a skeleton. An embedding keeps its own rows."""
    processor = processor_of(header, model)
    names, stored = _model_names(header, model, processor), {}
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tensors = {tensor.name: tensor for tensor in header.tensors if tensor.name not in _ROTARY_FACTORS}
    if model.config.tie_word_embeddings:
        tensors.pop(_HEAD, None)
    for path, stack in stacks(model).items():
        start, projection = f"blk.{block_of(path)}.ffn_", path.rpartition(".")[2].removesuffix("_proj")
        is_split = projection == "gate_up" and f"{start}gate_up_exps.weight" not in tensors
        keys = [f"{start}{part}_exps.weight" for part in (("gate", "up") if is_split else (projection,))]
        held = [tensors.pop(key) for key in keys if key in tensors]
        each = (stack.num_experts, stack.expert_features // len(keys), stack.in_features)
        if not held:
            continue
        if [shape_of(tensor) for tensor in held] != [each] * len(keys):
            raise UserError(f"model.source: {', '.join(keys)}: must have {list(each)} each.")
        name = f"{path}.weight"
        stored[name] = StoredTensor(held[0].name, shapes[name], partial(_read_experts, header, held))
    for key, tensor in tensors.items():
        if key not in names:
            raise UserError(f"model.source: the file's tensor '{key}' has no place in the model.")
        shape = shapes[names[key]]
        shape = (len(tensor.data), *shape[1:]) if key == _EMBEDDING else shape
        stored[names[key]] = StoredTensor(key, shape, partial(_read_tensor, header, tensor, processor, shape))
    return stored


def _read_experts(header: GgufHeader, held: Sequence[Any]) -> Tensor:
    return torch.cat([torch.from_numpy(header.values(each)) for each in held], dim=1).flatten(0, 1)


def _read_tensor(header: GgufHeader, tensor: Any, processor: TensorProcessor, shape: tuple[int, ...]) -> Tensor:
    values = processor.process(weights=header.values(tensor), name=tensor.name).weights
    # Copies if a view was returned, such as a transposed one.
    result = torch.from_numpy(np.require(values, requirements=["C", "W"]))
    if tuple(result.shape) != shape:
        raise UserError(
            f"model.source: tensor '{tensor.name}' has {list(result.shape)}, must have {list(shape)}."
        )
    return result


def _model_names(header: GgufHeader, model: PreTrainedModel, processor: TensorProcessor) -> dict[str, str]:
    """Name in the file -> name in the model, by the tables of the package gguf."""
    import gguf

    known = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == header.architecture)
    table = gguf.get_tensor_name_map(known, int(model.config.num_hidden_layers))
    renamings = [each for each in get_model_conversion_mapping(model) if isinstance(each, WeightRenaming)]
    back = [each.reverse_transform() for each in reversed(renamings)]
    names = {}
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
    """How a name may be written: one of the table of `gguf`, and what the converter puts behind it."""
    stem, _, leaf = name.rpartition(".")
    if leaf in ("weight", "bias"):
        return [(stem, f".{leaf}")]
    # The converter makes a weight or a bias of parameters that are neither (sinks, a correction of router scores).
    return [(name, ""), (name, ".weight"), (name, ".bias"), (name.removesuffix("_bias"), ".bias")]


def config_of_gguf(path: Path) -> PreTrainedConfig:
    """The config, with what a file says of its experts, and tied if it repeats the embedding as the head.

    transformers takes a Mixtral, which is a Llama with experts to llama.cpp, for a Llama, and the default width of a
    family for that of its experts.
    """
    header = read_header(path)
    check_gguf(header)
    config = _kept(header, "config", AutoConfig.from_pretrained)
    num_experts, num_chosen = (
        header.settings.get(f"{header.architecture}.{name}") for name in ("expert_count", "expert_used_count")
    )
    if config.model_type == "llama" and num_experts:
        alike = MixtralConfig().to_dict().keys() - {"model_type", "transformers_version"}
        given = {name: value for name, value in config.to_dict().items() if name in alike}
        given |= {"num_local_experts": num_experts, "num_experts_per_tok": num_chosen}
        config = MixtralConfig(**given | {"architectures": ["MixtralForCausalLM"]})
    widths = {tensor.name.rpartition(".ffn_")[2]: int(tensor.shape[0]) for tensor in header.tensors}
    of_experts = "moe_intermediate_size" if hasattr(config, "moe_intermediate_size") else "intermediate_size"
    for part, name in (("down_exps", of_experts), ("down_shexp", "shared_expert_intermediate_size")):
        if f"{part}.weight" in widths and hasattr(config, name):
            setattr(config, name, widths[f"{part}.weight"])
    pair = [tensor for tensor in header.tensors if tensor.name in (_HEAD, _EMBEDDING)]
    if len(pair) == 2 and len({(tensor.tensor_type, shape_of(tensor)) for tensor in pair}) == 1:
        # transformers takes any stored head for an untied one, which would drift away from the embedding in training.
        first, second = (header.rows(tensor) for tensor in pair)
        parts = [slice(start, start + _ROWS_AT_ONCE) for start in range(0, len(first), _ROWS_AT_ONCE)]
        config.tie_word_embeddings = all(np.array_equal(first[part], second[part]) for part in parts)
    return config


def tokenizer_of_gguf(path: Path) -> Any:
    return _kept(read_header(path), "tokenizer", AutoTokenizer.from_pretrained)


def _kept(header: GgufHeader, name: str, load: Callable[..., Any]) -> Any:
    """What `load` makes of the file, kept in the user's cache directory if the disk takes it.

    transformers turns each word of the vocabulary into arrays whenever it reads a header, which takes seconds.
    """
    path = header.path
    # The header, and the versions that read it.
    with path.open("rb") as file:
        digest = hashlib.sha256(file.read(header.end))
    digest.update(repr(package_versions(("transformers", "tokenizers", "gguf"))).encode())
    folder = cache_folder("gguf") / digest.hexdigest()[:32] / name
    with in_turn(folder):
        if not folder.is_dir():
            made = load(str(path.parent), gguf_file=path.name)
            try:
                with atomic_directory(folder) as aside:
                    made.save_pretrained(aside)
            except Exception as error:
                if disk_reason(error) is None:
                    raise
                return made
    kept = load(str(folder), local_files_only=True)
    kept.name_or_path = str(path.parent)
    return kept
