"""Weights of tasks in the loss, and PCGrad: against float64, in whole runs, resumed and in two processes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qdora.data.loader import Step
from qdora.errors import UserError
from qdora.model.inject import adapter_parameters
from qdora.run.train import train_run
from qdora.train.distributed import Processes
from qdora.train.loop import _gradient_of_step
from qdora.train.objective import Objective, TaskGradients, TaskWeights, pcgrad_weights, progress_weights
from tests import launched, reference, tiny_adapted, tiny_run
from tests.run_files import assert_same_run, stop_after, timeless
from tests.test_data_loader import content, loader, tokenised
from tests.test_train_distributed import assert_close_runs


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), num_tasks=st.integers(1, 6), size=st.integers(1, 8))
def test_pcgrad_is_that_of_the_vectors(seed: int, num_tasks: int, size: int) -> None:
    generator = np.random.default_rng(seed)
    gradients = generator.normal(size=(num_tasks, size))
    gradients[generator.random(num_tasks) < 0.1] = 0.0
    orders = [[int(j) for j in generator.permutation(num_tasks) if j != i] for i in range(num_tasks)]
    expected = reference.pcgrad(list(gradients), orders)
    weights, _ = pcgrad_weights(gradients @ gradients.T, orders)
    np.testing.assert_allclose(weights @ gradients, expected, rtol=1e-9, atol=1e-9 * np.abs(gradients).max())


def test_two_tasks_in_conflict_lose_what_they_do_to_each_other() -> None:
    """By hand: (2, 0) and (-1, 1) become (1, 1) and (0, 1)."""
    gradients = np.array([[2.0, 0.0], [-1.0, 1.0]])
    weights, num_projections = pcgrad_weights(gradients @ gradients.T, [[1], [0]])
    np.testing.assert_allclose(weights @ gradients, [1.0, 2.0])
    assert num_projections == 2
    weights, num_projections = pcgrad_weights(np.array([[1.0, 0.5], [0.5, 1.0]]), [[1], [0]])
    assert (weights.tolist(), num_projections) == ([1.0, 1.0], 0)


def test_weights_by_progress_are_those_of_the_paper() -> None:
    """Ratios 0.5 and 1 at T = 2: 2 e^0.25 / (e^0.25 + e^0.5), and the rest."""
    found = progress_weights({"a": 4.0, "b": 3.0}, {"a": 2.0, "b": 3.0})
    first = 2 * math.exp(0.25) / (math.exp(0.25) + math.exp(0.5))
    assert found == {"a": pytest.approx(first), "b": pytest.approx(2 - first)}
    assert progress_weights({"a": 1e-3, "b": 1.0}, {"a": 1e3, "b": 1.0})["b"] == pytest.approx(0.0, abs=1e-9)
    weights = TaskWeights({"x": 1.0, "y": 1.0, "z": 1.0}, {"one": ["x", "y"], "two": ["z"]})
    weights.evaluated({"one": 4.0, "two": 3.0})
    assert weights.weights == {"x": 1.0, "y": 1.0, "z": 1.0}
    weights.evaluated({"one": 2.0, "two": 3.0})
    assert weights.weights == {"x": pytest.approx(first), "y": pytest.approx(first), "z": pytest.approx(2 - first)}
    again = TaskWeights({"x": 1.0, "y": 1.0, "z": 1.0}, {"one": ["x", "y"], "two": ["z"]})
    again.load_state_dict(json.loads(json.dumps(weights.state_dict())))
    for each in (weights, again):
        each.evaluated({"one": 1.9, "two": 1.0})
    assert again.weights == weights.weights


NAMES = ["one", "two", "three"]
LENGTHS = {"one": [6, 9, 7], "two": [5, 8], "three": [4, 4, 11, 6]}


def model_in_float32() -> Any:
    """Adapters in float32: gradients of bf16 ones would be rounded, here as in the reference."""
    model = tiny_adapted.adapted(quant="nf4").train()
    for parameter in adapter_parameters(model).values():
        parameter.data = parameter.data.float()
    return model


def step_of(by_task: bool) -> tuple[Step, dict[str, Any]]:
    sets = [tokenised(name, LENGTHS[name], seed=seed) for seed, name in enumerate(NAMES)]
    made = loader(sets, batch=9, micro=24)
    made.by_task = by_task
    return made.next_step(), {part.name: part.examples for part in sets}


def gradients_of_tasks(model: Any, examples: dict[str, Any], total: float) -> dict[str, Any]:
    """Task -> gradient of its summed NLL / total, one vector, by autograd on the model's own logits."""
    parameters = list(adapter_parameters(model).values())
    found = {}
    for name, part in examples.items():
        loss: Any = 0.0
        for example in part:
            ids = torch.from_numpy(example.input_ids.astype(np.int64))[None]
            wanted = torch.from_numpy(example.loss_mask)[1:]
            logits = model(input_ids=ids).logits[0, :-1][wanted]
            loss = loss + torch.nn.functional.cross_entropy(logits, ids[0, 1:][wanted], reduction="sum")
        grads = torch.autograd.grad(loss / total, parameters)
        found[name] = torch.cat([grad.flatten().double() for grad in grads]).numpy()
    return found


