"""The benchmarks of memory plans run: each with --smoke on tiny models. Minutes in all: slow."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.test_benchmarks import smoke

pytestmark = pytest.mark.slow


def test_plan_accuracy(tmp_path: Path) -> None:
    result = smoke(tmp_path, "plan_accuracy.py")
    (case,) = result["cases"].values()
    # Of two megabytes in all; the bar of 3 % is for models of real runs.
    assert abs(case["planned_tensor_bytes"] - case["measured_tensor_bytes"]) < 2**19
    assert case["process_bytes"] < case["measured_rss_bytes"]


def test_plan_shapes(tmp_path: Path) -> None:
    (shape,) = smoke(tmp_path, "plan_shapes.py")["shapes"].values()
    assert shape["fits"]
    assert sum(shape["components"].values()) == shape["peak_bytes"]


def test_plan_recipes(tmp_path: Path) -> None:
    result = smoke(tmp_path, "plan_recipes.py")
    resident, streamed = list(result["plans"])[:4], list(result["plans"])[4:]
    assert resident == ["commonsense-8b-40gb", "commonsense-13b-40gb", "qwen3-30b-a3b-24gb", "gpt-oss-20b-24gb"]
    assert streamed == ["llama-8b-8gb", "qwen-32b-24gb", "llama-70b-40gb"]
    assert all(result["passes"].values())
    assert not any(result["plans"][name]["num_streamed"] for name in resident)
    for each in map(result["plans"].__getitem__, streamed):
        assert each["components"]["streaming slots"] == 2 * each["block_bytes"]
        assert each["host_bytes"] > 0


def test_expert_plans(tmp_path: Path) -> None:
    (shape,) = smoke(tmp_path, "expert_plans.py")["shapes"].values()
    assert shape["even_routing_bytes"] <= shape["peak_bytes"]
    (card,) = shape["cards"].values()
    assert card["num_streamed"] <= shape["num_blocks"]
    assert card["fits"] == (card["peak_bytes"] <= 630 * 2**20)
