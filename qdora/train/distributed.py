"""Data-parallel training: each process holds the frozen base, or its part of it (memory/shard.py), and trains on
a share of every step's examples.

In each step the processes exchange the sum of the adapters' gradients, in one all-reduce after the last micro-batch,
and short messages on the host. DistributedDataParallel would reduce in every micro-batch. `require_equal` checks before
every checkpoint that their parameters are equal. If a process fails, torchrun ends the others.
"""

from __future__ import annotations

import hashlib
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _take_tensors, _unflatten_dense_tensors
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from qdora.errors import Interrupted, RunFailure, UserError, first_line
from qdora.files.console import END_SIGNALS, SAME_REQUEST_SECONDS, leave_closed_terminal
from qdora.files.machine import available_memory_bytes
from qdora.memory.oom import is_out_of_memory

T = TypeVar("T")

_MESSAGE_BYTES = 1 << 26  # of gradients in one message
# Before, torch's `fully_shard` asks for gradients of all that it divides, which packed weights cannot have.
CAN_DIVIDE = torch.__version__ >= "2.12.dev0"  # compared as versions; pre-releases divide, too
# How long the others wait before a checkpoint; torch's own timeout (30 minutes) does not say who is missing.
_PATIENCE = timedelta(minutes=20)
_WORK_PATIENCE = timedelta(days=1)  # while the first process prunes a base, measures or writes
_STOPPING = (
    b"\nStopping: the step is finished and saved first. A second signal stops at once, without saving.\n"
)


@dataclass(frozen=True)
class Processes:
    """The processes that train one run together. All must call every method, in the same order."""

    rank: int = 0
    size: int = 1
    gpus: dist.ProcessGroup | None = None
    """Carries tensors of GPUs; None if the default group, which carries messages on the host, does."""
    working: dist.ProcessGroup | None = None
    """Carries messages on the host that wait for the work of the first process."""
    shards: bool = False
    """Whether the processes divide the base, so that each forward pass needs all of them."""

    @property
    def num_here(self) -> int:
        """Processes of the run on this machine."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", self.size)) if self.size > 1 else 1

    def dividing(self, base: bool) -> Processes:
        """The same processes, which divide the base if `base` and they are several."""
        return replace(self, shards=base and self.size > 1)

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def gather(self, value: Any, *, group: dist.ProcessGroup | None = None) -> list[Any]:
        """The values of all processes, in the order of ranks."""
        values: list[Any] = [value] * self.size
        if self.size > 1:
            with self._connected():
                dist.all_gather_object(values, value, group=group)
        return values

    def first(self, action: Callable[[], T]) -> T | None:
        """Run the action in the first process while the others wait; returns its result there, None elsewhere."""
        result = action() if self.is_first else None
        self.gather(None, group=self.working)
        return result

    def from_first(self, action: Callable[[], T]) -> T:
        """Run the action in the first process, like `first`; all get its result."""
        result: T = self.gather(action() if self.is_first else None, group=self.working)[0]
        return result

    def join_gpus_(self, groups: Sequence[dist.ProcessGroup]) -> None:
        """Let NCCL connect the groups and take its buffers now, before free memory is measured."""
        with self._connected():
            for group in groups:
                for num_bytes in (4, _MESSAGE_BYTES):
                    dist.all_reduce(torch.zeros(num_bytes // 4, device="cuda"), group=group)
            torch.cuda.synchronize()
        torch.cuda.empty_cache()

    @torch.no_grad()
    def sum_gradients_(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace every gradient by its sum over the processes, equal bit for bit in all of them."""
        if self.size == 1:
            return
        reached = self.gather([parameter.grad is not None for parameter in parameters])
        for parameter, *flags in zip(parameters, *reached, strict=True):
            if parameter.grad is None and any(flags):
                parameter.grad = torch.zeros_like(parameter, dtype=parameter.grad_dtype or parameter.dtype)
        present = [parameter.grad for parameter in parameters if parameter.grad is not None]
        for gradients in _take_tensors(present, _MESSAGE_BYTES):  # type: ignore[no-untyped-call]
            flat = _flatten_dense_tensors(gradients)  # type: ignore[no-untyped-call]
            with self._connected():
                dist.all_reduce(flat, group=self.gpus)
            parts = _unflatten_dense_tensors(flat, gradients)  # type: ignore[no-untyped-call]
            torch._foreach_copy_(gradients, parts)

    @torch.no_grad()
    def share_first_(self, parameters: Sequence[nn.Parameter]) -> None:
        """Copy the first process's parameters to all: on two devices, the norms at the start may differ by rounding."""
        if self.size > 1:
            self.gather(None)  # all have loaded the model
            for parameter in parameters:
                value = parameter.detach().clone()
                with self._connected():
                    dist.broadcast(value, 0, group=self.gpus)
                parameter.copy_(value)  # raises the version, so that a cached norm is computed again

    @contextmanager
    def _connected(self) -> Iterator[None]:
        """Turn what gloo and NCCL raise, after another process has ended or after a timeout, into one line."""
        try:
            yield
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            reason = first_line(error).split(". ")[0]
            raise RunFailure(
                f"process {self.rank}: the exchange with the other processes failed: {reason}."
            ) from error

    def require_equal(self, parameters: Mapping[str, Tensor]) -> None:
        """Wait for all processes, and raise RunFailure in all of them if one holds other values, by a sum over the bits
        of each tensor. After minutes the run ends, and the first process names those that are missing."""
        if self.size == 1:
            return
        with self._connected():
            dist.monitored_barrier(timeout=_PATIENCE, wait_all_ranks=True)
        views = (parameter.detach().contiguous().view(torch.int16) for parameter in parameters.values())
        sums = self.gather([int(view.sum(dtype=torch.int64)) for view in views])
        for rank, theirs in enumerate(sums):
            if theirs != sums[0]:
                text = (
                    f"process {rank} has other parameters than process 0. Fix: resume from the last checkpoint"
                )
                raise RunFailure(f"{text} with --resume.")


