"""NVIDIA's driver: what it says of a GPU, and why torch can use no GPU of this machine."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
from contextlib import suppress
from pathlib import Path

from qdora.errors import UserError, first_line

ROOT = Path("/")

# CUdevice_attribute in cuda.h
CAPABILITY_MAJOR, CAPABILITY_MINOR, CONCURRENT_MANAGED_ACCESS, VIRTUAL_MEMORY_MANAGEMENT = 75, 76, 89, 102

_OLDEST_DRIVER = {"12": 525, "13": 580}
"""CUDA's major version -> the oldest driver for it (docs.nvidia.com/deploy/cuda-compatibility)."""


def device_attribute(number: int, device: int = 0) -> int | None:
    """An attribute of a visible GPU as the driver itself knows it; None without a driver or such a GPU.

    Initialises CUDA, as torch.cuda.is_available() does: a process that is forked later cannot use a GPU.
    """
    handle, value = ctypes.c_int(), ctypes.c_int()
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    failed = cuda.cuInit(0) or cuda.cuDeviceGet(ctypes.byref(handle), device)
    failed = failed or cuda.cuDeviceGetAttribute(ctypes.byref(value), number, handle)
    return None if failed else value.value


def driver_version() -> str | None:
    """Version of the driver, such as '580.65.06'; None if there is none."""
    with suppress(OSError):
        text = (ROOT / "proc/driver/nvidia/version").read_text(encoding="utf-8")
        if found := re.search(r"\b\d{3}\.\d[.\d]*", text):
            return found[0]
    return _version_by_smi()


def _version_by_smi() -> str | None:
    """The driver's version if nvidia-smi lists a GPU: WSL2 has no device nodes and nothing in /proc."""
    with suppress(OSError):
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True)
        return done.stdout.split()[0] if done.returncode == 0 and done.stdout.strip() else None
    return None


def check_gpu() -> None:
    """UserError if a run would compute on the CPU though this machine has a GPU."""
    if (found := unused_gpu()) is not None:
        raise UserError("{}. Fix: {}.".format(*found))


def unused_gpu() -> tuple[str, str] | None:
    """Why torch can use no GPU though this machine has one of NVIDIA's, and what to do about it.

    None if torch can use one, if there is none, or if CUDA_VISIBLE_DEVICES hides them all.
    """
    import torch

    if torch.cuda.is_available() or os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1"):
        return None
    nodes = sorted(ROOT.glob("dev/nvidia[0-9]*"))
    if not nodes and _version_by_smi() is None:
        return None
    cuda, driver = torch.version.cuda, driver_version()
    oldest = _OLDEST_DRIVER.get((cuda or "").partition(".")[0], 0)
    fix = "install a newer driver or another build of torch (pytorch.org/get-started/locally)"
    if cuda is None:
        why = f"torch {torch.__version__} is built without CUDA"
    elif driver is not None and int(driver.partition(".")[0]) < oldest:
        why = f"its CUDA {cuda} needs driver {oldest} or newer, and the driver is {driver}"
    elif nodes and not any(os.access(node, os.R_OK | os.W_OK) for node in nodes):
        why, fix = f"no permission to open {nodes[0]}", "ask an administrator for access"
    else:
        try:
            torch.cuda.init()  # type: ignore[no-untyped-call]
            why, fix = "no reason given", "look into nvidia-smi"
        except RuntimeError as error:
            why, fix = first_line(error), "look into nvidia-smi"
    cpu = "put CUDA_VISIBLE_DEVICES= before qdora to compute on the CPU"
    return f"torch cannot use the NVIDIA GPU: {why}", f"{fix}, or {cpu}"
