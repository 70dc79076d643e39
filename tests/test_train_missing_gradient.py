"""The check of a run's first updates: quiet where gradients arrive, one line where one does not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qdora.errors import RunFailure, UserError
from qdora.files.run_directory import RunDirectory
from qdora.model.inject import adapter_parameters
from qdora.run import trainer
from qdora.run.train import train_run
from qdora.train.optimizer import AdapterOptimizer
from qdora.train.step_checks import MissingGradientCheck
from tests import tiny_adapted, tiny_run
from tests.test_memory_host_residency import stream_on_cpu

Rate = Callable[[int], float]


def told(
    frozen: str | None, rate: Rate = lambda _: 1e-5, *, num_updates: int = 3, magnitude: float = 1.0
) -> list[list[str]]:
    """What the check finds in updates of which one matrix gets no gradient."""
    model = tiny_adapted.adapted("llama", quant="nf4", dtype=torch.float32)
    parameters = adapter_parameters(model)
    for name, parameter in parameters.items():
        if name.endswith("magnitude"):
            parameter.data.fill_(magnitude)
    optimizer = AdapterOptimizer(parameters, name="adamw", weight_decay=0.1)
    check = MissingGradientCheck(optimizer)
    generator = torch.Generator().manual_seed(0)
    found = []
    for step in range(num_updates):
        for name, parameter in parameters.items():
            gradient = torch.randn(parameter.shape, generator=generator)
            parameter.grad = gradient * (0.0 if name == frozen else 1.0)
        optimizer.step(rate(step))
        found.append(check.updated(rate(step)))
    return [each for each in found if each is not None]


@pytest.mark.parametrize("rate", [1e-5, 1e-8, 1e-12])
def test_updates_smaller_than_the_parameters_show_are_no_fault(rate: float) -> None:
    assert told(None, lambda _: rate, num_updates=5, magnitude=100.0) == [[]]


@pytest.mark.parametrize("part", ["lora_A", "lora_B", "magnitude"])
def test_a_matrix_without_a_gradient_is_named_once(part: str) -> None:
    name = f"model.layers.1.mlp.up_proj.{part}"
    assert told(name, num_updates=5) == [[name]]


def test_without_any_gradient() -> None:
    optimizer = AdapterOptimizer(adapter_parameters(tiny_adapted.adapted("llama", quant="nf4")), name="adamw")
    check = MissingGradientCheck(optimizer)
    found = [check.updated(1e-5) for _ in range(3)]
    assert found[:2] == [None, None]
    assert found[2] is not None
    assert len(found[2]) == check.num_tensors == 42


def test_updates_of_a_rate_of_zero_do_not_count() -> None:
    name = "model.layers.0.mlp.up_proj.lora_B"

    def warm(step: int) -> float:
        return 1e-5 if step else 0.0

    assert told(name, warm, num_updates=3) == []
    assert len(told(name, warm, num_updates=4)) == 1


def test_a_failed_check_leaves_a_checkpoint(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MissingGradientCheck, "updated", lambda _self, _lr: ["some.lora_B"])
    stream_on_cpu(monkeypatch)
    recipe = tiny_run.recipe(root, train__steps=2, eval__at_start=False, base__residency="host")
    with pytest.raises(RunFailure, match=r"step 1: .* 1 of 42 .*no gradient, e\.g\. some\.lora_B.*on disk: .*step-1"):
        train_run(recipe, tmp_path / "run")
    newest = RunDirectory(tmp_path / "run").newest_checkpoint()
    assert newest is not None
    assert newest.step == 1


@pytest.mark.parametrize("residency", ["device", "host"])
def test_a_matrix_that_gets_no_gradient_is_found_wherever_the_base_is(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, residency: str
) -> None:
    real = trainer.fresh_state

    def cut_off(active: Any, evaluated: list[str]) -> Any:
        state = real(active, evaluated)
        state.optimizer.parameters["model.layers.1.mlp.up_proj.lora_B"].register_hook(lambda grad: grad * 0)
        return state

    monkeypatch.setattr(trainer, "fresh_state", cut_off)
    changes: dict[str, Any] = {"train__steps": 5, "eval__at_start": False, "eval__at_end": False, "eval__limit": ...}
    changes["base__residency"] = residency
    said = "trainable tensors had no gradient, e.g. model.layers.1.mlp.up_proj.lora_"
    recipe = tiny_run.recipe(root, **changes)
    if residency == "host":
        stream_on_cpu(monkeypatch)
        with pytest.raises(RunFailure, match=f"step 3: in 3 updates 2 of 42 {said}"):
            train_run(recipe, tmp_path / "run")
        return
    assert train_run(recipe, tmp_path / "run")["num_steps"] == 5
    assert f"WARNING in 3 updates 2 of 42 {said}" in (tmp_path / "run/log.txt").read_text()
    (found,) = json.loads((tmp_path / "run/checks.json").read_text())["gradients"]
    assert found["state"] == "warning"


def test_host_needs_a_gpu(root: Path, tmp_path: Path) -> None:
    recipe = tiny_run.recipe(root, base__residency="host")
    with pytest.raises(UserError, match=r"base\.residency: got host, must be device .*without a GPU"):
        train_run(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_checkpoints_on_the_host_need_a_gpu(root: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"memory\.offload_activations: got true, must be false .*without a GPU"):
        train_run(tiny_run.recipe(root, memory__offload_activations=True), tmp_path / "run")
    with pytest.raises(UserError, match=r"offload_activations: would be ignored because memory"):
        tiny_run.recipe(root, memory__offload_activations=True, memory__checkpointing=False)
