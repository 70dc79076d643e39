"""Two processes over gloo train what one process trains; they stop, fail and resume together."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from qdora.data.batches import share_of
from qdora.data.tokenize import TokenizedExample
from qdora.errors import Interrupted, RunFailure
from qdora.recipe.settings import Recipe
from qdora.run.run import train_run
from qdora.train import distributed
from qdora.train.distributed import Processes, free_host_bytes, processes_of_launch, seed_of
from qdora.train.trainer import Trainer
from tests import support
from tests.support import assert_close_runs, assert_same_run, in_batches, timeless, train_until, training_lines

PROBED = {"interference__every": 2, "interference__examples": 2, "data__validation_fraction": 0.2}
GATED = {"adapter__gates": {"mode": "hard_concrete", "mean_rank": 2, "warmup": 1, "anneal": 4, "shrink_every": 2}}


def recipe(root: Path, **changes: Any) -> Recipe:
    """No evaluations; with dropout, as tiny_run's."""
    return support.tiny_recipe(root, **({"eval__tasks": [], "eval__limit": ...} | changes))


def exact(root: Path, **changes: Any) -> Recipe:
    """Nothing random in a step, nothing in 16 bits: what differs is the order of sums."""
    return recipe(root, adapter__dropout=0.0, adapter__dtype="float32", **changes)


def train(rank: int, settings: Recipe, directory: Path, resume: bool = False) -> None:
    train_run(settings, directory, resume=resume)


def stopped(rank: int, settings: Recipe, directory: Path, step: int, asked: tuple[int, ...], resume: bool) -> None:
    """Those `asked` to stop do, and the others with them."""
    if rank in asked:
        train_until(settings, directory, step, resume=resume)
    else:
        with pytest.raises(Interrupted, match=f"after step {step}; saved to .*step-{step}"):
            train_run(settings, directory, resume=resume)


def assert_same_files(one: Path, two: Path) -> None:
    written = [{file.relative_to(run) for file in run.rglob("*")} for run in (one, two)]
    assert written[0] == written[1]
    for file in (one / "eval").glob("step-*.json"):
        found = [json.loads((run / "eval" / file.name).read_text())["average"] for run in (one, two)]
        assert found[1]["nll_per_token"] == pytest.approx(found[0]["nll_per_token"], rel=1e-5)
    for first, second in zip(timeless(one), timeless(two), strict=True):
        if "interference" in first:
            np.testing.assert_allclose(second["interference"]["cosines"], first["interference"]["cosines"], atol=1e-3)


@pytest.mark.parametrize(
    ("weight", "changes"),
    [
        (4.0, {"train__batch": ..., "train__tokens_per_step": 90, "eval__every": 2, **PROBED}),
        (1.0, {"train__batch": 5, "data__packing": True, **GATED}),
        (1.0, {"train__batch": 1, "train__steps": 3, "data__packing": True}),
    ],
    ids=["weighted", "packed and gated", "without an example"],
)
def test_two_processes_train_what_one_does(root: Path, tmp_path: Path, weight: float, changes: dict[str, Any]) -> None:
    """Steps of an odd number of examples, so that the two never have the same number of labels."""
    sums, letters = map(str, support.write_data(root / "data"))
    mix = [{"source": sums, "loss_weight": weight}, {"source": letters}]
    settings = exact(root, **changes, data__mix=mix, eval__tasks=["sums"], eval__limit=2)
    runs = [tmp_path / "one", tmp_path / "two"]
    train_run(settings, runs[0])
    assert support.run_processes(2, train, settings, runs[1]) == ["", ""]
    assert_close_runs(*runs)
    assert_same_files(*runs)
    assert json.loads((runs[1] / "environment.json").read_text())["num_processes"] == 2


