"""qdora doctor: what this machine can do, and what to run where something is missing."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from qdora.errors import first_line
from qdora.files import nvidia_driver as driver
from qdora.files.environment import available_memory_bytes, environment

GIB = 2**30
_MAX_NF4_ERROR = 0.12  # the relative error of Gaussian weights at block 64 is 0.092
_IN_OWN_PROCESS = "import sys; from qdora.run.doctor import kernel_error; sys.exit(kernel_error('cuda'))"


def report() -> dict[str, Any]:
    """`environment` with the driver, kernels, free memory and disk, as plain data for JSON.

    `bitsandbytes` says per device type what is wrong with its kernels, `problems` what is wrong, each with advice.
    """
    capability = [driver.device_attribute(number) for number in (driver.CAPABILITY_MAJOR, driver.CAPABILITY_MINOR)]
    found = environment() | {
        "driver": driver.driver_version(),
        "capability": None if None in capability else "{}.{}".format(*capability),
        "unused_gpu": driver.unused_gpu(),
        "bitsandbytes": kernels(),
        "available_memory_bytes": available_memory_bytes(),
        "free_disk_bytes": shutil.disk_usage(Path.cwd()).free,
    }
    return found | {"problems": problems(found)}


def problems(found: dict[str, Any]) -> list[dict[str, str]]:
    """What is missing or wrong in a report, each with advice."""
    said = [] if found["unused_gpu"] is None else [found["unused_gpu"]]
    said += [
        (f"bitsandbytes does not work on {device}: {error}", "pip install -U bitsandbytes")
        for device, error in found["bitsandbytes"].items()
        if error is not None
    ]
    said += [  # torch's own test also accepts emulation
        (f"{device['name']} does not compute in bfloat16", "set model.dtype: float16 or float32")
        for device in found["devices"]
        if float(device["capability"]) < 8.0
    ]
    return [{"problem": problem, "advice": advice} for problem, advice in said]


def report_text(found: dict[str, Any]) -> str:
    """A report for people: one line per subject, then the problems, with advice."""
    gpus = [
        f"{gpu['name']}, {_gib(gpu['memory_bytes'])} GiB, compute capability {gpu['capability']}"
        for gpu in found["devices"]
    ]
    versions = [f"{name} {version}" for name, version in found["packages"].items() if version]
    works = [f"{name} {'fails' if error else 'works'}" for name, error in found["bitsandbytes"].items()]
    unused = "none"
    if found["unused_gpu"] is not None:
        unused = f"none that torch can use, compute capability {found['capability'] or 'unknown'}"
    lines = {
        "qdora": f"{found['qdora']}, Python {found['python']}",
        "packages": ", ".join(versions),
        "GPU": "; ".join(gpus) or unused,
        "CUDA": f"{found['cuda'] or 'none'} in torch, driver {found['driver'] or 'none'}",
        "CPU": f"{found['cpu']}, {found['num_cpus']} cores",
        "memory": f"{_gib(found['available_memory_bytes'])} of {_gib(found['memory_bytes'])} GiB available",
        "disk": f"{_gib(found['free_disk_bytes'])} GiB free here",
        "4-bit": f"bitsandbytes: {', '.join(works)}",
    }
    text = "".join(f"{name:<10}{line}\n" for name, line in lines.items())
    advice = "".join(f"! {each['problem']}. Fix: {each['advice']}\n" for each in found["problems"])
    return text + (advice or "no problems found\n")


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
    """What is wrong with bitsandbytes on a device; None if it quantises weights, and pages memory, as it should."""
    import torch

    try:
        from bitsandbytes import functional

        weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).to(device)
        packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
        error = float((functional.dequantize_4bit(packed, state) - weight).norm() / weight.norm())
        if device == "cuda" and driver.device_attribute(driver.CONCURRENT_MANAGED_ACCESS):
            page = functional.get_paged(4096)
            functional.prefetch_tensor(page)
            functional.fill(page, 1.0)
            if float(page.sum()) != 4096:
                return "a page of managed memory has wrong values"
    # A library that does not load, an operation without a kernel, a driver that does not fit
    except (ImportError, OSError, RuntimeError, AttributeError, NotImplementedError) as failure:
        return first_line(failure)
    return None if error < _MAX_NF4_ERROR else f"values are off by {error:.2f}, expected 0.09"


def _gib(num_bytes: int | None) -> str:
    return "unknown" if num_bytes is None else f"{num_bytes / GIB:.1f}"
