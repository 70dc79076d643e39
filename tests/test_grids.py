"""The grids of the benchmarks are valid, and told before they run, without a network and without weights."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from typer.testing import CliRunner

from qdora.cli import app
from qdora.plan.memory_plan import plan
from qdora.recipe.recipe_file import load_recipe
from qdora.recipe.settings import Recipe
from qdora.study import outlook

ROOT = Path(__file__).parent.parent
GRIDS = sorted((ROOT / "benchmarks/grids").glob("*.yaml"))
COMPRESSED = 5
SECONDS = {("meta-llama/Meta-Llama-3-8B", "none"): 1.0, ("meta-llama/Meta-Llama-3-8B", "nf4"): 2.0}
SECONDS |= {("Qwen/Qwen3-4B-Base", "none"): 3.0, ("Qwen/Qwen3-4B-Base", "nf4"): 4.0}


def dry_run(grid: Path, folder: Path) -> dict[str, Any]:
    """`qdora study --dry-run` of a grid, on three examples of each task."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        from study import with_data
    finally:
        sys.path.pop(0)
    document = yaml.safe_load(grid.read_text())
    rows = pd.DataFrame([{"question": f"q{index}", "choices": ["a", "b"], "answer": 0} for index in range(3)])
    for source in document["settings"]["data.mix"]:
        task = folder / "data" / (source.get("task") or source["name"])
        task.mkdir(parents=True, exist_ok=True)
        for split in ("train", "validation", "test"):
            rows.to_parquet(task / f"{split}.parquet")
    (folder / "grid.yaml").write_text(yaml.safe_dump(with_data(document, folder / "data"), sort_keys=False))
    arguments = ["study", str(folder / "grid.yaml"), "--dir", str(folder / "study"), "--dry-run", "--json"]
    found = CliRunner().invoke(app, arguments)
    assert found.exit_code == 0, found.output
    told: dict[str, Any] = json.loads(found.stdout)
    return told


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> list[Recipe]:
    """The recipes whose steps were planned; the plans are made up."""
    asked: list[Recipe] = []

    class Found:
        def __init__(self, seconds: float) -> None:
            self.step_seconds = seconds

    def made_up(recipe: Recipe) -> Found:
        asked.append(recipe)
        return Found(SECONDS[recipe.model.source, recipe.base.quant])

    monkeypatch.setattr(outlook, "plan", made_up)
    return asked


def test_the_grid_of_large_models_is_told_with_the_hours_of_its_plans(tmp_path: Path, planned: list[Recipe]) -> None:
    told = dry_run(ROOT / "benchmarks/grids/8b.yaml", tmp_path)
    assert len(planned) == len(SECONDS)  # one of each model with and without quantisation
    assert all(recipe.base.prune is None for recipe in planned)
    stages = {each["stage"]: each for each in told["stages"]}
    assert stages["main"]["num_cells"] == 2 * (COMPRESSED + 1) * 2 * 3  # models, bases, adapters, seeds
    assert stages["transplants"]["num_cells"] == 2 * COMPRESSED * 2 * 3
    assert stages["bases"]["num_cells"] == 2 * (COMPRESSED + 1)
    # Three of the six bases have 16 bits
    by_hand = sum(6 * 3 * (300 + 400 * seconds) for seconds in SECONDS.values())
    assert stages["main"]["seconds"] == pytest.approx(by_hand)
    assert stages["transplants"]["seconds"] == pytest.approx(60 * 300)
    sources = {cell["labels"]["model"] for cell in told["cells"] if "model" in cell["labels"]}
    assert sources == {"Llama-3-8B", "Qwen3-4B"}


@pytest.mark.slow
def test_the_plans_of_the_large_models_need_no_network(tmp_path: Path) -> None:
    told = dry_run(ROOT / "benchmarks/grids/8b.yaml", tmp_path)
    stages = {each["stage"]: each for each in told["stages"]}
    by_hand = 0.0
    for model, quant in SECONDS:
        off = ["base.block_size=null", "base.double_quant=null"] if quant == "none" else []
        changes = [
            f"model.source={model}",
            f"base.quant={quant}",
            *off,
            "adapter.rank=16",
            "adapter.targets=all-linear",
        ]
        by_hand += 18 * (300 + 400 * (plan(load_recipe("commonsense-8b-40gb", changes)).step_seconds or 0.0))
    assert stages["main"]["seconds"] == pytest.approx(by_hand, rel=1e-3)


def test_the_grid_of_compressed_bases_is_told_without_a_plan(tmp_path: Path, planned: list[Recipe]) -> None:
    assert [grid.stem for grid in GRIDS] == ["8b", "compressed", "rank_curve"]  # every grid has a test
    told = dry_run(ROOT / "benchmarks/grids/compressed.yaml", tmp_path)
    assert not planned
    assert all(each["seconds"] is not None for each in told["stages"])
    stages = {each["stage"]: each["num_cells"] for each in told["stages"]}
    assert stages["by layer"] == 3 * 2 * 3
    second = {"magnitudes again": 3, "curves, third seed": 3 * 2, "noise floor": 2 * 3}
    second |= {"full fine-tuning": 3 * 3, "by checkpoint": 3 * 3}
    second |= {"transplants again": 3 * 2 * 3, "transplants, magnitudes rescaled": 3 * 3}
    assert {name: stages[name] for name in second} == second
    assert sum(stages.values()) == 194 + sum(second.values()) + 4  # and the rates of full fine-tuning


def test_the_grid_of_ranks_compares_each_with_the_largest_for_both_adapters(tmp_path: Path) -> None:
    told = dry_run(ROOT / "benchmarks/grids/rank_curve.yaml", tmp_path)
    stages = {each["stage"]: each["num_cells"] for each in told["stages"]}
    assert stages == {"bases": 2, "rates": 2 * 3 * 3, "main": 2 * 3 * 4}  # adapters, ranks, rates or seeds
