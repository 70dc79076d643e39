""""""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qdora.cli.failures import emit, verb
from qdora.cli.options import Json, Set
from qdora.errors import UserError


@verb
def plan(
    recipe: Annotated[str, typer.Argument(help="A shipped recipe or a YAML file.")],
    set_: Set = None,
    budget: Annotated[str | None, typer.Option(help="What there is, such as 40GiB; the recipe's if left out.")] = None,
    device: Annotated[str, typer.Option(help="Where the run is to be: cuda or cpu. This machine need not have it.")] = (
        "cuda"
    ),
    figure: Annotated[Path | None, typer.Option(help="Draw the plan to this SVG.")] = None,
    json_: Json = False,
) -> None:
    """Say what a run would need, by component, and see of every source, without loading the model."""
    from qdora.recipe.recipe_file import load_recipe

    loaded = load_recipe(recipe, set_ or [])
    if device not in ("cuda", "cpu"):
        raise UserError(f"--device: got {device!r}, allowed: cuda, cpu.")
    from qdora.plan.plan_view import plan_run

    emit(plan_run(loaded, recipe, budget=budget, device_kind=device, figure=figure), json_)  # type: ignore[arg-type]
