"""A step whose loss is not finite or a spike: never applied, kept to be looked at, skipped or the end of the run."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from safetensors.torch import load_file

from qdora.data.build_data import make_loader, read_data, tokenized_mix
from qdora.errors import Interrupted, RunFailure, UserError
from qdora.model.build_model import find_model
from qdora.recipe.settings import Recipe
from qdora.recipe.train_settings import TrainConfig
from qdora.run.train import train_run
from qdora.train import passes
from qdora.train.step_checks import BadSteps
from tests import launched, tiny_run
from tests.run_files import assert_same_run, make_gradients_nan, same_tensors, stop_after, timeless

STEPS, BAD = 11, 10
ADAPTER = "adapter/adapter_model.safetensors"


def recipe(root: Path, **changes: Any) -> Recipe:
    """No evaluation, and a checkpoint at the end only."""
    plain = {"eval__tasks": [], "eval__limit": ..., "train__checkpoint_every": None, "train__steps": STEPS}
    return tiny_run.recipe(root, **(plain | changes))


def train(settings: Recipe, run: Path, resume: bool = False) -> dict[str, Any]:
    return train_run(settings, run, resume=resume, console=Console(quiet=True))


def longest_of_step(settings: Recipe, step: int) -> tuple[str, list[int]]:
    """(id, token ids) of an example that the step takes and no other one of the run."""
    _, tokenizer = find_model(settings)
    loader = make_loader(settings, tokenized_mix(settings, tokenizer, read_data(settings.data)[0]), tokenizer)
    batch = [loader.next_step() for _ in range(step)][-1]
    name, ids, _ = max(batch.micro_batches[0].examples(), key=lambda example: len(example[1]))
    return name, ids.tolist()


def scale_loss(ids: list[int], factor: float) -> None:
    """From now on, the loss of the example with these tokens is `factor` times what it is, and its gradient."""
    real = passes.batch_loss

    def scaled(model: Any, input_ids: torch.Tensor, *rest: Any, **settings: Any) -> Any:
        found = real(model, input_ids, *rest, **settings)
        rows = [row[: len(ids)] == ids for row in input_ids.tolist()]
        factors = torch.where(torch.tensor(rows), factor, 1.0)
        example_nll = found.example_nll * factors
        whole = float(example_nll.sum() / found.example_nll.sum()) if any(rows) else 1.0
        return type(found)(found.nll_sum * whole, example_nll, found.example_tokens)

    passes.batch_loss = scaled


@pytest.fixture
def bad_example(root: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, list[int]]:
    """An example of step `BAD`; the loss function is put back afterwards."""
    monkeypatch.setattr(passes, "batch_loss", passes.batch_loss)
    return longest_of_step(recipe(root), BAD)


CASES = {
    "nan": (math.nan, {}, "loss nan is not finite"),
    "spike": (60.0, {"train__spike": 3}, "loss .* is more than 3 times .*, the median of the last 9 steps"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_bad_step_is_skipped_and_changes_nothing(
    root: Path, tmp_path: Path, bad_example: tuple[str, list[int]], case: str
) -> None:
    factor, changes, reason = CASES[case]
    run = tmp_path / "run"
    train(recipe(root), tmp_path / "whole")
    every = {"train__checkpoint_every": 1, "train__keep_checkpoints": 20}
    settings = recipe(root, train__on_bad_step="skip", **every, **changes)
    scale_loss(bad_example[1], factor)
    summary = train(settings, run)
    assert (summary["num_skipped"], summary["num_steps"]) == (1, STEPS)
    for file in (ADAPTER, "optimizer.safetensors"):
        same_tensors(run / f"checkpoints/step-{BAD}" / file, run / f"checkpoints/step-{BAD - 1}" / file)
    trained = [load_file(run / f"checkpoints/step-{step}" / ADAPTER) for step in (BAD, STEPS)]
    assert any(not torch.equal(trained[0][name], trained[1][name]) for name in trained[0]), "the run did not go on"
    expected, lines = timeless(tmp_path / "whole"), timeless(run)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert lines[: BAD - 1] == expected[: BAD - 1]
    assert lines[-1]["tasks"].keys() == expected[-1]["tasks"].keys()
    assert lines[-1]["num_tokens"] == expected[-1]["num_tokens"]
    assert lines[-1]["lr"] == expected[-1]["lr"]
    assert set(lines[BAD - 1]) == {"step", "skipped"}
    log = (run / "log.txt").read_text()
    assert f"Step {BAD} is skipped: loss" in log
    assert f"bad-steps/step-{BAD}" in log
    (kept,) = (run / "bad-steps").iterdir()
    document = json.loads((kept / "batch.json").read_text())
    assert document["step"] == BAD
    assert re.fullmatch(reason, document["reason"])
    assert_kept(kept, document, expected[BAD - 1], bad_example, factor)


def assert_kept(
    kept: Path, document: dict[str, Any], expected: dict[str, Any], bad: tuple[str, list[int]], factor: float
) -> None:
    """The batch's two files agree with each other and with the line of the same step of an undisturbed run."""
    examples, tensors = document["examples"], load_file(kept / "batch.safetensors")
    assert len(examples) == expected["num_examples"] == len(tensors["input_ids"])
    assert int(tensors["attention_mask"].sum()) == expected["num_tokens"]
    assert int((tensors["labels"] != -100).sum()) == expected["num_label_tokens"]
    for index, each in enumerate(examples):
        length = len(each["input_ids"])
        assert tensors["input_ids"][index, :length].tolist() == each["input_ids"]
        assert tensors["labels"][index, :length].tolist() == each["labels"]
        assert tensors["attention_mask"][index].sum() == length
        assert each["num_label_tokens"] == sum(label != -100 for label in each["labels"])
        assert ("=" in each["text"]) == (each["task"] == "sums")
    (found,) = [each for each in examples if each["input_ids"] == bad[1]]
    assert found["id"] == bad[0]
    assert (found["nll_sum"] is None) == math.isnan(factor)
    whole = sum(task["nll_sum"] for task in expected["tasks"].values())
    others = sum(each["nll_sum"] for each in examples if each is not found)
    if math.isnan(factor):
        assert document["loss"] is None
        assert 0 < others < whole
    else:
        assert others + found["nll_sum"] / factor == pytest.approx(whole, rel=1e-5)
        assert document["loss"] == pytest.approx((others + found["nll_sum"]) / expected["num_label_tokens"], rel=1e-5)


