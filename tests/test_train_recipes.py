"""Whole runs of other recipes: streams, packing, generated answers, cosines of tasks, routers, weights of tasks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qdora.data import stream
from qdora.data.batching import Batching
from qdora.data.loader import StepLoader
from qdora.errors import RunFailure, UserError
from qdora.model.inject import adapter_parameters
from qdora.plan.memory_plan import plan
from qdora.run.evaluate import EvalOptions, evaluate_target
from qdora.run.run import train_run
from qdora.train import checks as packed_attention
from qdora.train.checkpoint import random_state
from qdora.train.interference import agreement, measure
from tests import reference, support
from tests.support import (
    ADAPTER,
    UNEVALUATED,
    assert_close_runs,
    assert_resumes,
    assert_same_run,
    in_batches,
    make_gradients_nan,
    same_tensors,
    timeless,
    training_lines,
)


def read(file: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(file.read_text())
    return document


def train(rank: int, settings: Any, directory: Path) -> None:
    train_run(settings, directory)


def streamed(root: Path, **changes: Any) -> Any:
    """sums is streamed, in windows of 5 rows; letters is not."""
    sums, letters = support.write_data(root / "data")
    mix = [{"source": str(sums), "stream": True, "shuffle_window": 5}, {"source": str(letters)}]
    own = {"data__mix": mix, "data__strategy": "equal", "data__too_long": "drop"}
    return support.tiny_recipe(root, **own | changes)


@pytest.fixture(scope="module")
def of_a_stream(root: Path) -> Path:
    train_run(streamed(root), root / "stream")
    return root / "stream"


def test_a_run_on_a_stream_resumes_and_says_what_is_not_known(
    root: Path, of_a_stream: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_resumes(streamed(root), of_a_stream, tmp_path / "run", stop_at=3)
    loader = read(of_a_stream / "checkpoints/step-6/state.json")["loader"]
    assert loader["streams"]["sums"]["num_drawn"] == 12
    log = (of_a_stream / "log.txt").read_text()
    assert "sums: examples unknown, tokens unknown, asked 50.0%, seen 50.0%, tokens seen unknown, passes unknown" in log
    assert "sums: 12 examples seen, 0 cut, 0 dropped, 0 complete passes." in log
    assert sorted(read(of_a_stream / "eval/step-6.json")["tasks"]) == ["letters"]
    with pytest.raises(UserError, match=r"--split: a stream \(sums\) has only the splits validation, test"):
        evaluate_target(str(of_a_stream), EvalOptions(split="train"))
    # Whatever reading raises, the work is saved
    next_step = StepLoader.next_step

    def fails(self: StepLoader) -> Any:
        step = next_step(self)  # the streams have moved on
        if self.position > 12:
            raise KeyError("gone")
        return step

    with monkeypatch.context() as patch:
        patch.setattr(StepLoader, "next_step", fails)
        with pytest.raises(RunFailure, match=r"^step 4: KeyError\('gone'\)\. Fix: resume .* Safe on disk: .*step-3"):
            train_run(streamed(root), tmp_path / "broken")
    train_run(streamed(root), tmp_path / "broken", resume=True)
    assert_same_run(tmp_path / "broken", of_a_stream)


def test_a_faulty_row_ends_a_run_with_its_work_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both runs take each row once, in one order: mending the row gives the undisturbed result."""
    monkeypatch.setattr(stream, "_SAMPLE", 8)  # the faulty row is not among those that are read beforehand
    file, letters = support.write_data(tmp_path / "data")
    mix = [{"source": str(file), "stream": True, "shuffle_window": 5, "weight": 1.0}]
    mix.append({"source": str(letters), "weight": 1e-6})
    asked, more = (
        streamed(tmp_path, data__mix=mix, data__strategy="weights", data__max_bad_rows=number) for number in (0, 3)
    )
    train_run(asked, tmp_path / "whole")
    good = file.read_text()
    lines = good.splitlines(keepends=True)
    file.write_text("".join([*lines[:20], lines[20][:9] + "\n", *lines[21:]]))
    place = sum(map(len, lines[:20]))
    said = rf"^step 6: sums: 1 faulty row, .*sums\.jsonl: byte {place}: not JSON.* Safe on disk: .*checkpoints/step-5"
    for run, resume in (("run", False), ("run", True), ("mended", False)):  # not mended yet: nothing is lost
        with pytest.raises(RunFailure, match=said):
            train_run(asked, tmp_path / run, resume=resume)
    assert "data.max_bad_rows" in (tmp_path / "run/log.txt").read_text()
    assert train_run(more, tmp_path / "run", resume=True)["num_steps"] == 6
    seen = read(tmp_path / "run/mix.json")["seen"]["sums"]
    assert (seen["num_bad_rows"], seen["num_examples"]) == (1, 24)
    assert seen["bad_rows"][0].startswith(f"{file}: byte {place}: not JSON")
    assert "sums: 1 faulty rows were skipped" in (tmp_path / "run/log.txt").read_text()
    file.write_text(good)
    train_run(asked, tmp_path / "mended", resume=True)
    same_tensors(tmp_path / "whole" / ADAPTER, tmp_path / "mended" / ADAPTER)


