"""The header of a GGUF file: its few settings that matter here, and where each tensor lies.

The reader of the package `gguf` turns every word of the vocabulary into arrays, which takes seconds; this one steps
over them. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from qdora.errors import UserError

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_VERSIONS = (2, 3)
_ALIGNMENT = 32


@dataclass(frozen=True)
class GgufTensor:
    """One tensor: `shape` in torch's order, `offset` in bytes from the start of the file, `type` as gguf numbers it."""

    name: str
    shape: tuple[int, ...]
    type: int
    offset: int


@dataclass(frozen=True)
class GgufHeader:
    """`settings` holds the scalars and strings of the metadata; arrays are left out."""

    path: Path
    settings: Mapping[str, Any]
    tensors: tuple[GgufTensor, ...]

    @property
    def architecture(self) -> str:
        """As llama.cpp names it: llama, qwen2, gemma2, ..."""
        return str(self.settings.get("general.architecture", ""))


def read_header(path: Path) -> GgufHeader:
    """Read the header of `path`; no tensor is touched.

    Raises:
        UserError: Not a GGUF file, an unknown version, or cut short within the header.
    """
    try:
        with path.open("rb") as stream:
            return _read(path, stream)
    except (struct.error, KeyError, UnicodeDecodeError, OverflowError) as error:
        raise UserError(f"model.source: {path}: its GGUF header is broken or cut short: {error!r}") from error
    except OSError as error:
        raise UserError(f"model.source: {path} cannot be read: {error}") from error


def _read(path: Path, stream: BinaryIO) -> GgufHeader:
    magic, version, num_tensors, num_settings = _unpack(stream, "4sIQQ")
    if magic != b"GGUF":
        raise UserError(f"model.source: {path} is not a GGUF file: it starts with {magic!r}.")
    if version not in _VERSIONS:
        raise UserError(f"model.source: {path} is GGUF version {version}, allowed: 2, 3.")
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
        sizes = _unpack(stream, f"{num_dims}Q")
        kind, offset = _unpack(stream, "IQ")
        entries.append(GgufTensor(name, tuple(reversed(sizes)), kind, offset))
    alignment = int(settings.get("general.alignment", _ALIGNMENT))
    data = -(-stream.tell() // alignment) * alignment
    tensors = tuple(GgufTensor(entry.name, entry.shape, entry.type, data + entry.offset) for entry in entries)
    return GgufHeader(path, settings, tensors)


def _unpack(stream: BinaryIO, form: str) -> tuple[Any, ...]:
    form = "<" + form
    return struct.unpack(form, stream.read(struct.calcsize(form)))


def _string(stream: BinaryIO) -> str:
    (length,) = _unpack(stream, "Q")
    content = stream.read(length)
    if len(content) != length:
        raise struct.error("the file ends within a string")
    return content.decode("utf-8")


def _skip_array(stream: BinaryIO) -> None:
    kind, length = _unpack(stream, "IQ")
    if kind == _STRING:
        for _ in range(length):
            (size,) = _unpack(stream, "Q")
            stream.seek(size, 1)
    elif kind == _ARRAY:
        for _ in range(length):
            _skip_array(stream)
    else:
        stream.seek(length * struct.calcsize(_SCALARS[kind]), 1)
