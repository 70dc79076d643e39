"""A process that hangs, fails or is killed is named by the others, which end."""

from __future__ import annotations

import logging
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from qdora.errors import RunFailure, UserError
from qdora.files.run_directory import open_run
from qdora.recipe.recipe_file import resolved_yaml
from qdora.train import passes, process_watch
from qdora.train.distributed import OtherProcessFailed, Processes, processes_of_launch
from qdora.train.process_watch import PATIENCE, ProcessWatch, patience_seconds
from tests import launched, tiny_sharded
from tests.test_train_distributed import exact

PATIENCE_SECONDS = 4.0


def stop() -> None:
    """Not even a thread of the process goes on."""
    os.kill(os.getpid(), signal.SIGSTOP)


def spin() -> None:
    """Threads go on."""
    while True:
        pass


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail() -> None:
    raise ValueError("a fault of its own")


class Launch:
    """Two `qdora train` under torchrun's variables; process `rank` calls `action` in step 3.

    Without torchrun process 0 holds the store of the launch.
    """

    def __init__(self, root: Path, place: Path, rank: int, action: Callable[[], None], **changes: Any) -> None:
        self.place, self.run = place, place / "run"
        settings = exact(root, train__batch=2, train__micro_batch_tokens=96, train__checkpoint_every=1, **changes)
        (place / "recipe.yaml").write_text(resolved_yaml(settings))
        real, calls = passes.batch_loss, {"n": 0}

        def acting(*args: Any, **options: Any) -> Any:
            calls["n"] += 1
            if os.environ["RANK"] == str(rank) and calls["n"] == 3:
                action()
            return real(*args, **options)

        self.processes: list[ForkProcess] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(passes, "batch_loss", acting)
            patch.setattr(process_watch, "_GRACE_SECONDS", 2.0)
            names = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1"}
            names["MASTER_PORT"] = launched.free_port()
            for name, value in {PATIENCE: PATIENCE_SECONDS, **names}.items():
                patch.setenv(name, str(value))
            for each in range(2):
                patch.setenv("RANK", str(each))
                patch.setenv("LOCAL_RANK", str(each))
                (place / str(each)).mkdir()
                command = ("train", str(place / "recipe.yaml"), "-d", str(self.run))
                self.processes.append(launched.start_command(*command, output=place / str(each)))

    def end(self, rank: int) -> tuple[int | None, str]:
        """The exit code of a process, and what it printed last; "" if nothing."""
        self.processes[rank].join(60)
        lines = (self.place / str(rank) / "stderr").read_text().splitlines()
        return self.processes[rank].exitcode, "".join(lines[-1:])

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


@pytest.fixture
def launch(root: Path, tmp_path: Path) -> Iterator[Callable[..., Launch]]:
    made: list[Launch] = []

    def start(rank: int, action: Callable[[], None], **changes: Any) -> Launch:
        made.append(Launch(root, tmp_path, rank, action, **changes))
        return made[-1]

    yield start
    for each in made:
        each.close()


SHARES = [
    pytest.param("replicate", marks=pytest.mark.slow),
    pytest.param("shard", marks=tiny_sharded.needs_division),
]
HANGS = [
    pytest.param(1, stop, "replicate", marks=pytest.mark.slow),
    pytest.param(0, stop, "replicate", marks=pytest.mark.slow),
    pytest.param(0, spin, "replicate", marks=pytest.mark.slow),
    pytest.param(1, stop, "shard", marks=[pytest.mark.slow, tiny_sharded.needs_division]),
    pytest.param(1, spin, "shard", marks=[tiny_sharded.needs_division, pytest.mark.slow]),
    pytest.param(0, stop, "shard", marks=[pytest.mark.slow, tiny_sharded.needs_division]),
]


@pytest.mark.parametrize("rank, how, parallel", HANGS)
def test_a_process_that_hangs_is_named(
    launch: Callable[..., Launch], rank: int, how: Callable[[], None], parallel: str
) -> None:
    began = time.monotonic()
    found = launch(rank, how, train__parallel=parallel)
    code, line = found.end(1 - rank)
    print(f"{time.monotonic() - began:.1f} s: {line}")
    assert code == 1
    who = rf"process {rank} \(on \S+\)" if rank == 1 or how is spin else r"process 0 or the launcher \(torchrun\)"
    named = rf"process {1 - rank}: stopped, because {who} has not moved for 4 s\."
    assert re.match(named, line), line
    newest = open_run(found.run).newest_checkpoint()
    assert newest is not None
    assert line.endswith(f"Safe on disk: {newest.path}.")
    if how is spin:
        code, line = found.end(rank)
        assert code == 1
        assert re.match(
            rf"process {rank} has not moved for 4 s, so the others have ended\. It is at \S+:\d+ \(spin\)", line
        )
    if rank == 1:  # process 0 writes log.txt
        assert "process 1 (on" in (found.run / "log.txt").read_text()


