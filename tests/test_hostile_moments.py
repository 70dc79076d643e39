"""A seeded part of benchmarks/hostile/moments.py: disturbed lives, started again, end as undisturbed ones."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

from hostile import moments

from tests.launched import start_main


def harness(out: Path, *options: str) -> dict[str, Any]:
    """What the harness finds in a process of its own, which forks the lives; it must end with 0."""
    process = start_main(moments.main, "moments.py", *options, "--out", str(out), output=out.parent)
    process.join()
    found: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    assert process.exitcode == 0, found.get("faults") or (out.parent / "stderr").read_text()[-3000:]
    assert json.loads((out.parent / "stdout").read_text().splitlines()[-1]) == found
    return found


@pytest.mark.timeout(280)
def test_a_kill_a_signal_and_a_full_disk_lose_nothing(tmp_path: Path) -> None:
    found = harness(tmp_path / "found.json", "--smoke")
    assert found["num_right"] == found["num_moments"] == 4
    assert sum(row["stopped"] for row in found["moments"].values()) == 4
    assert {name.split(", ")[1] for name in found["moments"]} == {"kill", "term", "int", "full"}


def test_only_checkpoints_that_are_gone_as_a_whole_and_older_may_be_missing() -> None:
    kept = ["checkpoints/step-5/state.json", "checkpoints/step-6/state.json", "adapter/qdora.json"]
    assert moments.is_older_checkpoint("checkpoints/step-4/state.json", kept)
    assert not moments.is_older_checkpoint("checkpoints/step-5/complete.json", kept)
    assert not moments.is_older_checkpoint("checkpoints/step-7/state.json", kept)
    assert not moments.is_older_checkpoint("adapter/config.json", kept)
    assert not moments.is_older_checkpoint("b/checkpoints/step-4/state.json", [f"a/{name}" for name in kept])


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_all_moments_and_cases(tmp_path: Path) -> None:
    found = harness(tmp_path / "found.json", "--count", "200")
    assert found["num_right"] == found["num_moments"] == 240
    events = {name.split(", ")[1] for name in found["moments"]}
    others = {"read_only", "clock", "cache removed", "cache replaced", "second", "cut"}
    assert events == {"kill", "term", "int", "full", *others}
