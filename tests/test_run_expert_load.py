"""The record of how tokens divide among experts."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from qdora.errors import Interrupted
from qdora.files.run_directory import RunDirectory
from qdora.model import experts
from qdora.model.experts import stacks, use_expert_layers_
from qdora.ops import expert_tokens
from qdora.run.expert_load import FILE, ExpertLoad
from qdora.run.train import train_run
from tests import tiny_experts, tiny_run
from tests.run_files import stop_after


@pytest.mark.parametrize("padded", [False, True])
def test_shares_are_those_of_the_router(monkeypatch: pytest.MonkeyPatch, padded: bool) -> None:
    monkeypatch.setattr(experts, "needs_padding", lambda *_: padded)
    monkeypatch.setattr(expert_tokens, "_MOST_PADDING", 1.0)
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
    for batch in (batches[0], *batches):  # the first step is computed twice, as after a lack of memory
        load.begin()
        model(batch)
        if len(wanted) > 2:
            load.step()
    wanted = wanted[2:]
    record = load.record()
    assert (record["num_steps"], record["window"]) == (2, 1)
    first, second = record["blocks"].values()
    assert first["first"] == pytest.approx(wanted[0] / wanted[0].sum())
    assert second["last"] == pytest.approx(wanted[3] / wanted[3].sum())
    assert first["moved"] == pytest.approx(np.abs(wanted[2] - wanted[0]).sum() / 2 / wanted[0].sum())
    assert first["noise"] is None, "a single step has no spread"


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


def counted(seed: int, *divisions: tuple[float, ...]) -> dict[str, Any]:
    """The record of a block whose router draws the experts of 200 tokens in each step, ten steps for each division."""
    load, random = ExpertLoad(torch.nn.Module()), np.random.default_rng(seed)
    load._now = {"mlp.experts": np.zeros(len(divisions[0]), np.int64)}
    for division in divisions:
        for _ in range(10):
            load._now["mlp.experts"][:] = random.multinomial(200, division)
            load.step()
    found: dict[str, Any] = load.record()["blocks"]["mlp.experts"]
    return found


def test_noise_is_what_moves_by_chance() -> None:
    division = (0.4, 0.3, 0.2, 0.06, 0.04)
    records = [counted(seed, division, division) for seed in range(300)]
    moved, noise = (np.array([record[name] for record in records]) for name in ("moved", "noise"))
    # Of multinomial draws, from the mean of the absolute value of a normal variable.
    expected = sum(math.sqrt(2 * p * (1 - p) / 2000 * 2 / math.pi) for p in division) / 2
    assert moved.mean() == pytest.approx(expected, rel=0.06)
    assert noise.mean() == pytest.approx(expected, rel=0.06)
    changed = counted(0, division, (0.2, 0.3, 0.2, 0.16, 0.14))
    assert changed["moved"] > 6 * changed["noise"]
    assert changed["noise"] == pytest.approx(expected, rel=0.5), "a change does not count as noise"


def test_a_short_run_compares_its_halves() -> None:
    load = ExpertLoad(torch.nn.Module())
    load._now = {"mlp.experts": np.zeros(2, np.int64)}
    for step in range(6):
        load._now["mlp.experts"][:] = (9, 1) if step < 3 else (5, 5)
        load.step()
    record = load.record()
    assert record["window"] == 3
    assert record["blocks"]["mlp.experts"] == {
        "first": [0.9, 0.1],
        "last": [0.5, 0.5],
        "moved": pytest.approx(0.4),
        "noise": pytest.approx(0, abs=1e-15),
    }


def test_a_run_that_was_stopped_goes_on_counting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_experts.write(tmp_path / "model", "mixtral")
    short = {"eval__at_start": False, "eval__at_end": False, "eval__limit": ...}
    asked = tiny_run.recipe(tmp_path, adapter__experts={"rank": 2}, train__steps=5, train__lr=0.02, **short)
    train_run(asked, tmp_path / "whole", console=Console(quiet=True))
    stop_after(monkeypatch, 3)
    with pytest.raises(Interrupted):
        train_run(asked, tmp_path / "run", console=Console(quiet=True))
    monkeypatch.undo()
    train_run(asked, tmp_path / "run", resume=True, console=Console(quiet=True))
    whole, run = ((tmp_path / name / FILE).read_text() for name in ("whole", "run"))
    assert run == whole
    assert json.loads(run)["num_steps"] == 5


def test_a_run_keeps_the_record(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny_experts.write(tmp_path / "model", "mixtral")
    with caplog.at_level("INFO", "qdora"):
        train_run(tiny_run.recipe(tmp_path, adapter__experts={"rank": 2}, train__steps=4), tmp_path / "run")
    record = json.loads((tmp_path / "run" / FILE).read_text())
    assert record["num_steps"] == 4
    assert len(record["blocks"]) == 2
    assert all(sum(block["last"]) == pytest.approx(1) for block in record["blocks"].values())
    assert "Experts: between the first and the last 2 steps" in caplog.text


def test_a_model_without_experts_has_no_record(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    assert stacks(model) == {}
    ExpertLoad(model).write(RunDirectory(tmp_path))
    assert not (tmp_path / FILE).exists()
