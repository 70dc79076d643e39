"""Weights of tasks in the loss: against float64, in whole runs, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qdora.data.loader import Step
from qdora.errors import UserError
from qdora.model.inject import adapter_parameters
from qdora.run.train import train_run
from qdora.train.distributed import Processes
from qdora.train.even_passes import even_passes
from qdora.train.passes import step_gradient
from tests import launched, reference, tiny_adapted, tiny_run
from tests.run_files import timeless
from tests.test_data_loader import loader, tokenised
from tests.test_train_distributed import assert_close_runs

NAMES = ["one", "two", "three"]
LENGTHS = {"one": [6, 9, 7], "two": [5, 8], "three": [4, 4, 11, 6]}


def model_in_float32() -> Any:
    """Adapters in float32: gradients of bf16 ones would be rounded, here as in the reference."""
    model = tiny_adapted.adapted(quant="nf4").train()
    for parameter in adapter_parameters(model).values():
        parameter.data = parameter.data.float()
    return model


def step_of_three_tasks() -> tuple[Step, dict[str, Any]]:
    sets = [tokenised(name, LENGTHS[name], seed=seed) for seed, name in enumerate(NAMES)]
    return loader(sets, batch=9, micro=24).next_step(), {part.name: part.examples for part in sets}


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


def test_weights_multiply_the_tokens_of_a_task() -> None:
    model = model_in_float32()
    step, examples = step_of_three_tasks()
    assert sum(step.task_label_tokens.values()) == step.num_label_tokens
    weights = {"one": 2.0, "two": 0.25, "three": 1.0}
    total = sum(weights[name] * count for name, count in step.task_label_tokens.items())
    own = gradients_of_tasks(model, examples, total)
    metrics, _ = step_gradient(model, step, device=torch.device("cpu"), weights=weights)
    expected = sum(weights[name] * own[name] for name in NAMES)
    assert reference.relative_error(flat_gradient(model).numpy(), expected) < 1e-5
    told = sum(task["nll_sum"] for task in metrics["tasks"].values()) / step.num_label_tokens
    assert metrics["loss"] == pytest.approx(told)


def test_a_process_without_an_example_takes_part_in_the_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the base is divided it computes as many as the others, of which none counts."""
    monkeypatch.setattr(Processes, "gather", lambda self, value: [2, value])
    step = dataclasses.replace(step_of_three_tasks()[0], micro_batches=[])
    step = even_passes(step, Processes(1, 2, shards=True))
    assert len(step.micro_batches) == 2
    model, weights = model_in_float32(), {"one": 2.0, "two": 0.25, "three": 1.0}
    metrics, example_nll = step_gradient(model, step, device=torch.device("cpu"), weights=weights)
    assert (metrics["loss"], metrics["tasks"], example_nll) == (0, {}, [])
    assert flat_gradient(model).count_nonzero() == 0


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


def run(rank: int, recipe: Any, directory: Path) -> None:
    train_run(recipe, directory)


def test_two_processes_train_what_one_does(root: Path, tmp_path: Path) -> None:
    mix = [{"source": str(root / "data/sums.jsonl"), "loss_weight": 4.0}, {"source": str(root / "data/letters.jsonl")}]
    changes: dict[str, Any] = {"adapter__dropout": 0.0, "adapter__dtype": "float32", "eval__tasks": []}
    recipe = tiny_run.recipe(root, **changes, eval__limit=..., data__mix=mix)
    assert launched.run(2, run, recipe, tmp_path / "two") == ["", ""]
    train_run(recipe, tmp_path / "one")
    assert_close_runs(tmp_path / "one", tmp_path / "two")


def test_what_would_be_ignored_or_cannot_be_is_refused(root: Path, tmp_path: Path) -> None:
    def faults(**changes: Any) -> str:
        with pytest.raises(UserError) as error:
            train_run(tiny_run.recipe(root, **changes), tmp_path / "run")
        return str(error.value)

    sums, letters = (str(root / f"data/{name}.jsonl") for name in ("sums", "letters"))
    weighted = [{"source": sums, "loss_weight": 2.0}, {"source": letters}]
    assert "loss_weight: would be ignored because there is no other source" in faults(data__mix=weighted[:1])
    assert "task sums is in sums with loss_weight 2 and in more with 1" in faults(data__mix=[weighted[0], *twice(root)])
    assert not (tmp_path / "run").exists()


def twice(root: Path) -> list[dict[str, Any]]:
    """A second source whose rows belong to the task of the first."""
    file = root / "data/more.jsonl"
    row = {"task": "sums", "question": "1 + 1?", "choices": ["2", "3"], "answer": 0}
    file.write_text("".join(json.dumps({**row, "id": str(n)}) + "\n" for n in range(30)))
    return [{"source": str(file)}]
