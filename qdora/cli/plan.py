"""qdora plan."""

from __future__ import annotations

from typing import Annotated, Literal, cast

import typer

from qdora.cli.shared_options import Recipe, Set
from qdora.cli.verb import emit, verb
from qdora.errors import FAILURE, UserError, not_one_of


@verb
def plan(
    recipe: Recipe,
    set_: Set = None,
    budget: Annotated[
        str | None, typer.Option(help="Memory that the run may use, such as 40GiB; default: memory.budget.")
    ] = None,
    device: Annotated[str, typer.Option(help="Device of the run, cuda or cpu; this machine need not have it.")] = (
        "cuda"
    ),
    processes: Annotated[
        int, typer.Option(help="Cards of the run, one process each; two or more need buffers of NCCL.", min=1)
    ] = 1,
    hosts: Annotated[int, typer.Option(help="Machines, which have equally many of these cards.", min=1)] = 1,
) -> None:
    """Predict memory, estimate time, and count what a run reads.

    No weights are loaded. If the data can be read, its examples and steps are counted. The exit code is 1 if the run
    does not fit the budget; with --processes, if it fits in no way.
    """
    from qdora.recipe.recipe_file import load_recipe

    loaded = load_recipe(recipe, set_ or [])
    if device not in ("cuda", "cpu"):
        raise UserError(not_one_of("--device", device, ("cuda", "cpu")))
    if processes % hosts:
        raise UserError(f"--hosts: got {hosts}, must divide --processes ({processes}).")
    kind = cast(Literal["cuda", "cpu"], device)
    from qdora.plan.plan_view import plan_run

    found = plan_run(loaded, recipe, budget=budget, device_kind=kind, num_processes=processes, num_hosts=hosts)
    emit(found)
    if all(each["fits"] is False for each in found.get("processes", [found["memory"]])):
        raise typer.Exit(FAILURE)
