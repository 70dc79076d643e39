"""Whole runs of other recipes: streams, packing, generated answers, cosines of tasks, weights of tasks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qdora.data import stream
from qdora.data.batches import Batching
from qdora.errors import RunFailure, UserError
from qdora.model.inject import adapter_parameters
from qdora.recipe.options import EvalOptions
from qdora.run.run import train_run
from qdora.run.verbs import evaluate_target
from qdora.train.checkpoint import random_state
from qdora.train.logs import measure
from tests import reference, support
from tests.support import ADAPTER, UNEVALUATED, assert_resumes, same_tensors, timeless


def read(file: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(file.read_text())
    return document


def test_a_faulty_row_ends_a_run_with_its_work_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both runs take each row once, in one order: mending the row gives the undisturbed result."""
    monkeypatch.setattr(stream, "_SAMPLE", 8)  # the faulty row is not among those that are read beforehand
    file, letters = support.write_data(tmp_path / "data")
    mix = [{"source": str(file), "stream": True, "shuffle_window": 5, "weight": 1.0}]
    mix.append({"source": str(letters), "weight": 1e-6})
    data = {"data__mix": mix, "data__strategy": "weights", "data__too_long": "drop"}
    asked, more = (support.tiny_recipe(tmp_path, **data, data__max_bad_rows=number) for number in (0, 3))
    train_run(asked, tmp_path / "whole")
    assert sorted(read(tmp_path / "whole/eval/step-6.json")["tasks"]) == ["letters"]
    with pytest.raises(UserError, match="--split: a stream has only the splits validation, test"):
        evaluate_target(str(tmp_path / "whole"), EvalOptions(split="train"))
    good = file.read_text()
    lines = good.splitlines(keepends=True)
    file.write_text("".join([*lines[:20], lines[20][:9] + "\n", *lines[21:]]))
    place = sum(map(len, lines[:20]))
    said = rf"^step 6: sums: 1 rows .*sums\.jsonl: byte {place}: not JSON.* Safe on disk: .*checkpoints/step-5"
    run = tmp_path / "run"
    for resume in (False, True):  # not mended yet: nothing is lost
        with pytest.raises(RunFailure, match=said):
            train_run(asked, run, resume=resume)
    shutil.copytree(run, tmp_path / "mended")
    assert train_run(more, run, resume=True)["num_steps"] == 6
    assert f"sums: 1 faulty rows were skipped: {file}: byte {place}: not JSON" in (run / "log.txt").read_text()
    file.write_text(good)
    train_run(asked, tmp_path / "mended", resume=True)
    same_tensors(tmp_path / "whole" / ADAPTER, tmp_path / "mended" / ADAPTER)


def test_a_run_keeps_generated_answers_beside_the_log_likelihoods(root: Path, tmp_path: Path) -> None:
    """Evaluated by generation on the source whose choices are single letters."""
    train_run(support.tiny_recipe(root, eval__method="generate", eval__tasks=["letters"], eval__every=4), tmp_path)
    for step in (0, 4, 6):
        scored, found = (read(tmp_path / f"eval/step-{step}{end}.json") for end in ("", "-generated"))
        assert list(scored["tasks"]) == list(found["tasks"]) == ["letters"]
        counts = found["tasks"]["letters"]
        assert counts["num_examples"] == scored["tasks"]["letters"]["num_examples"] == len(found["per_example"])
        assert counts["num_right"] + counts["num_wrong"] + counts["num_unparsable"] == counts["num_examples"]
    _, evaluated, _ = [line["eval"]["letters"] for line in timeless(tmp_path) if "eval" in line]
    counts = read(tmp_path / "eval/step-4-generated.json")["tasks"]["letters"]
    assert evaluated["generated"] == {key: value for key, value in counts.items() if key != "unparsable"}
    # eval takes the method of the run, or another
    own = evaluate_target(str(tmp_path), EvalOptions(tasks=["letters"]))
    assert own["generation"]["tasks"] == read(tmp_path / "eval/step-6-generated.json")["tasks"]
    for end, part in (("-generated", "generation"), ("", "evaluation")):
        assert read(tmp_path / f"eval/final-validation-letters{end}.json")["tasks"] == own[part]["tasks"]
    other = evaluate_target(str(tmp_path), EvalOptions(tasks=["letters"], method="loglikelihood"))
    assert "generation" not in other
    assert other["evaluation"]["tasks"] == own["evaluation"]["tasks"]
    with pytest.raises(UserError, match="unlike example 29 of task sums"):
        train_run(support.tiny_recipe(root, eval__method="generate"), tmp_path / "run")


