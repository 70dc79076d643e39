"""The training loop: one gradient and one update a step, evaluations, checkpoints, stops."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qdora.data.batches import Step, StepLoader
from qdora.errors import Diverged, Interrupted, RunFailure, UserError, first_line
from qdora.recipe.train_settings import TrainConfig
from qdora.train.checkpoint import random_state, set_random_state
from qdora.train.distributed import Processes
from qdora.train.even_passes import even_passes
from qdora.train.hooks import Evaluated, Hooks, Metrics
from qdora.train.interrupt import StopRequest
from qdora.train.loss_scale import LossScale
from qdora.train.optimizer import AdapterOptimizer, UpdateOutOfMemory
from qdora.train.out_of_memory import Backoff, OutOfMemory, Shortage
from qdora.train.passes import step_gradient
from qdora.train.progress import TrainingProgress, peak_memory_bytes, reserved_bytes
from qdora.train.schedule import Schedule
from qdora.train.step_checks import BadStep, BadSteps
from qdora.train.task_weights import TaskWeights

# Numbers of a step that are sums over the processes.
_SUMMED = ("loss", "router_aux_loss")

logger = logging.getLogger("qdora")


def fit(
    model: nn.Module,
    optimizer: AdapterOptimizer,
    loader: StepLoader,
    train: TrainConfig,
    hooks: Hooks,
    *,
    num_steps: int,
    device: torch.device,
    progress: TrainingProgress,
    stop: StopRequest,
    start_step: int = 0,
    processes: Processes = Processes(),
    bad_steps: BadSteps | None = None,
    backoff: Backoff | None = None,
    loss_scale: LossScale | None = None,
    schedule: Schedule | None = None,
    loss_chunk: int | None = None,
    task_weights: TaskWeights | None = None,
) -> int:
    """Train from `start_step` to `num_steps`, or until an evaluation ends the run.

    Every process calls every hook, for the same step. When memory runs out, the step is computed again in smaller
    micro-batches (`backoff`). A step that `bad_steps` finds bad is not applied; a skipped one still counts.

    Args:
        train: Schedule, clipping, and how often metrics and checkpoints are written.
        num_steps: Length of the run, whatever `train` says.
        loss_scale, loss_chunk, task_weights: As in `step_gradient`.
    Returns:
        Steps done; a checkpoint of that state has been written.
    Raises:
        Interrupted: After a requested stop; a checkpoint has been written.
        RunFailure: A step's examples cannot be read, or its gradient cannot be computed (one example alone does not fit
            into memory), or it is bad and not skipped; a checkpoint of the state before it has been written. Or
            `hooks.updated` rejects an update; one with it has.
    """
    bad_steps = bad_steps or BadSteps(train)
    backoff, schedule = backoff or Backoff(loader), schedule or Schedule(train, num_steps)
    options: dict[str, Any] = {"loss_chunk": loss_chunk, "weights": task_weights, "loss_scale": loss_scale}
    options |= {"gradient_norm": optimizer.gradient_norm, "reading": hooks.reading} if processes.size == 1 else {}
    compute = partial(step_gradient, model, device=device, router_aux_loss=train.router_aux_loss, **options)
    attempt = partial(_gradient_of_next_step, compute, optimizer, loader, processes)
    model.train()
    for step in range(start_step, num_steps):
        began = time.perf_counter()
        lr = schedule.rate(step)
        start = _StepStart(step, optimizer, loader, hooks)
        found = _gradient_that_fits(attempt, start, backoff, loss_scale)
        done, metrics = step + 1, {"step": step + 1, "lr": lr, **found.metrics}
        reason = found.fault or bad_steps.fault(metrics["loss"], metrics["gradient_norm"])
        if reason is None:
            if train.clip is not None and metrics["gradient_norm"] > train.clip:
                optimizer.scale_gradients_(train.clip / metrics["gradient_norm"])
            _update(lr, start, processes)
            bad_steps.applied(metrics["loss"])
            wrong = hooks.updated(lr)
            if wrong is not None:
                raise RunFailure(f"step {done}: {wrong}", safe=[hooks.save(done)])
            if loss_scale is not None:
                loss_scale.applied()
        elif found.fault is not None or not bad_steps.skip():
            raise _failed_step(found, reason, start, bad_steps)
        optimizer.zero_grad()
        if hooks.end_step is not None:
            metrics |= hooks.end_step(step, reason is None)
        seconds = time.perf_counter() - began
        metrics["time"] = {"step_seconds": seconds, **_peaks(processes)}
        if reason is not None:
            _skipped(found, reason, done, hooks)
        elif done == num_steps or any(every and done % every == 0 for every in (train.log_every, hooks.evaluate_every)):
            hooks.write_metrics(metrics)
        grown = backoff.grow()
        if grown is not None:
            hooks.write_metrics({"step": done, "micro_batches_grow": grown})
        progress.step(metrics)
        every = train.checkpoint_every
        if after_step(model, done, hooks, stop, num_steps=num_steps, checkpoint_every=every, processes=processes):
            return done
    return max(start_step, num_steps)


def _peaks(processes: Processes) -> dict[str, int]:
    """The largest peaks of all processes: memory in use, and on GPUs what the allocator reserved for it."""
    told = processes.gather({"peak_memory_bytes": peak_memory_bytes(), "peak_reserved_bytes": reserved_bytes()})
    return {name: max(each[name] for each in told) for name in told[0] if told[0][name] is not None}


@dataclass(frozen=True)
class StepGradient:
    """A step's gradient, which lies in the parameters' `grad` unless it could not be computed.

    Attributes:
        fault: Why it could not be computed, or None.
        example_nll: (examples,) of each of this process's micro-batches; on the device, so that nothing waits for it.
        shortage: The micro-batch that did not fit into memory, or None.
    """

    batch: Step
    metrics: Metrics
    fault: str | None
    example_nll: list[Tensor]
    shortage: Shortage | None = None

    @property
    def overflowed(self) -> bool:
        """Whether the loss is finite and its gradient is not."""
        if self.fault is not None:
            return False
        return math.isfinite(self.metrics["loss"]) and not math.isfinite(self.metrics["gradient_norm"])

    def bad_step(self, number: int, reason: str) -> BadStep:
        """The record of this step when its update is not applied."""
        try:
            known = [value for part in self.example_nll for value in part.tolist()]
        except RuntimeError:  # nothing can be read from a GPU after some errors
            known = []
        num_mine = sum(len(micro.example_ids) for micro in self.batch.micro_batches)
        nll = known if len(known) == num_mine else [math.nan] * num_mine
        norm = self.metrics.get("gradient_norm", math.nan)
        return BadStep(number, reason, self.batch, self.metrics["loss"], gradient_norm=norm, example_nll=nll)


class _StepStart:
    """The state before step `step` + 1, to which a step returns whose gradient or update fails."""

    def __init__(self, step: int, optimizer: AdapterOptimizer, loader: StepLoader, hooks: Hooks) -> None:
        self.step, self.optimizer, self.hooks = step, optimizer, hooks
        self._loader = loader
        self._before = loader.state_dict(), random_state()

    def restore(self) -> None:
        """Drop the gradients, and restore the states of the loader and of the random generators."""
        self.optimizer.zero_grad()
        self._loader.load_state_dict(self._before[0])
        set_random_state(self._before[1])

    def save(self) -> Path:
        """Restore the state and write its checkpoint."""
        self.restore()
        return self.hooks.save(self.step)


def _gradient_that_fits(
    attempt: Callable[[], StepGradient], start: _StepStart, backoff: Backoff, loss_scale: LossScale | None
) -> StepGradient:
    """Attempt the step's gradient, again in smaller micro-batches as long as memory runs out, and with a smaller
    `loss_scale` as long as float16 overflows. RunFailure, after a checkpoint, if its examples cannot be read."""
    given = None if loss_scale is None else loss_scale.value
    step, hooks = start.step, start.hooks
    while True:
        hooks.begin_step(step)
        try:
            found = attempt()
        except DataUnreadable as error:
            fix = "" if "Fix: " in str(error) else " Fix: resume with --resume once it can be read."
            text = str(error).removesuffix(".") + "."
            raise RunFailure(f"step {step + 1}: {text}{fix}", safe=[start.save()]) from error
        if found.shortage is not None:
            start.restore()
            shrunk = backoff.shrink(found.shortage)
            if shrunk is None:
                return found
            hooks.write_metrics({"step": step + 1, "out_of_memory": shrunk})
            text = "Step %d: out of memory. Micro-batches shrink from %s to %s tokens, the steps keep their examples. "
            logger.warning(f"{text}(%s)", step + 1, *shrunk.values())
            continue
        if loss_scale is None or given is None:
            return found
        found.metrics["loss_scale"] = loss_scale.value
        if not found.overflowed:
            return found
        if not loss_scale.halve():
            loss_scale.value = given  # the batch is bad, not the scale
            return found
        start.restore()


def _update(lr: float, start: _StepStart, processes: Processes) -> None:
    """Apply the gradients. If memory does not suffice, in one process or more, raise RunFailure.

    A checkpoint is written before: of the state before the step if nothing was updated; else of the state after it, in
    which some tensors have no update of this step. Processes that updated different tensors cannot write one.
    """
    mine, step = None, start.step
    try:
        start.optimizer.step(lr)
    except UpdateOutOfMemory as error:
        mine = len(error.left), error.num_updated, str(error)
    told = processes.gather(mine)
    short = [each for each in told if each is not None]
    if not short:
        return
    num_left, num_updated, reason = max(short)
    advice = "Fix: lower adapter.rank in a new run, or free memory"
    if len(short) == len(told) and all(left == number for left, number, _ in short):
        raise RunFailure(f"step {step + 1}: {reason}. {advice}, then resume with --resume.", safe=[start.save()])
    if processes.size > 1:
        raise RunFailure(f"step {step + 1}: {reason}. {advice}, then resume with --resume.")
    lost = f"{num_updated - num_left} others are updated, these keep their values; the run can continue from there"
    raise RunFailure(f"step {step + 1}: {reason}; {lost}. {advice}, then resume.", safe=[start.hooks.save(step + 1)])


def after_step(
    model: nn.Module,
    done: int,
    hooks: Hooks,
    stop: StopRequest,
    *,
    num_steps: int,
    checkpoint_every: int | None,
    processes: Processes,
) -> bool:
    """Evaluate and save when due; returns whether the run ends before its last step.

    After a requested stop only the checkpoint is written, since a launcher soon kills the processes; what was due is
    measured when the run goes on. Else the checkpoint comes last, so that it covers the evaluation's line. If an
    evaluation fails, a checkpoint is written before its error is raised; with a divided base only if all processes are
    sure to fail alike (Diverged, UserError).
    """

    def due(every: int | None) -> bool:
        return every is not None and done % every == 0

    last = done == num_steps
    if stop.agreed() and not last:
        raise Interrupted(done, hooks.save(done))
    found = Evaluated({})
    try:
        if hooks.evaluate is not None and due(hooks.evaluate_every) and not last:
            found = hooks.evaluate(done)
            hooks.write_metrics({"step": done, **found.line})
            model.train()
    except (RuntimeError, OSError, UserError) as error:
        if processes.shards and not isinstance(error, (Diverged, UserError)):
            raise  # the others, still in a pass, cannot save; they notice that this process ends
        try:
            hooks.save(done)
        except (RuntimeError, OSError) as second:
            # After some CUDA errors every call fails: the first one says why.
            logger.warning("Step %d is not saved either (%s) after: %s", done, first_line(second), first_line(error))
        raise
    stopping = not last and due(hooks.evaluate_every) and stop.agreed()  # in the meantime
    saved = hooks.save(done) if last or due(checkpoint_every) or stopping or found.save or found.stop else None
    if stopping and saved is not None and not found.stop:
        raise Interrupted(done, saved)
    return found.stop


def _skipped(found: StepGradient, reason: str, number: int, hooks: Hooks) -> None:
    """Report a step that was not applied, and keep its examples."""
    bad = found.bad_step(number, reason)
    kept = hooks.keep_batch(bad)
    numbers = {"reason": reason, "loss": bad.loss, "gradient_norm": bad.gradient_norm}
    hooks.write_metrics({"step": number, "skipped": {**numbers, "num_examples": bad.batch.num_examples}})
    logger.warning("Step %d is skipped: %s. Its examples: %s", number, reason, kept)


def _failed_step(found: StepGradient, reason: str, start: _StepStart, bad_steps: BadSteps) -> RunFailure:
    """Keep the batch that broke the step and the state before it; the parameters have not been changed.

    After some CUDA errors every later call fails, too. Then the state cannot be saved, and the first error is told.
    """
    number = start.step + 1
    kept = start.hooks.keep_batch(found.bad_step(number, reason))
    failure = RunFailure
    if found.fault is None:
        failure = Diverged
        reason += f"; the update was not applied. {bad_steps.advice(kept)}."
    try:
        return failure(f"step {number}: {reason}", safe=[start.save(), kept])
    except RuntimeError as second:
        reason += f" The state before it could not be saved ({first_line(second)})."
        return failure(f"step {number}: {reason}", safe=[kept])


def _gradient_of_next_step(
    compute: Callable[[Step], tuple[Metrics, list[Tensor]]],
    optimizer: AdapterOptimizer,
    loader: StepLoader,
    processes: Processes,
) -> StepGradient:
    """`compute` the gradient of the next step's examples, and sum it over all processes in the parameters' `grad`."""
    batch = _next_batch(loader, processes)
    metrics: Metrics = {"loss": math.nan}
    example_nll: list[Tensor] = []
    fault = shortage = None
    try:
        metrics, example_nll = compute(even_passes(batch, processes))
    except (OutOfMemory, RuntimeError) as error:
        if processes.shards:
            raise processes.broken(error) from error
        if isinstance(error, OutOfMemory):
            shortage = error.args[0]
        else:
            what = f"cannot be computed: {first_line(error)} The update was not applied."
            fault = f"{what} Fix the cause, then resume with --resume."
    processes.meet()
    shortages = [each for each in processes.gather(shortage) if each]
    if not shortages:
        metrics, fault = _over_processes(metrics, fault, processes)
        if fault is None and processes.size > 1:
            processes.sum_gradients_(list(optimizer.parameters.values()))
            metrics = {"gradient_norm": float(optimizer.gradient_norm()), **metrics}
        return StepGradient(batch, metrics, fault, example_nll)
    # Among all processes the one that leaves least to cut.
    worst = min(shortages, key=lambda shortage: (shortage.num_examples > 1, shortage.num_tokens))
    return StepGradient(batch, metrics, worst.fault(), example_nll, worst)


class DataUnreadable(Exception):
    """The examples of the next step cannot be read, in this process or another one."""


def _next_batch(loader: StepLoader, processes: Processes) -> Step:
    """The next step's examples. Raises DataUnreadable in all processes if one of them cannot read its own."""
    batch = fault = cause = None
    try:
        batch = loader.next_step()
    except Exception as error:  # whatever a file, a connection or a decoder raises: the state before it is saved
        fault, cause = "; ".join(error.faults) if isinstance(error, UserError) else repr(error), error
    faults = [each for each in processes.gather(fault) if each]
    if faults or batch is None:
        raise DataUnreadable(faults[0]) from cause
    return batch


def _over_processes(metrics: Metrics, fault: str | None, processes: Processes) -> tuple[Metrics, str | None]:
    """The numbers of a step summed over the processes, and the fault of the first process that has one."""
    if processes.size == 1:
        return metrics, fault
    mine = {name: metrics[name] for name in _SUMMED if name in metrics}
    told = processes.gather({"fault": fault, "sums": mine, "tasks": metrics.get("tasks", {})})
    for rank, theirs in enumerate(told):
        if theirs["fault"] is not None:
            return metrics, f"process {rank}: {theirs['fault']}"
    tasks: dict[str, dict[str, Any]] = {}
    for name, numbers in ((name, numbers) for theirs in told for name, numbers in theirs["tasks"].items()):
        total = tasks.setdefault(name, {"nll_sum": 0.0, "num_tokens": 0})
        for key in total:
            total[key] += numbers[key]
    return metrics | {name: sum(theirs["sums"][name] for theirs in told) for name in mine} | {"tasks": tasks}, None
