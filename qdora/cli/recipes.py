"""Verbs that need no model: plan, validate, recipes, schema, doctor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from qdora.cli.options import Json, Set
from qdora.command import emit, verb
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
    from qdora.recipe_file import load_recipe

    loaded = load_recipe(recipe, set_ or [])
    if device not in ("cuda", "cpu"):
        raise UserError(f"--device: got {device!r}, allowed: cuda, cpu.")
    from qdora.verbs.plan import plan_run

    emit(plan_run(loaded, recipe, budget=budget, device_kind=device, figure=figure), json_)  # type: ignore[arg-type]


@verb
def validate(
    recipe: Annotated[str, typer.Argument(help="A shipped recipe or a YAML file.")],
    set_: Set = None,
    json_: Json = False,
) -> None:
    """Check a recipe and its files without loading anything; print it resolved."""
    from qdora.recipe_file import load_recipe, missing_files, resolved_yaml, settings

    loaded = load_recipe(recipe, set_ or [])
    faults = missing_files(loaded, recipe)
    if faults:
        raise UserError(*faults)
    emit(settings(loaded), json_, plain=resolved_yaml(loaded))


@verb
def recipes(
    name: Annotated[str | None, typer.Argument(help="Print this one.")] = None,
    json_: Json = False,
) -> None:
    """List the shipped recipes, or print one as a start for your own."""
    from qdora.recipe_file import recipe_names, recipe_text

    if name is not None:
        text = recipe_text(name)
        emit({"name": name, "text": text}, json_, plain=text)
        return
    lines = {each: _headline(recipe_text(each)) for each in recipe_names()}
    width = max(map(len, lines))
    emit({"recipes": lines}, json_, plain="".join(f"{each:<{width}}  {line}\n" for each, line in lines.items()))


@verb
def schema() -> None:
    """Print the JSON schema of a recipe, for editors."""
    from qdora.recipe_file import json_schema

    print(json.dumps(json_schema(), indent=2))


@verb
def doctor(
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure for a minute what `qdora plan` predicts times with.")
    ] = False,
    json_: Json = False,
) -> None:
    """Say what this machine has and what is missing."""
    from qdora.doctor import report, report_text

    found = report()
    text = report_text(found)
    if measure:
        from qdora.verbs.measure_rates import measure_rates, rates_text

        found["rates"] = measure_rates()
        text += rates_text(found["rates"])
    emit(found, json_, plain=text)


def _headline(text: str) -> str:
    first = text.splitlines()[0] if text else ""
    return first.lstrip("# ").strip()
