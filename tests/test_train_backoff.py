"""Out of memory in a step: smaller micro-batches, the same steps, and the same run after a resume."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from qdora.data.batching import Batching
from qdora.data.loader import StepLoader
from qdora.errors import Interrupted, RunFailure
from qdora.files.run_directory import RunDirectory
from qdora.memory.failed_allocation import is_out_of_memory
from qdora.run import prepare
from qdora.run.step_evaluations import StepEvaluations
from qdora.run.train import train_run
from qdora.train import flat_group, loop, out_of_memory, passes
from qdora.train.out_of_memory import Backoff, Shortage
from tests import tiny_run
from tests.run_files import assert_same_run, stop_after, timeless


def cpu_allocator() -> BaseException:
    """What torch really says on a CPU."""
    try:
        torch.empty(2**50)
    except RuntimeError as error:
        return error
    raise AssertionError("a petabyte of memory")


NCCL = "NCCL error in: a.cpp:1, unhandled cuda error\nLast error:\nCuda failure 2 'out of memory'"
CUDA = "CUDA out of memory. Tried to allocate 2.00 GiB."
PINNED = "memory.offload_activations: the system refuses 64 MiB of pinned host memory (CUDA error: out of memory)."
ERRORS: dict[str, Callable[[], BaseException]] = {
    "cuda": lambda: torch.OutOfMemoryError(CUDA),
    "cpu": cpu_allocator,
    "python": MemoryError,
}


def recipe(root: Path, **changes: Any) -> Any:
    return tiny_run.recipe(root, train__batch=8, eval__tasks=[], eval__limit=..., **changes)


@pytest.fixture(scope="module")
def enough(root: Path) -> Path:
    """A run of `recipe` with enough memory."""
    train_run(recipe(root), root / "enough")
    return root / "enough"


@pytest.fixture(scope="module")
def undropped(root: Path) -> Path:
    """The same without dropout: micro-batches of another size draw nothing else."""
    train_run(recipe(root, adapter__dropout=0.0), root / "undropped")
    return root / "undropped"


def small_memory(
    monkeypatch: pytest.MonkeyPatch, most_tokens: int, error: Callable[[], BaseException], *, backward: bool = False
) -> list[int]:
    """An allocator that fails for micro-batches of more tokens; the tokens of those that it let pass come back."""
    real, passed = passes.batch_loss, []

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

    monkeypatch.setattr(passes, "batch_loss", hungry)
    return passed


@pytest.mark.parametrize(
    "error, text, expected",
    [
        (cpu_allocator(), "the CPU's allocator", True),
        (torch.OutOfMemoryError(CUDA), "torch's cache on CUDA", True),
        (MemoryError(), "numpy and Python", True),
        (RuntimeError("CUDA error: out of memory"), "cudaMalloc by itself", True),
        (RuntimeError("CUDA driver error: out of memory"), "a segment that grows", True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "cuBLAS", True),
        (dist.DistBackendError(NCCL), "NCCL", True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied (3x4 and 5x6)"), "a mistake", False),
        (RuntimeError("CUDA error: device-side assert triggered"), "another CUDA error", False),
        (RunFailure(PINNED), "pinned memory of the host", False),
        (ValueError("DefaultCPUAllocator: can't allocate memory"), "not by an allocator", False),
        (OSError(12, "Cannot allocate memory"), "the system, for something else", False),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_counts_as_out_of_memory(error: BaseException, text: str, expected: bool) -> None:
    assert is_out_of_memory(error) is expected, text


@pytest.mark.parametrize("free, expected", [(50_000_000, True), (200_000_000, False), (None, False)])
def test_cublas_without_a_handle_is_out_of_memory_on_a_full_gpu(
    free: int | None, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mem_get_info() -> tuple[int, int]:
        if free is None:
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
        return free, 40 << 30

    monkeypatch.setattr(torch.cuda, "mem_get_info", mem_get_info)
    error = RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`")
    assert is_out_of_memory(error) is expected


SHORT = [("cuda", False), ("cpu", True)]
SLOW_SHORT = [(name, backward) for name in ERRORS for backward in (False, True) if (name, backward) not in SHORT]


@pytest.mark.parametrize(
    "name, backward", [*SHORT, *(pytest.param(*each, marks=pytest.mark.slow) for each in SLOW_SHORT)]
)
def test_the_loss_curve_is_that_of_enough_memory(
    root: Path, undropped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, backward: bool
) -> None:
    settings = recipe(root, adapter__dropout=0.0)
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
    expected = timeless(undropped)
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
            loader.batching.max_tokens = sizes.get(next(taken), loader.batching.max_tokens)
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
        seen.append(loader.batching.max_tokens)
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
    stop_after(monkeypatch, 3)
    with pytest.raises(Interrupted):
        train_run(settings, tmp_path / "run")
    monkeypatch.undo()
    small_memory(monkeypatch, 3, ERRORS["cpu"])
    with pytest.raises(
        RunFailure, match=r"step 4: out of memory with one example of \d+ tokens.*Safe on disk: .*step-3"
    ):
        train_run(settings, tmp_path / "run", resume=True)


@pytest.mark.parametrize(
    "error, said",
    [
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), "mat1 and mat2"),
        (RunFailure(PINNED), "memory.offload_activations: the system refuses 64 MiB of pinned host memory"),
    ],
    ids=["shapes", "pinned"],
)
def test_other_errors_are_not_taken_for_a_lack_of_memory(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: RuntimeError, said: str
) -> None:
    small_memory(monkeypatch, 3, lambda: error)
    with pytest.raises(RunFailure, match=rf"step 1: cannot be computed: {said}.*Safe on disk: .*step-0"):
        train_run(recipe(root), tmp_path / "run")
    assert "out_of_memory" not in (tmp_path / "run/log.txt").read_text()
    assert not (tmp_path / "run/metrics.jsonl").exists()


# --- growth


def test_micro_batches_grow_back_and_wait_longer_after_every_failure() -> None:
    """32 steps before the first growth, 64 after it has failed; never above what was asked; the same after a resume."""
    loader: Any = SimpleNamespace(batching=Batching(2048, 0))
    backoff = Backoff(loader)
    sizes = []
    for number in range(300):
        if loader.batching.max_tokens > 1024 and number < 200:
            assert backoff.shrink(Shortage(8, 2000, "")) is not None
        if number % 7 == 0:
            again: Any = SimpleNamespace(batching=Batching(2048, 0))
            resumed = Backoff(again)
            resumed.load_state_dict(json.loads(json.dumps(backoff.state_dict())))
            loader, backoff = again, resumed
        backoff.grow()
        sizes.append(loader.batching.max_tokens)
    # 2,000 tokens fail until number 200
    assert sorted(set(sizes)) == [1000, 2000]
    assert [number for number in range(1, 300) if sizes[number] > sizes[number - 1]] == [31, 31 + 64, 31 + 64 + 128]


def test_a_run_grows_back_and_a_resumed_one_at_the_same_step(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory is short in the first step only."""
    monkeypatch.setattr(out_of_memory, "_FIRST_WAIT", 2)
    settings, real = recipe(root), passes.batch_loss

    def run(directory: Path, stop_at: int | None = None) -> None:
        with monkeypatch.context() as patched:
            left = [2]

            def short(*args: Any, **options: Any) -> Any:
                if left[0]:
                    left[0] -= 1
                    raise ERRORS["cuda"]()
                return real(*args, **options)

            patched.setattr(passes, "batch_loss", short)
            if stop_at is not None:
                stop_after(patched, stop_at)
                with pytest.raises(Interrupted):
                    train_run(settings, directory)
            else:
                train_run(settings, directory)

    run(tmp_path / "whole")
    lines = timeless(tmp_path / "whole")
    grown = [(line["step"], line["micro_batches_grow"]) for line in lines if "micro_batches_grow" in line]
    assert [step for step, _ in grown] == [2, 4, 6][: len(grown)]
    assert len(grown) >= 2
    assert grown[1][1]["tokens_after"] == 2 * grown[0][1]["tokens_after"]
    for stop_at in (1, 3):
        run(tmp_path / f"run-{stop_at}", stop_at)
        train_run(settings, tmp_path / f"run-{stop_at}", resume=True)
        assert_same_run(tmp_path / f"run-{stop_at}", tmp_path / "whole")


