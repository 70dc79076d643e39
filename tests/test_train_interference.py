"""Cosines between gradients of tasks: against float64, with the noise they are said to have, and leaving no trace."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qdora.errors import UserError
from qdora.model.inject import adapter_parameters
from qdora.run.train import train_run
from qdora.train.checkpoint import random_state
from qdora.train.interference import GradientProbe, agreement, conflicts, gram_matrices, in_words, measure
from tests import launched, reference, tiny_adapted, tiny_run
from tests.run_files import assert_same_run, same_tensors, stop_after, timeless
from tests.test_data_loader import tokenised


def halves(generator: np.random.Generator, size: int, noise: float, num_tokens: Any) -> tuple[Any, list[Any]]:
    """Half gradients of three tasks: true ones with known cosines, and errors of variance noise^2 / tokens."""
    common, own = generator.normal(size=size), generator.normal(size=(3, size))
    true = np.stack([common + own[0], common + own[1], -common + own[2]])
    found = [
        true[task] + noise / np.sqrt(tokens) * generator.normal(size=size)
        for task in range(3)
        for tokens in num_tokens[task]
    ]
    return true, found


def test_cosines_are_those_of_the_gradients() -> None:
    tokens = np.array([[10, 30], [20, 20], [5, 7]])
    _, found = halves(np.random.default_rng(0), 50, 3.0, tokens)
    whole = [(tokens[t, 0] * found[2 * t] + tokens[t, 1] * found[2 * t + 1]) / tokens[t].sum() for t in range(3)]
    gram = np.array([[a @ b for b in found] for a in found])
    result = agreement(gram, tokens.astype(np.float64))
    for i in range(3):
        assert result.norms[i] == pytest.approx(np.linalg.norm(whole[i]))
        assert result.own_cosines[i] == pytest.approx(reference.cosine(found[2 * i], found[2 * i + 1]))
        for j in range(3):
            assert result.cosines[i, j] == pytest.approx(reference.cosine(whole[i], whole[j]))


@pytest.mark.parametrize(("noise", "most"), [(3.0, 1.15), (8.0, 1.35)])
def test_the_noise_is_that_of_a_new_draw_of_examples(noise: float, most: float) -> None:
    """Probes of the same true gradients: the spread of each cosine against the noise that is said. Where the halves of
    a probe hardly agree (own cosines near 0.3), the errors of two tasks meet, and are counted twice."""
    generator = np.random.default_rng(1)
    tokens = np.array([[12, 20], [16, 16], [40, 24]])
    true, _ = halves(generator, 400, 0.0, tokens)
    cosines, noises = [], []
    for _ in range(500):
        found = [
            true[task] + noise / np.sqrt(count) * generator.normal(size=400)
            for task in range(3)
            for count in tokens[task]
        ]
        result = agreement(np.array(found) @ np.array(found).T, tokens.astype(np.float64))
        cosines.append(result.cosines)
        noises.append(result.noise**2)
    spread, said = np.std(cosines, axis=0), np.sqrt(np.mean(noises, axis=0))
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert 0.9 < said[i, j] / spread[i, j] < most


def test_products_are_summed_by_kind_and_block() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"model.layers.0.q.lora_A": (3, 4), "model.layers.1.q.lora_A": (3, 4), "model.layers.1.q.magnitude": (5,)}
    gradients = [{key: torch.randn(shape, generator=generator) for key, shape in shapes.items()} for _ in range(4)]
    del gradients[2]["model.layers.0.q.lora_A"]
    grams = gram_matrices(gradients, [*shapes, "model.layers.7.q.lora_B"])
    assert set(grams) == {"all", "lora_A", "magnitude", "0", "1"}
    members = {"all": list(shapes), "lora_A": list(shapes)[:2], "magnitude": list(shapes)[2:], "0": list(shapes)[:1]}
    for group, keys in members.items():
        for i in range(4):
            for j in range(4):
                expected = sum(
                    float((gradients[i][key].double() * gradients[j][key].double()).sum())
                    for key in keys
                    if key in gradients[i] and key in gradients[j]
                )
                assert grams[group][i, j] == pytest.approx(expected, rel=1e-12, abs=1e-12)


def probe_of(model: Any) -> tuple[GradientProbe, dict[str, Any]]:
    from qdora.data.batching import Batching, micro_batches

    sets = {name: tokenised(name, [6, 9, 7, 5], seed=seed) for seed, name in enumerate(("one", "two"))}
    batching = Batching(max_tokens=20, pad_id=0)
    batches = {
        name: tuple(micro_batches(part.examples[half::2], batching, [name]) for half in (0, 1))
        for name, part in sets.items()
    }
    return GradientProbe(batches), {name: part.examples for name, part in sets.items()}  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_models_gradients_are_those_of_the_mean_loss(kind: str) -> None:
    """Against autograd on the model's own logits, example by example, in one float64 sum."""
    model = tiny_adapted.adapted(kind=kind, quant="nf4", dropout=0.5).train()
    parameters = adapter_parameters(model)
    probe, examples = probe_of(model)
    before = random_state()["cpu"]
    report = measure(model, probe, parameters, device=torch.device("cpu"))
    assert torch.equal(random_state()["cpu"], before)
    assert all(parameter.grad is None for parameter in parameters.values())
    model.eval()
    vectors = {}
    for name, found in examples.items():
        total, count = 0.0, 0
        for example in found:
            ids = torch.from_numpy(example.input_ids.astype(np.int64))[None]
            logits = model(input_ids=ids).logits[0]
            wanted = torch.from_numpy(example.loss_mask)[1:]
            total = total + torch.nn.functional.cross_entropy(logits[:-1][wanted], ids[0, 1:][wanted], reduction="sum")
            count += int(wanted.sum())
        grads = torch.autograd.grad(total / count, list(parameters.values()))
        vectors[name] = torch.cat([grad.flatten().double() for grad in grads]).numpy()
    expected = reference.cosine(vectors["one"], vectors["two"])
    assert report["cosines"][0][1] == pytest.approx(expected, abs=2e-3)  # bf16 gradients
    assert report["norms"][0] == pytest.approx(np.linalg.norm(vectors["one"]), rel=2e-3)
    assert set(report["groups"]) == {"lora_A", "lora_B", *(["magnitude"] if kind == "dora" else [])}
    assert set(report["blocks"]) == {"0", "1"}
    assert report["num_examples"] == {"one": [2, 2], "two": [2, 2]}
    assert report["bytes"] == 2 * 2 * 2 * len(vectors["one"])