@pytest.mark.parametrize("parallel", SHARES)
def test_a_process_that_fails_is_named_with_its_reason(launch: Callable[..., Launch], parallel: str) -> None:
    found = launch(1, fail, train__parallel=parallel)
    assert found.end(1)[0] == 1
    code, line = found.end(0)
    assert code == 1
    assert re.match(r"process 0: stopped, because process 1 \(on \S+\) failed: a fault of its own\. Fix: resume", line)


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_process_that_is_killed_is_named(launch: Callable[..., Launch], rank: int) -> None:
    found = launch(rank, die)
    assert found.end(rank)[0] == -signal.SIGKILL
    code, line = found.end(1 - rank)
    assert code == 1
    who = r"process 1 \(on \S+\)" if rank == 1 else r"process 0 or the launcher \(torchrun\)"
    assert re.match(rf"process {1 - rank}: stopped, because {who} has ended without a message\.", line)


def stands_in_a_kernel(rank: int, size: int) -> None:
    """As for NCCL: no connection breaks where another process is killed, and the main thread waits on."""
    logging.basicConfig(format="%(message)s", force=True)
    with processes_of_launch() as processes:
        processes.gather(None)
        if rank == size - 1:
            die()
        process_watch._GRACE_SECONDS = 4.0
        time.sleep(600)


@pytest.mark.slow
def test_a_process_that_is_killed_is_named_although_the_others_wait_for_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By default patience, before the launcher kills those that wait."""
    began, port = time.monotonic(), launched.free_port()
    names = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = []
    for rank in range(2):
        for name, value in {**names, "RANK": rank, "LOCAL_RANK": rank}.items():
            monkeypatch.setenv(name, str(value))
        (tmp_path / str(rank)).mkdir()
        act = partial(stands_in_a_kernel, rank, 2)
        processes.append(launched.start_main(act, "qdora", output=tmp_path / str(rank)))
    ends = []
    try:
        for process in processes:
            process.join(40)
            ends.append(process.exitcode)
    finally:
        for process in processes:
            process.kill()
            process.join()
    seconds = time.monotonic() - began
    assert ends == [1, -signal.SIGKILL], f"after {seconds:.0f} s"
    line = (tmp_path / "0/stderr").read_text()
    assert re.match(r"process 0: stopped, because process 1 \(on \S+\) has ended without a message\. Fix: ", line), line


@pytest.fixture
def watches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[ProcessWatch]]:
    """Those of two processes, here in one: their threads live on, as those of a process that spins."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setattr(process_watch, "_GRACE_SECONDS", 600.0)  # else the test would end
    for name, value in {PATIENCE: "1.5", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}.items():
        monkeypatch.setenv(name, value)
    made = [ProcessWatch(rank, 2) for rank in range(2)]
    yield made
    for watch in made:
        watch.close()


