"""qdora doctor: what this machine can do, and what to run where something is missing."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from qdora.files.machine import available_memory_bytes, driver_version, environment, unused_gpu

_BROKEN = "bitsandbytes does not work; 'python -m bitsandbytes' says why. Fix: pip install -U bitsandbytes"


def report() -> dict[str, Any]:
    """`environment` with driver, free memory and disk, and `problems`, as JSON values."""
    unused = unused_gpu()
    check = subprocess.run([sys.executable, "-m", "bitsandbytes"], capture_output=True)
    return environment() | {
        "driver": driver_version(),
        "available_memory_bytes": available_memory_bytes(),
        "free_disk_bytes": shutil.disk_usage(Path.cwd()).free,
        "problems": [*([unused] if unused else []), *([_BROKEN] if check.returncode else [])],
    }
