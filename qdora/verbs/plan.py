"""qdora plan: what a run will see of its data, without loading the model."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from qdora.config import Recipe
from qdora.data.mix_plan import plan_mix
from qdora.errors import UserError
from qdora.recipe_file import missing_files
from qdora.verbs.assemble import find_model, make_loader, num_steps_of, read_data, tokenized_mix
from qdora.verbs.show import default_console, show_mix


def plan_run(recipe: Recipe, where: str, *, console: Console | None = None) -> dict[str, Any]:
    """Read and tokenise the data, count what each step takes; only the model's tokenizer is loaded.

    Args:
        recipe: The run.
        where: Its name in error lines.
        console: Where the table is shown; standard error by default.
    Returns:
        JSON values: "mix" as in mix.json of a run.
    Raises:
        UserError: What `train_run` refuses about the data.
    """
    faults = missing_files(recipe, where)
    if faults:
        raise UserError(*faults)
    _, tokenizer = find_model(recipe)
    train, _ = read_data(recipe.data)
    mix = tokenized_mix(recipe, tokenizer, train)
    loader = make_loader(recipe, mix, tokenizer)
    plan = plan_mix(mix, loader, num_steps_of(recipe, loader))
    show_mix(console or default_console(), plan)
    return {"mix": plan.to_dict()}
