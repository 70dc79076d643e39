"""What the card is and what it can do at most: the floors that every other number stands beside."""

from __future__ import annotations

import os
import statistics
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
    part.attempt("versions", lambda: package_versions((*PACKAGES, "triton", "accelerate", "datasets")))
    part.attempt("nvidia_smi", nvidia_smi)
    part.attempt("switches", switches)
    part.attempt("bnb_runs_here", lambda: bnb_kernels.is_available(device.type))
    side = 8192 if device.type == "cuda" else 128
    part.attempt("bf16_matmul_tflops", lambda: matmul_tflops(device, side))
    part.attempt("copy_bytes_per_second", lambda: copy_speed(device, side))


def nvidia_smi() -> dict[str, str] | None:
    """What nvidia-smi says of the first card that is visible, None where it is missing. It makes no CUDA context."""
    fields = ("name", "driver_version", "memory.total", "clocks.max.sm", "power.limit")
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "").partition(",")[0]
    call = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", *(["-i", first] if first else [])]
    try:
        run = subprocess.run(call, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    lines = run.stdout.strip().splitlines()
    return dict(zip(fields, (each.strip() for each in lines[0].split(",")), strict=False)) if lines else None


def switches() -> dict[str, Any]:
    """Settings of torch under which the products run."""
    matmul = torch.backends.cuda.matmul
    return {
        "bf16_reduced_precision_reduction": str(matmul.allow_bf16_reduced_precision_reduction),
        "tf32": str(matmul.allow_tf32),
        "cudnn": torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None,
    }


def matmul_tflops(device: torch.device, side: int) -> float:
    """Of a square bf16 product, the best half of ten samples."""
    left, right = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    return 2 * side**3 / _seconds(device, lambda: left @ right) / 1e12


def copy_speed(device: torch.device, side: int) -> float:
    """Bytes read and written per second by a copy."""
    source = torch.randn(side, side, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / _seconds(device, lambda: target.copy_(source))


def _seconds(device: torch.device, function: Any) -> float:
    on.timed(device, function, 3)
    samples = sorted(on.timed(device, function, 3).seconds for _ in range(10))
    return statistics.median(samples[:5])
