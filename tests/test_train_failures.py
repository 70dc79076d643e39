"""Runs whose memory is short, whose loss is bad, whose gradient is missing: nothing is lost, a resume is exact."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file

from qdora.data.batches import StepLoader
from qdora.data.sources import make_loader, read_data, tokenized_mix
from qdora.errors import RunFailure, UserError
from qdora.files.run_directory import RunDirectory
from qdora.model.build_model import find_model
from qdora.recipe.settings import Recipe
from qdora.run.run import train_run
from qdora.train import optimizer as flat_group
from qdora.train import passes as loss_scale
from qdora.train import trainer
from qdora.train.passes import LossScale
from tests import support
from tests.support import ADAPTER, UNEVALUATED, assert_same_run, in_batches, same_tensors, timeless, training_lines

CUDA = "CUDA out of memory. Tried to allocate 2.00 GiB."


def on_cpu() -> BaseException:
    return RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried")


def on_cuda() -> BaseException:
    return torch.OutOfMemoryError(CUDA)


def eights(root: Path, **changes: Any) -> Recipe:
    return support.tiny_recipe(root, train__batch=8, **UNEVALUATED, **changes)


def small_memory(
    patch: pytest.MonkeyPatch, most_tokens: int, error: Callable[[], BaseException] = on_cuda, *, backward: bool = False
) -> None:
    """An allocator that fails for micro-batches of more tokens."""

    def fail(*_: Any) -> None:
        raise error()

    def hungry(_number: int, loss: Any, ids: torch.Tensor, _options: Any) -> None:
        if ids.numel() > most_tokens:
            loss.nll_sum.register_hook(fail) if backward else fail()

    in_batches(patch, hungry)


def test_losses_are_those_of_enough_memory(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without dropout, of which micro-batches of another size draw other numbers. Memory ends in the backward pass."""
    settings, run, whole = eights(root, adapter__dropout=0.0), tmp_path / "run", tmp_path / "whole"
    train_run(settings, whole)
    small_memory(monkeypatch, 40, on_cpu, backward=True)
    train_run(settings, run)
    shrunk = [line["out_of_memory"] for line in timeless(run) if "out_of_memory" in line]
    sizes = [2048, *(each["tokens_after"] for each in shrunk)]
    assert sizes == sorted(set(sizes), reverse=True)
    assert [each["tokens_before"] for each in shrunk] == sizes[:-1]
    for one, other in zip(training_lines(run), training_lines(whole), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=2e-6)
        assert one["gradient_norm"] == pytest.approx(other["gradient_norm"], rel=1e-4)
        for key in ("step", "num_tokens", "num_label_tokens", "num_examples", "lr"):
            assert one[key] == other[key]


