"""safetensors files, written one tensor at a time.

8 bytes little-endian length of the header, the header (JSON: name -> dtype, shape, byte offsets), then the tensors back
to back. Source: huggingface/safetensors, README, "Format".
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPES |= {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8}
DTYPES |= {"U8": torch.uint8, "BOOL": torch.bool}
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorSpec:
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_safetensors(path: Path, specs: Sequence[TensorSpec], tensors: Iterable[Tensor]) -> None:
    """Write a new file whose tensors are made one by one, and flush it to the disk.

    `tensors` are in the order of `specs`; each is dropped before the next is made. In the file, wider dtypes come
    first: readers view the mapped file in the dtype of a tensor, which needs an aligned start.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers requires it
    starts, end = dict[str, int](), 0
    for spec in sorted(specs, key=lambda spec: -spec.dtype.itemsize):  # stable
        starts[spec.name] = start = end
        end += spec.num_bytes
        placed = {"shape": list(spec.shape), "data_offsets": [start, end]}
        header[spec.name] = {"dtype": _DTYPE_NAMES[spec.dtype], **placed}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the values start at a multiple of 8 bytes
    remaining = iter(tensors)
    with path.open("xb") as file:
        begin = file.write(len(text).to_bytes(8, "little") + text)
        for spec in specs:
            # not zip, which would keep the last one
            tensor = next(remaining).detach().cpu().contiguous().reshape(-1)
            assert (tensor.dtype, tensor.nbytes) == (spec.dtype, spec.num_bytes), spec.name
            file.seek(begin + starts[spec.name])
            if tensor.numel():
                file.write(tensor.view(torch.uint8).numpy().data)
            del tensor
        assert next(remaining, None) is None  # which also lets a generator count its last one
        file.flush()
        os.fsync(file.fileno())


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    specs = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    write_safetensors(path, specs, tensors.values())
