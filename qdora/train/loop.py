"""The learning rate at each step: warm-up, then linear, cosine or constant.

The training loop: micro-batches into one gradient, one update, one line of metrics.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from qdora.data.loader import Step, StepLoader
from qdora.errors import Interrupted, RunFailure
from qdora.model.inject import adapted_layers
from qdora.nn.adapted_linear import prepare_gains
from qdora.train.backoff import OutOfMemory, Shortage, back_off, cannot_cut, shortage_of, worst
from qdora.train.bad_steps import BadStep, BadSteps
from qdora.train.checkpoint import random_state, set_random_state
from qdora.train.distributed import Processes
from qdora.train.interrupt import StopRequest
from qdora.train.micro_batch import batch_loss
from qdora.train.objective import Objective
from qdora.train.optimizer import AdapterOptimizer
from qdora.train.progress import StepReport, TrainingProgress, memory_bytes

ScheduleName = Literal["linear", "cosine", "constant"]


def warmup_steps(warmup: int | float, num_steps: int) -> int:
    """Warm-up in steps: an int is a number of steps, a float a share of the run (rounded up)."""
    return math.ceil(warmup * num_steps) if isinstance(warmup, float) else warmup


def learning_rate(
    step: int, num_steps: int, *, peak: float, schedule: ScheduleName, warmup: int | float, end: float = 0.0
) -> float:
    """The rate of optimizer step `step` (from 0) of `num_steps`.

    Warm-up rises linearly and reaches `peak` at its last step; linear and cosine fall from there to `end` at the end of
    the run, reached one step after the last, so no step is spent at rate 0.

    Args:
        step: 0 to num_steps - 1.
        num_steps: Length of the run.
        peak: Largest rate.
        schedule: linear, cosine (half a period, arXiv 1608.03983 without restarts) or constant.
        warmup: Steps (int) or share of the run (float below 1).
        end: Rate that linear and cosine end at.
    """
    warm = min(warmup_steps(warmup, num_steps), num_steps)
    if step < warm:
        return peak * (step + 1) / warm
    if schedule == "constant":
        return peak
    progress = (step - warm) / max(1, num_steps - warm)
    share = (1 - progress) if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return end + (peak - end) * share


logger = logging.getLogger("qdora")

Metrics = dict[str, Any]
_Before = tuple[dict[str, Any], dict[str, Tensor]]
"""The loader's and the random generators' state."""


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
        keep_batch: Writes the examples of a step that was not applied and returns where.
        probe: Measures the interference after `step` steps and writes it; training goes on as if it had not.
        begin_step: Prepares the model for the step that follows `step` steps, at every attempt at its gradient.
        end_step: Takes `step` and whether its update was made, and gives more numbers of the step.
        updated: Told the learning rate of every update, after it; returns what is wrong with it, or None.
    """

    write_metrics: Callable[[Metrics], None]
    save: Callable[[int], Path]
    evaluate: Callable[[int], Evaluated] | None = None
    keep_batch: Callable[[BadStep], Path] | None = None
    probe: Callable[[int], None] | None = None
    begin_step: Callable[[int], None] | None = None
    end_step: Callable[[int, bool], Metrics] | None = None
    updated: Callable[[float], str | None] | None = None


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
    bad_steps: BadSteps | None = None,
) -> int:
    """Train from `start_step` to `settings.num_steps`, or until an evaluation says that it is enough.

    The loss of a step is the summed NLL of all its micro-batches, in all processes, over the labelled tokens of all of
    them. Every process calls every hook, for the same step. Where memory runs out, the step is computed again in
    smaller micro-batches, and so are those after it. A step that `bad_steps` finds fault with (None: one that is not
    finite) is not applied; where it is skipped, it still counts as a step.

    Returns:
        Steps done; a checkpoint of that state has been written.
    Raises:
        Interrupted: After a requested stop; a checkpoint has been written.
        RunFailure: If a step cannot be computed (one example alone is too much for the memory), or is bad and not
            skipped; a checkpoint of the state before that step has been written. Or if `hooks.updated` finds fault with
            an update; a checkpoint of the state after it has been written.
    """
    processes, bad_steps = processes or Processes(), bad_steps or BadSteps()
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
        before = loader.state_dict(), random_state()
        found = _gradient_that_fits(model, optimizer, loader, settings, hooks, device, step, processes, before)
        done, metrics = step + 1, {"step": step + 1, "lr": lr, **found.metrics}
        reason = found.fault or bad_steps.fault(metrics["loss"], metrics["gradient_norm"])
        if reason is None:
            if settings.clip is not None and metrics["gradient_norm"] > settings.clip:
                optimizer.scale_gradients_(settings.clip / metrics["gradient_norm"])
            optimizer.step(lr)
            bad_steps.applied(metrics["loss"])
            wrong = None if hooks.updated is None else hooks.updated(lr)
            if wrong is not None:
                raise RunFailure(f"step {done}: {wrong}", safe=[hooks.save(done)])
        elif found.fault is not None or not bad_steps.skip():
            _go_back(optimizer, loader, before)
            raise _failed_step(found, reason, step, hooks, bad_steps)
        optimizer.zero_grad()
        if hooks.end_step is not None:
            metrics |= hooks.end_step(step, reason is None)
        seconds.append(time.perf_counter() - began)
        metrics["time"] = {"step_seconds": seconds[-1], "peak_memory_bytes": max(processes.gather(memory_bytes()))}
        if reason is not None:
            _skipped(found, reason, done, hooks)
        elif done % settings.log_every == 0 or done == settings.num_steps:
            hooks.write_metrics(metrics)
        progress.step(_report(metrics, settings.num_steps, seconds))
        if _after_step(model, done, settings, hooks, stop):
            return done
    return max(start_step, settings.num_steps)