def knows(watches: list[ProcessWatch], seconds: float) -> bool:
    """Whether all of them find a process that hangs or has ended within these seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if all(watch.knows for watch in watches):
            return True
        time.sleep(0.02)
    return False


def test_long_work_outside_of_training_is_not_silence(watches: list[ProcessWatch]) -> None:
    """Process 0 tokenises while the other one waits in the next message."""
    watches[1].arrived()
    assert not knows(watches[:1], 2.0)
    assert not watches[1].knows


def test_who_is_behind_is_silent_unless_it_moves(watches: list[ProcessWatch]) -> None:
    """Process 0 evaluates for longer than the patience, then hangs."""
    unit = nn.Identity()
    with watches[0].counting([unit], together=False), watches[1].counting([], together=False):
        watches[1].arrived()
        for _ in range(25):
            unit(torch.ones(1))
            time.sleep(0.1)
        assert not any(watch.knows for watch in watches)
        assert knows(watches, 20.0)
    told = watches[1].lost()
    stopped = r"process 1: stopped, because process 0 \(on \S+\) has not moved for 1.5 s\. "
    assert re.match(stopped + "Fix: run it again; it begins at its first step, since no checkpoint is saved", told)
    watches[1].newest = lambda: Path("step-8")
    assert re.match(stopped + "Fix: resume from the last checkpoint", watches[1].lost())
    assert watches[0].lost().startswith("process 0 has not moved for 1.5 s, so the others have ended. It is at ")
    assert watches[0].has_silence


@pytest.mark.parametrize("together", [pytest.param(False, marks=pytest.mark.slow), True])
def test_who_works_for_all_moves_unless_it_makes_no_pass(
    watches: list[ProcessWatch], monkeypatch: pytest.MonkeyPatch, together: bool
) -> None:
    """Process 0 writes a checkpoint for more than twice the patience; then it hangs in a pass."""
    monkeypatch.setattr(Processes, "gather", lambda self, value: [value, value])
    first = Processes(0, 2, watch=watches[0])
    with watches[0].counting([], together=together), watches[1].counting([], together=together):
        watches[1].arrived()
        assert first.first(lambda: knows(watches, 5.0)) is False
        assert first.first_or_all(lambda: knows(watches, 20.0))
    assert "because process 0 (on" in watches[1].lost()


def test_a_checkpoint_is_named_only_where_one_is_saved(
    watches: list[ProcessWatch], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a divided base cannot compute a pass, and where the processes have drifted apart."""
    processes = Processes(0, 2, shards=True, watch=watches[0])
    monkeypatch.setattr(Processes, "gather", lambda self, value: [value, [0]])

    def told() -> list[str]:
        with pytest.raises(RunFailure) as drifted:
            processes.require_equal({"a": torch.ones(1)})
        return [str(processes.broken(RuntimeError("bad kernel"))), str(drifted.value)]

    again = " run it again; it begins at its first step, since no checkpoint is saved."
    assert [text.endswith(again) for text in told()] == [True, True]
    watches[0].newest = lambda: Path("step-8")
    assert [text.endswith(" resume from the last checkpoint with --resume.") for text in told()] == [True, True]


@pytest.mark.parametrize("together", [False, True])
def test_in_passes_that_all_make_who_is_behind_is_silent(watches: list[ProcessWatch], together: bool) -> None:
    """Process 1 is in its third pass, where all make the same ones or each its own."""
    unit = nn.Identity()
    with watches[0].counting([], together=together), watches[1].counting([unit], together=together):
        for _ in range(3):
            unit(torch.ones(1))
        assert knows(watches, 20.0 if together else 2.0) == together
    if together:
        assert "process 0 (on" in watches[1].lost()


def test_where_nobody_is_behind_all_end(watches: list[ProcessWatch]) -> None:
    with watches[0].counting([], together=True), watches[1].counting([], together=True):
        assert knows(watches, 20.0)
    told = watches[0].lost()
    assert told.startswith("process 0: all processes have hung: none has moved for ")
    assert re.search(rf"{re.escape(__file__)}:\d+ \(knows\)", told), told  # where it was then, not where it tells this


