"""Out of memory in a step: smaller micro-batches, the same steps, and the same run after a resume."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qdora.data.loader import StepLoader
from qdora.errors import Interrupted, RunFailure
from qdora.run import prepare
from qdora.run.train import train_run
from qdora.train import loop
from qdora.train.out_of_memory import is_out_of_memory
from tests import tiny_run
from tests.run_files import assert_same_run, stop_after, timeless


def cpu_allocator() -> BaseException:
    """What torch really says on a CPU."""
    try:
        torch.empty(2**50)
    except RuntimeError as error:
        return error
    raise AssertionError("a petabyte of memory")


CUDA = "CUDA out of memory. Tried to allocate 2.00 GiB."
ERRORS: dict[str, Callable[[], BaseException]] = {
    "cuda": lambda: torch.OutOfMemoryError(CUDA),
    "cpu": cpu_allocator,
    "python": MemoryError,
}


def recipe(root: Path, **changes: Any) -> Any:
    return tiny_run.recipe(root, train__batch=8, eval__tasks=[], eval__limit=..., **changes)


def small_memory(
    monkeypatch: pytest.MonkeyPatch, most_tokens: int, error: Callable[[], BaseException], *, backward: bool = False
) -> list[int]:
    """An allocator that fails for micro-batches of more tokens; the tokens of those that it let pass come back."""
    real, passed = loop.batch_loss, []

    def hungry(model: Any, input_ids: torch.Tensor, *rest: Any, **settings: Any) -> Any:
        result = real(model, input_ids, *rest, **settings)
        if input_ids.numel() <= most_tokens:
            passed.append(input_ids.numel())
        elif backward:
            result.nll_sum.register_hook(fail)
        else:
            raise error()
        return result

    def fail(_gradient: torch.Tensor) -> None:
        raise error()

    monkeypatch.setattr(loop, "batch_loss", hungry)
    return passed


@pytest.mark.parametrize(
    "error, text, expected",
    [
        (cpu_allocator(), "the CPU's allocator", True),
        (torch.OutOfMemoryError(CUDA), "torch's cache on CUDA", True),
        (MemoryError(), "numpy and Python", True),
        (RuntimeError("CUDA error: out of memory"), "cudaMalloc by itself", True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "cuBLAS", True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied (3x4 and 5x6)"), "a mistake", False),
        (RuntimeError("CUDA error: device-side assert triggered"), "another CUDA error", False),
        (ValueError("DefaultCPUAllocator: can't allocate memory"), "not by an allocator", False),
        (OSError(12, "Cannot allocate memory"), "the system, for something else", False),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_counts_as_out_of_memory(error: BaseException, text: str, expected: bool) -> None:
    assert is_out_of_memory(error) is expected, text


@pytest.mark.parametrize("name", ERRORS)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_the_loss_curve_is_that_of_enough_memory(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, backward: bool
) -> None:
    settings = recipe(root, adapter__dropout=0.0)
    train_run(settings, tmp_path / "whole")
    passed = small_memory(monkeypatch, 40, ERRORS[name], backward=backward)
    train_run(settings, tmp_path / "run")
    lines = timeless(tmp_path / "run")
    shrunk = [line["out_of_memory"] for line in lines if "out_of_memory" in line]
    assert shrunk
    assert shrunk[0]["tokens_before"] == 2048
    assert all(each["tokens_after"] < each["tokens_before"] for each in shrunk)
    assert [each["tokens_before"] for each in shrunk[1:]] == [each["tokens_after"] for each in shrunk[:-1]]
    assert max(passed) <= 40
    steps = [line for line in lines if "loss" in line]
    expected = timeless(tmp_path / "whole")
    assert len(steps) == len(expected) == 6
    for one, other in zip(steps, expected, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=2e-6)
        assert one["gradient_norm"] == pytest.approx(other["gradient_norm"], rel=1e-4)
        for key in ("num_tokens", "num_label_tokens", "num_examples", "lr"):
            assert one[key] == other[key]
    log = (tmp_path / "run/log.txt").read_text()
    assert f"Step 1: out of memory. Micro-batches shrink from 2048 to {shrunk[0]['tokens_after']} tokens" in log


def test_a_retried_step_draws_what_a_first_try_would(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With dropout: the run equals, bit for bit, one whose micro-batches were as small from that step on."""
    settings = recipe(root)
    make_loader = prepare.make_loader
    small_memory(monkeypatch, 80, ERRORS["cuda"])
    train_run(settings, tmp_path / "run")
    sizes = {
        line["step"]: line["out_of_memory"]["tokens_after"] for line in timeless(tmp_path / "run") if "lr" not in line
    }
    assert sizes
    monkeypatch.undo()

    def knowing(*args: Any) -> Any:
        loader = make_loader(*args)
        next_step, taken = loader.next_step, iter(range(1, 7))

        def smaller_in_time() -> Any:
            loader.micro_batch_tokens = sizes.get(next(taken), loader.micro_batch_tokens)
            return next_step()

        loader.next_step = smaller_in_time
        return loader

    monkeypatch.setattr(prepare, "make_loader", knowing)
    train_run(settings, tmp_path / "known")
    assert [line for line in timeless(tmp_path / "run") if "lr" in line] == timeless(tmp_path / "known")


def test_a_resumed_run_keeps_the_smaller_size_until_the_recipe_asks_for_another(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = recipe(root)
    small_memory(monkeypatch, 40, ERRORS["cuda"])
    train_run(settings, tmp_path / "whole")
    stop_after(monkeypatch, 4)
    with pytest.raises(Interrupted):
        train_run(settings, tmp_path / "run")
    state = json.loads((tmp_path / "run/checkpoints/step-4/state.json").read_text())
    used = state["policies"]["micro_batch_tokens"]["used"]
    assert used < 96  # below data.max_length, which the recipe itself may not ask for
    monkeypatch.undo()
    seen = []
    next_step = StepLoader.next_step

    def spying(loader: Any) -> Any:
        seen.append(loader.micro_batch_tokens)
        return next_step(loader)

    monkeypatch.setattr(StepLoader, "next_step", spying)
    train_run(settings, tmp_path / "run", resume=True)
    assert seen == [used, used]
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    seen.clear()
    (tmp_path / "run/checkpoints/step-6").rename(tmp_path / "elsewhere")
    train_run(recipe(root, train__micro_batch_tokens=1024), tmp_path / "run", resume=True)
    assert seen == [1024, 1024]


def test_one_example_that_does_not_fit_stops_with_the_state_before_it(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = recipe(root)
    train_run(settings, tmp_path / "whole")
    stop_after(monkeypatch, 3)
    with pytest.raises(Interrupted):
        train_run(settings, tmp_path / "run")
    monkeypatch.undo()
    small_memory(monkeypatch, 3, ERRORS["cpu"])
    with pytest.raises(
        RunFailure, match=r"step 4: out of memory with one example of \d+ tokens.*Safe on disk: .*step-3"
    ):
        train_run(settings, tmp_path / "run", resume=True)


def test_other_errors_are_not_taken_for_a_lack_of_memory(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_memory(monkeypatch, 3, lambda: RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RunFailure, match=r"step 1: cannot be computed: mat1 and mat2.*Safe on disk: .*step-0"):
        train_run(recipe(root), tmp_path / "run")
    assert "out_of_memory" not in (tmp_path / "run/log.txt").read_text()
    assert not (tmp_path / "run/metrics.jsonl").exists()