@pytest.mark.parametrize("layout", ["rows", "single"])
def test_a_packed_run_has_the_losses_of_an_unpacked_one(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: Any
) -> None:
    plain = {"adapter__dropout": 0.0, "adapter__dtype": "float32", "train__batch": 12, **UNEVALUATED}
    train_run(support.tiny_recipe(root, **plain), tmp_path / "plain")
    monkeypatch.setattr(packed_attention, "layout_for", lambda attention: layout)
    seen: list[Any] = []
    in_batches(monkeypatch, lambda _number, _loss, _ids, options: seen.append(options["packing"]))
    train_run(support.tiny_recipe(root, **plain, data__packing=True), tmp_path / "packed")
    assert {packing.example_index.shape[0] > 1 for packing in seen} == {layout == "rows"}
    assert any((packing.position_ids == 0).sum(dim=1).max() > 1 for packing in seen)
    assert_close_runs(tmp_path / "plain", tmp_path / "packed")
    assert "packed examples stay apart: " in (tmp_path / "packed/log.txt").read_text()


def test_a_packed_run_resumes_and_keeps_bad_batches(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = support.tiny_recipe(root, data__packing=True, train__batch=12)  # with dropout
    train_run(recipe, tmp_path / "whole")
    assert_resumes(recipe, tmp_path / "whole", tmp_path / "run", stop_at=3)
    make_gradients_nan(monkeypatch)
    with pytest.raises(RunFailure, match="is not finite"):
        train_run(recipe, tmp_path / "bad")
    kept = read(tmp_path / "bad/bad-steps/step-1/batch.json")["examples"]
    assert len({(each["task"], each["id"]) for each in kept}) == 12
    for each in kept:
        pairs = zip(each["input_ids"], each["labels"], strict=True)
        assert any(label != -100 for label in each["labels"])
        assert all(label in (-100, token) for token, label in pairs)


@pytest.fixture(scope="module")
def generated(root: Path) -> Path:
    """Evaluated by generation on the source whose choices are single letters."""
    recipe = support.tiny_recipe(root, eval__method="generate", eval__tasks=["letters"], eval__every=4)
    train_run(recipe, root / "generated")
    return root / "generated"


def test_a_run_keeps_generated_answers_beside_the_log_likelihoods(generated: Path) -> None:
    for step in (0, 4, 6):
        scored, found = (read(generated / f"eval/step-{step}{end}.json") for end in ("", "-generated"))
        assert list(scored["tasks"]) == list(found["tasks"]) == ["letters"]
        counts = found["tasks"]["letters"]
        assert counts["num_examples"] == scored["tasks"]["letters"]["num_examples"] == len(found["per_example"])
        assert counts["num_right"] + counts["num_wrong"] + counts["num_unparsable"] == counts["num_examples"]
        assert found["settings"]["max_new_tokens"] == 32
    _, evaluated, _ = [line["eval"]["letters"] for line in timeless(generated) if "eval" in line]
    counts = read(generated / "eval/step-4-generated.json")["tasks"]["letters"]
    assert evaluated["generated"] == {key: value for key, value in counts.items() if key != "unparsable"}
    assert evaluated["nll_per_token"] > 0
    # eval takes the method of the run, or another
    own = evaluate_target(str(generated), EvalOptions(tasks=["letters"]))
    assert own["generation"]["tasks"] == read(generated / "eval/step-6-generated.json")["tasks"]
    assert read(generated / "eval/final-validation-generated.json")["tasks"] == own["generation"]["tasks"]
    assert read(generated / "eval/final-validation.json")["tasks"] == own["evaluation"]["tasks"]
    other = evaluate_target(str(generated), EvalOptions(tasks=["letters"], method="loglikelihood"))
    assert "generation" not in other
    assert other["evaluation"]["tasks"] == own["evaluation"]["tasks"]


def test_sources_that_cannot_be_generated_are_refused_before_anything_is_loaded(
    root: Path, generated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place in ("qdora.run.base.load_base", "qdora.run.evaluate.load_target"):
        monkeypatch.setattr(place, lambda *_, **__: pytest.fail("the model was loaded"))
    with pytest.raises(UserError, match="got task 'sums', whose example 29 has no choices"):
        train_run(support.tiny_recipe(root, eval__method="generate"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    (tmp_path / "a.txt").write_text("text")
    for target, options, said in (
        (generated, {"tasks": ["sums"]}, "got task 'sums'"),
        (generated, {"method": "generation"}, "--method: got 'generation', must be one of loglikelihood, generate"),
        (root / "model", {"texts": [tmp_path / "a.txt"], "method": "generate"}, "--method: .*got only --text"),
    ):
        with pytest.raises(UserError, match=said):
            evaluate_target(str(target), EvalOptions(**options))


def halves(generator: np.random.Generator, true: Any, noise: float, num_tokens: Any) -> list[Any]:
    """Half gradients of tasks: the true ones, with errors of variance noise^2 / tokens."""
    return [
        each + noise / np.sqrt(count) * generator.normal(size=len(each))
        for each, tokens in zip(true, num_tokens, strict=True)
        for count in tokens
    ]


def true_gradients(generator: np.random.Generator, size: int) -> Any:
    common, own = generator.normal(size=size), generator.normal(size=(3, size))
    return np.stack([common + own[0], common + own[1], -common + own[2]])


def agreement_of(found: list[Any], tokens: Any) -> Any:
    return agreement(np.array(found) @ np.array(found).T, tokens.astype(np.float64))


def test_cosines_are_those_of_the_gradients() -> None:
    """A task without a gradient, as where all its weight is 0, leaves the noise of the others as it is without it."""
    tokens = np.array([[10, 30], [20, 20], [5, 7]])
    generator = np.random.default_rng(0)
    found = halves(generator, true_gradients(generator, 50), 3.0, tokens)
    whole = [(tokens[t, 0] * found[2 * t] + tokens[t, 1] * found[2 * t + 1]) / tokens[t].sum() for t in range(3)]
    result = agreement_of(found, tokens)
    for i in range(3):
        assert result["norms"][i] == pytest.approx(np.linalg.norm(whole[i]))
        assert result["own_cosines"][i] == pytest.approx(reference.cosine(found[2 * i], found[2 * i + 1]))
        for j in range(3):
            assert result["cosines"][i, j] == pytest.approx(reference.cosine(whole[i], whole[j]))
    both = agreement_of([*found[:4], np.zeros(50), np.zeros(50)], tokens)
    alone = agreement_of(found[:4], tokens[:2])
    for name in ("cosines", "noise"):
        assert both[name][0, 1] == pytest.approx(alone[name][0, 1])
    assert np.isnan(both["cosines"][2, :2]).all()


@pytest.mark.parametrize(("noise", "most"), [(3.0, 1.15), (8.0, 1.35)])
def test_the_noise_is_that_of_a_new_draw_of_examples(noise: float, most: float) -> None:
    """The spread of each cosine against the noise that is said. Where the halves of a probe hardly agree (own cosines
    near 0.3), the errors of two tasks meet, and are counted twice."""
    generator, tokens = np.random.default_rng(1), np.array([[12, 20], [16, 16], [40, 24]])
    true = true_gradients(generator, 400)
    results = [agreement_of(halves(generator, true, noise, tokens), tokens) for _ in range(500)]
    spread = np.std([each["cosines"] for each in results], axis=0)
    said = np.sqrt(np.mean([each["noise"] ** 2 for each in results], axis=0))
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert 0.9 < said[i, j] / spread[i, j] < most


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_models_gradients_are_those_of_the_mean_loss(kind: str) -> None:
    """Against autograd on the model's own logits, example by example, in one float64 sum."""
    model = support.adapted_model(kind=kind, quant="nf4", dropout=0.5)
    parameters = adapter_parameters(model)
    sets = {name: support.examples([6, 9, 7, 5], tasks=name, seed=seed) for seed, name in enumerate("ab")}
    batches = {
        name: tuple(support.step_of(found[half::2], Batching(20, 0)).micro_batches for half in (0, 1))
        for name, found in sets.items()
    }
    before = random_state()["cpu"]
    report = measure(model, batches, parameters, device=torch.device("cpu"))  # type: ignore[arg-type]
    assert all(module.training for module in model.modules())
    assert torch.equal(random_state()["cpu"], before)
    assert all(parameter.grad is None for parameter in parameters.values())
    model.eval()
    vectors = {}
    for name, found in sets.items():
        total, count = 0.0, 0
        for example in found:
            ids = torch.from_numpy(example.input_ids.astype(np.int64))[None]
            wanted = torch.from_numpy(example.loss_mask)[1:]
            logits = model(input_ids=ids).logits[0, :-1][wanted]
            total = total + torch.nn.functional.cross_entropy(logits, ids[0, 1:][wanted], reduction="sum")
            count += int(wanted.sum())
        grads = torch.autograd.grad(total / count, list(parameters.values()))
        vectors[name] = torch.cat([grad.flatten().double() for grad in grads]).numpy()
    expected = reference.cosine(vectors["a"], vectors["b"])
    assert report["cosines"][0][1] == pytest.approx(expected, abs=2e-3)  # bf16 gradients
    assert report["norms"][0] == pytest.approx(np.linalg.norm(vectors["a"]), rel=2e-3)
    assert report["num_examples"] == {"a": [2, 2], "b": [2, 2]}
    assert report["num_conflicts"] == int(expected < -2 * report["noise"][0][1])


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


def test_of_two_processes_the_first_measures(root: Path, tmp_path: Path) -> None:
    """No dropout: then two processes train as one does, but for the order of sums."""
    settings = support.tiny_recipe(root, **PROBED, eval__every=2, adapter__dropout=0.0, train__steps=2)
    assert support.run_processes(2, train, settings, tmp_path / "two") == ["", ""]
    train_run(settings, tmp_path / "one")
    (found,), (expected,) = (
        [line["interference"] for line in timeless(tmp_path / name) if "interference" in line]
        for name in ("two", "one")
    )
    assert (found["tasks"], found["num_examples"]) == (expected["tasks"], expected["num_examples"])
    np.testing.assert_allclose(found["cosines"], expected["cosines"], atol=1e-3)


def routed(root: Path, name: str = "qwen3_moe", **changes: Any) -> Any:
    folder = root / name
    if not (folder / "model").exists():
        support.write_mixture(folder / "model", name)
    own = {"adapter__experts": {"rank": 2}, "train__router_aux_loss": 0.05, "train__steps": 4, **UNEVALUATED}
    return support.tiny_recipe(folder, **own | changes)


def test_a_run_with_the_loss_of_routers(root: Path, tmp_path: Path) -> None:
    recipe, whole = routed(root, data__packing=True), tmp_path / "whole"
    train_run(recipe, whole)
    assert_resumes(recipe, whole, tmp_path / "run", stop_at=2, step=4)
    lines = training_lines(whole)
    for line in lines:
        assert 0.5 < line["router_aux_loss"] < 4.0
        nll = sum(task["nll_sum"] for task in line["tasks"].values()) / line["num_label_tokens"]
        assert line["loss"] == pytest.approx(nll)
    train_run(routed(root, data__packing=True, train__router_aux_loss=0.0), tmp_path / "off")
    off = training_lines(tmp_path / "off")
    assert not any("router_aux_loss" in line for line in off)
    assert (off[0]["loss"] == lines[0]["loss"], off[-1]["loss"] == lines[-1]["loss"]) == (True, False)
    refused = routed(root, "lfm2_moe")
    with pytest.raises(UserError, match=r"router_aux_loss: must be 0 with lfm2_moe, got 0\.05"):
        train_run(refused, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    with pytest.raises(UserError, match="router_aux_loss: must be 0 with"):
        plan(refused)


def test_fixed_weights_change_a_run_and_equal_ones_do_not(root: Path, tmp_path: Path) -> None:
    sums, letters = ({"source": str(file)} for file in support.write_data(root / "data"))
    losses = []
    for number, weight in enumerate(({}, {"loss_weight": 1.0}, {"loss_weight": 4.0})):
        run = tmp_path / str(number)
        train_run(support.tiny_recipe(root, train__steps=2, **UNEVALUATED, data__mix=[sums | weight, letters]), run)
        losses.append([line["loss"] for line in timeless(run)])
    assert losses[1] == pytest.approx(losses[0])
    assert losses[2][0] == pytest.approx(losses[0][0])  # the first step's loss is told without weights
    assert losses[2][1] != pytest.approx(losses[0][1], rel=1e-7)


def test_what_cannot_be_measured_or_weighted_is_refused(root: Path, tmp_path: Path) -> None:
    sums, letters = map(str, support.write_data(root / "data"))
    more = tmp_path / "more.jsonl"  # rows of the task of the first source
    row = {"task": "sums", "question": "1 + 1?", "choices": ["2", "3"], "answer": 0}
    more.write_text("".join(json.dumps({**row, "id": str(n)}) + "\n" for n in range(30)))
    weighted = {"source": sums, "loss_weight": 2.0}
    every = {"interference__every": 2}
    for changes, words in (
        (every | {"eval__every": 2, "data__validation_fraction": 0.01}, "every: sums has 1 validation example"),
        (every | {"data__mix": [{"source": letters}]}, "needs at least two sources in data.mix, got 1"),
        (every, "interference.every: must be a multiple of eval.every"),
        (every | {"eval__every": 4}, "interference.every: must be a multiple of eval.every"),
        ({"interference__examples": 4}, "interference.examples: would be ignored because interference.every"),
        ({"data__mix": [weighted]}, "loss_weight: would be ignored because there is no other source"),
        ({"data__mix": [weighted, {"source": str(more)}]}, "task sums is in sums with loss_weight 2 and in more with"),
    ):
        with pytest.raises(UserError) as error:
            train_run(support.tiny_recipe(root, **changes), tmp_path / "run")
        assert words in str(error.value)
        assert not (tmp_path / "run").exists()