def test_one_is_asked_to_stop_both_do_and_resumed_equals_uninterrupted_bit_for_bit(root: Path, tmp_path: Path) -> None:
    settings = recipe(root)  # with dropout: each process has random numbers of its own
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert support.run_processes(2, train, settings, whole) == ["", ""]
    assert support.run_processes(2, stopped, settings, run, 3, (1,), False) == ["", ""]
    assert len(timeless(run)) == 3
    assert support.run_processes(2, train, settings, run, True) == ["", ""]
    assert_same_run(run, whole)
    random = load_file(whole / "checkpoints/step-6/random.safetensors")
    assert sorted(key for key in random if key.startswith("cpu")) == ["cpu", "cpu.1"]
    assert not torch.equal(random["cpu"], random["cpu.1"])
    train_run(recipe(root, train__steps=7), run, resume=True)
    assert "from 2 processes, this run has 1: same data, different dropout" in (run / "log.txt").read_text()


@pytest.mark.parametrize(
    ("changed", "different"), [("data/sums.jsonl", "another training data"), ("model/config.json", "another base")]
)
def test_all_have_the_same_data_and_base(root: Path, tmp_path: Path, changed: str, different: str) -> None:
    """One of them reads its own copies, as on another machine."""
    settings = [recipe(root, train__steps=1)]
    shutil.copytree(root / "model", tmp_path / "copy/model")
    settings.append(recipe(tmp_path / "copy", train__steps=1))
    file = tmp_path / "copy" / changed
    file.write_text(file.read_text().replace("1 + 2 =", "1 + 3 =") + "\n")
    text = rf"process 1 has {different} than process 0\."
    for error in support.run_processes(2, lambda rank: train(rank, settings[rank], tmp_path / "run")):
        assert re.search(text, error)


def test_where_one_process_fails_all_stop_and_the_run_goes_on(root: Path, tmp_path: Path) -> None:
    settings = exact(root, train__batch=2, train__checkpoint_every=1)

    def fail(number: int, *_: Any) -> None:
        if number == 3:
            raise RuntimeError("CUDA error: device-side assert triggered")

    def broken(rank: int) -> None:
        if rank == 1:
            in_batches(pytest.MonkeyPatch(), fail)
        with pytest.raises(RunFailure, match=r"step 3: process 1: cannot be computed: CUDA error: device-side.*step-2"):
            train_run(settings, tmp_path)

    assert support.run_processes(2, broken) == ["", ""]
    kept = json.loads((tmp_path / "bad-steps/step-3/batch.json").read_text())
    assert len(kept["examples"]) == 2  # of both
    assert support.run_processes(2, train, settings, tmp_path, True) == ["", ""]
    assert [line["step"] for line in timeless(tmp_path)] == [1, 2, 3, 4, 5, 6]
    # A mistake that only the first can see
    errors = support.run_processes(2, train, settings, tmp_path)
    assert "holds a run" in errors[0]
    assert "process 1: the exchange with the other processes failed" in errors[1]


def test_a_process_that_hangs_or_has_a_full_disk_ends_the_others(root: Path, tmp_path: Path) -> None:
    settings = exact(root, train__batch=2, train__checkpoint_every=1)

    def hanging(rank: int) -> None:
        """The second process stands still for longer than the others wait for it before a checkpoint."""
        save = Trainer.save
        distributed._PATIENCE = timedelta(seconds=1)
        Trainer.save = lambda self: (time.sleep(4 * rank), save(self))[1]  # type: ignore[method-assign]
        train_run(settings, tmp_path / "hanging")

    def full_disk(_rank: int) -> None:
        Trainer._write_state = Mock(side_effect=OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        train_run(settings, tmp_path / "full")

    first, second = support.run_processes(2, hanging, timeout=100)
    assert re.search("RunFailure: process 0: .*Ranks 1 failed to pass monitoredBarrier", first)
    assert "RunFailure: process 1: the exchange" in second
    first, second = support.run_processes(2, full_disk, timeout=100)
    assert "the disk is full" in first.splitlines()[-1]
    assert "RunFailure: process 1: the exchange" in second


def test_where_one_runs_out_of_memory_both_take_smaller_micro_batches(root: Path, tmp_path: Path) -> None:
    settings, run = exact(root, train__batch=8), tmp_path / "run"

    def hungry(_number: int, _loss: Any, ids: torch.Tensor, _options: Any) -> None:
        if ids.numel() > 40:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    def short(rank: int) -> None:
        if rank == 1:
            in_batches(pytest.MonkeyPatch(), hungry)
        train_run(settings, run)

    train_run(settings, tmp_path / "whole")
    assert support.run_processes(2, short) == ["", ""]
    shrunk = [line["out_of_memory"] for line in timeless(run) if "out_of_memory" in line]
    assert shrunk[-1]["tokens_after"] < 96
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in training_lines(run)))
    assert_close_runs(tmp_path / "whole", run)


