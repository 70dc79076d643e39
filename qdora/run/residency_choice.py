"""The residency of a run's base where it is not the recipe's own: chosen for the budget, or for the machine here."""

from __future__ import annotations

import logging
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, PositiveInt

from qdora.files.run_directory import RunDirectory
from qdora.model.store import read_record
from qdora.recipe.section import with_settings
from qdora.recipe.settings import Recipe

logger = logging.getLogger("qdora")

FILE = "residency.json"
"""In a run directory: the residency that `memory.budget: auto` chose instead of the recipe's own."""


class _Chosen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    residency: Literal["device", "host", "disk"]  # disk: written by earlier versions on a CPU
    streamed_blocks: PositiveInt | None
    host_embeddings: bool = False


def keep_residency(run: RunDirectory, given: Recipe, applied: Recipe) -> None:
    """Write residency.json if the recipe that runs has another residency than the one given; else remove it.

    The choice to divide the base says nothing about a process that later loads all of it: it takes the one given.
    """
    file = run.inside(FILE)
    now_divided = applied.train.divides_base and not given.train.divides_base
    if _chosen(applied) != _chosen(given) and not now_divided:
        run.write_json(FILE, _chosen(applied).model_dump())
    elif file.exists():  # from an earlier start
        file.unlink()


def residency_here(run: RunDirectory, recipe: Recipe, device: torch.device, *, differentiated: bool = False) -> Recipe:
    """The recipe with a residency that this machine can load: that of the run's last start, but host only with a GPU.
    A change is logged.

    Args:
        run: The run.
        recipe: Its recipe.
        device: Where the base is loaded.
        differentiated: Whether gradients are taken without checkpointing; then host, which cannot do it, is device.
    Raises:
        UserError: residency.json is damaged.
    """
    file = run.inside(FILE)
    chosen = read_record(file, _Chosen) if file.exists() else _chosen(recipe)
    base: dict[str, Any] = {"residency": "device", "streamed_blocks": None}
    if chosen.residency == "host" and device.type == "cuda" and not differentiated:
        base = {"residency": "host", "streamed_blocks": chosen.streamed_blocks}
    elif chosen.residency != "device":
        why = "the whole base is needed at once" if differentiated else f"this machine computes on {device.type}"
        logger.info("base.residency: using device instead of %s, because %s.", chosen.residency, why)
    return with_settings(recipe, base=base, memory={"host_embeddings": chosen.host_embeddings})


def _chosen(recipe: Recipe) -> _Chosen:
    return _Chosen(
        residency=recipe.base.residency,
        streamed_blocks=recipe.base.streamed_blocks,
        host_embeddings=recipe.memory.host_embeddings,
    )