def flat_gradient(model: Any) -> Any:
    return torch.cat([p.grad.flatten().double() for p in adapter_parameters(model).values() if p.grad is not None])


def test_micro_batches_of_one_task_hold_the_same_examples() -> None:
    mixed, apart = step_of(False)[0], step_of(True)[0]
    assert sorted(content(mixed)) == sorted(content(apart))
    assert all(len(set(micro.task_ids.tolist())) == 1 for micro in apart.micro_batches)
    tasks = [int(micro.task_ids[0]) for micro in apart.micro_batches]
    assert tasks == sorted(tasks)
    assert mixed.task_label_tokens == apart.task_label_tokens
    assert sum(mixed.task_label_tokens.values()) == mixed.num_label_tokens


def test_a_step_with_pcgrad_has_the_projected_gradient() -> None:
    model = model_in_float32()
    parameters = adapter_parameters(model)
    step, examples = step_of(True)
    own = gradients_of_tasks(model, examples, step.num_label_tokens)
    # Random models have gradients that agree: one task's is turned round.
    objective = Objective(gradients=TaskGradients(parameters, NAMES, seed=3))
    assert objective.gradients is not None
    _gradient_of_step(model, step, torch.device("cpu"), None, objective)
    for row in objective.gradients._found["two"]:
        assert row is not None
        row.neg_()
    own["two"] = -own["two"]
    said = objective.gradients.combine_(7, Processes())
    generator = np.random.default_rng([3, 7])
    orders = [[int(j) for j in generator.permutation(3) if j != i] for i in range(3)]
    expected = reference.pcgrad([own[name] for name in NAMES], orders)
    assert said["num_projections"] > 0
    assert reference.relative_error(flat_gradient(model).numpy(), expected) < 1e-5
    weighted = sum(said["weights"][name] * own[name] for name in NAMES)
    assert reference.relative_error(weighted, expected) < 1e-5


def test_weights_multiply_the_tokens_of_a_task() -> None:
    model = model_in_float32()
    step, examples = step_of(False)
    weights = TaskWeights({"one": 2.0, "two": 0.25, "three": 1.0})
    total = sum(weights.weights[name] * count for name, count in step.task_label_tokens.items())
    own = gradients_of_tasks(model, examples, total)
    metrics, _ = _gradient_of_step(model, step, torch.device("cpu"), None, Objective(weights))
    expected = sum(weights.weights[name] * own[name] for name in NAMES)
    assert reference.relative_error(flat_gradient(model).numpy(), expected) < 1e-5
    told = sum(task["nll_sum"] for task in metrics["tasks"].values()) / step.num_label_tokens
    assert metrics["loss"] == pytest.approx(told)


REMEDIES: dict[str, dict[str, Any]] = {
    "pcgrad": {"interference__gradients": "pcgrad"},
    "progress": {"interference__loss_weights": "progress", "eval__every": 1},
    "both": {"interference__gradients": "pcgrad", "interference__loss_weights": "progress", "eval__every": 2},
}


