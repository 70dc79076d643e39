"""qdora train."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qdora.cli.options import Recipe, Set
from qdora.cli.verb import emit, verb


@verb
def train(
    recipe: Recipe,
    set_: Set = None,
    run_dir: Annotated[
        Path | None, typer.Option("--run-dir", "-d", help="Directory of the run; default: runs/<recipe>.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the newest whole checkpoint.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Start even if the plan exceeds memory.budget.")] = False,
) -> None:
    """Train an adapter: load the base in 4 bits, train on the mix, evaluate, save."""
    from qdora.recipe.recipe_file import load_recipe

    loaded = load_recipe(recipe, set_ or [])
    directory = run_dir or Path("runs") / Path(recipe).stem
    from qdora.run.train import train_run

    result = train_run(loaded, directory, resume=resume, force=force)
    if result:  # only the first process of a launch has one
        emit(result)
