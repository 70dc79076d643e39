"""What is the card, and do a user's programs run on it? Its floors, the tests with the mark `gpu`, the quick start."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
from measure import PACKAGES

from gpu import device as on
from gpu.plan import ERROR_LINES, Part, Plan
from qdora.files.machine import environment, package_versions
from qdora.quant import kernels

ROOT = Path(__file__).resolve().parents[2]


def card(part: Part, plan: Plan, device: torch.device) -> None:
    """Versions, switches that change numbers, and the floors that every other number stands beside."""
    part.attempt("environment", environment)
    part.attempt("versions", package_versions, (*PACKAGES, "accelerate", "datasets"))
    part.attempt("nvidia_smi", nvidia_smi)
    part.attempt("memory_bytes", lambda: torch.cuda.mem_get_info() if device.type == "cuda" else None)
    matmul = torch.backends.cuda.matmul
    part.put("reduced_precision", [str(matmul.allow_bf16_reduced_precision_reduction), str(matmul.allow_tf32)])
    part.attempt("bnb_runs_here", kernels.is_available, device.type)
    part.attempt("floors", floors, device, 8192 if device.type == "cuda" else 128)


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


def tests(part: Part, plan: Plan, device: torch.device) -> None:
    """`pytest -m gpu` of the files that have such tests. -s: what a library prints before it ends the process stays."""
    files = [str(path) for path in (ROOT / "tests").glob("test_*.py") if "pytest.mark.gpu" in path.read_text()]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        options = ["-m", "gpu", "-s", "-v", "-p", "no:cacheprovider", f"--junitxml={report}"]
        run = subprocess.run([sys.executable, "-m", "pytest", *options, *sorted(files)], cwd=ROOT, check=False)
        if not report.is_file():
            raise RuntimeError(f"pytest ended with exit code {run.returncode}")
        cases = list(ElementTree.parse(report).iter("testcase"))
    bad = [(case, each) for case in cases for each in case if each.tag in ("failure", "error")]
    skipped = sum(case.find("skipped") is not None for case in cases)
    part.put("passed", len(cases) - skipped - len(bad))
    part.put("skipped", {"number": skipped, "ok": device.type == "cpu" or skipped < len(cases)})
    for case, each in bad:
        lines = (each.text or each.get("message") or "").strip().splitlines()[-ERROR_LINES:]
        part.put(f"{case.get('classname')}::{case.get('name')}", {"error": lines})


def quickstart(part: Part, plan: Plan, device: torch.device) -> None:
    """The recipe `quickstart` and the exact export of its run; the dry run takes the recipe `tiny`."""
    recipe = "quickstart" if device.type == "cuda" else "tiny"

    def metrics(path: Path) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        steps = [line for line in lines if "gradient_norm" in line]
        return [steps[0], steps[-1]]

    with tempfile.TemporaryDirectory() as folder:
        run, merged = Path(folder) / "run", Path(folder) / "merged"
        part.attempt("train", qdora, "train", recipe, "--run-dir", str(run))
        part.attempt("metrics", metrics, run / "metrics.jsonl")
        part.attempt("export", qdora, "export", str(run), str(merged))
        part.attempt("verification", lambda: json.loads((merged / "export.json").read_text())["verification"])


def qdora(*arguments: str) -> dict[str, float]:
    began = time.perf_counter()
    command = [sys.executable, "-m", "qdora.cli", "--quiet", *arguments]
    run = subprocess.run(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, check=False)
    if run.returncode != 0:
        raise RuntimeError(f"exit {run.returncode}\n{run.stderr[-2000:]}")
    return {"seconds": time.perf_counter() - began}
