"""What a user runs, on the device: the tests with the mark `gpu`, and the quick start."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

from gpu.part import ERROR_LINES, Part
from gpu.plan import Plan

ROOT = Path(__file__).resolve().parents[2]


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
        part.put(
            f"{case.get('classname')}::{case.get('name')}",
            {"error": (each.text or each.get("message") or "").strip().splitlines()[-ERROR_LINES:]},
        )


def quickstart(part: Part, plan: Plan, device: torch.device) -> None:
    """The recipe `quickstart` and the exact export of its run; the dry run takes the recipe `tiny`."""
    recipe = "quickstart" if device.type == "cuda" else "tiny"
    with tempfile.TemporaryDirectory() as folder:
        run, merged = Path(folder) / "run", Path(folder) / "merged"
        part.attempt("train", qdora, "train", recipe, "--run-dir", str(run))
        part.attempt("metrics", metrics, run / "metrics.jsonl")
        part.attempt("export", qdora, "export", str(run), str(merged))
        part.attempt("verification", lambda: json.loads((merged / "export.json").read_text())["verification"])


def qdora(*arguments: str) -> dict[str, float]:
    """Seconds of a command."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "qdora.cli", "--quiet", *arguments]
    run = subprocess.run(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, check=False)
    if run.returncode != 0:
        raise RuntimeError(f"exit {run.returncode}\n{run.stderr[-2000:]}")
    return {"seconds": time.perf_counter() - began}


def metrics(path: Path) -> list[dict[str, Any]]:
    """The first and the last line of a run's steps."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    steps = [line for line in lines if "gradient_norm" in line]
    return [steps[0], steps[-1]]
