"""qdora train: data, base, adapters, loop, evaluation, and a run directory that holds all of it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import PreTrainedModel

from qdora.data.build_data import make_loader, micro_batch_tokens, num_steps_of, read_data, tokenized_mix
from qdora.data.loader import StepLoader
from qdora.data.mix_plan import keep_mix, plan_mix, show_mix
from qdora.errors import Interrupted, UserError
from qdora.evaluation.suite import compare_table
from qdora.files.atomic import atomic_write_text
from qdora.files.console import default_console
from qdora.files.environment import environment
from qdora.files.run_directory import Checkpoint, RunDirectory, create_run, log_to, resume_run
from qdora.memory.allocator import keep_freed_memory
from qdora.model.build_model import (
    choose_compute,
    describe_adapters,
    find_model,
    find_source,
    model_size,
    put_adapters,
    start_adapters,
)
from qdora.model.inject import adapted_layers, adapter_parameters
from qdora.model.load import load_config
from qdora.plan.memory_plan import within_budget
from qdora.plan.plan_view import keep_plan, show_plan
from qdora.plan.workload import workload_of_data
from qdora.recipe.recipe_file import missing_files, resolved_yaml
from qdora.recipe.settings import Recipe
from qdora.run.best_step import adapter_record, best_in_words, best_so_far, selection_value
from qdora.run.load_base import SharedBases, base_of_run, calibration_tokens, keep_residency
from qdora.run.model_card import run_card
from qdora.run.preflight import check_beforehand, evaluated_sources
from qdora.run.task_conflicts import probe_examples, probe_hook, write_interference
from qdora.run.validation import RunValidation
from qdora.run.writer import RunWriter
from qdora.train.checkpoint import PARAMETERS_FILE, copy_parameters, read_state
from qdora.train.distributed import Processes, processes_of_launch, seed_of
from qdora.train.figures import draw_figures
from qdora.train.gates import Gates
from qdora.train.interrupt import stop_on_signal
from qdora.train.loop import Evaluated, Hooks, fit
from qdora.train.optimizer import AdapterOptimizer
from qdora.train.packed_attention import packed_layout
from qdora.train.progress import TrainingProgress
from qdora.train.step_checks import BadSteps, MissingGradientCheck
from qdora.train.task_weights import task_weights

logger = logging.getLogger("qdora")


def train_run(
    recipe: Recipe,
    directory: Path,
    *,
    resume: bool = False,
    force: bool = False,
    console: Console | None = None,
    shared_bases: SharedBases | None = None,
) -> dict[str, Any]:
    """Run a recipe to its end; started by torchrun or `accelerate launch`, data-parallel over their processes.

    Args:
        recipe: What to do.
        directory: The run directory; new, or with `resume` an earlier run of the same recipe.
        resume: Go on from the newest whole checkpoint (from the start where there is none).
        force: Start although the plan is over memory.budget.
        console: Where progress is shown; standard error by default.
        shared_bases: Where several runs keep the pruned bases that they have in common.
    Returns:
        JSON values: the run directory, steps, last loss, evaluations. Empty in all processes but the first.
    Raises:
        UserError, RunFailure, Interrupted: See `qdora.errors`.
    """
    with processes_of_launch() as processes:
        if not processes.is_first:
            console = Console(quiet=True)
        return _train(recipe, directory, resume, force, console or default_console(), processes, shared_bases)


def _train(
    recipe: Recipe,
    directory: Path,
    resume: bool,
    force: bool,
    console: Console,
    processes: Processes,
    shared_bases: SharedBases | None,
) -> dict[str, Any]:
    keep_freed_memory()
    faults = missing_files(recipe, str(directory))
    if faults:
        raise UserError(*faults)
    # Without a plan the weights are fetched first, so that a model that is not there fails before the data is read.
    source, tokenizer = find_model(recipe, weights=recipe.memory.budget is None)
    train, validation = read_data(recipe.data)
    mix = tokenized_mix(recipe, tokenizer, train)
    loader = make_loader(recipe, mix, tokenizer, processes.rank, processes.size)
    num_steps = num_steps_of(recipe, loader)
    plan = plan_mix(mix, loader, num_steps)
    compute = choose_compute(recipe.model.dtype)
    check_beforehand(recipe, compute, validation, num_steps, loader)
    given = recipe
    recipe, memory = within_budget(recipe, compute, workload_of_data(recipe, mix, tokenizer), force=force)
    if memory is not None:
        source = find_source(recipe)
        loader.micro_batch_tokens = micro_batch_tokens(recipe)
    calibration = None if recipe.base.prune is None else calibration_tokens(recipe, tokenizer, mix, load_config(source))
    open_ = resume_run if resume else create_run
    processes.first(lambda: open_(directory, resolved_yaml(given), _environment(processes)))
    run = RunDirectory(directory)
    processes.first(lambda: keep_residency(run, given, recipe))
    with log_to(run) if processes.is_first else nullcontext():
        show_mix(console, plan)
        processes.first(lambda: keep_mix(run, plan))
        if memory is not None:
            show_plan(console, memory)
            processes.first(lambda: keep_plan(run, memory))
        torch.manual_seed(seed_of(recipe.train.seed, processes.rank))
        checkpoint = _newest_checkpoint(run, processes) if resume else None
        model = base_of_run(recipe, source, compute, run, resume, processes, console, calibration, shared_bases)
        put_adapters(model, recipe, None if checkpoint is None else checkpoint.path / "adapter")
        if checkpoint is None:
            start_adapters(model, recipe, source)
        if recipe.data.packing:
            loader.packed = packed_layout(model)
        job = TrainingJob(recipe, run, model, tokenizer, loader, validation, console, num_steps, processes)
        start = job.restore(checkpoint.path) if checkpoint is not None else 0
        again = job.evaluates_again(start)
        processes.first(lambda: run.truncate_metrics(start, evaluates_again=again))
        try:
            return job.go(start)
        except KeyboardInterrupt:
            newest = run.newest_checkpoint()
            step, path = (0, None) if newest is None else (newest.step, newest.path)
            raise Interrupted(step, path, saved=False) from None


def _newest_checkpoint(run: RunDirectory, processes: Processes) -> Checkpoint | None:
    """What the first process finds, so that all go on from the same."""
    found = processes.first(run.newest_checkpoint)
    step = processes.gather(found.step if found else None)[0]
    return None if step is None else Checkpoint(step, run.checkpoint_path(step))


def _environment(processes: Processes) -> dict[str, Any]:
    return environment() | ({} if processes.size == 1 else {"num_processes": processes.size})


class TrainingJob:
    """The pieces of one run, in memory."""

    def __init__(
        self,
        recipe: Recipe,
        run: RunDirectory,
        model: PreTrainedModel,
        tokenizer: Any,
        loader: StepLoader,
        validation: dict[str, Any],
        console: Console,
        num_steps: int,
        processes: Processes,
    ) -> None:
        self.recipe, self.run, self.model, self.tokenizer = recipe, run, model, tokenizer
        self.loader, self.console, self.num_steps = loader, console, num_steps
        self.processes = processes
        evaluated = {name: validation[name] for name in evaluated_sources(recipe, validation)}
        self.validation = RunValidation(recipe, run, model, tokenizer, evaluated, console)
        self.probed = {}
        if recipe.interference.every is not None:
            self.probed = probe_examples(recipe, tokenizer, validation)
        counts = describe_adapters(model)
        self.optimizer: AdapterOptimizer | None = None
        self.gates: Gates | None = None
        if recipe.adapter.kind != "none":
            settings = recipe.train
            if recipe.adapter.gates is not None:
                self.gates = Gates(adapted_layers(model), recipe.adapter.gates, num_steps, settings.seed)
            self.optimizer = AdapterOptimizer(
                adapter_parameters(model),
                name=settings.optimizer,
                lr=settings.lr,
                lr_ratios=_lr_ratios(recipe),
                betas=settings.betas,
                eps=settings.eps,
                weight_decay=settings.weight_decay,
            )
            processes.share_first_(list(self.optimizer.parameters.values()))
            logger.info("Training %s parameters on %s adapted layers.", *(f"{counts[k]:,}" for k in _SHOWN_COUNTS))
        self.best = best_so_far(recipe, list(evaluated)) if self.optimizer is not None else None
        self.num_done = 0
        self.bad_steps = BadSteps(recipe.train)
        self.writer = RunWriter(
            recipe,
            run,
            model,
            tokenizer,
            self.optimizer,
            loader,
            processes,
            self.bad_steps,
            self.best,
            self.gates,
        )

    def restore(self, checkpoint: Path) -> int:
        """Take back a checkpoint whose adapter is already in the model; returns its step."""
        assert self.optimizer is not None
        if self.recipe.adapter.kind == "full":
            stored = load_file(checkpoint / PARAMETERS_FILE)
            copy_parameters(stored, self.optimizer.parameters, checkpoint)
        step, policies = read_state(
            checkpoint,
            optimizer=self.optimizer,
            load_loader=self.loader.load_state_dict,
            processes=self.processes,
            seed=self.recipe.train.seed,
        )
        self.writer.take_policies(policies)
        if self.gates is not None:
            self.gates.load(checkpoint, policies["gates"])
        logger.info("Going on from %s.", checkpoint)
        self.validation.take_back("base", 0)
        return step

    def go(self, start: int) -> dict[str, Any]:
        """Train from step `start`, evaluate, save; returns the summary."""
        self.num_done = start
        if self.gates is not None and start == 0:
            self.gates.check_budget()
        with self.writer.trackers():
            try:
                self._train_and_evaluate(start)
            finally:  # also of a run that is interrupted or fails
                if self.processes.is_first:
                    draw_figures(self.run.metrics(), self.run.inside("figures"))
                    write_interference(self.run)
        return self.processes.first(self._conclude) or {}

    def _train_and_evaluate(self, start: int) -> None:
        settings = self.recipe.eval
        if start == 0 and settings.at_start and self.validation.examples:
            base = self.processes.first(lambda: self.validation.measure(0, "base")) or {}
            self.writer.write_metrics({"step": 0, **base})
        if self.optimizer is not None and start < self.num_steps and not self._is_over():
            self.num_done = self._fit(self.optimizer, start)
            for part in self.loader.streams:
                seen = part.position
                counts = (seen.num_drawn, seen.num_truncated, seen.num_dropped, seen.epoch)
                logger.info("%s: %s examples seen, %s cut, %s dropped, %s passes over.", part.name, *counts)
        if self.optimizer is not None and self.best is None:
            self.writer.save_final(self.num_done, self.num_steps)
        if settings.at_end and self.validation.examples and self.num_steps > 0 and not self._is_over():
            self.writer.write_metrics({"step": self.num_steps, **self._measure(self.num_steps).line})
        if self.best is not None:  # the last evaluation had a say, too
            self._say_best()
            self.writer.save_final(self.num_done, self.num_steps)

    def evaluates_again(self, step: int) -> bool:
        """Whether a run that goes on after `step` steps evaluates that state, though it may have been before."""
        asked = self.recipe.eval
        return (step == 0 and asked.at_start) or (step == self.num_steps and asked.at_end)

    def _is_over(self) -> bool:
        """Whether the evaluations said, before the last step, that it is enough."""
        return self.best is not None and self.best.is_over and self.num_done < self.num_steps

    def _say_best(self) -> None:
        assert self.best is not None
        if self._is_over():
            text = "Stopped early after step %d of %d: %d evaluations in a row brought nothing better."
            logger.info(text, self.num_done, self.num_steps, self.best.num_since)
        if self.best.step is not None:
            logger.info("adapter/ is %s.", best_in_words(self.best.state_dict()))

    def _conclude(self) -> dict[str, Any]:
        self._write_card()
        if self.best is not None and self.best.step is not None:
            self.validation.take_back("adapter", self.best.step)
        if self.validation.results:
            self.console.print(compare_table(self.validation.results))
        self.console.print(f"run: {self.run.path}", highlight=False, soft_wrap=True)
        return self._summary()

    def _fit(self, optimizer: AdapterOptimizer, start: int) -> int:
        chunk = self.recipe.memory.loss_chunk
        hooks = Hooks(
            write_metrics=self.writer.write_metrics,
            save=self.writer.save_checkpoint,
            evaluate=self._measure if self.validation.examples else None,
            evaluate_every=self.recipe.eval.every,
            probe=self._probe(),
            probe_every=self.recipe.interference.every,
            keep_batch=self.writer.keep_batch,
            begin_step=None if self.gates is None else self.gates.begin,
            end_step=None
            if self.gates is None
            else partial(self.gates.end, optimizer=optimizer, processes=self.processes),
            updated=None if self.recipe.base.residency == "device" else MissingGradientCheck(optimizer).updated,
        )
        with (
            stop_on_signal(self.processes) as stop,
            TrainingProgress(self.num_steps, start=start, console=self.console) as progress,
        ):
            return fit(
                self.model,
                optimizer,
                self.loader,
                self.recipe.train,
                hooks,
                num_steps=self.num_steps,
                device=self.model.device,
                progress=progress,
                stop=stop,
                start_step=start,
                processes=self.processes,
                bad_steps=self.bad_steps,
                loss_chunk=None if chunk == "auto" else chunk,
                task_weights=task_weights(self.recipe, self.loader),
            )

    def _probe(self) -> Callable[[int], None] | None:
        if not self.probed or self.optimizer is None:
            return None
        parameters, write = self.optimizer.parameters, self.writer.write_metrics
        return probe_hook(self.recipe, self.model, parameters, self.loader, self.probed, write, self.processes)

    def _measure(self, step: int) -> Evaluated:
        """Evaluate after `step` steps, and judge whether that is the best so far and whether the run is over."""
        line = self.processes.first(lambda: self.validation.measure(step)) or {}
        if self.best is None:
            return Evaluated(line)
        found = self.validation.results["adapter"] if self.processes.is_first else None
        value = None if found is None else selection_value(self.recipe, found)
        better = self.best.judge(step, self.processes.gather(value)[0])
        state = {key: each for key, each in self.best.state_dict().items() if key != "question"}
        return Evaluated({**line, "best": state}, save=better, stop=self.best.is_over)

    def _write_card(self) -> None:
        atomic_write_text(self.run.inside("README.md"), run_card(self.run, self.recipe, "final"))

    def _summary(self) -> dict[str, Any]:
        losses = [line["loss"] for line in self.run.metrics() if "loss" in line]
        return {
            "run": str(self.run.path),
            "num_steps": self.num_done,
            "stopped_early": self._is_over(),
            "num_skipped": self.bad_steps.num_skipped,
            "best": adapter_record(self.run),
            "final_loss": losses[-1] if losses else None,
            **describe_adapters(self.model),  # gates may have removed some since
            "size": asdict(model_size(self.model)),
            "evaluations": {label: result.to_dict() for label, result in self.validation.results.items()},
        }


_SHOWN_COUNTS = ("num_trainable", "num_layers")


def _lr_ratios(recipe: Recipe) -> dict[str, float]:
    """Last part of a parameter's path -> its learning rate in units of train.lr, where the recipe sets one."""
    given = {"lora_B": recipe.train.lr_ratio_B, "magnitude": recipe.train.lr_ratio_magnitude}
    return {part: ratio for part, ratio in given.items() if ratio is not None}
