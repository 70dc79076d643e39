"""The training loop: micro-batches into one gradient, one update, one line of metrics."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from qdora.data.loader import Step, StepLoader
from qdora.errors import Interrupted, RunFailure
from qdora.train.interrupt import StopRequest
from qdora.train.micro_batch import batch_loss
from qdora.train.optimizer import AdapterOptimizer
from qdora.train.progress import StepReport, TrainingProgress, memory_bytes
from qdora.train.schedule import ScheduleName, learning_rate

Metrics = dict[str, Any]


@dataclass(frozen=True)
class FitSettings:
    """What the loop needs to know.

    Attributes:
        num_steps: Optimizer steps of the whole run.
        lr, schedule, warmup: As in train/schedule.py.
        clip: Largest gradient norm, or None.
        checkpoint_every: Steps between checkpoints, or None for only the last.
        evaluate_every: Steps between evaluations, or None.
        log_every: Steps between lines of metrics; the last step always has one.
    """

    num_steps: int
    lr: float
    schedule: ScheduleName
    warmup: int | float
    clip: float | None = 1.0
    checkpoint_every: int | None = None
    evaluate_every: int | None = None
    log_every: int = 1


@dataclass(frozen=True)
class Hooks:
    """What the loop calls and does not know: where metrics go, how checkpoints are written, what an evaluation is.

    Attributes:
        write_metrics: Takes one finished step's (or evaluation's) numbers.
        save: Writes a checkpoint of the state after `step` steps and returns its directory.
        evaluate: Returns metrics of the model after `step` steps.
        keep_batch: Writes the step whose loss was not finite and returns the file.
    """

    write_metrics: Callable[[Metrics], None]
    save: Callable[[int], Path]
    evaluate: Callable[[int], Metrics] | None = None
    keep_batch: Callable[[Step], Path] | None = None


def fit(
    model: nn.Module,
    optimizer: AdapterOptimizer,
    loader: StepLoader,
    settings: FitSettings,
    hooks: Hooks,
    *,
    accelerator: Accelerator,
    progress: TrainingProgress,
    stop: StopRequest,
    start_step: int = 0,
) -> None:
    """Train from `start_step` to `settings.num_steps`.

    The loss of a step is the summed NLL of all its micro-batches over the labelled tokens of all of them.

    Raises:
        Interrupted: After a requested stop; a checkpoint has been written.
        RunFailure: If the loss or the gradient is not finite; a checkpoint of the state before that step has been
            written.
    """
    model.train()
    seconds: deque[float] = deque(maxlen=20)
    for step in range(start_step, settings.num_steps):
        began = time.perf_counter()
        before, random_before = loader.state_dict(), torch.get_rng_state()
        batch = loader.next_step()
        lr = learning_rate(
            step, settings.num_steps, peak=settings.lr, schedule=settings.schedule, warmup=settings.warmup
        )
        metrics = _gradient_of_step(model, batch, accelerator)
        gradient_norm = float(optimizer.gradient_norm())
        if not (math.isfinite(metrics["loss"]) and math.isfinite(gradient_norm)):
            loader.load_state_dict(before)
            torch.set_rng_state(random_before)
            optimizer.zero_grad()
            raise _not_finite(step, metrics["loss"], gradient_norm, batch, hooks)
        if settings.clip is not None and gradient_norm > settings.clip:
            optimizer.scale_gradients_(settings.clip / gradient_norm)
        optimizer.step(lr)
        optimizer.zero_grad()
        done = step + 1
        seconds.append(time.perf_counter() - began)
        metrics = {"step": done, "lr": lr, "gradient_norm": gradient_norm, **metrics}
        metrics["time"] = {"step_seconds": seconds[-1], "peak_memory_bytes": memory_bytes()}
        if done % settings.log_every == 0 or done == settings.num_steps:
            hooks.write_metrics(metrics)
            accelerator.log({"loss": metrics["loss"], "lr": lr, "gradient_norm": gradient_norm}, step=done)
        progress.step(_report(metrics, settings.num_steps, seconds))
        _after_step(model, done, settings, hooks, stop)


def _gradient_of_step(model: nn.Module, batch: Step, accelerator: Accelerator) -> Metrics:
    """Accumulate the gradient of the step's loss into the parameters; its numbers, with the NLL per task."""
    per_task: dict[str, Tensor] = {}
    device = accelerator.device
    for micro in batch.micro_batches:
        loss = batch_loss(model, micro.input_ids.to(device), micro.attention_mask.to(device), micro.labels.to(device))
        accelerator.backward(loss.nll_sum / batch.num_label_tokens)
        task_ids = micro.task_ids.to(device)
        for index in sorted(set(micro.task_ids.tolist())):
            rows = task_ids == index
            sums = torch.stack(
                [loss.example_nll[rows].sum(), loss.example_tokens[rows].sum().to(loss.example_nll.dtype)]
            )
            name = micro.task_names[index]
            per_task[name] = per_task[name] + sums if name in per_task else sums
    names = sorted(per_task)
    numbers = torch.stack([per_task[name] for name in names]).double().tolist()  # one wait for the device a step
    tasks = {name: {"nll_sum": nll, "num_tokens": int(n)} for name, (nll, n) in zip(names, numbers, strict=True)}
    return {
        "loss": sum(nll for nll, _ in numbers) / batch.num_label_tokens,
        "num_tokens": batch.num_tokens,
        "num_label_tokens": batch.num_label_tokens,
        "num_examples": batch.num_examples,
        "tasks": tasks,
    }


def _after_step(model: nn.Module, done: int, settings: FitSettings, hooks: Hooks, stop: StopRequest) -> None:
    last = done == settings.num_steps
    if hooks.evaluate is not None and settings.evaluate_every and (done % settings.evaluate_every == 0) and not last:
        hooks.write_metrics({"step": done, "eval": hooks.evaluate(done)})
        model.train()
    due = last or (settings.checkpoint_every is not None and done % settings.checkpoint_every == 0)
    saved = hooks.save(done) if due or stop.requested else None
    if stop.requested and saved is not None and not last:
        raise Interrupted(done, saved)


def _not_finite(step: int, loss: float, gradient_norm: float, batch: Step, hooks: Hooks) -> RunFailure:
    """Keep the state before the step and the batch that broke it; the parameters have not been touched."""
    safe: list[Path | str] = [hooks.save(step)]
    if hooks.keep_batch is not None:
        safe.append(hooks.keep_batch(batch))
    what = f"loss {loss}" if not math.isfinite(loss) else f"gradient norm {gradient_norm}"
    return RunFailure(
        f"step {step + 1}: {what} is not finite; the update was not applied. "
        "Lower train.lr or look at the kept batch, then go on with --resume.",
        safe=safe,
    )


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