@contextmanager
def processes_of_launch() -> Iterator[Processes]:
    """Connect the processes of torchrun or `accelerate launch`: tensors of GPUs by NCCL, all else by gloo."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Processes()
        return
    on_gpus = torch.cuda.is_available()
    if on_gpus:  # a job may show each process its own GPU alone
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) if torch.cuda.device_count() > 1 else 0)
    dist.init_process_group("gloo")
    try:
        gpus = dist.new_group(backend="nccl") if on_gpus else None
        working = dist.new_group(backend="gloo", timeout=_WORK_PATIENCE)
        processes = Processes(dist.get_rank(), size, gpus, working)
        if gpus is not None:
            processes.join_gpus_([gpus])
        yield processes
    except Interrupted:
        raise
    except Exception as error:
        # torchrun prints the first one: the others lose a connection
        get_error_handler().record_exception(error)
        raise
    # Not after an error: NCCL would wait for the others.
    dist.destroy_process_group()


def mesh_of(processes: Processes, device: torch.device, parallel: str) -> DeviceMesh | None:
    """The processes as `memory.shard.ShardedBase` takes them; None if each holds the whole base.

    With `parallel` hybrid the processes of a machine divide the base, and machines repeat it.
    """
    if not processes.shards:
        return None
    if not CAN_DIVIDE:
        raise UserError(f"train.parallel: {parallel} needs torch 2.12, this is {torch.__version__}.")
    hybrid = parallel == "hybrid"
    if hybrid and len(set(processes.gather(processes.num_here))) > 1:
        raise UserError(
            "train.parallel: must be shard or replicate unless each machine has equally many processes."
        )
    shape = (processes.size // processes.num_here, processes.num_here) if hybrid else (processes.size,)
    names = ("replicate", "shard") if hybrid else None
    if processes.gpus is None:
        return init_device_mesh(device.type, shape, mesh_dim_names=names)
    # For GPUs, too, init_device_mesh makes groups of the default group's backend, which is gloo.
    if not hybrid:
        return DeviceMesh.from_group(processes.gpus, device.type)
    ranks = torch.arange(processes.size).view(shape)
    groups = [
        dist.new_subgroups_by_enumeration(rows.tolist(), backend="nccl")[0]  # type: ignore[no-untyped-call]
        for rows in (ranks.T, ranks)
    ]
    processes.join_gpus_(groups)
    return DeviceMesh.from_group(groups, device.type, ranks, mesh_dim_names=names)


def free_host_bytes() -> int:
    """This process's share of the free host memory. All call this together: none takes memory before all measured."""
    processes = Processes(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else Processes()
    return int(min(processes.gather(available_memory_bytes()))) // processes.num_here


def seed_of(seed: int, rank: int, step: int = 0) -> int:
    """The seed of a process's own random numbers (its dropout): `seed` for the first process at step 0."""
    if rank == 0 and step == 0:
        return seed
    return int.from_bytes(hashlib.sha256(f"{seed} {rank} {step}".encode()).digest()[:7])


class StopRequest:
    """Whether one of the processes has been asked to stop."""

    def __init__(self, processes: Processes = Processes()) -> None:
        self.requested = False
        self._processes = processes

    def agreed(self) -> bool:
        """Whether one of the processes has been asked; must be called by all, and all get the same answer."""
        return any(self._processes.gather(self.requested))


@contextmanager
def stop_on_signal(processes: Processes = Processes()) -> Iterator[StopRequest]:
    """SIGINT, SIGTERM and SIGHUP set the request; another signal, a second or more later, raises KeyboardInterrupt.

    A signal that is ignored stays so (SIGHUP under nohup), but not under torchrun, which kills after 30 s.
    """
    request = StopRequest(processes)
    asked_at = 0.0

    def ask(number: int, _frame: FrameType | None) -> None:
        nonlocal asked_at
        leave_closed_terminal(number)
        if not request.requested:
            request.requested, asked_at = True, time.monotonic()
            with suppress(OSError):
                os.write(2, _STOPPING)  # no logger: the signal may have come while one holds its lock
        elif time.monotonic() - asked_at >= SAME_REQUEST_SECONDS:
            raise KeyboardInterrupt

    every = dist.is_torchelastic_launched()
    numbers = [number for number in END_SIGNALS if every or signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, ask) for number in numbers}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