@dataclass(frozen=True)
class _Computed:
    """A step's gradient, in the parameters' `grad`, unless it could not be computed.

    Attributes:
        batch: The examples.
        metrics: The step's numbers.
        fault: Why it could not be computed, or None.
        example_nll: (examples,) of each of this process's micro-batches; on the device, so that nobody waits for it.
    """

    batch: Step
    metrics: Metrics
    fault: str | None
    example_nll: list[Tensor]

    def bad_step(self, number: int, reason: str) -> BadStep:
        """The same as a step that is not applied."""
        known = [value for part in self.example_nll for value in part.tolist()]
        num_mine = sum(len(micro.example_ids) for micro in self.batch.micro_batches)
        nll = known if len(known) == num_mine else [math.nan] * num_mine
        norm = self.metrics.get("gradient_norm", math.nan)
        return BadStep(number, reason, self.batch, self.metrics["loss"], norm, nll)


def _gradient_that_fits(
    model: nn.Module,
    optimizer: AdapterOptimizer,
    loader: StepLoader,
    settings: FitSettings,
    hooks: Hooks,
    device: torch.device,
    step: int,
    processes: Processes,
    before: _Before,
) -> _Computed:
    """Take the next step's examples and sum up their gradient, in smaller micro-batches where memory runs out: then
    again from `before`, the state in which the step began."""
    while True:
        if hooks.begin_step is not None:
            hooks.begin_step(step)
        batch = loader.next_step()
        metrics: Metrics = {"loss": math.nan}
        example_nll: list[Tensor] = []
        fault = shortage = None
        try:
            metrics, example_nll = _gradient_of_step(model, batch, device, settings.loss_chunk, settings.objective)
        except OutOfMemory as error:
            shortage = asdict(error.shortage)
        except RuntimeError as error:
            fault = _cannot_compute(error)
        short = worst(Shortage(**each) if each else None for each in processes.gather(shortage))
        if short is None:
            metrics, fault = _summed(metrics, fault, optimizer, processes, settings.objective, step)
            return _Computed(batch, metrics, fault, example_nll)
        _go_back(optimizer, loader, before)
        backoff = back_off(loader, short)
        if backoff is None:
            return _Computed(batch, metrics, cannot_cut(short), example_nll)
        hooks.write_metrics({"step": step + 1, "out_of_memory": asdict(backoff)})
        logger.warning(_BACKED_OFF, step + 1, backoff.tokens_before, backoff.tokens_after, backoff.reason)


_BACKED_OFF = "Step %d: out of memory. Micro-batches shrink from %s to %s tokens, steps stay as they are. (%s)"


def _go_back(optimizer: AdapterOptimizer, loader: StepLoader, before: _Before) -> None:
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
    return {"gradient_norm": float(optimizer.gradient_norm()), **metrics}, None


def _gradient_of_step(
    model: nn.Module,
    batch: Step,
    device: torch.device,
    loss_chunk: int | None = None,
    objective: Objective | None = None,
) -> tuple[Metrics, list[Tensor]]:
    """Accumulate the gradient of the step's loss into the parameters.

    Returns:
        The step's numbers, with the NLL per task and, whatever the objective, per labelled token; and the NLL of each
        example, (examples,) of each micro-batch.
    """
    objective = objective or Objective()
    objective.begin()
    total = objective.total(batch)
    # A block that comes and goes is not brought for its norms alone.
    prepare_gains(layer for layer in adapted_layers(model).values() if layer.base.residency is None)
    names = batch.micro_batches[0].task_names if batch.micro_batches else []
    nll = torch.zeros(len(names), dtype=torch.float32, device=device)
    example_nll = []
    tokens = torch.zeros(len(names), dtype=torch.int64)
    for number, micro in enumerate(batch.micro_batches):
        with shortage_of(micro):
            input_ids, attention_mask = micro.input_ids.to(device), micro.attention_mask.to(device)
            weights = objective.example_weights(micro)
            loss = batch_loss(model, input_ids, attention_mask, micro.labels, loss_chunk, micro.packing, weights)
            (loss.nll_sum / total).backward()  # type: ignore[no-untyped-call]
            objective.after(batch.micro_batches, number)
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


def _skipped(found: _Computed, reason: str, number: int, hooks: Hooks) -> None:
    """Say that a step was not applied, and keep its examples."""
    bad = found.bad_step(number, reason)
    kept = None if hooks.keep_batch is None else hooks.keep_batch(bad)
    numbers = {"reason": reason, "loss": bad.loss, "gradient_norm": bad.gradient_norm}
    hooks.write_metrics({"step": number, "skipped": {**numbers, "num_examples": bad.batch.num_examples}})
    logger.warning("Step %d is skipped: %s.%s", number, reason, "" if kept is None else f" Its examples: {kept}")


def _failed_step(found: _Computed, reason: str, step: int, hooks: Hooks, bad_steps: BadSteps) -> RunFailure:
    """Keep the state before the step and the batch that broke it; the parameters have not been touched."""
    safe: list[Path | str] = [hooks.save(step)]
    if hooks.keep_batch is not None:
        safe.append(hooks.keep_batch(found.bad_step(step + 1, reason)))
    if found.fault is None:
        reason += f"; the update was not applied. {bad_steps.way_on}, then go on with --resume."
    return RunFailure(f"step {step + 1}: {reason}", safe=safe)


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
