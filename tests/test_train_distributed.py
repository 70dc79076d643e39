"""Two processes over gloo train what one process trains; they stop, fail and resume together."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import socket
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
from qdora.files.run_directory import open_run
from qdora.recipe.recipe_file import resolved_yaml
from qdora.recipe.settings import Recipe
from qdora.run import trainer, writer
from qdora.run.train import train_run
from qdora.train import distributed, loop, passes
from qdora.train.distributed import OtherProcessFailed, Processes, free_host_bytes, processes_of_launch, seed_of
from tests import launched, tiny_run, tiny_sharded

PACKED = {"train__batch": 9, "data__packing": True}
ADAPTER = "adapter/adapter_model.safetensors"


def test_processes_share_the_memory_of_their_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "available_memory_bytes", lambda: 4000)
    assert free_host_bytes() == 4000
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert free_host_bytes() == 1000
    finally:
        dist.destroy_process_group()


def _left_alone(rank: int) -> None:
    with processes_of_launch() as processes:
        assert processes.gather(rank) == [0, 1]
        if rank == 0:  # the other ends here
            lost = "process 0: the exchange with the other processes failed"
            with pytest.raises(OtherProcessFailed, match=lost):
                processes.gather(rank)
            parameter = nn.Parameter(torch.ones(3))
            with pytest.raises(OtherProcessFailed, match=lost):
                processes.share_first_([parameter])
            with pytest.raises(OtherProcessFailed, match=lost):
                free_host_bytes()


def test_a_process_that_ends_is_told_in_one_line() -> None:
    assert launched.run(2, _left_alone) == ["", ""]


def recipe(root: Path, **changes: Any) -> Recipe:
    """No evaluations; with dropout, as tiny_run's."""
    return tiny_run.recipe(root, **({"eval__tasks": [], "eval__limit": ...} | changes))


def exact(root: Path, **changes: Any) -> Recipe:
    """Nothing random in a step, nothing in 16 bits: what differs is the order of sums."""
    return recipe(root, adapter__dropout=0.0, adapter__dtype="float32", **changes)


def train(rank: int, settings: Recipe, directory: Path, resume: bool = False) -> None:
    train_run(settings, directory, resume=resume)


