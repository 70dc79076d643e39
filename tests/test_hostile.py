"""The harness of hostile inputs: its judge finds what it must, and a few seeded cases of each part are right."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

from hostile import judge, parts
from hostile.judge import Case, judged
from hostile.report import of_cases

from qdora.errors import RunFailure, UserError


def case(read: Callable[[Path], Any], *, size: int = 10, **settings: Any) -> Case:
    return Case(
        part="own", number=0, what="x", write=lambda _: size, read=read, judge=lambda _: ("right", "read"), **settings
    )


def refuse(error: BaseException) -> Callable[[Path], Any]:
    def read(_: Path) -> Any:
        raise error

    return read


def spin(_: Path) -> None:
    while True:
        pass


def write_outside(folder: Path) -> None:
    (folder.parent / "escaped").write_text("x")


def change_canary(folder: Path) -> None:
    os.system(f"echo x > {folder.parent}/canary/secret.json")


@pytest.mark.parametrize(
    ("read", "verdict", "happened"),
    [
        (lambda _: 1, "right", "read"),
        (refuse(UserError("a.yaml: x: got 1, must be 2.")), "clear", "a.yaml: x"),
        (refuse(KeyError("x")), "fault", "exit 1 at tests/test_hostile.py"),
        (refuse(RunFailure("full")), "fault", "exit 1, which is for failures"),
        (refuse(KeyboardInterrupt()), "fault", "exit 130"),
        (refuse(UserError("")), "fault", "no clear line"),
        (refuse(UserError(*["a: b"] * 20)), "fault", "no clear line: 20 lines"),
        (refuse(MemoryError()), "fault", "exit 1"),
        (lambda _: len(bytearray(200 << 20)), "fault", "MiB for files of 0 MiB"),
        (lambda _: bytearray(1 << 40), "fault", "MemoryError"),
        (lambda _: os.abort(), "fault", "dies of SIGABRT"),
        (spin, "fault", "hangs"),
        (lambda _: time.sleep(60), "fault", "waits"),
        (write_outside, "fault", "outside its directory"),
        (change_canary, "fault", "outside its directory"),
        (lambda folder: (folder.parent / "canary" / "secret.json").read_text(), "fault", "leaves its directory: reads"),
    ],
)
def test_the_judge_finds_every_way_to_be_wrong(
    read: Callable[[Path], Any], verdict: str, happened: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if happened == "hangs":
        monkeypatch.setattr(judge, "SECONDS", 0)
    if happened == "waits":
        monkeypatch.setattr(judge, "WAIT", 1)
    found = judged(case(read), tmp_path / "judged")
    assert found.verdict == verdict
    assert happened in found.happened


def test_memory_is_measured_beside_the_file(tmp_path: Path) -> None:
    fine = judged(case(lambda _: len(bytearray(200 << 20)), size=100 << 20), tmp_path / "judged")
    assert fine.verdict == "right"
    assert 190 << 20 < fine.memory_bytes < 220 << 20


def test_a_refusal_of_what_did_not_change_is_a_fault(tmp_path: Path) -> None:
    found = judged(case(refuse(UserError("a: b")), may_refuse=False), tmp_path / "judged")
    assert found.verdict == "fault"
    assert "its meaning is unchanged" in found.happened


@pytest.mark.parametrize(("part", "count"), [("recipes", 12), ("data", 10), ("stored", 3)])
def test_some_cases_of_each_part_are_right(part: str, count: int, tmp_path: Path) -> None:
    outcomes = parts.run(part, 0, count, tmp_path)
    result = of_cases(outcomes, 0)
    assert result["tried"] == count
    assert result["clear_lines"] + result["right_results"] + result["undetectable"] == count, json.dumps(
        result, indent=1
    )
    assert result["clear_lines"] > 0


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("part", parts.COUNTS)
def test_all_cases_of_each_part_are_right(part: str, tmp_path: Path) -> None:
    """By the program itself: tests before this one have changed how the allocator of their process frees memory."""
    out = tmp_path / "found.json"
    program = Path(__file__).resolve().parent.parent / "benchmarks/hostile.py"
    done = subprocess.run([sys.executable, program, "--part", part, "--out", out], capture_output=True, text=True)
    result = json.loads(out.read_text())["parts"][part]
    assert result["tried"] == parts.COUNTS[part]
    assert (done.returncode, result["new_faults"]) == (0, 0), json.dumps(result["faults"], indent=1)
