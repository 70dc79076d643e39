"""qdora doctor: what this machine can do, and what to run where something is missing."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from qdora.errors import first_line
from qdora.files.machine import available_memory_bytes, driver_version, environment, unused_gpu

_MAX_NF4_ERROR = 0.12  # the relative error of Gaussian weights at block 64 is 0.092
_IN_OWN_PROCESS = "import sys; from qdora.run.doctor import kernel_error; sys.exit(kernel_error('cuda'))"


def report() -> dict[str, Any]:
    """`environment` with driver, kernels, free memory and disk, and `problems`, as JSON values."""
    unused, works = unused_gpu(), kernels()
    text, fix = "bitsandbytes does not work on", "Fix: pip install -U bitsandbytes"
    problems = [f"{text} {device}: {error}. {fix}" for device, error in works.items() if error]
    return environment() | {
        "driver": driver_version(),
        "bitsandbytes": works,
        "available_memory_bytes": available_memory_bytes(),
        "free_disk_bytes": shutil.disk_usage(Path.cwd()).free,
        "problems": [*([unused] if unused else []), *problems],
    }


def kernels() -> dict[str, str | None]:
    """`kernel_error` of the CPU and of the GPU if torch sees one, in a process of its own: a CUDA error ends it."""
    import torch

    found = {"cpu": kernel_error("cpu")}
    if torch.cuda.is_available():
        done = subprocess.run([sys.executable, "-c", _IN_OWN_PROCESS], capture_output=True, text=True)
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        found["cuda"] = said[-1] if done.returncode else None
    return found


def kernel_error(device: str) -> str | None:
    """What is wrong with bitsandbytes on a device; None if it quantises weights as it should."""
    import torch

    try:
        from bitsandbytes import functional

        weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).to(device)
        packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
        error = float((functional.dequantize_4bit(packed, state) - weight).norm() / weight.norm())
    except (ImportError, OSError, RuntimeError, AttributeError) as failure:
        return first_line(failure)
    return None if error < _MAX_NF4_ERROR else f"values are off by {error:.2f}, expected 0.09"
