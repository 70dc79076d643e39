"""Where the blocks of a finished run's base are when it is loaded again: as in training, as far as this machine can."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError

from qdora.config import BaseWeightsConfig, Recipe
from qdora.errors import UserError
from qdora.record import RunDirectory

logger = logging.getLogger("qdora")

FILE = "residency.json"
"""In a run directory: what memory.budget auto chose in place of the recipe's own setting."""


class _Chosen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    residency: Literal["device", "host", "disk"]
    streamed_blocks: PositiveInt | None


def keep_residency(run: RunDirectory, given: Recipe, applied: Recipe) -> None:
    """Write down what a start was changed to, or that it was not.

    Args:
        run: Of the run.
        given: Its recipe as the run directory has it.
        applied: As it is run.
    Raises:
        RunFailure: The disk is full or cannot be written.
    """
    file = run.inside(FILE)
    if _chosen(applied.base) != _chosen(given.base):
        run.write_json(FILE, _chosen(applied.base).model_dump())
    elif file.exists():  # of an earlier start
        file.unlink()


def residency_here(
    run: RunDirectory, base: BaseWeightsConfig, device: torch.device, *, differentiated: bool = False
) -> BaseWeightsConfig:
    """Settings with which a run's base can be loaded on a machine that may be of another kind than the run's.

    Args:
        run: The run.
        base: Its settings.
        device: Where it is loaded.
        differentiated: Whether gradients will be taken without checkpointing, of which host can take none.
    Returns:
        The settings with residency and streamed_blocks as of the last start; host and disk trade places where the
        machine has or lacks a GPU, and host becomes device where it is to be differentiated. Logged.
    Raises:
        UserError: residency.json is damaged.
    """
    chosen = _read(run.inside(FILE)) or _chosen(base)
    residency: str = chosen.residency
    if residency != "device":
        residency = "host" if device.type == "cuda" else "disk"
    if residency == "host" and differentiated:
        residency = "device"
    if residency != chosen.residency:
        why = "the whole base is needed at once" if residency == "device" else f"computing on {device.type}"
        logger.info("base.residency: %s in place of %s, %s.", residency, chosen.residency, why)
    blocks = None if residency == "device" else chosen.streamed_blocks
    return base.model_copy(update={"residency": residency, "streamed_blocks": blocks})


def _chosen(base: BaseWeightsConfig) -> _Chosen:
    return _Chosen(residency=base.residency, streamed_blocks=base.streamed_blocks)


def _read(file: Path) -> _Chosen | None:
    try:
        return _Chosen.model_validate_json(file.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the document"
        raise UserError(f"{file}: is damaged: {where}: {first['msg']}.") from error
