"""Reading GGUF files: the header, and tensors one at a time, dequantised to float32 in transformers' layout.

The header is read here, since the reader of the package `gguf` turns every word of the vocabulary into arrays, which
takes seconds. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian.
Names come from the tables of the package `gguf`. Layouts come from transformers' own readers (llama.cpp interleaves the
rows of q and k, and adds 1 to Gemma's norms).
"""

from __future__ import annotations

import logging
import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

from qdora.errors import UserError
from qdora.model.stored_tensors import StoredTensor, shorten
from qdora.recipe.faults import one_line

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_VERSIONS = (2, 3)
_ALIGNMENT = 32
_MOST_DIMS = 4
_MOST_STRING_BYTES = 64 << 20
"""Longest string of the metadata; chat templates, the longest there are, have some 20 kB."""


@dataclass(frozen=True)
class GgufTensor:
    """A tensor: `shape` in torch's order, `offset` in bytes from the start of the file, `type` by gguf's numbers."""

    name: str
    shape: tuple[int, ...]
    type: int
    offset: int


@dataclass(frozen=True)
class GgufHeader:
    """`settings` holds the scalars and strings of the metadata, without arrays."""

    path: Path
    settings: Mapping[str, Any]
    tensors: tuple[GgufTensor, ...]

    @property
    def architecture(self) -> str:
        """Name in llama.cpp: llama, qwen2, gemma2, ..."""
        return str(self.settings.get("general.architecture", ""))


def read_header(path: Path) -> GgufHeader:
    """Read the header of a GGUF file.

    Raises UserError if the file is not GGUF, has an unknown version, or is cut short within the header.
    """
    try:
        with path.open("rb") as stream:
            return _read(path, stream)
    except UserError:
        raise
    except (struct.error, KeyError, ValueError, OverflowError, RecursionError) as error:
        reason = one_line(str(error))
        if isinstance(error, UnicodeDecodeError):
            reason = "a name is not UTF-8"
        elif isinstance(error, KeyError):
            reason = f"a value of the unknown type {error}"
        raise UserError(f"model.source: {path}: its GGUF header is broken or cut short: {reason}") from error
    except OSError as error:
        raise UserError(f"model.source: {path} cannot be read: {error}") from error