def lines(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without the times."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "time"} for line in found]


def assert_close_runs(one: Path, two: Path, names: tuple[str, ...] = (ADAPTER,)) -> None:
    for first, second in zip(lines(one), lines(two), strict=True):
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
    for name in names:
        first, second = load_file(one / name), load_file(two / name)
        assert first.keys() == second.keys()
        for key in first:
            torch.testing.assert_close(second[key], first[key], rtol=1e-4, atol=1e-5)


GATED = {"adapter__gates": {"mode": "hard_concrete", "mean_rank": 2, "warmup": 1, "anneal": 4, "shrink_every": 2}}


@pytest.mark.parametrize(
    "size",
    [
        pytest.param({"train__batch": 5}, marks=pytest.mark.slow),  # as the last one, but for the gates
        {"train__batch": ..., "train__tokens_per_step": 90},
        PACKED,
        {"train__batch": 5, **GATED},
    ],
)
def test_two_processes_train_what_one_does(root: Path, tmp_path: Path, size: dict[str, Any]) -> None:
    """Steps of an odd number of examples, so that the two never have the same number of labels."""
    settings = exact(root, **size, eval__tasks=["sums"], eval__limit=2)
    train_run(settings, tmp_path / "one")
    assert launched.run(2, train, settings, tmp_path / "two") == ["", ""]
    assert_close_runs(tmp_path / "one", tmp_path / "two")
    written = [{file.relative_to(run) for file in run.rglob("*")} for run in (tmp_path / "one", tmp_path / "two")]
    assert written[0] == written[1]
    first, second = (json.loads((tmp_path / run / "eval/step-6.json").read_text()) for run in ("one", "two"))
    assert second["average"]["nll_per_token"] == pytest.approx(first["average"]["nll_per_token"], rel=1e-5)
    assert json.loads((tmp_path / "two/environment.json").read_text())["num_processes"] == 2


def with_these_files(rank: int, settings: list[Recipe], directory: Path) -> None:
    train_run(settings[rank], directory)


def with_files_of_its_own(rank: int, settings: list[Recipe], directory: Path, different: str) -> None:
    text = rf"process 1 on \S+ has {different} than process 0 on \S+\. Fix: give all machines the same files"
    with pytest.raises(UserError, match=text):
        train_run(settings[rank], directory)


@pytest.mark.parametrize(
    "changed, different",
    [("data/sums.jsonl", "another training data"), ("model/config.json", "another base")],
)
def test_all_processes_have_the_same_data_and_base(root: Path, tmp_path: Path, changed: str, different: str) -> None:
    """One of them reads its own copies of the files, as on another machine, of which some are old."""
    settings = [recipe(root)]
    shutil.copytree(root, tmp_path / "copy")
    settings.append(recipe(tmp_path / "copy"))
    file = tmp_path / "copy" / changed
    file.write_text(file.read_text().replace("1 + 2 =", "1 + 3 =") + "\n")
    assert launched.run(2, with_files_of_its_own, settings, tmp_path / "run", different) == ["", ""]


def test_copies_of_the_same_files_are_the_same(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root, tmp_path / "copy")
    settings = [recipe(root, train__steps=1), recipe(tmp_path / "copy", train__steps=1)]
    assert launched.run(2, with_these_files, settings, tmp_path / "run") == ["", ""]


def counted(rank: int, settings: Recipe, directory: Path) -> None:
    """Train, and leave a file for each source that this process tokenises."""
    tokenize_all = build_data.tokenize_all

    def noted(*args: Any, **options: Any) -> TokenizedSet:
        (directory.parent / f"{options['name']} by {rank}").touch(exist_ok=False)
        return tokenize_all(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build_data, "tokenize_all", noted)
        patch.setattr(token_cache, "_LEAST_TOKENS", 0)
        train_run(settings, directory)


def test_one_process_tokenises_and_the_others_read_what_it_kept(root: Path, tmp_path: Path) -> None:
    settings = recipe(root, train__steps=1, data__cache=str(tmp_path / "cache"))
    assert launched.run(2, counted, settings, tmp_path / "run") == ["", ""]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["cache", "letters by 0", "run", "sums by 0"]
    assert len(list((tmp_path / "cache").iterdir())) == 2


@pytest.mark.parametrize("packing", [False, True])
def test_a_process_without_an_example_takes_part(root: Path, tmp_path: Path, packing: bool) -> None:
    settings = exact(root, train__batch=1, train__steps=3, data__packing=packing)
    train_run(settings, tmp_path / "one")
    assert launched.run(2, train, settings, tmp_path / "two") == ["", ""]
    assert_close_runs(tmp_path / "one", tmp_path / "two")


def stopped(rank: int, settings: Recipe, directory: Path, stop_at: int) -> None:
    """The second process alone is asked to stop."""
    after_step = loop.after_step

    def ask(model: Any, done: int, hooks: Any, stop: Any, **settings: Any) -> bool:
        stop.requested = rank == 1 and done == stop_at
        return bool(after_step(model, done, hooks, stop, **settings))

    loop.after_step = ask
    with pytest.raises(Interrupted, match=f"after step {stop_at}; saved to .*step-{stop_at}"):
        train_run(settings, directory)


def test_one_is_asked_to_stop_both_do_and_resumed_equals_uninterrupted_bit_for_bit(root: Path, tmp_path: Path) -> None:
    settings = recipe(root)  # with dropout: each process has random numbers of its own
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert launched.run(2, train, settings, whole) == ["", ""]
    assert launched.run(2, stopped, settings, run, 3) == ["", ""]
    assert len(lines(run)) == 3
    assert launched.run(2, train, settings, run, True) == ["", ""]
    assert lines(run) == lines(whole)
    for name in (ADAPTER, f"checkpoints/step-6/{ADAPTER}", *(f"checkpoints/step-6/{kind}" for kind in STATES)):
        first, second = load_file(whole / name), load_file(run / name)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first), name
    random = load_file(whole / "checkpoints/step-6/random.safetensors")
    assert sorted(key for key in random if key.startswith("cpu")) == ["cpu", "cpu.1"]
    assert not torch.equal(random["cpu"], random["cpu.1"])


