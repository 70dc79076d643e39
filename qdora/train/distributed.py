"""Data-parallel training: each process holds the frozen base, or its part of it (memory/sharded_base.py), and trains on
a share of every step's examples.

In each step the processes exchange the sum of the adapters' gradients, in one all-reduce after the last micro-batch,
and one line of JSON. DistributedDataParallel would reduce in every micro-batch and keep buffers for the whole run, to
hide milliseconds (20 M float32 gradients). All processes start from the same parameters, compute the same sums and take
the same step; `require_equal` checks before every checkpoint that their parameters are equal.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import pairwise
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from qdora.errors import FAILURE, Interrupted, RunFailure, UserError, exit_code, first_line
from qdora.files.environment import available_memory_bytes
from qdora.memory.failed_allocation import is_out_of_memory
from qdora.model.load import block_list
from qdora.train.out_of_memory import OutOfMemory
from qdora.train.process_watch import ProcessWatch, patience_seconds

T = TypeVar("T")

# Gradient elements in one message: 64 MiB of float32.
_MESSAGE_ELEMENTS = 1 << 24
# Before, torch's `fully_shard` asks for gradients of all that it divides, which packed weights cannot have.
CAN_DIVIDE = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 12)
# The others wait for a message on the host while the first process measures or writes. A process that dies is noticed
# at once, by the launcher and by the broken connection, and one that hangs by the watch (process_watch.py), not by this
# timeout.
_PATIENCE = timedelta(days=1)
# Before they are connected no watch says which one does not come. Slow imports take less.
_CONNECTING = timedelta(minutes=10)
# GPUs meet right after a message of all processes on the host, so that none waits for another's work there.
_GPU_PATIENCE = timedelta(minutes=15)
# How often a process that waits for a message asks whether another one hangs.
_LOOK = timedelta(seconds=0.5)
# In the messages of gloo and NCCL when a process of the group has ended.
_CONNECTION_WORDS = ("onnection", "NCCL", "gloo")


class OtherProcessFailed(RunFailure):
    """Another process failed, in an action that all wait for, or has ended. It reports the cause."""


@dataclass(frozen=True)
class Processes:
    """The processes that train one run together: this one is number `rank` of `size`, by default the only one.

    Every method must be called by all processes, in the same order.
    """

    rank: int = 0
    size: int = 1
    gpus: dist.ProcessGroup | None = None
    """Carries tensors of GPUs; None if the default group, which carries messages on the host, does."""
    shards: bool = False
    """Whether the processes divide the base, so that each forward pass needs all of them."""
    watch: ProcessWatch | None = None
    """Names the process that hangs or has ended; None for a single process."""

    @property
    def num_here(self) -> int:
        """Processes of the run on this machine."""
        return _num_here(self.size) if self.size > 1 else 1

    def dividing(self, base: bool) -> Processes:
        """The same processes, which divide the base if `base` and they are several."""
        return replace(self, shards=base and self.size > 1)

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, in the order of ranks; JSON types, and NaN and infinities."""
        if self.size == 1:
            return [value]
        message = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = [torch.zeros((), dtype=torch.int64) for _ in range(self.size)]
        with self._connected():
            self._meet(dist.all_gather(lengths, torch.tensor(len(message)), async_op=True))
            longest = max(int(length) for length in lengths)
            padded = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.size)]
            dist.all_gather(padded, torch.nn.functional.pad(message, (0, longest - len(message))))
        pairs = zip(padded, lengths, strict=True)
        return [json.loads(part[: int(length)].numpy().tobytes()) for part, length in pairs]

    def first(self, action: Callable[[], T], *, calls_model: bool = False) -> T | None:
        """Run the action in the first process while the others wait; returns its result there, None elsewhere.

        If it raises there, the others raise OtherProcessFailed. It may take as long as it needs, unless it calls the
        model: then its passes show that it does not hang.
        """
        if self.size == 1:
            return action()
        result = None
        try:
            if self.is_first:
                with nullcontext() if self.watch is None or calls_model else self.watch.without_passes():
                    result = action()
        except BaseException as error:
            self.exchange(None, first_line(error))
            raise
        self.exchange(None)
        return result

    def first_or_all(self, action: Callable[[], T]) -> T | None:
        """Run an action that calls the model: in the first process, like `first`; in all if they divide the base.

        Then each process gets its result, and one that fails ends: the others cannot go on without it.
        """
        if not self.shards:
            return self.first(action, calls_model=True)
        try:
            return action()
        except RuntimeError as error:
            raise self.broken(error) from error

    def exchange(self, value: Any, fault: str = "") -> list[Any]:
        """`gather`, with the fault of this process or ''.

        Raises OtherProcessFailed if another process has a fault and this one has none.
        """
        found = self.gather([fault, value])
        for rank, (text, _) in enumerate(found):
            if text and not fault:
                raise OtherProcessFailed(f"process {self.rank}: stopped, because process {rank} failed: {text}")
        return [each for _, each in found]

    def broken(self, error: Exception) -> RunFailure:
        """The failure of this process where the base is divided, from an error in a pass through the model.

        The others wait for a part of the base, so they cannot be told; they notice that this process has ended.
        """
        if isinstance(error, RunFailure):
            return error
        if isinstance(error, OutOfMemory):
            return RunFailure(f"process {self.rank}: {error.args[0].fault()}")
        reason = first_line(error)
        if isinstance(error, dist.DistBackendError) or (
            not is_out_of_memory(error) and any(word in reason for word in _CONNECTION_WORDS)
        ):
            return self._lost(error)
        return RunFailure(
            f"process {self.rank}: a pass through the model cannot be computed: {reason} All processes end, since they "
            f"divide the base. Fix the cause, then {self.way_on()}"
        )

    def way_on(self) -> str:
        """What to do once a run of several processes has ended, as the end of a sentence."""
        assert self.watch is not None, "several processes watch each other"
        return self.watch.way_on()

    def _lost(self, error: Exception | None = None) -> RunFailure:
        """The failure after a lost connection: that of another process; if none is known, that of NCCL itself."""
        assert self.watch is not None, "a connection has two ends"
        if isinstance(error, dist.DistBackendError) and is_out_of_memory(error):
            return self._nccl_failure(error)
        text, newest = self.watch.lost(), self.watch.newest()
        if isinstance(error, dist.DistBackendError) and not self.watch.knows:
            return self._nccl_failure(error)
        return OtherProcessFailed(text, safe=[] if newest is None else [newest])

    def _nccl_failure(self, error: dist.DistBackendError) -> RunFailure:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        last = next((f" {after}." for line, after in pairwise(lines) if line == "Last error:"), "")
        fix = "mend the cause (NCCL_DEBUG=INFO tells more; on several machines NCCL_SOCKET_IFNAME names their network)"
        if is_out_of_memory(error):
            fix = "make room on the GPU"
        return RunFailure(
            f"process {self.rank}: the GPUs cannot exchange data: {first_line(error)}.{last} Fix: {fix}, then "
            f"{self.way_on()}"
        )

    @contextmanager
    def watched(self, model: PreTrainedModel) -> Iterator[None]:
        """Inside, a process that makes no pass through the model and sends no message for minutes ends the run."""
        if self.watch is None:
            yield
            return
        found = block_list(model)
        units: list[nn.Module] = [model] if found is None else list(found[1])
        if self.shards:
            units = [each for each in model.modules() if issubclass(type(each), FSDPModule)]
        with self.watch.counting(units, together=self.shards):
            yield

    def _meet(self, work: dist.Work) -> None:
        """Wait for a message on the host. OtherProcessFailed if another process hangs, has failed or has ended."""
        while self.watch is not None:
            is_over = work.is_completed()
            try:
                work.wait(_LOOK)
                return
            except RuntimeError:
                if is_over:
                    raise
            if self.watch.knows:
                raise self._lost()
        work.wait()

    def join_gpus_(self, groups: Sequence[dist.ProcessGroup]) -> None:
        """Let NCCL connect the groups and take its buffers now: faults of the network appear, and what memory is free
        is measured without the buffers.

        For few elements and for many NCCL may connect in different ways, each at its first use.
        """
        assert self.watch is not None, "several processes watch each other"
        self.gather(None)  # all have made the groups
        with self.watch.counting([], together=True), self._connected():  # without passes: who waits for minutes hangs
            for group in groups:
                for num_elements in (1, _MESSAGE_ELEMENTS):
                    dist.all_reduce(_zeros_on_gpu(num_elements), group=group)
            torch.cuda.synchronize()
        torch.cuda.empty_cache()

    @torch.no_grad()
    def sum_gradients_(self, parameters: Sequence[nn.Parameter]) -> str | None:
        """Replace every gradient by its sum over the processes, equal bit for bit in all of them.

        A missing gradient counts as zeros, unless it is missing in all processes.

        Returns:
            None; or if memory for it does not suffice in a process, in all of them the reason. Nothing is summed then.
        """
        if self.size == 1:
            return None
        given = "".join("01"[parameter.grad is not None] for parameter in parameters)
        # Whoever fails among the messages leaves the others in one, so all memory is taken before the first.
        buffers, reason = _unless_short(lambda: _message_buffers(parameters))
        told = self.gather([given, reason])
        flags = [theirs for theirs, _ in told]
        shortages: list[str] = [theirs for _, theirs in told if theirs]
        having = [p for p, known in zip(parameters, zip(*flags, strict=True), strict=True) if "1" in known]
        if not shortages and len(set(flags)) > 1:
            missing = [parameter for parameter in having if parameter.grad is None]
            zeros, reason = _unless_short(lambda: [torch.zeros_like(each, dtype=_dtype(each)) for each in missing])
            shortages = [theirs for theirs in self.gather(reason) if theirs]
            for parameter, zero in zip(missing, zeros or (), strict=not shortages):
                parameter.grad = zero
        if shortages:
            return shortages[0]
        assert buffers is not None
        for gradients in _messages([parameter.grad for parameter in having if parameter.grad is not None]):
            sizes = [gradient.numel() for gradient in gradients]
            flat = buffers[gradients[0].dtype, gradients[0].device][: sum(sizes)]
            torch.cat([gradient.reshape(-1) for gradient in gradients], out=flat)
            with self._connected():
                dist.all_reduce(flat, group=self.gpus)
            for gradient, part in zip(gradients, torch.split(flat, sizes), strict=True):
                gradient.copy_(part.view_as(gradient))
        return None

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
        """Name the usual cause of a broken connection, for which gloo and NCCL have long words of their own."""
        if self.watch is not None:
            self.watch.arrived()
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, OtherProcessFailed) or self.watch is None:
                raise
            if is_out_of_memory(error) and not isinstance(error, dist.DistBackendError):
                raise
            raise self._lost(error) from error

    def require_equal(self, parameters: Mapping[str, Tensor]) -> None:
        """Raise RunFailure in all processes if one holds other values, by a sum over the bits of each tensor."""
        if self.size == 1:
            return
        sums = self.gather([_bit_sum(parameter) for parameter in parameters.values()])
        for rank, theirs in enumerate(sums):
            differing = [key for key, mine, other in zip(parameters, sums[0], theirs, strict=True) if mine != other]
            if differing:
                raise RunFailure(
                    f"process {rank} has another {differing[0]} than process 0 ({len(differing)} parameters differ): "
                    f"the processes have drifted apart. Fix: {self.way_on()}"
                )


