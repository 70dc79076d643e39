"""Reading GGUF files: the header, and tensors one at a time, dequantised to float32 in transformers' layout.

The header is read here, since the reader of the package `gguf` turns every word of the vocabulary into arrays, which
takes seconds. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian.
`gguf_layout` says what the tensors are in the model. Experts are read one by one.
"""

from __future__ import annotations

import logging
import math
import re
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

from qdora.errors import UserError
from qdora.model.gguf_layout import HeldRows, TensorLayout, Values, held_rows, tensor_layouts
from qdora.model.quantized_checkpoint import mxfp4_weight
from qdora.model.stored_tensors import Stored, StoredPacked, StoredRows, StoredTensor, in_parts, shorten
from qdora.ops.codebooks import MXFP4, MXFP4_BLOCK_SIZE
from qdora.ops.packed import PackedWeight
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
_ROWS_AT_ONCE = 4096


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


def open_gguf(path: Path, model: PreTrainedModel) -> dict[str, Stored]:
    """Model name -> tensor of the file; only the header is read. `model` is the skeleton of the file's config.

    Raises UserError if the architecture or a tensor has no counterpart in transformers.
    """
    header = read_header(path)
    if (header.architecture, int(model.config.num_hidden_layers)) in _SCALE_NOT_STORED:
        raise UserError(
            f"model.source: {header.path}: the attention scale of this {header.architecture} is not in GGUF files. "
            "Fix: use the safetensors checkpoint of the model."
        )
    places = held_rows(model)
    strange = [each.name for each in header.tensors if "_exps." in each.name and each.name not in places]
    strange += [name for name, place in places.items() if place.turned]
    if strange:
        parts = "experts" if "_exps." in strange[0] else "heads"
        raise UserError(
            f"model.source: {path}: '{strange[0]}' holds {parts}, which are not read from GGUF files of "
            f"{header.architecture}. Fix: use the safetensors checkpoint of the model."
        )
    layouts = tensor_layouts(path, header.architecture, (tensor.name for tensor in header.tensors), model)
    may_hold = tuple(model._keys_to_ignore_on_load_unexpected or ())
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    stored: dict[str, Stored] = {}
    experts: dict[str, list[tuple[GgufTensor, HeldRows]]] = {}
    faults = []
    for tensor in header.tensors:
        if tensor.name == _ROTARY_FACTORS:
            text = "%s: its rotary factors (%s) are not read: the model answers otherwise than the original, above all "
            text += "in long texts. Fix: use the safetensors model."
            log.warning(text, path, tensor.name)
            continue
        if tensor.name == _HEAD and model.config.tie_word_embeddings:
            continue
        if tensor.name in places:
            place = places[tensor.name]
            experts.setdefault(place.name, []).append((tensor, place))
            continue
        layout = layouts.get(tensor.name)
        if layout is not None and layout.name in shapes:
            shape = shapes[layout.name]
            stored[layout.name] = StoredTensor(tensor.name, shape, partial(_read_tensor, path, tensor, layout, shape))
        elif layout is None or not any(re.search(pattern, layout.name) for pattern in may_hold):
            faults.append(f"model.source: {path}: tensor '{tensor.name}' has no place in the model.")
    for name, held in experts.items():
        faults.extend(_expert_faults(path, held))
        stored[name] = _stack(path, held, shapes[name])
    if faults:
        raise UserError(*shorten(faults))
    return stored


def _expert_faults(path: Path, held: Sequence[tuple[GgufTensor, HeldRows]]) -> Iterator[str]:
    """Tensors of experts that do not make up their stack."""
    for tensor, place in held:
        if tensor.shape != place.shape:
            what = f"tensor '{tensor.name}' has shape {list(tensor.shape)}, the config asks for {list(place.shape)}"
            yield f"model.source: {path}: {what}."
    num_rows, wanted = sum(place.num_rows for _, place in held), held[0][1].part_features
    if num_rows != wanted:
        names = ", ".join(tensor.name for tensor, _ in held)
        yield f"model.source: {path}: {names} hold {num_rows} rows of each expert, the config asks for {wanted}."


