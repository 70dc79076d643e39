"""A run in training: its loop, and the one owner of all that its steps change.

If memory runs out, a step is computed again in smaller micro-batches; if its numbers are bad, it is not applied. All
processes of a run call every method for the same step; the first one writes the files.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qdora.data.batches import Step, StepLoader
from qdora.data.example import Example
from qdora.errors import Diverged, Interrupted, RunFailure, UserError, first_line
from qdora.files.atomic import json_bytes, read_json_object
from qdora.files.console import consoles
from qdora.files.run_directory import RunDirectory, checkpoint_fault, unharmed
from qdora.files.tensor_file import write_tensors
from qdora.model.build_model import write_adapter
from qdora.model.inject import adapted_layers
from qdora.recipe.recipe_file import settings
from qdora.recipe.settings import Recipe
from qdora.train import checkpoint, evals, guards, logs, passes
from qdora.train.distributed import Processes, StopRequest, seed_of, stop_on_signal
from qdora.train.gates import Gates
from qdora.train.optimizer import AdapterOptimizer, optimizer_of
from qdora.train.passes import Metrics

logger = logging.getLogger("qdora")


@dataclass
class _Gradient:
    """A step's gradient, which lies in the parameters' `grad` unless it could not be computed."""

    batch: Step
    metrics: Metrics = field(default_factory=dict)
    # (examples,) of each of this process's micro-batches
    example_nll: list[Tensor] = field(default_factory=list)
    fault: str | None = None  # why it could not be computed
    shortage: passes.Shortage | None = None  # the micro-batch that did not fit into memory


class Trainer:
    """Trains a model with adapters by a recipe; `validation` has the validation examples of each source. `step` counts
    the steps done, skipped ones too."""

    def __init__(
        self,
        recipe: Recipe,
        directory: RunDirectory,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        loader: StepLoader,
        num_steps: int,
        *,
        validation: Mapping[str, Sequence[Example]] | None = None,
        processes: Processes = Processes(),
        console: Console | None = None,
        optimizer: AdapterOptimizer | None = None,
    ) -> None:
        self.recipe, self.directory, self.processes = recipe, directory, processes
        self.model, self.tokenizer, self.loader = model, tokenizer, loader
        self.num_steps, self.step = num_steps, 0
        self.console = console or consoles()[0]
        self.stop = StopRequest(processes)
        self.trains = recipe.adapter.kind != "none"
        self.gates: Gates | None = None
        if recipe.adapter.gates is not None:
            self.gates = Gates(adapted_layers(model), recipe.adapter.gates, num_steps, recipe.train.seed)
        self.optimizer = optimizer or optimizer_of(recipe, model)
        processes.share_first_(list(self.optimizer.parameters.values()))
        self.schedule, self.backoff = guards.Schedule(recipe.train, num_steps), guards.Backoff(loader)
        self.bad_steps = guards.BadSteps(recipe.train)
        self.loss_scale = passes.LossScale() if model.dtype == torch.float16 else None
        validation = validation or {}
        evaluated = {name: validation[name] for name in evals.evaluated_sources(recipe, validation)}
        self.best = evals.best_so_far(recipe, evaluated) if self.trains else None
        written = directory if processes.is_first else None
        self.evaluations = evals.StepEvaluations(recipe, written, model, tokenizer, evaluated, self.console)
        self._probed = logs.probe_examples(recipe, tokenizer, validation)
        self._missing_gradients = guards.MissingGradientCheck(self.optimizer)
        self._task_weights = passes.task_weights(recipe, loader)
        self._loss_chunk = None if recipe.memory.loss_chunk == "auto" else recipe.memory.loss_chunk
        # States of loader and generators before a step
        self._before: tuple[dict[str, Any], dict[str, Tensor]] = ({}, {})
        self._tell_trackers: Callable[[Metrics], None] = lambda _metrics: None

    def run(self) -> None:
        """Take the steps that are left, evaluate and save. adapter/ gets the best step, or by default the last one."""
        asked = self.recipe.eval
        if self.gates is not None and self.step == 0:
            self.gates.check_budget()
        with ExitStack() as stack:
            if self.processes.is_first:
                opened = logs.tracking(self.recipe.trackers, self.directory.path, settings(self.recipe))
                self._tell_trackers = stack.enter_context(opened)
                stack.callback(self._conclude)
            if self.step == 0 and asked.at_start and self.evaluations.examples:
                start = partial(self.evaluations.measure, 0, self.evaluations.start)
                self.write_metrics({"step": 0, **evals.evaluate_together(self.processes, start)})
            if self.trains and self.step < self.num_steps and not self.is_over:
                self._take_steps()
            if self.trains and self.best is None:
                self._save_final()  # before the evaluation, which may fail
            if asked.at_end and self.evaluations.examples and self.num_steps > 0 and not self.is_over:
                self.evaluate()
            if self.best is not None:  # after the last evaluation, which may be the best
                if self.is_over:
                    text = "Stopped early after step %d of %d: the last %d evaluations were not better (eval.patience)."
                    logger.info(text, self.step, self.num_steps, self.best.num_since)
                self._save_final()

    def _take_steps(self) -> None:
        logged = self.recipe.train.log_every, self.recipe.eval.every
        bar = logs.TrainingProgress(self.num_steps, start=self.step, console=self.console)
        with stop_on_signal(self.processes) as self.stop, bar as progress:
            self.model.train()
            was_measured = partial(evals.was_measured, self.directory, self.step)
            if self._evaluates and self.step > 0 and not self.processes.from_first(was_measured):
                self.evaluate_and_save()  # what a stop has left out
            while self.step < self.num_steps and not self.is_over:
                metrics = self.one_step()
                if "skipped" not in metrics and any(map(self.due, logged)):
                    self.write_metrics(metrics)
                progress.step(metrics)
                self.evaluate_and_save()
            if self.stop.agreed():  # in the last step: before the last evaluation
                raise Interrupted(self.step, self.directory.checkpoint_path(self.step))

    def due(self, every: int | None) -> bool:
        """Whether something is done after the present step; everything is after the last one."""
        return self.step == self.num_steps or (every is not None and self.step % every == 0)

    @property
    def _evaluates(self) -> bool:
        every, is_last = self.recipe.eval.every, self.step == self.num_steps
        return every is not None and self.due(every) and not is_last and bool(self.evaluations.examples)

    @property
    def is_over(self) -> bool:
        """Whether the evaluations ended the run before its last step."""
        return self.best is not None and self.best.is_over and self.step < self.num_steps

    @property
    def evaluates_again(self) -> bool:
        """Whether a run that goes on here evaluates the present step, which it may have done before."""
        asked = self.recipe.eval
        return (self.step == 0 and asked.at_start) or (self.step == self.num_steps and asked.at_end)

    def evaluate_and_save(self) -> None:
        """Evaluate and save when due; Interrupted after a requested stop.

        After a stop only the checkpoint is written, since a launcher soon kills the processes. Else the checkpoint
        comes last, so that it covers the evaluation's line.
        """
        if self.step < self.num_steps and self.stop.agreed():
            raise Interrupted(self.step, self.save())
        is_better = is_stopping = False
        if self._evaluates:
            try:
                is_better = self.evaluate()
            except (RuntimeError, OSError, UserError):
                if self.processes.size == 1:
                    with suppress(RuntimeError, OSError):  # after some CUDA errors every call fails
                        self.save()
                raise
            is_stopping = self.stop.agreed()  # in the meantime
        if is_better or is_stopping or self.is_over or self.due(self.recipe.train.checkpoint_every):
            saved = self.save()
            if is_stopping and not self.is_over:
                raise Interrupted(self.step, saved)

    def evaluate(self) -> bool:
        """Measure the present state and write its line of metrics; returns whether it is the best so far."""
        step, every, is_better = self.step, self.recipe.interference.every, False
        line = evals.evaluate_together(self.processes, lambda: self.evaluations.measure(step))
        if every is not None and step % every == 0:
            cosines = partial(
                logs.measure,
                self.model,
                self._probed,
                self.loader.batching,
                self.optimizer.parameters,
                loss_chunk=self._loss_chunk,
                loss_scale=self.loss_scale,
            )
            line["interference"] = cosines() if self.processes.shards else self.processes.first(cosines)
        if self.best is not None:
            results = self.evaluations.results
            value = self.processes.from_first(lambda: evals.selection_value(self.recipe, results["adapter"]))
            is_better = self.best.judge(step, value)
            line["best"] = {name: getattr(self.best, name) for name in ("step", "value", "num_since")}
        self.write_metrics({"step": step, **line})
        self.model.train()
        return is_better

    def one_step(self) -> Metrics:
        """One gradient and one update, which is not made if the step is bad and skipped. Returns the step's numbers."""
        began, number = time.perf_counter(), self.step + 1
        self._before = self.loader.state_dict(), checkpoint.random_state()
        gradient = self._gradient_that_fits()
        lr = self.schedule.rate(self.step)
        metrics = {"step": number, "lr": lr, **gradient.metrics}
        loss, norm = metrics["loss"], metrics["gradient_norm"]
        fault = gradient.fault or self.bad_steps.fault(loss, norm)
        if fault is None:
            clip = self.recipe.train.clip
            if clip is not None and norm > clip:
                self.optimizer.scale_gradients_(clip / norm)
            try:
                self.optimizer.step(lr)
            except (RuntimeError, MemoryError) as error:  # a part of the update may be made: it is not saved
                text = f"step {number}: the update cannot be computed: {first_line(error)}"
                raise RunFailure(text, safe=self.directory.what_is_safe()) from error
            self.bad_steps.applied(loss)
            self.step = number
            self._check_gradients()
            if self.loss_scale is not None:
                self.loss_scale.applied()
        else:
            kept = self._keep_batch(fault, gradient)
            if gradient.fault is not None or not self.bad_steps.skip():
                kind, text, safe = RunFailure, f"step {number}: {fault}", [kept]
                if gradient.fault is None:
                    kind = Diverged
                    text += f"; the update was not applied. {self.bad_steps.advice(kept)}"
                try:  # after some CUDA errors all calls fail
                    self._restore()
                    safe = [self.save(), kept]
                except (RuntimeError, OSError) as second:
                    text += f" The state before it could not be saved ({first_line(second)})."
                raise kind(text, safe=safe)
            skipped = {
                "reason": fault,
                "loss": loss,
                "gradient_norm": norm,
                "num_examples": gradient.batch.num_examples,
            }
            self.write_metrics({"step": number, "skipped": skipped})
            metrics["skipped"] = skipped
            logger.warning("Step %d is skipped: %s. Its examples: %s", number, fault, kept)
        self.step = number
        self.optimizer.zero_grad()
        if self.gates is not None:
            metrics |= self.gates.end(number - 1, fault is None, self.optimizer, self.processes)
        metrics["time"] = {"step_seconds": time.perf_counter() - began, **logs.peaks(self.processes)}
        return metrics

    def _gradient_that_fits(self) -> _Gradient:
        scale = None if self.loss_scale is None else self.loss_scale.value
        while True:
            if self.gates is not None:
                self.gates.begin(self.step)
            gradient = self._gradient()
            if gradient.shortage is not None:
                self._restore()
                if (shrunk := self.backoff.shrink(gradient.shortage)) is None:
                    return gradient
                self.write_metrics({"step": self.step + 1, "out_of_memory": shrunk})
                text = "Step %d: out of memory. Micro-batches shrink from %s to %s tokens. (%s)"
                logger.warning(text, self.step + 1, *shrunk.values())
                continue
            if self.loss_scale is None or scale is None:
                return gradient
            metrics = gradient.metrics
            metrics["loss_scale"] = self.loss_scale.value
            if not math.isfinite(metrics["loss"]) or math.isfinite(metrics["gradient_norm"]):
                return gradient
            if not self.loss_scale.halve():
                self.loss_scale.value = scale  # the batch is bad, not the scale
                return gradient
            self._restore()

    def _gradient(self) -> _Gradient:
        processes, alone = self.processes, self.processes.size == 1
        try:
            gradient = _Gradient(self.loader.next_step())
        except (
            Exception
        ) as error:  # whatever a file, a connection or a decoder raises: the state before it is saved
            reason = "; ".join(error.faults) if isinstance(error, UserError) else repr(error)
            self._restore()
            safe = [self.save()] if alone else []
            raise RunFailure(f"step {self.step + 1}: {reason.removesuffix('.')}.", safe=safe) from error
        try:
            gradient.metrics, gradient.example_nll = passes.step_gradient(
                self.model,
                passes.even_passes(gradient.batch, processes),
                loss_chunk=self._loss_chunk,
                weights=self._task_weights,
                loss_scale=self.loss_scale,
                norm=self.optimizer.gradient_norm if alone else None,
            )
        except RuntimeError as error:
            if processes.shards:
                raise  # the others wait for a part of the base, and cannot be told
            if isinstance(error, passes.OutOfMemory):
                gradient.shortage = error.shortage
            else:
                gradient.fault = f"cannot be computed: {first_line(error)} The update was not applied."
        per_rank = processes.gather((gradient.fault, gradient.shortage, gradient.metrics))
        faults = [
            fault if alone else f"process {rank}: {fault}"
            for rank, (fault, _, _) in enumerate(per_rank)
            if fault
        ]
        if shortages := [short for _, short, _ in per_rank if short]:
            # Among all processes the one that leaves least to cut.
            gradient.shortage = min(shortages, key=lambda short: (short.num_examples > 1, short.num_tokens))
            faults = [gradient.shortage.fault()]
        if faults:
            gradient.fault, gradient.metrics = faults[0], {"loss": math.nan, "gradient_norm": math.nan}
        elif not alone:
            processes.sum_gradients_(list(self.optimizer.parameters.values()))
            first, *others = (metrics for _, _, metrics in per_rank)
            for metrics in others:
                first["loss"] += metrics["loss"]
                for name, numbers in metrics["tasks"].items():
                    first["tasks"][name]["nll_sum"] += numbers["nll_sum"]
            gradient.metrics = {"gradient_norm": float(self.optimizer.gradient_norm()), **first}
        return gradient

    def _check_gradients(self) -> None:
        """Say, after the first updates, which tensors had no gradient. With streamed blocks that ends the run."""
        if not (missing := self._missing_gradients.updated()):
            return
        total = len(self.optimizer.parameters)
        text = (
            f"in 3 updates {len(missing):,} of {total:,} trainable tensors had no gradient, e.g. {missing[0]}."
        )
        if self.recipe.base.residency != "device":
            fix = "Fix: train with base.residency: device in a new run, and report it."
            raise RunFailure(f"step {self.step}: {text} {fix}", safe=[self.save()])
        if self.processes.is_first:
            logger.warning("%s That is usual only for experts that no token has chosen yet.", text)

    def _restore(self) -> None:
        self.optimizer.zero_grad()
        self.loader.load_state_dict(self._before[0])
        checkpoint.set_random_state(self._before[1])

    def _conclude(self) -> None:
        for part in self.loader.streams:
            if (here := part.position).num_bad:
                text = "%s: %d faulty rows were skipped: %s"
                logger.warning(text, part.name, here.num_bad, "; ".join(here.bad_rows))
        logs.draw_figures(self.directory.metrics(), self.directory.inside("figures"))

    def write_metrics(self, metrics: Metrics) -> None:
        """Add a line to metrics.jsonl and send it to the trackers."""
        if self.processes.is_first:
            self.directory.append_metrics(metrics)
        self._tell_trackers(metrics)

    def save(self) -> Path:
        """Write a checkpoint of the present state and remove the oldest ones. Returns its directory."""
        self.processes.require_equal(self.optimizer.parameters)
        random = self.processes.gather(checkpoint.random_state())
        if self.processes.is_first:
            with self.directory.checkpoint_directory(self.step) as directory:
                self._write_trained(directory, directory / "adapter")
                if self.gates is not None:
                    self.gates.save(directory)
                self._write_state(directory, random)
        prune, keep = self.directory.prune_checkpoints, self.recipe.train.keep_checkpoints
        self.processes.first(lambda: prune(keep, checkpoint.best_step_in))
        return self.directory.checkpoint_path(self.step)

    def _write_state(self, directory: Path, random: Sequence[Mapping[str, Tensor]]) -> None:
        """Everything but the parameters; `random` is the `random_state` of every process."""
        write_tensors(directory / "optimizer.safetensors", self.optimizer.state_tensors())
        generators = {  # of the first process without a number
            f"{kind}.{rank}".removesuffix(".0"): state
            for rank, states in enumerate(random)
            for kind, state in states.items()
        }
        write_tensors(directory / "random.safetensors", generators)
        policies = {
            "micro_batch_tokens": self.backoff,
            "schedule": self.schedule,
            "bad_steps": self.bad_steps,
            "loss_scale": self.loss_scale,
            "best": self.best,
            "gates": self.gates,
        }
        state = {
            "format": checkpoint.FORMAT,
            "step": self.step,
            "loader": self.loader.state_dict(),
            "policies": {
                key: checkpoint.state_of(policy) for key, policy in policies.items() if policy is not None
            },
        }
        (directory / "state.json").write_text(json.dumps(state, allow_nan=False) + "\n")

    def _write_trained(self, directory: Path, adapter: Path) -> None:
        if self.recipe.adapter.kind == "full":
            write_tensors(directory / checkpoint.PARAMETERS_FILE, self.optimizer.parameters)
            return
        extra = None
        if self.gates is not None:
            self.gates.settle()  # after a failed step they have their drawn values
            extra = {"gates": self.gates.record()}
        write_adapter(self.model, self.recipe, adapter, extra=extra)

    def _save_final(self) -> None:
        if not self.processes.is_first:
            return
        if self.best is None or self.best.step is None:
            with self.directory.result_directory("adapter") as directory:
                self._write_trained(directory, directory)
        else:
            best = self.directory.checkpoint_path(self.best.step)
            if fault := checkpoint_fault(best):
                raise RunFailure(f"{best}: the best checkpoint is not whole any more: {fault}.")
            is_full = self.recipe.adapter.kind == "full"
            files = [best / checkpoint.PARAMETERS_FILE] if is_full else sorted((best / "adapter").iterdir())
            with self.directory.result_directory("adapter") as directory:
                for file in files:
                    shutil.copyfile(file, directory / file.name)
                record = {**checkpoint.state_of(self.best), "num_done": self.step, "num_steps": self.num_steps}
                (directory / evals.BEST_FILE).write_bytes(json_bytes(record, indent=2))
        with unharmed(logs.TRAINED_FILE):
            layers = [
                {"path": path, **logs.layer_facts(layer)} for path, layer in adapted_layers(self.model).items()
            ]
            self.directory.write_json(logs.TRAINED_FILE, {"step": self.step, "layers": layers})

    def _keep_batch(self, reason: str, gradient: _Gradient) -> Path:
        """Write bad-steps/step-N/batch.json: the examples of a step that was not applied, of all processes."""
        mine = guards.batch_examples(gradient.batch, gradient.example_nll)
        examples = [example for theirs in self.processes.gather(mine) for example in theirs]
        parts = "bad-steps", f"step-{self.step + 1}"
        if self.processes.is_first:
            numbers = {name: gradient.metrics[name] for name in ("loss", "gradient_norm")}
            texts = [{"text": self.tokenizer.decode(example["input_ids"]), **example} for example in examples]
            document = {"step": self.step + 1, "reason": reason, **numbers, "examples": texts}
            with self.directory.result_directory(*parts) as directory:
                (directory / "batch.json").write_bytes(json_bytes(document, indent=1))
        return self.directory.inside(*parts)

    def restore(self, path: Path) -> None:
        """Go on from a checkpoint whose adapter is already in the model."""
        if self.recipe.adapter.kind == "full":
            tensors = load_file(path / checkpoint.PARAMETERS_FILE)
            checkpoint.copy_parameters(tensors, self.optimizer.parameters)
        state = read_json_object(path / "state.json")
        if state.get("format") != checkpoint.FORMAT:
            raise UserError(
                f"{path}: is no checkpoint of this version of qdora (format {state.get('format')})."
            )
        self.loader.load_state_dict(state["loader"])
        self.optimizer.load_state_tensors(load_file(path / "optimizer.safetensors"))
        self.step, states = state["step"], state["policies"]
        tensors, rank = load_file(path / "random.safetensors"), self.processes.rank
        before = sum(name.startswith("cpu") for name in tensors)
        if before != self.processes.size:
            text = "The checkpoint is from %d processes, this run has %d: same data, different dropout."
            logger.warning(text, before, self.processes.size)
        if rank < before:
            names = {kind: f"{kind}.{rank}".removesuffix(".0") for kind in ("cpu", "cuda")}
            checkpoint.set_random_state(
                {kind: tensors[name] for kind, name in names.items() if name in tensors}
            )
        else:
            torch.manual_seed(seed_of(self.recipe.train.seed, rank, self.step))
        self.backoff.resume(states["micro_batch_tokens"])
        self.schedule.warmup = states["schedule"]["warmup"]
        vars(self.bad_steps).update(states["bad_steps"])
        if self.loss_scale is not None:
            vars(self.loss_scale).update(states["loss_scale"])
        if self.best is not None:
            end = 0 if self.evaluates_again else self.step
            former = partial(evals.former_best, self.best, self.recipe, self.directory, states.get("best"), end)
            vars(self.best).update(self.processes.from_first(former))
        if self.gates is not None:
            self.gates.load(path, states["gates"])
        logger.info("Continuing from %s.", path)
        start = self.directory.evaluation_file(0)
        if start.is_file():
            self.evaluations.results[self.evaluations.start] = evals.read_result(start)
