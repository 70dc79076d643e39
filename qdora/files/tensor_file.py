"""safetensors files, written one tensor at a time.

8 bytes little-endian length of the header, the header (JSON: name -> dtype, shape, byte offsets), then the tensors back
to back. Source: huggingface/safetensors, README, "Format".
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_DTYPES |= {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8}
_DTYPES |= {"U8": torch.uint8, "BOOL": torch.bool}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class TensorSpec:
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def torch_dtype(name: str) -> torch.dtype:
    return _DTYPES[name]


def _header(specs: Sequence[TensorSpec]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers requires it
    offset = 0
    for spec in specs:
        assert spec.name not in entries, spec.name
        # Readers view the mapped file in the tensor's dtype, which needs an aligned start
        assert offset % spec.dtype.itemsize == 0, spec.name
        start, offset = offset, offset + spec.num_bytes
        placed = {"shape": list(spec.shape), "data_offsets": [start, offset]}
        entries[spec.name] = {"dtype": _DTYPE_NAMES[spec.dtype], **placed}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the values start at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text


def write_safetensors(
    path: Path,
    specs: Sequence[TensorSpec],
    tensors: Iterable[Tensor | Iterator[Tensor]],
    *,
    order: Sequence[TensorSpec] | None = None,
) -> int:
    """Write a new file whose tensors are made one by one, and flush it to the disk. Returns the bytes written.

    `specs` are in file order, `tensors` in `order` (default `specs`), each whole or as its flat parts; each is dropped
    before the next is made.
    """
    remaining = iter(tensors)
    with path.open("xb") as file:
        end, starts = file.write(_header(specs)), {}
        for spec in specs:
            starts[spec.name] = end
            end += spec.num_bytes
        for spec in order or specs:
            file.seek(starts[spec.name])
            tensor, written = next(remaining), 0  # not zip, which would keep the last one
            for part in [tensor] if isinstance(tensor, Tensor) else tensor:
                assert part.dtype == spec.dtype, spec.name
                flat = part.detach().cpu().contiguous().reshape(-1)
                written += file.write(flat.view(torch.uint8).numpy().data) if flat.numel() else 0
                del part, flat
            del tensor
            assert written == spec.num_bytes, spec.name
        assert next(remaining, None) is None  # which also lets a generator count its last one
        file.flush()
        os.fsync(file.fileno())
        return end


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> int:
    """Write tensors to a new file, wider dtypes first, which aligns all of them."""
    specs = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    specs.sort(key=lambda spec: -spec.dtype.itemsize)  # stable
    return write_safetensors(path, specs, (tensors[spec.name] for spec in specs))
