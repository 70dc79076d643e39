"""What a run makes of its steps: rates, spikes, the best, smaller micro-batches, loss scales; figures, progress."""

from __future__ import annotations

import io
import json
import math
import re
from fractions import Fraction
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from rich.console import Console

from qdora.errors import RunFailure
from qdora.memory.oom import is_out_of_memory
from qdora.model.inject import adapter_parameters
from qdora.recipe.settings import TrainConfig
from qdora.train import passes as loss_scale
from qdora.train.checkpoint import state_of
from qdora.train.distributed import Processes
from qdora.train.evals import BestSoFar
from qdora.train.guards import BadSteps, MissingGradientCheck, Schedule
from qdora.train.logs import TrainingProgress, draw_figures, smooth
from qdora.train.logs import peaks as _peaks
from qdora.train.optimizer import AdapterOptimizer
from qdora.train.passes import LossScale
from tests import support


def restored(policy: Any, fresh: Any) -> Any:
    """`fresh` with the state of a policy, as a checkpoint keeps it."""
    vars(fresh).update(json.loads(json.dumps(state_of(policy))))
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
    # The smallest whole number of steps that is the share or more, also where the floating product is above it
    above = 0
    for percent in range(1, 100):
        exact = math.ceil(Fraction(percent, 100) * 25)
        above += math.ceil(percent / 100 * 25) > exact
        assert rates(25, lr=1.0, warmup=percent / 100).index(1.0) + 1 == exact, percent
    assert above > 0


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


@pytest.mark.parametrize("frozen", ["none", "lora_A", "lora_B", "magnitude", "all"])
def test_a_matrix_without_a_gradient_is_named_once_after_three_updates(frozen: str) -> None:
    """The updates are smaller than the parameters show."""
    parameters = adapter_parameters(support.adapted_model("llama", quant="nf4", dtype=torch.float32))
    names = {"none": [], "all": [*parameters]}.get(frozen, [f"model.layers.1.mlp.up_proj.{frozen}"])
    optimizer = AdapterOptimizer(parameters, name="adamw", weight_decay=0.1)
    check, generator, found = MissingGradientCheck(optimizer), torch.Generator().manual_seed(0), []
    for step in range(5):
        for name, parameter in parameters.items():
            if name.endswith("magnitude") and step == 0:
                parameter.data.fill_(100.0)
            gradient = torch.randn(parameter.shape, generator=generator) * (name not in names)
            parameter.grad = None if frozen == "all" else gradient
        optimizer.step(1e-12)
        found.append(check.updated())
    assert found == [None, None, names, None, None]
    assert len(parameters) == 42


