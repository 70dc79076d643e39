"""What a run records of its base: the commit on the Hub, samples of its files, and where it lived.

recipe.yaml has the commits of a base and of another tokenizer, whatever revisions were given; environment.json has the
samples; residency.json has the residency that `memory.budget: auto` chose instead of the recipe's own.
"""

from __future__ import annotations

import logging
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, PositiveInt

from qdora.errors import UserError
from qdora.files.run_directory import RunDirectory
from qdora.model.packed_base import fingerprints, read_record
from qdora.model.source import ModelSource
from qdora.recipe.section import with_settings
from qdora.recipe.settings import Recipe

FILE = "residency.json"
REVISIONS = {"source": "revision", "tokenizer": "tokenizer_revision"}
"""Setting of the model section that may name a place on the Hub -> its revision there."""

logger = logging.getLogger("qdora")


def pinned(recipe: Recipe, source: ModelSource, tokenizer_source: ModelSource) -> Recipe:
    """The recipe with the commits of a base and another tokenizer that were found on the Hub; local ones have none."""
    commits: dict[str, str | None] = {"revision": source.revision} if source.kind == "hub" else {}
    if tokenizer_source is not source and tokenizer_source.kind == "hub":
        commits["tokenizer_revision"] = tokenizer_source.revision
    return with_settings(recipe, model=commits)


def with_revisions_of(recipe: Recipe, other: Recipe) -> Recipe:
    """The recipe; where it has no revision of a base or tokenizer that `other` has, too, it takes that of `other`."""
    revisions = {
        revision: getattr(other.model, revision)
        for name, revision in REVISIONS.items()
        if getattr(recipe.model, revision) is None and getattr(recipe.model, name) == getattr(other.model, name)
    }
    return with_settings(recipe, model=revisions)


def base_record(source: ModelSource) -> dict[str, Any]:
    """Name -> size and samples of each file of a base, for environment.json; their times and place may change."""
    return {each["name"]: {"bytes": each["size"], "samples": each["samples"]} for each in fingerprints(source)}


def check_base(run: RunDirectory, source: ModelSource) -> None:
    """Refuse another base than that of the run. Raises UserError with the files that differ."""
    before = run.environment().get("base") if run.environment_file.is_file() else None
    now = base_record(source)
    if before is None or sorted(map(str, before.values())) == sorted(map(str, now.values())):
        return
    different = [name for name in dict.fromkeys((*before, *now)) if before.get(name) != now.get(name)]
    raise UserError(
        f"{run.path}: {source.name} is not the base that was trained on: {', '.join(different[:3])} "
        f"{'differs' if len(different) == 1 else 'differ'}. Fix: restore the base, or train with another --run-dir."
    )


class _Residency(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    residency: Literal["device", "host", "disk"]  # disk: written by earlier versions on a CPU
    streamed_blocks: PositiveInt | None
    host_embeddings: bool = False


def _residency(recipe: Recipe) -> _Residency:
    return _Residency(
        residency=recipe.base.residency,
        streamed_blocks=recipe.base.streamed_blocks,
        host_embeddings=recipe.memory.host_embeddings,
    )


def keep_residency(run: RunDirectory, given: Recipe, applied: Recipe) -> None:
    """Write residency.json if the recipe that runs has another residency than the one given; else remove it.

    If the base is divided only by that choice, the file is not written: a process that later loads all of the base
    takes the residency that was given.
    """
    file = run.inside(FILE)
    now_divided = applied.train.divides_base and not given.train.divides_base
    if _residency(applied) != _residency(given) and not now_divided:
        run.write_json(FILE, _residency(applied).model_dump())
    elif file.exists():  # from an earlier start
        file.unlink()


def residency_here(run: RunDirectory, recipe: Recipe, device: torch.device, *, differentiated: bool = False) -> Recipe:
    """The recipe with a residency that this machine can load: that of the run's last start, but host only with a GPU.

    A change is logged. With `differentiated` gradients are taken without checkpointing, which host cannot do.
    """
    file = run.inside(FILE)
    chosen = read_record(file, _Residency) if file.exists() else _residency(recipe)
    base: dict[str, Any] = {"residency": "device", "streamed_blocks": None}
    if chosen.residency == "host" and device.type == "cuda" and not differentiated:
        base = {"residency": "host", "streamed_blocks": chosen.streamed_blocks}
    elif chosen.residency != "device":
        why = "the whole base is needed at once" if differentiated else f"this machine computes on {device.type}"
        logger.info("base.residency: using device instead of %s, because %s.", chosen.residency, why)
    return with_settings(recipe, base=base, memory={"host_embeddings": chosen.host_embeddings})
