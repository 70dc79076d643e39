"""Experiment trackers, by accelerate's classes without its Accelerator: start them, send the metrics, close them."""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.tracking import GeneralTracker, MLflowTracker, TensorBoardTracker, TrackioTracker, WandBTracker

from qdora.errors import UserError, named
from qdora.files.access_tokens import masked
from qdora.files.atomic import atomic_write_text
from qdora.files.setting_keys import flat

PROJECT = "qdora"

logger = logging.getLogger("qdora")


def _wandb(run: Path) -> GeneralTracker:
    """A resumed run continues its run in wandb: the id is kept in its directory."""
    file, given = run / "wandb_id.txt", os.environ.get("WANDB_RUN_ID")
    if given or not file.is_file():
        atomic_write_text(file, f"{given or secrets.token_hex(8)}\n")
    id, project = file.read_text(encoding="utf-8").strip(), os.environ.get("WANDB_PROJECT")
    return WandBTracker(project or PROJECT, name=run.name, dir=str(run), id=id, resume="allow")


_MAKE: dict[str, Callable[[Path], GeneralTracker]] = {
    "tensorboard": lambda run: TensorBoardTracker("tensorboard", str(run)),
    "trackio": lambda run: TrackioTracker(PROJECT, name=run.name),
    "wandb": _wandb,
    "mlflow": lambda run: MLflowTracker(PROJECT, run_name=run.name),
}


@contextmanager
def tracking(
    names: Sequence[str], run: Path, settings: Mapping[str, Any], *, cpu: bool
) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Start the trackers of these names, yield a function that sends them a line of metrics, and close them.

    `settings`, the recipe, are stored with the metrics. Raises UserError if a tracker does not start. One that fails
    later gets nothing more, with a warning: a chart is not worth a run of hours.
    """
    if names:
        PartialState(cpu=cpu)  # accelerate's trackers ask it whether this is the main process
    started: dict[str, GeneralTracker] = {}

    def tell(action: Callable[[GeneralTracker], None]) -> None:
        for name, tracker in list(started.items()):
            try:
                action(tracker)
            except Exception as error:  # third-party code raises classes of its own
                del started[name]
                logger.warning("trackers: %s failed and gets no more metrics: %s", name, masked(named(error)))

    try:
        for name in names:
            try:
                tracker = _MAKE[name](run)
                tracker.start()
                tracker.store_init_configuration(flat_settings(settings))
            except Exception as error:
                raise UserError(f"trackers: {name} did not start: {masked(named(error))}") from error
            started[name] = tracker
        yield lambda line: tell(lambda tracker: tracker.log(flat_numbers(line), step=line["step"]))
    finally:
        tell(lambda tracker: tracker.finish())


def flat_numbers(line: Mapping[str, Any]) -> dict[str, float]:
    """{"step": 2, "tasks": {"boolq": {"nll_sum": 3.0}}} -> {"tasks/boolq/nll_sum": 3.0}: its numbers but the step."""
    values = flat({key: value for key, value in line.items() if key != "step"}, separator="/")
    return {
        key: float(value)
        for key, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def flat_settings(values: Mapping[str, Any]) -> dict[str, bool | float | str]:
    """{"train": {"lr": 1e-3, "betas": [0.9, 0.99]}} -> {"train.lr": 1e-3, "train.betas": "[0.9, 0.99]"}.

    Leaves out null, which trackers refuse, and access tokens.
    """
    return {
        key: value if isinstance(value, bool | int | float) else masked(str(value))
        for key, value in flat(values).items()
        if value is not None
    }
