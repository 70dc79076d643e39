"""Scores of single examples: read from the cells of a study, and combined over cells on the same examples."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from qdora.errors import UserError
from qdora.evaluate.before_after import by_task
from qdora.evaluate.example_intervals import Array, SeedScores, TaskScores, Weighting

Measure = Literal["nll_per_token", "nll_by_task", "acc", "acc_norm", "chance", "right", "unparsable"]
"""nll_per_token: NLL of the right answer, nats per token. nll_by_task: the same with each task counting once. acc,
acc_norm: share of questions whose right choice is the likeliest one, by its likelihood and by that per character.
chance: share that a guess gets right, which is no arm's score. right and unparsable are shares of generated answers. An
answer that cannot be parsed is not wrong."""
HIGHER_IS_BETTER = {
    "nll_per_token": False,
    "nll_by_task": False,
    "acc": True,
    "acc_norm": True,
    "right": True,
    "unparsable": False,
}
Part = Literal["all", "choose", "compare"]
CellScores = Mapping[str, SeedScores]
"""Measure -> task -> scores. Only tasks with choices have accuracies."""


def read_scores(cell: Path, files: Mapping[str, str], part: Part) -> CellScores:
    """Read the scores of a cell, of all examples or of one half.

    `files` are of the cell's result: "scores", optionally "generated" -> file below the run directory.
    UserError: The evaluation is missing, damaged, without scores of single examples, or has no example in the half.
    """
    found: dict[str, dict[str, dict[str, tuple[float, float]]]] = {}

    def add(measure: Measure, row: Mapping[str, Any], example: str, value: float, weight: float = 1.0) -> None:
        found.setdefault(measure, {}).setdefault(row["task"], {})[example] = (value, weight)

    for example, row in _rows(cell, files["scores"]):
        for measure in ("nll_per_token", "nll_by_task"):
            add(measure, row, example, row["nll"], row["num_answer_tokens"])
        if "acc" in row:
            add("acc", row, example, row["acc"])
            add("acc_norm", row, example, row["acc_norm"])
            add("chance", row, example, 1 / len(row["loglikelihoods"]))
    for example, row in _rows(cell, files["generated"]) if "generated" in files else ():
        add("right", row, example, float(row["outcome"] == "right"))
        add("unparsable", row, example, float(row["outcome"] == "unparsable"))
    scores = {}
    for measure, tasks in found.items():
        kept = {task: _task_scores(rows, part) for task, rows in tasks.items()}
        scores[measure] = {task: each for task, each in kept.items() if each is not None}
        if not scores[measure]:
            number = sum(map(len, tasks.values()))
            raise UserError(
                f"{cell}: {number} examples are too few for two halves, one of which is empty. "
                "Fix: raise eval.limit, or set compare.split to test."
            )
    return scores


def weighting_of(measure: str, weighting: Weighting) -> Weighting:
    """The study's weights for NLL per token; for all else every task counts once."""
    return weighting if measure == "nll_per_token" else "equal"


def half_of(example: str) -> Literal["choose", "compare"]:
    """The half of an example, which is the same in every study; about as many examples are in each."""
    identity = example.rpartition("#")[0]
    digest = hashlib.sha256(identity.encode("utf-8", "backslashreplace")).digest()
    return "choose" if digest[0] % 2 else "compare"


def combined(terms: Sequence[tuple[float, SeedScores]]) -> SeedScores:
    """Sum of factor * scores over the terms, example by example. UserError: they are not of the same examples."""
    total: dict[str, TaskScores] = {}
    for factor, scores in terms:
        if total and set(total) != set(scores):
            raise UserError("study: not all cells were evaluated on the same tasks. All need the same eval.tasks.")
        for task, found in scores.items():
            first = total.get(task)
            if first is None:
                total[task] = TaskScores(found.examples, factor * found.values, found.weights)
            else:
                values = first.values + factor * _aligned(task, found, first.examples)
                total[task] = TaskScores(first.examples, values, first.weights)
    return total


def _aligned(task: str, scores: TaskScores, examples: tuple[str, ...]) -> Array:
    """The values in the order of these examples."""
    if scores.examples == examples:
        return scores.values
    if set(scores.examples) != set(examples):
        raise UserError(
            f"study: task {task!r} was not evaluated on the same examples in all cells of a seed. "
            "All cells must have the same data and eval settings."
        )
    by_name = dict(zip(scores.examples, scores.values.tolist(), strict=True))
    return np.array([by_name[example] for example in examples])


def _task_scores(rows: Mapping[str, tuple[float, float]], part: Part) -> TaskScores | None:
    """The scores of a task's examples in the half; None if it has none there, as it then has in all cells of a seed."""
    kept = {example: pair for example, pair in rows.items() if part in ("all", half_of(example))}
    if not kept:
        return None
    values, weights = np.array(list(kept.values()), dtype=np.float64).T
    return TaskScores(tuple(kept), values, weights)


def _rows(cell: Path, file: str) -> list[tuple[str, Mapping[str, Any]]]:
    """(name of the example, its record)."""
    path = cell / file
    if not path.resolve().is_relative_to(cell.resolve()):
        raise UserError(f"{path}: must be a file inside the run directory of its cell.")
    try:
        rows = json.loads(path.read_bytes())["per_example"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: no scores of single examples ({type(error).__name__}).") from None
    return [pair for records in by_task(rows).values() for pair in records.items()]
