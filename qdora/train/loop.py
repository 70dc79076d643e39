"""The training loop: micro-batches into one gradient, one update, one line of metrics."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qdora.data.loader import Step, StepLoader
from qdora.errors import Interrupted, RunFailure
from qdora.model.inject import adapted_layers
from qdora.nn.adapted_linear import prepare_gains
from qdora.train.backoff import OutOfMemory, Shortage, back_off, cannot_cut, shortage_of, worst
from qdora.train.distributed import Processes
from qdora.train.interrupt import StopRequest
from qdora.train.micro_batch import batch_loss
from qdora.train.objective import Objective
from qdora.train.optimizer import AdapterOptimizer
from qdora.train.progress import StepReport, TrainingProgress, memory_bytes
from qdora.train.random_state import random_state, set_random_state
from qdora.train.schedule import ScheduleName, learning_rate

logger = logging.getLogger("qdora")

Metrics = dict[str, Any]


@dataclass(frozen=True)
class FitSettings:
    """What the loop needs to know.

    Attributes:
        num_steps: Optimizer steps of the whole run.
        lr, schedule, warmup, lr_end: Peak, course, warm-up and end, as in train/schedule.py.
        clip: Largest gradient norm, or None.
        checkpoint_every: Steps between checkpoints, or None for only the last.
        evaluate_every: Steps between evaluations, or None.
        probe_every: Steps between measurements of the interference, or None.
        log_every: Steps between lines of metrics; the last step always has one.
        loss_chunk: Labelled tokens whose logits exist at once, or None for as many as make 128 MiB.
        objective: What the gradient of a step is of.
    """

    num_steps: int
    lr: float
    schedule: ScheduleName
    warmup: int | float
    lr_end: float = 0.0
    clip: float | None = 1.0
    checkpoint_every: int | None = None
    evaluate_every: int | None = None
    probe_every: int | None = None
    log_every: int = 1
    loss_chunk: int | None = None
    objective: Objective = field(default_factory=Objective)


@dataclass(frozen=True)
class Evaluated:
    """What an evaluation on the way came to; the decisions are the same in all processes.

    Attributes:
        line: Of the metrics, without the step; counts in the first process.
        save: Whether the state is worth a checkpoint.
        stop: Whether the run is over.
    """

    line: Metrics
    save: bool = False
    stop: bool = False


@dataclass(frozen=True)
class Hooks:
    """What the loop calls and does not know: where metrics go, how checkpoints are written, what an evaluation is.

    Attributes:
        write_metrics: Takes one finished step's (or evaluation's) numbers.
        save: Writes a checkpoint of the state after `step` steps and returns its directory.
        evaluate: Measures the model after `step` steps.
        keep_batch: Writes the step whose loss was not finite and returns the file.
        probe: Measures the interference after `step` steps and writes it; training goes on as if it had not.
    """

    write_metrics: Callable[[Metrics], None]
    save: Callable[[int], Path]
    evaluate: Callable[[int], Evaluated] | None = None
    keep_batch: Callable[[Step], Path] | None = None
    probe: Callable[[int], None] | None = None


def fit(
    model: nn.Module,
    optimizer: AdapterOptimizer,
    loader: StepLoader,
    settings: FitSettings,
    hooks: Hooks,
    *,
    device: torch.device,
    progress: TrainingProgress,
    stop: StopRequest,
    start_step: int = 0,
    processes: Processes | None = None,
) -> int:
    """Train from `start_step` to `settings.num_steps`, or until an evaluation says that it is enough.

    The loss of a step is the summed NLL of all its micro-batches, in all processes, over the labelled tokens of all of
    them. Every process calls every hook, for the same step. Where memory runs out, the step is computed again in
    smaller micro-batches, and so are those after it.

    Returns:
        Steps done; a checkpoint of that state has been written.
    Raises:
        Interrupted: After a requested stop; a checkpoint has been written.
        RunFailure: If a step cannot be computed (one example alone is too much for the memory) or its loss or gradient
            is not finite; a checkpoint of the state before that step has been written.
    """
    processes = processes or Processes()
    model.train()
    seconds: deque[float] = deque(maxlen=20)
    for step in range(start_step, settings.num_steps):
        began = time.perf_counter()
        lr = learning_rate(
            step,
            settings.num_steps,
            peak=settings.lr,
            schedule=settings.schedule,
            warmup=settings.warmup,
            end=settings.lr_end,
        )
        batch, metrics, fault = _gradient_that_fits(model, optimizer, loader, settings, hooks, device, step, processes)
        if fault is not None:
            raise _failed_step(step, fault, batch, hooks)
        gradient_norm = metrics["gradient_norm"]
        if settings.clip is not None and gradient_norm > settings.clip:
            optimizer.scale_gradients_(settings.clip / gradient_norm)
        optimizer.step(lr)
        optimizer.zero_grad()
        done = step + 1
        seconds.append(time.perf_counter() - began)
        metrics = {"step": done, "lr": lr, **metrics}
        metrics["time"] = {"step_seconds": seconds[-1], "peak_memory_bytes": max(processes.gather(memory_bytes()))}
        if done % settings.log_every == 0 or done == settings.num_steps:
            hooks.write_metrics(metrics)
        progress.step(_report(metrics, settings.num_steps, seconds))
        if _after_step(model, done, settings, hooks, stop):
            return done
    return max(start_step, settings.num_steps)


def _gradient_that_fits(
    model: nn.Module,
    optimizer: AdapterOptimizer,
    loader: StepLoader,
    settings: FitSettings,
    hooks: Hooks,
    device: torch.device,
    step: int,
    processes: Processes,
) -> tuple[Step, Metrics, str | None]:
    """Take the next step's examples and sum up their gradient, in smaller micro-batches where memory runs out.

    Returns:
        The examples, the step's numbers, and why its gradient must not be applied: then all is as if the step had not
        begun. None where it may.
    """
    before = loader.state_dict(), random_state()
    while True:
        batch = loader.next_step()
        metrics: Metrics = {"loss": math.nan}
        fault = shortage = None
        try:
            metrics = _gradient_of_step(model, batch, device, settings.loss_chunk, settings.objective)
        except OutOfMemory as error:
            shortage = asdict(error.shortage)
        except RuntimeError as error:
            fault = _cannot_compute(error)
        short = worst(Shortage(**each) if each else None for each in processes.gather(shortage))
        if short is None:
            metrics, fault = _summed(metrics, fault, optimizer, processes, settings.objective, step)
            if fault is not None:
                _go_back(optimizer, loader, before)
            return batch, metrics, fault
        _go_back(optimizer, loader, before)
        backoff = back_off(loader, short)
        if backoff is None:
            return batch, {}, cannot_cut(short)
        hooks.write_metrics({"step": step + 1, "out_of_memory": asdict(backoff)})
        logger.warning(_BACKED_OFF, step + 1, backoff.tokens_before, backoff.tokens_after, backoff.reason)


_BACKED_OFF = "Step %d: out of memory. Micro-batches shrink from %s to %s tokens, steps stay as they are. (%s)"


def _go_back(optimizer: AdapterOptimizer, loader: StepLoader, before: tuple[dict[str, Any], dict[str, Tensor]]) -> None:
    """To where the step had not begun: no gradients, and the loader's and the generators' state `before`."""
    optimizer.zero_grad()
    loader.load_state_dict(before[0])
    set_random_state(before[1])


def _summed(
    metrics: Metrics,
    fault: str | None,
    optimizer: AdapterOptimizer,
    processes: Processes,
    objective: Objective,
    step: int,
) -> tuple[Metrics, str | None]:
    """Numbers and gradients of a step summed over the processes; the numbers with the norm, and a fault if any."""
    metrics, fault = _over_processes(metrics, fault, processes)
    if fault is not None:
        return metrics, fault
    if objective.gradients is None:
        processes.sum_gradients_(list(optimizer.parameters.values()))
    else:
        metrics = metrics | {"pcgrad": objective.gradients.combine_(step, processes)}
    gradient_norm = float(optimizer.gradient_norm())
    return {"gradient_norm": gradient_norm, **metrics}, _not_finite(metrics["loss"], gradient_norm)


def _gradient_of_step(
    model: nn.Module,
    batch: Step,
    device: torch.device,
    loss_chunk: int | None = None,
    objective: Objective | None = None,
) -> Metrics:
    """Accumulate the gradient of the step's loss into the parameters; its numbers, with the NLL per task.

    The loss that is told is the NLL per labelled token, whatever the objective.
    """
    objective = objective or Objective()
    objective.begin()
    total = objective.total(batch)
    prepare_gains(adapted_layers(model).values())
    names = batch.micro_batches[0].task_names if batch.micro_batches else []
    nll = torch.zeros(len(names), dtype=torch.float32, device=device)
    tokens = torch.zeros(len(names), dtype=torch.int64)
    for number, micro in enumerate(batch.micro_batches):
        with shortage_of(micro):
            input_ids, attention_mask = micro.input_ids.to(device), micro.attention_mask.to(device)
            weights = objective.example_weights(micro)
            loss = batch_loss(model, input_ids, attention_mask, micro.labels, loss_chunk, micro.packing, weights)
            (loss.nll_sum / total).backward()  # type: ignore[no-untyped-call]
            objective.after(batch.micro_batches, number)
            nll.index_add_(0, micro.task_ids.to(device), loss.example_nll.float())
        tokens.index_add_(0, micro.task_ids, loss.example_tokens)
    sums = nll.double().tolist()
    tasks = {
        name: {"nll_sum": each, "num_tokens": count}
        for name, each, count in zip(names, sums, tokens.tolist(), strict=True)
        if count
    }
    return {
        "loss": sum(sums) / batch.num_label_tokens,
        "num_tokens": batch.num_tokens,
        "num_label_tokens": batch.num_label_tokens,
        "num_examples": batch.num_examples,
        "tasks": tasks,
    }


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


def _after_step(model: nn.Module, done: int, settings: FitSettings, hooks: Hooks, stop: StopRequest) -> bool:
    """Probe, evaluate and save where it is due; returns whether the run is over before its last step. Saved last, so
    that an evaluation's line belongs to the checkpoint; one that fails is saved for, too."""
    last = done == settings.num_steps
    found = Evaluated({})
    try:
        if hooks.probe is not None and settings.probe_every and done % settings.probe_every == 0:
            hooks.probe(done)
        if hooks.evaluate is not None and settings.evaluate_every and done % settings.evaluate_every == 0 and not last:
            found = hooks.evaluate(done)
            hooks.write_metrics({"step": done, **found.line})
            model.train()
    except (RuntimeError, OSError):
        hooks.save(done)
        raise
    due = last or (settings.checkpoint_every is not None and done % settings.checkpoint_every == 0)
    stopping = stop.agreed()
    saved = hooks.save(done) if due or stopping or found.save or found.stop else None
    if stopping and saved is not None and not last and not found.stop:
        raise Interrupted(done, saved)
    return found.stop