@pytest.mark.parametrize(
    "error, expected",
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (MemoryError(), True),
        (RuntimeError("CUDA driver error: out of memory"), True),  # a segment that grows
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (dist.DistBackendError("NCCL error\nLast error:\nCuda failure 2 'out of memory'"), True),
        (RuntimeError("CUDA error: device-side assert triggered"), False),
        (RunFailure("the system refuses 64 MiB of pinned host memory (CUDA error: out of memory)."), False),
        (ValueError("DefaultCPUAllocator: can't allocate memory"), False),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_what_counts_as_out_of_memory(error: BaseException, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


def test_other_errors_are_out_of_memory_by_what_the_allocator_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuBLAS without a handle is out of memory on a full GPU."""
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**50)  # what torch really says on a CPU
    assert is_out_of_memory(raised.value)
    error = RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`")
    for answer, expected in ((99_999_999, True), (100_000_000, False), (torch.AcceleratorError("CUDA error"), False)):
        broken = answer if isinstance(answer, Exception) else None
        monkeypatch.setattr(torch.cuda, "mem_get_info", Mock(return_value=(answer, 40 << 30), side_effect=broken))
        assert is_out_of_memory(error) is expected


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


GRADIENT_NORMS = [0.5, 3.0, 1.0, 40.0]
RATES = [1e-4, 3e-4, 2e-4, 0.0]
SECONDS = [2.0, 0.5, 1.0, 4.0]
GIBS = [1, 2, 5, 6]


def lines() -> list[dict[str, Any]]:
    """Four steps of 100 tokens and an evaluation between them."""
    found: list[dict[str, Any]] = [
        {
            "step": index + 1,
            "lr": RATES[index],
            "gradient_norm": GRADIENT_NORMS[index],
            "loss": 2.0 - index / 4,
            "num_tokens": 100,
            "num_label_tokens": 10,
            "tasks": {"sums": {"nll_sum": 12.0 - index, "num_tokens": 10}},
            "time": {"step_seconds": SECONDS[index], "peak_memory_bytes": GIBS[index] * 2**30},
        }
        for index in range(4)
    ]
    evaluated = []
    for step, nll, acc in ((0, 4.0, 0.25), (2, 1.0, 0.75), (4, 2.0, 0.5)):
        scores = {"sums": {"nll_per_token": nll, "acc": None}, "letters": {"nll_per_token": 2 * nll, "acc": acc}}
        evaluated.append({"step": step, "eval": scores, "average": {"nll_per_token": 1.5 * nll, "acc": acc}})
    return [evaluated[0], *found[:2], evaluated[1], *found[2:], evaluated[2]]


@pytest.mark.figures
def test_lines_go_through_the_values_of_steps_and_evaluations(tmp_path: Path) -> None:
    strange = lines()
    del strange[1]["time"]  # what cannot be drawn is left out, and ends no run
    for folder, found in (("a", lines()), ("b", lines()), ("c", strange)):
        draw_figures(found, tmp_path / folder)
    a, b, c = ({file.name: file.read_bytes() for file in (tmp_path / folder).iterdir()} for folder in "abc")
    assert a == b
    assert a.keys() == {"loss_per_task.svg", "steps.svg", "validation_nll.svg", "validation_accuracy.svg"}
    assert a.keys() - c.keys() == {"steps.svg"}

    def points(figure: str, name: str) -> NDArray[np.float64]:
        """(points, 2) of a line in the coordinates of the picture, where y goes down."""
        path = re.search(rf'<g id="{name}">\s*<path d="([^"]*)"', (tmp_path / f"a/{figure}.svg").read_text())
        assert path is not None
        return np.array(re.findall(r"[ML] (\S+) (\S+)", path[1]), dtype=float)

    for figure, name, steps, values in (
        ("steps", "learning rate", [1, 2, 3, 4], RATES),
        ("steps", "peak memory, GiB", [1, 2, 3, 4], GIBS),
        ("steps", "tokens per second", [1, 2, 3, 4], [50.0, 200.0, 100.0, 25.0]),
        ("steps", "gradient norm", [1, 2, 3, 4], list(np.log(GRADIENT_NORMS))),
        ("validation_nll", "sums", [0, 2, 4], [4.0, 1.0, 2.0]),
        ("validation_nll", "letters", [0, 2, 4], [8.0, 2.0, 4.0]),
        ("validation_nll", "all", [0, 2, 4], [6.0, 1.5, 3.0]),
        ("validation_accuracy", "letters", [0, 2, 4], [0.25, 0.75, 0.5]),
    ):
        line = points(figure, name)
        assert len(line) == len(steps)
        assert np.corrcoef(line[:, 0], steps)[0, 1] == pytest.approx(1.0, abs=1e-9), name
        assert np.corrcoef(-line[:, 1], values)[0, 1] == pytest.approx(1.0, abs=1e-9), name


def test_smoothing_is_a_mean_over_tokens() -> None:
    values = smooth([0.0, 6.0, 0.0, 10.0], [0.0, 3.0, 0.0, 1.0], half_life=1.0)
    assert np.isnan(values[0])
    assert values[1:].tolist() == pytest.approx([2.0, 2.0, (6 / 4 + 10) / (3 / 4 + 1)])


def shown(seconds: float = 5.0) -> str:
    text = io.StringIO()
    with TrainingProgress(2, console=Console(file=text, width=200)) as progress:
        times = {"step_seconds": seconds, **_peaks(Processes())}
        progress.step({"step": 1, "loss": 1.5, "lr": 1e-3, "num_tokens": 8000, "time": times})
    return text.getvalue()


def test_progress_shows_the_peak_since_training_began(monkeypatch: pytest.MonkeyPatch) -> None:
    for seconds, left in ((5, "5s"), (59.6, "1m00s"), (200, "3m20s"), (3599.7, "1h00m"), (7500, "2h05m")):
        assert shown(seconds).rstrip().endswith(f"left {left}")
    if not torch.cuda.is_available():
        assert shown().startswith("step 1/2  loss 1.5000  lr 1.00e-03  1,600 tok/s  memory ")
        assert list(_peaks(Processes())) == ["peak_memory_bytes"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    peaks = {"allocated": 9 << 30, "reserved": 9 << 30}  # of a larger run before
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: peaks["allocated"])
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: peaks["reserved"])
    now = {"allocated": 3 << 29, "reserved": 7 << 28}
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: peaks.update(now))
    assert "memory 1.50 GiB" in shown()
    assert _peaks(Processes()) == {"peak_memory_bytes": 3 << 29, "peak_reserved_bytes": 7 << 28}
