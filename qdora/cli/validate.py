"""qdora validate."""

from __future__ import annotations

from qdora.cli.options import Recipe, Set
from qdora.cli.verb import emit, verb
from qdora.errors import UserError


@verb
def validate(recipe: Recipe, set_: Set = None) -> None:
    """Check the settings and paths of a recipe and print it with all defaults. The data is not read: see `plan`."""
    from qdora.recipe.recipe_file import load_recipe, missing_files, resolved_yaml, settings

    loaded = load_recipe(recipe, set_ or [])
    faults = missing_files(loaded, recipe)
    if faults:
        raise UserError(*faults)
    emit(settings(loaded), plain=resolved_yaml(loaded))
