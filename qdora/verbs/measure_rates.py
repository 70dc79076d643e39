"""qdora doctor --measure: what this machine's products and memory reach, for the time that a plan predicts."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from qdora.atomic_files import atomic_write_json
from qdora.environment import cpu_name
from qdora.memory.plan_time import BYTES_PER_DEQUANTISED, STATED, Rates, rates_file
from qdora.ops.packed import dequantize, quantize

# (tokens, in, out) of the product; a layer of a 7B model on a GPU, and one that takes a CPU a fraction of a second.
_SHAPES = {"cuda": (2048, 4096, 11008), "cpu": (256, 2048, 5632)}
_COPIED_BYTES = 256 << 20
_WARM_UP_SECONDS, _SECONDS = 2.0, 8.0


def measure_rates(*, seconds: float = _SECONDS) -> dict[str, dict[str, Any]]:
    """Measure the CPU and, where there is one, the GPU; keep the result in the user's cache for later plans.

    FLOPs: a product of bf16 matrices of a layer's shape. Bytes: dequantising an NF4 weight, which is what moves most of
    a step's bytes. On a GPU also what comes from pinned host memory. The median over `seconds` of each counts.

    Returns:
        Device type -> `Rates.to_dict`.
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
    copied = STATED["cpu"].copied  # of the disk, which is not measured
    if kind == "cuda":
        source = torch.empty(_COPIED_BYTES, dtype=torch.uint8, pin_memory=True)
        target = torch.empty_like(source, device=device)
        copied = _COPIED_BYTES / _seconds_of(lambda: target.copy_(source, non_blocking=True), device, seconds)
    return Rates(name, flops, weight.numel() * BYTES_PER_DEQUANTISED / decoding, copied, measured=True)


def _seconds_of(action: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Median time of a call."""

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
        f"{each['bytes'] / 1e9:.0f} GB/s where weights are dequantised\n"
        for kind, each in found.items()
    )
