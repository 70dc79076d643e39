"""qdora schema."""

from __future__ import annotations

import json

from qdora.cli.verb import verb


@verb
def schema() -> None:
    """Print the JSON schema of a recipe, for editors."""
    from qdora.recipe.recipe_file import json_schema

    print(json.dumps(json_schema(), indent=2))
