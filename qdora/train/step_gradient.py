"""The gradient of one optimizer step, and smaller micro-batches for a step that does not fit into memory.

The loss of a step is the summed NLL of all its micro-batches, in all processes, divided by the labelled tokens of all
of them, so neither padding nor the split into micro-batches changes it.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qdora.data.batching import MicroBatch
from qdora.data.loader import Step, StepLoader
from qdora.model.inject import adapted_layers
from qdora.nn.adapted_linear import prepare_gains
from qdora.train.checkpoint import set_random_state
from qdora.train.distributed import Processes
from qdora.train.micro_batch import batch_loss
from qdora.train.optimizer import AdapterOptimizer
from qdora.train.step_checks import BadStep
from qdora.train.task_weights import TaskWeights, example_weights

Metrics = dict[str, Any]
"""One line of metrics.jsonl."""
StateBefore = tuple[dict[str, Any], dict[str, Tensor]]
"""State of the loader and of the random generators when a step began."""

# Messages of allocators that raise a plain RuntimeError: torch's on the CPU, and CUDA's outside torch's cache.
_OUT_OF_MEMORY_MESSAGES = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "CUDA error: out of memory",
    "CUDA out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


@dataclass(frozen=True)
class Shortage:
    """A micro-batch that did not fit into memory.

    Attributes:
        num_examples: Examples in it.
        num_tokens: Tokens, padding counted.
        reason: First line of the allocator's message.
    """

    num_examples: int
    num_tokens: int
    reason: str


class OutOfMemory(Exception):
    """Carries a Shortage. It keeps the frames that it passed, and their tensors, alive."""

    def __init__(self, shortage: Shortage) -> None:
        self.shortage = shortage
        super().__init__(shortage.reason)


@dataclass(frozen=True)
class StepGradient:
    """A step's gradient, which lies in the parameters' `grad` unless it could not be computed.

    Attributes:
        batch: The examples.
        metrics: The step's numbers.
        fault: Why it could not be computed, or None.
        example_nll: (examples,) of each of this process's micro-batches; on the device, so that nothing waits for it.
        shortage: The micro-batch that did not fit into memory, or None.
    """

    batch: Step
    metrics: Metrics
    fault: str | None
    example_nll: list[Tensor]
    shortage: Shortage | None = None

    def bad_step(self, number: int, reason: str) -> BadStep:
        """The record of this step when its update is not applied."""
        known = [value for part in self.example_nll for value in part.tolist()]
        num_mine = sum(len(micro.example_ids) for micro in self.batch.micro_batches)
        nll = known if len(known) == num_mine else [math.nan] * num_mine
        norm = self.metrics.get("gradient_norm", math.nan)
        return BadStep(number, reason, self.batch, self.metrics["loss"], gradient_norm=norm, example_nll=nll)


def gradient_of_next_step(
    compute: Callable[[Step], tuple[Metrics, list[Tensor]]],
    optimizer: AdapterOptimizer,
    loader: StepLoader,
    processes: Processes,
) -> StepGradient:
    """Take the next step's examples and sum up their gradient over all processes, in the parameters' `grad`.

    Args:
        compute: `step_gradient`, with everything but the examples given.
        optimizer, loader, processes: Of the run.
    """
    batch = loader.next_step()
    metrics: Metrics = {"loss": math.nan}
    example_nll: list[Tensor] = []
    fault = shortage = None
    try:
        metrics, example_nll = compute(batch)
    except OutOfMemory as error:
        shortage = asdict(error.shortage)
    except RuntimeError as error:
        reason = _first_line(error)
        fault = f"cannot be computed: {reason} The update was not applied. Fix the cause, then resume with --resume."
    shortages = [Shortage(**each) for each in processes.gather(shortage) if each]
    if not shortages:
        metrics, fault = _over_processes(metrics, fault, processes)
        if fault is None:
            processes.sum_gradients_(list(optimizer.parameters.values()))
            metrics = {"gradient_norm": float(optimizer.gradient_norm()), **metrics}
        return StepGradient(batch, metrics, fault, example_nll)
    # Among all processes the one that leaves least to cut.
    worst = min(shortages, key=lambda shortage: (shortage.num_examples > 1, shortage.num_tokens))
    return StepGradient(batch, metrics, _does_not_fit(worst), example_nll, worst)


def step_gradient(
    model: nn.Module,
    batch: Step,
    *,
    device: torch.device,
    loss_chunk: int | None = None,
    weights: TaskWeights | None = None,
) -> tuple[Metrics, list[Tensor]]:
    """Accumulate the gradient of this process's part of a step's loss into the parameters.

    Args:
        model: In training mode.
        batch: The step.
        device: Of the model.
        loss_chunk: Labelled tokens whose logits exist at once; None: as many as make 128 MiB.
        weights: Of each task's tokens in the loss; None: all count the same.
    Returns:
        The step's numbers, with the NLL per task, always unweighted; and the NLL of each example, (examples,) of each
        micro-batch.
    Raises:
        OutOfMemory: A micro-batch did not fit.
    """
    total: float = batch.num_label_tokens
    if weights is not None:
        total = sum(weights[name] * count for name, count in batch.task_label_tokens.items())
    # Blocks that are not resident are not fetched for their norms alone.
    prepare_gains(layer for layer in adapted_layers(model).values() if layer.base.residency is None)
    names = batch.micro_batches[0].task_names if batch.micro_batches else []
    nll = torch.zeros(len(names), dtype=torch.float32, device=device)
    example_nll = []
    tokens = torch.zeros(len(names), dtype=torch.int64)
    for micro in batch.micro_batches:
        with _shortage_of(micro):
            input_ids, attention_mask = micro.input_ids.to(device), micro.attention_mask.to(device)
            weight = None if weights is None else example_weights(weights, micro)
            options: dict[str, Any] = {"chunk": loss_chunk, "packing": micro.packing, "weights": weight}
            loss = batch_loss(model, input_ids, attention_mask, micro.labels, **options)
            (loss.nll_sum / total).backward()  # type: ignore[no-untyped-call]
            nll.index_add_(0, micro.task_ids.to(device), loss.example_nll.float())
        example_nll.append(loss.example_nll)
        tokens.index_add_(0, micro.task_ids, loss.example_tokens)
    sums = nll.double().tolist()
    tasks = {
        name: {"nll_sum": each, "num_tokens": count}
        for name, each, count in zip(names, sums, tokens.tolist(), strict=True)
        if count
    }
    metrics = {
        "loss": sum(sums) / batch.num_label_tokens,
        "num_tokens": batch.num_tokens,
        "num_label_tokens": batch.num_label_tokens,
        "num_examples": batch.num_examples,
        "tasks": tasks,
    }
    return metrics, example_nll


def undo_step(optimizer: AdapterOptimizer, loader: StepLoader, before: StateBefore) -> None:
    """Drop the gradients and put the loader and the random generators back to the state `before` the step."""
    optimizer.zero_grad()
    loader.load_state_dict(before[0])
    set_random_state(before[1])


def back_off(loader: StepLoader, shortage: Shortage) -> Metrics | None:
    """Halve the tokens of a micro-batch, counted from the one that did not fit, and release freed memory.

    Must be called outside the `except` block, where the error no longer keeps the tensors of its frames alive.

    Returns:
        `tokens_before` and `tokens_after` (of a micro-batch, padding counted) and the `reason`, or None if the
        micro-batch was a single example.
    """
    before = loader.micro_batch_tokens
    if shortage.num_examples == 1 or before <= 1:
        return None
    loader.micro_batch_tokens = min(before, shortage.num_tokens) // 2
    gc.collect()  # cycles of frames may keep the graph of the failed pass
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return {"tokens_before": before, "tokens_after": loader.micro_batch_tokens, "reason": shortage.reason}


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that an allocation failed, on the GPU or the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(message in str(error) for message in _OUT_OF_MEMORY_MESSAGES)


@contextmanager
def _shortage_of(micro: MicroBatch) -> Iterator[None]:
    """Turn a failed allocation in the block into OutOfMemory; every other error passes unchanged."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        shortage = Shortage(len(micro.example_ids), micro.input_ids.numel(), _first_line(error))
        raise OutOfMemory(shortage) from error


