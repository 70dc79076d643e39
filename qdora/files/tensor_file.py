"""safetensors files, written one tensor at a time.

The format: 8 bytes little-endian length of the header, the header (JSON: name -> dtype, shape, byte offsets), then the
tensors back to back. The header is written first, since all sizes are known before the values are.
Source: huggingface/safetensors, README, "Format".
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_DTYPES |= {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8}
_DTYPES |= {"U8": torch.uint8, "BOOL": torch.bool}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class TensorSpec:
    """Name, dtype and shape of a tensor to write."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of the values in the file."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def torch_dtype(name: str) -> torch.dtype:
    """The dtype that a header calls `name`. ValueError if this module cannot write it."""
    if name not in _DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(_DTYPES)} (got '{name}').")
    return _DTYPES[name]


def _header(specs: Sequence[TensorSpec]) -> bytes:
    """Length and JSON of the header, padded with blanks so that the values start at a multiple of 8 bytes."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers requires it
    offset = 0
    for spec in specs:
        if spec.name in entries:
            raise ValueError(f"tensor name '{spec.name}' occurs twice.")
        if spec.dtype not in _DTYPE_NAMES:
            raise ValueError(f"tensor '{spec.name}': dtype must be one of {', '.join(_DTYPES)} (got {spec.dtype}).")
        if offset % spec.dtype.itemsize:
            # Readers view the mapped file in the tensor's dtype, which needs an aligned start.
            raise ValueError(f"tensor '{spec.name}' would start at byte {offset}; wider dtypes must come first.")
        start, offset = offset, offset + spec.num_bytes
        placed = {"shape": list(spec.shape), "data_offsets": [start, offset]}
        entries[spec.name] = {"dtype": _DTYPE_NAMES[spec.dtype], **placed}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_safetensors(
    path: Path,
    specs: Sequence[TensorSpec],
    tensors: Iterable[Tensor | Iterator[Tensor]],
    *,
    order: Sequence[TensorSpec] | None = None,
) -> int:
    """Write a new file whose tensors are made one by one, and flush it to the disk. Returns the bytes written.

    Args:
        path, specs: Must not exist; the tensors in file order.
        tensors: The tensors, each whole or as its flat parts in order; each is dropped before the next is made.
        order: Order in which the tensors come (default `specs`); the file does not depend on it.
    Raises:
        ValueError: A tensor does not match its spec, or there are too few or too many.
    """
    order = specs if order is None else order
    remaining = iter(tensors)
    with path.open("xb") as file:
        end = file.write(_header(specs))
        starts = {}
        for spec in specs:
            starts[spec.name] = end
            end += spec.num_bytes
        assert {spec.name for spec in order} == starts.keys()
        for spec in order:
            file.seek(starts[spec.name])
            tensor = next(remaining, None)
            if tensor is None:
                raise ValueError(f"no tensor for '{spec.name}'.")
            if isinstance(tensor, Tensor):
                if tensor.dtype != spec.dtype or tuple(tensor.shape) != spec.shape:
                    given = f"{tensor.dtype} {tuple(tensor.shape)}"
                    raise ValueError(f"tensor '{spec.name}' is {given}, announced as {spec.dtype} {spec.shape}.")
                tensor = iter([tensor])
            _write_parts(file, spec, tensor)
            del tensor
        if next(remaining, None) is not None:
            raise ValueError(f"more tensors than the {len(specs)} announced.")
        file.flush()
        os.fsync(file.fileno())
        return end


def _write_parts(file: BinaryIO, spec: TensorSpec, parts: Iterator[Tensor]) -> None:
    written = 0
    for part in parts:
        if part.dtype != spec.dtype:
            raise ValueError(f"a part of tensor '{spec.name}' is {part.dtype}, announced as {spec.dtype}.")
        flat = part.detach().cpu().contiguous().reshape(-1)
        if flat.numel():
            written += file.write(flat.view(torch.uint8).numpy().data)
        del part, flat
    if written != spec.num_bytes:
        raise ValueError(f"the parts of tensor '{spec.name}' have {written} bytes, announced are {spec.num_bytes}.")


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> int:
    """Write tensors to a new file, wider dtypes first, which aligns all of them; otherwise as `write_safetensors`."""
    specs = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    specs.sort(key=lambda spec: -spec.dtype.itemsize)  # stable
    return write_safetensors(path, specs, (tensors[spec.name] for spec in specs))


def plan_shards(specs: Sequence[TensorSpec], max_shard_bytes: int) -> dict[str, list[TensorSpec]]:
    """File name -> its tensors, in order: a single `model.safetensors`, or `model-00001-of-0000N.safetensors`, ...

    A tensor larger than the limit gets a file of its own. In a file wider dtypes come first, which aligns every tensor.
    """
    groups: list[list[TensorSpec]] = [[]]
    size = 0
    for spec in specs:
        if groups[-1] and size + spec.num_bytes > max_shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(spec)
        size += spec.num_bytes
    groups = [sorted(group, key=lambda spec: -spec.dtype.itemsize) for group in groups]  # stable
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, 1)}


def shard_index(shards: Mapping[str, Sequence[TensorSpec]]) -> dict[str, object]:
    """The content of `model.safetensors.index.json`: total parameters and bytes, and tensor -> file."""
    specs = [spec for group in shards.values() for spec in group]
    num_parameters = sum(torch.Size(spec.shape).numel() for spec in specs)
    metadata = {"total_parameters": num_parameters, "total_size": sum(spec.num_bytes for spec in specs)}
    return {"metadata": metadata, "weight_map": {spec.name: file for file, group in shards.items() for spec in group}}
