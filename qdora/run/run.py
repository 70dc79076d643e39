"""qdora train, from top to bottom: prepare (run/prepare.py), load, adapt, train (train/trainer.py), conclude."""

from __future__ import annotations

import logging
import shutil
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors import SafetensorError
from transformers import PreTrainedModel

from qdora.data.batches import PackedLayout
from qdora.errors import Interrupted, UserError
from qdora.evaluate.generation import generation_table
from qdora.evaluate.suite import compare_table
from qdora.files.atomic import (
    atomic_directory,
    atomic_write_text,
    disk_failures,
    in_turn,
    link_or_copy,
    read_json_object,
)
from qdora.files.console import bar, consoles
from qdora.files.machine import environment
from qdora.files.run_directory import (
    RunDirectory,
    create_run,
    failures_logged,
    log_to,
    only_process,
    open_run,
    resume_run,
    step_of,
    unharmed,
)
from qdora.memory.oom import keep_freed_memory
from qdora.model.attention import weights_unread
from qdora.model.build_model import adapt, describe_adapters
from qdora.model.inject import model_size
from qdora.model.multimodal import TRAINED_PART, is_multimodal
from qdora.model.store import compressed_layers
from qdora.recipe.recipe_file import load_recipe, resolved_yaml
from qdora.recipe.section import with_settings
from qdora.recipe.settings import Recipe
from qdora.run.base import (
    FOLDER,
    base_record,
    cache_root,
    check_base,
    compress_base,
    compression_key,
    load_base,
    residency_of,
    with_revisions_of,
)
from qdora.run.prepare import PreparedRun, prepare, show_plans, token_checks
from qdora.run.report import PAGE_FILE, run_card, write_page
from qdora.train.distributed import Processes, mesh_of, processes_of_launch, seed_of
from qdora.train.evals import adapter_record, read_result
from qdora.train.guards import Check, check_division, packed_layout
from qdora.train.trainer import Trainer

CHAT_TEMPLATE_FILE = "chat_template.jinja"

logger = logging.getLogger("qdora")


