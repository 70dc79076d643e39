"""qdora recipes."""

from __future__ import annotations

from typing import Annotated

import typer

from qdora.cli.verb import emit, verb


@verb
def recipes(name: Annotated[str | None, typer.Argument(help="Print this recipe; default: list all.")] = None) -> None:
    """List the shipped recipes, or print one as a start for your own."""
    from qdora.recipe.recipe_file import recipe_names, recipe_text

    if name is not None:
        text = recipe_text(name)
        emit({"name": name, "text": text}, plain=text)
        return
    lines = {each: recipe_text(each).partition("\n")[0].lstrip("# ").strip() for each in recipe_names()}
    width = max(map(len, lines))
    emit({"recipes": lines}, plain="".join(f"{each:<{width}}  {line}\n" for each, line in lines.items()))
