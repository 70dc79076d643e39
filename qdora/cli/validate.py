""""""

from __future__ import annotations

from typing import Annotated

import typer

from qdora.cli.failures import emit, verb
from qdora.cli.options import Json, Set
from qdora.errors import UserError


@verb
def validate(
    recipe: Annotated[str, typer.Argument(help="A shipped recipe or a YAML file.")],
    set_: Set = None,
    json_: Json = False,
) -> None:
    """Check a recipe and its files without loading anything; print it resolved."""
    from qdora.recipe.recipe_file import load_recipe, missing_files, resolved_yaml, settings

    loaded = load_recipe(recipe, set_ or [])
    faults = missing_files(loaded, recipe)
    if faults:
        raise UserError(*faults)
    emit(settings(loaded), json_, plain=resolved_yaml(loaded))