def train_run(
    recipe: Recipe,
    directory: Path,
    *,
    where: str = "recipe",
    resume: bool = False,
    force: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Run a recipe to its end. Under torchrun or `accelerate launch` the run is data-parallel over their processes.

    force: start although the plan is over memory.budget. Returns JSON values in the first process: the run directory,
    steps, last loss, evaluations.
    """
    with processes_of_launch() as processes, ExitStack() as stack:
        # Closed last, so that the page has the failure, which log.txt gets
        last = stack.enter_context(ExitStack())
        if processes.is_first:
            stack.enter_context(failures_logged(directory, "train"))
        stack.enter_context(disk_failures(directory, safe=RunDirectory(directory).what_is_safe))
        progress, results = consoles(console if processes.is_first else Console(quiet=True))
        keep_freed_memory()
        if resume:
            recipe = with_revisions_of(recipe, load_recipe(open_run(directory).recipe_file))
        prepared = prepare(recipe, directory, processes, where=where, force=force)
        processes = processes.dividing(prepared.recipe.train.divides_base)
        processes.first(lambda: stack.enter_context(only_process(directory, resume=resume)))
        run = open_directory(prepared, directory, processes, resume=resume)
        if processes.is_first:
            last.enter_context(log_to(run))
            page = unharmed(PAGE_FILE, f". Fix: qdora report {run.path}")
            last.callback(page(lambda: write_page(run, run.inside(PAGE_FILE))))
        show_plans(prepared, run, processes, progress)

        recipe, tokenizer, loader = prepared.recipe, prepared.tokenizer, prepared.loader
        torch.manual_seed(seed_of(recipe.train.seed, processes.rank))
        checkpoint = None
        if resume and (newest := processes.from_first(run.newest_checkpoint)) is not None:
            checkpoint = run.checkpoints / newest.name
        elif resume and processes.is_first:
            logger.warning("%s has no whole checkpoint: the run begins again at its first step.", run.path)
        model = base_of_run(prepared, run, processes, progress, resume=resume)
        stack.enter_context(weights_unread(model))
        adapter = None if checkpoint is None else checkpoint / "adapter"
        adapt(model, recipe, prepared.source, tokenizer, adapter=adapter)
        loader.batching.packed = check_model(model, processes, prepared)
        trainer = Trainer(
            recipe,
            run,
            model,
            tokenizer,
            loader,
            prepared.num_steps,
            validation=prepared.validation,
            processes=processes,
            console=progress,
        )
        if checkpoint is not None:
            try:
                trainer.restore(checkpoint)
            except UserError:
                raise
            except (LookupError, TypeError, ValueError, AttributeError, OSError, SafetensorError) as error:
                raise UserError(f"{checkpoint}: is no checkpoint of this version of qdora: {error}") from error
        step, again = trainer.step, trainer.evaluates_again
        processes.first(lambda: run.truncate_metrics(step, evaluates_again=again))
        try:
            trainer.run()
            return processes.first(lambda: conclude(trainer, results)) or {}
        except KeyboardInterrupt:
            newest = run.newest_checkpoint()
            raise Interrupted(step_of(newest) if newest else 0, newest, saved=False) from None


def base_of_run(
    prepared: PreparedRun, run: RunDirectory, processes: Processes, console: Console, *, resume: bool
) -> PreTrainedModel:
    """The frozen base of a run. If it is pruned or quantised by GPTQ, the first process does that, with base.cache once
    for all runs with the same key, and all processes read its files in the run directory."""
    recipe, directory = prepared.recipe, run.inside(FOLDER)
    what = recipe, prepared.source, prepared.compute
    mesh = mesh_of(processes, prepared.compute.device, recipe.train.parallel)

    def compress() -> None:
        if resume and directory.is_dir() and run.checkpoint_steps():  # which belong to the base that is there
            return
        key, root = compression_key(*what, prepared.calibration), cache_root(recipe)
        made = directory if root is None else root / key
        with ExitStack() as stack:
            if root is not None:
                stack.enter_context(in_turn(made))
                stack.enter_context(disk_failures(made, "name another directory in base.cache"))
            progress = stack.enter_context(bar(console, "compressing the base"))
            compress_base(*what, prepared.calibration, made, key=key, progress=progress)
        if made != directory:
            with atomic_directory(directory) as unfinished:
                shutil.copytree(made, unfinished, dirs_exist_ok=True, copy_function=link_or_copy)

    compressed = None
    if recipe.base.is_made_once:
        processes.first(compress)
        compressed = compressed_layers(directory)
    with bar(console, "loading the base") as progress:
        return load_base(*what, progress, compressed=compressed, mesh=mesh)


def check_model(model: PreTrainedModel, processes: Processes, prepared: PreparedRun) -> PackedLayout | None:
    """Try the adapted model before its first step; returns how micro-batches are packed. All processes call this."""
    layout, texts = None, []
    if prepared.recipe.data.packing:
        layout, text = packed_layout(model)
        texts.append(text)
    if (divided := check_division(model, processes)) is not None:
        texts.append(divided)
    if processes.is_first:
        checks = [Check("passed", text) for text in texts]
        if not processes.shards:
            checks += token_checks(model, prepared.loader.tokenised, prepared.tokenizer)
        for check in checks:
            check.log()
    return layout


def conclude(trainer: Trainer, results: Console) -> dict[str, Any]:
    """Write the model card, show the results and return the summary as JSON values. For the first process."""
    run, best, evals = trainer.directory, trainer.best, trainer.evaluations
    atomic_write_text(run.inside("README.md"), run_card(run, trainer.recipe, "final"))
    if best is not None and best.step is not None and run.evaluation_file(best.step).is_file():
        evals.results["adapter"] = read_result(run.evaluation_file(best.step))
    if evals.results:
        results.print(compare_table(evals.results))
    if evals.generated:
        results.print(generation_table(evals.generated))
    results.print(f"run: {run.path}", soft_wrap=True)
    losses = [line["loss"] for line in run.metrics() if "loss" in line]
    return {
        "run": str(run.path),
        "num_steps": trainer.step,
        "stopped_early": trainer.is_over,
        "num_skipped": trainer.bad_steps.num_skipped,
        "best": adapter_record(run),
        "final_loss": losses[-1] if losses else None,
        **describe_adapters(trainer.model),  # gates may have removed components
        "size": model_size(trainer.model),
        "evaluations": {label: result.to_dict() for label, result in evals.results.items()},
    }


def open_directory(
    prepared: PreparedRun, directory: Path, processes: Processes, *, resume: bool
) -> RunDirectory:
    """Create the run directory, or with `resume` open it. Its recipe.yaml names the run's copy of a chat template."""
    given, template, run = prepared.given, None, RunDirectory(directory)
    if given.data.chat_template is not None:
        template = str(prepared.tokenizer.chat_template)
        given = with_settings(given, data={"chat_template": CHAT_TEMPLATE_FILE})

    # The whole of a divided base may not fit on the one device of a later command
    residency = residency_of(given if prepared.recipe.train.divides_base else prepared.recipe)
    facts = {**environment(), "chat_date": prepared.chat_date, "residency": residency}
    facts |= {"base": base_record(prepared.source), "num_processes": processes.size}
    # A GGUF file holds a language model alone
    if not prepared.source.is_gguf and is_multimodal(prepared.config):
        facts["trained_part"] = TRAINED_PART

    def opened() -> None:
        if resume:
            before = with_revisions_of(load_recipe(open_run(directory).recipe_file), given)
            check_base(run, prepared.source)
            file = run.inside(CHAT_TEMPLATE_FILE)
            if (
                template is not None
                and run.has_begun
                and file.is_file()
                and file.read_text("utf-8") != template
            ):
                raise UserError(f"{run.path}: data.chat_template differs from {file}. Fix: name that file.")
            steps, state = run.checkpoint_steps(), None  # other data is refused before anything is written
            # A damaged checkpoint: an older one is taken
            with suppress(OSError, ValueError, LookupError, TypeError):
                state = read_json_object(run.checkpoint_path(steps[-1]) / "state.json")["loader"]
            if state is not None:
                prepared.loader.check_state(state)
            if before.data.chat_template is not None:
                before = with_settings(before, data={"chat_template": CHAT_TEMPLATE_FILE})
            resume_run(directory, resolved_yaml(given), facts, before=resolved_yaml(before))
        else:
            create_run(directory, resolved_yaml(given), facts)
        if template is not None:
            atomic_write_text(run.inside(CHAT_TEMPLATE_FILE), template)

    processes.first(opened)
    return run
