"""The training loop: learning-rate schedule, one gradient and one update a step, evaluations, checkpoints, stops."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from qdora.data.loader import StepLoader
from qdora.errors import Interrupted, RunFailure
from qdora.recipe.train_settings import TrainConfig
from qdora.train.checkpoint import random_state
from qdora.train.distributed import Processes
from qdora.train.interrupt import StopRequest
from qdora.train.optimizer import AdapterOptimizer
from qdora.train.progress import StepReport, TrainingProgress, memory_bytes
from qdora.train.step_checks import BadStep, BadSteps
from qdora.train.step_gradient import (
    Metrics,
    StepGradient,
    back_off,
    gradient_of_next_step,
    step_gradient,
    undo_step,
)
from qdora.train.task_weights import TaskWeights

logger = logging.getLogger("qdora")


def learning_rate(step: int, num_steps: int, train: TrainConfig) -> float:
    """The learning rate of optimizer step `step`, 0 to num_steps - 1.

    Warm-up rises linearly and reaches `train.lr` at its last step. The rate then stays (constant) or falls to
    `train.lr_end`, linearly or along half a cosine (arXiv 1608.03983, without restarts). It would reach that end one
    step after the last, so no step is spent at rate 0.
    """
    warmup = math.ceil(train.warmup * num_steps) if isinstance(train.warmup, float) else train.warmup
    warmup = min(warmup, num_steps)
    if step < warmup:
        return train.lr * (step + 1) / warmup
    if train.schedule == "constant":
        return train.lr
    progress = (step - warmup) / max(1, num_steps - warmup)
    share = (1 - progress) if train.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return train.lr_end + (train.lr - train.lr_end) * share


@dataclass(frozen=True)
class Evaluated:
    """The result of an evaluation during training; `save` and `stop` are the same in all processes.

    Attributes:
        line: Its line of metrics, without the step; the first process's counts.
        save: Whether the state is worth a checkpoint.
        stop: Whether the run ends here.
    """

    line: Metrics
    save: bool = False
    stop: bool = False


@dataclass(frozen=True, kw_only=True)
class Hooks:
    """What a run does around the steps; the loop only calls it.

    Attributes:
        write_metrics: Takes the numbers of a finished step or evaluation.
        save: Writes a checkpoint of the state after `step` steps and returns its directory.
        evaluate, evaluate_every: Measures the model after `step` steps; steps between calls, None for none.
        probe, probe_every: Measures the interference after `step` steps and writes it, without a trace in the training;
            steps between calls, None for none.
        keep_batch: Writes the examples of a step that was not applied and returns where.
        begin_step: Prepares the model for the step that follows `step` steps, at every attempt at its gradient.
        end_step: Takes `step` and whether its update was made, and returns more numbers of the step.
        updated: Takes the learning rate after every update; returns what is wrong with the update, or None.
    """

    write_metrics: Callable[[Metrics], None]
    save: Callable[[int], Path]
    evaluate: Callable[[int], Evaluated] | None = None
    evaluate_every: int | None = None
    probe: Callable[[int], None] | None = None
    probe_every: int | None = None
    keep_batch: Callable[[BadStep], Path] | None = None
    begin_step: Callable[[int], None] | None = None
    end_step: Callable[[int, bool], Metrics] | None = None
    updated: Callable[[float], str | None] | None = None


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
    processes: Processes | None = None,
    bad_steps: BadSteps | None = None,
    loss_chunk: int | None = None,
    task_weights: TaskWeights | None = None,
) -> int:
    """Train from `start_step` to `num_steps`, or until an evaluation ends the run.

    Every process calls every hook, for the same step. When memory runs out, the step is computed again in smaller
    micro-batches, which later steps keep. A step that `bad_steps` finds bad is not applied; a skipped one still counts.

    Args:
        train: Schedule, clipping, and how often metrics and checkpoints are written.
        num_steps: Length of the run, whatever `train` says.
        loss_chunk: Labelled tokens whose logits exist at once; None: as many as make 128 MiB.
        task_weights: Of each task's tokens in the loss; None: all count the same.
    Returns:
        Steps done; a checkpoint of that state has been written.
    Raises:
        Interrupted: After a requested stop; a checkpoint has been written.
        RunFailure: A step cannot be computed (one example alone does not fit into memory), or is bad and not skipped; a
            checkpoint of the state before that step has been written. Or `hooks.updated` finds an update wrong; a
            checkpoint of the state after it has been written.
    """
    processes, bad_steps = processes or Processes(), bad_steps or BadSteps(train)
    compute = partial(step_gradient, model, device=device, loss_chunk=loss_chunk, weights=task_weights)
    model.train()
    seconds: deque[float] = deque(maxlen=20)
    for step in range(start_step, num_steps):
        began = time.perf_counter()
        lr = learning_rate(step, num_steps, train)
        before = loader.state_dict(), random_state()
        attempt = partial(gradient_of_next_step, compute, optimizer, loader, processes)
        undo = partial(undo_step, optimizer, loader, before)
        found = _gradient_that_fits(attempt, undo, loader, hooks, step)
        done, metrics = step + 1, {"step": step + 1, "lr": lr, **found.metrics}
        reason = found.fault or bad_steps.fault(metrics["loss"], metrics["gradient_norm"])
        if reason is None:
            if train.clip is not None and metrics["gradient_norm"] > train.clip:
                optimizer.scale_gradients_(train.clip / metrics["gradient_norm"])
            optimizer.step(lr)
            bad_steps.applied(metrics["loss"])
            wrong = None if hooks.updated is None else hooks.updated(lr)
            if wrong is not None:
                raise RunFailure(f"step {done}: {wrong}", safe=[hooks.save(done)])
        elif found.fault is not None or not bad_steps.skip():
            undo()
            raise _failed_step(found, reason, step, hooks, bad_steps)
        optimizer.zero_grad()
        if hooks.end_step is not None:
            metrics |= hooks.end_step(step, reason is None)
        seconds.append(time.perf_counter() - began)
        metrics["time"] = {"step_seconds": seconds[-1], "peak_memory_bytes": max(processes.gather(memory_bytes()))}
        if reason is not None:
            _skipped(found, reason, done, hooks)
        elif done % train.log_every == 0 or done == num_steps:
            hooks.write_metrics(metrics)
        progress.step(_report(metrics, num_steps, seconds))
        if _after_step(model, done, hooks, stop, num_steps=num_steps, checkpoint_every=train.checkpoint_every):
            return done
    return max(start_step, num_steps)


def _gradient_that_fits(
    attempt: Callable[[], StepGradient], undo: Callable[[], None], loader: StepLoader, hooks: Hooks, step: int
) -> StepGradient:
    """Attempt the step's gradient, again in smaller micro-batches as long as memory runs out."""
    while True:
        if hooks.begin_step is not None:
            hooks.begin_step(step)
        found = attempt()
        if found.shortage is None:
            return found
        undo()
        backoff = back_off(loader, found.shortage)
        if backoff is None:
            return found
        hooks.write_metrics({"step": step + 1, "out_of_memory": backoff})
        text = "Step %d: out of memory. Micro-batches shrink from %s to %s tokens, the steps keep their examples. (%s)"
        logger.warning(text, step + 1, *backoff.values())


