""""""

from __future__ import annotations

from typing import Annotated

import typer

from qdora.cli.failures import emit, verb
from qdora.cli.options import Json


@verb
def recipes(
    name: Annotated[str | None, typer.Argument(help="Print this one.")] = None,
    json_: Json = False,
) -> None:
    """List the shipped recipes, or print one as a start for your own."""
    from qdora.recipe.recipe_file import recipe_names, recipe_text

    if name is not None:
        text = recipe_text(name)
        emit({"name": name, "text": text}, json_, plain=text)
        return
    lines = {each: _headline(recipe_text(each)) for each in recipe_names()}
    width = max(map(len, lines))
    emit({"recipes": lines}, json_, plain="".join(f"{each:<{width}}  {line}\n" for each, line in lines.items()))


def _headline(text: str) -> str:
    first = text.splitlines()[0] if text else ""
    return first.lstrip("# ").strip()
