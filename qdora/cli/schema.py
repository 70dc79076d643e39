"""qdora schema."""

from __future__ import annotations

from qdora.cli.verb import emit, verb
from qdora.files.atomic import json_text


@verb
def schema() -> None:
    """Print the JSON schema of a recipe, for editors."""
    from qdora.recipe.recipe_file import json_schema

    found = json_schema()
    emit(found, plain=json_text(found, indent=2) + "\n")