def _does_not_fit(shortage: Shortage) -> str:
    return (
        f"out of memory with one example of {shortage.num_tokens:,} tokens by itself ({shortage.reason.rstrip('.')}). "
        "Fix: turn on memory.checkpointing or lower memory.loss_chunk and resume with --resume, or start a new run "
        "with fewer tokens (data.max_length with data.too_long), a smaller adapter.rank or another base.quant."
    )


def _over_processes(metrics: Metrics, fault: str | None, processes: Processes) -> tuple[Metrics, str | None]:
    """The numbers of a step summed over the processes, and the fault of the first process that has one."""
    if processes.size == 1:
        return metrics, fault
    told = processes.gather({"fault": fault, "loss": metrics["loss"], "tasks": metrics.get("tasks", {})})
    for rank, theirs in enumerate(told):
        if theirs["fault"] is not None:
            return metrics, f"process {rank}: {theirs['fault']}"
    tasks: dict[str, dict[str, Any]] = {}
    for name, numbers in ((name, numbers) for theirs in told for name, numbers in theirs["tasks"].items()):
        total = tasks.setdefault(name, {"nll_sum": 0.0, "num_tokens": 0})
        for key in total:
            total[key] += numbers[key]
    return metrics | {"loss": sum(theirs["loss"] for theirs in told), "tasks": tasks}, None


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
