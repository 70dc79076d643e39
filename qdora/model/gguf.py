"""GGUF files, one tensor at a time: dequantised in float32 and put into the layout that transformers uses.

Names come from the tables of the package `gguf`, layouts (llama.cpp interleaves the rows of q and k, and adds 1 to
Gemma's norms) from transformers' own readers, so that they stay right with them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

from qdora.errors import UserError
from qdora.model.checkpoint import StoredTensor, shorten
from qdora.model.gguf_header import GgufHeader, GgufTensor, read_header

log = logging.getLogger("qdora")

GGUF_INSTALL = 'pip install "qdora[gguf]"'
_HEAD, _EMBEDDING = "output.weight", "token_embd.weight"
# Rotary factors of Llama 3.1 and later. transformers does not take them from a GGUF file.
_ROTARY_FACTORS = "rope_freqs.weight"
# Gemma 2 and 3 in 27B scale their attention by another width than the head's. No GGUF file says so: llama.cpp knows it
# from the number of layers, transformers does not.
_SCALE_NOT_STORED = {("gemma2", 46), ("gemma3", 62)}
# Architectures whose tensors llama.cpp's converter changes as it does those of another, which transformers reads.
_LAID_OUT_AS = {
    "arcee": "llama",
    "gemma": "gemma2",
    "granite": "llama",
    "mistral3": "llama",
    "olmo": "llama",
    "smollm3": "llama",
}
# Which it leaves as they are.
_UNCHANGED = ("cohere2", "command-r", "olmo2", "phi3", "qwen2", "qwen3", "seed_oss", "starcoder2")
_ROWS_AT_ONCE = 4096

Values = np.ndarray[Any, np.dtype[Any]]


def require_gguf() -> None:
    """Raises a UserError that says what to install where the package `gguf` is missing."""
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise UserError(f"model.source: reading a .gguf file needs the package gguf. Run: {GGUF_INSTALL}") from None


def check_gguf(path: Path) -> None:
    """Check that the file can be read to its end: a download that broke off is common and looks like a wrong shape.

    Raises:
        UserError: Package missing, not a GGUF file, cut short.
    """
    require_gguf()
    size = path.stat().st_size
    beyond = [tensor.name for tensor in read_header(path).tensors if tensor.offset + _num_bytes(tensor) > size]
    if beyond:
        raise UserError(
            f"model.source: {path} is cut short: {len(beyond)} tensors, e.g. '{beyond[0]}', lie beyond its end. "
            "Download or copy it again."
        )


def settle_head(path: Path, config: PreTrainedConfig) -> None:
    """Tie the head where the file repeats the embedding as a head of its own, as Qwen's files do.

    transformers takes any stored head for an untied one; trained and exported as such it would drift apart from the
    embedding. Changes `config.tie_word_embeddings` in place; only a head that is equal byte for byte is tied.
    """
    tensors = {tensor.name: tensor for tensor in read_header(path).tensors}
    head, embedding = tensors.get(_HEAD), tensors.get(_EMBEDDING)
    if head is None or embedding is None or head.type != embedding.type or head.shape != embedding.shape:
        return
    first, second = _stored_rows(path, head), _stored_rows(path, embedding)
    rows = range(0, first.shape[0], _ROWS_AT_ONCE)
    if all(np.array_equal(first[r : r + _ROWS_AT_ONCE], second[r : r + _ROWS_AT_ONCE]) for r in rows):
        config.tie_word_embeddings = True


def open_gguf(path: Path, model: PreTrainedModel) -> dict[str, StoredTensor]:
    """Model name -> tensor of the file, from its header alone.

    Args:
        path: The .gguf file.
        model: The skeleton that the file's config describes, for names and head counts.
    Raises:
        UserError: An architecture or a tensor that has no counterpart in transformers.
    """
    header = read_header(path)
    if (header.architecture, int(model.config.num_hidden_layers)) in _SCALE_NOT_STORED:
        raise UserError(
            f"model.source: {header.path}: the attention scale of this {header.architecture} is not in GGUF files. "
            "Use the safetensors checkpoint of the model."
        )
    processor = layout_processor(header, model)
    names = model_names(header, model, processor)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    stored: dict[str, StoredTensor] = {}
    faults = []
    for tensor in header.tensors:
        if tensor.name == _ROTARY_FACTORS:
            log.warning("%s: the rotary factors for long contexts are not read; the safetensors model has them.", path)
            continue
        if tensor.name == _HEAD and model.config.tie_word_embeddings:
            continue
        name = names.get(tensor.name)
        if name is None:
            faults.append(f"model.source: {path}: tensor '{tensor.name}' has no place in the model.")
        elif tensor.name.endswith(("_exps.weight", "_exps.bias")):
            faults.append(
                f"model.source: {path}: '{tensor.name}' holds stacked experts, which are not read from GGUF. "
                "Use the safetensors checkpoint of the model."
            )
        else:
            stored[name] = StoredTensor(tensor.name, shapes[name], _reader(path, tensor, processor, shapes[name]))
    if faults:
        raise UserError(*shorten(faults))
    return stored


def layout_processor(header: GgufHeader, model: PreTrainedModel) -> TensorProcessor:
    """What puts the tensors of an architecture into transformers' layout."""
    architecture = _LAID_OUT_AS.get(header.architecture, header.architecture)
    return TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=model.config.to_dict())


