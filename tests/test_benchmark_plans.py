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


def test_plan_recipes(tmp_path: Path) -> None:
    result = smoke(tmp_path, "plan_recipes.py")
    resident, streamed = list(result["plans"])[:4], list(result["plans"])[4:]
    assert resident == ["commonsense-8b-40gb", "commonsense-13b-40gb", "qwen3-30b-a3b-24gb", "gpt-oss-20b-24gb"]
    several = ["llama-70b-2x24gb", "llama-405b-8x80gb"]
    assert streamed == ["qwen3-30b-a3b-8gb", "llama-8b-8gb", "qwen-32b-24gb", "llama-70b-40gb", *several]
    streamed.remove("llama-405b-8x80gb")
    resident.append("llama-405b-8x80gb")
    ways = {name: [way["way"] for way in result["plans"][name]["ways"]] for name in several}
    assert ways == {several[0]: ["replicate", "shard", "stream"], several[1]: ["replicate", "shard"]}
    shard = result["plans"][several[1]]["ways"][1]
    assert shard["peak_bytes"] == result["plans"][several[1]]["peak_bytes"]
    assert all(result["passes"].values())
    assert not any(result["plans"][name]["num_streamed"] for name in resident)
    for each in map(result["plans"].__getitem__, streamed):
        assert each["components"]["streaming slots"] == 2 * each["block_bytes"]
        assert each["host_bytes"] > 0


def test_several_cards(tmp_path: Path) -> None:
    result = smoke(tmp_path, "several_cards.py")
    assert result["simulated"]
    machines = {name: each["num_cards"] for name, each in result["by_machine"].items()}
    assert machines == {"2 x 24 GB": 2, "4 x 24 GB": 4, "8 x 80 GB": 8}
    for line in result["by_tokens"]:
        ratios = [point["over_computing"] for point in line["points"]]
        assert 0 < ratios[1] < ratios[0]
    assert [each["num_hosts"] for each in result["by_hosts"]] == [1, 2, 4, 8, 16, 32, 64]
    assert ["fixed" in each for each in result["by_hosts"]] == [True] * 5 + [False] * 2
    for each in result["by_hosts"]:
        for links in each["grown"].values():
            assert all(found["computing"] > 0 for found in links.values())
    assert (tmp_path / "result.svg").read_text().startswith("<?xml")


def test_sharded_memory(tmp_path: Path) -> None:
    result = smoke(tmp_path, "sharded_memory.py", "--work", str(tmp_path / "work"))
    assert list(result["processes"]) == ["1", "2"]
    for size, each in result["processes"].items():
        assert each["held_bytes"] == [each["planned_bytes"]] * int(size)
    assert result["passes"]["counted"]
    assert result["passes"]["loading"]


def test_expert_plans(tmp_path: Path) -> None:
    (shape,) = smoke(tmp_path, "expert_plans.py")["shapes"].values()
    assert shape["even_routing_bytes"] <= shape["peak_bytes"]
    (card,) = shape["cards"].values()
    assert card["num_streamed"] <= shape["num_blocks"]
    assert card["fits"] == (card["peak_bytes"] <= 630 * 2**20)