STATES = ("optimizer.safetensors", "random.safetensors")


def test_a_run_goes_on_with_another_number_of_processes(root: Path, tmp_path: Path) -> None:
    """One process, then two, then one again."""
    settings, run = exact(root), tmp_path / "run"
    train_run(settings, tmp_path / "whole")
    stop_alone(settings, run, 2)
    assert launched.run(2, resumed_and_stopped, settings, run, 4) == ["", ""]
    train_run(settings, run, resume=True)
    assert_close_runs(tmp_path / "whole", run)
    log = (run / "log.txt").read_text()
    assert "same data, different dropout" not in log  # there is none


def stop_alone(settings: Recipe, directory: Path, stop_at: int, resume: bool = False) -> None:
    after_step = loop.after_step

    def ask(model: Any, done: int, hooks: Any, stop: Any, **settings: Any) -> bool:
        stop.requested = done == stop_at
        return bool(after_step(model, done, hooks, stop, **settings))

    loop.after_step = ask
    try:
        with pytest.raises(Interrupted):
            train_run(settings, directory, resume=resume)
    finally:
        loop.after_step = after_step


def resumed_and_stopped(rank: int, settings: Recipe, directory: Path, stop_at: int) -> None:
    stop_alone(settings, directory, stop_at, resume=True)


def broken(rank: int, settings: Recipe, directory: Path) -> None:
    real, calls = passes.batch_loss, {"n": 0}

    def breaking(*args: Any, **settings: Any) -> Any:
        calls["n"] += 1
        if rank == 1 and calls["n"] == 3:
            raise RuntimeError("CUDA error: device-side assert triggered")
        return real(*args, **settings)

    passes.batch_loss = breaking
    with pytest.raises(RunFailure, match=r"step 3: process 1: cannot be computed: CUDA error: device-side.*step-2"):
        train_run(settings, directory)


def test_where_one_cannot_compute_both_stop_with_the_state_and_the_whole_batch(root: Path, tmp_path: Path) -> None:
    settings = recipe(root)
    assert launched.run(2, broken, settings, tmp_path) == ["", ""]
    kept = json.loads((tmp_path / "bad-steps/step-3/batch.json").read_text())
    assert len(kept["examples"]) == 4
    assert launched.run(2, train, settings, tmp_path, True) == ["", ""]
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5, 6]


def out_of_memory(rank: int, settings: Recipe, directory: Path) -> None:
    """The second process has less memory."""
    real = passes.batch_loss

    def hungry(model: Any, input_ids: torch.Tensor, *rest: Any, **settings: Any) -> Any:
        if rank == 1 and input_ids.numel() > 40:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return real(model, input_ids, *rest, **settings)

    passes.batch_loss = hungry
    train_run(settings, directory)