def test_who_stood_still_itself_waits_before_it_names_another(
    watches: list[ProcessWatch], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A launch is suspended for 100 s; process 0 is the first to go on."""
    assert not knows(watches, 0.5)
    watches[1].close()
    real = time.monotonic
    monkeypatch.setattr(process_watch.time, "monotonic", lambda: real() + 100.0)
    assert not knows(watches[:1], 0.7)
    assert knows(watches[:1], 20.0)


def test_after_a_lost_connection_who_no_longer_answers_has_ended(watches: list[ProcessWatch]) -> None:
    watches[1].close()
    assert "because process 1 (on" in (told := watches[0].lost())
    assert "has ended without a message. Fix: " in told
    assert not watches[0].has_silence


def test_a_launcher_cannot_end_a_process_that_tells_its_reason(watches: list[ProcessWatch]) -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _frame: heard.append(number))
    try:
        watches[0].failed(ValueError("a reason"))
        watches[0]._beat = 0.5
        ends = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM))
        ends.start()
        watches[0].linger()
        ends.join()
        assert heard == []
        os.kill(os.getpid(), signal.SIGTERM)
        assert heard == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)
    assert "because process 0 (on" in (told := watches[1].lost())
    assert "failed: a reason. Fix: " in told


def test_who_is_late_is_not_named_while_its_process_lives(watches: list[ProcessWatch]) -> None:
    """A library's call holds back its threads for many beats."""
    watches[1].close()
    assert not knows(watches[:1], 1.0)


def test_who_has_ended_well_is_not_missed(watches: list[ProcessWatch], monkeypatch: pytest.MonkeyPatch) -> None:
    """The first process may still write the page of the run."""
    monkeypatch.setattr(process_watch, "has_ended", lambda _process: True)
    watches[1].close(well=True)
    assert not knows(watches[:1], 1.0)
    assert not watches[0].knows


def test_who_ends_by_an_error_of_its_own_does_not_tell_that_of_another(
    watches: list[ProcessWatch], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where all fail alike, the first process is longer about its figures and its page."""
    monkeypatch.setattr(process_watch, "_TELLING_SECONDS", 0.1)
    watches[0].ends_itself = True
    watches[1].failed(ValueError("the same fault"))
    assert knows(watches[:1], 20.0)
    time.sleep(0.5)
    assert not [each for each in caplog.messages if each.startswith("process 0")]


def test_what_is_known_is_told_long_before_the_process_is_ended(
    watches: list[ProcessWatch], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(process_watch, "_TELLING_SECONDS", 0.3)
    watches[0].newest = lambda: Path("step-8")
    watches[1].failed(ValueError("a fault of its own"))
    end = time.monotonic() + 20
    while not (told := "".join(each for each in caplog.messages if each.startswith("process 0"))):
        assert time.monotonic() < end
        time.sleep(0.02)
    assert "because process 1 (on" in told
    assert told.endswith(
        "failed: a fault of its own. Fix: resume from the last checkpoint with --resume. Safe on disk: step-8."
    )


def test_after_a_lost_connection_nobody_is_named_if_all_answer(watches: list[ProcessWatch]) -> None:
    assert "the connection to the other processes of this run is lost" in watches[0].lost()


NCCL = (
    "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:94, unhandled system error (run with "
    "NCCL_DEBUG=INFO for details), NCCL version 2.27.5\nncclSystemError: System call (e.g. socket, malloc) or external "
    "library call failed or device error. \nLast error:\n"
)


def fails_in_nccl(first: Processes, last_error: str) -> RunFailure:
    with pytest.raises(RunFailure) as found, first._connected():
        raise dist.DistBackendError(NCCL + last_error + "\n")
    in_a_pass = first.broken(dist.DistBackendError(NCCL + last_error))
    assert (type(in_a_pass), str(in_a_pass)) == (found.type, str(found.value))
    return found.value


SHORT = "Error while creating shared memory segment /dev/shm/nccl-x (size 9637888)"


def test_an_error_of_nccl_is_told(watches: list[ProcessWatch]) -> None:
    first = Processes(0, 2, shards=True, watch=watches[0])
    full = str(fails_in_nccl(first, "Cuda failure 2 'out of memory'"))
    assert "Cuda failure 2 'out of memory'. Fix: make room on the GPU, then run it again" in full
    told = str(fails_in_nccl(first, SHORT))
    assert re.match(r"process 0: the GPUs cannot exchange data: NCCL error in: .* unhandled system error", told)
    assert f" {SHORT}. Fix: mend the cause (NCCL_DEBUG=INFO tells more; " in told
    assert "NCCL_SOCKET_IFNAME" in told


def test_an_error_of_nccl_is_not_told_where_another_process_is_its_cause(watches: list[ProcessWatch]) -> None:
    watches[1].failed(ValueError("a fault of its own"))
    ended = fails_in_nccl(Processes(0, 2, shards=True, watch=watches[0]), SHORT)
    assert isinstance(ended, OtherProcessFailed)
    assert "because process 1 (on" in str(ended)


@pytest.mark.parametrize("given", ["0", "five", "nan", "inf", "-1"])
def test_a_wrong_patience_is_refused(monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.setenv(PATIENCE, given)
    with pytest.raises(UserError, match=rf"QDORA_PATIENCE: must be a number of seconds above 0, got '{given}'\."):
        patience_seconds()
    monkeypatch.setenv(PATIENCE, "12.5")
    assert patience_seconds() == 12.5
