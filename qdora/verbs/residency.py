"""Where the blocks of a finished run's base are when it is loaded again: as in training, as far as this machine can."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError

from qdora.config import Recipe
from qdora.errors import UserError
from qdora.record import RunDirectory

logger = logging.getLogger("qdora")

FILE = "residency.json"
"""In a run directory: what memory.budget auto chose in place of the recipe's own setting."""


class _Chosen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    residency: Literal["device", "host", "disk"]
    streamed_blocks: PositiveInt | None
    host_embeddings: bool = False


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
    if _chosen(applied) != _chosen(given):
        run.write_json(FILE, _chosen(applied).model_dump())
    elif file.exists():  # of an earlier start
        file.unlink()


def residency_here(run: RunDirectory, recipe: Recipe, device: torch.device, *, differentiated: bool = False) -> Recipe:
    """The recipe with which a run's base can be loaded on a machine that may be of another kind than the run's.

    Args:
        run: The run.
        recipe: Of the run.
        device: Where it is loaded.
        differentiated: Whether gradients will be taken without checkpointing, of which host can take none.
    Returns:
        The recipe with base.residency, base.streamed_blocks and memory.host_embeddings as of the last start; host and
        disk trade places where the machine has or lacks a GPU, and host becomes device where it is to be
        differentiated. Logged.
    Raises:
        UserError: residency.json is damaged.
    """
    chosen = _read(run.inside(FILE)) or _chosen(recipe)
    residency: str = chosen.residency
    if residency != "device":
        residency = "host" if device.type == "cuda" else "disk"
    if residency == "host" and differentiated:
        residency = "device"
    if residency != chosen.residency:
        why = "the whole base is needed at once" if residency == "device" else f"computing on {device.type}"
        logger.info("base.residency: %s in place of %s, %s.", residency, chosen.residency, why)
    blocks = None if residency == "device" else chosen.streamed_blocks
    base = recipe.base.model_copy(update={"residency": residency, "streamed_blocks": blocks})
    memory = recipe.memory.model_copy(update={"host_embeddings": chosen.host_embeddings})
    return recipe.model_copy(update={"base": base, "memory": memory})


def _chosen(recipe: Recipe) -> _Chosen:
    return _Chosen(
        residency=recipe.base.residency,
        streamed_blocks=recipe.base.streamed_blocks,
        host_embeddings=recipe.memory.host_embeddings,
    )


def _read(file: Path) -> _Chosen | None:
    try:
        return _Chosen.model_validate_json(file.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the document"
        raise UserError(f"{file}: is damaged: {where}: {first['msg']}.") from error