def test_where_one_runs_out_of_memory_both_take_smaller_micro_batches(root: Path, tmp_path: Path) -> None:
    settings = exact(root, train__batch=8)
    assert launched.run(2, train, settings, tmp_path / "whole") == ["", ""]
    assert launched.run(2, out_of_memory, settings, tmp_path / "run") == ["", ""]
    shrunk = [line["out_of_memory"] for line in lines(tmp_path / "run") if "out_of_memory" in line]
    assert shrunk
    assert shrunk[-1]["tokens_after"] < 96
    steps = [line for line in lines(tmp_path / "run") if "loss" in line]
    (tmp_path / "run/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in steps))
    assert_close_runs(tmp_path / "whole", tmp_path / "run")


def full_disk(rank: int, settings: Recipe, directory: Path) -> None:
    def full(*_args: Any, **_rest: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    writer.write_state = full
    expected = (RunFailure, "the disk is full") if rank == 0 else (OtherProcessFailed, "process 1: .*process 0 failed")
    with pytest.raises(expected[0], match=expected[1]):
        train_run(settings, directory)


def test_a_full_disk_stops_all(root: Path, tmp_path: Path) -> None:
    assert launched.run(2, full_disk, recipe(root), tmp_path) == ["", ""]


def user_mistake(rank: int, settings: Recipe, directory: Path) -> None:
    with pytest.raises((UserError, OtherProcessFailed), match="holds a run" if rank == 0 else "process 0 failed"):
        train_run(settings, directory)


def test_a_mistake_that_only_the_first_can_see_stops_all(root: Path, tmp_path: Path) -> None:
    train_run(recipe(root, train__steps=1), tmp_path)
    assert launched.run(2, user_mistake, recipe(root, train__steps=1), tmp_path) == ["", ""]


def sums(rank: int) -> None:
    """Gradients of three shapes in two dtypes, in messages of at most 10 elements."""
    from qdora.train import distributed

    distributed._MESSAGE_ELEMENTS = 10
    numbers = np.random.default_rng(0).normal(size=(2, 40)).astype(np.float32)
    with processes_of_launch() as processes:
        assert (processes.rank, processes.size) == (rank, 2)
        shapes = [(3, 4), (5,), (2, 2), (7,), (1,)]
        parameters = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
        parameters[1] = nn.Parameter(torch.zeros(5, dtype=torch.bfloat16))
        parameters[1].grad_dtype = torch.float32
        for parameter, start in zip(parameters, (0, 12, 17, 21, 28), strict=True):
            part = numbers[rank, start : start + parameter.numel()]
            parameter.grad = torch.from_numpy(part.copy()).view(parameter.shape)
        parameters[4].grad = None
        if rank == 1:
            parameters[3].grad = parameters[1].grad = None
        processes.sum_gradients_(parameters)
        total = numbers.sum(axis=0)
        for index, start in ((0, 0), (2, 17)):
            grad = parameters[index].grad
            assert grad is not None
            np.testing.assert_array_equal(grad.flatten().numpy(), total[start : start + grad.numel()])
        for index, start, stop in ((1, 12, 17), (3, 21, 28)):  # the second process had none
            grad = parameters[index].grad
            assert grad is not None
            assert grad.dtype == torch.float32
            np.testing.assert_array_equal(grad.numpy(), numbers[0, start:stop])
        assert parameters[4].grad is None


def test_gradients_are_summed() -> None:
    assert launched.run(2, sums) == ["", ""]


def told(rank: int) -> None:
    with processes_of_launch() as processes:
        assert processes.gather({"rank": rank, "text": "é" * rank * 100}) == [
            {"rank": 0, "text": ""},
            {"rank": 1, "text": "é" * 100},
        ]
        assert str(processes.gather(float("nan") if rank else 1.0)) == "[1.0, nan]"
        assert processes.gather(rank == 1) == [False, True]
        assert processes.first(lambda: 7) == (7 if rank == 0 else None)
        parameter = nn.Parameter(torch.tensor([0.5 + rank, 1.0]))
        version = parameter._version
        processes.require_equal({"b": torch.ones(3, dtype=torch.bfloat16)})
        with pytest.raises(RunFailure, match=r"process 1 has another a than process 0 \(1 parameters differ\)"):
            processes.require_equal({"b": torch.ones(3), "a": parameter})
        processes.share_first_([parameter])
        assert parameter.tolist() == [0.5, 1.0]
        assert parameter._version > version
        processes.require_equal({"a": parameter})


def test_what_the_processes_tell_each_other() -> None:
    assert launched.run(2, told) == ["", ""]


def test_one_process_tells_nobody() -> None:
    alone = Processes()
    assert alone.gather(3) == [3]
    assert alone.first(lambda: 4) == 4
    assert seed_of(5, rank=0) == 5
    assert len({seed_of(5, 0), seed_of(5, 1), seed_of(6, 1), seed_of(5, 1, step=3), seed_of(5, 2)}) == 5


def test_an_old_torch_cannot_divide_a_base(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "CAN_DIVIDE", False)
    text = r"train.parallel: must be auto or replicate with torch .* \(shard and hybrid need torch 2.12\), got shard"
    with pytest.raises(UserError, match=text):
        distributed.mesh_of(Processes(size=2, shards=True), torch.device("cpu"), "shard")
    assert distributed.mesh_of(Processes(size=2), torch.device("cpu"), "shard") is None


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    said = r"one process for each GPU \(got 4 on 2 GPUs\)\. Fix: start with torchrun --nproc-per-node 2\."
    with pytest.raises(UserError, match=said), processes_of_launch():
        pass


def the_only_gpu(rank: int) -> None:
    taken: list[int] = []
    with fake_gpus(num_gpus=1):
        torch.cuda.set_device = taken.append
        with processes_of_launch() as processes:
            assert processes.gather(taken) == [[0], [0]]


def test_processes_that_see_one_gpu_each_take_it() -> None:
    assert launched.run(2, the_only_gpu, timeout=60) == ["", ""]


def example(index: int, length: int) -> TokenizedExample:
    ids = np.zeros(length, dtype=np.int32)
    return TokenizedExample(id=str(index), task="t", input_ids=ids, loss_mask=np.ones(length, dtype=bool))


@given(lengths=st.lists(st.integers(1, 50), max_size=30), size=st.integers(1, 5))
def test_shares_are_a_fair_partition_in_the_order_of_the_step(lengths: list[int], size: int) -> None:
    examples = [example(index, length) for index, length in enumerate(lengths)]
    shares = [share_of(examples, rank, size) for rank in range(size)]
    numbers = [[int(each.id) for each in share] for share in shares]
    assert sorted(number for share in numbers for number in share) == list(range(len(lengths)))
    assert all(share == sorted(share) for share in numbers)
    tokens = [sum(map(len, share)) for share in shares]
    assert max(tokens) - min(tokens) <= max(lengths, default=0)
    assert shares == [examples] or size > 1


by_each_launcher = pytest.mark.parametrize(
    "launcher",
    [
        ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"],
        ["accelerate.commands.launch", "--cpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no", "-m"],
    ],
    ids=["torchrun", "accelerate"],
)


def trained_by(launcher: list[str], settings: Recipe, directory: Path) -> dict[str, Any]:
    """Run `qdora train` in two processes of one of these launchers; returns what --json writes."""
    file = directory.with_suffix(".yaml")
    file.write_text(resolved_yaml(settings))
    command = [sys.executable, "-m", *launcher, "qdora.cli", "train", str(file), "-d", str(directory), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.slow
@by_each_launcher
def test_launchers_run_the_command_line(root: Path, tmp_path: Path, launcher: list[str]) -> None:
    train_run(exact(root), tmp_path / "one")
    assert trained_by(launcher, exact(root), tmp_path / "two")["num_steps"] == 6
    assert_close_runs(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
def test_ctrl_c_under_torchrun_saves_and_goes_on(root: Path, tmp_path: Path) -> None:
    """The launcher passes the signal on to both processes."""
    file, run = tmp_path / "recipe.yaml", tmp_path / "run"
    file.write_text(resolved_yaml(recipe(root, train__steps=5000, train__checkpoint_every=...)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "qdora.cli"]
    process = subprocess.Popen([*command, "train", str(file), "-d", str(run)], stderr=subprocess.PIPE, text=True)
    metrics, began = run / "metrics.jsonl", time.monotonic()
    while process.poll() is None and not (metrics.exists() and metrics.stat().st_size > 0):
        assert time.monotonic() - began < 200
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=90)
    assert process.returncode != 0
    assert errors.count("Continue with --resume") == 1
    newest = open_run(run).newest_checkpoint()
    assert newest is not None
    assert newest.step == len(lines(run))


DISTURBED = """
import os, signal
from datetime import timedelta
from qdora.cli import main
from qdora.train import distributed, passes

real, calls = passes.batch_loss, []

def disturbed(*args, **options):
    calls.append(1)
    if os.environ["RANK"] == "1" and len(calls) == 3 and not os.path.exists("again"):
        if {how!r} == "fails":
            raise ValueError("a fault of its own")
        os.kill(os.getpid(), signal.SIGSTOP if {how!r} == "hangs" else signal.SIGKILL)
    return real(*args, **options)

passes.batch_loss, distributed._STEP_PATIENCE = disturbed, timedelta(seconds=5)
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "how, told",
    [
        ("fails", "ValueError: a fault of its own"),
        ("killed", "Signal 9 (SIGKILL)"),
        ("hangs", "Ranks 1 failed to pass monitoredBarrier"),
    ],
)
def test_torchrun_ends_all_and_the_run_goes_on(root: Path, tmp_path: Path, how: str, told: str) -> None:
    (tmp_path / "disturbed.py").write_text(DISTURBED.format(how=how))
    settings = exact(root, train__batch=2, train__checkpoint_every=1)
    (tmp_path / "recipe.yaml").write_text(resolved_yaml(settings))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "disturbed.py"]
    options = {"cwd": tmp_path, "env": os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}}
    command = [*launcher, "train", "recipe.yaml", "-d", "run"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, **options)
    assert done.returncode == 1
    assert told in done.stderr
    (tmp_path / "again").touch()
    subprocess.run([*command, "--resume"], check=True, timeout=200, **options)
    assert [line["step"] for line in lines(tmp_path / "run")] == list(range(1, 7))


@pytest.mark.slow
def test_the_slurm_script_of_the_guide_saves_requeues_and_resumes(root: Path, tmp_path: Path) -> None:
    """With programs that stand in for SLURM's, on two CPU processes."""
    guide = (Path(__file__).parent.parent / "qdora/guide/several-gpus.md").read_text()
    script = re.findall(r"```bash\n(#!/bin/bash\n.*?)```", guide, re.DOTALL)[0]
    programs = {
        "srun": 'exec "${@:2}"',  # without --cpus-per-task
        "scontrol": 'if [ $1 = show ]; then echo localhost; else echo "$@" >> requeued; fi',
        "torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"',
    }
    for name, text in programs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "mine.yaml").write_text(resolved_yaml(recipe(root, train__steps=60, train__checkpoint_every=...)))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        (tmp_path / "job.sh").write_text(script.replace("29500", str(free.getsockname()[1])))
    variables = {
        "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(Path(__file__).parent.parent),
        **dict.fromkeys(("SLURM_NNODES", "SLURM_CPUS_PER_TASK"), "1"),
        "SLURM_GPUS_ON_NODE": "2",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "here",
    }
    run, began = tmp_path / "runs/mine", time.monotonic()
    job = subprocess.Popen(["bash", "job.sh"], cwd=tmp_path, env=os.environ | variables)
    while not (run / "metrics.jsonl").exists():
        assert job.poll() is None
        assert time.monotonic() - began < 200
        time.sleep(0.1)
    job.send_signal(signal.SIGUSR1)
    job.wait(90)
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"
    newest = open_run(run).newest_checkpoint()
    assert newest is not None
    assert 0 < newest.step < 60
    subprocess.run(["bash", "job.sh"], cwd=tmp_path, env=os.environ | variables, check=True, timeout=280)
    assert f"Continuing from {newest.path.relative_to(tmp_path)}" in (run / "log.txt").read_text()
    assert [line["step"] for line in lines(run)] == list(range(1, 61))
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"


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


def network_without_a_way(rank: int) -> None:
    def fails(_tensor: torch.Tensor, group: Any) -> None:
        raise dist.DistBackendError("NCCL error in: a.cpp:1, remote error\nLast error:\nsocketStartConnect: refused")

    def start() -> None:
        with processes_of_launch():
            raise AssertionError("the run must not begin")

    dist.all_reduce = fails
    with fake_gpus(), pytest.raises(RunFailure, match=r"process .: .* NCCL error in: a.cpp:1, remote error"):
        start()


def test_gpus_that_cannot_reach_each_other_are_told_at_the_start() -> None:
    assert launched.run(2, network_without_a_way, timeout=60) == ["", ""]


def recorded(rank: int, folder: Path) -> None:
    """As torchrun, which names a file for the reason of each process."""

    def run() -> None:
        with processes_of_launch() as processes:
            if rank == 1:
                raise RunFailure("no room")
            processes.gather(rank)

    os.environ["TORCHELASTIC_ERROR_FILE"] = str(folder / f"{rank}.json")
    with pytest.raises(RunFailure):
        run()


def test_the_launcher_gets_the_reason_of_each_process(tmp_path: Path) -> None:
    assert launched.run(2, recorded, tmp_path, timeout=60) == ["", ""]
    told = [json.loads((tmp_path / f"{rank}.json").read_text())["message"] for rank in range(2)]
    assert told[1]["message"] == "RunFailure: no room"
    assert "exchange with the other processes failed" in told[0]["message"]
    assert int(told[1]["extraInfo"]["timestamp"]) <= int(told[0]["extraInfo"]["timestamp"])


def hanging(rank: int, settings: Recipe, directory: Path) -> None:
    """The second process stands still for longer than the others wait for its pass."""
    real, calls = passes.batch_loss, {"n": 0}

    def acting(*args: Any, **options: Any) -> Any:
        calls["n"] += 1
        if rank == 1 and calls["n"] == 3:
            time.sleep(10)
        return real(*args, **options)

    passes.batch_loss = acting
    distributed._STEP_PATIENCE = timedelta(seconds=3)
    named = "process 1: the exchange" if rank else "process 0: .*Ranks 1 failed to pass monitoredBarrier"
    with pytest.raises(OtherProcessFailed, match=named):
        train_run(settings, directory)


def test_a_process_that_hangs_is_named_and_the_run_goes_on_from_its_checkpoint(root: Path, tmp_path: Path) -> None:
    settings = exact(root, train__batch=2, train__checkpoint_every=1)
    assert launched.run(2, hanging, settings, tmp_path, timeout=60) == ["", ""]
    assert launched.run(2, train, settings, tmp_path, True) == ["", ""]
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5, 6]


def works_for_long(rank: int) -> None:
    """The first process works for longer than a message may take."""
    with processes_of_launch() as processes:
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=1))
        assert processes.first(lambda: time.sleep(3) or 7) == (7 if rank == 0 else None)
        assert processes.gather(rank) == [0, 1]


