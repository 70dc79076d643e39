"""The benchmarks of memory plans run: each with --smoke on tiny models."""

from __future__ import annotations

from pathlib import Path

from tests.test_benchmarks import smoke


def test_plan_accuracy(tmp_path: Path) -> None:
    result = smoke(tmp_path, "plan_accuracy.py")
    assert len(result["cases"]) == 2
    for case in result["cases"].values():
        assert abs(case["tensor_ratio"] - 1) < 0.05
        assert case["process_bytes"] < case["measured_rss_bytes"]


def test_plan_shapes(tmp_path: Path) -> None:
    (shape,) = smoke(tmp_path, "plan_shapes.py")["shapes"].values()
    assert shape["fits"]
    assert sum(shape["components"].values()) == shape["peak_bytes"]
