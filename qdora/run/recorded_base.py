"""Which base a run was trained on: a model of the Hub at its commit, and samples of the base's files.

recipe.yaml of the run has the commit, whatever revision was given, and environment.json has the samples.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qdora.errors import UserError
from qdora.files.run_directory import RunDirectory, open_run
from qdora.model.packed_base import fingerprints
from qdora.model.source import ModelSource
from qdora.recipe.recipe_file import load_recipe
from qdora.recipe.section import with_settings
from qdora.recipe.settings import Recipe


def with_revision(recipe: Recipe, revision: str | None) -> Recipe:
    """The recipe with this model.revision."""
    return with_settings(recipe, model={"revision": revision})


def pinned(recipe: Recipe, source: ModelSource) -> Recipe:
    """The recipe with the commit of the base that was found on the Hub; a local base has none."""
    return with_revision(recipe, source.revision) if source.kind == "hub" else recipe


def with_own_revision(recipe: Recipe, directory: Path) -> Recipe:
    """The recipe to resume a run with: without a revision it gets that of the run. Raises UserError without a run."""
    own = load_recipe(open_run(directory).recipe_file).model
    takes_it = recipe.model.revision is None and recipe.model.source == own.source
    return with_revision(recipe, own.revision) if takes_it else recipe


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
