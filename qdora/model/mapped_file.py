"""A safetensors file mapped into memory: its tensors are views of the file, read from the disk where they are used."""

from __future__ import annotations

import json
import mmap
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qdora.model.safetensors_writer import dtype_named


class MappedFile:
    """The tensors of a file, whose pages the system reads when they are touched.

    Pages that were read count as memory of the process until `drop`; the tensors stay valid, and are read again.

    Args:
        path: A safetensors file; it must not be written to while it is mapped.
    Raises:
        ValueError: It is not a whole safetensors file, or holds a dtype that this package does not write.
        OSError: It cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            # Checks the header against the file's length; the offsets are then taken from the same bytes.
            with safe_open(str(path), framework="pt", device="cpu"):
                pass
        except SafetensorError as error:
            raise ValueError(f"no safetensors file: {error}") from error
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
            self._memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        header.pop("__metadata__", None)
        self._start = 8 + size
        self._entries: dict[str, tuple[torch.dtype, tuple[int, ...], int, int]] = {
            name: (dtype_named(entry["dtype"]), tuple(entry["shape"]), *entry["data_offsets"])
            for name, entry in header.items()
        }

    @property
    def names(self) -> list[str]:
        """Of its tensors."""
        return list(self._entries)

    def tensor(self, name: str) -> Tensor:
        """A view of the file, which must not be written to: the process would be killed.

        Raises:
            KeyError: No such tensor.
        """
        dtype, shape, start, _ = self._entries[name]
        count = torch.Size(shape).numel()
        if count == 0:
            return torch.empty(shape, dtype=dtype)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given buffer is not writable")
            flat = torch.frombuffer(self._memory, dtype=dtype, count=count, offset=self._start + start)
        return flat.view(shape)

    def fetch(self, name: str) -> None:
        """Ask the system to read a tensor's pages ahead of their use."""
        self._advise(name, mmap.MADV_WILLNEED)

    def drop(self, name: str) -> None:
        """Give a tensor's pages back; the next use reads them again, from the system's cache or from the disk."""
        self._advise(name, mmap.MADV_DONTNEED)

    def _advise(self, name: str, advice: int) -> None:
        _, _, start, end = self._entries[name]
        first = (self._start + start) // mmap.PAGESIZE * mmap.PAGESIZE
        if end > start:
            self._memory.madvise(advice, first, self._start + end - first)