@pytest.mark.parametrize("stop_at", [BAD - 2, BAD])
def test_interrupted_and_resumed_decides_alike(
    root: Path, tmp_path: Path, bad_example: tuple[str, list[int]], monkeypatch: pytest.MonkeyPatch, stop_at: int
) -> None:
    scale_loss(bad_example[1], 60.0)
    settings = recipe(root, train__on_bad_step="skip", train__spike=3)
    train(settings, tmp_path / "whole")
    with monkeypatch.context() as patched:
        stop_after(patched, stop_at)
        with pytest.raises(Interrupted):
            train(settings, tmp_path / "run")
    assert train(settings, tmp_path / "run", resume=True)["num_skipped"] == 1
    assert_same_run(tmp_path / "run", tmp_path / "whole", step=STEPS)


def test_a_spike_stops_the_run_and_may_be_skipped_on_resume(
    root: Path, tmp_path: Path, bad_example: tuple[str, list[int]]
) -> None:
    scale_loss(bad_example[1], 60.0)
    said = rf"step {BAD}: loss .* is more than 3 times .*"
    said += rf"batch in bad-steps/step-{BAD}, .* -s train.on_bad_step=skip.*step-{BAD - 1}, .*step-{BAD}"
    with pytest.raises(RunFailure, match=said):
        train(recipe(root, train__spike=3), tmp_path / "run")
    settings = recipe(root, train__spike=3, train__on_bad_step="skip")
    train(settings, tmp_path / "run", resume=True)
    train(settings, tmp_path / "whole")
    assert_same_run(tmp_path / "run", tmp_path / "whole", step=STEPS)


def test_too_many_in_a_row_stop_the_run(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = recipe(root, train__on_bad_step="skip", train__max_skips=2)
    make_gradients_nan(monkeypatch)
    said = r"step 3: gradient norm nan is not finite.*The 2 steps before it were skipped.*step-2, .*bad-steps/step-3"
    for resume in (False, True):
        with pytest.raises(RunFailure, match=said):
            train(settings, tmp_path, resume=resume)
    assert [line["step"] for line in timeless(tmp_path)] == [1, 2]
    assert sorted(path.name for path in (tmp_path / "bad-steps").iterdir()) == ["step-1", "step-2", "step-3"]
    kept = json.loads((tmp_path / "bad-steps/step-3/batch.json").read_text())["examples"]
    assert all(each["nll_sum"] > 0 for each in kept)
    monkeypatch.undo()
    assert train(settings, tmp_path, resume=True)["num_skipped"] == 2


def in_two(rank: int, settings: Recipe, directory: Path, ids: list[int]) -> None:
    scale_loss(ids, math.nan)
    train(settings, directory)


def test_two_processes_skip_together_and_keep_the_whole_batch(root: Path, tmp_path: Path) -> None:
    """One of them has the bad example."""
    settings = recipe(root, train__on_bad_step="skip", train__steps=3)
    name, ids = longest_of_step(settings, 2)
    assert launched.run(2, in_two, settings, tmp_path, ids) == ["", ""]
    lines = timeless(tmp_path)
    assert ["skipped" in line for line in lines] == [False, True, False]
    examples = json.loads((tmp_path / "bad-steps/step-2/batch.json").read_text())["examples"]
    assert len(examples) == 4
    assert [each["id"] for each in examples if each["nll_sum"] is None] == [name]


@pytest.mark.parametrize(
    "changes, fault",
    [
        ({"train__on_bad_step": "skp"}, "train.on_bad_step: .*got 'skp'.*'skip'"),
        ({"train__spike": 1}, "train.spike: .*got 1"),
        ({"train__max_skips": 3}, "train.max_skips: would be ignored because train.on_bad_step stop skips no step"),
    ],
)
def test_faults(root: Path, changes: dict[str, Any], fault: str) -> None:
    with pytest.raises(UserError, match=fault):
        recipe(root, **changes)


@given(st.lists(st.floats(0.01, 100), max_size=60), st.floats(1.01, 20), st.integers(0, 60))
def test_a_spike_is_above_a_multiple_of_the_median_of_the_last_applied_steps(
    losses: list[float], factor: float, cut: int
) -> None:
    train = TrainConfig(steps=1, batch=1, on_bad_step="skip", max_skips=100, spike=factor)
    guard, applied = BadSteps(train), []
    for index, loss in enumerate(losses):
        if index == cut:
            again = BadSteps(train)
            again.load_state_dict(json.loads(json.dumps(guard.state_dict())))
            guard = again
        usual = float(np.median(applied[-32:])) if len(applied) >= 8 else math.inf
        bad = loss > factor * usual
        assert (guard.fault(loss, 1.0) is not None) == bad
        if bad:
            assert guard.skip()
        else:
            guard.applied(loss)
            applied.append(loss)
    assert guard.num_skipped == len(losses) - len(applied)
