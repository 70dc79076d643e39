"""Whole runs with a base that is divided among processes over gloo: what one process writes, they write."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from qdora.errors import Diverged, RunFailure, UserError
from qdora.model.load import block_list
from qdora.recipe.settings import Recipe
from qdora.run.run import train_run
from qdora.train.checks import check_division
from qdora.train.distributed import Processes
from qdora.train.interrupt import StopRequest
from qdora.train.trainer import Trainer
from tests import support
from tests.support import assert_close_runs, in_batches, timeless, train_until
from tests.test_train_distributed import GATED, PACKED, exact, stopped, train, trained_by_torchrun

pytestmark = support.needs_division

SHARD = {"train__parallel": "shard"}
PRUNED = {"base__prune": {"method": "magnitude", "sparsity": 0.5}}


@pytest.fixture(scope="module")
def one(root: Path) -> Path:
    """A run of `exact` by one process."""
    train_run(exact(root), root / "one")
    return root / "one"


@pytest.mark.parametrize(
    "changes",
    [
        {"train__batch": 5, "eval__tasks": ["sums", "letters"], "eval__limit": 2, "eval__every": 3},
        *(
            pytest.param(each, marks=pytest.mark.slow)
            for each in (
                PACKED,
                {"train__batch": 5, **GATED},
                PRUNED | {"adapter__mask": "keep"},
                PRUNED | {"base__quant": "none"},
                {"train__batch": 1, "train__steps": 3},
                {"base__cache": "cache"},
                {"train__optimizer": "paged_adamw_8bit"},
            )
        ),
    ],
    ids=["evaluated", "packed", "gates", "masked", "pruned", "no-example", "cache", "8bit"],
)
def test_two_with_half_a_base_write_what_one_does(root: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    """With evaluations, which all processes take part in."""
    changes = {name: str(tmp_path / value) if value == "cache" else value for name, value in changes.items()}
    runs = [tmp_path / "one", tmp_path / "two"]
    train_run(exact(root, **changes), runs[0])
    assert support.run_processes(2, train, exact(root, **SHARD, **changes), runs[1]) == ["", ""]
    assert_close_runs(*runs)
    written = [{file.relative_to(run) for file in run.rglob("*")} for run in runs]
    assert written[0] == written[1]
    if "eval__every" in changes:
        for step in (0, 3, 6):
            files = [json.loads((run / f"eval/step-{step}.json").read_text())["average"] for run in runs]
            assert files[1]["nll_per_token"] == pytest.approx(files[0]["nll_per_token"], rel=1e-5)


def test_a_run_goes_on_with_a_base_that_is_divided_otherwise(root: Path, one: Path, tmp_path: Path) -> None:
    """One process; two with half of the base each; one again."""
    train_until(exact(root), tmp_path, 2)
    assert support.run_processes(2, stopped, exact(root, **SHARD), tmp_path, 4, (0, 1), True) == ["", ""]
    train_run(exact(root), tmp_path, resume=True)
    assert_close_runs(one, tmp_path)


@pytest.mark.slow
def test_a_run_goes_on_with_more_and_fewer_processes(root: Path, one: Path, tmp_path: Path) -> None:
    train_until(exact(root), tmp_path, 1)
    for size, parallel, stop_at in ((2, "shard", 2), (3, "shard", 3), (4, "hybrid", 4), (2, "replicate", 5)):
        settings = exact(root, train__parallel=parallel)
        assert support.run_processes(size, stopped, settings, tmp_path, stop_at, range(size), True) == [""] * size
    assert support.run_processes(3, train, exact(root, **SHARD), tmp_path, True) == ["", "", ""]
    assert_close_runs(one, tmp_path)


@pytest.mark.slow
def test_torchrun_divides_the_base(root: Path, one: Path, tmp_path: Path) -> None:
    trained_by_torchrun(exact(root, **SHARD), tmp_path / "two")
    assert_close_runs(one, tmp_path / "two")


def broken(rank: int, settings: Recipe, directory: Path) -> None:
    def fail(number: int, *_: Any) -> None:
        if rank == 1 and number == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    in_batches(pytest.MonkeyPatch(), fail)
    with pytest.raises(RunFailure, match=f"process {rank}: {'out of memory with one example' if rank else '.*'}"):
        train_run(settings, directory)


def test_where_one_process_cannot_compute_the_others_end_and_the_run_goes_on(root: Path, tmp_path: Path) -> None:
    settings = exact(root, **SHARD, train__batch=2, train__micro_batch_tokens=96, train__checkpoint_every=1)
    assert support.run_processes(2, broken, settings, tmp_path, timeout=60) == ["", ""]
    assert support.run_processes(2, train, settings, tmp_path, True) == ["", ""]
    assert [line["step"] for line in timeless(tmp_path)] == [1, 2, 3, 4, 5, 6]


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
    trainer: Any = Trainer.__new__(Trainer)
    trainer.recipe = SimpleNamespace(eval=SimpleNamespace(every=3), train=SimpleNamespace(checkpoint_every=None))
    trainer.evaluations, trainer.best, trainer.processes = Mock(), None, Processes(1, 2, shards=shards)
    trainer.step, trainer.num_steps, trainer.stop = 3, 6, StopRequest()
    trainer.evaluate, trainer.save = Mock(side_effect=error), lambda: saved.append(trainer.step)
    with pytest.raises(type(error)):
        trainer.evaluate_and_save()
    assert saved == [3] * saves


def head_refused(rank: int, settings: Recipe, directory: Path) -> None:
    with pytest.raises(UserError, match=r"adapter\.targets: must not have the output head with train\.parallel shard"):
        train_run(settings, directory)


def test_an_adapted_head_is_refused(tmp_path: Path) -> None:
    support.write_llama(tmp_path / "model", tie_word_embeddings=False)
    settings = exact(tmp_path, **SHARD, adapter__targets=["q_proj", "lm_head"])
    assert support.run_processes(2, head_refused, settings, tmp_path / "run") == ["", ""]


def flip_in_pass(model: Any, number: int, rank: int) -> Any:
    """After each gathering of a block for a forward pass the second process has other codes in a row."""
    found = block_list(model)
    assert found is not None
    layer = found[1][number].mlp.gate_proj.base

    def flip(*_args: Any) -> None:
        if rank == 1:
            layer._parameters["packed_share"].data[3] ^= 0x77

    return found[1][number].register_forward_pre_hook(flip)


def made(source: Path, processes: Processes | None, kind: str) -> Any:
    model = support.load_sharded(source, processes)
    support.adapt_sharded(model, dropout=0.1, kind=kind)
    return model


def checked(rank: int, source: Path, kind: str) -> None:
    """Undisturbed it passes and leaves no trace. A wrong row is an error in all processes: in a block that the check
    gathers whole, and in one that it does not, where the processes differ from each other."""
    with support.dividing_processes() as processes:
        model = made(source, processes, kind)
        before = torch.get_rng_state()
        text = check_division(model, processes)
        assert text is not None
        assert "3 whole blocks" in text
        assert torch.equal(torch.get_rng_state(), before)
        assert all(parameter.grad is None for parameter in model.parameters())
        assert model.training
        expected = made(source, None, kind).eval()
        ids = torch.tensor([[5, 6, 7, 8]])
        with torch.no_grad():
            torch.testing.assert_close(model.eval()(input_ids=ids).logits, expected(input_ids=ids).logits)
        model.train()
        for number in (3, 1):
            hook = flip_in_pass(model, number, rank)
            with pytest.raises(RunFailure, match="not the same when it is divided: process 1 has a loss of"):
                check_division(model, processes)
            hook.remove()


@pytest.mark.parametrize("kind", ["dora", pytest.param("lora", marks=pytest.mark.slow)])
def test_a_divided_base_is_checked_before_the_first_step(tmp_path: Path, kind: str) -> None:
    source = support.write_llama(tmp_path, num_hidden_layers=4)  # of which three are gathered whole
    assert support.run_processes(2, checked, source, kind) == ["", ""]
    assert check_division(None, Processes()) is None  # type: ignore[arg-type]
