"""qdora train: the story of a run. Plan, load, adapt, fit, evaluate, save."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedModel

from qdora.errors import Interrupted, UserError
from qdora.files.atomic import atomic_write_text, disk_failures
from qdora.files.console import consoles
from qdora.files.environment import environment
from qdora.files.run_directory import (
    Checkpoint,
    RunDirectory,
    create_run,
    failures_logged,
    log_to,
    only_process,
    resume_run,
    unharmed,
)
from qdora.memory.allocator import keep_freed_memory
from qdora.model.build_model import put_adapters, start_adapters, token_ids
from qdora.model.language_part import TRAINED_PART, is_multimodal
from qdora.model.load import load_config
from qdora.model.source import ModelSource
from qdora.model.trained_embeddings import extend_vocabulary
from qdora.model.written_outputs import keep_written_outputs_, weights_unread
from qdora.recipe.recipe_file import resolved_yaml
from qdora.recipe.settings import Recipe
from qdora.run.active_run import ActiveRun
from qdora.run.load_base import keep_residency
from qdora.run.prepare import PreparedRun, prepare, show_plans
from qdora.run.pruned_base import SharedBases, base_of_run
from qdora.run.run_page import leave_page
from qdora.run.start_checks import CHECKS_FILE, PACKING, Check, tell_checks
from qdora.run.training import Training
from qdora.train.distributed import Processes, processes_of_launch, seed_of
from qdora.train.interrupt import stop_on_signal
from qdora.train.loop import fit
from qdora.train.optimizer import AdapterOptimizer
from qdora.train.packed_attention import packed_layout
from qdora.train.progress import TrainingProgress
from qdora.train.task_weights import task_weights

CHAT_TEMPLATE_FILE = "chat_template.jinja"


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
            stack.enter_context(failures_logged(directory))
        stack.enter_context(disk_failures(directory))
        progress, results = consoles(console if processes.is_first else Console(quiet=True))
        keep_freed_memory()
        prepared = prepare(recipe, directory, processes, where=where, force=force)
        processes.first(lambda: stack.enter_context(only_process(directory, resume=resume)))
        run = _open_directory(prepared, directory, processes, resume=resume)
        if processes.is_first:
            last.enter_context(log_to(run))
            last.callback(leave_page, run)
        show_plans(prepared, run, processes, progress)
        torch.manual_seed(seed_of(recipe.train.seed, processes.rank))
        checkpoint = _newest_checkpoint(run, processes) if resume else None
        model = base_of_run(prepared, run, processes, progress, resume=resume, shared=shared_bases)
        stack.enter_context(weights_unread(model))
        _adapt(model, prepared, checkpoint)
        _choose_packing(model, prepared, run, processes)
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
        return _train(Training(active, prepared.validation), checkpoint, results)


def _open_directory(prepared: PreparedRun, directory: Path, processes: Processes, *, resume: bool) -> RunDirectory:
    """Create the run directory, or with `resume` open it; it holds the recipe as it was given."""
    found = (
        environment()
        | {"chat_date": prepared.chat_date}
        | ({} if processes.size == 1 else {"num_processes": processes.size})
        | ({"trained_part": TRAINED_PART} if _has_other_parts(prepared.source) else {})
    )
    open_ = resume_run if resume else create_run
    given = prepared.given
    if given.data.chat_template is not None:
        given = given.model_copy(update={"data": given.data.model_copy(update={"chat_template": CHAT_TEMPLATE_FILE})})
    processes.first(lambda: open_(directory, resolved_yaml(given), found))
    run = RunDirectory(directory)
    if given.data.chat_template is not None:
        processes.first(lambda: _keep_chat_template(run, str(prepared.tokenizer.chat_template)))
    processes.first(lambda: keep_residency(run, prepared.given, prepared.recipe))
    return run


def _has_other_parts(source: ModelSource) -> bool:
    return not source.is_gguf and is_multimodal(load_config(source))  # a GGUF file holds a language model alone


def _keep_chat_template(run: RunDirectory, text: str) -> None:
    """Copy data.chat_template. The run's recipe.yaml names the copy, so a later change of the file has no effect."""
    file = run.inside(CHAT_TEMPLATE_FILE)
    if run.has_begun and file.is_file() and file.read_text(encoding="utf-8") != text:
        raise UserError(
            f"{run.path}: data.chat_template differs from {file}, with which the run began. Fix: give that."
        )
    atomic_write_text(file, text)


def _newest_checkpoint(run: RunDirectory, processes: Processes) -> Checkpoint | None:
    """The checkpoint that the first process finds: all processes continue from the same one."""
    found = processes.first(run.newest_checkpoint)
    step = processes.gather(found.step if found else None)[0]
    return None if step is None else Checkpoint(step, run.checkpoint_path(step))


def _adapt(model: PreTrainedModel, prepared: PreparedRun, checkpoint: Checkpoint | None) -> None:
    """Give new tokens their rows, and put the adapters on the base: fresh ones, or those of the checkpoint."""
    new_tokens = token_ids(prepared.recipe, prepared.tokenizer)
    extend_vocabulary(model, new_tokens)
    put_adapters(
        model, prepared.recipe, None if checkpoint is None else checkpoint.path / "adapter", new_tokens=new_tokens
    )
    if checkpoint is None:
        start_adapters(model, prepared.recipe, prepared.source)
    keep_written_outputs_(model)


def _choose_packing(model: PreTrainedModel, prepared: PreparedRun, run: RunDirectory, processes: Processes) -> None:
    """Pack as the model's attention takes it, after a trial that examples stay apart, and tell that."""
    text = "examples are not packed: none shares a row with another."
    if prepared.recipe.data.packing:
        prepared.loader.packed, text = packed_layout(model)
    with unharmed(CHECKS_FILE):
        processes.first(lambda: tell_checks(run, {PACKING: [Check("passed", text)]}))


def _train(training: Training, checkpoint: Checkpoint | None, results: Console) -> dict[str, Any]:
    """Fit, evaluate and save from the checkpoint on; returns the summary."""
    active = training.active
    start = 0 if checkpoint is None else training.restore(checkpoint.path)
    again = training.evaluates_again(start)
    active.processes.first(lambda: active.directory.truncate_metrics(start, evaluates_again=again))
    try:
        with training.recorded(start):
            training.evaluate_base()
            if training.state.optimizer is not None and start < active.num_steps and not training.is_over:
                training.num_done = _fit(training, training.state.optimizer, start)
            training.evaluate_and_save()
        return active.processes.first(lambda: training.conclude(results)) or {}
    except KeyboardInterrupt:
        newest = active.directory.newest_checkpoint()
        step, path = (0, None) if newest is None else (newest.step, newest.path)
        raise Interrupted(step, path, saved=False) from None


def _fit(training: Training, optimizer: AdapterOptimizer, start: int) -> int:
    """Take the optimizer steps after `start`; returns the number of steps done."""
    active, state, chunk = training.active, training.state, training.active.recipe.memory.loss_chunk
    bar = TrainingProgress(active.num_steps, start=start, console=active.console)
    with stop_on_signal(active.processes) as stop, bar as progress:
        return fit(
            active.model,
            optimizer,
            active.loader,
            active.recipe.train,
            training.hooks(optimizer),
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
