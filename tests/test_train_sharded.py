"""Whole runs with a base that is divided among processes over gloo: what one process writes, they write."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from qdora.errors import DiskFull, Diverged, RunFailure, UserError
from qdora.export.export_run import export_run
from qdora.files.run_directory import RunDirectory
from qdora.recipe.settings import Recipe
from qdora.run import step_evaluations
from qdora.run.train import train_run
from qdora.train import loop, passes
from qdora.train.distributed import Processes
from qdora.train.hooks import Hooks
from qdora.train.interrupt import StopRequest
from tests import launched, tiny_run, tiny_sharded
from tests.test_train_distributed import (
    GATED,
    PACKED,
    assert_close_runs,
    by_each_launcher,
    exact,
    lines,
    resumed_and_stopped,
    stop_alone,
    train,
    trained_by,
)

pytestmark = tiny_sharded.needs_division

EVALUATED = {"eval__tasks": ["sums", "letters"], "eval__limit": 2, "eval__every": 3}


def sharded(root: Path, parallel: str = "shard", **changes: Any) -> Recipe:
    return exact(root, train__parallel=parallel, **changes)


def evaluations(run: Path) -> dict[str, float]:
    files = sorted((run / "eval").glob("step-*.json"))
    return {file.name: json.loads(file.read_text())["average"]["nll_per_token"] for file in files}


def test_two_processes_with_half_a_base_write_what_one_does(root: Path, tmp_path: Path) -> None:
    """With evaluations, which all processes take part in."""
    changes = {"train__batch": 5, **EVALUATED}
    train_run(exact(root, **changes), tmp_path / "one")
    assert launched.run(2, train, sharded(root, **changes), tmp_path / "two") == ["", ""]
    assert_close_runs(tmp_path / "one", tmp_path / "two")
    written = [{file.relative_to(run) for file in run.rglob("*")} for run in (tmp_path / "one", tmp_path / "two")]
    assert written[0] == written[1]
    found = evaluations(tmp_path / "two")
    assert sorted(found) == ["step-0.json", "step-3.json", "step-6.json"]
    assert found == pytest.approx(evaluations(tmp_path / "one"), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        PACKED,
        {"train__batch": 5, **GATED},
        {"base__prune": {"method": "magnitude", "sparsity": 0.5}, "adapter__mask": "keep"},
        {"base__prune": {"method": "magnitude", "sparsity": 0.5}, "base__quant": "none"},
        {"train__batch": 1, "train__steps": 3},
        {"base__cache": "cache"},
        {"train__optimizer": "paged_adamw_8bit"},
    ],
    ids=["packed", "gates", "masked", "pruned", "no-example", "cache", "8bit"],
)
def test_other_recipes_on_two_processes(root: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    changes = {name: str(tmp_path / value) if value == "cache" else value for name, value in changes.items()}
    train_run(exact(root, **changes), tmp_path / "one")
    assert launched.run(2, train, sharded(root, **changes), tmp_path / "two") == ["", ""]
    assert_close_runs(tmp_path / "one", tmp_path / "two")


def test_a_run_goes_on_with_a_base_that_is_divided_otherwise(root: Path, tmp_path: Path) -> None:
    """One process; two with half of the base each; one again."""
    run = tmp_path / "run"
    train_run(exact(root), tmp_path / "whole")
    stop_alone(exact(root), run, 2)
    assert launched.run(2, resumed_and_stopped, sharded(root), run, 4) == ["", ""]
    train_run(exact(root), run, resume=True)
    assert_close_runs(tmp_path / "whole", run)


@pytest.mark.slow
def test_a_run_goes_on_with_more_and_fewer_processes(root: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train_run(exact(root), tmp_path / "whole")
    stop_alone(exact(root), run, 1)
    for size, parallel, stop_at in ((2, "shard", 2), (3, "shard", 3), (4, "hybrid", 4), (2, "replicate", 5)):
        settings = sharded(root, parallel)
        assert launched.run(size, resumed_and_stopped, settings, run, stop_at) == [""] * size
    assert launched.run(3, train, sharded(root), run, True) == ["", "", ""]
    assert_close_runs(tmp_path / "whole", run)


@pytest.mark.slow
def test_two_machines_of_two_processes_hold_halves_each(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_run(exact(root), tmp_path / "one")
    assert launched.run(4, on_two_machines, sharded(root, "hybrid"), tmp_path / "four") == [""] * 4
    assert_close_runs(tmp_path / "one", tmp_path / "four")


def on_two_machines(rank: int, settings: Recipe, directory: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_WORLD_SIZE", "2")
        patch.setenv("LOCAL_RANK", str(rank % 2))
        train_run(settings, directory)


def broken(rank: int, settings: Recipe, directory: Path) -> None:
    real, calls = passes.batch_loss, {"n": 0}

    def breaking(*args: Any, **options: Any) -> Any:
        calls["n"] += 1
        if rank == 1 and calls["n"] == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return real(*args, **options)

    passes.batch_loss = breaking
    with pytest.raises(RunFailure, match=f"process {rank}: {'out of memory with one example' if rank else '.*'}"):
        train_run(settings, directory)


def test_where_one_process_cannot_compute_the_others_end_and_the_run_goes_on(root: Path, tmp_path: Path) -> None:
    settings = sharded(root, train__batch=2, train__micro_batch_tokens=96, train__checkpoint_every=1)
    assert launched.run(2, broken, settings, tmp_path, timeout=60) == ["", ""]
    assert launched.run(2, train, settings, tmp_path, True) == ["", ""]
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    "shards, error, saves",
    [
        (True, torch.OutOfMemoryError("CUDA out of memory."), False),
        (True, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), False),
        (True, Diverged("eval: not finite"), True),  # in all, which compute the same
        (True, UserError("sums: has an empty choice"), True),
        (False, torch.OutOfMemoryError("CUDA out of memory."), True),  # all are told
    ],
    ids=["memory", "disk", "diverged", "data", "replicate"],
)
def test_an_evaluation_that_fails_in_one_process_saves_nothing(shards: bool, error: Exception, saves: bool) -> None:
    saved: list[int] = []

    def save(step: int) -> Path:
        saved.append(step)
        return Path()

    evaluate = Mock(side_effect=error)
    hooks = Hooks(write_metrics=Mock(), save=save, keep_batch=Mock(), evaluate=evaluate, evaluate_every=3)
    processes = Processes(1, 2, shards=shards)
    with pytest.raises(type(error)):
        loop.after_step(nn.Identity(), 3, hooks, StopRequest(), num_steps=6, checkpoint_every=None, processes=processes)
    assert saved == [3] * saves


def evaluation_broken(rank: int, settings: Recipe, directory: Path, at: int) -> None:
    """The second process runs out of memory in a batch, or the first one cannot write the results."""
    real = RunDirectory.write_json

    def full(run: RunDirectory, name: str, values: Any) -> None:
        if name == "eval/step-3.json":
            raise DiskFull("the disk is full")
        real(run, name, values)

    def hungry(*_args: Any, **_options: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    if rank == at == 0:
        RunDirectory.write_json = full
    elif rank == at:
        step_evaluations.evaluate = hungry
    why = "the disk is full" if at == 0 else "process 1: a pass through the model cannot be computed: CUDA out of"
    with pytest.raises(RunFailure, match=why if rank == at else f"process {rank}: "):
        train_run(settings, directory)


@pytest.mark.slow
@pytest.mark.parametrize("at", [0, 1], ids=["disk", "memory"])
def test_who_fails_in_an_evaluation_ends_the_run(root: Path, tmp_path: Path, at: int) -> None:
    settings = sharded(root, **EVALUATED, eval__at_start=False, train__checkpoint_every=2)
    assert launched.run(2, evaluation_broken, settings, tmp_path, at, timeout=100) == ["", ""]
    assert [each.name for each in (tmp_path / "checkpoints").iterdir()] == ["step-2"]


def head_refused(rank: int, settings: Recipe, directory: Path) -> None:
    with pytest.raises(UserError, match=r"adapter\.targets: must not have the output head with train\.parallel shard"):
        train_run(settings, directory)


def test_an_adapted_head_is_refused(root: Path, tmp_path: Path) -> None:
    other = tmp_path / "root"
    tiny_run.write_model(other / "model", tie_word_embeddings=False)
    settings = sharded(other, adapter__targets=["q_proj", "lm_head"])
    assert launched.run(2, head_refused, settings, tmp_path / "run") == ["", ""]


@pytest.mark.slow
def test_exports_are_those_of_one_process(root: Path, tmp_path: Path) -> None:
    train_run(exact(root), tmp_path / "one")
    assert launched.run(2, train, sharded(root), tmp_path / "two") == ["", ""]
    for run in ("one", "two"):
        export_run(tmp_path / run, tmp_path / f"{run}-merged")
    first, second = (load_file(tmp_path / f"{run}-merged/model.safetensors") for run in ("one", "two"))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_answers_and_interference_are_measured_by_all(root: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"interference__every": 3, "interference__examples": 2, "data__validation_fraction": 0.2}
    changes |= {"eval__tasks": ["letters"], "eval__limit": 2, "eval__method": "generate", "eval__every": 3}
    train_run(exact(root, **changes), tmp_path / "one")
    assert launched.run(2, train, sharded(root, **changes), tmp_path / "two") == ["", ""]
    first, second = (
        [line for line in RunDirectory(tmp_path / run).metrics() if "interference" in line] for run in ("one", "two")
    )
    assert [line["step"] for line in first] == [3, 6]
    for mine, other in zip(first, second, strict=True):
        cosines = [torch.tensor(line["interference"]["cosines"]) for line in (other, mine)]
        torch.testing.assert_close(*cosines, rtol=1e-4, atol=1e-4)
    for name in ("step-0-generated.json", "step-6-generated.json"):
        answers = [json.loads((tmp_path / run / "eval" / name).read_text())["tasks"] for run in ("one", "two")]
        assert answers[0] == answers[1]


@pytest.mark.slow
@by_each_launcher
def test_launchers_divide_the_base(root: Path, tmp_path: Path, launcher: list[str]) -> None:
    train_run(exact(root), tmp_path / "one")
    trained_by(launcher, sharded(root), tmp_path / "two")
    assert_close_runs(tmp_path / "one", tmp_path / "two")