def exchange(rank: int) -> None:
    """Messages; gradients of three shapes in two dtypes, in messages of at most 10 elements; and the other one ends."""
    distributed._MESSAGE_BYTES = 40
    numbers = np.random.default_rng(0).normal(size=(2, 17)).astype(np.float32)
    with processes_of_launch() as processes:
        assert (processes.rank, processes.size) == (rank, 2)
        assert [each["text"] for each in processes.gather({"text": "é" * rank * 100})] == ["", "é" * 100]
        assert str(processes.gather(float("nan") if rank else 1.0)) == "[1.0, nan]"
        assert processes.first(lambda: 7) == (7 if rank == 0 else None)
        distributed.available_memory_bytes = lambda: 4000  # of the machine, which both share
        assert free_host_bytes() == 2000
        both, none = nn.Parameter(torch.zeros(3, 4)), nn.Parameter(torch.zeros(1))
        first = nn.Parameter(torch.zeros(5, dtype=torch.bfloat16))
        first.grad_dtype = torch.float32
        both.grad = torch.from_numpy(numbers[rank, :12].copy()).view(3, 4)
        first.grad = torch.from_numpy(numbers[rank, 12:].copy()) if rank == 0 else None
        processes.sum_gradients_([both, first, none])
        assert first.grad is not None
        assert both.grad.dtype == first.grad.dtype == torch.float32
        np.testing.assert_array_equal(both.grad.flatten().numpy(), numbers[:, :12].sum(axis=0))
        np.testing.assert_array_equal(first.grad.numpy(), numbers[0, 12:])
        assert none.grad is None
        parameter = nn.Parameter(torch.tensor([0.5 + rank, 1.0]))
        version = parameter._version
        processes.require_equal({"b": torch.ones(3, dtype=torch.bfloat16)})
        with pytest.raises(RunFailure, match="process 1 has other parameters than process 0"):
            processes.require_equal({"b": torch.ones(3), "a": parameter})
        processes.share_first_([parameter])
        assert parameter.tolist() == [0.5, 1.0]
        assert parameter._version > version
        processes.require_equal({"a": parameter})
        ends = (processes.gather, lambda _: processes.share_first_([parameter]), lambda _: free_host_bytes())
        for action in ends[: 3 * (rank == 0)]:  # the other one is gone
            with pytest.raises(RunFailure, match="process 0: the exchange with the other processes failed"):
                action(0)


def test_what_the_processes_tell_each_other() -> None:
    assert support.run_processes(2, exchange) == ["", ""]
    alone = Processes()
    assert alone.gather(3) == [3]
    assert alone.first(lambda: 4) == 4
    assert seed_of(5, rank=0) == 5
    assert len({seed_of(5, 0), seed_of(5, 1), seed_of(6, 1), seed_of(5, 1, step=3), seed_of(5, 2)}) == 5


@given(lengths=st.lists(st.integers(1, 50), max_size=30), size=st.integers(1, 5))
def test_shares_are_a_fair_partition_in_the_order_of_the_step(lengths: list[int], size: int) -> None:
    ids = [np.zeros(length, dtype=np.int32) for length in lengths]
    examples = [TokenizedExample("t", str(n), each, np.ones(len(each), dtype=bool)) for n, each in enumerate(ids)]
    shares = [share_of(examples, rank, size) for rank in range(size)]
    numbers = [[int(each.id) for each in share] for share in shares]
    assert sorted(number for share in numbers for number in share) == list(range(len(lengths)))
    assert all(share == sorted(share) for share in numbers)
    tokens = [sum(map(len, share)) for share in shares]
    assert max(tokens) - min(tokens) <= max(lengths, default=0)


