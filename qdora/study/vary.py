"""A study from one line: the study file that `qdora study RECIPE --vary KEY=VALUES` stands for."""

from __future__ import annotations

import itertools
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qdora.errors import UserError
from qdora.files.atomic import atomic_write_text
from qdora.files.machine import user_path
from qdora.recipe.recipe_file import ignored, key_and_value, recipe_document, recipe_names, with_overrides, yaml_text
from qdora.study.grid import label_of


def varied(
    recipe: str, vary: Sequence[str], overrides: Sequence[str] = (), seeds: int | None = None, rates: str | None = None
) -> str:
    """The study file, not checked. The first values are the references, `rates` the values of train.lr to search.

    The keys of `base` make one axis and all others the compared one; without others it is the bases that are compared.
    """
    document, where = recipe_document(recipe)
    if "product" in document:
        raise UserError(f"--vary: {where} is a study file, which has axes of its own. Fix: remove --vary.")
    start, keys = with_overrides(document, overrides, logging.INFO), dict[str, list[Any]]()
    for key, values in (key_and_value(item, of_vary=True) for item in vary):
        keys.setdefault(key, []).extend(values)
    bases = {key: values for key, values in keys.items() if key.startswith("base.")}
    arms = {key: values for key, values in keys.items() if key not in bases}
    product = dict(_axis(start, each) for each in (bases, arms) if each)
    *also, arm = product
    study: dict[str, Any] = {
        "recipe": recipe if recipe in recipe_names() else os.path.abspath(user_path(recipe)),
        "settings": dict(map(key_and_value, overrides)) or None,
        "product": product,
        "seeds": seeds,
        "rates": None if rates is None else {"values": key_and_value(f"rates={rates}", of_vary=True)[1]},
        "compare": {"arm": arm} | ({"also": also} if also else {}),
    }
    return yaml_text({key: value for key, value in study.items() if value is not None})


def _axis(start: dict[str, Any], keys: Mapping[str, Sequence[Any]]) -> tuple[str, Any]:
    """All combinations of these keys' values. A key that has no effect beside the others is left out."""
    groups: dict[str, dict[str, Any]] = {}
    for values in itertools.product(*keys.values()):
        group = dict(zip(keys, values, strict=True))
        whole = with_overrides(start, [f"{key}={json.dumps(value)}" for key, value in group.items()], logging.INFO)
        off = ignored(whole) if len(group) > 1 else {}
        label = "/".join("-" if key in off else label_of(value) for key, value in group.items())
        groups[label] = {key: value for key, value in group.items() if key not in off}
    name = "/".join(keys)
    return name, groups if len(keys) > 1 else [group[name] for group in groups.values()]


def keep_grid(file: Path, text: str) -> None:
    """Write the study file, unless it is there; another one is not replaced."""
    if file.is_file() and file.read_text(encoding="utf-8") != text:
        fix = "name another --dir, or remove the file; finished cells are kept"
        raise UserError(f"{file}: is of other settings or edited. Fix: {fix}.")
    file.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(file, text)
