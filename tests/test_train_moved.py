"""The check of a run's first updates: quiet where everything moves, one line where a matrix does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qdora.errors import RunFailure, UserError
from qdora.model.inject import adapter_parameters
from qdora.train.moved import MovedCheck
from qdora.train.optimizer import AdapterOptimizer
from qdora.verbs import train
from qdora.verbs.train import train_run
from tests import tiny_adapted, tiny_run


def updates(frozen: str | None, *, num_updates: int, lr: float = 1e-5, first_lr: float = 1e-5) -> MovedCheck:
    model = tiny_adapted.adapted("llama", quant="nf4", dtype=torch.float32)
    parameters = adapter_parameters(model)
    optimizer = AdapterOptimizer(parameters, name="adamw")
    check = MovedCheck(optimizer)
    generator = torch.Generator().manual_seed(0)
    for step in range(num_updates):
        for name, parameter in parameters.items():
            gradient = torch.randn(parameter.shape, generator=generator)
            parameter.grad = gradient * (0.0 if name == frozen else 1.0)
        rate = lr if step else first_lr
        optimizer.step(rate)
        check.updated(rate)
    return check


def test_updates_smaller_than_bf16_can_show_count_as_moved() -> None:
    updates(None, num_updates=5)


@pytest.mark.parametrize("part", ["lora_A", "lora_B", "magnitude"])
def test_a_matrix_that_stays_is_named(part: str) -> None:
    name = f"model.layers.1.mlp.up_proj.{part}"
    with pytest.raises(RunFailure, match=rf"1 of 42 trainable tensors are what they were, e\.g\. {name}"):
        updates(name, num_updates=3)


def test_updates_of_a_rate_of_zero_do_not_count() -> None:
    name = "model.layers.0.mlp.up_proj.lora_B"
    updates(name, num_updates=3, first_lr=0.0)
    with pytest.raises(RunFailure):
        updates(name, num_updates=4, first_lr=0.0)


def test_a_run_on_disk_is_checked_and_one_on_the_device_is_not(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float] = []

    class Noted:
        def __init__(self, _optimizer: Any) -> None: ...

        def updated(self, lr: float) -> None:
            seen.append(lr)

    monkeypatch.setattr(train, "MovedCheck", Noted)
    changes: dict[str, Any] = {"train__steps": 2, "eval__at_start": False, "eval__at_end": False, "eval__limit": ...}
    train_run(tiny_run.recipe(root, **changes), tmp_path / "device")
    assert seen == []
    changes |= {"base__residency": "disk", "base__cache": str(tmp_path / "cache")}
    train_run(tiny_run.recipe(root, **changes), tmp_path / "disk")
    assert len(seen) == 2
    assert seen[1] > 0


def test_host_needs_a_gpu(root: Path, tmp_path: Path) -> None:
    recipe = tiny_run.recipe(root, base__residency="host")
    with pytest.raises(UserError, match=r"base\.residency: host is for a GPU"):
        train_run(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_checkpoints_on_the_host_need_a_gpu(root: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"memory\.offload_activations: is for a GPU"):
        train_run(tiny_run.recipe(root, memory__offload_activations=True), tmp_path / "run")
    with pytest.raises(UserError, match=r"offload_activations: would be ignored because memory"):
        tiny_run.recipe(root, memory__offload_activations=True, memory__checkpointing=False)
