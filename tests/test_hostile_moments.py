"""A seeded part of benchmarks/hostile/moments.py: disturbed lives, started again, end as undisturbed ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks/hostile/moments.py"


def harness(out: Path, *options: str) -> dict[str, Any]:
    """What the harness finds in a process of its own, which forks the lives; it must end with 0."""
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parents[2]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), *options, "--out", str(out)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    found: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    assert run.returncode == 0, json.dumps(found.get("faults"), indent=1) or run.stderr[-3000:]
    assert json.loads(run.stdout.splitlines()[-1]) == found
    return found


@pytest.mark.timeout(280)
def test_a_kill_a_signal_and_a_full_disk_lose_nothing(tmp_path: Path) -> None:
    found = harness(tmp_path / "found.json", "--smoke")
    assert found["num_right"] == found["num_moments"] == 4
    assert sum(row["stopped"] for row in found["moments"].values()) == 4
    assert {name.split(", ")[1] for name in found["moments"]} == {"kill", "term", "int", "full"}


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_all_moments_and_cases(tmp_path: Path) -> None:
    found = harness(tmp_path / "found.json", "--count", "200")
    assert found["num_right"] == found["num_moments"] == 240
    events = {name.split(", ")[1] for name in found["moments"]}
    others = {"read_only", "clock", "cache removed", "cache replaced", "second", "cut"}
    assert events == {"kill", "term", "int", "full", *others}
