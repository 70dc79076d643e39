"""How fast a device computes and copies: stated rates, and measured ones (`qdora doctor --measure`)."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from qdora.files.atomic import atomic_write_json
from qdora.files.environment import cpu_name
from qdora.ops.packed import dequantize, quantize
from qdora.plan.plan_contents import DeviceKind

BYTES_PER_DEQUANTISED = 4.6
"""Bytes moved for each dequantised weight: read packed (0.5), write and read the dense tile (2 + 2), and scales."""


@dataclass(frozen=True)
class Rates:
    """What a device does in a second: FLOPs reached (not the peak) in a 16-bit product of a layer's shape, bytes of
    memory that an elementwise kernel moves, and bytes copied from host memory (read from disk on a CPU).
    """

    name: str
    flops: float
    bytes: float
    copied: float
    measured: bool = False

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


STATED: Mapping[DeviceKind, Rates] = {
    # NVIDIA's A100 40 GB data sheet: half of 312 TFLOP/s, 80 % of 1,555 GB/s, and 80 % of PCIe 4.0's 31.5 GB/s
    "cuda": Rates("A100 40GB (stated)", 156e12, 1.2e12, 25e9),
    # Two cores with AVX512-BF16 (benchmarks, layer times); the disk of a rented machine, a round number
    "cpu": Rates("two CPU cores (stated)", 1e12, 10e9, 1e9),
}


def rates_file() -> Path:
    """The file of the measured rates."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "qdora" / "rates.json"


def known_rates(device_kind: DeviceKind) -> Rates:
    """The rates measured on this machine by `qdora doctor --measure`, else the stated ones."""
    try:
        found = json.loads(rates_file().read_text(encoding="utf-8"))[device_kind]
        copied = float(found.get("copied", STATED[device_kind].copied))
        return Rates(str(found["name"]), float(found["flops"]), float(found["bytes"]), copied, measured=True)
    except (OSError, ValueError, KeyError, TypeError):
        return STATED[device_kind]


# (tokens, in, out) of the product: a layer of a 7B model on a GPU, a layer that takes a fraction of a second on a CPU
_SHAPES = {"cuda": (2048, 4096, 11008), "cpu": (256, 2048, 5632)}
_COPIED_BYTES = 256 << 20
_WARM_UP_SECONDS, _SECONDS = 2.0, 8.0


def measure_rates(*, seconds: float = _SECONDS) -> dict[str, dict[str, Any]]:
    """Measure the CPU and the GPU, if there is one; keep the rates in the user's cache for later plans.

    FLOPs: a product of bf16 matrices of a layer's shape. Bytes: dequantising an NF4 weight, which moves most of a
    step's bytes. Copies, on a GPU: from pinned host memory. Each rate is the median over `seconds`.
    """
    kinds = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    found = {kind: _measure(kind, seconds).to_dict() for kind in kinds}
    path = rates_file()
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_json(path, {**(known if isinstance(known, dict) else {}), **found})
    return found


def _measure(kind: str, seconds: float) -> Rates:
    device = torch.device(kind)
    tokens, in_features, out_features = _SHAPES[kind]
    x = torch.randn(tokens, in_features, device=device).bfloat16()
    weight = torch.randn(out_features, in_features, device=device).bfloat16()
    packed = quantize(weight, "nf4")
    product = _seconds_of(lambda: x @ weight.T, device, seconds)
    decoding = _seconds_of(lambda: dequantize(packed, torch.bfloat16), device, seconds)
    name = torch.cuda.get_device_name() if kind == "cuda" else f"{cpu_name()}, {torch.get_num_threads()} threads"
    flops = 2.0 * tokens * in_features * out_features / product
    copied = STATED["cpu"].copied  # the disk is not measured
    if kind == "cuda":
        source = torch.empty(_COPIED_BYTES, dtype=torch.uint8, pin_memory=True)
        target = torch.empty_like(source, device=device)
        copied = _COPIED_BYTES / _seconds_of(lambda: target.copy_(source, non_blocking=True), device, seconds)
    return Rates(name, flops, weight.numel() * BYTES_PER_DEQUANTISED / decoding, copied, measured=True)


def _seconds_of(action: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Median time of a call, after a warm-up."""

    def timed() -> float:
        began = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    began = time.perf_counter()
    while time.perf_counter() - began < min(_WARM_UP_SECONDS, seconds):
        timed()
    found: list[float] = []
    began = time.perf_counter()
    while not found or time.perf_counter() - began < seconds:
        found.append(timed())
    return statistics.median(found)


def rates_text(found: dict[str, dict[str, Any]]) -> str:
    """A line for each device."""
    return "".join(
        f"{kind:<10}{each['name']}: {each['flops'] / 1e12:.2f} TFLOP/s in bf16 products, "
        f"{each['bytes'] / 1e9:.0f} GB/s when weights are dequantised\n"
        for kind, each in found.items()
    )
