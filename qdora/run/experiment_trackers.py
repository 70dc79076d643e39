"""Experiment trackers, through accelerate: start them, send them the metrics, close them."""

from __future__ import annotations

import json
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
WANDB_ID_FILE = "wandb_id.txt"

logger = logging.getLogger("qdora")


def _wandb(run: Path) -> GeneralTracker:
    """A resumed run continues its run in wandb: the id is kept in its directory."""
    file, given = run / WANDB_ID_FILE, os.environ.get("WANDB_RUN_ID")
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
    """Start trackers, send them lines of metrics, and close them in any case.

    A tracker that fails later (its server cannot be reached) gets nothing more, with a warning. The run continues.

    Args:
        names: tensorboard, trackio, wandb, mlflow. Each has its own setup (environment variables, a login).
        run: The run directory. tensorboard and wandb write into it; its name is the name of the run.
        settings: The recipe, stored beside the metrics; nested.
        cpu: Whether the run computes on the CPU.
    Yields:
        A function that takes one line of metrics, with its "step".
    Raises:
        UserError: A tracker does not start.
    """
    if not names:
        yield lambda line: None
        return
    PartialState(cpu=cpu)  # accelerate's trackers ask it whether this is the main process
    started: dict[str, GeneralTracker] = {}
    try:
        for name in names:
            started[name] = _started(name, run, settings)
        yield lambda line: _tell(started, line)
    finally:
        for name in list(started):
            _attempt(started, name, lambda tracker: tracker.finish())


def flat_numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """{"tasks": {"boolq": {"nll_sum": 3.0}}} -> {"tasks/boolq/nll_sum": 3.0}; only numbers are kept."""
    return {
        key: float(value)
        for key, value in flat(values, separator="/").items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def flat_settings(values: Mapping[str, Any]) -> dict[str, bool | float | str]:
    """{"train": {"lr": 1e-3, "betas": [0.9, 0.99]}} -> {"train.lr": 1e-3, "train.betas": "[0.9, 0.99]"}.

    Leaves out null, which trackers refuse, and access tokens.
    """
    return {
        key: value
        if isinstance(value, bool | int | float)
        else masked(value if isinstance(value, str) else json.dumps(value))
        for key, value in flat(values).items()
        if value is not None
    }


def _started(name: str, run: Path, settings: Mapping[str, Any]) -> GeneralTracker:
    try:
        tracker = _MAKE[name](run)
        tracker.start()
        tracker.store_init_configuration(flat_settings(settings))
    except Exception as error:  # third-party code raises classes of its own
        raise UserError(f"trackers: {name} did not start: {_reason(error)}.") from error
    return tracker


def _tell(started: dict[str, GeneralTracker], line: Mapping[str, Any]) -> None:
    numbers = flat_numbers({key: value for key, value in line.items() if key != "step"})
    for name in list(started):
        _attempt(started, name, lambda tracker: tracker.log(numbers, step=line["step"]))


def _attempt(started: dict[str, GeneralTracker], name: str, action: Callable[[GeneralTracker], None]) -> None:
    try:
        action(started[name])
    except Exception as error:  # third-party code; a chart is not worth a run of hours
        del started[name]
        logger.warning("trackers: %s failed and gets no more metrics: %s.", name, _reason(error))


def _reason(error: Exception) -> str:
    return masked(named(error)).rstrip(".")
