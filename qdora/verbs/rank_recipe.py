"""Chosen ranks as a recipe: the run's own with another rank_pattern, and the fragment to put into any other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qdora.atomic_files import atomic_write_text
from qdora.config import Recipe
from qdora.recipe_file import recipe_from, resolved_yaml, settings
from qdora.record import RunDirectory


def write_recipe(run: RunDirectory, recipe: Recipe, method: str, ranks: Mapping[str, int]) -> dict[str, Any]:
    """Write rank/<method>.yaml: the run's recipe with these ranks and without gates.

    Args:
        run: Where to.
        recipe: Of the run.
        method: How the ranks were found.
        ranks: Path -> rank, of all adapted layers.
    Returns:
        "fragment" and "recipe", the file's path.
    """
    pattern = {name: rank for name, rank in ranks.items() if rank != recipe.adapter.rank}
    plain = settings(recipe)
    fragment: dict[str, Any] = {"rank": recipe.adapter.rank, "rank_pattern": pattern}
    if pattern and not recipe.adapter.rank_pattern:
        # alpha / rank would be 16 times as large at rank 1 as at rank 16, and training with it
        fragment["same_scaling"] = True
    elif pattern:
        # Another value would also change alpha / rank of the layers that were left out
        fragment["same_scaling"] = recipe.adapter.same_scaling
    kept = {key: value for key, value in plain["adapter"].items() if key not in ("same_scaling", "gates")}
    plain["adapter"] = kept | fragment
    folder = run.inside("rank")
    folder.mkdir(exist_ok=True)
    out = folder / f"{method}.yaml"
    atomic_write_text(out, resolved_yaml(recipe_from(plain)))
    return {"fragment": {"adapter": fragment}, "recipe": str(out)}