def test_a_retried_step_draws_as_a_first_try(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With dropout: the run equals, bit for bit, one whose micro-batches were as small from that step on."""
    with monkeypatch.context() as patch:
        small_memory(patch, 80)
        train_run(eights(root), tmp_path / "run")
    lines = timeless(tmp_path / "run")
    sizes = {line["step"]: line["out_of_memory"]["tokens_after"] for line in lines if "lr" not in line}
    assert sizes
    next_step, numbers = StepLoader.next_step, itertools.count(1)

    def sized(loader: StepLoader) -> Any:
        loader.batching.max_tokens = sizes.get(next(numbers), loader.batching.max_tokens)
        return next_step(loader)

    monkeypatch.setattr(StepLoader, "next_step", sized)
    train_run(eights(root), tmp_path / "known")
    assert [line for line in lines if "lr" in line] == timeless(tmp_path / "known")


def test_an_example_that_does_not_fit_stops_the_run(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_memory(monkeypatch, 3, on_cpu)
    said = r"step 1: out of memory with one example of \d+ tokens.*Safe on disk: .*step-0"
    with pytest.raises(RunFailure, match=said):
        train_run(eights(root), tmp_path)
    assert any("out_of_memory" in line for line in timeless(tmp_path))
    assert "FAILURE train: " in (tmp_path / "log.txt").read_text()


def test_an_update_without_memory_keeps_a_state(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends the run, which goes on from its checkpoint."""
    lora, real, calls = eights(root, adapter__kind="lora"), flat_group.join_float32, itertools.count(1)

    def join(*args: Any) -> Any:
        if next(calls) >= 4:
            raise on_cuda()
        return real(*args)

    train_run(lora, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(flat_group, "join_float32", join)
        with pytest.raises(RunFailure, match=rf"step 4: the update cannot be computed: {CUDA} Safe .*step-2\.$"):
            train_run(lora, tmp_path / "lora")
    train_run(lora, tmp_path / "lora", resume=True)
    assert_same_run(tmp_path / "lora", tmp_path / "whole")


def test_after_a_sticky_error_the_first_one_is_reported(root: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """After some CUDA errors every later call fails, too."""

    def first(*_: Any) -> None:
        second = Mock(side_effect=RuntimeError("CUDA error: the second one"))
        monkeypatch.setattr(RunDirectory, "checkpoint_directory", second)
        raise RuntimeError("CUDA error: device-side assert triggered")

    in_batches(monkeypatch, first)
    said = r"^step 1: cannot be computed: .*device-side.*could not be saved \(CUDA error: the second.*bad-steps/step-1"
    with pytest.raises(RunFailure, match=said):
        train_run(support.tiny_recipe(root, **UNEVALUATED), tmp_path)
    assert (tmp_path / "bad-steps/step-1/batch.json").is_file()


STEPS, BAD = 11, 10


SPIKE = "loss .* is more than 3 times .*, the median of the last 9 steps"


def plain(root: Path, **changes: Any) -> Recipe:
    """A checkpoint at the end only."""
    own = UNEVALUATED | {"train__checkpoint_every": None, "train__steps": STEPS, "train__spike": 3}
    return support.tiny_recipe(root, **(own | changes))


def scale_loss(patch: pytest.MonkeyPatch, wanted: list[int], factor: float) -> None:
    """The loss of the example with these tokens is `factor` times what it is, and its gradient."""

    def scaled(_number: int, loss: Any, ids: torch.Tensor, _options: Any) -> Any:
        rows = [row[: len(wanted)] == wanted for row in ids.tolist()]
        example_nll = loss.example_nll * torch.where(torch.tensor(rows), factor, 1.0)
        whole = float(example_nll.sum() / loss.example_nll.sum()) if any(rows) else 1.0
        return type(loss)(loss.nll_sum * whole, example_nll)

    in_batches(patch, scaled)


@pytest.fixture(scope="module")
def bad(root: Path) -> tuple[str, list[int]]:
    """(id, token ids) of an example that step `BAD` takes and no other one of the run."""
    _, tokenizer = find_model(plain(root))
    loader = make_loader(plain(root), tokenized_mix(plain(root), tokenizer, read_data(plain(root).data)[0]), tokenizer)
    batch = [loader.next_step() for _ in range(BAD)][-1]
    name, ids, _ = max(batch.micro_batches[0].examples(), key=lambda example: len(example[1]))
    return name, ids.tolist()


@pytest.fixture(scope="module")
def undisturbed(root: Path) -> Path:
    train_run(plain(root), root / "undisturbed")
    return root / "undisturbed"


@pytest.fixture(scope="module")
def skipping(root: Path, bad: tuple[str, list[int]]) -> Path:
    """A run that skipped step `BAD`, with a checkpoint of every step."""
    every = {"train__checkpoint_every": 1, "train__keep_checkpoints": 20, "train__on_bad_step": "skip"}
    with pytest.MonkeyPatch.context() as patch:
        scale_loss(patch, bad[1], 60.0)
        summary = train_run(plain(root, **every), root / "skipping")
    assert (summary["num_skipped"], summary["num_steps"]) == (1, STEPS)
    return root / "skipping"


def test_a_bad_step_is_skipped_and_changes_nothing(undisturbed: Path, skipping: Path, bad: Any) -> None:
    for file in (ADAPTER, "optimizer.safetensors"):
        same_tensors(skipping / f"checkpoints/step-{BAD}" / file, skipping / f"checkpoints/step-{BAD - 1}" / file)
    after = [load_file(skipping / f"checkpoints/step-{step}" / ADAPTER) for step in (BAD, STEPS)]
    assert any(not torch.equal(after[0][name], after[1][name]) for name in after[0]), "the run did not go on"
    expected, lines = timeless(undisturbed), timeless(skipping)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert lines[: BAD - 1] == expected[: BAD - 1]
    assert (lines[-1]["num_tokens"], lines[-1]["lr"]) == (expected[-1]["num_tokens"], expected[-1]["lr"])
    assert set(lines[BAD - 1]) == {"step", "skipped"}
    (kept,) = (skipping / "bad-steps").iterdir()
    document = json.loads((kept / "batch.json").read_text())
    assert document["step"] == BAD
    assert re.fullmatch(SPIKE, document["reason"])
    examples, line = document["examples"], expected[BAD - 1]
    assert len(examples) == line["num_examples"]
    assert sum(len(each["input_ids"]) for each in examples) == line["num_tokens"]
    assert sum(each["num_label_tokens"] for each in examples) == line["num_label_tokens"]
    for each in examples:
        assert each["num_label_tokens"] == sum(label != -100 for label in each["labels"])
        assert ("=" in each["text"]) == (each["task"] == "sums")
    (found,) = [each for each in examples if each["id"] == bad[0]]
    assert found["input_ids"] == bad[1]
    others = sum(each["nll_sum"] for each in examples if each is not found)
    whole = sum(task["nll_sum"] for task in line["tasks"].values())
    assert others + found["nll_sum"] / 60 == pytest.approx(whole, rel=1e-5)
    assert document["loss"] == pytest.approx((others + found["nll_sum"]) / line["num_label_tokens"], rel=1e-5)


def test_a_bad_step_stops_the_run_with_the_state_before_it(
    root: Path, undisturbed: Path, skipping: Path, bad: Any, tmp_path: Path
) -> None:
    """A spike may be skipped on a resume; a NaN of the machine may be gone."""
    run = tmp_path / "nan"
    for factor, reason, directory in ((60.0, SPIKE, tmp_path / "spike"), (math.nan, "loss nan is not finite", run)):
        with pytest.MonkeyPatch.context() as patch:
            scale_loss(patch, bad[1], factor)
            with pytest.raises(RunFailure, match=rf"step {BAD}: {reason}.*step-{BAD - 1}, .*bad-steps/step-{BAD}"):
                train_run(plain(root), directory)
            if directory is not run:
                train_run(plain(root, train__on_bad_step="skip"), directory, resume=True)
    document = json.loads((run / f"bad-steps/step-{BAD}/batch.json").read_text())
    assert document["loss"] is None
    assert [each["id"] for each in document["examples"] if each["nll_sum"] is None] == [bad[0]]
    train_run(plain(root), run, resume=True)
    assert_same_run(run, undisturbed, step=STEPS)
    assert_same_run(tmp_path / "spike", skipping, step=STEPS)


def test_too_many_in_a_row_stop_the_run(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float16: a gradient that is NaN with any scale leaves the scale as it was."""
    settings = half(root, train__on_bad_step="skip", train__max_skips=2)
    said = r"step 3: gradient norm nan is not finite.*The 2 steps before it were skipped.*step-2, .*bad-steps/step-3"
    with monkeypatch.context() as patch:
        support.make_gradients_nan(patch)
        for resume in (False, True):
            with pytest.raises(RunFailure, match=said):
                train_run(settings, tmp_path, resume=resume)
    assert [line["step"] for line in timeless(tmp_path)] == [1, 2]
    assert sorted(path.name for path in (tmp_path / "bad-steps").iterdir()) == ["step-1", "step-2", "step-3"]
    kept = json.loads((tmp_path / "bad-steps/step-3/batch.json").read_text())["examples"]
    assert all(each["nll_sum"] > 0 for each in kept)
    state = json.loads((tmp_path / "checkpoints/step-2/state.json").read_text())
    assert state["policies"]["loss_scale"]["value"] == LossScale().value
    again = train_run(settings, tmp_path, resume=True)
    assert (again["num_skipped"], again["num_steps"]) == (2, 6)


def half(root: Path, **changes: Any) -> Recipe:
    return support.tiny_recipe(root, model__dtype="float16", **UNEVALUATED, **changes)


def test_an_overflow_costs_no_step(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a scale that overflows, the run finds the largest that does not; all steps are those of a run from there."""
    with monkeypatch.context() as patched:
        patched.setattr(loss_scale, "_START", 2.0**40)
        train_run(half(root), tmp_path / "high")
        support.train_until(half(root), tmp_path / "resumed", 3)
    train_run(half(root), tmp_path / "resumed", resume=True)
    assert_same_run(tmp_path / "resumed", tmp_path / "high")
    lines = training_lines(tmp_path / "high")
    assert len(lines) == 6
    assert max(line["loss_scale"] for line in lines) < 2.0**40
    monkeypatch.setattr(loss_scale, "_START", lines[0]["loss_scale"])
    train_run(half(root), tmp_path / "found")
    assert training_lines(tmp_path / "found") == lines


@pytest.mark.parametrize("residency", ["device", "host"])
def test_a_matrix_that_gets_no_gradient_is_found(root: Path, tmp_path: Path, monkeypatch: Any, residency: str) -> None:
    """With a streamed base it ends the run, whose backward pass may read wrong bytes."""
    real = trainer.Trainer.__init__

    def cut_off(self: Any, *args: Any, **options: Any) -> None:
        real(self, *args, **options)
        self.optimizer.parameters["model.layers.1.mlp.up_proj.lora_B"].register_hook(lambda grad: grad * 0)

    monkeypatch.setattr(trainer.Trainer, "__init__", cut_off)
    recipe = support.tiny_recipe(root, **UNEVALUATED, train__steps=5, base__residency=residency)
    said = "in 3 updates 2 of 42 trainable tensors had no gradient, e.g. model.layers.1.mlp.up_proj.lora_"
    if residency == "host":
        support.stream_on_cpu(monkeypatch)
        with pytest.raises(RunFailure, match=rf"step 3: {said}.*on disk: .*step-3"):
            train_run(recipe, tmp_path)
        return
    assert train_run(recipe, tmp_path)["num_steps"] == 5
    assert f" {said}" in (tmp_path / "log.txt").read_text()


@pytest.mark.parametrize("setting", ["base__residency", "memory__offload_activations"])
def test_what_needs_a_gpu_is_refused(root: Path, tmp_path: Path, setting: str) -> None:
    value = "host" if setting == "base__residency" else True
    with pytest.raises(UserError, match=rf"{setting.replace('__', '.')}: .*needs a GPU"):
        train_run(support.tiny_recipe(root, **{setting: value}), tmp_path / "run")
    assert not (tmp_path / "run").exists()
