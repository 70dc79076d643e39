"""Benchmarks run: each with --smoke on a random model, to a result file with all its parts. Minutes in all: slow."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
ROOT = Path(__file__).parent.parent
_BENCH = re.compile(r"^@bench\(.*?^def (\w+)", re.MULTILINE | re.DOTALL)
BENCHES = {file.name: _BENCH.findall(file.read_text()) for file in sorted((ROOT / "benchmarks").glob("*.py"))}
BENCHES["killed_runs.py"] = BENCHES["quickstart.py"] = []  # test_killed_runs.py; the other installs packages
OPTIONS = {"load_memory": ["", "--experts"]}
CASES = [(file, name, more) for file, names in BENCHES.items() for name in names for more in OPTIONS.get(name, [""])]


def run_smoke(file: str, *options: str) -> str:
    """What a script prints."""
    call = [sys.executable, str(ROOT / "benchmarks" / file), *options, "--smoke"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(call, env=environment, capture_output=True, text=True, check=False, timeout=850)
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout


def step_time(result: Any) -> bool:
    (pair,), (peak,) = result["pairs"]["on"].values(), result["peaks"]["on"].values()
    seconds = result["time"]["on"]["seconds"]
    assert peak["peak_bytes"] > 0
    assert set(pair["seconds"]) == {"own_lora", "own_dora"} < set(seconds)
    return all(len(each) == 2 and min(each) > 0 for each in seconds.values())


def peft_time(result: Any) -> bool:
    found = [each for case in result["cases"].values() for each in case["bytes"].values()]
    return len(found) >= 3 * 3 and all(0 <= each["kept"] < each["held"] <= each["peak"] for each in found)


def step_memory(result: Any) -> bool:
    vocabulary, hidden, inner, layers, tokens, rank = 512, 64, 128, 2, 32, 16
    shapes = [(hidden, hidden)] * 2 + [(hidden // 2, hidden)] * 2 + [(inner, hidden)] * 2 + [(hidden, inner)]
    lora = layers * rank * sum(out + in_ for out, in_ in shapes)
    magnitudes = layers * sum(out for out, _ in shapes)
    for case in result["cases"].values():
        own, dora = (case["arms"][name]["peak_by_label"] for name in ("own_lora", "own_dora"))
        assert own["embeddings, head, norms"] == 2 * (2 * vocabulary + 2 * layers + 1) * hidden
        # Magnitude, squared norm of the base; norm, gain, 1 / m.
        assert own["adapters"] == 2 * lora == dora["adapters"] - 20 * magnitudes
        for arm in case["arms"].values():
            assert sum(arm["peak_by_label"].values()) == arm["peak_bytes"]
    checkpointed, *_ = (case["floor"]["held_bytes"] for case in result["cases"].values())
    inputs = 2 * layers * tokens * hidden
    # Beside the inputs of blocks a head's input, its gradient, the loss and the labels.
    return bool(inputs < checkpointed < inputs + 8 * tokens * hidden)


def load_memory(result: Any) -> bool:
    assert result["checkpoint_bytes"] > 3 * result["packed_model_bytes"] / 2
    return bool(0 < result["used_bytes"] <= result["allowed_bytes"])


def sharded_memory(result: Any) -> bool:
    found = [each["held_bytes"] for each in result["processes"].values()]
    assert found == [[each["planned_bytes"]] * number for number, each in enumerate(result["processes"].values(), 1)]
    return all(max(each["peak_bytes"]) <= each["allowed_peak_bytes"] for each in result["processes"].values())


def plan_accuracy(result: Any) -> bool:
    (case,) = result["cases"].values()
    # Of two megabytes in all; the bar of 3 % is for models of real runs.
    assert abs(case["planned_tensor_bytes"] - case["measured_tensor_bytes"]) < 2**19
    return bool(case["process_bytes"] < case["measured_rss_bytes"])


def plan_recipes(result: Any) -> bool:
    for each in result["plans"].values():
        assert not each["num_streamed"] or each["components"]["streaming slots"] == 2 * each["block_bytes"]
        assert not each["num_streamed"] or each["host_bytes"] > 0
        assert each["fits"]
    return any(each["num_streamed"] for each in result["plans"].values())


def which_card(result: Any) -> bool:
    (case,) = result["cases"].values()
    assert all(0.98 < share <= 1 for share in case["checked"].values())
    assert case["checked"]
    longest = [[found["device"], found["streamed"]] for found in case["longest"].values()]
    assert longest == sorted(longest)
    return bool(0 < longest[0][0] < longest[0][1] < longest[-1][1] == case["context"])


def architectures(result: Any) -> bool:
    for row in result["families"].values():
        assert (row["failed"], row["resumed"]) == ({}, True)
        assert max(row["merged"], row["gradients"]) < 1e-4
        assert row["packing"] < 1e-5
    return [each["num_adapted"] for each in result["families"].values()] == [14, 8, 18]


def export_exactness(result: Any) -> bool:
    exact = result["forms"]["float32"]
    worst = {form: each["max_logit_difference"] / result["logit_spread"] for form, each in exact.items()}
    assert worst["reference"] == 0
    assert max(worst[form] for form in ("merged", "nf4-lora", "PEFT running")) < 1e-3 < worst["base"]
    assert exact["merged"]["nll_per_token"] == pytest.approx(result["reference_nll_per_token"], abs=1e-4)
    return worst["merged"] < worst["requantised"]


def checkpoints(result: Any) -> bool:
    (row,) = result["checkpoints"].values()
    assert (row["failed"], row["refused"], row["resumed"]) == ({}, {}, True)
    return bool(row["equal_layers"] == row["layers"] == 14 and row["equal_logits"])


CHECKS: tuple[Callable[[Any], bool], ...] = (step_time, peft_time, step_memory, load_memory, sharded_memory)
CHECKS += (plan_accuracy, plan_recipes, which_card, architectures, export_exactness, checkpoints)
"""What the result of a benchmark of this name has, where there is more to say than that it ran."""


@pytest.mark.parametrize("file, name, more", CASES)
def test_a_smoke_run_measures_what_it_should(file: str, name: str, more: str, tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    options = [*([name] if len(BENCHES[file]) > 1 else []), *more.split(), "--out", str(out)]
    printed = run_smoke(file, *options, *(["--work", str(tmp_path)] if name == "sharded_memory" else []))
    result: dict[str, Any] = json.loads(out.read_text())
    assert json.loads(printed.splitlines()[-1]) == result
    assert all(check(result) for check in CHECKS if check.__name__ == name)


def test_study(tmp_path: Path) -> None:
    out, place = tmp_path / "out", ["--dir", str(tmp_path / "study")]
    # Predicted before it runs, interrupted at once, run, and run again when all cells are there
    for more in (["--dry-run"], ["--hours", "0"], [], []):
        run_smoke("study.py", *place, "--out", str(out), *more)
        assert (out / "arms.csv").exists() == (not more)
    with (out / "arms.csv").open(newline="") as file:
        arms = {(row["base"], row["adapter"], row["kind"]): row for row in csv.DictReader(file)}
    pairs = [(base, kind) for base in ("16 bits", "nf4", "Wanda 2:4") for kind in ("LoRA", "DoRA")]
    assert {key[:2] for key in arms if key[2] == "trained"} == {*pairs, ("Wanda 2:4", "DoRA, masked")}
    assert all(row["num_seeds"] == "3" and row["num_missing"] == "0" for key, row in arms.items() if key[2] != "base")
    again = [sys.executable, str(ROOT / "benchmarks/recompute_study.py"), str(out)]
    assert subprocess.run(again, capture_output=True, timeout=280).returncode == 0
    shutil.rmtree(tmp_path / "study")  # as on another machine
    assert "main: 18 cells, 18 done" in run_smoke("study.py", *place, "--resume-from", str(out), "--dry-run")
