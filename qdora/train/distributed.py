"""Several processes, one run: each holds the frozen base and a share of every step's examples.

What the processes tell each other in a step is the sum of the adapters' gradients (a few million numbers, in one
all-reduce after the last micro-batch) and one line of JSON. There is no wrapper around the model: one that reduces
each gradient as it comes, as torch's DistributedDataParallel does, would do so for every micro-batch of the step, needs
its buffers for the whole run, and hides nothing worth hiding: 20 M float32 gradients take milliseconds.

The parameters stay equal because all processes start from the same, add up the same sums and take the same step;
`require_equal` checks it before every checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from qdora.errors import RunFailure, UserError
from qdora.files.environment import available_memory_bytes

T = TypeVar("T")

# Elements of gradients that are copied into one message: 64 MiB of float32.
_MESSAGE_ELEMENTS = 1 << 24
# While the first process evaluates, the others wait in a collective. One that dies is noticed at once by the launcher
# and by the broken connection, not by this time.
_PATIENCE = timedelta(days=1)


class OtherProcessFailed(RunFailure):
    """The first process could not do something that all wait for; it says itself what that was."""


@dataclass(frozen=True)
class Processes:
    """The processes that train one run together; the default is one that trains alone and tells nobody anything.

    Every method must be called by all of them, in the same order.

    Attributes:
        rank: Of this one, from 0.
        size: Number of processes.
    """

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """The value of every process, in the order of ranks; JSON types, NaN and infinities allowed."""
        if self.size == 1:
            return [value]
        message = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = [torch.zeros((), dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor(len(message)))
        longest = max(int(length) for length in lengths)
        padded = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.size)]
        dist.all_gather(padded, torch.nn.functional.pad(message, (0, longest - len(message))))
        pairs = zip(padded, lengths, strict=True)
        return [json.loads(part[: int(length)].numpy().tobytes()) for part, length in pairs]

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in at least one process."""
        return any(self.gather(flag))

    def first(self, action: Callable[[], T]) -> T | None:
        """Let the first process act while the others wait; None in these.

        Raises:
            OtherProcessFailed: In the others, where the action raised in the first.
        """
        if self.size == 1:
            return action()
        result = None
        try:
            if self.is_first:
                result = action()
        except BaseException as error:
            self.gather(type(error).__name__)
            raise
        fault = self.gather("")[0]
        if fault:
            raise OtherProcessFailed(f"process {self.rank}: stopped, because process 0 did ({fault}).")
        return result

    @torch.no_grad()
    def sum_gradients_(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace every gradient by its sum over the processes; no gradient counts as zeros.

        A parameter without a gradient anywhere stays without. The sums are equal bit for bit in all processes.
        """
        if self.size == 1:
            return
        given = "".join("01"[parameter.grad is not None] for parameter in parameters)
        having = [p for p, flags in zip(parameters, zip(*self.gather(given), strict=True), strict=True) if "1" in flags]
        for parameter in having:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter, dtype=parameter.grad_dtype or parameter.dtype)
        for gradients in _messages([parameter.grad for parameter in having if parameter.grad is not None]):
            flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
            dist.all_reduce(flat)
            parts = torch.split(flat, [gradient.numel() for gradient in gradients])
            for gradient, part in zip(gradients, parts, strict=True):
                gradient.copy_(part.view_as(gradient))

    @torch.no_grad()
    def share_first_(self, parameters: Sequence[nn.Parameter]) -> None:
        """Give all processes the parameters of the first: two devices may start from norms that differ by rounding."""
        if self.size > 1:
            for parameter in parameters:
                value = parameter.detach().clone()
                dist.broadcast(value, 0)
                parameter.copy_(value)  # raises the version, by which a cached norm is known to be old

    def require_equal(self, parameters: Mapping[str, Tensor]) -> None:
        """Check that all processes hold the same values, by a sum over the bits of each tensor.

        Raises:
            RunFailure: In all of them, if one does not.
        """
        if self.size == 1:
            return
        sums = self.gather([_bit_sum(parameter) for parameter in parameters.values()])
        for rank, theirs in enumerate(sums):
            differing = [key for key, mine, other in zip(parameters, sums[0], theirs, strict=True) if mine != other]
            if differing:
                raise RunFailure(
                    f"process {rank} holds another {differing[0]} than process 0 ({len(differing)} parameters differ); "
                    "the processes have drifted apart. Go on from the last checkpoint with --resume."
                )


@contextmanager
def processes_of_launch() -> Iterator[Processes]:
    """The processes that torchrun or `accelerate launch` has started (by their environment variables), connected.

    On CUDA each takes the GPU of its local rank; gradients go through NCCL, all else through gloo on the host, so that
    no GPU waits for it.

    Raises:
        UserError: More processes on this machine than it has GPUs.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Processes()
        return
    backend = "gloo"
    if torch.cuda.is_available():
        here, num_gpus = int(os.environ.get("LOCAL_WORLD_SIZE", size)), torch.cuda.device_count()
        if here > num_gpus:
            raise UserError(f"qdora train: started as {here} processes on {num_gpus} GPUs, allowed: one for each GPU.")
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=_PATIENCE)
    try:
        yield Processes(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


def free_host_bytes() -> int | None:
    """This process's share of the host memory that is free; None where the system does not say.

    To be called by all processes of a launch together: none goes on, and takes memory, before all have asked.
    """
    free = available_memory_bytes()
    if not dist.is_initialized():
        return free
    size = dist.get_world_size()
    told = Processes(dist.get_rank(), size).gather(free)
    known = [each for each in told if each is not None]
    return min(known) // int(os.environ.get("LOCAL_WORLD_SIZE", size)) if known else None


def seed_of(seed: int, rank: int, step: int = 0) -> int:
    """The seed of a process's own random numbers (its dropout); that of the first from the start is the run's."""
    if rank == 0 and step == 0:
        return seed
    return int.from_bytes(hashlib.sha256(f"{seed} {rank} {step}".encode()).digest()[:7])


def _messages(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Runs of tensors of one dtype and device, at most `_MESSAGE_ELEMENTS` in sum (or one larger tensor)."""
    run: list[Tensor] = []
    for tensor in tensors:
        alike = run and (run[0].dtype, run[0].device) == (tensor.dtype, tensor.device)
        if run and (not alike or sum(map(Tensor.numel, run)) + tensor.numel() > _MESSAGE_ELEMENTS):
            yield run
            run = []
        run.append(tensor)
    if run:
        yield run


def _bit_sum(tensor: Tensor) -> int:
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return int(tensor.detach().contiguous().view(bits).sum(dtype=torch.int64))
