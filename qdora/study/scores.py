"""Scores of single examples: read from the cells of a study and aligned for the statistics."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from qdora.errors import UserError
from qdora.study.statistics import Array, TaskScores

Measure = Literal["nll_per_token", "acc", "acc_norm", "right", "unparsable"]
"""right and unparsable are shares of generated answers. An answer that cannot be parsed is not counted as wrong."""
HIGHER_IS_BETTER = {"nll_per_token": False, "acc": True, "acc_norm": True, "right": True, "unparsable": False}

_Scores = dict[str, dict[str, float]]
"""task -> example -> number."""


@dataclass(frozen=True)
class CellScores:
    """Scores of one cell and their weights: measure -> task -> example -> number, the summed NLL for nll_per_token.

    Only tasks with choices have accuracies.
    """

    values: dict[str, _Scores]
    weights: dict[str, _Scores]


def read_scores(cell: Path, files: Mapping[str, str], split: str) -> CellScores:
    """Read the scores of a cell on a split; generated answers belong to the validation examples.

    `files` are of the cell's result: "validation", optionally "test" and "generated" -> file below the run directory.
    UserError: The evaluation is missing, damaged, or without scores of single examples.
    """
    values: dict[str, _Scores] = {}
    weights: dict[str, _Scores] = {}

    def add(measure: Measure, task: str, example: str, value: float, weight: float = 1.0) -> None:
        values.setdefault(measure, {}).setdefault(task, {})[example] = value
        weights.setdefault(measure, {}).setdefault(task, {})[example] = weight

    for example, row in _rows(cell, files.get(split), split):
        add("nll_per_token", row["task"], example, row["nll"], row["num_answer_tokens"])
        if "acc" in row:
            add("acc", row["task"], example, row["acc"])
            add("acc_norm", row["task"], example, row["acc_norm"])
    if split == "validation" and "generated" in files:
        for example, row in _rows(cell, files["generated"], "generated"):
            add("right", row["task"], example, float(row["outcome"] == "right"))
            add("unparsable", row["task"], example, float(row["outcome"] == "unparsable"))
    return CellScores(values, weights)


def half(examples: Sequence[str], which: Literal["choose", "compare"]) -> list[str]:
    """One half of a task's examples: every second one in the order of their hashes, the same in every study.

    With an odd number of examples, the larger half is the one that compares.
    """
    shuffled = sorted(
        examples, key=lambda example: hashlib.sha256(example.encode("utf-8", "backslashreplace")).digest()
    )
    chosen = set(shuffled[0::2] if which == "compare" else shuffled[1::2])
    return [example for example in examples if example in chosen]


def stacked(
    series: Sequence[Sequence[CellScores]], measure: str, part: Literal["all", "choose", "compare"]
) -> list[TaskScores]:
    """Scores of several series (arms or bases, one cell a seed) on the same examples, all or one half, task by task.

    The single cell of a base is repeated for every seed. UserError: The cells were evaluated on different examples, or
    a task has only one example.
    """
    num_seeds = max(len(cells) for cells in series)
    known = series[0][0]
    tasks = []
    for task, weights in known.weights.get(measure, {}).items():
        examples = list(weights) if part == "all" else half(list(weights), part)
        if not examples:
            raise UserError(f"compare.split: task {task!r} has 1 example, halves need at least 2.")
        rows = [[_row(cell, measure, task, examples) for cell in cells] for cells in series]
        full = [row * num_seeds if len(row) == 1 else row for row in rows]
        tasks.append(TaskScores(np.array(full), np.array([weights[example] for example in examples], dtype=float)))
    return tasks


def mean_score(cells: Sequence[CellScores], measure: str, part: Literal["all", "choose", "compare"]) -> float | None:
    """Average of a measure over the cells, every task counting once; None if no cell was scored by it."""
    tasks = stacked([cells], measure, part)
    if not tasks:
        return None
    return float(np.mean([task.scores[0].mean(axis=0).sum() / task.weights.sum() for task in tasks]))


def _row(cell: CellScores, measure: str, task: str, examples: Sequence[str]) -> Array:
    found = cell.values.get(measure, {}).get(task, {})
    missing = [example for example in examples if example not in found]
    if missing:
        raise UserError(
            f"study: task {task!r}, example {missing[0]!r} was not evaluated in every cell. "
            "All cells must have the same data and eval settings."
        )
    return np.array([found[example] for example in examples], dtype=float)


def _rows(cell: Path, file: str | None, what: str) -> list[tuple[str, dict[str, Any]]]:
    """(name of the example, its record); the name is the id with a number, since ids can repeat within a task."""
    if file is None:
        raise UserError(f"{cell}: has no {what} scores. Fix: run 'qdora study' again with this compare.split.")
    path = cell / file
    if not path.resolve().is_relative_to(cell.resolve()):
        raise UserError(f"{path}: must be a file inside the run directory of its cell.")
    try:
        rows = json.loads(path.read_bytes())["per_example"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: no scores of single examples ({type(error).__name__}).") from None
    seen: Counter[tuple[str, str]] = Counter()
    named = []
    for row in rows:
        identity = (row["task"], str(row["id"]))
        seen[identity] += 1
        named.append((f"{identity[1]}#{seen[identity]}", row))
    return named