@pytest.mark.slow
def test_the_others_wait_for_the_work_of_the_first_process() -> None:
    assert launched.run(2, works_for_long, timeout=60) == [""] * 2


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


def test_when_all_fail_the_first_process_reports_before_the_launcher_ends_it(root: Path, tmp_path: Path) -> None:
    settings = exact(root)
    assert launched.run(2, ended_by_the_launcher, settings, tmp_path / "run", timeout=100) == [""] * 2
    assert "FAILURE" in (tmp_path / "run/log.txt").read_text()
    assert (tmp_path / "run/report.html").exists()


def unequal_machines(rank: int) -> None:
    """A machine of two processes, and one of one."""
    os.environ["LOCAL_WORLD_SIZE"] = "2" if rank < 2 else "1"
    text = r"must be shard or replicate unless each machine has equally many processes, got hybrid with 1 and 2 of them"
    with processes_of_launch() as processes, pytest.raises(UserError, match=text):
        distributed.mesh_of(processes.dividing(base=True), torch.device("cpu"), "hybrid")


@tiny_sharded.needs_division
def test_machines_of_unequal_size_cannot_repeat_the_base() -> None:
    assert launched.run(3, unequal_machines) == [""] * 3


@tiny_sharded.needs_division
def test_gpus_gather_a_divided_base_by_nccl() -> None:
    assert launched.run(4, mesh_on_gpus) == [""] * 4
