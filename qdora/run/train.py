"""qdora train: the story of a run. Plan, load, adapt, fit, evaluate, save."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from qdora.errors import DiskFull, Interrupted, UserError, first_line
from qdora.files.atomic import disk_failures
from qdora.files.console import consoles
from qdora.files.run_directory import Checkpoint, failures_logged, log_to, only_process, open_run
from qdora.files.user_paths import check_text
from qdora.memory.oom import keep_freed_memory
from qdora.model.build_model import adapt
from qdora.model.patches import weights_unread
from qdora.recipe.recipe_file import load_recipe
from qdora.recipe.settings import Recipe
from qdora.run.active_run import ActiveRun
from qdora.run.open_directory import newest_checkpoint, open_directory
from qdora.run.prepare import prepare, show_plans
from qdora.run.pruned_base import SharedBases, base_of_run
from qdora.run.recorded_base import with_revisions_of
from qdora.run.run_page import leave_page
from qdora.run.start_checks import check_model
from qdora.run.trainer import Trainer
from qdora.train.distributed import Processes, processes_of_launch, seed_of
from qdora.train.hooks import Hooks
from qdora.train.interrupt import StopRequest, stop_on_signal
from qdora.train.loop import after_step, fit
from qdora.train.optimizer import AdapterOptimizer
from qdora.train.progress import TrainingProgress
from qdora.train.task_weights import task_weights

logger = logging.getLogger("qdora")


def train_run(
    recipe: Recipe,
    directory: Path,
    *,
    where: str = "recipe",
    resume: bool = False,
    force: bool = False,
    console: Console | None = None,
    shared_bases: SharedBases | None = None,
) -> dict[str, Any]:
    """Run a recipe to its end. Under torchrun or `accelerate launch` the run is data-parallel over their processes.

    Args:
        recipe: What to do.
        directory: The run directory: new, or with `resume` that of an earlier run of the same recipe.
        where: Name of the recipe in messages.
        resume: Continue from the newest whole checkpoint, or from the start where there is none.
        force: Start although the plan is over memory.budget.
        console: Where progress and results are shown; default: standard error and standard output.
        shared_bases: Keeps pruned bases that several runs share.
    Returns:
        JSON values: the run directory, steps, last loss, evaluations. Empty in all processes but the first.
    Raises:
        UserError, RunFailure, Interrupted: See `qdora.errors`.
    """
    with processes_of_launch() as processes, ExitStack() as stack:
        last = stack.enter_context(ExitStack())  # closed last, so that the page has the failure, which log.txt gets
        if processes.is_first:
            stack.enter_context(failures_logged(directory, "train"))
        stack.enter_context(disk_failures(directory))
        progress, results = consoles(console if processes.is_first else Console(quiet=True))
        keep_freed_memory()
        check_text(directory, "choose another --run-dir")
        if resume:
            recipe = with_revisions_of(recipe, load_recipe(open_run(directory).recipe_file))
        prepared = prepare(recipe, directory, processes, where=where, force=force)
        processes = processes.dividing(prepared.recipe.train.divides_base)
        processes.first(lambda: stack.enter_context(only_process(directory, resume=resume)))
        run = open_directory(prepared, directory, processes, resume=resume)
        if processes.is_first:
            last.enter_context(log_to(run))
            last.callback(leave_page, run)
        show_plans(prepared, run, processes, progress)
        torch.manual_seed(seed_of(recipe.train.seed, processes.rank))
        checkpoint = newest_checkpoint(run, processes) if resume else None
        model = base_of_run(prepared, run, processes, progress, resume=resume, shared=shared_bases)
        stack.enter_context(weights_unread(model))
        adapter = None if checkpoint is None else checkpoint.path / "adapter"
        adapt(model, prepared.recipe, prepared.source, prepared.tokenizer, adapter=adapter)
        prepared.loader.batching.packed = check_model(
            model,
            run,
            processes,
            packs=prepared.recipe.data.packing,
            sources=prepared.loader.tokenised,
            tokenizer=prepared.tokenizer,
        )
        active = ActiveRun(
            recipe=prepared.recipe,
            directory=run,
            model=model,
            tokenizer=prepared.tokenizer,
            loader=prepared.loader,
            num_steps=prepared.num_steps,
            processes=processes,
            console=progress,
        )
        return _train(Trainer(active, prepared.validation), checkpoint, results)


@contextmanager
def _reported(processes: Processes) -> Iterator[None]:
    """After an error the first of several processes ignores SIGTERM, so that it can report: another one ended first."""
    try:
        yield
    except Exception:
        if processes.size > 1 and processes.is_first:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise


def _train(trainer: Trainer, checkpoint: Checkpoint | None, results: Console) -> dict[str, Any]:
    """Fit, evaluate and save from the checkpoint on; returns the summary."""
    active = trainer.active
    start = 0 if checkpoint is None else trainer.restore(checkpoint.path)
    again = trainer.evaluates_again(start)
    active.processes.first(lambda: active.directory.truncate_metrics(start, evaluates_again=again))
    try:
        with trainer.recorded(start), _reported(active.processes):
            trainer.evaluate_start()
            if trainer.state.optimizer is not None and start < active.num_steps and not trainer.is_over:
                trainer.num_done = _fit(trainer, trainer.state.optimizer, start)
            trainer.evaluate_and_save()
        return active.processes.first(lambda: trainer.conclude(results)) or {}
    except KeyboardInterrupt:
        newest = active.directory.newest_checkpoint()
        step, path = (0, None) if newest is None else (newest.step, newest.path)
        raise Interrupted(step, path, saved=False) from None


def _fit(trainer: Trainer, optimizer: AdapterOptimizer, start: int) -> int:
    """Measure what a stop after `start` steps left out, and take the steps after it; returns the steps done."""
    active, state, chunk = trainer.active, trainer.state, trainer.active.recipe.memory.loss_chunk
    hooks = trainer.hooks(optimizer)
    bar = TrainingProgress(active.num_steps, start=start, console=active.console)
    with stop_on_signal(active.processes) as stop, bar as progress:
        if _measure_left_out(trainer, hooks, start, stop):
            return _ended(trainer, start, stop)
        done = fit(
            active.model,
            optimizer,
            active.loader,
            active.recipe.train,
            hooks,
            num_steps=active.num_steps,
            device=active.model.device,
            progress=progress,
            stop=stop,
            start_step=start,
            processes=active.processes,
            bad_steps=state.bad_steps,
            backoff=state.backoff,
            schedule=state.schedule,
            loss_scale=state.loss_scale,
            loss_chunk=None if chunk == "auto" else chunk,
            task_weights=task_weights(active.recipe, active.loader),
        )
        return _ended(trainer, done, stop)


def _ended(trainer: Trainer, done: int, stop: StopRequest) -> int:
    """The steps done, unless a stop was asked for in the last of them: Interrupted, before the last evaluation."""
    if stop.agreed():
        raise Interrupted(done, trainer.active.directory.checkpoint_path(done))
    return done


def _measure_left_out(trainer: Trainer, hooks: Hooks, start: int, stop: StopRequest) -> bool:
    """Measure what a stop after `start` steps left out; returns whether the run ends with it."""
    active = trainer.active
    active.model.train()
    if not trainer.left_out(start):
        return False
    options: dict[str, Any] = {"num_steps": active.num_steps, "processes": active.processes}
    try:
        every = active.recipe.train.checkpoint_every
        return after_step(active.model, start, hooks, stop, checkpoint_every=every, **options)
    except (RuntimeError, OSError, UserError) as error:
        if active.processes.size > 1 or isinstance(error, DiskFull):
            raise
        # It may be what ended the run before, and would end each resumed one.
        logger.warning("Step %d cannot be measured; the run goes on: %s", start, first_line(error))
    active.model.train()
    return False