# --- the update


NUM_MATRICES = 28


def join_fails(monkeypatch: pytest.MonkeyPatch, step: int, *, forever: bool) -> list[int]:
    """Memory runs out in the update of `step`, at its matrices: once, or from there on. The number of calls comes back.

    All matrices are joined in one call, and one after the other where that fails.
    """
    real, calls = flat_group.join_float32, [0]

    def join(*args: Any) -> Any:
        calls[0] += 1
        if calls[0] == step or (forever and calls[0] > step):
            raise ERRORS["cuda"]()
        return real(*args)

    monkeypatch.setattr(flat_group, "join_float32", join)
    return calls


def test_an_update_that_fits_in_parts_is_that_of_enough_memory(
    root: Path, enough: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = join_fails(monkeypatch, 3, forever=False)
    num_steps = train_run(recipe(root), tmp_path / "run")["num_steps"]
    assert calls == [num_steps + NUM_MATRICES]
    assert_same_run(tmp_path / "run", enough)


def test_an_update_without_memory_keeps_the_state_before_it(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = recipe(root, adapter__kind="lora")
    train_run(settings, tmp_path / "whole")
    join_fails(monkeypatch, 4, forever=True)
    said = rf"step 4: out of memory in the update of {NUM_MATRICES} of {NUM_MATRICES} trainable tensors, e.g. \S+ \("
    with pytest.raises(RunFailure, match=said + re.escape(CUDA.rstrip(".")) + r"\)\. Fix: .*--resume.*/step-3\."):
        train_run(settings, tmp_path / "run")
    monkeypatch.undo()
    train_run(settings, tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_an_update_of_some_tensors_keeps_the_state_after_it(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The magnitudes, stored in float32, need no memory. The run can continue from there."""
    settings = recipe(root)
    join_fails(monkeypatch, 4, forever=True)
    said = rf"step 4: .* update of {NUM_MATRICES} of 42 trainable tensors.*14 others are updated, .*/step-4\."
    with pytest.raises(RunFailure, match=said):
        train_run(settings, tmp_path / "run")
    monkeypatch.undo()
    assert train_run(settings, tmp_path / "run", resume=True)["num_steps"] == 6


# --- errors after which nothing works any more


STICKY = "CUDA error: device-side assert triggered"
SECOND = RuntimeError("CUDA error: the second one, which every call raises from then on")


@pytest.mark.parametrize("broken", ["generators", "checkpoint"])
def test_after_a_sticky_error_the_first_one_is_reported_with_the_batch_that_caused_it(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    def fail(*_args: Any, **_options: Any) -> Any:
        raise SECOND

    def first() -> BaseException:
        if broken == "generators":
            monkeypatch.setattr(loop, "set_random_state", fail)
        else:
            monkeypatch.setattr(RunDirectory, "checkpoint_directory", fail)
        return RuntimeError(STICKY)

    small_memory(monkeypatch, 3, first)
    said = rf"^step 1: cannot be computed: {STICKY}.*could not be saved \(CUDA error: the second.*bad-steps/step-1\.$"
    with pytest.raises(RunFailure, match=said):
        train_run(recipe(root), tmp_path / "run")
    assert (tmp_path / "run/bad-steps/step-1/batch.json").is_file()


def test_a_sticky_error_in_an_evaluation_is_the_one_reported(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_args: Any, **_options: Any) -> Any:
        raise SECOND

    def measure(*_args: Any, **_options: Any) -> Any:
        monkeypatch.setattr(RunDirectory, "checkpoint_directory", fail)
        raise RuntimeError(STICKY)

    monkeypatch.setattr(StepEvaluations, "measure", measure)
    with pytest.raises(RuntimeError, match=f"^{STICKY}$"):
        train_run(tiny_run.recipe(root, eval__every=3, eval__at_start=False), tmp_path / "run")
    assert f"Step 3 is not saved either ({SECOND}) after: {STICKY}" in caplog.text