def _read(path: Path, stream: BinaryIO) -> GgufHeader:
    magic, version, num_tensors, num_settings = _unpack(stream, "4sIQQ")
    if magic != b"GGUF":
        raise UserError(f"model.source: {path} is not a GGUF file: it starts with {magic!r}.")
    if version not in _VERSIONS:
        raise UserError(f"model.source: {path} is GGUF version {version}; must be one of 2, 3.")
    settings: dict[str, Any] = {}
    for _ in range(num_settings):
        key = _string(stream)
        (kind,) = _unpack(stream, "I")
        if kind == _ARRAY:
            _skip_array(stream)
        else:
            settings[key] = _string(stream) if kind == _STRING else _unpack(stream, _SCALARS[kind])[0]
    entries = []
    for _ in range(num_tensors):
        name = _string(stream)
        (num_dims,) = _unpack(stream, "I")
        if not 1 <= num_dims <= _MOST_DIMS:
            raise ValueError(f"tensor '{name}' has {num_dims} dimensions")
        sizes = _unpack(stream, f"{num_dims}Q")
        entries.append((name, tuple(reversed(sizes)), *_unpack(stream, "IQ")))
    alignment = settings.get("general.alignment", _ALIGNMENT)
    if type(alignment) is not int or alignment < 8 or alignment % 8:
        raise ValueError(f"general.alignment must be a multiple of 8 (got {alignment!r})")
    for name, *_, offset in entries:
        if offset % alignment:
            raise ValueError(f"tensor '{name}' begins at byte {offset}, which is no multiple of {alignment}")
    data = -(-stream.tell() // alignment) * alignment
    tensors = tuple(GgufTensor(name, shape, kind, data + offset) for name, shape, kind, offset in entries)
    return GgufHeader(path, settings, tensors)


def _unpack(stream: BinaryIO, form: str) -> tuple[Any, ...]:
    return struct.unpack(f"<{form}", stream.read(struct.calcsize(f"<{form}")))


def _string(stream: BinaryIO) -> str:
    (length,) = _unpack(stream, "Q")
    if length > _MOST_STRING_BYTES:  # a read of that many bytes would first take the memory for them
        raise ValueError(f"a string of {length:,} bytes")
    content = stream.read(length)
    if len(content) != length:
        raise ValueError("the file ends within a string")
    return content.decode("utf-8")


def _skip_array(stream: BinaryIO) -> None:
    kind, length = _unpack(stream, "IQ")
    if kind not in (_STRING, _ARRAY):
        stream.seek(length * struct.calcsize(_SCALARS[kind]), 1)
        return
    for _ in range(length):
        if kind == _ARRAY:
            _skip_array(stream)
        else:
            stream.seek(_unpack(stream, "Q")[0], 1)


log = logging.getLogger("qdora")

GGUF_INSTALL = 'pip install "qdora[gguf]"'
_HEAD, _EMBEDDING = "output.weight", "token_embd.weight"
# Rotary factors of Llama 3.1 and later; transformers does not take them from a GGUF file.
_ROTARY_FACTORS = "rope_freqs.weight"
# The 27B models of Gemma 2 and 3 scale their attention by another width than the head's. GGUF files do not store it;
# llama.cpp knows it from the number of layers, transformers does not.
_SCALE_NOT_STORED = {("gemma2", 46), ("gemma3", 62)}
# Architectures whose tensors llama.cpp's converter changes like those of another one, which transformers reads.
_LAID_OUT_AS = {"gemma": "gemma2"} | dict.fromkeys(("arcee", "granite", "mistral3", "olmo", "smollm3"), "llama")
# Architectures whose tensors the converter does not change.
_UNCHANGED = ("cohere2", "command-r", "olmo2", "phi3", "qwen2", "qwen3", "seed_oss", "starcoder2")
_ROWS_AT_ONCE = 4096

Values = np.ndarray[Any, np.dtype[Any]]


def require_gguf() -> None:
    """Raise UserError, with the command to run, if the package `gguf` is missing."""
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise UserError(f"model.source: reading a .gguf file needs the package gguf. Fix: {GGUF_INSTALL}") from None


def check_gguf(path: Path) -> None:
    """Check that all tensors are in the file; broken downloads are common and look like a wrong shape.

    Raises UserError if the package gguf is missing, or the file is not GGUF or cut short.
    """
    require_gguf()
    size = path.stat().st_size
    tensors = read_header(path).tensors
    faults = list(_placing_faults(path, tensors))
    if faults:
        raise UserError(*shorten(faults))
    beyond = [tensor.name for tensor in tensors if tensor.offset + _num_bytes(tensor) > size]
    if beyond:
        raise UserError(
            f"model.source: {path} is cut short: {len(beyond)} tensors, e.g. '{beyond[0]}', lie beyond its end. "
            "Fix: download or copy it again."
        )


def _placing_faults(path: Path, tensors: Sequence[GgufTensor]) -> Iterator[str]:
    """Tensors of an unknown type, without values, or with bytes of another tensor: a header that was damaged."""
    import gguf

    end, before = 0, ""
    kinds: dict[int, tuple[int, int]] = gguf.GGML_QUANT_SIZES  # (values, bytes) of a block
    for tensor in sorted(tensors, key=lambda tensor: tensor.offset):
        where = f"model.source: {path}: tensor '{tensor.name}'"
        if tensor.type not in kinds:
            yield f"{where} has the type {tensor.type}, which the installed package gguf does not know."
            continue
        if 0 in tensor.shape or tensor.shape[-1] % kinds[tensor.type][0]:
            yield f"{where} has the shape {list(tensor.shape)}, which its type cannot have: the header is damaged."
        if tensor.offset < end:
            yield f"{where} begins inside the values of '{before}': the header is damaged."
        end, before = max(end, tensor.offset + _num_bytes(tensor)), tensor.name


def settle_head(path: Path, config: PreTrainedConfig) -> None:
    """Set `config.tie_word_embeddings` if the file repeats the embedding as the head, as Qwen's files do.

    transformers takes any stored head for an untied one, which would drift away from the embedding in training. Only a
    head that is equal byte for byte is tied.
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
    """Model name -> tensor of the file; only the header is read. `model` is the skeleton of the file's config.

    Raises UserError if the architecture or a tensor has no counterpart in transformers.
    """
    header = read_header(path)
    if (header.architecture, int(model.config.num_hidden_layers)) in _SCALE_NOT_STORED:
        raise UserError(
            f"model.source: {header.path}: the attention scale of this {header.architecture} is not in GGUF files. "
            "Fix: use the safetensors checkpoint of the model."
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
                "Fix: use the safetensors checkpoint of the model."
            )
        else:
            read = partial(_read_tensor, path, tensor, processor, shapes[name])
            stored[name] = StoredTensor(tensor.name, shapes[name], read)
    if faults:
        raise UserError(*shorten(faults))
    return stored


def layout_processor(header: GgufHeader, model: PreTrainedModel) -> TensorProcessor:
    """transformers' converter from the file's layout to its own."""
    architecture = _LAID_OUT_AS.get(header.architecture, header.architecture)
    return TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=model.config.to_dict())


def knows_layout(header: GgufHeader) -> bool:
    """Whether `layout_processor` is known to undo every change of llama.cpp's converter to this architecture."""
    return header.architecture in {*TENSOR_PROCESSORS, *_LAID_OUT_AS, *_UNCHANGED}


def model_names(header: GgufHeader, model: PreTrainedModel, processor: TensorProcessor) -> dict[str, str]:
    """Name in the file -> name in the model. Raises UserError if the package gguf does not know the architecture."""
    import gguf

    architecture = next((key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == header.architecture), None)
    num_layers = int(model.config.num_hidden_layers)
    if architecture is None:
        raise UserError(
            f"model.source: {header.path}: the installed package gguf does not know {header.architecture!r}. "
            "Fix: pip install -U gguf"
        )
    table = gguf.get_tensor_name_map(architecture, num_layers)
    names: dict[str, str] = {}
    for name in model.state_dict():
        stem, dot, suffix = processor.preprocess_name(name).rpartition(".")
        if suffix not in ("weight", "bias"):
            stem, dot, suffix = name, "", ""
        # Some architectures were converted from the model without its head; those names lack the first part.
        found = table.get_name(stem) or table.get_name(stem.removeprefix(f"{model.base_model_prefix}."))
        if found is not None:
            names[f"{found}{dot}{suffix}"] = name
    return names


def _num_bytes(tensor: GgufTensor) -> int:
    return math.prod(_byte_shape(tensor))  # of any size, where numpy's would overflow


def _byte_shape(tensor: GgufTensor) -> tuple[int, ...]:
    """The tensor's shape with the last size in stored bytes."""
    import gguf

    block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(tensor.type)]
    return (*tensor.shape[:-1], tensor.shape[-1] // block * block_bytes)


def _stored_rows(path: Path, tensor: GgufTensor) -> Values:
    """The stored bytes as (rows, bytes per row), mapped; dropping the array gives its pages back."""
    shape = _byte_shape(tensor)
    flat = np.memmap(path, dtype=np.uint8, mode="r", offset=tensor.offset, shape=(_num_bytes(tensor),))
    # asarray: slicing a memmap costs more than dequantising a small slice.
    return np.asarray(flat).reshape(-1, shape[-1])


def _read_tensor(path: Path, tensor: GgufTensor, processor: TensorProcessor, shape: tuple[int, ...]) -> Tensor:
    values = processor.process(weights=_dequantized(path, tensor), name=tensor.name).weights
    # Copies if the processor returned a transposed view.
    result = torch.from_numpy(np.require(values, requirements=["C", "W"]))
    if tuple(result.shape) != shape:
        found = f"tensor '{tensor.name}' has shape {list(result.shape)}"
        raise UserError(f"model.source: {found}, the config asks for {list(shape)}.")
    return result


def _dequantized(path: Path, tensor: GgufTensor) -> Values:
    """The values in float32, some rows at a time, since `gguf` would hold them twice."""
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
