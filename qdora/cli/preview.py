"""qdora preview."""

from __future__ import annotations

from typing import Annotated

import typer

from qdora.cli.shared_options import Recipe, Set
from qdora.cli.verb import emit, verb
from qdora.errors import FAILURE


@verb
def preview(
    recipe: Recipe,
    set_: Set = None,
    number: Annotated[int, typer.Option("-n", min=0, help="Examples of each source to show.")] = 3,
) -> None:
    """Show what the model will see of the data, token by token.

    Tokens in the loss are marked. Only the tokenizer and the config of the model are loaded. The exit code is 1 if a
    run would refuse these examples. Rows that are held out for validation are not read.
    """
    from qdora.recipe.recipe_file import load_recipe
    from qdora.run.preview import preview as preview_of
    from qdora.run.preview import show_preview

    found = preview_of(load_recipe(recipe, set_ or []), recipe, number)
    show_preview(found)
    emit(found)
    if found["is_refused"]:
        raise typer.Exit(FAILURE)
