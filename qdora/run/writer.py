"""What a run writes while it trains: metrics, trackers, checkpoints, the adapter, and the examples of bad steps."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.nn.utils.rnn import pad_sequence

from qdora.data.batches import IGNORED
from qdora.errors import DiskFull, RunFailure
from qdora.files.atomic import json_bytes
from qdora.files.run_directory import checkpoint_fault, unharmed
from qdora.files.tensor_file import write_tensors
from qdora.model.build_model import write_adapter
from qdora.recipe.recipe_file import settings
from qdora.run.active_run import ActiveRun, TrainingState
from qdora.run.adapter_step import BEST_FILE
from qdora.run.experiment_trackers import tracking
from qdora.run.trained_layers import keep_trained
from qdora.train.checkpoint import PARAMETERS_FILE, best_step_in, random_text, write_state
from qdora.train.hooks import Metrics
from qdora.train.step_checks import BadStep

logger = logging.getLogger("qdora")


class RunWriter:
    """Writes for all processes of a run from the first of them; every process calls every method.

    Args:
        active: The run.
        state: What its checkpoints hold beside the adapter.
    """

    def __init__(self, active: ActiveRun, state: TrainingState) -> None:
        self.active, self.state = active, state
        self.run, self.processes = active.directory, active.processes
        self._tell_trackers: Callable[[Metrics], None] | None = None

    @contextmanager
    def trackers(self) -> Iterator[None]:
        """Open the recipe's trackers for the block. Raises as `tracking`."""
        names, on_cpu = self.active.recipe.trackers, self.active.model.device.type == "cpu"
        with ExitStack() as stack:
            opened = tracking(names, self.run.path, settings(self.active.recipe), cpu=on_cpu)
            self._tell_trackers = self.processes.first(lambda: stack.enter_context(opened))
            yield

    def write_metrics(self, metrics: Metrics) -> None:
        """Add a line to metrics.jsonl and send it to the trackers. Raises as `RunDirectory.append_metrics`."""
        self.processes.first(lambda: self._append_metrics(metrics))

    def save_checkpoint(self, step: int) -> Path:
        """Write the state after `step` steps and remove the oldest checkpoints. Returns the directory.

        Raises:
            RunFailure: The processes have different parameters, or the disk cannot be written.
        """
        assert self.state.optimizer is not None
        self.processes.require_equal(self.state.optimizer.parameters)
        random = self.processes.gather(random_text())

        def write() -> None:
            self._with_room(lambda: self._write_checkpoint(step, random))
            self.run.prune_checkpoints(self.active.recipe.train.keep_checkpoints, best_step_in)

        self.processes.first(write)
        return self.run.checkpoint_path(step)

    def save_final(self, num_done: int) -> None:
        """Write adapter/ after `num_done` steps: from the best checkpoint, or from the model if none was chosen.

        Raises:
            RunFailure: The disk cannot be written, or the best checkpoint is damaged.
        """
        self.processes.first(lambda: self._with_room(lambda: self._write_final(num_done)))

    def save_trained(self, num_done: int) -> None:
        """Write what `num_done` steps have done to each layer."""

        def write() -> None:
            with unharmed("trained.json"):
                keep_trained(self.run, self.active.model, num_done)

        self.processes.first(write)

    def keep_batch(self, bad: BadStep) -> Path:
        """Write all processes' examples of a step that was not applied. Returns the directory."""
        every = [example for share in self.processes.gather(_bad_examples(bad)) for example in share]
        place = "bad-steps", f"step-{bad.step}"

        def write() -> None:
            with self.run.result_directory(*place) as directory:
                _write_bad_batch(directory, bad, every, self.active.tokenizer)

        self.processes.first(lambda: self._with_room(write))
        return self.run.inside(*place)

    def take_policies(self, policies: dict[str, Any], step: int) -> None:
        """Continue with what a checkpoint after `step` steps says: micro-batches, rates, experts, and the best step."""
        self.state.backoff.load_state_dict(policies["micro_batch_tokens"])
        self.state.schedule.load_state_dict(policies["schedule"], step)
        self.state.bad_steps.load_state_dict(policies["bad_steps"])
        if "expert_load" in policies:
            self.state.expert_load.load_state_dict(policies["expert_load"])
        if self.state.loss_scale is not None and "loss_scale" in policies:
            self.state.loss_scale.load_state_dict(policies["loss_scale"])
        if self.state.best is not None:
            known = policies.get("best")
            fault = self.processes.gather(self.processes.first(lambda: self._best_fault(known)))[0]
            if known is not None and fault is None:
                self.state.best.load_state_dict(known)
            else:
                logger.warning("%s. The best step is chosen from the evaluations that follow.", fault)

    def _best_fault(self, known: dict[str, Any] | None) -> str | None:
        """Why the choice of the best step cannot continue from a checkpoint's state; None if it can."""
        assert self.state.best is not None
        if known is None:
            return "The run chose no best step before"
        question = self.state.best.question
        if {"examples": question["examples"], **known["question"]} != question:  # older checkpoints name no examples
            return "The run chose the best step in another way before, or by other examples"
        fault = None if known["step"] is None else checkpoint_fault(self.run.checkpoint_path(known["step"]))
        return None if fault is None else f"The best checkpoint, step-{known['step']}, is not whole ({fault})"

    def _policies(self) -> dict[str, Any]:
        state = self.state
        found = {
            "micro_batch_tokens": state.backoff.state_dict(),
            "schedule": state.schedule.state_dict(),
            "bad_steps": state.bad_steps.state_dict(),
        }
        load = state.expert_load if state.expert_load.num_blocks else None
        optional = {"loss_scale": state.loss_scale, "best": state.best, "gates": state.gates, "expert_load": load}
        return found | {name: part.state_dict() for name, part in optional.items() if part is not None}

    def _append_metrics(self, metrics: Metrics) -> None:
        self._with_room(lambda: self.run.append_metrics(metrics))
        if self._tell_trackers is not None:
            self._tell_trackers(metrics)

    def _with_room(self, write: Callable[[], None]) -> None:
        """Write; if the disk is full, remove all checkpoints but the newest and the best, and write again."""
        try:
            write()
        except DiskFull:
            removed = self.run.prune_checkpoints(1, best_step_in)
            if not removed:
                raise
            write()
            what = "checkpoint" if removed == 1 else "checkpoints"
            logger.warning("The disk is full: removed %d older %s to continue.", removed, what)

    def _write_checkpoint(self, step: int, random: list[dict[str, str]]) -> None:
        assert self.state.optimizer is not None
        with self.run.checkpoint_directory(step) as directory:
            self._write_trained(directory, directory / "adapter")
            if self.state.gates is not None:
                self.state.gates.save(directory)
            write_state(
                directory,
                step=step,
                optimizer=self.state.optimizer,
                loader_state=self.active.loader.state_dict(),
                random=random,
                policies=self._policies(),
            )

    def _write_final(self, num_done: int) -> None:
        if self.state.best is None or self.state.best.step is None:
            with self.run.result_directory("adapter") as directory:
                self._write_trained(directory, directory)
            return
        best = self.run.checkpoint_path(self.state.best.step)
        fault = checkpoint_fault(best)
        if fault is not None:
            raise RunFailure(f"{best}: the best checkpoint is not whole any more: {fault}.")
        files = (
            [best / PARAMETERS_FILE]
            if self.active.recipe.adapter.kind == "full"
            else sorted((best / "adapter").iterdir())
        )
        with self.run.result_directory("adapter") as directory:
            for file in files:
                shutil.copyfile(file, directory / file.name)
            record = {**self.state.best.state_dict(), "num_done": num_done, "num_steps": self.active.num_steps}
            (directory / BEST_FILE).write_bytes(json_bytes(record, indent=2))

    def _write_trained(self, directory: Path, adapter: Path) -> None:
        if self.active.recipe.adapter.kind == "full":
            assert self.state.optimizer is not None
            write_tensors(directory / PARAMETERS_FILE, self.state.optimizer.parameters)
            return
        extra = None
        if self.state.gates is not None:
            self.state.gates.settle()  # after a failed step they have their drawn values
            extra = {"gates": self.state.gates.record()}
        write_adapter(self.active.model, self.active.recipe, adapter, extra=extra)


