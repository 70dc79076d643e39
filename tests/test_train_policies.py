"""What a run decides from its steps: rates, spikes, the best step, smaller micro-batches, loss scales."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from fractions import Fraction
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from qdora.data.batching import Batching
from qdora.errors import RunFailure
from qdora.memory.failed_allocation import is_out_of_memory
from qdora.model.inject import adapter_parameters
from qdora.recipe.train_settings import TrainConfig
from qdora.train import policies as loss_scale
from qdora.train.checks import MissingGradientCheck
from qdora.train.optimizer import AdapterOptimizer
from qdora.train.policies import Backoff, BadSteps, BestSoFar, LossScale, Schedule, Shortage
from tests import support


def restored(policy: Any, fresh: Any) -> Any:
    """`fresh` with the state of a policy, as a checkpoint keeps it."""
    fresh.load_state_dict(json.loads(json.dumps(policy.state_dict())))
    return fresh


def rates(num_steps: int, **settings: Any) -> list[float]:
    train = TrainConfig(epochs=1, batch=1, **settings)
    return [Schedule(train, num_steps).rate(step) for step in range(num_steps)]


def test_learning_rates_by_hand() -> None:
    falling = [0.5, 1.0, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]
    assert rates(10, lr=1.0, schedule="linear", warmup=2) == pytest.approx(falling)
    cosine = [2.0, 1 + math.sqrt(0.5), 1.0, 1 - math.sqrt(0.5)]
    assert rates(4, lr=2.0, schedule="cosine", warmup=0) == pytest.approx(cosine)
    assert rates(5, lr=3.0, schedule="constant", warmup=0.3) == pytest.approx([1.5, 3.0, 3.0, 3.0, 3.0])
    assert rates(3, lr=1.0, schedule="linear", warmup=100)[0] == pytest.approx(1 / 3)
    assert rates(4, lr=1.0, schedule="linear", warmup=0, lr_end=0.2) == pytest.approx([1.0, 0.8, 0.6, 0.4])
    cosine = [1.0, 1.0, 0.6 + 0.4 * math.sqrt(0.5), 0.6, 0.6 - 0.4 * math.sqrt(0.5)]
    assert rates(5, lr=1.0, schedule="cosine", warmup=1, lr_end=0.2) == pytest.approx(cosine)


@pytest.mark.parametrize("num_steps", [1, 7, 25, 100, 1000])
def test_a_share_of_the_steps_is_that_which_the_recipe_has(num_steps: int) -> None:
    """The smallest whole number of steps that is the share or more, also where the floating product is above it."""
    above = 0
    for percent in range(1, 100):
        exact = math.ceil(Fraction(percent, 100) * num_steps)
        above += math.ceil(percent / 100 * num_steps) > exact
        schedule = Schedule(TrainConfig(steps=num_steps, batch=1, lr=1.0, warmup=percent / 100), num_steps)
        assert next(step for step in range(num_steps) if schedule.rate(step) == 1.0) + 1 == exact, percent
    assert above > 0 or num_steps not in (25, 100)


@given(st.lists(st.floats(0.01, 100), max_size=60), st.floats(1.01, 20), st.integers(0, 60))
def test_a_spike_is_above_a_multiple_of_the_median(losses: list[float], factor: float, cut: int) -> None:
    train = TrainConfig(steps=1, batch=1, on_bad_step="skip", max_skips=100, spike=factor)
    guard, applied = BadSteps(train), []
    for index, loss in enumerate(losses):
        if index == cut:
            guard = restored(guard, BadSteps(train))
        usual = float(np.median(applied[-32:])) if len(applied) >= 8 else math.inf
        bad = loss > factor * usual
        assert (guard.fault(loss, 1.0) is not None) == bad
        if bad:
            assert guard.skip()
        else:
            guard.applied(loss)
            applied.append(loss)
    assert guard.num_skipped == len(losses) - len(applied)


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=30), st.booleans(), st.integers(1, 5), st.integers(0, 30))
def test_the_judge_is_a_running_best(series: list[float], higher: bool, patience: int, cut: int) -> None:
    def fresh() -> BestSoFar:
        return BestSoFar({"by": "macro"}, higher=higher, patience=patience)

    judge, sign = fresh(), 1 if higher else -1
    for index, value in enumerate(series):
        if index == cut:
            judge = restored(judge, fresh())
        seen = [sign * each for each in series[: index + 1]]
        first_best = seen.index(max(seen))
        assert judge.judge(index, value) == (first_best == index)
        assert (judge.step, judge.num_since, judge.judged) == (first_best, index - first_best, index)
        assert judge.is_over == (index - first_best >= patience)


def missing(
    frozen: str | None, rate: Callable[[int], float] = lambda _: 1e-5, *, num_updates: int = 3, magnitude: float = 1.0
) -> list[list[str]]:
    """What the check finds in updates of which one matrix gets no gradient."""
    parameters = adapter_parameters(support.adapted_model("llama", quant="nf4", dtype=torch.float32))
    for name, parameter in parameters.items():
        if name.endswith("magnitude"):
            parameter.data.fill_(magnitude)
    optimizer = AdapterOptimizer(parameters, name="adamw", weight_decay=0.1)
    check, generator, found = MissingGradientCheck(optimizer), torch.Generator().manual_seed(0), []
    for step in range(num_updates):
        for name, parameter in parameters.items():
            gradient = torch.randn(parameter.shape, generator=generator)
            parameter.grad = gradient * (0.0 if name == frozen else 1.0)
        optimizer.step(rate(step))
        found.append(check.updated(rate(step)))
    return [each for each in found if each is not None]


def test_a_matrix_without_a_gradient_is_named_once_after_three_updates() -> None:
    for rate in (1e-5, 1e-12):  # smaller than the parameters show
        assert missing(None, lambda _, rate=rate: rate, num_updates=5, magnitude=100.0) == [[]]
    for part in ("lora_A", "lora_B", "magnitude"):
        name = f"model.layers.1.mlp.up_proj.{part}"
        assert missing(name, num_updates=5) == [[name]]

    def warm(step: int) -> float:  # an update of rate 0 does not count
        return 1e-5 if step else 0.0

    assert missing(name, warm, num_updates=3) == []
    assert missing(name, warm, num_updates=4) == [[name]]
    check = MissingGradientCheck(AdapterOptimizer(adapter_parameters(support.adapted_model()), name="adamw"))
    found = [check.updated(1e-5) for _ in range(3)]  # no gradient at all
    assert found[:2] == [None, None]
    assert found[2] is not None
    assert len(found[2]) == check.num_tensors == 42


def cpu_allocator() -> BaseException:
    """What torch really says on a CPU."""
    try:
        torch.empty(2**50)
    except RuntimeError as error:
        return error
    raise AssertionError("a petabyte of memory")


CUDA = "CUDA out of memory. Tried to allocate 2.00 GiB."


@pytest.mark.parametrize(
    "error, expected",
    [
        (cpu_allocator(), True),
        (torch.OutOfMemoryError(CUDA), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: out of memory"), True),  # cudaMalloc by itself
        (RuntimeError("CUDA driver error: out of memory"), True),  # a segment that grows
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (dist.DistBackendError("NCCL error\nLast error:\nCuda failure 2 'out of memory'"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied (3x4 and 5x6)"), False),
        (RuntimeError("CUDA error: device-side assert triggered"), False),
        (RunFailure("the system refuses 64 MiB of pinned host memory (CUDA error: out of memory)."), False),
        (ValueError("DefaultCPUAllocator: can't allocate memory"), False),
        (OSError(12, "Cannot allocate memory"), False),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_what_counts_as_out_of_memory(error: BaseException, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


@pytest.mark.parametrize("free, expected", [(99_999_999, True), (100_000_000, False), (None, False)])
def test_cublas_without_a_handle_is_out_of_memory_on_a_full_gpu(free: Any, expected: bool, monkeypatch: Any) -> None:
    broken = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
    answer = Mock(return_value=(free, 40 << 30), side_effect=broken if free is None else None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", answer)
    error = RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`")
    assert is_out_of_memory(error) is expected


def test_micro_batches_grow_back_and_wait_longer_after_every_failure() -> None:
    """32 steps before the first growth, 64 after it has failed; never above what was asked; the same after a resume."""

    def fresh(asked: int = 2048) -> tuple[Any, Backoff]:
        loader: Any = SimpleNamespace(batching=Batching(asked, 0))
        return loader, Backoff(loader)

    loader, backoff = fresh()
    sizes = []
    for number in range(300):
        if loader.batching.max_tokens > 1024 and number < 200:
            assert backoff.shrink(Shortage(8, 2000, "")) is not None
        if number % 7 == 0:
            loader, again = fresh()
            backoff = restored(backoff, again)
        backoff.grow()
        sizes.append(loader.batching.max_tokens)
    # 2,000 tokens fail until number 200
    assert sorted(set(sizes)) == [1000, 2000]
    assert [number for number in range(1, 300) if sizes[number] > sizes[number - 1]] == [31, 31 + 64, 31 + 64 + 128]
    assert backoff.shrink(Shortage(1, 2000, "")) is None  # an example by itself
    loader, other = fresh(512)
    restored(backoff, other)  # the recipe asks for another size now
    assert loader.batching.max_tokens == 512


def test_the_scale_halves_and_doubles_and_survives_a_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_scale, "_PATIENCE", 3)
    scale = LossScale()
    assert scale.value == 2.0**7
    assert scale.halve()
    start, values = scale.value, []
    for _ in range(7):
        scale = restored(scale, LossScale())
        scale.applied()
        values.append(scale.value / start)
    assert values == [1, 1, 2, 2, 2, 4, 4]
    for _ in range(40):
        last = scale.halve()
    assert not last
    assert scale.value == 2.0**-4
    for _ in range(100):
        scale.applied()
    assert scale.value == 2.0**15
