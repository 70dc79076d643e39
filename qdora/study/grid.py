"""From a study to its cells: checked recipes, each with the hash that names it."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from qdora.config import Recipe
from qdora.errors import UserError
from qdora.recipe_file import apply_overrides, recipe_document, recipe_from, settings
from qdora.study.config import Study, as_list, choices, label_of

_KEY_LENGTH = 16  # hex digits: two of a million recipes share one with a chance of 3e-8

# What the evaluation of a bare base depends on beside model, base and data.
_EVALUATION = ("tasks", "limit", "method")


@dataclass(frozen=True)
class Cell:
    """One run of a study.

    Attributes:
        key: Hash of the resolved recipe; names the run directory.
        labels: Axis -> label. A base has no label on the axes that only training depends on.
        recipe: What is run.
        is_trained: False for a base that is only evaluated.
        base_key: Of the cell that evaluates the same base without adapter.
        dense_key: Of the cell that evaluates the uncompressed base.
    """

    key: str
    labels: dict[str, str] = field(compare=False)
    recipe: Recipe
    is_trained: bool = True
    base_key: str | None = None
    dense_key: str | None = None

    def record(self) -> dict[str, Any]:
        """For JSON: all but the recipe."""
        fields = ("key", "labels", "is_trained", "base_key", "dense_key")
        return {name: getattr(self, name) for name in fields}


def expand(study: Study) -> list[Cell]:
    """The cells of a study, bases first, each recipe once.

    Raises:
        UserError: Recipes that are not valid, one line each with the cell's labels; no cell; a cell without evaluation.
    """
    start, where = recipe_document(study.recipe)
    cells: dict[str, Cell] = {}
    bases: dict[str, Cell] = {}
    uncompressed: dict[str, Cell] = {}  # without labels, unless the grid has it
    faults: dict[str, list[str]] = {}
    known: dict[str, Cell] = {}
    base_of: dict[tuple[tuple[str, str], ...], str] = {}  # arm and surroundings -> key of its one base
    for labels, changes in _combinations(study):
        try:
            recipe = _recipe(start, study.settings | changes, study.compare.split)
        except UserError as error:
            for fault in error.faults:
                named = ", ".join(f"{axis}={label}" for axis, label in labels.items())
                faults.setdefault(fault.removeprefix("recipe: "), []).append(named)
            continue
        base = _base(recipe, dense=False, known=known)
        dense = _base(recipe, dense=True, known=known)
        tuned = (study.compare.seed, *study.compare.choose)
        surroundings = {axis: label for axis, label in labels.items() if axis not in tuned}
        if base_of.setdefault(tuple(surroundings.items()), base.key) != base.key:
            varied = ", ".join(axis for axis in tuned if axis in labels)
            fault = f"compare: one of {varied} changes the base or its evaluation, allowed: only settings of training."
            named = ", ".join(f"{axis}={label}" for axis, label in labels.items())
            faults.setdefault(fault, []).append(named)
            continue
        if recipe.adapter.kind == "none":
            bases[base.key] = Cell(base.key, surroundings, base.recipe, False, base.key, dense.key)
        else:
            trained = _without_start(recipe)
            cells.setdefault(key_of(trained), Cell(key_of(trained), labels, trained, True, base.key, dense.key))
            surroundings = {axis: label for axis, label in surroundings.items() if axis != study.compare.arm}
            if study.bases:
                bases.setdefault(base.key, Cell(base.key, surroundings, base.recipe, False, base.key, dense.key))
        if study.bases:
            uncompressed[dense.key] = Cell(dense.key, {}, dense.recipe, False, dense.key, dense.key)
    if faults:
        raise UserError(*(f"{where} ({_first(named)}): {fault}" for fault, named in faults.items()))
    if not cells and not bases:
        raise UserError(f"{where}: exclude leaves no cell, allowed: at least one.")
    return [*(uncompressed | bases).values(), *cells.values()]


def key_of(recipe: Recipe) -> str:
    """Hash of a resolved recipe: of every setting that has an effect, whatever the order or spelling it came in."""
    text = json.dumps(settings(recipe), sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:_KEY_LENGTH]


def _first(cells: list[str]) -> str:
    return cells[0] + (f"; and {len(cells) - 1} more" if len(cells) > 1 else "")


def _combinations(study: Study) -> Iterator[tuple[dict[str, str], dict[str, Any]]]:
    """(labels, settings) of every cell, each combination of labels once."""
    axes = {name: choices(axis, name) for name, axis in study.product.items()}
    seen = set()
    for fixed in ({}, *study.include):
        values = [_values(axes[name], name, fixed) for name in axes]
        for combination in itertools.product(*values):
            labels = {name: label for name, (label, _) in zip(axes, combination, strict=True)}
            identity = tuple(labels.values())
            if identity in seen or (not fixed and any(_matches(labels, entry) for entry in study.exclude)):
                continue
            seen.add(identity)
            yield labels, {key: value for _, changes in combination for key, value in changes.items()}


def _values(axis: list[tuple[str, dict[str, Any]]], name: str, fixed: dict[str, Any]) -> list[tuple[str, Any]]:
    if name not in fixed:
        return axis
    known = dict(axis)
    return [(label_of(value), known.get(label_of(value), {name: value})) for value in as_list(fixed[name])]


def _matches(labels: dict[str, str], entry: dict[str, Any]) -> bool:
    return all(labels[name] in map(label_of, as_list(value)) for name, value in entry.items())


def _recipe(start: dict[str, Any], changes: dict[str, Any], split: str) -> Recipe:
    overrides = [f"{key}={json.dumps(value)}" for key, value in changes.items()]
    recipe = recipe_from(apply_overrides(start, overrides), "recipe", overrides)
    if recipe.eval.tasks == ():
        raise UserError("eval.tasks: a study compares evaluations, got [], allowed: at least one task.")
    if split == "halves":
        faults = [
            f"{key}: goes by all validation examples, half of which compare the arms, got {value}, allowed: "
            "compare.split: test, or the recipe without it."
            for key, value in (
                ("eval.best_by", recipe.eval.best_by),
                ("interference.loss_weights", recipe.interference.loss_weights),
            )
            if value is not None
        ]
        if faults:
            raise UserError(*faults)
    return recipe


def _without_start(recipe: Recipe) -> Recipe:
    """A trained cell does not evaluate its base: one cell does that for all."""
    return recipe_from(apply_overrides(settings(recipe), ["eval.at_start=false", "eval.at_end=true"]))


def _without_weight(source: dict[str, Any]) -> dict[str, Any]:
    """A weight in the loss means nothing to a base that is only evaluated."""
    return {name: value for name, value in source.items() if name != "loss_weight"}


def _base(recipe: Recipe, *, dense: bool, known: dict[str, Cell]) -> Cell:
    """The recipe that evaluates the recipe's base, or the uncompressed one, and nothing else."""
    whole = settings(recipe)
    document: dict[str, Any] = {
        "model": whole["model"],
        "base": {"quant": "none"} if dense else whole["base"],
        "adapter": {"kind": "none"},
        "data": whole["data"] | {"mix": [_without_weight(source) for source in whole["data"]["mix"]]},
        "train": {"steps": 0, "batch": 1},
        "eval": {name: value for name, value in whole["eval"].items() if name in _EVALUATION},
    }
    text = json.dumps(document, sort_keys=True)
    if text not in known:
        base = recipe_from(document)
        known[text] = Cell(key_of(base), {}, base, False)
    return known[text]
