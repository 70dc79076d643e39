"""Which base a run was trained on: a model of the Hub at its commit, and samples of the base's files.

recipe.yaml of the run has its commit and that of another tokenizer, whatever revisions were given, and environment.json
has the samples.
"""

from __future__ import annotations

from typing import Any

from qdora.errors import UserError
from qdora.files.run_directory import RunDirectory
from qdora.model.source import ModelSource
from qdora.model.store import fingerprints
from qdora.recipe.section import with_settings
from qdora.recipe.settings import Recipe

REVISIONS = {"source": "revision", "tokenizer": "tokenizer_revision"}
"""Setting of the model section that may name a place on the Hub -> its revision there."""


def pinned(recipe: Recipe, source: ModelSource, tokenizer_source: ModelSource) -> Recipe:
    """The recipe with the commits of a base and another tokenizer that were found on the Hub; local ones have none."""
    commits: dict[str, str | None] = {"revision": source.revision} if source.kind == "hub" else {}
    if tokenizer_source is not source and tokenizer_source.kind == "hub":
        commits["tokenizer_revision"] = tokenizer_source.revision
    return with_settings(recipe, model=commits)


def with_revisions_of(recipe: Recipe, other: Recipe) -> Recipe:
    """The recipe; where it has no revision of a base or tokenizer that `other` has, too, it takes that of `other`."""
    taken = {
        revision: getattr(other.model, revision)
        for name, revision in REVISIONS.items()
        if getattr(recipe.model, revision) is None and getattr(recipe.model, name) == getattr(other.model, name)
    }
    return with_settings(recipe, model=taken)


def base_record(source: ModelSource) -> dict[str, Any]:
    """Name -> size and samples of each file of a base, for environment.json; their times and place may change."""
    return {each["name"]: {"bytes": each["size"], "samples": each["samples"]} for each in fingerprints(source)}


def recorded_base(run: RunDirectory) -> dict[str, Any] | None:
    """The `base_record` of a run; None for a run of a version that kept none."""
    return run.environment().get("base") if run.environment_file.is_file() else None


def check_base(run: RunDirectory, source: ModelSource) -> None:
    """Refuse another base than that of the run. Raises UserError with the files that differ."""
    before, now = recorded_base(run), base_record(source)
    if before is None or sorted(map(str, before.values())) == sorted(map(str, now.values())):
        return
    different = [name for name in dict.fromkeys((*before, *now)) if before.get(name) != now.get(name)]
    raise UserError(
        f"{run.path}: {source.name} is not the base that was trained on: {', '.join(different[:3])} "
        f"{'differs' if len(different) == 1 else 'differ'}. Fix: restore the base, or train with another --run-dir."
    )