@pytest.mark.parametrize("remedy", list(REMEDIES))
def test_a_resumed_run_is_the_same(root: Path, tmp_path: Path, remedy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny_run.recipe(root, **REMEDIES[remedy])
    train_run(recipe, tmp_path / "whole")
    stop_after(monkeypatch, 3)
    with pytest.raises(Exception, match="stopped after step 3"):
        train_run(recipe, tmp_path / "run")
    monkeypatch.undo()
    train_run(recipe, tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    lines = timeless(tmp_path / "run")
    if remedy != "progress":
        assert all(set(line["pcgrad"]["weights"]) == set(line["tasks"]) for line in lines if "loss" in line)
    if remedy != "pcgrad":
        found = [line["loss_weights"] for line in lines if "loss_weights" in line]
        assert all(sum(weights.values()) == pytest.approx(2.0) for weights in found)
        assert found[-1]["sums"] != found[-1]["letters"]


def run(rank: int, recipe: Any, directory: Path) -> None:
    train_run(recipe, directory)


def test_two_processes_train_what_one_does(root: Path, tmp_path: Path) -> None:
    changes = {**REMEDIES["both"], "adapter__dropout": 0.0, "adapter__dtype": "float32"}
    recipe = tiny_run.recipe(root, **changes, eval__at_end=False)
    assert launched.run(2, run, recipe, tmp_path / "two") == ["", ""]
    train_run(recipe, tmp_path / "one")
    for name in ("one", "two"):
        file = tmp_path / name / "metrics.jsonl"
        kept = [line for line in file.read_text().splitlines() if '"loss"' in line]
        assert len(kept) == 6
        file.write_text("".join(line + "\n" for line in kept))
    assert_close_runs(tmp_path / "one", tmp_path / "two")


def test_fixed_weights_change_a_run_and_equal_ones_do_not(root: Path, tmp_path: Path) -> None:
    plain = tiny_run.recipe(root, train__steps=2, eval__tasks=[], eval__limit=...)
    mix = [{"source": str(root / f"data/{name}.jsonl")} for name in ("sums", "letters")]
    losses = {}
    for weight in (None, 1.0, 4.0):
        weighted = [mix[0] | ({} if weight is None else {"loss_weight": weight}), mix[1]]
        recipe = tiny_run.recipe(root, train__steps=2, eval__tasks=[], eval__limit=..., data__mix=weighted)
        train_run(recipe, tmp_path / str(weight))
        losses[weight] = [line["loss"] for line in timeless(tmp_path / str(weight))]
    train_run(plain, tmp_path / "plain")
    assert losses[None] == [line["loss"] for line in timeless(tmp_path / "plain")]
    assert losses[1.0] == pytest.approx(losses[None])
    assert losses[4.0][0] == pytest.approx(losses[None][0])  # the first step's loss is told without weights
    assert losses[4.0][1] != pytest.approx(losses[None][1], rel=1e-7)


def test_what_would_be_ignored_or_cannot_be_is_refused(root: Path, tmp_path: Path) -> None:
    def faults(**changes: Any) -> str:
        with pytest.raises(UserError) as error:
            train_run(tiny_run.recipe(root, **changes), tmp_path / "run")
        return str(error.value)

    sums, letters = (str(root / f"data/{name}.jsonl") for name in ("sums", "letters"))
    weighted = [{"source": sums, "loss_weight": 2.0}, {"source": letters}]
    assert "interference.loss_weights: goes by the evaluations" in faults(interference__loss_weights="progress")
    progress = {"interference__loss_weights": "progress", "eval__every": 2}
    assert "data.mix[0].loss_weight: would be ignored because interference.loss_weights is progress" in faults(
        **progress, data__mix=weighted
    )
    assert "loss_weight: would be ignored because there is no other source" in faults(data__mix=weighted[:1])
    assert "pcgrad, but sums is the only task" in faults(interference__gradients="pcgrad", data__mix=[{"source": sums}])
    assert "progress, but letters is not evaluated" in faults(**progress, eval__tasks=["sums"])
    assert "task sums is in sums with loss_weight 2 and in more with 1" in faults(data__mix=[weighted[0], *twice(root)])
    assert not (tmp_path / "run").exists()


def twice(root: Path) -> list[dict[str, Any]]:
    """A second source whose rows belong to the task of the first."""
    file = root / "data/more.jsonl"
    row = {"task": "sums", "question": "1 + 1?", "choices": ["2", "3"], "answer": 0}
    file.write_text("".join(json.dumps({**row, "id": str(n)}) + "\n" for n in range(30)))
    return [{"source": str(file)}]
