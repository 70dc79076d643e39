"""The record of how tokens divide among experts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from qdora.files.run_directory import RunDirectory
from qdora.model.experts import stacks, use_expert_layers_
from qdora.run.expert_load import FILE, ExpertLoad
from qdora.run.train import train_run
from tests import tiny_experts, tiny_run


def test_shares_are_those_of_the_router(tmp_path: Path) -> None:
    model = tiny_experts.make("olmoe")
    wanted: list[np.ndarray] = []
    for block in model.model.layers:
        block.mlp.gate.register_forward_hook(
            lambda _module, _inputs, out: wanted.append(np.bincount(out[2].reshape(-1), minlength=4))
        )
    use_expert_layers_(model)
    load = ExpertLoad(model)
    model(torch.arange(3, 43).view(2, 20))  # evaluation does not count
    wanted.clear()
    model.train()
    batches = [torch.arange(3, 43).view(2, 20), torch.arange(50, 90).view(2, 20)]
    for batch in batches:
        model(batch)
        load.step()
    record = load.record()
    assert record["num_steps"] == record["window"] == 2
    first, second = record["blocks"].values()
    both = wanted[0] + wanted[2], wanted[1] + wanted[3]
    assert first["last"] == pytest.approx(both[0] / both[0].sum())
    assert second["first"] == pytest.approx(both[1] / both[1].sum())
    assert first["moved"] == 0, "with two steps the first and the last are the same ones"


def test_moved_is_the_share_of_tokens_that_went_elsewhere() -> None:
    model = torch.nn.Module()
    load = ExpertLoad(model)
    load._now = {"mlp.experts": np.zeros(3, np.int64)}
    for step in range(20):
        load._now["mlp.experts"][:] = (6, 4, 0) if step < 10 else (3, 4, 3)
        load.step()
    found = load.record()["blocks"]["mlp.experts"]
    assert found["first"] == [0.6, 0.4, 0.0]
    assert found["last"] == [0.3, 0.4, 0.3]
    assert found["moved"] == pytest.approx(0.3)


@pytest.mark.figures
def test_a_run_keeps_the_record_and_draws_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny_experts.write(tmp_path / "model", "mixtral")
    with caplog.at_level("INFO", "qdora"):
        train_run(tiny_run.recipe(tmp_path, adapter__experts={"rank": 2}, train__steps=3), tmp_path / "run")
    record = json.loads((tmp_path / "run" / FILE).read_text())
    assert record["num_steps"] == 3
    assert len(record["blocks"]) == 2
    assert all(sum(block["last"]) == pytest.approx(1) for block in record["blocks"].values())
    assert (tmp_path / "run/figures/expert_load.svg").read_text().startswith("<?xml")
    assert "Experts: training moved" in caplog.text


def test_a_model_without_experts_has_no_record(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    assert stacks(model) == {}
    ExpertLoad(model).write(RunDirectory(tmp_path))
    assert not (tmp_path / FILE).exists()
