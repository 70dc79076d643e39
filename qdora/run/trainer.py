"""Train a run whose model is in memory: fit, evaluate, save."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import nn

from qdora.data.batches import MicroBatch, micro_batches
from qdora.data.example import Example
from qdora.data.tokenize import TokenizedExample
from qdora.errors import RunFailure
from qdora.evaluate.generation import generation_table
from qdora.evaluate.suite import compare_table
from qdora.files.atomic import atomic_write_text
from qdora.files.run_directory import unharmed
from qdora.model.build_model import describe_adapters
from qdora.model.inject import adapted_layers, adapter_parameters, model_size
from qdora.model.tokens import trained_parameters
from qdora.run.active_run import ActiveRun, TrainingState
from qdora.run.adapter_step import adapter_record, best_in_words, read_result
from qdora.run.expert_load import ExpertLoad
from qdora.run.interference import measure, probe_examples
from qdora.run.model_card import run_card
from qdora.run.prepare import evaluated_sources
from qdora.run.start_checks import CHECKS_FILE, GRADIENTS, gradient_check, tell_checks, without_gradient
from qdora.run.step_evaluations import StepEvaluations, best_so_far, evaluate_together, selection_value
from qdora.run.writer import RunWriter
from qdora.train.checkpoint import PARAMETERS_FILE, copy_parameters, read_state, unreadable
from qdora.train.figures import draw_figures
from qdora.train.gates import Gates
from qdora.train.hooks import Evaluated, Hooks, Reading
from qdora.train.loss_scale import LossScale
from qdora.train.optimizer import AdapterOptimizer
from qdora.train.out_of_memory import Backoff
from qdora.train.schedule import Schedule
from qdora.train.step_checks import BadSteps, MissingGradientCheck

logger = logging.getLogger("qdora")

LARGE = 10**9
"""Base weights from which a run on a CPU is said to be slow."""


def fresh_state(active: ActiveRun, evaluated: Mapping[str, Sequence[Example]]) -> TrainingState:
    """The state before step 1. The first process sends its adapters to all processes.

    Args:
        active: The run, with adapters in its model.
        evaluated: Source -> its validation examples, of those that are evaluated.
    """
    recipe, settings = active.recipe, active.recipe.train
    policies: dict[str, Any] = {
        "bad_steps": BadSteps(settings),
        "backoff": Backoff(active.loader),
        "schedule": Schedule(settings, active.num_steps),
        "loss_scale": LossScale() if active.model.dtype == torch.float16 else None,
        "expert_load": ExpertLoad(active.model),
    }
    if recipe.adapter.kind == "none":
        return TrainingState(optimizer=None, gates=None, best=None, **policies)
    gates = None
    if recipe.adapter.gates is not None:
        gates = Gates(adapted_layers(active.model), recipe.adapter.gates, active.num_steps, settings.seed)
    ratios = {"lora_B": settings.lr_ratio_B, "magnitude": settings.lr_ratio_magnitude}
    optimizer = AdapterOptimizer(
        adapter_parameters(active.model),
        name=settings.optimizer,
        lr_ratios={part: ratio for part, ratio in ratios.items() if ratio is not None},
        undecayed=() if recipe.adapter.kind == "full" else trained_parameters(active.model),
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
    )
    active.processes.share_first_(list(optimizer.parameters.values()))
    counts = describe_adapters(active.model)
    shown = (f"{counts['num_trainable']:,}", f"{counts['num_layers']:,}")
    logger.info("Training %s parameters on %s adapted layers.", *shown)
    if active.model.device.type == "cpu" and counts["num_adapted"] > LARGE:
        logger.info("Training on %.1f billion weights is slow on a CPU.", counts["num_adapted"] / 1e9)
    return TrainingState(
        optimizer=optimizer,
        gates=gates,
        best=best_so_far(recipe, evaluated),
        **policies,
    )


class Trainer:
    """Trains an active run: optimizer steps, evaluations between them, files in the run directory.

    Args:
        active: The run; its model is on its device, with adapters.
        validation: Source -> its validation examples.
    """

    def __init__(self, active: ActiveRun, validation: dict[str, list[Example]]) -> None:
        self.active = active
        recipe = active.recipe
        evaluated = {name: validation[name] for name in evaluated_sources(recipe, validation)}
        self.validation = StepEvaluations(active, evaluated)
        self._probed = probe_examples(recipe, active.tokenizer, validation)
        self.state = fresh_state(active, evaluated)
        self.writer = RunWriter(active, self.state)
        self.num_done = 0

    def restore(self, checkpoint: Path) -> int:
        """Load the state of a checkpoint whose adapter is already in the model. Returns its step."""
        optimizer, gates = self.state.optimizer, self.state.gates
        assert optimizer is not None
        with unreadable(checkpoint):
            if self.active.recipe.adapter.kind == "full":
                copy_parameters(load_file(checkpoint / PARAMETERS_FILE), optimizer.parameters, checkpoint)
            step, policies = read_state(
                checkpoint,
                optimizer=optimizer,
                load_loader=self.active.loader.load_state_dict,
                processes=self.active.processes,
                seed=self.active.recipe.train.seed,
                draws=self._draws,
            )
            self.writer.take_policies(policies, step)
            if gates is not None:
                gates.load(checkpoint, policies["gates"])
        logger.info("Continuing from %s.", checkpoint)
        self.validation.take_back(self.validation.start, 0)
        self._judge_former_end(step)
        return step

    @property
    def _draws(self) -> bool:
        """Whether a step draws random numbers, for the adapter or in a base with dropout of its own."""
        adapter, model = self.active.recipe.adapter, self.active.model
        of_base = getattr(model.config.get_text_config(), "attention_dropout", 0.0) or any(
            isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules()
        )
        of_gates = adapter.gates is not None and adapter.gates.mode == "hard_concrete"
        return bool(adapter.dropout > 0 or of_gates or of_base)

    def _judge_former_end(self, step: int) -> None:
        """Judge the evaluation after the last step of a run that is extended: it followed that step's checkpoint."""
        best, processes = self.state.best, self.active.processes
        if best is None or best.judged is None or best.judged >= step or self.evaluates_again(step):
            return
        file, known = self.active.directory.evaluation_file(step), self._measured(step)

        def value() -> float | None:
            whole = "eval" in known and file.is_file()
            return selection_value(self.active.recipe, read_result(file)) if whole else None

        found = processes.gather(processes.first(value))[0]
        if found is not None:
            best.judge(step, found)

    def evaluates_again(self, step: int) -> bool:
        """Whether a run that continues after `step` steps evaluates there, which it may have done before."""
        asked = self.active.recipe.eval
        return (step == 0 and asked.at_start) or (step == self.active.num_steps and asked.at_end)

    def left_out(self, start: int) -> bool:
        """Whether the evaluation that was due after `start` steps was not made, since the run stopped."""
        every = self.active.recipe.eval.every
        due = start > 0 and every is not None and start % every == 0 and bool(self.validation.examples)
        return due and "eval" not in self._measured(start)

    def _measured(self, step: int) -> list[str]:
        """The keys of the lines of metrics after `step` steps."""
        run, processes = self.active.directory, self.active.processes
        keys = processes.first(lambda: [key for line in run.metrics() if line["step"] == step for key in line])
        found: list[str] = processes.gather(keys)[0]
        return found

    @contextmanager
    def recorded(self, start: int) -> Iterator[None]:
        """Tell the trackers in the block. At its end draw the figures, however the run ends."""
        self.num_done = start
        if self.state.gates is not None and start == 0:
            self.state.gates.check_budget()
        with self.writer.trackers():
            try:
                yield
            finally:
                if self.active.processes.is_first:
                    with suppress(RunFailure):  # a full disk, which must not hide why the run ends
                        self._report_streams()
                    draw_figures(self.active.directory.metrics(), self.active.directory.inside("figures"))
                    self.state.expert_load.write(self.active.directory)

    def evaluate_start(self) -> None:
        """Evaluate the model before its first step, if the recipe asks for it."""
        if self.num_done == 0 and self.active.recipe.eval.at_start and self.validation.examples:
            found = evaluate_together(self.active.processes, lambda: self.validation.measure(0, self.validation.start))
            self.writer.write_metrics({"step": 0, **found})

    def hooks(self, optimizer: AdapterOptimizer) -> Hooks:
        """What the loop calls between its steps."""
        recipe, gates, processes = self.active.recipe, self.state.gates, self.active.processes
        return Hooks(
            write_metrics=self.writer.write_metrics,
            save=self.writer.save_checkpoint,
            evaluate=self._evaluate if self.validation.examples else None,
            evaluate_every=recipe.eval.every,
            keep_batch=self.writer.keep_batch,
            begin_step=self._begin,
            reading=None if gates is None else Reading(gates.gradient, gates.take_gradient),
            end_step=None if gates is None else partial(gates.end, optimizer=optimizer, processes=processes),
            updated=partial(self._updated, MissingGradientCheck(optimizer)),
        )

    def _begin(self, step: int) -> None:
        """Prepare the step that follows `step` steps."""
        self.state.expert_load.begin()
        if self.state.gates is not None:
            self.state.gates.begin(step)

    def _updated(self, check: MissingGradientCheck, lr: float) -> str | None:
        """Tell, after the first updates, which tensors had no gradient. With streamed blocks that ends the run: a
        backward pass that reads wrong bytes, or none, can leave a finite loss and factors that never change."""
        self.state.expert_load.step()
        missing = check.updated(lr)
        if missing is None:
            return None
        seen = check.num_tensors, check.num_updates
        if missing and self.active.recipe.base.residency != "device":
            fix = "Fix: train with base.residency: device in a new run, and report it."
            return f"{without_gradient(missing, *seen)} {fix}"
        checks = {GRADIENTS: [gradient_check(missing, *seen)]}
        self.active.processes.first(unharmed(CHECKS_FILE)(lambda: tell_checks(self.active.directory, checks)))
        return None

    def evaluate_and_save(self) -> None:
        """Evaluate the state at the end and write adapter/: that of the best step, or by default the last."""
        num_steps, best = self.active.num_steps, self.state.best
        if self.state.optimizer is not None and best is None:
            self._save_final()  # before the evaluation, which may fail
        if self.active.recipe.eval.at_end and self.validation.examples and num_steps > 0 and not self.is_over:
            self.writer.write_metrics({"step": num_steps, **self._evaluate(num_steps).line})
        if best is not None:  # after the last evaluation, which may be the best
            if self.is_over:
                text = "Stopped early after step %d of %d: the last %d evaluations were not better (eval.patience)."
                logger.info(text, self.num_done, num_steps, best.num_since)
            if best.step is not None:
                logger.info("adapter/ is %s.", best_in_words(best.state_dict()))
            self._save_final()

    def _save_final(self) -> None:
        """Write adapter/, and trained.json, which names its step if no best one was chosen."""
        self.writer.save_final(self.num_done)
        self.writer.save_trained(self.num_done)

    def conclude(self, results: Console) -> dict[str, Any]:
        """Write the model card, show the results and return the summary as JSON values. For the first process."""
        active, best = self.active, self.state.best
        run = active.directory
        atomic_write_text(run.inside("README.md"), run_card(run, active.recipe, "final"))
        if best is not None and best.step is not None:
            self.validation.take_back("adapter", best.step)
        if self.validation.results:
            results.print(compare_table(self.validation.results))
        if self.validation.generated:
            results.print(generation_table(self.validation.generated))
        results.print(f"run: {run.path}", soft_wrap=True)
        losses = [line["loss"] for line in run.metrics() if "loss" in line]
        return {
            "run": str(run.path),
            "num_steps": self.num_done,
            "stopped_early": self.is_over,
            "num_skipped": self.state.bad_steps.num_skipped,
            "best": adapter_record(run),
            "final_loss": losses[-1] if losses else None,
            **describe_adapters(active.model),  # gates may have removed components
            "size": asdict(model_size(active.model)),
            "evaluations": {label: result.to_dict() for label, result in self.validation.results.items()},
        }

    @property
    def is_over(self) -> bool:
        """Whether the evaluations ended the run before its last step."""
        best = self.state.best
        return best is not None and best.is_over and self.num_done < self.active.num_steps

    def _evaluate(self, step: int) -> Evaluated:
        """Evaluate after `step` steps, and decide whether that is the best step and whether the run is over."""
        processes, best = self.active.processes, self.state.best
        line = evaluate_together(processes, lambda: self.validation.measure(step))
        every = self.active.recipe.interference.every
        if every is not None and step % every == 0:
            began = time.perf_counter()
            line["interference"] = processes.first_or_all(self._interference)
            line["time"]["interference_seconds"] = time.perf_counter() - began
        if best is None:
            return Evaluated(line)
        found = self.validation.results["adapter"] if processes.is_first else None
        value = None if found is None else selection_value(self.active.recipe, found)
        better = best.judge(step, processes.gather(value)[0])
        state = {key: each for key, each in best.state_dict().items() if key not in ("question", "judged")}
        return Evaluated({**line, "best": state}, save=better, stop=best.is_over)

    def _interference(self) -> dict[str, Any]:
        """Cosines between the tasks' gradients, for the metrics."""
        active, optimizer, chunk = self.active, self.state.optimizer, self.active.recipe.memory.loss_chunk
        assert optimizer is not None

        def batches(examples: list[TokenizedExample]) -> list[MicroBatch]:
            return micro_batches(examples, active.loader.batching, list({example.task: None for example in examples}))

        return measure(
            active.model,
            {name: (batches(found[0::2]), batches(found[1::2])) for name, found in self._probed.items()},
            optimizer.parameters,
            device=active.model.device,
            loss_chunk=None if chunk == "auto" else chunk,
            loss_scale=self.state.loss_scale,
        )

    def _report_streams(self) -> None:
        """Log what the run has seen of each streamed source, and add it to mix.json."""
        run, seen = self.active.directory, {}
        for part in self.active.loader.streams:
            here = part.position
            counts = (here.num_drawn, here.num_truncated, here.num_dropped, here.epoch)
            logger.info("%s: %s examples seen, %s cut, %s dropped, %s complete passes.", part.name, *counts)
            if here.num_bad:
                text = "%s: %d faulty rows were skipped. The first: %s"
                logger.warning(text, part.name, here.num_bad, "; ".join(here.bad_rows))
            names = ("num_examples", "num_truncated", "num_dropped", "num_passes")
            faulty = {"num_bad_rows": here.num_bad, "bad_rows": list(here.bad_rows), "unused": sorted(part.unused)}
            seen[part.name] = dict(zip(names, counts, strict=True)) | faulty
        if seen:
            run.write_json("mix.json", json.loads(run.inside("mix.json").read_bytes()) | {"seen": seen})
