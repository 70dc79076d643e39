"""What the card is and what it can do at most: the floors that every other number stands beside."""

from __future__ import annotations

import os
import subprocess
from typing import Any

import torch
from measure import PACKAGES

from gpu import device as on
from gpu.part import Part
from gpu.plan import Plan
from qdora.files.environment import environment, package_versions
from qdora.ops import bnb_kernels


def run(part: Part, plan: Plan, device: torch.device) -> None:
    """Versions, switches that change numbers, and two floors."""
    part.attempt("environment", environment)
    part.attempt("versions", package_versions, (*PACKAGES, "accelerate", "datasets"))
    part.attempt("nvidia_smi", nvidia_smi)
    part.attempt("memory_bytes", lambda: torch.cuda.mem_get_info() if device.type == "cuda" else None)
    matmul = torch.backends.cuda.matmul
    part.put("reduced_precision", [str(matmul.allow_bf16_reduced_precision_reduction), str(matmul.allow_tf32)])
    part.attempt("bnb_runs_here", bnb_kernels.is_available, device.type)
    side = 8192 if device.type == "cuda" else 128
    part.attempt("floors", floors, device, side)


def nvidia_smi() -> dict[str, str] | None:
    """What nvidia-smi says of the first card that is visible, None where it is missing. It makes no CUDA context."""
    fields = ("name", "driver_version", "memory.total", "clocks.max.sm", "power.limit")
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "").partition(",")[0] or "0"
    call = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "-i", first]
    try:
        line = subprocess.run(call, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return dict(zip(fields, (each.strip() for each in line.split(",")), strict=True))


def floors(device: torch.device, side: int) -> dict[str, Any]:
    """FLOP/s of a square bf16 product, bytes a second of a copy (read and written), to and from pinned memory."""
    left, right = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    target, host = torch.empty_like(left), torch.empty(left.shape, dtype=left.dtype, pin_memory=device.type == "cuda")
    functions = {
        "product": lambda: left @ right,
        "copy": lambda: target.copy_(left),
        "to the device": lambda: target.copy_(host, non_blocking=True),
        "to the host": lambda: host.copy_(target, non_blocking=True),
    }
    seconds = {name: found["lower"] for name, found in on.spreads(on.in_turns(device, functions, 10, 0.01)).items()}
    return {
        "bf16_matmul_tflops": 2 * side**3 / seconds["product"] / 1e12,
        "copy_bytes_per_second": 2 * left.nbytes / seconds["copy"],
        "to_device_bytes_per_second": left.nbytes / seconds["to the device"],
        "to_host_bytes_per_second": left.nbytes / seconds["to the host"],
    }
