"""A seeded part of benchmarks/killed_runs.py: disturbed lives, started again, end as undisturbed ones."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import frame
import killed_runs

from tests.support import start_main


@pytest.mark.parametrize(
    "options, number, least_stopped",
    [
        pytest.param(["--smoke"], 4, 4, marks=pytest.mark.timeout(280)),
        pytest.param(["--count", "200"], 200, 150, marks=[pytest.mark.slow, pytest.mark.timeout(3600)]),
    ],
)
def test_a_kill_a_signal_and_a_full_disk_lose_nothing(
    tmp_path: Path, options: list[str], number: int, least_stopped: int
) -> None:
    """In a process of its own, which forks the lives."""
    out = tmp_path / "found.json"
    process = start_main(
        partial(frame.main, [*options, "--out", str(out)], killed_runs.__name__), "killed_runs.py", output=tmp_path
    )
    process.join()
    assert process.exitcode == 0, (tmp_path / "stderr").read_text()[-3000:]
    found = json.loads(out.read_text())
    assert found["faults"] == []
    assert found["num_right"] == found["num_moments"] == number
    assert sum(row["stopped"] for row in found["moments"].values()) >= least_stopped
    events = {name.split(", ")[1] for name in found["moments"]}
    assert events == {"kill", "term", "int", "full"} | ({"read_only"} if number > 4 else set())