def _stack(path: Path, held: Sequence[tuple[GgufTensor, HeldRows]], shape: tuple[int, ...]) -> Stored:
    """The bias, (experts, out), or weight, (experts * out, in), of a stack; MXFP4 stays packed."""
    import gguf

    first, key = held[0][1], held[0][0].name
    if first.columns is None:
        return StoredTensor(key, shape, partial(_expert_bias, path, held, shape))
    if {tensor.type for tensor, _ in held} == {gguf.GGMLQuantizationType.MXFP4}:
        read = partial(_mxfp4_weight, path, held, (shape[0], shape[1]))
        return StoredPacked(key, shape, MXFP4, MXFP4_BLOCK_SIZE, double_quant=False, read=read)
    parts = [
        StoredRows(first.part_features, partial(_expert_weight, path, held, expert))
        for expert in range(first.num_parts)
    ]
    return in_parts(key, shape, parts, itemsize=4, dtype="F32")


def _expert_weight(path: Path, held: Sequence[tuple[GgufTensor, HeldRows]], expert: int) -> Tensor:
    """The weight of one expert, (out, in)."""
    first, columns = held[0][1], held[0][0].shape[-1]
    values = np.empty((first.part_features, columns), dtype=np.float32)
    for tensor, place in held:
        start = expert * place.num_rows
        values[place.rows] = _dequantized(path, tensor, slice(start, start + place.num_rows))
    return torch.from_numpy(values)


def _expert_bias(path: Path, held: Sequence[tuple[GgufTensor, HeldRows]], shape: tuple[int, ...]) -> Tensor:
    values = np.empty(shape, dtype=np.float32)
    for tensor, place in held:
        values[:, place.rows] = _dequantized(path, tensor)
    return torch.from_numpy(values)


def _mxfp4_weight(path: Path, held: Sequence[tuple[GgufTensor, HeldRows]], shape: tuple[int, int]) -> PackedWeight:
    """The weight of a stack bit for bit. A block of a file is its scale, then 16 bytes of weights i and i + 16."""
    first, num_groups = held[0][1], shape[1] // MXFP4_BLOCK_SIZE
    sizes = (first.num_parts, first.part_features, num_groups)
    packed, scales = np.empty((*sizes, MXFP4_BLOCK_SIZE // 2), dtype=np.uint8), np.empty(sizes, dtype=np.uint8)
    for tensor, place in held:
        blocks = _stored_rows(path, tensor).reshape(first.num_parts, place.num_rows, num_groups, -1)
        scales[:, place.rows] = blocks[..., 0]
        for expert in range(first.num_parts):
            pairs = blocks[expert, ..., 1:]
            codes = np.concatenate([pairs & 15, pairs >> 4], axis=-1)
            packed[expert, place.rows] = codes[..., ::2] << 4 | codes[..., 1::2]
    return mxfp4_weight(held[0][0].name, torch.from_numpy(packed), torch.from_numpy(scales), shape)


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


def _read_tensor(path: Path, tensor: GgufTensor, layout: TensorLayout, shape: tuple[int, ...]) -> Tensor:
    values = layout.change(_dequantized(path, tensor).reshape(tensor.shape))
    # Copies if a view was returned, such as a transposed one.
    result = torch.from_numpy(np.require(values, requirements=["C", "W"]))
    if tuple(result.shape) != shape:
        found = f"tensor '{tensor.name}' has shape {list(result.shape)}"
        raise UserError(f"model.source: {found}, the config asks for {list(shape)}.")
    return result


def _dequantized(path: Path, tensor: GgufTensor, rows: slice = slice(None)) -> Values:
    """Some rows of the values in float32, (rows, in), some at a time, since `gguf` would hold them twice."""
    import gguf

    stored = _stored_rows(path, tensor)[rows]
    kind = gguf.GGMLQuantizationType(tensor.type)
    values = np.empty((stored.shape[0], tensor.shape[-1]), dtype=np.float32)
    for start in range(0, stored.shape[0], _ROWS_AT_ONCE):
        part = slice(start, start + _ROWS_AT_ONCE)
        try:
            values[part] = gguf.dequantize(stored[part], kind)
        except NotImplementedError as error:
            raise UserError(f"model.source: tensor '{tensor.name}': {error}") from error
    return values
