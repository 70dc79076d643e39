"""What a run writes while it trains: metrics, trackers, checkpoints, the adapter, and batches to look at."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from qdora.config import Recipe
from qdora.data.loader import Step, StepLoader
from qdora.errors import DiskFull
from qdora.recipe_file import settings
from qdora.record import RunDirectory
from qdora.train.checkpoint import PARAMETERS_FILE, random_text, write_parameters, write_state
from qdora.train.distributed import Processes
from qdora.train.loop import Metrics
from qdora.train.optimizer import AdapterOptimizer
from qdora.verbs.assemble import write_adapter
from qdora.verbs.trackers import tracking

logger = logging.getLogger("qdora")


class RunWriter:
    """Writes for all processes of a run from the first of them; every method is called by all.

    Args:
        recipe, run, model: Of the run.
        optimizer: None where nothing is trained.
        loader: Its position, and the size of its micro-batches, belong to a checkpoint.
        processes: That train the run.
    """

    def __init__(
        self,
        recipe: Recipe,
        run: RunDirectory,
        model: PreTrainedModel,
        optimizer: AdapterOptimizer | None,
        loader: StepLoader,
        processes: Processes,
    ) -> None:
        self.recipe, self.run, self.model = recipe, run, model
        self.optimizer, self.loader, self.processes = optimizer, loader, processes
        self._asked_micro_batch_tokens = loader.micro_batch_tokens
        self._tell_trackers: Callable[[Metrics], None] | None = None

    @contextmanager
    def trackers(self) -> Iterator[None]:
        """The recipe's trackers, open in the block. Raises as `tracking`."""
        names, on_cpu = self.recipe.trackers, self.model.device.type == "cpu"
        with ExitStack() as stack:
            opened = tracking(names, self.run.path, settings(self.recipe), cpu=on_cpu)
            self._tell_trackers = self.processes.first(lambda: stack.enter_context(opened))
            yield

    def write_metrics(self, metrics: Metrics) -> None:
        """Add a line to metrics.jsonl and tell the trackers. Raises as `RunDirectory.append_metrics`."""
        self.processes.first(lambda: self._append_metrics(metrics))

    def save_checkpoint(self, step: int) -> Path:
        """Write the state after `step` steps, remove what is older than the recipe keeps; returns the directory.

        Raises:
            RunFailure: The processes have drifted apart, or the disk cannot be written.
        """
        assert self.optimizer is not None
        self.processes.require_equal(self.optimizer.parameters)
        random = self.processes.gather(random_text())
        self.processes.first(lambda: self._write_checkpoint(step, random))
        return self.run.checkpoint_path(step)

    def save_final(self) -> None:
        """Write adapter/. Raises as `RunDirectory.adapter_directory`."""
        self.processes.first(lambda: self._with_room(self._write_final))

    def keep_batch(self, batch: Step) -> Path:
        """Write the examples of a step, of all processes; returns the file."""
        examples = [
            {"id": name, "input_ids": ids.tolist(), "labels": labels.tolist()}
            for micro in batch.micro_batches
            for name, ids, labels in micro.examples()
        ]
        every = [example for share in self.processes.gather(examples) for example in share]
        self.processes.first(lambda: self.run.write_json("failed-batch.json", {"examples": every}))
        return self.run.inside("failed-batch.json")

    def take_policies(self, policies: dict[str, Any]) -> None:
        """Go on with what a checkpoint's run had found out. A size that the recipe asks for anew counts."""
        micro = policies["micro_batch_tokens"]
        if micro["asked"] == self._asked_micro_batch_tokens:
            self.loader.micro_batch_tokens = micro["used"]

    def _policies(self) -> dict[str, Any]:
        micro = {"asked": self._asked_micro_batch_tokens, "used": self.loader.micro_batch_tokens}
        return {"micro_batch_tokens": micro}

    def _append_metrics(self, metrics: Metrics) -> None:
        self._with_room(lambda: self.run.append_metrics(metrics))
        if self._tell_trackers is not None:
            self._tell_trackers(metrics)

    def _write_checkpoint(self, step: int, random: list[dict[str, str]]) -> None:
        self._with_room(lambda: self._fill_checkpoint(step, random))
        self.run.prune_checkpoints(self.recipe.train.keep_checkpoints)

    def _with_room(self, write: Callable[[], None]) -> None:
        """Write; where the disk is full, once more without the checkpoints that are older than the newest one."""
        try:
            write()
        except DiskFull:
            removed = self.run.prune_checkpoints(1)
            if not removed:
                raise
            write()
            logger.warning("The disk is full: %d older checkpoints were removed to go on.", removed)

    def _fill_checkpoint(self, step: int, random: list[dict[str, str]]) -> None:
        assert self.optimizer is not None
        with self.run.checkpoint_directory(step) as directory:
            self._write_trained(directory, directory / "adapter")
            write_state(
                directory,
                step=step,
                optimizer=self.optimizer,
                loader_state=self.loader.state_dict(),
                random=random,
                policies=self._policies(),
            )

    def _write_final(self) -> None:
        with self.run.adapter_directory() as directory:
            self._write_trained(directory, directory)

    def _write_trained(self, directory: Path, adapter: Path) -> None:
        if self.recipe.adapter.kind == "full":
            assert self.optimizer is not None
            write_parameters(directory / PARAMETERS_FILE, self.optimizer.parameters)
            return
        write_adapter(self.model, self.recipe, adapter)
