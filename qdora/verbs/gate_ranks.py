"""qdora rank --method gates: the ranks that a run's gates have come to, read from its adapter without the model."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from qdora.analysis.rank_figures import draw_rank_map
from qdora.config import Recipe
from qdora.errors import UserError
from qdora.model.adapter_file import describe_adapter
from qdora.record import RunDirectory
from qdora.verbs.rank_recipe import write_recipe
from qdora.verbs.trained import trained_state


def ranks_of_gates(run: RunDirectory, recipe: Recipe, step: int | None, console: Console) -> dict[str, Any]:
    """Write the ranks of a run with gates as a recipe and as a map over depth and kind of layer.

    Args:
        run: Of which.
        recipe: Its recipe.
        step: Checkpoint; None: the finished adapter.
        console: Where the ranks are shown.
    Returns:
        JSON values, as in rank/gates.json; "removed_after" has one entry for each component of the start: the steps
        that had been done when it went, or null.
    Raises:
        UserError: A run without gates, or whose layers differ in alpha / rank.
    """
    if recipe.adapter.gates is None:
        raise UserError(f"{run.path}: has no gates, allowed with --method gates: a run with adapter.gates.")
    if recipe.adapter.rank_pattern and not recipe.adapter.same_scaling:
        # Each layer has kept the alpha / rank that it started with, and a recipe has one alpha
        raise UserError(
            f"{run.path}: adapter.rank_pattern without same_scaling: a recipe cannot say with which scaling the layers "
            "that have shrunk were trained, allowed with --method gates: runs whose layers start with the same one."
        )
    trained, state = trained_state(run, recipe, step)
    extra = describe_adapter(trained if trained == run.adapter else trained / "adapter").extra or {}
    layers = extra["gates"]
    ranks = {name: each["removed_after"].count(None) for name, each in layers.items()}
    cost = {name: each["parameters_per_rank"] for name, each in layers.items()}
    starts = {name: len(each["removed_after"]) for name, each in layers.items()}
    figure = run.inside("rank") / "gates-ranks.svg"
    document = {
        "run": str(run.path),
        "state": state,
        "method": "gates",
        "mode": recipe.adapter.gates.mode,
        "num_parameters": sum(rank * cost[name] for name, rank in ranks.items()),
        "num_parameters_of_run": sum(rank * cost[name] for name, rank in starts.items()),
        "layers": {name: {"rank": ranks[name], "rank_of_run": starts[name], **each} for name, each in layers.items()},
        **write_recipe(run, recipe, "gates", ranks),
        "figures": [str(figure)],
    }
    draw_rank_map(ranks, figure)
    run.write_json("rank/gates.json", document)
    title = f"gates: {document['num_parameters']:,} parameters in the factors, at the start "
    table = Table(title=f"{title}{document['num_parameters_of_run']:,}", title_justify="left")
    for name in ("layer", "rank", "at the start"):
        table.add_column(name, justify="left" if name == "layer" else "right")
    for name, rank in ranks.items():
        table.add_row(name, str(rank), str(starts[name]))
    console.print(table)
    hint = f"to train with these ranks: qdora train {document['recipe']}"
    console.print(hint, markup=False, highlight=False, soft_wrap=True)
    return document