@contextmanager
def fake_gpus(num_gpus: int = 2) -> Iterator[None]:
    """Gloo for NCCL and the host for its GPUs, on a machine of so many."""
    real, zeros = dist.new_group, torch.zeros

    def on_the_host(*size: Any, device: Any = None, **options: Any) -> torch.Tensor:
        return zeros(*size, device="cpu" if device == "cuda" else device, **options)

    def group(ranks: Any = None, timeout: Any = None, backend: Any = None, **options: Any) -> Any:
        return real(ranks, timeout, "gloo" if backend == "nccl" else backend, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "device_count", lambda: num_gpus)
        patch.setattr(torch.cuda, "set_device", lambda _number: None)
        patch.setattr(torch.cuda, "synchronize", lambda: None)
        patch.setattr(torch, "zeros", on_the_host)
        patch.setattr(dist, "new_group", group)
        patch.setattr(distributed, "_MESSAGE_BYTES", 400)
        yield


def test_processes_take_their_gpus() -> None:
    """Also where each sees one alone; GPUs that cannot reach each other are told at the start."""

    def alone(_rank: int) -> None:
        taken: list[int] = []
        with fake_gpus(num_gpus=1):
            torch.cuda.set_device = taken.append
            with processes_of_launch() as processes:
                assert processes.gather(taken) == [[0], [0]]

    def without_a_way(_rank: int) -> None:
        dist.all_reduce = Mock(side_effect=dist.DistBackendError("NCCL error in: a.cpp:1, remote\nLast error:\nno"))
        with fake_gpus(), processes_of_launch():
            pass

    assert support.run_processes(2, alone, timeout=60) == ["", ""]
    for error in support.run_processes(2, without_a_way, timeout=60):
        assert re.search(r"Fail(ure|ed): process .: .* NCCL error in: a.cpp:1, remote", error)


def mesh_on_gpus(rank: int) -> None:
    """Two machines of two GPUs: whoever is in each dimension of the mesh, and through which backend."""
    made: dict[str, str] = {}
    os.environ.update({"LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": str(rank % 2)})
    with fake_gpus():
        fake = dist.new_group

        def noted(ranks: Any = None, timeout: Any = None, backend: Any = None, **options: Any) -> Any:
            group = fake(ranks, timeout, backend, **options)
            made[getattr(group, "group_name", "of others")] = backend
            return group

        for module in (dist, dist.distributed_c10d):
            module.new_group = noted
        here = [0, 1] if rank < 2 else [2, 3]
        expected = {"shard": [[0, 1, 2, 3]], "hybrid": [[rank % 2, rank % 2 + 2], here]}
        with processes_of_launch() as processes:
            for parallel, members in expected.items():
                mesh = distributed.mesh_of(processes.dividing(base=True), torch.device("cuda"), parallel)
                assert mesh is not None
                groups = mesh.get_all_groups()
                assert [dist.get_process_group_ranks(group) for group in groups] == members
                assert [made.get(group.group_name) for group in groups] == ["nccl"] * len(groups)


@support.needs_division
def test_gpus_gather_a_divided_base_by_nccl_and_machines_of_unequal_size_cannot_repeat_it() -> None:
    assert support.run_processes(4, mesh_on_gpus) == [""] * 4

    def unequal(rank: int) -> None:
        """A machine of two processes, and one of one."""
        os.environ["LOCAL_WORLD_SIZE"] = "2" if rank < 2 else "1"
        with processes_of_launch() as processes:
            distributed.mesh_of(processes.dividing(base=True), torch.device("cpu"), "hybrid")

    for error in support.run_processes(3, unequal):
        assert "unless each machine has equally many processes" in error