def _bad_examples(bad: BadStep) -> list[dict[str, Any]]:
    """This process's examples of the step, as JSON values."""
    found: list[dict[str, Any]] = []
    losses = iter(bad.example_nll)
    for micro in bad.batch.micro_batches:
        tasks = [micro.task_names[index] for index in micro.task_ids.tolist()]
        for task, (name, ids, labels) in zip(tasks, micro.examples(), strict=True):
            found.append(
                {
                    "id": name,
                    "task": task,
                    "nll_sum": next(losses),
                    "num_label_tokens": int((labels != IGNORED).sum()),
                    "input_ids": ids.tolist(),
                    "labels": labels.tolist(),
                }
            )
    return found


def _write_bad_batch(directory: Path, bad: BadStep, examples: list[dict[str, Any]], tokenizer: Any) -> None:
    """Write the examples of a step that was not applied, to look at them and to run them again.

    batch.json           why, the loss, and of each example its id, task, text, summed NLL (null for NaN), ids, labels
    batch.safetensors    input_ids, attention_mask, labels (examples, longest) int64; nll_sum (examples,) float64
    """
    document = {
        "step": bad.step,
        "reason": bad.reason,
        "loss": bad.loss,
        "gradient_norm": bad.gradient_norm,
        "examples": [{"text": tokenizer.decode(each["input_ids"]), **each} for each in examples],
    }
    (directory / "batch.json").write_bytes(json_bytes(document, indent=1))
    ids = [torch.tensor(each["input_ids"]) for each in examples]
    labels = [torch.tensor(each["labels"]) for each in examples]
    tensors = {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=tokenizer.pad_token_id),
        "attention_mask": pad_sequence([torch.ones_like(each) for each in ids], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
        "nll_sum": torch.tensor([each["nll_sum"] for each in examples], dtype=torch.float64),
    }
    save_file(tensors, directory / "batch.safetensors")
