"""A study from one line: the study file that `qdora study RECIPE --vary KEY=VALUES` stands for, and its table."""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qdora.errors import UserError
from qdora.files.atomic import atomic_write_text
from qdora.files.machine import user_path
from qdora.files.pages import markdown_table
from qdora.recipe.recipe_file import (
    ignored,
    key_and_value,
    recipe_document,
    recipe_names,
    with_overrides,
    yaml_text,
)
from qdora.study.compare import BASE_ARM
from qdora.study.grid import label_of
from qdora.study.report import Report


def varied(
    recipe: str,
    vary: Sequence[str],
    overrides: Sequence[str] = (),
    seeds: int | None = None,
    rates: str | None = None,
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
        whole = with_overrides(
            start, [f"{key}={json.dumps(value)}" for key, value in group.items()], logging.INFO
        )
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


def table(report: Report) -> str:
    """Rows: bases with the bits that are stored for a weight. Columns: arms. Cells: NLL and accuracy, 95 % intervals.

    An interval of a trained arm is over its seeds, one without an adapter over the examples.
    """
    arm_axis, cells, bits = report.compare.arm, dict[str, dict[str, str]](), dict[str, float]()
    is_of_bases = arm_axis.startswith("base.")
    for row in report.tables["arms"]:
        names = [row[axis] for axis in report.axes] + ([row[arm_axis]] if is_of_bases else [])
        base = (
            ", ".join(names)
            if names and names != [BASE_ARM]
            else "uncompressed"
            if row["is_dense"]
            else "recipe's"
        )
        column = BASE_ARM if row["kind"] == "base" else "trained" if is_of_bases else row[arm_axis]
        bits.setdefault(base, row.get("bits_per_weight", math.nan))
        parts = [_with_ends(row, "nll_per_token", 1.0, 3), _with_ends(row, "acc", 100.0, 1, " %")]
        cells.setdefault(base, {})[column] = "; ".join(filter(None, parts))
    columns = list(dict.fromkeys(column for row in cells.values() for column in row))
    rows = [
        [base, f"{bits[base]:.2f}", *(own.get(each) or "–" for each in columns)] for base, own in cells.items()
    ]
    note = "NLL of the answers in nats a token (lower is better); accuracy. Brackets: 95 % intervals."
    return markdown_table(["base", "bits a weight", *columns], rows, [False, True]) + f"\n\n{note}"


def _with_ends(row: Mapping[str, Any], name: str, factor: float, digits: int, unit: str = "") -> str:
    value, *ends = (factor * row.get(f"{name}{end}", math.nan) for end in ("", "_lower", "_upper"))
    interval = "" if math.isnan(ends[0]) else f" [{ends[0]:.{digits}f}, {ends[1]:.{digits}f}]"
    return "" if math.isnan(value) else f"{value:.{digits}f}{interval}{unit}"
