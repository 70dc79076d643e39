"""What tests of whole runs share: two runs compared, one stopped after a given step, one whose gradients go bad."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qdora.train import loop, passes


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
