""""""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qdora.cli.failures import emit, verb
from qdora.cli.options import Json, RunDir, Set


@verb
def train(
    recipe: Annotated[str, typer.Argument(help="A shipped recipe (see `qdora recipes`) or a YAML file.")],
    set_: Set = None,
    run_dir: RunDir = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest whole checkpoint.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Start although the plan is over memory.budget.")] = False,
    json_: Json = False,
) -> None:
    """Train an adapter: load the base in 4 bits, train on the mix, evaluate, save."""
    from qdora.recipe.recipe_file import load_recipe

    loaded = load_recipe(recipe, set_ or [])
    directory = run_dir or Path("runs") / Path(recipe).stem
    from qdora.run.train import train_run

    result = train_run(loaded, directory, resume=resume, force=force)
    if result:  # empty in all processes of a launch but the first
        emit(result, json_)