# For functions that are called deep inside of a launch.
_LAUNCH: ContextVar[Processes | None] = ContextVar("processes_of_launch", default=None)


@contextmanager
def processes_of_launch() -> Iterator[Processes]:
    """Connect the processes that torchrun or `accelerate launch` has started, known from environment variables.

    On CUDA each process takes the GPU of its local rank, or the only one that it sees. Tensors of GPUs go through NCCL,
    which gives up after minutes; everything else goes through gloo on the host, so that no GPU waits for it.

    Raises:
        UserError: There are fewer GPUs than processes.
        RunFailure: Another process does not come.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Processes()
        return
    on_gpus = torch.cuda.is_available()
    if on_gpus:
        here, num_gpus = _num_here(size), torch.cuda.device_count()
        if here > num_gpus > 1:  # a job may show each process its own GPU alone
            raise UserError(
                f"qdora train: must have one process for each GPU (got {here} on {num_gpus} GPUs). "
                f"Fix: start with torchrun --nproc-per-node {num_gpus}."
            )
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) if here <= num_gpus else 0)
        _let_the_watch_speak_first()
    _connect(size)
    if on_gpus:
        _check_own_gpus(size)
    watch = ProcessWatch(dist.get_rank(), dist.get_world_size())
    ending: BaseException | None = None
    try:
        gpus = dist.new_group(backend="nccl", timeout=_gpu_patience()) if on_gpus else None
        processes = Processes(watch.rank, watch.size, gpus, watch=watch)
        if gpus is not None:
            processes.join_gpus_([gpus])
        launch = _LAUNCH.set(processes)
        try:
            yield processes
        finally:
            _LAUNCH.reset(launch)
    except BaseException as error:
        ending = error
        if not isinstance(error, Interrupted | OtherProcessFailed):
            watch.failed(error)
        if not isinstance(error, Interrupted):
            watch.linger()
        raise
    finally:
        watch.close(well=_is_agreed(ending))
        _disconnect(watch, ending, on_gpus=on_gpus)


def _is_agreed(ending: BaseException | None) -> bool:
    """Whether all processes end in this way: the run is done, or was stopped and is saved."""
    return ending is None or (isinstance(ending, Interrupted) and ending.saved)


def _own_gpu() -> str:
    """What identifies the GPU of this process among those of all machines."""
    return str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)


def _check_own_gpus(size: int) -> None:
    """UserError in all processes if two of them have the same GPU."""
    taken: list[Any] = [None] * size
    dist.all_gather_object(taken, _own_gpu())
    if len(set(taken)) < size:
        raise UserError(
            f"qdora train: must have one process for each GPU, got {size} processes on {len(set(taken))}. "
            "Fix: start as many with torchrun --nproc-per-node as the machine has GPUs."
        )


def _let_the_watch_speak_first() -> None:
    """Settings of torch's own thread for NCCL, which ends a process by SIGABRT. It reads them when a group is made.

    - An error that CUDA reports also reaches the main thread, which tells it.
    - After an error of NCCL the thread waits for a minute; then it must not call off the kernels (torchrun's default,
      1), as the main thread would go on with what they left. With torch's own default, 3, it only ends: a backstop.
    """
    os.environ.setdefault("TORCH_NCCL_RETHROW_CUDA_ERRORS", "0")
    os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "3"


def _connect(size: int) -> None:
    """Connect this process to the others of the launch. RunFailure if they do not all come within minutes."""
    try:
        dist.init_process_group("gloo", timeout=_CONNECTING)
    except RuntimeError as error:
        who = f"process {os.environ['RANK']}"
        raise RunFailure(
            f"{who}: not all {size} processes of this launch have connected: {first_line(error)} "
            "Fix: see what the others have printed; on several machines, GLOO_SOCKET_IFNAME names their network."
        ) from error
    dist.distributed_c10d._set_pg_timeout(_PATIENCE)


def _disconnect(watch: ProcessWatch, ending: BaseException | None, *, on_gpus: bool) -> None:
    """Close the connections. If that may wait for another process, end this one without it, after its last message.

    NCCL closes when its work on the GPU is done and the other processes of the machine close, too: only after a success
    or a stop that all agreed on they are sure to. After a failure they may wait in a kernel for this one.
    """
    if watch.has_silence or (on_gpus and not _is_agreed(ending)):
        atexit.register(_leave, FAILURE if ending is None else exit_code(ending))
    else:
        dist.destroy_process_group()


def _leave(code: int) -> None:
    """End this process although its threads wait for another one, which nothing calls off."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _gpu_patience() -> timedelta:
    """How long GPUs wait for each other: NCCL must not end the processes before the watch names the silent one.

    The watch takes up to twice its patience and two of its looks.
    """
    return max(_GPU_PATIENCE, timedelta(seconds=3 * patience_seconds()))