def _after_step(
    model: nn.Module, done: int, hooks: Hooks, stop: StopRequest, *, num_steps: int, checkpoint_every: int | None
) -> bool:
    """Probe, evaluate and save when due; returns whether the run ends before its last step.

    The checkpoint comes last, so that it covers the evaluation's line. If an evaluation fails, a checkpoint is written
    before its error is raised.
    """

    def due(every: int | None) -> bool:
        return bool(every) and done % (every or 1) == 0

    last = done == num_steps
    found = Evaluated({})
    try:
        if hooks.probe is not None and due(hooks.probe_every):
            hooks.probe(done)
        if hooks.evaluate is not None and due(hooks.evaluate_every) and not last:
            found = hooks.evaluate(done)
            hooks.write_metrics({"step": done, **found.line})
            model.train()
    except (RuntimeError, OSError):
        hooks.save(done)
        raise
    stopping = stop.agreed()
    saved = hooks.save(done) if last or due(checkpoint_every) or stopping or found.save or found.stop else None
    if stopping and saved is not None and not last and not found.stop:
        raise Interrupted(done, saved)
    return found.stop


def _skipped(found: StepGradient, reason: str, number: int, hooks: Hooks) -> None:
    """Report a step that was not applied, and keep its examples."""
    bad = found.bad_step(number, reason)
    kept = None if hooks.keep_batch is None else hooks.keep_batch(bad)
    numbers = {"reason": reason, "loss": bad.loss, "gradient_norm": bad.gradient_norm}
    hooks.write_metrics({"step": number, "skipped": {**numbers, "num_examples": bad.batch.num_examples}})
    logger.warning("Step %d is skipped: %s.%s", number, reason, "" if kept is None else f" Its examples: {kept}")


def _failed_step(found: StepGradient, reason: str, step: int, hooks: Hooks, bad_steps: BadSteps) -> RunFailure:
    """Keep the state before the step and the batch that broke it; the parameters have not been changed."""
    safe: list[Path | str] = [hooks.save(step)]
    if hooks.keep_batch is not None:
        safe.append(hooks.keep_batch(found.bad_step(step + 1, reason)))
    if found.fault is None:
        reason += f"; the update was not applied. {bad_steps.advice}, then resume with --resume."
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