def _cannot_compute(error: RuntimeError) -> str:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return f"cannot be computed: {reason} The update was not applied. Mend the cause, then go on with --resume."


def _not_finite(loss: float, gradient_norm: float) -> str | None:
    if math.isfinite(loss) and math.isfinite(gradient_norm):
        return None
    what = f"loss {loss}" if not math.isfinite(loss) else f"gradient norm {gradient_norm}"
    return (
        f"{what} is not finite; the update was not applied. "
        "Look at the kept batch or lower train.lr or train.clip, then go on with --resume."
    )


def _failed_step(step: int, fault: str, batch: Step, hooks: Hooks) -> RunFailure:
    """Keep the state before the step and the batch that broke it; the parameters have not been touched."""
    safe: list[Path | str] = [hooks.save(step)]
    if hooks.keep_batch is not None:
        safe.append(hooks.keep_batch(batch))
    return RunFailure(f"step {step + 1}: {fault}", safe=safe)


def _report(metrics: Metrics, num_steps: int, seconds: deque[float]) -> StepReport:
    typical = sorted(seconds)[len(seconds) // 2]
    return StepReport(
        step=metrics["step"],
        num_steps=num_steps,
        loss=metrics["loss"],
        lr=metrics["lr"],
        tokens_per_second=metrics["num_tokens"] / seconds[-1],
        seconds_left=typical * (num_steps - metrics["step"]),
    )
