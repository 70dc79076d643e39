"""Two processes over gloo train what one process trains; they stop, fail and resume together."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
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

from qdora.data import build_data, token_cache
from qdora.data.loader import share_of
from qdora.data.tokenize import TokenizedExample, TokenizedSet
from qdora.errors import Interrupted, RunFailure, UserError
from qdora.recipe.recipe_file import resolved_yaml
from qdora.recipe.settings import Recipe
from qdora.run.run import train_run
from qdora.train import checkpoint as writer
from qdora.train import distributed, passes, trainer
from qdora.train.distributed import OtherProcessFailed, Processes, free_host_bytes, processes_of_launch, seed_of
from tests import support
from tests.support import assert_close_runs, assert_same_run, in_batches, timeless, train_until, training_lines

PACKED = {"train__batch": 9, "data__packing": True}
GATED = {"adapter__gates": {"mode": "hard_concrete", "mean_rank": 2, "warmup": 1, "anneal": 4, "shrink_every": 2}}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


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


@pytest.fixture(scope="module")
def one(root: Path) -> Path:
    """A run of `exact` by one process."""
    train_run(exact(root), root / "one")
    return root / "one"


@pytest.mark.parametrize(
    "changes",
    [
        {"train__batch": ..., "train__tokens_per_step": 90, "weight": 4.0},
        PACKED,
        {"train__batch": 5, **GATED},
        {"train__batch": 1, "train__steps": 3},
        {"train__batch": 1, "train__steps": 3, "data__packing": True},
    ],
    ids=["weighted", "packed", "gated", "without an example", "packed without one"],
)
def test_two_processes_train_what_one_does(root: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    """Steps of an odd number of examples, so that the two never have the same number of labels."""
    sums, letters = ({"source": str(file)} for file in support.write_data(root / "data"))
    if "weight" in changes:
        sums["loss_weight"] = changes["weight"]
    changes = {name: value for name, value in changes.items() if name != "weight"}
    settings = exact(root, **changes, data__mix=[sums, letters], eval__tasks=["sums"], eval__limit=2)
    runs = [tmp_path / "one", tmp_path / "two"]
    train_run(settings, runs[0])
    assert support.run_processes(2, train, settings, runs[1]) == ["", ""]
    assert_close_runs(*runs)
    written = [{file.relative_to(run) for file in run.rglob("*")} for run in runs]
    assert written[0] == written[1]
    last = [json.loads((run / f"eval/step-{settings.train.steps}.json").read_text())["average"] for run in runs]
    assert last[1]["nll_per_token"] == pytest.approx(last[0]["nll_per_token"], rel=1e-5)
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


def test_a_run_goes_on_with_another_number_of_processes(root: Path, one: Path, tmp_path: Path) -> None:
    """One process, then two, then one again."""
    train_until(exact(root), tmp_path, 2)
    assert support.run_processes(2, stopped, exact(root), tmp_path, 4, (0, 1), True) == ["", ""]
    train_run(exact(root), tmp_path, resume=True)
    assert_close_runs(one, tmp_path)
    assert "same data, different dropout" not in (tmp_path / "log.txt").read_text()  # there is none


def with_files_of_its_own(rank: int, settings: list[Recipe], directory: Path, different: str | None) -> None:
    """Train, and leave a file for each source that this process tokenises."""
    tokenize_all = build_data.tokenize_all

    def noted(*args: Any, **options: Any) -> TokenizedSet:
        (directory.parent / f"{options['name']} by {rank}").touch(exist_ok=False)
        return tokenize_all(*args, **options)

    build_data.tokenize_all = noted
    token_cache._LEAST_TOKENS = 0
    if different is None:
        train_run(settings[rank], directory)
        return
    text = rf"process 1 on \S+ has {different} than process 0 on \S+\. Fix: give all machines the same files"
    with pytest.raises(UserError, match=text):
        train_run(settings[rank], directory)


@pytest.mark.parametrize(
    "changed, different",
    [("data/sums.jsonl", "another training data"), ("model/config.json", "another base"), (None, None)],
)
def test_all_have_the_same_data_and_base(
    root: Path, tmp_path: Path, changed: str | None, different: str | None
) -> None:
    """One of them reads its own copies, as on another machine. Of the same files the first one tokenises for all."""
    options: dict[str, Any] = {"train__steps": 1, "data__cache": str(tmp_path / "cache")}
    recipe(root)
    shutil.copytree(root / "model", tmp_path / "copy/model")
    settings = [recipe(root, **options), recipe(tmp_path / "copy", **options)]
    if changed is not None:
        file = tmp_path / "copy" / changed
        file.write_text(file.read_text().replace("1 + 2 =", "1 + 3 =") + "\n")
    assert support.run_processes(2, with_files_of_its_own, settings, tmp_path / "run", different) == ["", ""]
    if changed is None:
        one = recipe(root, train__steps=1, data__cache=str(tmp_path / "one/cache"))
        (tmp_path / "one").mkdir()
        assert support.run_processes(2, with_files_of_its_own, [one, one], tmp_path / "one/run", None) == ["", ""]
        assert sorted(file.name for file in (tmp_path / "one").glob("* by *")) == ["letters by 0", "sums by 0"]
        assert len(list((tmp_path / "one/cache").iterdir())) == 2


def broken(rank: int, settings: Recipe, directory: Path) -> None:
    def fail(number: int, *_: Any) -> None:
        if rank == 1 and number == 3:
            raise RuntimeError("CUDA error: device-side assert triggered")

    in_batches(pytest.MonkeyPatch(), fail)
    with pytest.raises(RunFailure, match=r"step 3: process 1: cannot be computed: CUDA error: device-side.*step-2"):
        train_run(settings, directory)


def hanging(rank: int, settings: Recipe, directory: Path) -> None:
    """The second process stands still for longer than the others wait for its pass."""
    in_batches(pytest.MonkeyPatch(), lambda number, *_: time.sleep(10) if rank == 1 and number == 3 else None)
    distributed._STEP_PATIENCE = timedelta(seconds=3)
    named = "process 1: the exchange" if rank else "process 0: .*Ranks 1 failed to pass monitoredBarrier"
    with pytest.raises(OtherProcessFailed, match=named):
        train_run(settings, directory)


def full_disk(rank: int, settings: Recipe, directory: Path) -> None:
    writer.write_state = Mock(side_effect=OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    expected = (RunFailure, "the disk is full") if rank == 0 else (OtherProcessFailed, "process 1: .*process 0 failed")
    with pytest.raises(expected[0], match=expected[1]):
        train_run(settings, directory)


def user_mistake(rank: int, settings: Recipe, directory: Path) -> None:
    with pytest.raises((UserError, OtherProcessFailed), match="holds a run" if rank == 0 else "process 0 failed"):
        train_run(settings, directory)


def ended_by_the_launcher(rank: int, settings: Recipe, directory: Path) -> None:
    """The second process has ended while the first one draws its figures."""
    draw = trainer.draw_figures

    def drawing(*args: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        draw(*args)

    trainer.draw_figures = drawing
    passes.batch_loss = Mock(side_effect=RuntimeError("CUDA error"))
    with pytest.raises(RunFailure, match="step 1: process 0: cannot be computed: CUDA error"):
        train_run(settings, directory)
    assert rank == 1 or "FAILURE" in (directory / "log.txt").read_text()
    assert rank == 1 or (directory / "report.html").exists()


@pytest.mark.parametrize("fails", [broken, hanging, full_disk, ended_by_the_launcher])
def test_where_one_process_fails_all_stop_and_the_run_goes_on(root: Path, tmp_path: Path, fails: Any) -> None:
    settings = exact(root, train__batch=2, train__checkpoint_every=1)
    assert support.run_processes(2, fails, settings, tmp_path, timeout=100) == ["", ""]
    if fails is broken:
        kept = json.loads((tmp_path / "bad-steps/step-3/batch.json").read_text())
        assert len(kept["examples"]) == 2  # of both
    assert support.run_processes(2, train, settings, tmp_path, True) == ["", ""]
    assert [line["step"] for line in timeless(tmp_path)] == [1, 2, 3, 4, 5, 6]
    if fails is broken:  # a mistake that only the first can see
        assert support.run_processes(2, user_mistake, settings, tmp_path) == ["", ""]


def out_of_memory(rank: int, settings: Recipe, directory: Path) -> None:
    """The second process has less memory."""

    def hungry(_number: int, _loss: Any, ids: torch.Tensor, _options: Any) -> None:
        if rank == 1 and ids.numel() > 40:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    in_batches(pytest.MonkeyPatch(), hungry)
    train_run(settings, directory)


def test_where_one_runs_out_of_memory_both_take_smaller_micro_batches(root: Path, tmp_path: Path) -> None:
    settings, run = exact(root, train__batch=8), tmp_path / "run"
    train_run(settings, tmp_path / "whole")
    assert support.run_processes(2, out_of_memory, settings, run) == ["", ""]
    shrunk = [line["out_of_memory"] for line in timeless(run) if "out_of_memory" in line]
    assert shrunk[-1]["tokens_after"] < 96
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in training_lines(run)))
    assert_close_runs(tmp_path / "whole", run)


def exchange(rank: int) -> None:
    """Messages; gradients of three shapes in two dtypes, in messages of at most 10 elements; and the other one ends."""
    distributed._MESSAGE_ELEMENTS = 10
    numbers = np.random.default_rng(0).normal(size=(2, 40)).astype(np.float32)
    with processes_of_launch() as processes:
        assert (processes.rank, processes.size) == (rank, 2)
        assert [each["text"] for each in processes.gather({"text": "é" * rank * 100})] == ["", "é" * 100]
        assert str(processes.gather(float("nan") if rank else 1.0)) == "[1.0, nan]"
        assert processes.first(lambda: 7) == (7 if rank == 0 else None)
        shapes = [(3, 4), (5,), (2, 2), (7,), (1,)]
        parameters = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
        parameters[1] = nn.Parameter(torch.zeros(5, dtype=torch.bfloat16))
        parameters[1].grad_dtype = torch.float32
        places = [slice(start, start + p.numel()) for start, p in zip((0, 12, 17, 21, 28), parameters, strict=True)]
        for index, (parameter, place) in enumerate(zip(parameters, places, strict=True)):
            if index != 4 and not (rank == 1 and index in (1, 3)):
                parameter.grad = torch.from_numpy(numbers[rank, place].copy()).view(parameter.shape)
        processes.sum_gradients_(parameters)
        for index, wanted in ((0, numbers.sum(axis=0)), (2, numbers.sum(axis=0)), (1, numbers[0]), (3, numbers[0])):
            grad = parameters[index].grad
            assert grad is not None
            assert grad.dtype == torch.float32
            np.testing.assert_array_equal(grad.flatten().numpy(), wanted[places[index]])
        assert parameters[4].grad is None
        parameter = nn.Parameter(torch.tensor([0.5 + rank, 1.0]))
        version = parameter._version
        processes.require_equal({"b": torch.ones(3, dtype=torch.bfloat16)})
        with pytest.raises(RunFailure, match=r"process 1 has another a than process 0 \(1 parameters differ\)"):
            processes.require_equal({"b": torch.ones(3), "a": parameter})
        processes.share_first_([parameter])
        assert parameter.tolist() == [0.5, 1.0]
        assert parameter._version > version
        processes.require_equal({"a": parameter})
        if rank == 0:  # the other ends here
            for action in (
                processes.gather,
                lambda _: processes.share_first_([parameter]),
                lambda _: free_host_bytes(),
            ):
                with pytest.raises(OtherProcessFailed, match="process 0: the exchange with the other processes failed"):
                    action(0)


def test_what_the_processes_tell_each_other() -> None:
    assert support.run_processes(2, exchange) == ["", ""]
    alone = Processes()
    assert alone.gather(3) == [3]
    assert alone.first(lambda: 4) == 4
    assert seed_of(5, rank=0) == 5
    assert len({seed_of(5, 0), seed_of(5, 1), seed_of(6, 1), seed_of(5, 1, step=3), seed_of(5, 2)}) == 5


def test_processes_share_the_memory_of_their_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "available_memory_bytes", lambda: 4000)
    assert free_host_bytes() == 4000
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert free_host_bytes() == 1000
    finally:
        dist.destroy_process_group()


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
    assert shares == [examples] or size > 1


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
        patch.setattr(distributed, "_MESSAGE_ELEMENTS", 100)
        yield


def the_only_gpu(rank: int) -> None:
    taken: list[int] = []
    with fake_gpus(num_gpus=1):
        torch.cuda.set_device = taken.append
        with processes_of_launch() as processes:
            assert processes.gather(taken) == [[0], [0]]


def network_without_a_way(rank: int) -> None:
    def fails(_tensor: torch.Tensor, group: Any) -> None:
        raise dist.DistBackendError("NCCL error in: a.cpp:1, remote error\nLast error:\nsocketStartConnect: refused")

    def start() -> None:
        with processes_of_launch():
            raise AssertionError("the run must not begin")

    dist.all_reduce = fails
    with fake_gpus(), pytest.raises(RunFailure, match=r"process .: .* NCCL error in: a.cpp:1, remote error"):
        start()


@pytest.mark.parametrize("action", [the_only_gpu, network_without_a_way])
def test_processes_take_their_gpus(action: Any) -> None:
    """Also where each sees one alone; and GPUs that cannot reach each other are told at the start."""
    assert support.run_processes(2, action, timeout=60) == ["", ""]


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    said = r"one process for each GPU \(got 4 on 2 GPUs\)\. Fix: start with torchrun --nproc-per-node 2\."
    with fake_gpus(), pytest.raises(UserError, match=said), processes_of_launch():
        pass


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
        reduce, joined = dist.all_reduce, []
        dist.all_reduce = lambda tensor, group: joined.append((group, tensor.numel())) or reduce(tensor, group=group)
        here = [0, 1] if rank < 2 else [2, 3]
        expected = {"shard": [[0, 1, 2, 3]], "hybrid": [[rank % 2, rank % 2 + 2], here]}
        with processes_of_launch() as processes:
            for parallel, members in expected.items():
                mesh = distributed.mesh_of(processes.dividing(base=True), torch.device("cuda"), parallel)
                assert mesh is not None
                groups = mesh.get_all_groups()
                assert [dist.get_process_group_ranks(group) for group in groups] == members
                assert [made.get(group.group_name) for group in groups] == ["nccl"] * len(groups)
                assert joined == [(group, num) for group in groups for num in (1, 100)]
                joined.clear()


def unequal_machines(rank: int) -> None:
    """A machine of two processes, and one of one."""
    os.environ["LOCAL_WORLD_SIZE"] = "2" if rank < 2 else "1"
    text = r"must be shard or replicate unless each machine has equally many processes, got hybrid with 1 and 2 of them"
    with processes_of_launch() as processes, pytest.raises(UserError, match=text):
        distributed.mesh_of(processes.dividing(base=True), torch.device("cpu"), "hybrid")


@support.needs_division
def test_gpus_gather_a_divided_base_by_nccl_and_machines_of_unequal_size_cannot_repeat_it() -> None:
    assert support.run_processes(4, mesh_on_gpus) == [""] * 4
    assert support.run_processes(3, unequal_machines) == [""] * 3


def test_an_old_torch_cannot_divide_a_base(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "CAN_DIVIDE", False)
    text = r"train.parallel: must be auto or replicate with torch .* \(shard and hybrid need torch 2.12\), got shard"
    with pytest.raises(UserError, match=text):
        distributed.mesh_of(Processes(size=2, shards=True), torch.device("cpu"), "shard")
    assert distributed.mesh_of(Processes(size=2), torch.device("cpu"), "shard") is None


def trained_by_torchrun(settings: Recipe, directory: Path) -> dict[str, Any]:
    """Run `qdora train` in two processes; returns what --json writes."""
    file = directory.with_suffix(".yaml")
    file.write_text(resolved_yaml(settings))
    command = [*TORCHRUN, "-m", "qdora.cli", "train", str(file), "-d", str(directory), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.slow
def test_torchrun_runs_the_command_line(root: Path, one: Path, tmp_path: Path) -> None:
    assert trained_by_torchrun(exact(root), tmp_path / "two")["num_steps"] == 6
    assert_close_runs(one, tmp_path / "two")