def test_a_models_gradients_are_those_of_the_mean_loss() -> None:
    """Against autograd on the model's own logits, example by example, in one float64 sum."""
    model = support.adapted_model(quant="nf4", dropout=0.5)
    parameters, vectors = adapter_parameters(model), []
    sets = {name: support.examples([6, 9, 7, 5], tasks=name, seed=seed) for seed, name in enumerate("ab")}
    before = random_state()["cpu"]
    report = measure(model, sets, Batching(20, 0), parameters)
    assert all(module.training for module in model.modules())
    assert torch.equal(random_state()["cpu"], before)
    assert all(parameter.grad is None for parameter in parameters.values())
    model.eval()
    for found in sets.values():
        total, count = torch.zeros(()), 0
        for example in found:
            ids = torch.from_numpy(example.input_ids.astype(np.int64))[None]
            wanted = torch.from_numpy(example.loss_mask)[1:]
            logits = model(input_ids=ids).logits[0, :-1][wanted]
            total = total + torch.nn.functional.cross_entropy(logits, ids[0, 1:][wanted], reduction="sum")
            count += int(wanted.sum())
        grads = torch.autograd.grad(total / count, list(parameters.values()))
        vectors.append(torch.cat([grad.flatten().double() for grad in grads]).numpy())
    expected = reference.cosine(*vectors)
    assert report["cosines"][0][1] == pytest.approx(expected, abs=2e-3)  # bf16 gradients
    assert report["norms"][0] == pytest.approx(np.linalg.norm(vectors[0]), rel=2e-3)


PROBED: dict[str, Any] = {"interference__every": 2, "interference__examples": 2, "data__validation_fraction": 0.2}


def test_a_run_with_a_probe_trains_as_one_without_and_resumes(root: Path, tmp_path: Path) -> None:
    run, plain = tmp_path / "run", tmp_path / "plain"
    train_run(support.tiny_recipe(root, data__validation_fraction=0.2, eval__every=2), plain)
    recipe = support.tiny_recipe(root, **PROBED, eval__every=2)
    train_run(recipe, run)
    lines = timeless(run)
    measured = [line for line in lines if "interference" in line]
    assert [line["step"] for line in measured] == [2, 4, 6]
    without = [{key: value for key, value in line.items() if key != "interference"} for line in lines]
    assert without == timeless(plain)
    for file in (ADAPTER, "checkpoints/step-6/optimizer.safetensors", "checkpoints/step-6/random.safetensors"):
        same_tensors(run / file, plain / file)
    last = measured[-1]["interference"]
    assert last["tasks"] == ["sums", "letters"]
    assert -1 <= last["lowest_cosine"] == last["mean_cosine"] == last["cosines"][0][1] <= 1
    assert_resumes(recipe, run, tmp_path / "again", stop_at=3)


def test_fixed_weights_change_a_run(root: Path, tmp_path: Path) -> None:
    sums, letters = ({"source": str(file)} for file in support.write_data(root / "data"))
    losses = []
    for number, weight in enumerate(({}, {"loss_weight": 4.0})):
        run = tmp_path / str(number)
        train_run(support.tiny_recipe(root, train__steps=2, **UNEVALUATED, data__mix=[sums | weight, letters]), run)
        losses.append([line["loss"] for line in timeless(run)])
    assert losses[1][0] == pytest.approx(losses[0][0])  # the first step's loss is told without weights
    assert losses[1][1] != pytest.approx(losses[0][1], rel=1e-7)


def test_what_cannot_be_measured_or_weighted_is_refused(root: Path, tmp_path: Path) -> None:
    sums, letters = map(str, support.write_data(root / "data"))
    more = tmp_path / "more.jsonl"  # rows of the task of the first source
    row = {"task": "sums", "question": "1 + 1?", "choices": ["2", "3"], "answer": 0}
    more.write_text("".join(json.dumps({**row, "id": str(n)}) + "\n" for n in range(30)))
    mix = [{"source": sums, "loss_weight": 2.0}, {"source": str(more)}]
    every: dict[str, Any] = {"interference__every": 2, "eval__every": 2}
    for changes, words in (
        (every | {"data__validation_fraction": 0.0}, "every: needs two sources, all with .*sums': 0"),
        (every | {"data__mix": [{"source": letters}]}, "every: needs two sources"),
        (every | {"eval__every": 4}, "interference.every: must be a multiple of eval.every"),
        ({"data__mix": mix}, "task sums has loss_weight 2 in one source and 1 in more"),
    ):
        with pytest.raises(UserError, match=words):
            train_run(support.tiny_recipe(root, **changes), tmp_path / "run")
        assert not (tmp_path / "run").exists()