def made_report(cosine: float, noise: float = 0.05) -> dict[str, Any]:
    return {
        "tasks": ["a", "b", "c"],
        "cosines": [[1.0, cosine, 0.5], [cosine, 1.0, -0.04], [0.5, -0.04, 1.0]],
        "noise": [[None, noise, noise], [noise, None, noise], [noise, noise, None]],
        "own_cosines": [0.9, 0.8, 0.1],
        "step": 7,
    }


def test_a_conflict_is_what_chance_does_not_do() -> None:
    assert conflicts(made_report(-0.3)) == [("a", "b", -0.3, 0.05)]
    assert conflicts(made_report(-0.09)) == []
    text = in_words(made_report(-0.3), 7)
    assert "after step 7" in text
    assert "In conflict: a and b (-0.30 ± 0.05)." in text
    assert "Most alike: a and c (0.50)." in text
    assert "Too few examples to tell: c (" in text
    assert "No two tasks are in conflict" in in_words(made_report(0.3), 7)


def probed(root: Path) -> Any:
    return tiny_run.recipe(root, interference__every=2, interference__examples=2, data__validation_fraction=0.2)


def test_a_run_with_a_probe_trains_as_one_without(root: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    train_run(tiny_run.recipe(root, data__validation_fraction=0.2), whole)
    train_run(probed(root), tmp_path / "run")
    lines = timeless(tmp_path / "run")
    measured = [line for line in lines if "interference" in line]
    assert [line["step"] for line in measured] == [2, 4, 6]
    assert [line for line in lines if "interference" not in line] == timeless(whole)
    for file in ("adapter/adapter_model.safetensors", "checkpoints/step-6/optimizer.safetensors"):
        same_tensors(tmp_path / "run" / file, whole / file)
    same_tensors(*(run / "checkpoints/step-6/random.safetensors" for run in (tmp_path / "run", whole)))
    document = json.loads((tmp_path / "run/interference.json").read_text())
    assert [each["step"] for each in document["measurements"]] == [2, 4, 6]
    last = document["measurements"][-1]
    assert last["tasks"] == ["sums", "letters"]
    assert last["seconds"] > 0
    assert -1 <= last["lowest_cosine"] == last["mean_cosine"] == last["cosines"][0][1] <= 1


def test_a_resumed_run_has_the_same_measurements(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train_run(probed(root), tmp_path / "whole")
    stop_after(monkeypatch, 3)
    with pytest.raises(Exception, match="stopped after step 3"):
        train_run(probed(root), tmp_path / "run")
    monkeypatch.undo()
    train_run(probed(root), tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_what_cannot_be_measured_is_refused(root: Path, tmp_path: Path) -> None:
    settings = tiny_run.recipe(root, interference__every=2, data__validation_fraction=0.01)
    with pytest.raises(UserError) as error:
        train_run(settings, tmp_path / "run")
    assert "interference.every: sums has 1 validation example, must be at least 2." in str(error.value)
    assert not (tmp_path / "run").exists()
    alone = tiny_run.recipe(root, interference__every=2, data__mix=[{"source": str(root / "data/sums.jsonl")}])
    with pytest.raises(UserError, match=r"interference\.every: needs at least two sources in data\.mix, got 1"):
        train_run(alone, tmp_path / "run")
    with pytest.raises(UserError, match=r"interference\.examples: would be ignored because interference\.every"):
        tiny_run.recipe(root, interference__examples=4)


def two(rank: int, settings: Any, directory: Path) -> None:
    train_run(settings, directory)


def test_of_two_processes_the_first_measures(root: Path, tmp_path: Path) -> None:
    """No dropout: then two processes train as one does, but for the order of sums."""
    changes = {"interference__every": 2, "interference__examples": 2, "data__validation_fraction": 0.2}
    settings = tiny_run.recipe(root, **changes, adapter__dropout=0.0, train__steps=2)
    assert launched.run(2, two, settings, tmp_path / "two") == ["", ""]
    train_run(settings, tmp_path / "one")
    (found,), (expected,) = (
        [line["interference"] for line in timeless(tmp_path / name) if "interference" in line]
        for name in ("two", "one")
    )
    assert found["tasks"] == expected["tasks"]
    assert found["num_examples"] == expected["num_examples"]
    np.testing.assert_allclose(found["cosines"], expected["cosines"], atol=1e-3)


def test_a_task_without_a_gradient_leaves_the_noise_of_the_others() -> None:
    """As where all its weight is 0: its cosines are unknown, those of the others and their noise are as without it."""
    tokens = np.array([[10, 30], [20, 20], [5, 7]])
    _, found = halves(np.random.default_rng(1), 50, 3.0, tokens)
    found[4:] = [np.zeros(50), np.zeros(50)]
    both = agreement(np.array(found) @ np.array(found).T, tokens.astype(np.float64))
    alone = agreement(np.array(found[:4]) @ np.array(found[:4]).T, tokens[:2].astype(np.float64))
    assert both.cosines[0, 1] == pytest.approx(alone.cosines[0, 1])
    assert both.noise[0, 1] == pytest.approx(alone.noise[0, 1])
    assert np.isnan(both.cosines[2, :2]).all()
