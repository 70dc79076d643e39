"""A machine with NVIDIA's driver, as far as qdora asks it: its files, and its library."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

CDLL = ctypes.CDLL


def files(root: Path, version: str) -> Path:
    """A root directory with a device node and the version in /proc."""
    for folder in ("dev", "proc/driver/nvidia"):
        (root / folder).mkdir(parents=True)
    (root / "dev/nvidia0").touch()
    module = f"NVRM version: NVIDIA UNIX x86_64 Kernel Module  {version}  Sat Aug 19 01:15:15 UTC 2023"
    (root / "proc/driver/nvidia/version").write_text(f"{module}\nGCC version:  gcc version 12.2.0 (Debian 12.2.0-14)\n")
    return root


class Library:
    """libcuda with the given attributes of each device; CUDA's errors for what it does not have."""

    def __init__(self, devices: Sequence[Mapping[int, int]], called: Callable[[], Any]) -> None:
        self.devices, self.called = devices, called

    def cuInit(self, flags: int) -> int:
        self.called()
        return 0 if self.devices else 100  # CUDA_ERROR_NO_DEVICE

    def cuDeviceGet(self, handle: Any, ordinal: int) -> int:
        handle._obj.value = ordinal + 7  # a handle is no ordinal
        return 0 if ordinal < len(self.devices) else 101  # CUDA_ERROR_INVALID_DEVICE

    def cuDeviceGetAttribute(self, value: Any, number: int, handle: Any) -> int:
        found = self.devices[handle.value - 7].get(number)
        value._obj.value = found or 0
        return 1 if found is None else 0  # CUDA_ERROR_INVALID_VALUE


def install(
    monkeypatch: pytest.MonkeyPatch | None,
    devices: Sequence[Mapping[int, int]] | None,
    called: Callable[[], Any] = lambda: None,
) -> None:
    """Let ctypes load the library, or fail if `devices` is None; without monkeypatch for good."""

    def load(name: Any, *arguments: Any, **options: Any) -> Any:
        if name != "libcuda.so.1":
            return CDLL(name, *arguments, **options)
        if devices is None:
            raise OSError(f"{name}: cannot open shared object file")
        return Library(devices, called)

    if monkeypatch is None:
        ctypes.CDLL = load  # type: ignore[misc,assignment]
    else:
        monkeypatch.setattr(ctypes, "CDLL", load)
