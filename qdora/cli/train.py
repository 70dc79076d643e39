"""qdora train."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from qdora.cli.shared_options import Recipe, Set
from qdora.cli.verb import emit, verb
from qdora.errors import Interrupted, UserError


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
    """Train a recipe: load the base, train, evaluate, save.

    `--resume` uses the run's own settings, changed by `-s`, and prints where the given recipe differs.
    """
    from qdora.recipe.recipe_file import load_recipe

    own = Path(recipe) / "recipe.yaml"
    if own.is_file():  # a run in place of a recipe
        if not resume:
            raise UserError(f"{recipe}: is a run. Fix: continue it with --resume, or start another one from {own}.")
        run_dir, recipe = run_dir or Path(recipe), str(own)
    directory = run_dir or Path("runs") / Path(recipe).stem
    if resume:
        from qdora.run.run import resumed_recipe

        loaded, where = resumed_recipe(directory, recipe, set_ or []), str(directory / "recipe.yaml")
    else:
        loaded, where = load_recipe(recipe, set_ or []), recipe
    from qdora.run.run import train_run

    try:
        result = train_run(loaded, directory, where=where, resume=resume, force=force)
    except Interrupted as stopped:
        if "WORLD_SIZE" in os.environ:  # only the user knows the command of the launcher
            raise
        words = ["qdora", "train", recipe, *(word for item in set_ or [] for word in ("-s", item))]
        words += ["--run-dir", str(directory), "--resume", *(["--force"] if force else [])]
        raise stopped.with_command(words) from None
    if result:  # only the first process of a launch has one
        emit(result)