def mesh_of(processes: Processes, device: torch.device, parallel: str) -> DeviceMesh | None:
    """The processes as `memory.sharded_base.ShardedBase` takes them; None if each holds the whole base.

    With `parallel` hybrid the processes of a machine divide the base, and machines repeat it. On GPUs its tensors go
    through NCCL. UserError if this torch cannot divide it, or hybrid has machines of unequal size, or processes whose
    numbers alternate between machines.
    """
    if not processes.shards:
        return None
    if not CAN_DIVIDE:
        need = f"must be auto or replicate with torch {torch.__version__} (shard and hybrid need torch 2.12)"
        raise UserError(f"train.parallel: {need}, got {parallel}.")
    hybrid = parallel == "hybrid"
    sizes = sorted(set(processes.gather(processes.num_here))) if hybrid else []
    if len(sizes) > 1:
        need = "must be shard or replicate unless each machine has equally many processes"
        raise UserError(f"train.parallel: {need}, got hybrid with {' and '.join(map(str, sizes))} of them.")
    if hybrid:
        _check_neighbours(processes)
    shape = (processes.size // processes.num_here, processes.num_here) if hybrid else (processes.size,)
    names = ("replicate", "shard") if hybrid else None
    if processes.gpus is None:
        return init_device_mesh(device.type, shape, mesh_dim_names=names)
    # For GPUs, too, init_device_mesh makes groups of the default group's backend, which is gloo.
    if not hybrid:
        return DeviceMesh.from_group(processes.gpus, device.type)
    ranks = torch.arange(processes.size).view(shape)
    options: dict[str, Any] = {"backend": "nccl", "timeout": _gpu_patience()}
    groups = [
        dist.new_subgroups_by_enumeration(each.tolist(), **options)[0]  # type: ignore[no-untyped-call]
        for each in (ranks.T, ranks)
    ]
    processes.join_gpus_(groups)
    return DeviceMesh.from_group(groups, device.type, ranks, mesh_dim_names=names)


def _check_neighbours(processes: Processes) -> None:
    """UserError unless processes of neighbouring numbers, as many as each machine has, are on one machine."""
    names = processes.gather(socket.gethostname())
    for start in range(0, processes.size, processes.num_here):
        for rank in range(start, start + processes.num_here):
            if names[rank] != names[start]:
                raise UserError(
                    f"train.parallel: got hybrid, but processes {start} and {rank} are on {names[start]} and "
                    f"{names[rank]}: must be processes of one machine. Fix: let the launcher number the processes of a "
                    "machine one after another (SLURM: --distribution=block), or set train.parallel to shard."
                )


def _zeros_on_gpu(num_elements: int) -> Tensor:
    return torch.zeros(num_elements, device="cuda")


def free_host_bytes() -> int:
    """This process's share of the free host memory.

    All processes of a launch must call this together, so that none takes memory before all have measured.
    """
    free = available_memory_bytes()
    if not dist.is_initialized():
        return free
    size = dist.get_world_size()
    processes = _LAUNCH.get() or Processes(dist.get_rank(), size)
    return int(min(processes.gather(free))) // _num_here(size)


def _num_here(size: int) -> int:
    """Processes on this machine, of a launch of `size`."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", size))


def seed_of(seed: int, rank: int, step: int = 0) -> int:
    """The seed of a process's own random numbers (its dropout): `seed` for the first process at step 0."""
    if rank == 0 and step == 0:
        return seed
    return int.from_bytes(hashlib.sha256(f"{seed} {rank} {step}".encode()).digest()[:7])


def _messages(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Runs of tensors of one dtype and device, with at most `_MESSAGE_ELEMENTS` together (or one larger tensor)."""
    run: list[Tensor] = []
    for tensor in tensors:
        alike = run and (run[0].dtype, run[0].device) == (tensor.dtype, tensor.device)
        if run and (not alike or sum(map(Tensor.numel, run)) + tensor.numel() > _MESSAGE_ELEMENTS):
            yield run
            run = []
        run.append(tensor)
    if run:
        yield run


def _message_buffers(parameters: Sequence[nn.Parameter]) -> dict[tuple[torch.dtype, torch.device], Tensor]:
    """For the gradients of each dtype and device a buffer that holds the largest of their `_messages`."""
    sizes: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    for parameter in parameters:
        sizes.setdefault((_dtype(parameter), parameter.device), []).append(parameter.numel())
    most = {key: min(sum(each), max(_MESSAGE_ELEMENTS, *each)) for key, each in sizes.items()}
    return {(dtype, device): torch.empty(num, dtype=dtype, device=device) for (dtype, device), num in most.items()}


def _dtype(parameter: nn.Parameter) -> torch.dtype:
    """That of its gradient."""
    return parameter.grad.dtype if parameter.grad is not None else parameter.grad_dtype or parameter.dtype


def _unless_short(allocate: Callable[[], T]) -> tuple[T | None, str]:
    """What it allocates and ""; or None and the allocator's reason."""
    try:
        return allocate(), ""
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return None, first_line(error)


def _bit_sum(tensor: Tensor) -> int:
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return int(tensor.detach().contiguous().view(bits).sum(dtype=torch.int64))
