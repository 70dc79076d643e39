"""What tests of whole runs share: two runs compared, one stopped after a given step, one whose gradients go bad."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qdora.errors import Interrupted
from qdora.recipe.settings import Recipe
from qdora.run.train import train_run
from qdora.train import loop, passes

ADAPTER = "adapter/adapter_model.safetensors"
UNEVALUATED: dict[str, Any] = {"eval__tasks": [], "eval__limit": ...}
"""Changes of `tiny_run.recipe`."""


def timeless(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "time"} for line in lines]


def trained(run: Path) -> list[dict[str, Any]]:
    """The lines of the training steps among these."""
    return [line for line in timeless(run) if "loss" in line]


def same_tensors(first: Path, second: Path) -> None:
    """Two safetensors files hold the same tensors, bit for bit."""
    one, two = load_file(first), load_file(second)
    assert one.keys() == two.keys()
    assert len(one) > 0
    for name in one:
        assert torch.equal(one[name], two[name]), name


def assert_same_run(one: Path, two: Path, step: int = 6) -> None:
    """Metrics, adapter and the whole state after `step` steps are the same."""
    assert timeless(one) == timeless(two)
    same_tensors(one / "adapter/adapter_model.safetensors", two / "adapter/adapter_model.safetensors")
    for file in ("optimizer.safetensors", "random.safetensors", "adapter/adapter_model.safetensors"):
        same_tensors(one / f"checkpoints/step-{step}" / file, two / f"checkpoints/step-{step}" / file)
    states = [json.loads((run / f"checkpoints/step-{step}/state.json").read_text()) for run in (one, two)]
    assert states[0] == states[1]


def assert_close_runs(one: Path, two: Path) -> None:
    """The same losses, norms and adapters, but for the order of sums."""
    for first, second in zip(timeless(one), timeless(two), strict=True):
        assert first.keys() == second.keys()
        if "eval" in first:
            assert second["average"]["nll"] == pytest.approx(first["average"]["nll"], rel=1e-5)
            continue
        assert second["loss"] == pytest.approx(first["loss"], rel=1e-6)
        assert second["gradient_norm"] == pytest.approx(first["gradient_norm"], rel=1e-5)
        for key in ("step", "lr", "num_tokens", "num_label_tokens", "num_examples"):
            assert first[key] == second[key]
        assert first["tasks"].keys() == second["tasks"].keys()
        for task, numbers in first["tasks"].items():
            assert second["tasks"][task]["num_tokens"] == numbers["num_tokens"]
            assert second["tasks"][task]["nll_sum"] == pytest.approx(numbers["nll_sum"], rel=1e-6)
    adapters = [load_file(run / ADAPTER) for run in (one, two)]
    assert adapters[0].keys() == adapters[1].keys()
    for name, tensor in adapters[0].items():
        torch.testing.assert_close(adapters[1][name], tensor, rtol=1e-4, atol=1e-5)


def train_until(recipe: Recipe, run: Path, step: int, *, resume: bool = False) -> None:
    """Train, and stop in `step` as after a signal."""
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, step)
        with pytest.raises(Interrupted, match=rf"stopped after step {step}; saved to .*step-{step}"):
            train_run(recipe, run, resume=resume)


def assert_resumes(recipe: Recipe, whole: Path, run: Path, *, stop_at: int, step: int = 6) -> None:
    """Stopped and resumed, a run equals `whole` bit for bit, whatever the generator of the second process."""
    train_until(recipe, run, stop_at)
    torch.manual_seed(999)
    train_run(recipe, run, resume=True)
    assert_same_run(run, whole, step=step)


def in_batches(patch: pytest.MonkeyPatch, action: Callable[[int, Any, torch.Tensor, dict[str, Any]], Any]) -> None:
    """Call `action(number, loss, ids, options)` after each forward pass of a micro-batch, numbered from 1.

    What it returns, if anything, takes the place of the loss.
    """
    real, numbers = passes.batch_loss, itertools.count(1)

    def acting(model: Any, input_ids: torch.Tensor, *rest: Any, **options: Any) -> Any:
        loss = real(model, input_ids, *rest, **options)
        return action(next(numbers), loss, input_ids, options) or loss

    patch.setattr(passes, "batch_loss", acting)


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Ask the next runs to stop while they compute `step`, as a signal does; `monkeypatch.undo` takes it back."""
    after_step = loop.after_step

    def interrupt(model: Any, done: int, hooks: Any, stop: Any, **settings: Any) -> bool:
        stop.requested = done == step
        return bool(after_step(model, done, hooks, stop, **settings))

    monkeypatch.setattr(loop, "after_step", interrupt)


def make_gradients_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every micro-batch's gradient is NaN, its reported losses are not; `monkeypatch.undo` takes it back."""
    real = passes.batch_loss

    def poisoned(*args: Any, **settings: Any) -> Any:
        result = real(*args, **settings)
        return type(result)(result.nll_sum * float("nan"), result.example_nll, result.example_tokens)

    monkeypatch.setattr(passes, "batch_loss", poisoned)