def knows_layout(header: GgufHeader) -> bool:
    """Whether `layout_processor` is known to undo all that llama.cpp's converter does to this architecture."""
    return header.architecture in {*TENSOR_PROCESSORS, *_LAID_OUT_AS, *_UNCHANGED}


def model_names(header: GgufHeader, model: PreTrainedModel, processor: TensorProcessor) -> dict[str, str]:
    """Name in the file -> name in the model.

    Raises:
        UserError: The package gguf does not know the architecture.
    """
    import gguf

    architecture = next((key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == header.architecture), None)
    num_layers = int(model.config.num_hidden_layers)
    if architecture is None:
        raise UserError(
            f"model.source: {header.path}: the installed package gguf does not know {header.architecture!r}. "
            "Upgrade it: pip install -U gguf"
        )
    table = gguf.get_tensor_name_map(architecture, num_layers)
    names: dict[str, str] = {}
    for name in model.state_dict():
        stem, dot, suffix = processor.preprocess_name(name).rpartition(".")
        if suffix not in ("weight", "bias"):
            stem, dot, suffix = name, "", ""
        # Some architectures were converted from the model without its head, whose names lack the first part.
        found = table.get_name(stem) or table.get_name(stem.removeprefix(f"{model.base_model_prefix}."))
        if found is not None:
            names[f"{found}{dot}{suffix}"] = name
    return names


def _num_bytes(tensor: GgufTensor) -> int:
    return int(np.prod(_byte_shape(tensor)))


def _byte_shape(tensor: GgufTensor) -> tuple[int, ...]:
    """The tensor's shape with the last size counted in stored bytes."""
    import gguf

    block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(tensor.type)]
    return (*tensor.shape[:-1], tensor.shape[-1] // block * block_bytes)


def _stored_rows(path: Path, tensor: GgufTensor) -> Values:
    """The stored bytes as (rows, bytes per row), mapped; its pages are given back when it is dropped."""
    shape = _byte_shape(tensor)
    flat = np.memmap(path, dtype=np.uint8, mode="r", offset=tensor.offset, shape=(_num_bytes(tensor),))
    # asarray: slicing the subclass of a mapped array costs more than dequantising a small slice.
    return np.asarray(flat).reshape(-1, shape[-1])


def _reader(path: Path, tensor: GgufTensor, processor: TensorProcessor, shape: tuple[int, ...]) -> Callable[[], Tensor]:
    def read() -> Tensor:
        values = processor.process(weights=_dequantized(path, tensor), name=tensor.name).weights
        # A copy where the processor returned a transposed view.
        result = torch.from_numpy(np.require(values, requirements=["C", "W"]))
        if tuple(result.shape) != shape:
            raise UserError(
                f"model.source: tensor '{tensor.name}' has shape {list(result.shape)}, "
                f"the config asks for {list(shape)}."
            )
        return result

    return read


def _dequantized(path: Path, tensor: GgufTensor) -> Values:
    """The values in float32; some rows at a time, since `gguf` alone would hold them twice."""
    import gguf

    stored = _stored_rows(path, tensor)
    kind = gguf.GGMLQuantizationType(tensor.type)
    values = np.empty((stored.shape[0], tensor.shape[-1]), dtype=np.float32)
    for start in range(0, stored.shape[0], _ROWS_AT_ONCE):
        part = slice(start, start + _ROWS_AT_ONCE)
        try:
            values[part] = gguf.dequantize(stored[part], kind)
        except NotImplementedError as error:
            raise UserError(f"model.source: tensor '{tensor.name}': {error}") from error
    return values.reshape(tensor.shape)
